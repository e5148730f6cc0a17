"""What Forge and its relatives have in common.

A LoRA is a set of patches on a clone of the UNet patcher, and the host merges them when it loads the clone.
Each sampling pass gets a clone of its own. It is marked, so that the host recognises the next clone that it
loads as a different one and merges that on the original weights. So nothing has to be undone, whether a run
ends normally, is interrupted or crashes.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4
from weakref import ref

from torch import Tensor

from klora.core.blocks import leader_of
from klora.core.deltas import dense
from klora.core.file_state import version_of
from klora.core.lora_file import LoraFile
from klora.core.rewrite import is_in
from klora.core.topology import Module
from klora.errors import HostError
from klora.hosts.base import Pair, PairLora, Strengths, not_loaded, present, still_loaded
from klora.hosts.sizes import Padded, matrix_of, true_shape

DENOISER_KEY_PREFIX = "diffusion_model."
"""The host's keys for weights of the denoiser begin with this."""

Patches = dict[str, list[Any]]
"""{weight key of the model: patches in the order in which they are merged}.

A patch is a sequence that begins with its strength, its value and the strength of the model. If the host
knows fused weights, the offset follows: (0, first row, number of rows), or None for the whole weight.
"""


@dataclass(frozen=True)
class Loaded:
    """The patches that the host's loader made of one LoRA, at the user's multiplier.

    Attributes:
        version: of the file's content.
        unet: for the denoiser.
        clip: for the text encoders.
    """

    version: str
    unet: Patches
    clip: Patches


