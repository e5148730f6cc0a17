"""What a host must offer so that one run of K-LoRA can switch its layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import ReferenceType

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
        carried: norms and lone biases of either file; each follows its leading layer.
        readable: a copy of a file that the WebUI's loader understands.
    """

    members: tuple[Member, ...]
    layers: Sequence[str]
    carried: Collection[str]
    readable: Callable[[LoraFile], Path]


class WebUI(Protocol):
    """An adapter to one kind of WebUI."""

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


def still_loaded(model: ReferenceType[Any]) -> Any:
    """The checkpoint of a run: the WebUI alone keeps it alive, so that a run that dies and is never ended does not.

    Raises:
        HostError: it is gone.
    """
    found = model()
    if found is None:
        raise HostError("The WebUI has unloaded the checkpoint of this run: start the run again.")
    return found
