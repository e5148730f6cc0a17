"""The boundary between K-LoRA and its hosts.

Every host offers a `LayerSwitch`. A WebUI also offers a `PairSwitch`, through the `Adapter` for its kind, and
everything else that K-LoRA asks of it, as a `Host`. hosts/webui.py implements `Host` for the WebUI that is
running, tests/standin/in_memory.py for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType

import torch

from klora.core.families.base import Family
from klora.core.lora_file import LoraFile
from klora.errors import HostError
from klora.hosts.sizes import Sizes

Strengths = tuple[float, float]
"""(subject, style): factors of 0, 0.5 or 1 for the multipliers that the user gave the two LoRAs."""


def present(strengths: Strengths) -> list[tuple[str, float]]:
    """(role, strength) of each LoRA that is on a layer at all, in the order in which they are applied."""
    return [
        (role, strength) for role, strength in zip(("subject", "style"), strengths, strict=True) if strength
    ]


class LayerSwitch(Protocol):
    """Applies the two LoRAs of the pair to single layers of a host's denoiser, each at its own strength.

    One object serves one run. `detach` restores exactly what `attach` found; it may be called at any time,
    and more than once.
    """

    def attach(self) -> None:
        """Start switching layers. Undoes first whatever a crashed run may have left behind."""

    def apply(self, strengths: Mapping[str, Strengths]) -> None:
        """Set the pair's strengths on the given layers and leave all other layers as they are.

        Each layer becomes, bit for bit, what the host's own <lora:name:weight> tags make of it when each
        weight is the user's multiplier times the strength. A LoRA with strength 0 is not applied at all.

        Args:
            strengths: {canonical layer: strengths}.
        """

    def detach(self) -> None:
        """Stop switching layers and restore the denoiser bit for bit."""


@dataclass(frozen=True)
class PairLora:
    """One LoRA of the pair, as a WebUI has to load it.

    Attributes:
        role: "subject" or "style".
        name: the WebUI's name for it.
        file: as K-LoRA has read it.
        weight: the user's multiplier.
        on_text_encoder: whether its text-encoder part is applied.
    """

    role: str
    name: str
    file: LoraFile
    weight: float
    on_text_encoder: bool


def not_loaded(lora: PairLora, reason: str) -> HostError:
    """The error for a LoRA of the pair that the WebUI's loader could not load."""
    return HostError(f"The WebUI did not load the {lora.role} LoRA {lora.file.path}: {reason}")


class PairSwitch(LayerSwitch, Protocol):
    """Handles the pair during one generation of a WebUI, from loading to sampling."""

    def expire_loaded(self) -> None:
        """Make the WebUI load networks again that it would otherwise take for loaded.

        Call it whenever the prompts have been parsed, before the WebUI loads their networks and `tags`.
        """

    def tags(self) -> Sequence[tuple[str, float]]:
        """(name, weight) of what the WebUI itself has to load, as if the prompt ended in these tags."""

    def networks_loaded(self) -> None:
        """Add the pair to the prompt's networks, which the WebUI has just loaded together with `tags`.

        Raises:
            HostError: the WebUI did not load one of the two LoRAs.
        """

    def attached(self) -> AbstractContextManager[None]:
        """A context for the WebUI's text encoding, and for its sampling of a batch.

        If the WebUI also applies networks outside a sampling pass, the pair is attached throughout.
        """

    def leave(self) -> None:
        """Continue the generation with the prompt's own networks only."""

    def fail(self, error: BaseException) -> None:
        """Raise `error` from the next evaluation of the denoiser.

        A WebUI catches what its callbacks raise, so raising it there would not stop the run.
        """


@dataclass(frozen=True)
class Pair:
    """What a WebUI's adapter needs to know about the pair of a run.

    Attributes:
        loras: subject and style, in the order in which they are applied.
        layers: the canonical layers of the plan.
        unscored: norms and lone biases that either file changes; each has the strengths of its leading layer.
        readable: makes a copy of a file that the WebUI's loader understands, and returns its path.
    """

    loras: tuple[PairLora, ...]
    layers: Sequence[str]
    unscored: Collection[str]
    readable: Callable[[LoraFile], Path]


class Adapter(Protocol):
    """How one kind of WebUI handles checkpoints. hosts/detect.py finds the adapter that fits a WebUI."""

    def family_of(self, model: Any) -> Family:
        """The family of a loaded checkpoint; an unlisted one is made of the WebUI's own names.

        Raises:
            HostError: it is of no listed family, and the WebUI does not tell its names for it.
        """

    def sizes_of(self, model: Any) -> Sizes:
        """The layer sizes of a loaded checkpoint's denoiser without any LoRA.

        Raises:
            HostError: the checkpoint is stored in a format that cannot take LoRAs layer by layer.
        """

    def switch(self, model: Any, pair: Pair) -> PairSwitch:
        """A switch for the pair on a loaded checkpoint, to which it keeps only a weak reference.

        Raises:
            HostError: the checkpoint is stored in a format that cannot take LoRAs layer by layer.
        """


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint that a WebUI has loaded.

    It keeps `model` in memory, so do not store it beyond a call.

    Attributes:
        model: the WebUI's object. The WebUI may later load another checkpoint into the same object.
        file: path of the checkpoint, which tells it from any other; None if the WebUI does not give one.
        name: as the WebUI's list of checkpoints shows it.
        adapter: for this kind of WebUI.
    """

    model: Any
    file: str | None
    name: str
    adapter: Adapter

    @property
    def family(self) -> Family:
        """See `Adapter.family_of`."""
        return self.adapter.family_of(self.model)

    def sizes(self) -> Sizes:
        """See `Adapter.sizes_of`."""
        return self.adapter.sizes_of(self.model)

    def switch(self, pair: Pair) -> PairSwitch:
        """See `Adapter.switch`."""
        return self.adapter.switch(self.model, pair)


def still_loaded(model: ReferenceType[Any]) -> Any:
    """The checkpoint of a run, which refers to it weakly: a run that crashes must not keep it in memory.

    Raises:
        HostError: the WebUI has unloaded it.
    """
    found = model()
    if found is None:
        raise HostError("The WebUI has unloaded the checkpoint of this run: start the run again.")
    return found


class LoraEntry(Protocol):
    """A WebUI's own record of a LoRA file."""

    filename: str
    alias: str
    shorthash: str | None

    def read_hash(self) -> None:
        """Fill in `shorthash`, from the file if necessary."""