class PatcherSwitch(ABC):
    """`PairSwitch` for a Forge-like patcher.

    Args:
        networks: the module of the host's Lora extension.
        model: the loaded checkpoint, `shared.sd_model`.
        pair: the LoRAs and the layers of the plan.
    """

    MARK: ClassVar[str]
    """What `drives` looks for, and the WebUIs that have it, as an error message names them."""

    def __init__(self, networks: Any, model: Any, pair: Pair) -> None:
        self._networks = networks
        self._loaded_model = ref(model)
        self._pair = pair
        self._loaded: dict[str, Loaded] = {}
        self._layers_of: dict[str, tuple[str, ...]] = {}
        self._keys_of: dict[str, list[str]] = {}
        self._others: Patches = {}
        self._on_layers: dict[str, Strengths] = {}
        self._failures: list[BaseException] = []
        self._gate = _gate(self._failures)

    @property
    def _model(self) -> Any:
        return still_loaded(self._loaded_model)

    @property
    def _fused(self) -> Mapping[str, Module]:
        return self._pair.loras[0].file.family.fused

    def expire_loaded(self) -> None:
        """Change the hash by which the host sees that a prompt has the same LoRAs as the last one.

        It would then load nothing, and the patchers that the pair is added to would lack the prompt's LoRAs.
        Another checkpoint, which a hires pass of the batch before may have put in this one's place, has none.
        """
        model = self._loaded_model()
        if model is not None:
            model.current_lora_hash = f"K-LoRA {uuid4()}"

    def tags(self) -> Sequence[tuple[str, float]]:
        """Nothing: `networks_loaded` itself adds the pair to what the host has loaded."""
        return ()

    def attached(self) -> AbstractContextManager[None]:
        """Nothing: LoRAs are on the clones, so the pair need only be attached during a sampling pass."""
        return nullcontext()

    def leave(self) -> None:
        self._on_layers.clear()
        self.expire_loaded()

    def fail(self, error: BaseException) -> None:
        self._failures.append(error)

    def networks_loaded(self) -> None:
        if not self._loaded:
            self._loaded = {lora.role: self._load(lora) for lora in self._pair.loras}
            self._find_layers()
        objects = self._model.forge_objects
        for lora in self._pair.loras:
            loaded = self._loaded[lora.role]
            if lora.on_text_encoder and loaded.clip:
                objects.clip = objects.clip.clone()
                self._add(objects.clip.patcher, loaded.version, lora.weight, loaded.clip)
        self._model.forge_objects_after_applying_lora = objects.shallow_copy()
        self.expire_loaded()

    def attach(self) -> None:
        unet = self._model.forge_objects.unet.clone()
        unet.add_conditioning_modifier(self._gate)
        self._others = self._patches_of(unet)
        self._on_layers.clear()
        self._mark(unet)
        self._model.forge_objects.unet = unet

    def apply(self, strengths: Mapping[str, Strengths]) -> None:
        self._on_layers.update(strengths)
        keys = {key for layer in strengths for key in self._keys_of.get(layer, ())}
        unet = self._unet_in_force()
        if self._is_merged(unet):
            self._merge(unet, {key: [*self._others.get(key, ()), *self._chosen(key)] for key in sorted(keys)})
        else:
            every = {
                key: self._chosen(key) for layer in self._on_layers for key in self._keys_of.get(layer, ())
            }
            self._put(unet, {key: patches for key, patches in every.items() if patches})

    def detach(self) -> None:
        self._on_layers.clear()

    @staticmethod
    @abstractmethod
    def drives(unet: Any) -> bool:
        """Whether this class handles such a UNet patcher, judging by its attributes."""

    @staticmethod
    def original_weight(unet: Any, path: str) -> Any:
        """The checkpoint's own weight for the denoiser's module at `path`, None if there is none.

        The weight in the module itself may still have the last generation's LoRAs merged into it, and some
        LoRAs even widen a weight. The host's backup has the original then.
        """
        key = f"{DENOISER_KEY_PREFIX}{path}.weight"
        backups = unet.lora_loader.backup if hasattr(unet, "lora_loader") else unet.backup
        if key in backups:
            return getattr(backups[key], "weight", backups[key])
        layer = unet.model
        for name in key.split(".")[:-1]:
            layer = getattr(layer, name, None)
        return getattr(layer, "weight", None)

    @staticmethod
    def padded(shape: tuple[int, ...]) -> Padded:
        """`LayerSize.padded` of a weight of this shape. ComfyUI's merge accepts no narrower LoRAs."""
        return {}

    @property
    @abstractmethod
    def _online(self) -> bool:
        """Whether the host adds LoRAs in every forward pass instead of merging them into the weights."""

    @abstractmethod
    def _patches_of(self, patcher: Any) -> Patches:
        """All patches of a patcher, in new lists."""

    @abstractmethod
    def _add(self, patcher: Any, filename: str, weight: float, patches: Patches) -> None:
        """Add one LoRA's patches to a patcher that the host has not loaded yet, as the host's loader does."""

    @abstractmethod
    def _mark(self, unet: Any) -> None:
        """Make the host merge anew when it loads this clone, and again when it loads the next one."""

    @abstractmethod
    def _put(self, unet: Any, patches: Patches) -> None:
        """Set the pair's patches on a clone that the host has not loaded yet."""

    @abstractmethod
    def _is_merged(self, unet: Any) -> bool:
        """Whether the host has loaded the marked clone, or a clone of it."""

    @abstractmethod
    def _merge(self, unet: Any, patches: Patches) -> None:
        """Replace all patches of these weights of a loaded clone, and leave its other weights alone."""

    def _unet_in_force(self) -> Any:
        unet = self._model.forge_objects.unet
        if self._gate not in unet.model_options.get("conditioning_modifiers", ()):
            raise HostError(
                "Another extension has replaced K-LoRA's UNet with its own: "
                "switch off that extension, or K-LoRA."
            )
        return unet

    def _load(self, lora: PairLora) -> Loaded:
        """Have the host's loader read a file, on patchers without any other LoRA.

        Raises:
            HostError: it cannot read the file, or finds nothing for the UNet in it.
        """
        version = version_of(lora.file.path)
        path = str(lora.file.path if self._host_reads(lora.file) else self._pair.readable(lora.file))
        load, original = self._networks.load_lora_for_models, self._model.forge_objects_original
        mode = {"online_mode": self._online} if "online_mode" in inspect.signature(load).parameters else {}
        tensors = dict(self._read(path))
        try:
            unet, clip = load(
                original.unet, original.clip, tensors, lora.weight, lora.weight, filename=path, **mode
            )
        except Exception as error:
            raise not_loaded(lora, str(error) or type(error).__name__) from error
        loaded = Loaded(version, self._patches_of(unet), self._patches_of(clip.patcher))
        if not loaded.unet and lora.weight:
            raise not_loaded(lora, "its console says why.")
        return loaded

    def _read(self, path: str) -> Mapping[str, Tensor]:
        """The tensors of a file as the host reads it. Forge caches them by path even if the file changes."""
        read = self._networks.load_lora_state_dict
        if hasattr(read, "cache_clear"):
            versions, version = read.__dict__.setdefault("klora_versions", {}), version_of(Path(path))
            if versions.get(path) != version:
                read.cache_clear()
                versions[path] = version
        return read(path)

    def _host_reads(self, lora: LoraFile) -> bool:
        """Whether the host's loader understands a file's keys as they are.

        Source: model_lora_keys_unet in backend/patcher/lora.py.
        """
        return is_in(lora, lora.family.readable)

    def _find_layers(self) -> None:
        """Note which layers of the plan each weight holds. A norm or a bias belongs to its leading layer."""
        layers = set(self._pair.layers)
        for key in dict.fromkeys(key for loaded in self._loaded.values() for key in loaded.unet):
            path = key.removeprefix(DENOISER_KEY_PREFIX).rpartition(".")[0]
            holds = self._fused[path].layers if path in self._fused else (path,)
            own = tuple(layer for layer in holds if layer in layers)
            self._layers_of[key] = own or (leader_of(path, self._pair.layers),)
            for layer in self._layers_of[key]:
                self._keys_of.setdefault(layer, []).append(key)

    def _chosen(self, key: str) -> list[Any]:
        """The pair's patches for a weight. The layers in a fused weight may differ in strengths."""
        own = {layer: self._on_layers[layer] for layer in self._layers_of[key] if layer in self._on_layers}
        if len(set(own.values())) <= 1:
            whole = present(next(iter(own.values()), (0.0, 0.0)))
            return [
                _scaled(patch, strength)
                for role, strength in whole
                for patch in self._loaded[role].unet.get(key, ())
            ]
        return [
            _scaled(patch, strength)
            for layer, strengths in own.items()
            for role, strength in present(strengths)
            for patch in self._rows_of(role, key, layer)
        ]

    def _rows_of(self, role: str, key: str, layer: str) -> Iterator[Any]:
        """One LoRA's patches for one piece of a fused weight; none if the LoRA does not change that piece."""
        info = self._file(role).layers.get(layer)
        if info is None:
            return
        start, count = self._first_row(layer), info.shape[0]
        for patch in self._loaded[role].unet.get(key, ()):
            strength, value, strength_model, offset, *rest = patch
            if offset is None:
                cut = self._cut(role, value, layer, slice(start, start + count))
                yield type(patch)((strength, cut, strength_model, (0, start, count), *rest))
            elif offset[1] == start:
                yield patch

    def _first_row(self, layer: str) -> int:
        """Index of the first row of a piece of a fused weight."""
        module = self._fused[layer.partition(":")[0]]
        shape = true_shape(self.original_weight(self._model.forge_objects.unet, module.native))
        assert shape is not None
        return sum(module.heights(module.layers, *matrix_of(shape))[: module.layers.index(layer)])

    def _file(self, role: str) -> LoraFile:
        return next(lora.file for lora in self._pair.loras if lora.role == role)

    def _cut(self, role: str, value: Any, layer: str, rows: slice) -> Any:
        """The value of a patch, reduced to some rows of its weight.

        For a low-rank pair these are rows of `up`, for any other kind rows of the delta.
        """
        adapter = hasattr(value, "weights")
        kind, parts = (
            (value.name, value.weights)
            if adapter
            else (value[0], value[1])
            if len(value) == 2
            else ("diff", value)
        )
        if kind == "lora":
            up, down, alpha, mid, dora, *rest = parts
            if dora is None or dora.shape[0] == up.shape[0]:
                cut = (up[rows], down, alpha, mid, None if dora is None else dora[rows], *rest)
                return type(value)(value.loaded_keys, cut) if adapter else (kind, cut)
        elif kind == "diff":
            return ("diff", (parts[0][rows],))
        return ("diff", (self._delta(role, layer),))

    def _delta(self, role: str, layer: str) -> Tensor:
        file = self._file(role)
        with file.open() as reader:
            if reader.magnitude(layer) is not None or reader.input_factor(layer) is not None:
                raise HostError(
                    f"K-LoRA cannot apply the layer {layer} of the {role} LoRA {file.path.name} on its own, "
                    "because the file is a DoRA or GLoRA and has that layer in a fused weight: export it "
                    "with the split keys of diffusers, or choose the method LoRA Switch or Fixed."
                )
            return dense(reader(layer))


