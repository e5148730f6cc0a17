"""The boundary between K-LoRA and its hosts.

`LayerSwitch` is what every host offers. A WebUI offers the pair as well (`PairSwitch`, by the `Adapter` of its kind), and all else that K-LoRA
asks of it (`Host`). hosts/webui.py has the one that runs, tests/standin/in_memory.py another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType

import torch

from klora.core.lora_file import LoraFile
from klora.errors import HostError
from klora.hosts.sizes import Sizes

Strengths = tuple[float, float]
"""How strongly the subject and the style are on a layer: each multiplies the user's multiplier of that LoRA."""


def present(strengths: Strengths) -> list[tuple[str, float]]:
    """(role, strength) of the LoRAs that are on a layer, in the order in which both are applied."""
    return [
        (role, strength) for role, strength in zip(("subject", "style"), strengths, strict=True) if strength
    ]


class LayerSwitch(Protocol):
    """Puts the two LoRAs of the pair on single layers of a host's denoiser, each as strongly as it is told.

    An object serves one run. `detach` gives back exactly what `attach` found, may be called at any time and more than once.
    """

    def attach(self) -> None:
        """Take hold of the denoiser; first undo what an earlier run that died may have left."""

    def apply(self, strengths: Mapping[str, Strengths]) -> None:
        """Put the pair on each named layer (canonical names) at these strengths; leave all other layers as they are.

        A layer is bit for bit what the host's own <lora:name:weight> makes of it, at the user's multiplier times the strength;
        a LoRA of strength 0 is not on it at all.
        """

    def detach(self) -> None:
        """Give the denoiser back bit for bit."""


@dataclass(frozen=True)
class Member:
    """One LoRA of the pair as a WebUI is to load it.

    Attributes:
        role: "subject" or "style".
        name: what the WebUI calls it.
        weight: the user's multiplier.
        on_text_encoder: whether its text-encoder part applies.
    """

    role: str
    name: str
    file: LoraFile
    weight: float
    on_text_encoder: bool


class PairSwitch(LayerSwitch, Protocol):
    """The pair in one generation of a WebUI, from loading to sampling."""

    def tags(self) -> Sequence[tuple[str, float]]:
        """Name and weight of what the WebUI itself is to load, as by <lora:name:weight>, after the prompt's own networks."""

    def networks_loaded(self) -> None:
        """The WebUI has loaded, perhaps again, the prompt's networks and `tags`: add the pair to them.

        Raises:
            HostError: the WebUI did not load one of the two.
        """

    def held(self) -> AbstractContextManager[None]:
        """Around the WebUI's text encoding, and around its sampling."""

    def leave(self) -> None:
        """Give what is left of the run to the prompt's own networks alone."""

    def fail(self, error: BaseException) -> None:
        """Stop the run with `error` at the next evaluation: what is raised inside a WebUI's callbacks never gets out."""


@dataclass(frozen=True)
class Pair:
    """What a WebUI's adapter is told of a run.

    Attributes:
        members: subject and style, in the order in which both are applied.
        layers: the canonical layers of the plan.
        unscored: norms and lone biases of either file; each follows its leading layer.
        readable: a copy of a file that the WebUI's loader understands.
    """

    members: tuple[Member, ...]
    layers: Sequence[str]
    unscored: Collection[str]
    readable: Callable[[LoraFile], Path]


class Adapter(Protocol):
    """What differs between the kinds of WebUI: their checkpoints. Found by what a WebUI can do (hosts/detect.py)."""

    def base_of(self, model: Any) -> str | None:
        """The key of the checkpoint's family, None for a checkpoint of any other kind."""

    def sizes_of(self, model: Any) -> Sizes:
        """The sizes of the layers of a checkpoint's denoiser, none if it is of no family, without any LoRA.

        Raises:
            HostError: as `switch`.
        """

    def switch(self, model: Any, pair: Pair) -> PairSwitch:
        """The pair's hold on the loaded checkpoint, which it does not keep alive.

        Raises:
            HostError: this checkpoint's storage cannot take LoRAs layer by layer.
        """


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint that a WebUI has loaded. It keeps that alive, so nobody keeps it.

    Attributes:
        model: the WebUI's object. Another checkpoint may be loaded into the same one.
        file: tells one checkpoint from another; None where the WebUI does not say.
        name: as the WebUI's list of checkpoints shows it.
    """

    model: Any
    file: str | None
    name: str
    adapter: Adapter

    @property
    def base(self) -> str | None:
        """As `Adapter.base_of`."""
        return self.adapter.base_of(self.model)

    def sizes(self) -> Sizes:
        """As `Adapter.sizes_of`."""
        return self.adapter.sizes_of(self.model)

    def switch(self, pair: Pair) -> PairSwitch:
        """As `Adapter.switch`."""
        return self.adapter.switch(self.model, pair)


def still_loaded(model: ReferenceType[Any]) -> Any:
    """The checkpoint of a run: the WebUI alone keeps it alive, so that a run that dies and is never ended does not.

    Raises:
        HostError: it is gone.
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
        """Fill in `shorthash`, from the file if need be."""


