"""What K-LoRA has to know of a base model, as one record, and the words that such records are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from klora.core.topology import Module

NATIVE, DIFFUSERS, OLD_PROCESSOR, XLABS = "native", "diffusers", "old processor", "XLabs"
DIFFUSERS_FUSED, SHORT = "diffusers, fused", "without text_model"


@dataclass(frozen=True)
class Prefix:
    """How a dialect opens its keys: `text`, the separator inside module names, and what it tells."""

    text: str
    separator: str
    dialect: str


DENOISER_PREFIXES = (
    Prefix("lora_unet_", "_", "kohya"),
    Prefix("lora_transformer_", "_", "OneTrainer"),
    Prefix("lycoris_", "_", "SimpleTuner LyCORIS"),
    Prefix("base_model.model.transformer.", ".", "raw PEFT"),
    Prefix("base_model.model.diffusion_model.", ".", "raw PEFT"),
    Prefix("base_model.model.unet.", ".", "raw PEFT"),
    Prefix("base_model.model.", ".", "raw PEFT"),
    Prefix("model.diffusion_model.", ".", "dotted"),
    Prefix("diffusion_model.", ".", "dotted"),
    Prefix("unet.unet.", ".", "doubled unet prefix"),
    Prefix("unet.", ".", "diffusers"),
    Prefix("transformer.", ".", "diffusers"),
    Prefix("", ".", "bare"),
)
"""Trainers write these before the names of any denoiser's modules."""


class Alias(NamedTuple):
    """One more name of a module, or of some of its pieces, in the files of some trainers.

    Attributes:
        name: dotted.
        module: what it names.
        layers: the canonical layers whose rows the matrix under this name holds, top first.
        naming: NATIVE, DIFFUSERS, … or a name of the convention for people.
    """

    name: str
    module: Module
    layers: tuple[str, ...]
    naming: str


class Block(NamedTuple):
    """What the map calls the blocks of one part of the network; `numbered` if it has several, by the next part of a layer's name."""

    group: str
    numbered: bool = False


LayerShapes = Mapping[str, tuple[int, int]]
"""{canonical layer: (rows, columns)}"""


@dataclass(frozen=True, eq=False)
class Family:
    """A base model: all checkpoints whose networks are built alike.

    Attributes:
        key: what stands for it in code.
        name: as people write it, precisely.
        short_name: as people call it, where no other model of nearly the same name is meant.
        words: of its name, as they stand in names of files, in lower case.
        list_modules: makes all modules of its denoiser.
        list_aliases: makes their further names.
        blocks: {first part of a canonical layer's name: its block}, in the order of the forward pass.
        component: the denoiser's name in diffusers' pipelines.
        text_encoders: {key of `text_encoders.TEXT_ENCODERS`: its name in diffusers' pipelines}.
        readable: the dialects that the Forge family's loaders read as they are.
        is_checkpoint: told the WebUI's record of a loaded checkpoint and its denoiser, whether it is of this family.
        is_pipeline: whether a diffusers pipeline is.
        other_by_size: told a layer's name, rows and columns, which other model of the same names has that size, None if this one may.
        namesakes: (pattern, name) of models of the same names, as files give themselves in their headers, in lower case.
        is_control: told the keys of a file that nobody knows and the shapes of its layers, whether it is a control LoRA.
        schedule: the one that the paper's authors recommend.
        prefixes: how dialects open the keys of its denoiser.
    """

    key: str
    name: str
    short_name: str
    words: tuple[str, ...]
    list_modules: Callable[[], Iterator[Module]]
    blocks: Mapping[str, Block]
    component: str
    text_encoders: Mapping[str, str]
    is_checkpoint: Callable[[Any, Any], bool]
    is_pipeline: Callable[[Any], bool]
    readable: tuple[str, ...] = ("kohya",)
    list_aliases: Callable[[], Iterator[Alias]] = lambda: iter(())
    other_by_size: Callable[[str, int, int], str | None] = lambda _name, _rows, _columns: None
    namesakes: tuple[tuple[str, str], ...] = ()
    is_control: Callable[[Collection[str], LayerShapes], bool] = lambda _unknown, _shapes: False
    schedule: str = "s"
    prefixes: tuple[Prefix, ...] = DENOISER_PREFIXES

    @property
    def diffusers_is_read(self) -> bool:
        """Whether the Forge family's loaders read the keys that diffusers itself writes, which open with `component`."""
        return "diffusers PEFT" in self.readable

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """All modules of the denoiser."""
        return tuple(self.list_modules())

    @cached_property
    def fused(self) -> Mapping[str, Module]:
        """{native path: module} of those that hold several layers."""
        return {module.native: module for module in self.modules if module.pieces}

    def other_by_sizes(self, layers: LayerShapes) -> str | None:
        """The other model of the same names that these layers' sizes tell, None if they may be this one's."""
        return next(
            (other for name, shape in layers.items() if (other := self.other_by_size(name, *shape))), None
        )
