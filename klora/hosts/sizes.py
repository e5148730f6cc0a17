"""Whether LoRA files fit the weights of a loaded denoiser: each host tells the sizes of its layers, they are compared here."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from klora.core.lora_file import LayerInfo, LoraFile
from klora.core.topology import NORM, Module
from klora.errors import PairError

Padded = Mapping[str, Container[int]]
"""{kind of LoRA: numbers of columns that a host itself fills up with zeros}"""


@dataclass(frozen=True)
class LayerSize:
    """The size of one layer of a loaded denoiser.

    Attributes:
        shape: (rows, columns) of its weight; a convolution's columns are in * kh * kw.
        padded: narrower LoRAs that the host takes all the same.
    """

    shape: tuple[int, int]
    padded: Padded = field(default_factory=dict)

    def takes(self, layer: LayerInfo) -> bool:
        """Whether the host can add a LoRA's delta to this layer."""
        rows, columns = layer.shape
        return rows == self.shape[0] and (
            columns == self.shape[1] or columns in self.padded.get(layer.kind, ())
        )


Sizes = Mapping[str, LayerSize]
"""{canonical layer: size} of all layers that a loaded denoiser has."""


def true_shape(weight: Any) -> tuple[int, ...] | None:
    """The shape of a layer's weight however it is stored, None if it has none.

    bitsandbytes packs a weight of four bits into one column of bytes, comfy_kitchen into rows half as long; both keep what it was beside it.
    (GGUF's parameters answer with the real shape themselves.)
    """
    for beside, name in (("quant_state", "shape"), ("_params", "orig_shape")):
        shape = getattr(getattr(weight, beside, None), name, None)
        if shape is not None:
            return tuple(shape)
    return None if weight is None else tuple(weight.shape)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's shape as (rows, columns): a 1x1 convolution is the linear layer of its channels."""
    return shape[0], prod(shape[1:])


def native_sizes(
    modules: Iterable[Module],
    weight_of: Callable[[str], Any],
    padded: Callable[[tuple[int, ...]], Padded] = lambda _shape: {},
) -> dict[str, LayerSize]:
    """The sizes of a denoiser that has its original modules; rows of fused weights are layers of their own.

    Args:
        modules: of its base model.
        weight_of: the weight of the module at a native path, None if there is none.
        padded: for a weight of this shape, `LayerSize.padded`.
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
    """Refuse LoRA files of other sizes than the denoiser's, before anything is scored.

    Args:
        model: what the sentence calls it.

    Raises:
        PairError: naming the file, its first layer that does not fit, both sizes, and the way out.
    """
    for file in files:
        known = [name for name in file.layers if name in sizes]
        if not known:
            raise PairError(
                f"The LoRA {file.path.name} changes none of the layers of {model}, which has no {next(iter(file.layers))}: "
                "choose a LoRA made for this one."
            )
        wrong = [name for name in known if not sizes[name].takes(file.layers[name])]
        if wrong:
            raise PairError(
                f"The LoRA {file.path.name} does not fit {model}: its layer {wrong[0]} is {_written(file.layers[wrong[0]].shape)} and "
                f"there it is {_written(sizes[wrong[0]].shape)} (rows × columns; {len(wrong)} of its {len(file.layers)} layers differ): "
                "load the checkpoint that it was made for, or choose a LoRA made for this one."
            )


def left_out(files: Mapping[str, LoraFile], sizes: Sizes) -> Iterator[str]:
    """What to tell of files with layers that the denoiser has not: the WebUIs leave such layers out without a word.

    Args:
        files: by role.
    """
    for role, file in files.items():
        missing = [name for name in file.layers if name not in sizes]
        if missing:
            yield (
                f"The loaded checkpoint has no layer {missing[0]} ({len(missing)} of {len(file.layers)} layers of the {role} LoRA "
                f"{file.path.name} are not there): the WebUI leaves them out, as it does under the LoRA's own tag."
            )


def _written(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"
