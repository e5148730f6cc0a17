"""Reading a LoRA file of any family, trainer and kind into canonical layers.

    lora = read_lora("style.safetensors")
    with lora.open() as delta_of:
        delta = delta_of("input_blocks.4.1.transformer_blocks.0.attn1.to_q")

Only names, shapes, scalars and the ranks of fused pieces are read at first. Tensors stay memory-mapped and
are converted to float32 when a delta is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from os import PathLike
from pathlib import Path

from klora.core import foreign_files
from klora.core.adapters import dora
from klora.core.families import FAMILIES, listed
from klora.core.families.base import Family
from klora.core.file_state import FileState, state_of
from klora.core.key_names import ParsedKey, foreign_prefix, parse_keys
from klora.core.lora_modules import FileModule, Gathered, gather, used_rank
from klora.core.lora_reader import LoraReader
from klora.core.tensor_file import OpenTensors, TensorFile, read_tensor_file
from klora.errors import LoraFileError

_BUNDLED_EMBEDDING = "bundle_emb."


@dataclass(frozen=True)
class LayerInfo:
    """What is known of one layer without evaluating its delta.

    Attributes:
        rank: the rank that enters K in eq. (5); None for a full difference or a LoKr of two full factors.
        shape: (rows, columns) of the delta; a convolution has in * kh * kw columns.
        kind: "LoRA", "LoCon", "LoHa", "LoKr", "GLoRA", "full diff" or "DoRA".
        network_alpha: the file's alpha, None if it has none.
        scale: what the product of the factors is multiplied by, network_alpha / rank as a rule.
    """

    rank: int | None
    shape: tuple[int, int]
    kind: str = "LoRA"
    network_alpha: float | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file as K-LoRA reads it.

    Attributes:
        path: the file.
        state: its state before it was read.
        family: the base model that it is read for.
        families: the keys of all base models that it may be for, whose module names and sizes are the same.
        dialect: how most of its keys are written, e.g. "kohya", "diffusers PEFT".
        dialects: all the ways in which its keys are written, including those of text encoders.
        layers: {canonical layer: what is known of it}, sorted by name, with fused modules split into their
            pieces. A layer or piece whose `up` (or full difference) is all zero is not changed by the file
            and not listed.
        text_encoder_modules: the same for the modules of text encoders, "te1:…".
        unscored: norms and biases, by the name of their module or layer. They are applied, but have no score.
        unknown_keys: keys that belong to no dialect, in the file's order.
        unused_keys: keys that add only zeros to layers that other keys of the file change.
        embeddings: keys of bundled textual-inversion embeddings, which the host's own loader reads.
        metadata: the header's __metadata__, without images.
        scale_from_metadata: the scale is only in the header, where diffusers looks and WebUIs do not.
        modules: the matrices and norms as the file stores them, for writing the file in another dialect.
        tensor_file: the names, shapes and types of its tensors.
    """

    path: Path
    state: FileState | None
    family: Family
    families: tuple[str, ...]
    dialect: str
    dialects: frozenset[str]
    layers: Mapping[str, LayerInfo]
    text_encoder_modules: Mapping[str, LayerInfo]
    unscored: tuple[str, ...]
    unknown_keys: tuple[str, ...]
    unused_keys: tuple[str, ...]
    embeddings: tuple[str, ...]
    metadata: Mapping[str, str]
    scale_from_metadata: bool
    modules: tuple[FileModule, ...] = field(repr=False)
    tensor_file: TensorFile = field(repr=False)

    @property
    def base(self) -> str:
        """The key of `family`."""
        return self.family.key

    @property
    def text_encoder_layers(self) -> Mapping[str, int]:
        """{key of a text encoder: number of its modules that the file changes}."""
        return dict(Counter(name.partition(":")[0] for name in self.text_encoder_modules))

    @property
    def kinds(self) -> Mapping[str, int]:
        """{kind: number of layers}, the most frequent first."""
        return dict(Counter(info.kind for info in self.layers.values()).most_common())

    @contextmanager
    def open(self) -> Iterator[LoraReader]:
        """The file's deltas, magnitudes, biases and norms by canonical name; see `LoraReader`."""
        parts = {
            layer: (module, start, stop) for module in self.modules for layer, start, stop in module.pieces()
        }
        with self.tensor_file.open() as tensors:
            yield LoraReader(self.path, parts, tensors)

    def check_unscored(self) -> None:
        """Looks for broken numbers in all that is applied but not scored.

        That is text encoders, norms, biases, magnitudes and GLoRA's second product.

        Raises:
            LoraFileError: one of these tensors holds NaN or Inf.
        """
        with self.tensor_file.open() as tensors:
            reader = LoraReader(self.path, {}, tensors)
            for module in self.modules:
                scored = module.kind is not None and not self.layers.keys().isdisjoint(module.target.layers)
                reader.check(module, leave_out=module.kind.terms[0] if module.kind and scored else ())