@dataclass(frozen=True)
class HostLora:
    """One LoRA file of the host.

    Attributes:
        name: as the host's LoRA tab shows it.
        alias: the name that its trainer wrote into the file; the name where there is none.
        shorthash: first digits of the host's hash of it; "" while the host has not hashed it.
        entry: the host's record of the file, good for as long as it is held, whatever the host lists by then.
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
        """What stands for it in a control, a request and an infotext: its name, but for "None", which means no LoRA there."""
        return self.path.name if self.name == "None" else self.name

    def hash(self) -> str:
        """The host's short hash of it, read from the file if need be; "" where the host does no hashing."""
        self.entry.read_hash()
        return self.entry.shorthash or ""


class LoraLibrary(Protocol):
    """The LoRA files of a WebUI."""

    def loras(self) -> list[HostLora]:
        """All that it lists, by name."""

    def refresh_loras(self) -> None:
        """Have it read its LoRA folders again."""

    def lora_of_tag(self, name: str) -> HostLora | None:
        """The LoRA that it takes for <lora:name>: that of this name or, unless several share it, of this alias."""

    def lora_folders(self) -> list[Path]:
        """Where it looks for LoRA files, subfolders included."""

    def preview_of(self, lora: HostLora) -> str | None:
        """Address of the image on its card of a LoRA."""


class Checkpoints(Protocol):
    """The checkpoint of a WebUI."""

    def checkpoint(self) -> Checkpoint:
        """The one that is loaded; while none is, the WebUI loads it.

        Raises:
            UnknownHost: this WebUI is of no kind that K-LoRA knows.
        """

    def checkpoint_at_rest(self) -> Checkpoint | None:
        """The same, but None while none is loaded, or another is to take its place.

        Raises:
            UnknownHost: as `checkpoint`.
        """


class PassSchedule(NamedTuple):
    """The steps of one sampling pass.

    Attributes:
        steps: of the whole schedule.
        first: the first one that runs.
        runs: how many of them run.
    """

    steps: int
    first: int
    runs: int


class Generations(Protocol):
    """What a WebUI does with its processing object `p`, one of which is one generation."""

    def schedule_of_pass(self, p: Any) -> PassSchedule:
        """Of the pass that is about to start, as its samplers count: img2img and the hires pass run the end of their schedule."""

    def tag_words(self) -> list[str]:
        """The words before the colon in tags of LoRAs."""

    def tag(self, name: str, weight: float) -> Any:
        """<lora:name:weight> as its parser makes it of most names; in others it would find a parameter, as in "a=b"."""

    def activate(self, p: Any, tags: Any) -> None:
        """Have it load what tags of `p` name, anew."""


class Lock(Protocol):
    """A lock without a time-out, had in the order of asking."""

    def acquire(self, blocking: bool = True) -> bool:
        """Whether it is had now."""

    def release(self) -> None:
        """Let the next one have it."""


class Machine(Protocol):
    """What a WebUI does with the machine, and what it shows of that."""

    def queue_lock(self) -> Lock:
        """Who has it has the machine."""

    def is_awaited(self) -> bool:
        """Whether somebody waits for the machine."""

    def is_generating(self) -> bool:
        """Whether a generation is under way."""

    def is_interrupted(self) -> bool:
        """Whether the user wants the generation that is under way to stop."""

    def scoring_progress(self) -> AbstractContextManager[Callable[[int, int], None]]:
        """Within it the WebUI shows how many layers of how many are scored, as it is told; afterwards what it did before."""

    def device(self) -> torch.device:
        """What it computes on."""


class Preferences(Protocol):
    """What the user has set."""

    def option(self, name: str, default: Any) -> Any:
        """Value of an option; `default` where there is no such one."""

    def set_option(self, name: str, value: Any) -> None:
        """Until the WebUI itself sets it otherwise; nothing is saved."""

    def api_credentials(self) -> dict[str, str]:
        """{user: password} of its API; empty where anybody may use it."""


class Host(LoraLibrary, Checkpoints, Generations, Machine, Preferences, Protocol):
    """A WebUI, as far as K-LoRA knows any."""

    def report(self, message: str) -> None:
        """Put the error that is being handled into the console, and where else errors are looked for."""
