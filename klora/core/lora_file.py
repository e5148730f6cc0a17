"""Reading a LoRA file for SDXL or FLUX.1, of any trainer and any kind, into canonical layers.

    lora = read_lora("style.safetensors")
    with lora.open() as delta_of:
        delta = delta_of("input_blocks.4.1.transformer_blocks.0.attn1.to_q")

Only names, shapes, scalars and the ranks of fused pieces are read at first; tensors stay mapped and are raised to
float32 when a delta is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from klora.core import families
from klora.core.adapters import dora
from klora.core.file_state import FileState, state_of
from klora.core.key_names import ParsedKey, foreign_prefix, parse_key
from klora.core.lora_modules import FileModule, Gathered, gather, used_rank
from klora.core.lora_reader import LoraReader
from klora.core.tensor_file import OpenTensors, TensorFile, read_tensor_file
from klora.core.topology import CONV
from klora.errors import LoraFileError

_BASES = ("sdxl", "flux")
_BUNDLED_EMBEDDING = "bundle_emb."


@dataclass(frozen=True)
class LayerInfo:
    """What a file's header tells of one layer.

    Attributes:
        rank: the rank that counts for K in eq. (5); None for a full difference or a LoKr of two full factors.
        shape: (rows, columns) of the delta; a convolution's columns are in * kh * kw.
        kind: "LoRA", "LoCon", "LoHa", "LoKr", "GLoRA", "full diff" or "DoRA".
        network_alpha: the file's alpha, None if it has none.
        scale: what the product of the factors is multiplied by, network_alpha / rank.
    """

    rank: int | None
    shape: tuple[int, int]
    kind: str = "LoRA"
    network_alpha: float | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file, understood.

    Attributes:
        path: the file.
        state: its state before it was read.
        base: "sdxl" or "flux".
        dialect: how most of its keys are written, e.g. "kohya", "diffusers PEFT".
        dialects: how any of its keys is written, those of text encoders too.
        layers: {canonical layer: what the header tells}, sorted by name; FLUX in split pieces. A layer or piece whose
            `up` (or full difference) is all zero is not changed by the file and not listed.
        text_encoder_modules: the same for "te1:…", "te2:…" and "t5:…" modules.
        carried: norms and biases, by the name of their module or layer: they go with the LoRA, but are not scored.
        unknown_keys: keys that no dialect has, in the file's order.
        unused_keys: keys that would change layers by zeros only, which other keys of the file change.
        embeddings: keys of bundled textual-inversion embeddings, for the host's own loader.
        metadata: the header's __metadata__.
        scale_from_metadata: the scale stands only in the header, where diffusers looks and WebUIs do not.
        modules: the matrices and norms as the file has them, for a writer.
    """

    path: Path
    state: FileState | None
    base: str
    dialect: str
    dialects: frozenset[str]
    layers: Mapping[str, LayerInfo]
    text_encoder_modules: Mapping[str, LayerInfo]
    carried: tuple[str, ...]
    unknown_keys: tuple[str, ...]
    unused_keys: tuple[str, ...]
    embeddings: tuple[str, ...]
    metadata: Mapping[str, str]
    scale_from_metadata: bool
    modules: tuple[FileModule, ...] = field(repr=False)
    tensor_file: TensorFile = field(repr=False)

    @property
    def text_encoder_layers(self) -> Mapping[str, int]:
        """{"te1" | "te2" | "t5": number of its modules that the file changes}."""
        return dict(Counter(name.partition(":")[0] for name in self.text_encoder_modules))

    @property
    def kinds(self) -> Mapping[str, int]:
        """{kind: number of layers}, the most frequent first."""
        return dict(Counter(info.kind for info in self.layers.values()).most_common())

    @contextmanager
    def open(self) -> Iterator[LoraReader]:
        """The file's deltas and all else by canonical name; see `LoraReader`."""
        parts = {
            layer: (module, start, stop) for module in self.modules for layer, start, stop in module.pieces()
        }
        with self.tensor_file.open() as tensors:
            yield LoraReader(self.path, parts, tensors)

    def check_unscored(self) -> None:
        """Look at all that is applied beside the deltas of `layers`: text encoders, norms, biases, magnitudes, GLoRA's second product.

        Raises:
            LoraFileError: one of its tensors holds NaN or Inf.
        """
        with self.tensor_file.open() as tensors:
            reader = LoraReader(self.path, {}, tensors)
            for module in self.modules:
                scored = module.kind is not None and not self.layers.keys().isdisjoint(module.target.layers)
                reader.check(module, leave_out=module.kind.terms[0] if module.kind and scored else ())