def read_lora(path: str | PathLike[str], loaded: Family | None = None) -> LoraFile:
    """Reads what a LoRA file contains, without its deltas; `LoraFile.open` gives these.

    Args:
        loaded: the family of the checkpoint that the file is to be used with. A file that may be for several
            base models is read for this one; otherwise for the one that its header names, or the first in
            `FAMILIES`.

    Raises:
        LoraFileError: the file is missing, damaged, not a LoRA, made for another base model or incomplete, or
            its tensors do not fit each other. The sentence names the file and the way out.
    """
    state = state_of(Path(path))
    file = read_tensor_file(Path(path))
    fitting: list[LoraFile] = []
    faults: list[LoraFileError] = []
    with file.open() as tensors:
        for family, meanings in _families(file, loaded):
            try:
                lora = _of_family(family, file, state, meanings, tensors)
            except LoraFileError as fault:
                faults.append(fault)
                continue
            other = family.other_by_sizes({name: info.shape for name, info in lora.layers.items()})
            if other is None:
                fitting.append(lora)
            else:
                faults.append(_made_for(file, other))
    if not fitting:
        raise faults[0]
    return replace(fitting[0], families=tuple(lora.base for lora in fitting))


def for_one_base(
    files: Sequence[LoraFile], read: Callable[[Path, Family], LoraFile] = read_lora
) -> list[LoraFile]:
    """The same files, read for one base model if there is one that they may all be for.

    Args:
        read: reads a file for a family.

    Raises:
        LoraFileError: as `read_lora`.
    """
    if len({file.base for file in files}) <= 1:
        return list(files)
    common = next((key for key in files[0].families if all(key in file.families for file in files)), None)
    if common is None or common not in FAMILIES:
        return list(files)
    return [file if file.base == common else read(file.path, FAMILIES[common]) for file in files]


def _of_family(
    family: Family,
    file: TensorFile,
    state: FileState | None,
    meanings: Mapping[str, ParsedKey],
    tensors: OpenTensors,
) -> LoraFile:
    gathered = gather(file, family, meanings, tensors)
    denoiser = [module for module in gathered.modules if module.target.base == family.key]
    text_encoders = [module for module in gathered.modules if module.target.base != family.key]
    layers = dict(sorted(_infos(denoiser, tensors)))
    text = dict(sorted(_infos(text_encoders, tensors)))
    if not layers:
        raise _no_layers(file, gathered, bool(text))
    dialects = [meaning.dialect for meaning in meanings.values() if meaning.target.base == family.key]
    return LoraFile(
        path=file.path,
        state=state,
        family=family,
        families=(family.key,),
        dialect=Counter(dialects).most_common(1)[0][0],
        dialects=frozenset().union(*(module.dialects for module in gathered.modules)),
        layers=layers,
        text_encoder_modules=text,
        unscored=_unscored(gathered),
        unknown_keys=tuple(key for key in gathered.unknown if not key.startswith(_BUNDLED_EMBEDDING)),
        unused_keys=tuple(gathered.unused),
        embeddings=tuple(key for key in gathered.unknown if key.startswith(_BUNDLED_EMBEDDING)),
        metadata=file.metadata,
        scale_from_metadata=any(module.scale_from_metadata for module in gathered.modules),
        modules=tuple(gathered.modules),
        tensor_file=file,
    )


