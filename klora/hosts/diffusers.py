"""A diffusers pipeline as a host: its UNet or transformer, merged layer by layer."""

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
from klora.core.families import FAMILIES, listed, of_pipeline
from klora.core.lora_file import LoraFile
from klora.core.lora_reader import LoraReader
from klora.core.topology import Module
from klora.errors import HostError
from klora.hosts.base import Strengths, present
from klora.hosts.sizes import LayerSize, check_fit, matrix_of, true_shape


@dataclass(frozen=True)
class Lora:
    """One LoRA of a run and the multiplier the user gives it."""

    file: LoraFile
    multiplier: float


def base_of(pipeline: Any) -> str:
    """The key of the pipeline's family.

    Raises:
        HostError: the pipeline is of none.
    """
    base = of_pipeline(pipeline)
    if base is None:
        raise HostError(
            f"K-LoRA knows {listed('and', short=True)} pipelines, not {type(pipeline).__name__}: choose a model of one of these."
        )
    return base


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network whose layers K-LoRA switches."""
    return getattr(pipeline, FAMILIES[base_of(pipeline)].component)


@dataclass(frozen=True)
class OpenLora:
    """A LoRA of a run while its file is open."""

    lora: Lora
    reader: LoraReader

    def at(self, strength: float) -> OpenLora:
        """The same with so much of its multiplier."""
        return replace(self, lora=replace(self.lora, multiplier=self.lora.multiplier * strength))

    def add_weight(self, weight: Tensor, original: Tensor, name: str) -> Tensor:
        """`weight` plus the multiplier times what this LoRA changes `original` by; float32 where it changes it."""
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
        """`bias` plus the multiplier times what this LoRA changes it by."""
        file = self.lora.file
        if name not in file.unscored:
            return bias
        scored = name in file.layers or name in file.text_encoder_modules
        change = self.reader.bias(name) if scored else self.reader.norm(name).bias
        return bias if change is None else bias.float() + self.lora.multiplier * change.to(bias.device)


def weight_change(reader: LoraReader, layer: str, original: Tensor) -> Tensor:
    """What a LoRA at multiplier 1 adds to the weight `original`, float32 of its shape and device.

    DoRA makes the weight magnitude · (W + ΔW) / ‖W + ΔW‖ (arXiv 2402.09353); GLoRA adds W A as well.
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
    """Adds LoRA changes to the parameters of modules, always from the originals, and gives these very tensors back."""

    def __init__(self) -> None:
        self._originals: dict[nn.Parameter, Tensor] = {}

    def put(self, module: nn.Module, name: str, loras: Sequence[OpenLora], rows: slice | None = None) -> None:
        """Make `module`, canonically called `name`, its original plus what each of `loras` changes, added in this order.

        Args:
            rows: those that are called `name`, None for all.
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
        """Put every original tensor back; harmless when there is none."""
        for parameter, original in self._originals.items():
            parameter.data = original
        self._originals.clear()


class DiffusersSwitch:
    """`LayerSwitch` of a diffusers denoiser: a switched layer is merged anew from its original, the others are not touched.

    Raises:
        HostError: the denoiser lacks layers that the LoRAs change.
        PairError: it has other sizes than they.
    """

    def __init__(self, denoiser: nn.Module, base: str, subject: Lora, style: Lora) -> None:
        self._places = dict(_layers(denoiser, base))
        self._loras = {"subject": subject, "style": style}
        self._open: dict[str, OpenLora] = {}
        self._merger = Merger()
        self._stack = ExitStack()
        names = sorted({*subject.file.layers, *style.file.layers})
        missing = [name for name in names if name not in self._places]
        if missing:
            raise HostError(
                f"The model has no layer {missing[0]} ({len(missing)} of {len(names)} layers are missing), which the LoRAs "
                f"{subject.file.path.name} and {style.file.path.name} change: choose LoRAs made for this model."
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
    """Inside the block the text-encoder parts of these LoRAs apply at their multipliers."""
    merger = Merger()
    encoders = {
        part: getattr(pipeline, name, None)
        for part, name in FAMILIES[base_of(pipeline)].text_encoders.items()
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


def _layers(denoiser: nn.Module, base: str) -> Iterator[tuple[str, _Place]]:
    """Canonical layer name and its place, for all that `denoiser` has."""
    known = dict(denoiser.named_modules())
    for module in FAMILIES[base].modules:
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
