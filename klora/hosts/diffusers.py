"""A diffusers pipeline as a host: LoRAs are merged into its UNet or transformer layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from klora.core.blocks import leader_of
from klora.core.deltas import dense
from klora.core.families import of_pipeline, with_pipelines
from klora.core.families.base import Family
from klora.core.lora_file import LoraFile
from klora.core.lora_reader import LoraReader
from klora.core.topology import Module
from klora.errors import HostError
from klora.hosts.base import Strengths, present
from klora.hosts.sizes import LayerSize, check_fit, matrix_of, true_shape


@dataclass(frozen=True)
class Lora:
    """One LoRA of a run, and the multiplier that the user gave it."""

    file: LoraFile
    multiplier: float


def family_of(pipeline: Any) -> Family:
    """The pipeline's family.

    Raises:
        HostError: it belongs to none that K-LoRA knows, or has two denoisers.
    """
    if getattr(pipeline, "transformer_2", None) is not None:
        raise HostError(
            f"{type(pipeline).__name__} has two transformers that take turns, as in Wan 2.2 14B, and LoRAs "
            "for one are not for the other: choose a model with one, such as Wan 2.1."
        )
    family = of_pipeline(pipeline)
    if family is None:
        raise HostError(
            f"K-LoRA knows {with_pipelines('and')} pipelines, not {type(pipeline).__name__}: choose a "
            "model of one of these kinds."
        )
    return family


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network whose layers K-LoRA switches."""
    return getattr(pipeline, family_of(pipeline).component)


@dataclass(frozen=True)
class OpenLora:
    """One LoRA of a run while its file is open."""

    lora: Lora
    reader: LoraReader

    def at(self, strength: float) -> OpenLora:
        """The same LoRA with its multiplier times `strength`."""
        return replace(self, lora=replace(self.lora, multiplier=self.lora.multiplier * strength))

    def add_weight(self, weight: Tensor, original: Tensor, name: str) -> Tensor:
        """`weight` plus the multiplier times what this LoRA adds to `original`.

        Returns:
            float32, or `weight` itself if this LoRA does not change the module.
        """
        if name in self.lora.file.layers or name in self.lora.file.text_encoder_modules:
            change: Tensor | None = weight_change(self.reader, name, original)
        elif name in self.lora.file.unscored:
            change = self.reader.norm(name).weight
        else:
            change = None
        return (
            weight if change is None else weight.float() + self.lora.multiplier * change.to(original.device)
        )

    def add_bias(self, bias: Tensor, name: str) -> Tensor:
        """`bias` plus the multiplier times what this LoRA adds to it.

        Returns:
            float32, or `bias` itself if this LoRA does not change it.
        """
        file = self.lora.file
        if name not in file.unscored:
            return bias
        scored = name in file.layers or name in file.text_encoder_modules
        change = self.reader.bias(name) if scored else self.reader.norm(name).bias
        return bias if change is None else bias.float() + self.lora.multiplier * change.to(bias.device)


def weight_change(reader: LoraReader, layer: str, original: Tensor) -> Tensor:
    """What a LoRA with multiplier 1 adds to the weight `original`: float32, of its shape, on its device.

    DoRA (arXiv 2402.09353) makes the weight magnitude · (W + ΔW) / ‖W + ΔW‖. GLoRA (arXiv 2306.07967) adds W
    A to ΔW.
    """
    base = original.float()
    change = dense(reader(layer)).reshape(original.shape).to(original.device)
    if (factor := reader.input_factor(layer)) is not None:
        change = change + torch.tensordot(base, dense(factor).to(base.device), dims=([1], [0])).movedim(-1, 1)
    if (magnitude := reader.magnitude(layer)) is not None:
        directed = base + change
        others = [axis for axis in range(base.dim()) if axis != magnitude.axis]
        shape = [-1 if axis == magnitude.axis else 1 for axis in range(base.dim())]
        scale = magnitude.values.to(base.device).reshape(shape) / torch.linalg.vector_norm(
            directed, dim=others, keepdim=True
        )
        change = directed * scale - base
    return change


class Merger:
    """Merges LoRAs into the parameters of modules, always starting from their original tensors."""

    def __init__(self) -> None:
        self._originals: dict[nn.Parameter, Tensor] = {}

    def put(self, module: nn.Module, name: str, loras: Sequence[OpenLora], rows: slice | None = None) -> None:
        """Set a module's parameters to their originals plus the changes of these LoRAs, added in this order.

        Args:
            name: canonical name of the layer.
            rows: the module's rows that are this layer; None for all.
        """
        for kind, parameter in module.named_parameters(recurse=False):
            whole = self._originals.get(parameter, parameter.data)
            original = whole if rows is None else whole[rows]
            merged = original
            for lora in loras:
                merged = (
                    lora.add_weight(merged, original, name)
                    if kind == "weight"
                    else lora.add_bias(merged, name)
                )
            if rows is None:
                parameter.data = merged.to(original.dtype)
            elif merged is not original or parameter in self._originals:
                if parameter not in self._originals:
                    parameter.data = whole.clone()
                parameter.data[rows] = merged.to(original.dtype)
            if merged is not original:
                self._originals[parameter] = whole

    def restore(self) -> None:
        """Put all original tensors back. May be called more than once."""
        for parameter, original in self._originals.items():
            parameter.data = original
        self._originals.clear()