def _families(file: TensorFile, loaded: Family | None) -> list[tuple[Family, dict[str, ParsedKey]]]:
    """The families whose denoisers know the most of the file's keys, with what the keys mean there.

    There are several where networks share their module names. Then sizes tell them apart; where these are the
    same, the loaded checkpoint does, or else the file's header.
    """
    name = file.path.name
    if not file.shapes:
        raise LoraFileError(f'The LoRA file "{name}" holds no tensors: download or export it again.')
    foreign = foreign_files.foreign_lora(file.shapes)
    if foreign is not None:
        raise LoraFileError(f'"{name}" {foreign}.')
    found = parse_keys(file.shapes, loaded)
    own = {
        base: {key for key, meaning in meanings.items() if meaning.target.base == base}
        for base, meanings in found.items()
    }
    best = max(own.values(), key=len)
    is_lora = foreign_files.looks_like_lora(file.shapes)
    is_unlisted = loaded is not None and loaded.key not in FAMILIES and own[loaded.key] >= best
    other = None if is_unlisted and best else foreign_files.other_base(file.shapes)
    if other is not None and is_lora:
        raise _made_for(file, other)
    if best:
        families = {**FAMILIES, **({} if loaded is None else {loaded.key: loaded})}
        fitting = [families[base] for base, keys in own.items() if keys >= best]
        named = foreign_files.named_in_header(fitting, file.metadata)
        fitting.sort(key=lambda family: (family is not loaded, family is not named))
        return [(family, found[family.key]) for family in fitting]
    raise _not_understood(file, any(found.values()), is_lora)


def _not_understood(file: TensorFile, has_text_encoders: bool, is_lora: bool) -> LoraFileError:
    """The sentence for a file of which no family knows a key of its denoiser."""
    if has_text_encoders:
        return _text_encoders_only(file)
    if foreign_files.multiplies(file.shapes):
        return _multiplies(file)
    name, first = file.path.name, next(iter(file.shapes))
    prefix = foreign_prefix(file.shapes)
    if prefix is not None:
        return LoraFileError(
            f'The names of the tensors in "{name}" begin with "{prefix}" ("{first}"), which no WebUI knows: '
            f"if it is a LoRA for {listed('or')}, rename them without it or export it again; else choose "
            "another one."
        )
    what = None if is_lora else foreign_files.not_a_lora(file.shapes)
    if what is not None:
        return LoraFileError(
            f'"{name}" is {what}, not a LoRA for {listed("or")} ("{first}"): choose a LoRA file.'
        )
    return LoraFileError(
        f'"{name}" is not a LoRA for {listed("or")} in any key names that K-LoRA knows (its first tensor is '
        f'"{first}"): choose a LoRA for one of these, or export it again with the key names of kohya or '
        "diffusers."
    )


def _text_encoders_only(file: TensorFile) -> LoraFileError:
    return LoraFileError(
        f'"{file.path.name}" changes the text encoders only, and K-LoRA needs LoRAs that change the denoiser '
        f"of {listed('or')}: choose another LoRA."
    )


def _made_for(file: TensorFile, other: str) -> LoraFileError:
    return LoraFileError(
        f'"{file.path.name}" was made for {other}, and K-LoRA fuses LoRAs for {listed("and")}: choose a LoRA '
        "that was made for one of these."
    )


def _multiplies(file: TensorFile) -> LoraFileError:
    return LoraFileError(
        f'"{file.path.name}" is an OFT, BOFT or IA3 network, which multiplies weights and adds nothing that '
        "could be compared: choose a LoRA of another kind, or put this one into the prompt."
    )


def _infos(modules: Iterable[FileModule], tensors: OpenTensors) -> Iterator[tuple[str, LayerInfo]]:
    for module in modules:
        if module.kind is None or module.delta_shape is None:
            continue
        for layer, start, stop in module.pieces():
            rank = used_rank(module, tensors, start, stop)
            if rank != 0:
                shape = (stop - start, module.delta_shape.shape[1])
                yield layer, LayerInfo(rank, shape, _kind_name(module), module.network_alpha, module.scale)


def _kind_name(module: FileModule) -> str:
    assert module.kind is not None
    if module.magnitude_role is not None:
        return dora.NAME
    return module.kind.name_of(any(prod(shape[2:]) > 1 for shape in module.shapes.values()))


def _unscored(gathered: Gathered) -> tuple[str, ...]:
    names = (
        layer
        for module in gathered.modules
        if module.is_norm or module.bias_role
        for layer in module.target.layers
    )
    return tuple(sorted(names))


def _no_layers(file: TensorFile, gathered: Gathered, text_encoders: bool) -> LoraFileError:
    name = file.path.name
    if foreign_files.multiplies(file.shapes):
        return _multiplies(file)
    if text_encoders:
        return _text_encoders_only(file)
    if any(module.kind for module in gathered.modules):
        return LoraFileError(
            f'"{name}" changes nothing: all its up weights are zero, as before any training; choose another '
            "file."
        )
    key = next(iter(file.shapes))
    return LoraFileError(
        f'"{name}" holds no weight differences for {listed("or")} (its first tensor is "{key}"): choose a '
        "LoRA file."
    )