def padded_convolution(shape: tuple[int, ...]) -> Padded:
    """`LayerSize.padded` in Forge's merge and those derived from it.

    They pad a full difference of a convolution with zeros for the input channels that it lacks.
    """
    if len(shape) != 4:
        return {}
    taps = shape[2] * shape[3]
    return {"full diff": range(taps, shape[1] * taps, taps)}


def _scaled(patch: Any, strength: float) -> Any:
    """A patch with its strength multiplied by `strength`."""
    return patch if strength == 1 else type(patch)((patch[0] * strength, *patch[1:]))


def _gate(failures: list[BaseException]) -> Callable[..., tuple]:
    """A conditioning modifier that raises the first of `failures`.

    The host calls it before every evaluation and does not catch what it raises. It is a plain function
    because a clone deep-copies its options, and because the host keeps the last clone, which must not keep
    the run alive.
    """

    def gate(*arguments: Any) -> tuple:
        if failures:
            raise failures[0]
        return arguments

    return gate


class OnePatchDict(PatcherSwitch):
    """`PatcherSwitch` for a patcher that has one dict `patches` for all LoRAs, in the order of the prompt."""

    def _patches_of(self, patcher: Any) -> Patches:
        return {key: list(patches) for key, patches in patcher.patches.items()}

    def _add(self, patcher: Any, filename: str, weight: float, patches: Patches) -> None:
        patcher.patches = {
            key: [*patcher.patches.get(key, ()), *patches.get(key, ())]
            for key in {**patcher.patches, **patches}
        }

    def _put(self, unet: Any, patches: Patches) -> None:
        unet.patches = {
            key: [*self._others.get(key, ()), *patches.get(key, ())] for key in {**self._others, **patches}
        }