def read_lora(path: str | PathLike[str]) -> LoraFile:
    """Reads the header of a LoRA file.

    Raises:
        LoraFileError: one sentence that names the file and the way out: not there, damaged, not a LoRA, made for another
            base model, incomplete, or with tensors that do not fit each other.
    """
    state = state_of(Path(path))
    file = read_tensor_file(Path(path))
    meanings = {key: meaning for key in file.shapes if (meaning := parse_key(key)) is not None}
    base = _base(file, meanings.values())
    own = {
        key: meaning
        for key, meaning in meanings.items()
        if meaning.target.base == base or meaning.target.base not in _BASES
    }
    with file.open() as tensors:
        gathered = gather(file, own, tensors)
        layers = dict(
            sorted(_infos((module for module in gathered.modules if module.target.base == base), tensors))
        )
        text = dict(
            sorted(_infos((module for module in gathered.modules if module.target.base != base), tensors))
        )
    if not layers:
        raise _no_layers(file, gathered, bool(text))
    _check_model(file, base, layers)
    own_denoiser = [meaning.dialect for meaning in own.values() if meaning.target.base == base]
    return LoraFile(
        path=file.path,
        state=state,
        base=base,
        dialect=Counter(own_denoiser).most_common(1)[0][0],
        dialects=frozenset().union(*(module.dialects for module in gathered.modules)),
        layers=layers,
        text_encoder_modules=text,
        carried=_carried(gathered),
        unknown_keys=tuple(key for key in gathered.unknown if not key.startswith(_BUNDLED_EMBEDDING)),
        unused_keys=tuple(gathered.unused),
        embeddings=tuple(key for key in gathered.unknown if key.startswith(_BUNDLED_EMBEDDING)),
        metadata=file.metadata,
        scale_from_metadata=any(module.scale_from_metadata for module in gathered.modules),
        modules=tuple(gathered.modules),
        tensor_file=file,
    )


def _base(file: TensorFile, meanings: Iterable[ParsedKey]) -> str:
    name = file.path.name
    if not file.shapes:
        raise LoraFileError(f'The LoRA file "{name}" holds no tensors: download or export it again.')
    foreign = families.foreign_lora(file.shapes)
    if foreign is not None:
        raise LoraFileError(f'"{name}" {foreign}.')
    is_lora = families.looks_like_lora(file.shapes)
    other = families.other_base(file.shapes)
    if other is not None and is_lora:
        raise _made_for(file, other)
    counts = Counter(meaning.target.base for meaning in meanings)
    found = Counter({base: counts[base] for base in _BASES}).most_common(1)[0]
    if found[1]:
        return found[0]
    if counts:
        raise LoraFileError(
            f'"{name}" changes the text encoders only: K-LoRA needs LoRAs that change the SDXL or FLUX.1 denoiser.'
        )
    if families.multiplies(file.shapes):
        raise _multiplies(file)
    first = next(iter(file.shapes))
    prefix = foreign_prefix(file.shapes)
    if prefix is not None:
        raise LoraFileError(
            f'The names of the tensors in "{name}" open with "{prefix}" ("{first}"), which no WebUI knows: if it is a LoRA for SDXL or '
            "FLUX.1, rename them without it or export it again; else choose another one."
        )
    what = None if is_lora else families.not_a_lora(file.shapes)
    if what is not None:
        raise LoraFileError(
            f'"{name}" is {what}, not a LoRA for SDXL or FLUX.1 ("{first}"): choose a LoRA file.'
        )
    raise LoraFileError(
        f'"{name}" is no LoRA for SDXL or FLUX.1 in any names that K-LoRA knows (its first tensor is "{first}"): choose a LoRA for one of '
        "these, or export it again in the keys of kohya or diffusers."
    )


def _check_model(file: TensorFile, base: str, layers: Mapping[str, LayerInfo]) -> None:
    """Refuse a LoRA of another model whose names are those of `base`, where its sizes tell."""
    other = families.other_base_by_sizes(base, {name: info.shape for name, info in layers.items()})
    if other is not None:
        raise _made_for(file, other)


def _made_for(file: TensorFile, other: str) -> LoraFileError:
    return LoraFileError(
        f'"{file.path.name}" was made for {other}, and K-LoRA fuses LoRAs for SDXL and FLUX.1: choose a LoRA that was made for one of these.'
    )


def _multiplies(file: TensorFile) -> LoraFileError:
    return LoraFileError(
        f'"{file.path.name}" is an OFT, BOFT or IA3 network, which multiplies weights and adds nothing that could be compared: choose a LoRA '
        "of another kind, or put this one into the prompt."
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
    return module.kind.name_of(module.target.module.kind == CONV)


def _carried(gathered: Gathered) -> tuple[str, ...]:
    names = (
        layer
        for module in gathered.modules
        if module.is_norm or module.bias_role
        for layer in module.target.layers
    )
    return tuple(sorted(names))


def _no_layers(file: TensorFile, gathered: Gathered, text_encoders: bool) -> LoraFileError:
    name = file.path.name
    if families.multiplies(file.shapes):
        return _multiplies(file)
    if text_encoders:
        return LoraFileError(
            f'"{name}" changes the text encoders only: K-LoRA needs LoRAs that change the SDXL or FLUX.1 denoiser.'
        )
    if any(module.kind for module in gathered.modules):
        return LoraFileError(
            f'"{name}" changes nothing: all its up weights are zero, as before any training; choose another file.'
        )
    key = next(iter(file.shapes))
    return LoraFileError(
        f'"{name}" holds no weight differences for SDXL or FLUX.1 (its first tensor is "{key}"): choose a LoRA file.'
    )