@dataclass(frozen=True)
class HostLora:
    """One LoRA file that the host lists.

    Attributes:
        name: as the host's LoRA tab shows it.
        alias: the name that its trainer wrote into the file, or else `name`.
        path: of the file.
        shorthash: first digits of the host's hash of it; "" until the host has hashed it.
        entry: the host's own record of the file, which stays valid even when the host lists its files again.
    """

    name: str
    alias: str
    path: Path
    shorthash: str
    entry: LoraEntry = field(repr=False, compare=False)

    @classmethod
    def of(cls, name: str, entry: LoraEntry) -> HostLora:
        """What the host lists under `name`."""
        return cls(name, entry.alias, Path(entry.filename), entry.shorthash or "", entry)

    @property
    def chosen_as(self) -> str:
        """What controls, requests and infotexts call it: its name, or the file's name if that is "None".

        "None" in these places means no LoRA.
        """
        return self.path.name if self.name == "None" else self.name

    def hash(self) -> str:
        """The host's short hash of it, computed from the file if necessary; "" if it hashes no files."""
        self.entry.read_hash()
        return self.entry.shorthash or ""


class LoraLibrary(Protocol):
    """The LoRA files of a WebUI."""

    def loras(self) -> list[HostLora]:
        """All LoRAs that it lists, sorted by name."""

    def refresh_loras(self) -> None:
        """Make it read its LoRA folders again."""

    def lora_of_tag(self, name: str) -> HostLora | None:
        """The LoRA that <lora:name> loads: the one of this name, or of this alias unless several share it."""

    def lora_folders(self) -> list[Path]:
        """The folders in which it looks for LoRA files, including their subfolders."""

    def preview_of(self, lora: HostLora) -> str | None:
        """URL of the image on the LoRA's card in the WebUI, None if it has none."""


class Checkpoints(Protocol):
    """The checkpoint of a WebUI."""

    def checkpoint(self) -> Checkpoint:
        """The loaded checkpoint. If none is loaded, the WebUI loads the chosen one first.

        Raises:
            UnknownHost: K-LoRA does not know this kind of WebUI.
        """

    def checkpoint_at_rest(self) -> Checkpoint | None:
        """The loaded checkpoint; None if none is loaded, or if the WebUI will load another one first.

        Raises:
            UnknownHost: K-LoRA does not know this kind of WebUI.
        """


class PassSchedule(NamedTuple):
    """The steps of one sampling pass.

    Attributes:
        steps: number of steps in the whole schedule.
        first: index of the first step that runs (0-based).
        runs: number of steps that run.
    """

    steps: int
    first: int
    runs: int


class Generations(Protocol):
    """What a WebUI does during one generation, which its processing object `p` stands for."""

    def schedule_of_pass(self, p: Any) -> PassSchedule:
        """The steps of the pass that is about to start, as the WebUI's samplers count them.

        img2img and the hires pass run only the end of their schedule.
        """

    def tag_words(self) -> list[str]:
        """The words that may stand before the first colon in a LoRA tag."""

    def tag(self, name: str, weight: float) -> Any:
        """What the WebUI's parser makes of <lora:name:weight>.

        It also works for names such as "a=b", which the parser itself would take for a parameter.
        """

    def activate(self, p: Any, tags: Any) -> None:
        """Make it load again the networks that these tags of `p` name."""


class Lock(Protocol):
    """A lock without a timeout, which threads get in the order in which they asked for it."""

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock, waiting for it if `blocking`. Returns whether the caller now has it."""

    def release(self) -> None:
        """Give the lock to the next thread that waits for it."""


class Machine(Protocol):
    """How a WebUI shares the machine, and what progress it shows."""

    def queue_lock(self) -> Lock:
        """The lock that whoever computes on the machine has to have."""

    def is_awaited(self) -> bool:
        """Whether a thread waits for the queue lock."""

    def is_generating(self) -> bool:
        """Whether a generation is running."""

    def is_interrupted(self) -> bool:
        """Whether the user has asked the running generation to stop."""

    def scoring_progress(self) -> AbstractContextManager[Callable[[int, int], None]]:
        """A context that yields a function to call with (layers scored, layers in all).

        The WebUI shows these numbers as its progress; afterwards it shows what it showed before.
        """

    def device(self) -> torch.device:
        """The device that the WebUI computes on."""


class Preferences(Protocol):
    """What the user has set in a WebUI."""

    def option(self, name: str, default: Any) -> Any:
        """The value of an option, or `default` if there is no such option."""

    def set_option(self, name: str, value: Any) -> None:
        """Set an option without saving it; it lasts until the WebUI itself changes it."""

    def api_credentials(self) -> dict[str, str]:
        """{user: password} for its API; empty if anybody may use it."""


class Host(LoraLibrary, Checkpoints, Generations, Machine, Preferences, Protocol):
    """Everything that K-LoRA asks of a WebUI."""

    def report(self, message: str) -> None:
        """Write `message` and the exception that is being handled where the WebUI writes its own errors."""
