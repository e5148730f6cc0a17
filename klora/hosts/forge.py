"""Forge (lllyasviel): patches are kept by file name and merged by a loader that all clones share.

`unet.lora_patches` is {(file name, strength, strength of the model, online): {weight key: patches}}. The
loader merges on its backup of the original weights when the list of these names differs from that of the last
merge (backend/patcher/lora.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch

from klora.core.out_of_memory import is_out_of_memory
from klora.hosts.base import Pair
from klora.hosts.patchers import PatcherSwitch, Patches, padded_convolution
from klora.hosts.sizes import Padded

MERGED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ForgeSwitch(PatcherSwitch):
    """`PairSwitch` for Forge.

    In online mode each layer reads its patches in every forward pass, so that they only have to be exchanged.
    """

    MARK = "unet.lora_loader (Forge)"

    def __init__(self, networks: Any, model: Any, pair: Pair) -> None:
        super().__init__(networks, model, pair)
        self._name = ""

    @staticmethod
    def drives(unet: Any) -> bool:
        return hasattr(unet, "lora_loader") and hasattr(unet, "lora_patches")

    @staticmethod
    def padded(shape: tuple[int, ...]) -> Padded:
        """Forge pads a LoRA of a linear layer with zeros for missing inputs.

        LoRAs of FLUX.1 need that on Fill and Control checkpoints, whose `img_in` is wider.
        """
        return {"LoRA": range(1, shape[1])} if len(shape) == 2 else padded_convolution(shape)

    @property
    def _online(self) -> bool:
        from backend.args import dynamic_args

        return (
            bool(dynamic_args.get("online_lora", False))
            and self._model.forge_objects.unet.model.storage_dtype not in MERGED_DTYPES
        )

    def _patches_of(self, patcher: Any) -> Patches:
        found: Patches = {}
        for patches in patcher.lora_patches.values():
            for key, added in patches.items():
                found.setdefault(key, []).extend(added)
        return found

    def _add(self, patcher: Any, filename: str, weight: float, patches: Patches) -> None:
        patcher.lora_patches[(filename, weight, 1.0, self._online)] = patches

    def _mark(self, unet: Any) -> None:
        self._name = f"K-LoRA {uuid4()}"
        self._put(unet, {})
        unet.lora_loader.loaded_hash = self._name

    def _put(self, unet: Any, patches: Patches) -> None:
        unet.lora_patches[(self._name, 1.0, 1.0, self._online)] = patches

    def _is_merged(self, unet: Any) -> bool:
        return unet.lora_loader.loaded_hash == str(list(unet.lora_patches.keys()))

    def _merge(self, unet: Any, patches: Patches) -> None:
        if self._online:
            self._switch_online(unet, patches)
        else:
            self._remerge(unet, patches)

    def _switch_online(self, unet: Any, patches: Patches) -> None:
        from backend import utils

        for key, added in patches.items():
            layer, name, _ = utils.get_attr_with_parent(unet.model, key)
            if not hasattr(layer, "forge_online_loras"):
                layer.forge_online_loras = {}
                unet.lora_loader.online_backup.append(layer)
            utils.nested_move_to_device(added, device=unet.current_device, dtype=unet.model.computation_dtype)
            layer.forge_online_loras[name] = added

    def _remerge(self, unet: Any, patches: Patches) -> None:
        """Run the host's own merge on these weights only: it restores their originals and merges on those.

        When memory runs out, the host makes room by moving the model that it was given. A few weights are not
        enough, so the second attempt gives it the whole model.
        """
        try:
            self._refresh(unet, _Part(unet.model, patches), patches)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._refresh(unet, unet.model, patches)

    def _refresh(self, unet: Any, model: Any, patches: Patches) -> None:
        """Run the host's own merge on the weights of `patches`.

        Args:
            model: lists the parameters that the host goes through, and moves when memory runs out.
        """
        shared_loader = unet.lora_loader
        part = type(shared_loader)(model)
        part.backup = {key: shared_loader.backup[key] for key in patches if key in shared_loader.backup}
        wanted = {key: added for key, added in patches.items() if added}
        try:
            with _cache_kept():
                part.refresh(
                    {(self._name, 1.0, 1.0, False): wanted},
                    offload_device=unet.offload_device,
                    force_refresh=True,
                )
        finally:
            shared_loader.backup.update(part.backup)


class _Part:
    """A model that lists only some of its parameters."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        self._model = model
        self._names = tuple(names)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        return ((name, operator.attrgetter(name)(self._model)) for name in self._names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def _cache_kept() -> Iterator[None]:
    """A context in which a merge does not make the host empty the GPU's cache.

    It would do so in the next forward pass, but the merge of a few layers frees next to nothing.
    """
    from backend import memory_management

    before = memory_management.signal_empty_cache
    yield
    memory_management.signal_empty_cache = before
