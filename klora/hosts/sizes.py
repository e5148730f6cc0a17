"""Checks whether LoRA files fit a loaded denoiser, whose layer sizes each host tells."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from klora.core.lora_file import LayerInfo, LoraFile
from klora.core.topology import NORM, Module
from klora.errors import PairError

Padded = Mapping[str, Container[int]]
"""{kind of LoRA: numbers of columns from which a host itself pads it with zeros}"""


@dataclass(frozen=True)
class LayerSize:
    """The size of one layer of a loaded denoiser.

    Attributes:
        shape: (rows, columns) of its weight; a convolution has in · kh · kw columns.
        padded: narrower LoRAs that the host accepts as well.
    """

    shape: tuple[int, int]
    padded: Padded = field(default_factory=dict)

    def takes(self, layer: LayerInfo) -> bool:
        """Whether the host can add the delta of a LoRA's layer to this layer."""
        rows, columns = layer.shape
        return rows == self.shape[0] and (
            columns == self.shape[1] or columns in self.padded.get(layer.kind, ())
        )


Sizes = Mapping[str, LayerSize]
"""{canonical layer: size} for all layers of a loaded denoiser."""


def true_shape(weight: Any) -> tuple[int, ...] | None:
    """The shape of a layer's weight, in whatever format it is stored; None if there is no weight.

    bitsandbytes packs a 4-bit weight into one column of bytes, comfy_kitchen into rows of half the length;
    both store the original shape beside it. GGUF's parameters themselves give the original shape.
    """
    for beside, name in (("quant_state", "shape"), ("_params", "orig_shape")):
        shape = getattr(getattr(weight, beside, None), name, None)
        if shape is not None:
            return tuple(shape)
    return None if weight is None else tuple(weight.shape)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's shape as (rows, columns). A 1×1 convolution counts as a linear layer over its channels."""
    return shape[0], prod(shape[1:])


def native_sizes(
    modules: Iterable[Module],
    weight_of: Callable[[str], Any],
    padded: Callable[[tuple[int, ...]], Padded] = lambda _shape: {},
) -> dict[str, LayerSize]:
    """The layer sizes of a denoiser with the modules of its original code, where weights may be fused.

    Args:
        modules: those of its base model.
        weight_of: returns the weight of the module at a native path, None if there is none.
        padded: returns `LayerSize.padded` for a weight of a given shape.
    """
    found = {}
    for module in modules:
        shape = None if module.kind == NORM else true_shape(weight_of(module.native))
        if shape is not None:
            rows, columns = matrix_of(shape)
            heights = module.heights(module.layers, rows, columns)
            found.update(
                {
                    layer: LayerSize((height, columns), padded(shape))
                    for layer, height in zip(module.layers, heights, strict=True)
                }
            )
    return found


def check_fit(files: Sequence[LoraFile], sizes: Sizes, model: str = "the loaded checkpoint") -> None:
    """Refuse LoRA files whose layers differ in size from the denoiser's, before anything is scored.

    Args:
        model: what the error message calls the model.

    Raises:
        PairError: it names the file, its first layer that does not fit, both sizes, and the way out.
    """
    for file in files:
        known = [name for name in file.layers if name in sizes]
        if not known:
            raise PairError(
                f"The LoRA {file.path.name} changes none of the layers of {model}, which has no "
                f"{next(iter(file.layers))}: choose a LoRA made for this one."
            )
        wrong = [name for name in known if not sizes[name].takes(file.layers[name])]
        if wrong:
            raise PairError(
                f"The LoRA {file.path.name} does not fit {model}: its layer {wrong[0]} is "
                f"{_written(file.layers[wrong[0]].shape)} and there it is {_written(sizes[wrong[0]].shape)} "
                f"(rows × columns; {len(wrong)} of its {len(file.layers)} layers differ): load the "
                "checkpoint that it was made for, or choose a LoRA made for this one."
            )


def left_out(files: Mapping[str, LoraFile], sizes: Sizes) -> Iterator[str]:
    """A warning for each file with layers that the denoiser does not have, which a WebUI silently ignores.

    Args:
        files: {role: file}.
    """
    for role, file in files.items():
        missing = [name for name in file.layers if name not in sizes]
        if missing:
            yield (
                f"The loaded checkpoint has no layer {missing[0]} ({len(missing)} of {len(file.layers)} "
                f"layers of the {role} LoRA {file.path.name} are not there): the WebUI leaves them out, as "
                "it does with the LoRA's own tag."
            )


def _written(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"
