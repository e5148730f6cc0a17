"""What Forge and its relatives share: LoRAs are patches on clones of a UNet patcher, which the host merges when it loads the clone.

A pass works on a clone of its own, marked so that the host takes whatever it loads next for something else and merges that on the
original weights: nothing has to be undone, whether a run ends well, is interrupted or dies.
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
from klora.core.families import FAMILIES
from klora.core.file_state import version_of
from klora.core.lora_file import LoraFile
from klora.core.rewrite import is_in
from klora.core.topology import Module
from klora.errors import HostError
from klora.hosts.base import Member, Pair, Strengths, present, still_loaded
from klora.hosts.sizes import Padded, matrix_of, true_shape

DENOISER = "diffusion_model."

Patches = dict[str, list[Any]]
"""{weight key of the model: patches in the order in which they are merged}. A patch opens with strength, value, strength of the
model and, where the host knows fused weights, offset: (0, first row, number of rows) or None for the whole weight."""


@dataclass(frozen=True)
class Loaded:
    """One LoRA as the host's loader understood it, at its weight.

    Attributes:
        version: of the file.
    """

    version: str
    unet: Patches
    clip: Patches


class PatcherSwitch(ABC):
    """`PairSwitch` on a Forge-like patcher.

    Args:
        networks: the module of the host's Lora extension.
        model: the loaded checkpoint, `shared.sd_model`.
    """

    MARK: ClassVar[str]
    """What `drives` looks for, and the WebUIs that have it, for people."""

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
        return FAMILIES[self._pair.members[0].file.base].fused

    def tags(self) -> Sequence[tuple[str, float]]:
        """Nothing: the pair is added to what the host has loaded.

        The host loads nothing where the prompt's LoRAs are those of the image before, and then has none of them
        on the patchers that the pair is added to. Another name of what is loaded makes it load them.
        """
        self._model.current_lora_hash = f"K-LoRA {uuid4()}"
        return ()

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def leave(self) -> None:
        """The host takes LoRAs for loaded while this name of them stays the same."""
        self._on_layers.clear()
        self._model.current_lora_hash = f"K-LoRA {uuid4()}"

    def fail(self, error: BaseException) -> None:
        self._failures.append(error)

    def networks_loaded(self) -> None:
        if not self._loaded:
            self._loaded = {member.role: self._load(member) for member in self._pair.members}
            self._find_layers()
        objects = self._model.forge_objects
        for member in self._pair.members:
            loaded = self._loaded[member.role]
            if member.on_text_encoder and loaded.clip:
                objects.clip = objects.clip.clone()
                self._add(objects.clip.patcher, loaded.version, member.weight, loaded.clip)
        self._model.forge_objects_after_applying_lora = objects.shallow_copy()
        self._model.current_lora_hash = f"K-LoRA {uuid4()}"

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
        """Whether this is the switch for a UNet patcher, by what that can do."""

    @staticmethod
    def original_weight(unet: Any, path: str) -> Any:
        """The checkpoint's own weight of the denoiser's module at `path`, None if it has none.

        What is in the module may have been merged by the last generation, and some LoRAs widen a weight.
        """
        key = f"{DENOISER}{path}.weight"
        backups = unet.lora_loader.backup if hasattr(unet, "lora_loader") else unet.backup
        if key in backups:
            return getattr(backups[key], "weight", backups[key])
        layer = unet.model
        for name in key.split(".")[:-1]:
            layer = getattr(layer, name, None)
        return getattr(layer, "weight", None)

    @staticmethod
    def padded(shape: tuple[int, ...]) -> Padded:
        """Which narrower LoRAs the host takes for a weight of this shape (`LayerSize.padded`): ComfyUI's merge takes none."""
        return {}

    @property
    @abstractmethod
    def _online(self) -> bool:
        """Whether the host keeps LoRAs beside the weights and adds them in every forward pass."""

    @abstractmethod
    def _patches_of(self, patcher: Any) -> Patches:
        """All patches of a patcher, as lists of their own."""

    @abstractmethod
    def _add(self, patcher: Any, filename: str, weight: float, patches: Patches) -> None:
        """Add one LoRA's patches to a patcher that the host has not loaded, as its own loader does."""

    @abstractmethod
    def _mark(self, unet: Any) -> None:
        """Make the host merge this clone when it loads it, and whatever it loads after it."""

    @abstractmethod
    def _put(self, unet: Any, patches: Patches) -> None:
        """Make these the pair's patches of a clone that the host has not loaded."""

    @abstractmethod
    def _is_merged(self, unet: Any) -> bool:
        """Whether the host has loaded the marked clone, or a clone of it."""

    @abstractmethod
    def _merge(self, unet: Any, patches: Patches) -> None:
        """Make these all patches of the given weights of a loaded clone, and of no other weight."""

    def _unet_in_force(self) -> Any:
        unet = self._model.forge_objects.unet
        if self._gate not in unet.model_options.get("conditioning_modifiers", ()):
            raise HostError(
                "Another extension has put a UNet of its own in the place of K-LoRA's: switch that extension off, or K-LoRA."
            )
        return unet

    def _load(self, member: Member) -> Loaded:
        """What the host's loader makes of a file, on patchers without any other LoRA."""
        version = version_of(member.file.path)
        path = str(member.file.path if self._host_reads(member.file) else self._pair.readable(member.file))
        load, original = self._networks.load_lora_for_models, self._model.forge_objects_original
        mode = {"online_mode": self._online} if "online_mode" in inspect.signature(load).parameters else {}
        tensors = dict(self._read(path))
        try:
            unet, clip = load(
                original.unet, original.clip, tensors, member.weight, member.weight, filename=path, **mode
            )
        except Exception as error:
            raise HostError(
                f"The WebUI did not load the {member.role} LoRA {member.file.path}: {str(error) or type(error).__name__}"
            ) from error
        loaded = Loaded(version, self._patches_of(unet), self._patches_of(clip.patcher))
        if not loaded.unet and member.weight:
            raise HostError(
                f"The WebUI did not load the {member.role} LoRA {member.file.path}: its console says why."
            )
        return loaded

    def _read(self, path: str) -> Mapping[str, Tensor]:
        """The host's reading of a file. Forge keeps the last ones by their names, whatever becomes of the files."""
        read = self._networks.load_lora_state_dict
        if hasattr(read, "cache_clear"):
            versions, version = read.__dict__.setdefault("klora_versions", {}), version_of(Path(path))
            if versions.get(path) != version:
                read.cache_clear()
                versions[path] = version
        return read(path)

    def _host_reads(self, lora: LoraFile) -> bool:
        """Whether the host's loader understands a file's keys as they are (backend/patcher/lora.py, model_lora_keys_unet)."""
        return is_in(lora, FAMILIES[lora.base].readable)

    def _find_layers(self) -> None:
        """Which layers of the plan each weight holds; a norm or a bias goes with its leading layer."""
        layers = set(self._pair.layers)
        for key in dict.fromkeys(key for loaded in self._loaded.values() for key in loaded.unet):
            path = key.removeprefix(DENOISER).rpartition(".")[0]
            holds = self._fused[path].layers if path in self._fused else (path,)
            own = tuple(layer for layer in holds if layer in layers)
            self._layers_of[key] = own or (leader_of(path, self._pair.layers),)
            for layer in self._layers_of[key]:
                self._keys_of.setdefault(layer, []).append(key)

    def _chosen(self, key: str) -> list[Any]:
        """The pair's patches of a weight, whose rows may have the two LoRAs at different strengths."""
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
        """A LoRA's patches of the rows of one piece of a fused weight; none where its rows of that piece are all zero."""
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
        """Where a piece of a fused weight begins."""
        module = self._fused[layer.partition(":")[0]]
        shape = true_shape(self.original_weight(self._model.forge_objects.unet, module.native))
        assert shape is not None
        return sum(module.heights(module.layers, *matrix_of(shape))[: module.layers.index(layer)])

    def _file(self, role: str) -> LoraFile:
        return next(member.file for member in self._pair.members if member.role == role)

    def _cut(self, role: str, value: Any, layer: str, rows: slice) -> Any:
        """The value of a patch for some rows of its weight: of a low-rank pair the rows of `up`, of any other kind the delta's."""
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
                    f"The layer {layer} of the {role} LoRA {file.path.name} is a DoRA or GLoRA of a fused weight, whose rows cannot be given to "
                    "two LoRAs: export it in the split keys of diffusers, or take the method LoRA Switch or Fixed."
                )
            return dense(reader(layer))


def padded_convolution(shape: tuple[int, ...]) -> Padded:
    """The first Forge's merge and those made after it give a full difference of a convolution the channels it lacks."""
    if len(shape) != 4:
        return {}
    taps = shape[2] * shape[3]
    return {"full diff": range(taps, shape[1] * taps, taps)}


def _scaled(patch: Any, strength: float) -> Any:
    """A patch at so much of its strength."""
    return patch if strength == 1 else type(patch)((patch[0] * strength, *patch[1:]))


def _gate(failures: list[BaseException]) -> Callable[..., tuple]:
    """A conditioning modifier, which the host calls before every evaluation and lets exceptions out of: it raises the first of `failures`.

    A plain function, because clones of a patcher copy their options deeply. The host keeps the last clone: it must not keep the run.
    """

    def gate(*arguments: Any) -> tuple:
        if failures:
            raise failures[0]
        return arguments

    return gate


class OnePatchDict(PatcherSwitch):
    """A patcher that keeps the patches of all LoRAs in one dict, `patches`, in the order of the prompt."""

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
