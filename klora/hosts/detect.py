"""Tells which WebUI this is by what it can do: every fork has other version tags and folder names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from klora.core.families import of_checkpoint
from klora.core.families.base import Family
from klora.core.families.unlisted import Place, unlisted
from klora.errors import HostError
from klora.hosts.a1111 import A1111
from klora.hosts.base import Adapter, Pair, PairSwitch
from klora.hosts.classic import ClassicSwitch
from klora.hosts.forge import ForgeSwitch
from klora.hosts.neo import NeoSwitch
from klora.hosts.patchers import DENOISER_KEY_PREFIX, PatcherSwitch
from klora.hosts.sizes import Sizes, native_sizes, true_shape
from klora.hosts.unlisted import kept, name_of_checkpoint


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

    def family_of(self, model: Any) -> Family:
        denoiser = model.forge_objects.unet.model.diffusion_model
        return of_checkpoint(model, denoiser) or kept(model, self._unlisted)

    def sizes_of(self, model: Any) -> Sizes:
        self._refuse_nunchaku(model)
        return native_sizes(
            self.family_of(model).modules,
            lambda path: self._kind.original_weight(model.forge_objects.unet, path),
            self._kind.padded,
        )

    def switch(self, model: Any, pair: Pair) -> PairSwitch:
        self._refuse_nunchaku(model)
        return self._kind(self._networks, model, pair)

    def _unlisted(self, model: Any) -> Family:
        """From the map by which the host's loader finds the weight of a key without its suffix.

        Its values are names of weights, or (name, (dimension, first row, number of rows)).
        """
        list_keys = _lister_of_keys(self._networks)
        if list_keys is None:
            raise HostError(
                f"K-LoRA has no list of the layers of {name_of_checkpoint(model)}, and the WebUI gives none: "
                "load a checkpoint of another base model, or switch K-LoRA off."
            )
        key_map = list_keys(model.forge_objects.unet.model, {})
        opening, ending = DENOISER_KEY_PREFIX, ".weight"
        places = {}
        for key, place in key_map.items():
            weight, cut = (place, None) if isinstance(place, str) else (place[0], place[1])
            if weight.startswith(opening) and weight.endswith(ending) and (cut is None or cut[0] == 0):
                path = weight[len(opening) : -len(ending)]
                places[key] = Place(path, None if cut is None else (cut[1], cut[2]))
        unet = model.forge_objects.unet
        weights = {place.path: self._kind.original_weight(unet, place.path) for place in places.values()}
        shapes = {path: shape for path, weight in weights.items() if (shape := true_shape(weight))}
        return unlisted(name_of_checkpoint(model), shapes, places.get, places)

    @staticmethod
    def _refuse_nunchaku(model: Any) -> None:
        if hasattr(model.forge_objects.unet.model.diffusion_model, "loras"):
            raise HostError(
                "This checkpoint is stored for Nunchaku, which cannot apply LoRAs layer by layer: load the "
                "checkpoint in another format."
            )


def _lister_of_keys(networks: Any) -> Callable[[Any, dict[str, Any]], Mapping[str, Any]] | None:
    """The host's `model_lora_keys_unet`: imported by the Lora extension, or in older relatives ComfyUI's."""
    for module in (networks, sys.modules.get("ldm_patched.modules.lora")):
        function: Callable[[Any, dict[str, Any]], Mapping[str, Any]] | None = getattr(
            module, "model_lora_keys_unet", None
        )
        if function is not None:
            return function
    return None


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