class DiffusersSwitch:
    """`LayerSwitch` for the denoiser of a diffusers pipeline, which merges each layer again that is switched.

    Args:
        denoiser: as `denoiser_of` returns it.

    Raises:
        HostError: the LoRAs change layers that the denoiser does not have.
        PairError: a layer of the denoiser differs in size from a LoRA.
    """

    def __init__(self, denoiser: nn.Module, subject: Lora, style: Lora) -> None:
        self._places = dict(_layers(denoiser, subject.file.family))
        self._loras = {"subject": subject, "style": style}
        self._open: dict[str, OpenLora] = {}
        self._merger = Merger()
        self._stack = ExitStack()
        names = sorted({*subject.file.layers, *style.file.layers})
        missing = [name for name in names if name not in self._places]
        if missing:
            raise HostError(
                f"The model has no layer {missing[0]} ({len(missing)} of {len(names)} layers are missing), "
                f"which the LoRAs {subject.file.path.name} and {style.file.path.name} change: choose LoRAs "
                "made for this model."
            )
        sizes = {name: place.size for name, place in self._places.items()}
        check_fit(
            (subject.file, style.file),
            {name: LayerSize(size) for name, size in sizes.items() if size is not None},
            "the model",
        )
        self._followers: dict[str, list[str]] = {}
        for name in sorted({*subject.file.unscored, *style.file.unscored} - set(names)):
            if name in self._places:
                self._followers.setdefault(leader_of(name, names), []).append(name)

    def attach(self) -> None:
        self._stack.callback(self._merger.restore)
        for role, lora in self._loras.items():
            self._open[role] = OpenLora(lora, self._stack.enter_context(lora.file.open()))

    def apply(self, strengths: Mapping[str, Strengths]) -> None:
        for layer, own in strengths.items():
            loras = [self._open[role].at(strength) for role, strength in present(own)]
            for name in (layer, *self._followers.get(layer, ())):
                place = self._places[name]
                self._merger.put(place.module, name, loras, place.rows)

    def detach(self) -> None:
        self._stack.close()
        self._open.clear()


@contextmanager
def text_encoders_with(pipeline: Any, loras: Sequence[Lora]) -> Iterator[None]:
    """A context in which the text-encoder parts of these LoRAs are applied at their multipliers."""
    merger = Merger()
    encoders = {
        part: getattr(pipeline, name, None) for part, name in family_of(pipeline).text_encoders.items()
    }
    modules = {
        part: dict(encoder.named_modules()) for part, encoder in encoders.items() if encoder is not None
    }
    with ExitStack() as stack:
        stack.callback(merger.restore)
        opened = [OpenLora(lora, stack.enter_context(lora.file.open())) for lora in loras]
        for name in sorted(
            {name for lora in loras for name in (*lora.file.text_encoder_modules, *lora.file.unscored)}
        ):
            part, _, path = name.partition(":")
            module = modules.get(part, {}).get(path) or modules.get(part, {}).get(
                path.removeprefix("text_model.")
            )
            if module is not None:
                merger.put(module, name, opened)
        yield


class _Place(NamedTuple):
    """The diffusers module that holds a layer, and which of its rows, None for all."""

    module: nn.Module
    rows: slice | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(rows, columns) of the layer, None if the module has no weight."""
        shape = true_shape(getattr(self.module, "weight", None))
        if shape is None:
            return None
        rows, columns = matrix_of(shape)
        return (rows if self.rows is None else len(range(*self.rows.indices(rows)))), columns


def _layers(denoiser: nn.Module, family: Family) -> Iterator[tuple[str, _Place]]:
    """(canonical name, place) of each layer that `denoiser` has."""
    known = dict(denoiser.named_modules())
    for module in family.modules:
        places = [_Place(known[path]) for path in module.diffusers if path in known]
        if len(places) == 1 and len(module.layers) > 1:
            places = list(_rows_of(places[0], module))
        if places:
            yield from zip(module.layers, places, strict=True)


def _rows_of(place: _Place, module: Module) -> Iterator[_Place]:
    """The places of the layers that diffusers, too, has in one module."""
    size = place.size
    assert size is not None
    for start, stop in pairwise(accumulate(module.heights(module.layers, *size), initial=0)):
        yield place._replace(rows=slice(start, stop))
