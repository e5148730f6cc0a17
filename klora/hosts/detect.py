"""Tells which WebUI this is by what it can do: every fork has other version tags and folder names."""

from __future__ import annotations

from typing import Any

from klora.core.families import FAMILIES, of_checkpoint
from klora.errors import HostError
from klora.hosts.a1111 import A1111
from klora.hosts.base import Adapter, Pair, PairSwitch
from klora.hosts.classic import ClassicSwitch
from klora.hosts.forge import ForgeSwitch
from klora.hosts.neo import NeoSwitch
from klora.hosts.patchers import PatcherSwitch
from klora.hosts.sizes import Sizes, native_sizes

ENGINES = {
    "Chroma": "Chroma", "Flux2": "FLUX.2 Klein", "Lumina2": "Lumina 2", "PiD": "PiD", "ZImage": "Z-Image",
}  # fmt: skip
"""{class of a loaded checkpoint in Forge and Forge Neo: what people call its base model}"""

FLAGS = {
    "is_sd1": "Stable Diffusion 1.x",
    "is_sd2": "Stable Diffusion 2.x",
    "is_sd3": "Stable Diffusion 3",
}
"""{flag that every host sets on a checkpoint of an older base model: what people call that}"""


class UnknownHost(HostError):
    """K-LoRA knows none of the ways in which this WebUI could apply LoRAs."""


class ForgeLike:
    """`Adapter` for Forge and its relatives.

    Args:
        networks: the module of the host's Lora extension.
        kind: the switch class for this host's patcher.
    """

    def __init__(self, networks: Any, kind: type[PatcherSwitch]) -> None:
        self._networks = networks
        self._kind = kind

    def base_of(self, model: Any) -> str | None:
        return of_checkpoint(model, model.forge_objects.unet.model.diffusion_model)

    def sizes_of(self, model: Any) -> Sizes:
        self._refuse_nunchaku(model)
        base = self.base_of(model)
        return native_sizes(
            FAMILIES[base].modules if base else (),
            lambda path: self._kind.original_weight(model.forge_objects.unet, path),
            self._kind.padded,
        )

    def switch(self, model: Any, pair: Pair) -> PairSwitch:
        self._refuse_nunchaku(model)
        return self._kind(self._networks, model, pair)

    @staticmethod
    def _refuse_nunchaku(model: Any) -> None:
        if hasattr(model.forge_objects.unet.model.diffusion_model, "loras"):
            raise HostError(
                "This checkpoint is stored for Nunchaku, which cannot apply LoRAs layer by layer: load the "
                "checkpoint in another format."
            )


def name_of_base(model: Any) -> str | None:
    """What people call the base model of a loaded checkpoint that `Adapter.base_of` does not know.

    Returns:
        None if nothing in the checkpoint's object tells.
    """
    flagged = (name for flag, name in FLAGS.items() if getattr(model, flag, False))
    return next(flagged, ENGINES.get(type(model).__name__))


FORGES: tuple[type[PatcherSwitch], ...] = (ForgeSwitch, NeoSwitch, ClassicSwitch)
"""In the order in which to ask them: a later fork may also have what an earlier one is recognised by."""


def find_adapter(networks: Any, model: Any) -> Adapter:
    """The adapter for this host.

    Args:
        networks: the module of the host's Lora extension.
        model: the loaded checkpoint, `shared.sd_model`.

    Raises:
        UnknownHost: no adapter fits; its message names what was looked for.
    """
    objects = getattr(model, "forge_objects", None)
    unet = getattr(objects, "unet", None)
    for kind in FORGES:
        if kind.drives(unet):
            return ForgeLike(networks, kind)
    if objects is None and A1111.drives(networks):
        return A1111(networks)
    looked_for = ", ".join((A1111.MARK, *(kind.MARK for kind in FORGES)))
    raise UnknownHost(
        "K-LoRA does not know this WebUI, so the image is made without it. "
        f"Looked for and not found: {looked_for}."
    )
