"""Forge Neo and reForge: ComfyUI's patcher.

Its `patches` are {weight key: [(strength, value, strength of the model, offset, function, …)]}. The host
merges a weight with `patch_weight_to_device` on its backup of the original. If a weight is quantised or
offloaded, the host instead gives the layer a function that reads the patcher's dict in every forward pass.
One model may have both kinds of weight. The host merges again when the patcher's `patches_uuid` differs from
that of the last merge (backend/patcher/base.py, ldm_patched/modules/model_patcher.py).
"""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import Any
from uuid import uuid4

import torch

from klora.hosts.patchers import OnePatchDict, Patches


class NeoSwitch(OnePatchDict):
    """`PairSwitch` for Forge Neo and reForge."""

    MARK = "unet.patch_weight_to_device (Forge Neo, reForge)"

    @staticmethod
    def drives(unet: Any) -> bool:
        return hasattr(unet, "patches_uuid") and hasattr(unet, "patch_weight_to_device")

    @property
    def _online(self) -> bool:
        arguments = sys.modules.get("backend.args")
        return bool(arguments and arguments.dynamic_args.online_lora)

    def _add(self, patcher: Any, filename: str, weight: float, patches: Patches) -> None:
        super()._add(patcher, filename, weight, patches)
        patcher.patches_uuid = uuid4()

    def _mark(self, unet: Any) -> None:
        unet.patches_uuid = uuid4()

    def _is_merged(self, unet: Any) -> bool:
        return unet.model.current_weight_patches_uuid == unet.patches_uuid

    def _merge(self, unet: Any, patches: Patches) -> None:
        for key, added in patches.items():
            unet.patches[key] = added
            layer, name = attrgetter(key.rpartition(".")[0])(unet.model), key.rpartition(".")[2]
            functions = [
                function
                for function in getattr(layer, f"{name}_function", ())
                if getattr(function, "key", None) == key
            ]
            for function in functions:
                function.patches[key] = added
            if not functions:
                self._remerge(unet, key, layer, name)

    def _remerge(self, unet: Any, key: str, layer: Any, name: str) -> None:
        device = getattr(layer, name).device
        backup = unet.backup.get(key)
        if backup is not None and backup.inplace_update:
            getattr(layer, name).data.copy_(backup.weight)
        elif backup is not None:
            setattr(layer, name, torch.nn.Parameter(backup.weight.to(device), requires_grad=False))
        if unet.patches[key]:
            unet.patch_weight_to_device(key, device_to=device)
