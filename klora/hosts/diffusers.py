"""A diffusers pipeline as a host: SDXL's UNet and FLUX's transformer, merged layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from klora.core.blocks import leader_of
from klora.core.deltas import dense
from klora.core.lora_file import LoraFile, LoraReader
from klora.core.selectors import Choice
from klora.core.topology import Module, flux_modules, sdxl_modules
from klora.errors import HostError

TEXT_ENCODERS = {"sdxl": {"te1": "text_encoder", "te2": "text_encoder_2"}, "flux": {"te1": "text_encoder", "t5": "text_encoder_2"}}
"""Base model -> part of a LoRA file -> attribute of the pipeline."""


@dataclass(frozen=True)
class Lora:
    """One LoRA of a run and the multiplier the user gives it."""

    file: LoraFile
    multiplier: float


def base_of(pipeline: Any) -> str:
    """ "sdxl" or "flux".

    Raises:
        HostError: the pipeline is of neither.
    """
    if hasattr(pipeline, "unet") and hasattr(pipeline, "text_encoder_2"):
        return "sdxl"
    if hasattr(pipeline, "transformer") and type(pipeline.transformer).__name__ == "FluxTransformer2DModel":
        return "flux"
    raise HostError(f"K-LoRA knows SDXL and FLUX pipelines, not {type(pipeline).__name__}: choose an SDXL or a FLUX model.")


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network whose layers K-LoRA switches."""
    return pipeline.unet if base_of(pipeline) == "sdxl" else pipeline.transformer


class Merger:
    """Adds LoRA changes to the parameters of modules, always from the originals, and gives these very tensors back."""

    def __init__(self) -> None:
        self._originals: dict[nn.Parameter, Tensor] = {}

    def put(self, module: nn.Module, changes: Sequence[tuple[LoraReader, str, float]]) -> None:
        """Make `module` its original plus the changes.

        Args:
            changes: (open file, canonical name, multiplier), added in this order.
        """
        for name, parameter in module.named_parameters(recurse=False):
            original = self._originals.get(parameter, parameter.data)
            merged = original
            for reader, layer, multiplier in changes:
                if name == "weight":
                    merged = _with_weight(merged, original, reader, layer, multiplier)
                elif name == "bias" and (difference := reader.bias(layer)) is not None:
                    merged = merged + multiplier * difference.to(merged.device)
            if merged is original:
                parameter.data = original
            else:
                self._originals[parameter] = original
                parameter.data = merged.to(original.dtype)

    def restore(self) -> None:
        """Put every original tensor back; harmless when there is none."""
        for parameter, original in self._originals.items():
            parameter.data = original
        self._originals.clear()


def _with_weight(merged: Tensor, original: Tensor, reader: LoraReader, layer: str, multiplier: float) -> Tensor:
    """`merged` plus multiplier times what one LoRA makes of `original`, in float32 until the caller casts.

    DoRA replaces W by magnitude · (W + ΔW) / ‖W + ΔW‖ (arXiv 2402.09353), the norm taken over all but the magnitude's own axis.
    """
    if layer not in reader.weights:
        return merged
    change = dense(reader(layer)).reshape(original.shape).to(original.device)
    magnitude = reader.magnitude(layer)
    if magnitude is not None:
        base = original.float()
        directed = base + change
        magnitude = magnitude.float().to(original.device)
        over_rows = magnitude.numel() == original.shape[0]
        kept = 0 if over_rows else 1
        axes = [axis for axis in range(original.dim()) if axis != kept]
        shape = [-1 if axis == kept else 1 for axis in range(original.dim())]
        change = directed * (magnitude.reshape(shape) / directed.norm(dim=axes, keepdim=True)) - base
    return merged.float() + multiplier * change


class DiffusersSwitch:
    """`LayerSwitch` of a diffusers denoiser: a switched layer is merged anew from its original, the others are not touched."""

    def __init__(self, denoiser: nn.Module, base: str, subject: Lora, style: Lora) -> None:
        self._modules = dict(_layers(denoiser, base))
        self._loras = {Choice.SUBJECT: (subject,), Choice.STYLE: (style,), Choice.BOTH: (subject, style)}
        self._readers: dict[Lora, LoraReader] = {}
        self._merger = Merger()
        self._stack = ExitStack()
        names = sorted({*subject.file.layers, *style.file.layers})
        missing = [name for name in names if name not in self._modules]
        if missing:
            raise HostError(
                f"The model has no layer {missing[0]} ({len(missing)} of {len(names)} layers are missing), which the LoRAs "
                f"{subject.file.path.name} and {style.file.path.name} change: choose LoRAs made for this model."
            )
        self._followers: dict[str, list[str]] = {}
        for name in sorted({*subject.file.carried, *style.file.carried} - set(names)):
            if name in self._modules:
                self._followers.setdefault(leader_of(name, names), []).append(name)

    def attach(self) -> None:
        self._stack.callback(self._merger.restore)
        for lora in self._loras[Choice.BOTH]:
            self._readers[lora] = self._stack.enter_context(lora.file.open())

    def apply(self, choices: Mapping[str, Choice]) -> None:
        for layer, choice in choices.items():
            for name in (layer, *self._followers.get(layer, ())):
                changes = [(self._readers[lora], name, lora.multiplier) for lora in self._loras[choice]]
                self._merger.put(self._modules[name], changes)

    def detach(self) -> None:
        self._stack.close()
        self._readers.clear()


@contextmanager
def text_encoders_with(pipeline: Any, loras: Sequence[Lora]) -> Iterator[None]:
    """Inside the block the text-encoder parts of these LoRAs apply at their multipliers."""
    merger = Merger()
    encoders = {part: getattr(pipeline, name, None) for part, name in TEXT_ENCODERS[base_of(pipeline)].items()}
    modules = {part: dict(encoder.named_modules()) for part, encoder in encoders.items() if encoder is not None}
    with ExitStack() as stack:
        stack.callback(merger.restore)
        readers = [(stack.enter_context(lora.file.open()), lora.multiplier) for lora in loras]
        for name in sorted({name for reader, _ in readers for name in reader.text_encoder_modules}):
            part, _, path = name.partition(":")
            module = modules.get(part, {}).get(path) or modules.get(part, {}).get(path.removeprefix("text_model."))
            if module is not None:
                merger.put(module, [(reader, name, multiplier) for reader, multiplier in readers])
        yield


def _layers(denoiser: nn.Module, base: str) -> Iterator[tuple[str, nn.Module]]:
    """Canonical layer name and the diffusers module that holds it, for all that `denoiser` has."""
    known = dict(denoiser.named_modules())
    modules: tuple[Module, ...] = sdxl_modules() if base == "sdxl" else flux_modules()
    for module in modules:
        for layer, path in zip(module.layers, module.diffusers, strict=True):
            if path in known:
                yield layer, known[path]
