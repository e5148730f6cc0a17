"""Which WebUI this is, told by what it can do: version tags and folder names changed with every fork."""

from __future__ import annotations

from typing import Any

from klora.core.topology import DOUBLE_BLOCKS, SINGLE_BLOCKS
from klora.errors import HostError
from klora.hosts.a1111 import A1111
from klora.hosts.base import Pair, PairSwitch, WebUI
from klora.hosts.classic import ClassicSwitch
from klora.hosts.forge import ForgeSwitch
from klora.hosts.neo import NeoSwitch
from klora.hosts.patchers import PatcherSwitch


class UnknownHost(HostError):
    """This WebUI has none of the LoRA mechanisms that K-LoRA knows."""


class ForgeLike:
    """`WebUI` of Forge and its relatives.

    Args:
        networks: the module of the host's Lora extension.
        kind: the switch for this host's patcher.
    """

    def __init__(self, networks: Any, kind: type[PatcherSwitch]) -> None:
        self._networks = networks
        self._kind = kind

    def base_of(self, model: Any) -> str | None:
        if getattr(model, "is_sdxl", False):
            return "sdxl"
        denoiser = model.forge_objects.unet.model.diffusion_model
        depths = [len(getattr(denoiser, name, ())) for name in ("double_blocks", "single_blocks")]
        return "flux" if depths == [DOUBLE_BLOCKS, SINGLE_BLOCKS] and hasattr(denoiser, "vector_in") else None

    def switch(self, model: Any, pair: Pair) -> PairSwitch:
        if hasattr(model.forge_objects.unet.model.diffusion_model, "loras"):
            raise HostError(
                "This checkpoint is stored for Nunchaku, which takes LoRAs whole and not layer by layer: load another format of it."
            )
        return self._kind(self._networks, model, pair)


def find_webui(networks: Any, model: Any) -> WebUI:
    """The adapter for this host.

    Args:
        networks: the module of the host's Lora extension.
        model: the loaded checkpoint.

    Raises:
        UnknownHost: saying what was looked for.
    """
    objects = getattr(model, "forge_objects", None)
    unet = getattr(objects, "unet", None)
    if hasattr(unet, "lora_loader") and hasattr(unet, "lora_patches"):
        return ForgeLike(networks, ForgeSwitch)
    if hasattr(unet, "patches_uuid") and hasattr(unet, "patch_weight_to_device"):
        return ForgeLike(networks, NeoSwitch)
    if hasattr(unet, "patches") and hasattr(unet, "calculate_weight"):
        return ForgeLike(networks, ClassicSwitch)
    if (
        objects is None
        and hasattr(networks, "network_apply_weights")
        and hasattr(networks, "network_restore_weights_from_backup")
    ):
        return A1111(networks)
    raise UnknownHost(
        "K-LoRA does not know this WebUI, so the picture is made without it. Looked for and not found: networks.network_apply_weights "
        "(AUTOMATIC1111), unet.lora_loader (Forge), unet.patch_weight_to_device (Forge Neo, reForge), unet.calculate_weight (forge-classic)."
    )
