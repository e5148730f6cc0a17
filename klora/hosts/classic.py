"""forge-classic: the first Forge's patcher, with {weight key: [(strength, value, strength of the model)]}.

Every clone has a backup of its own; loading another clone puts the originals back
(ldm_patched/modules/model_patcher.py).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from klora.hosts.patchers import OnePatchDict, Patches, padded_convolution
from klora.hosts.sizes import Padded


class ClassicSwitch(OnePatchDict):
    """`PairSwitch` for forge-classic, which has no FLUX and so no fused weights."""

    MARK = "unet.calculate_weight (forge-classic)"

    @staticmethod
    def drives(unet: Any) -> bool:
        return hasattr(unet, "patches") and hasattr(unet, "calculate_weight")

    @staticmethod
    def padded(shape: tuple[int, ...]) -> Padded:
        return padded_convolution(shape)

    @property
    def _online(self) -> bool:
        return False

    def _mark(self, unet: Any) -> None:
        """Nothing to do: the host merges every clone that it loads, and undoes that for the next one."""

    def _is_merged(self, unet: Any) -> bool:
        return bool(unet.backup)

    def _merge(self, unet: Any, patches: Patches) -> None:
        for key, added in patches.items():
            unet.patches[key] = added
            layer, name = attrgetter(key.rpartition(".")[0])(unet.model), key.rpartition(".")[2]
            current = getattr(layer, name)
            original = unet.backup.setdefault(
                key, current.to(device=unet.offload_device, copy=unet.weight_inplace_update)
            )
            weight = unet.calculate_weight(
                added, original.to(current.device, torch.float32, copy=True), key
            ).to(original.dtype)
            if unet.weight_inplace_update:
                current.data.copy_(weight)
            else:
                setattr(layer, name, torch.nn.Parameter(weight, requires_grad=False))
