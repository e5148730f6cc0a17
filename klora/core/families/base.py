"""What K-LoRA has to know of a base model, as one record, and the parts that such a record is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from klora.core.topology import LINEAR, Module

NATIVE, DIFFUSERS, OLD_PROCESSOR, XLABS = "native", "diffusers", "old processor", "XLabs"
DIFFUSERS_FUSED, SHORT = "diffusers, fused", "without text_model"
HOSTS_OWN = "the WebUI's own names"
DIFFUSERS_UNREAD = "diffusers, unknown to WebUIs"


@dataclass(frozen=True)
class Prefix:
    """What keys start with in a dialect.

    Attributes:
        text: the prefix itself.
        separator: what separates the parts of a module's name after it, "." or "_".
        dialect: what the prefix says about how the key is written.
    """

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
"""What trainers write before the module names of any denoiser."""


class Alias(NamedTuple):
    """One more name of a module, or of some of its pieces, in the files of some trainers.

    Attributes:
        name: the dotted name.
        module: the module that it names.
        layers: the canonical layers whose rows are in the matrix of this name, top first.
        naming: NATIVE, DIFFUSERS, …, or the convention's name for people.
    """

    name: str
    module: Module
    layers: tuple[str, ...]
    naming: str


class Row(NamedTuple):
    """Modules that are one layer each, as one row of a table.

    "blocks.#.ffn.{0,2}" are two modules of every block.

    Attributes:
        native: dotted; "#" stands for the number of a block, "{a,b}" for each of its parts.
        diffusers: the same in diffusers, with as many parts; "" where the names are the native ones.
        kind: LINEAR, CONV or NORM.
    """

    native: str
    diffusers: str = ""
    kind: str = LINEAR


def modules_of(rows: Iterable[Row], blocks: int) -> Iterator[Module]:
    """All modules of a table, for a network of so many blocks."""
    for row in rows:
        names = list(zip(_written_out(row.native), _written_out(row.diffusers or row.native), strict=True))
        for number in map(str, range(blocks if "#" in row.native else 1)):
            for native, diffusers in names:
                yield Module(native.replace("#", number), (diffusers.replace("#", number),), row.kind)


def _written_out(pattern: str) -> list[str]:
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(chosen) for chosen in product(*parts)]


class Block(NamedTuple):
    """What the selection map calls the blocks of one part of the network.

    Attributes:
        group: the part's name.
        numbered: whether it has several blocks, numbered by the next part of a layer's name.
    """

    group: str
    numbered: bool = False


class Found(NamedTuple):
    """What a key without its suffix stands for.

    Attributes:
        module: the network's module.
        layers: those of its layers whose rows the matrix under this key holds, top first.
    """

    module: Module
    layers: tuple[str, ...]


def has_transformer(name: str) -> Callable[[Any], bool]:
    """`Family.is_pipeline` of a model whose pipelines in diffusers have a transformer of this class."""
    return lambda pipeline: type(getattr(pipeline, "transformer", None)).__name__ == name


ATTENTION_WIDTHS = {
    1536: "Stable Diffusion 3 Medium",
    2432: "Stable Diffusion 3.5 Large",
    3072: "FLUX.1 or Qwen-Image",
    4096: "FLUX.2 Klein 9B",
    6144: "Krea 2 or FLUX.2",
}
"""Columns of `transformer_blocks.N.attn.to_q`, by which models that diffusers names alike are told apart."""

LayerShapes = Mapping[str, tuple[int, int]]
"""{canonical layer: (rows, columns)}"""


@dataclass(frozen=True, eq=False)
class Family:
    """A base model: all checkpoints whose networks are built alike.

    Attributes:
        key: its name in code.
        name: its exact name for people.
        short_name: its usual name, for places where it cannot be confused with a similar model.
        words: parts of its name as they occur in file names, in lower case.
        accelerated_names: names of its checkpoints, in lower case, that contain a word for accelerators.
        list_modules: makes all modules of its denoiser.
        list_aliases: makes their further names.
        blocks: {first part of a canonical layer's name: its block}, in the order of the forward pass.
        component: the denoiser's name in diffusers' pipelines.
        text_encoders: {key of `text_encoders.TEXT_ENCODERS`: its name in diffusers' pipelines}.
        side: width and height in pixels of the square images that it was trained on.
        readable: the dialects that the loaders of Forge and its relatives read as they are.
        is_checkpoint: (WebUI's record of a loaded checkpoint, its denoiser) -> whether it is of this family.
        is_pipeline: (diffusers pipeline) -> whether it is of this family; None if diffusers has no pipeline
            for it that can be stopped between steps.
        single_file: the diffusers pipeline class that opens its checkpoints stored in one file; None if one
            file does not hold a whole model.
        guidance: what diffusers' pipelines call the guidance scale.
        other_by_size: (layer, rows, columns) -> the other model with the same module names in which the layer
            has this size; None if it may be this family's.
        namesakes: (pattern, name) of models with the same module names; the pattern, in lower case, matches
            what a file's header says of its base model.
        control_of: (keys of a file that belong to no dialect, shapes of its layers) -> what kind of control
            LoRA it is, for a sentence; None if it is none.
        image_input: the layer that reads the image. It has more columns in checkpoints that take a second
            image as well.
        in_paper: whether the paper's authors used it.
        schedule: the schedule that they recommend for it, or for the model of its kind that they used.
        prefixes: what the keys of its denoiser start with in each dialect.
        find: for a model known only by a WebUI's own names: (key without its suffix) -> what it stands for,
            None if the WebUI does not know it.
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
    is_pipeline: Callable[[Any], bool] | None = None
    single_file: str | None = None
    side: int = 1024
    readable: tuple[str, ...] = ("kohya",)
    accelerated_names: tuple[str, ...] = ()
    list_aliases: Callable[[], Iterator[Alias]] = lambda: iter(())
    other_by_size: Callable[[str, int, int], str | None] = lambda _name, _rows, _columns: None
    namesakes: tuple[tuple[str, str], ...] = ()
    control_of: Callable[[Collection[str], LayerShapes], str | None] = lambda _unknown, _shapes: None
    image_input: str = ""
    in_paper: bool = False
    schedule: str = "s"
    guidance: str = "guidance_scale"
    prefixes: tuple[Prefix, ...] = DENOISER_PREFIXES
    find: Callable[[str], Found | None] | None = None

    @property
    def diffusers_is_read(self) -> bool:
        """Whether Forge and its relatives load the keys that diffusers itself writes (`component`.…)."""
        return "diffusers PEFT" in self.readable

    def dotted(self, name: str) -> str:
        """The key of the module `name` as diffusers writes it, or as the WebUI whose own name it is."""
        return name if self.find is not None else f"{self.component}.{name}"

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """All modules of the denoiser."""
        return tuple(self.list_modules())

    @cached_property
    def fused(self) -> Mapping[str, Module]:
        """{native path: module} of the modules that fuse several layers."""
        return {module.native: module for module in self.modules if module.pieces}

    def other_by_sizes(self, layers: LayerShapes) -> str | None:
        """The other model that these sizes belong to; None if they may be this family's."""
        return next(
            (other for name, shape in layers.items() if (other := self.other_by_size(name, *shape))), None
        )
