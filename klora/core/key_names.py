"""The key dialects of LoRA files, as tables: which trainer's key stands for which tensor of which layer.

A key is <prefix><module><suffix>. The suffix names the role of the tensor and the prefix the network. The
module is looked up in tables of all modules of one base model, so that a name with underscores has one
meaning and nothing has to guess which underscores were dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from types import MappingProxyType

from klora.core.adapters import ADAPTERS, dora
from klora.core.families import FAMILIES
from klora.core.families.base import (
    DIFFUSERS,
    DIFFUSERS_FUSED,
    DIFFUSERS_UNREAD,
    HOSTS_OWN,
    NATIVE,
    OLD_PROCESSOR,
    SHORT,
    XLABS,
    Family,
    Prefix,
)
from klora.core.text_encoders import TEXT_ENCODERS, TextEncoder
from klora.core.topology import Module


@dataclass(frozen=True)
class Target:
    """The place in the model that a module name in a file stands for.

    Attributes:
        base: the key of a family, or of a text encoder.
        module: the network's module.
        layers: the canonical layers whose rows are in the file's matrix, top first: all or some of the
            module's.
        naming: the naming convention that matched, see `families.base`.
        halves_swapped: the file has the two halves of the rows in diffusers' order, while the layer has them
            in the native order.
    """

    base: str
    module: Module
    layers: tuple[str, ...]
    naming: str
    halves_swapped: bool = False


SUFFIXES: Mapping[str, str] = MappingProxyType(
    {
        **{suffix: role for adapter in ADAPTERS for suffix, role in adapter.suffixes.items()},
        **dora.SUFFIXES,
        ".alpha": "alpha", ".scale": "scale",
        ".diff_b": "diff_b", ".w_norm": "w_norm", ".b_norm": "b_norm",
    }
)  # fmt: skip
_SUFFIXES_BY_LAST_PART = {
    last: tuple(s for s in SUFFIXES if s.endswith(f".{last}"))
    for last in {s.rpartition(".")[2] for s in SUFFIXES}
}
_ADAPTER_NAME = re.compile(
    r"(\.(?:lora_[AB]|lora_magnitude_vector|(?:hada|lokr)_[wt]\w+))\.(?!(?:weight|bias)$)([^.]+)"
)
_TWICE = "base_model.model." * 2
_LONG_UNDERSCORE = re.compile(r"(lora_unet|lora_transformer|lycoris|lora_te[123]?)__+")


@dataclass(frozen=True)
class ParsedKey:
    """A parsed key of a LoRA file.

    Attributes:
        target: the place in the model it belongs to.
        role: which tensor of the module it is, a value of `SUFFIXES`.
        dialect: the name of the way in which the key is written, for people.
        path: the module's name as the file writes it, without prefix and suffix.
        stem: the key as the file has it, without suffix and adapter name.
        adapter: the name that PEFT gave the adapter, "" if the key has none.
    """

    target: Target
    role: str
    dialect: str
    path: str
    stem: str
    adapter: str = ""


def parse_key(key: str, families: Iterable[Family] = FAMILIES.values()) -> ParsedKey | None:
    """What `key` means in a text encoder, or else in the first family that knows it; None if none does."""
    cuts = list(_cuts(key))
    return next(filter(None, (_meaning(cuts, network) for network in (*_ENCODERS, *families))), None)


def parse_keys(keys: Iterable[str], loaded: Family | None = None) -> Mapping[str, dict[str, ParsedKey]]:
    """{key of a family: {key of the file: what it means there}}, without the keys that mean nothing there.

    The keys of text encoders are listed under every family.

    Args:
        loaded: a family to look in beside `FAMILIES`.
    """
    families = {**FAMILIES, **({} if loaded is None else {loaded.key: loaded})}
    found: dict[str, dict[str, ParsedKey]] = {name: {} for name in families}
    for key in keys:
        cuts = list(_cuts(key))
        shared = next(filter(None, (_meaning(cuts, encoder) for encoder in _ENCODERS)), None)
        for name, meaning in (
            dict.fromkeys(families, shared) if shared else _meanings(cuts, tuple(families.values()))
        ).items():
            found[name][key] = meaning
    return found


def _meanings(cuts: Iterable[_Cut], families: tuple[Family, ...]) -> dict[str, ParsedKey]:
    """{key of a family: what a key means there}, as `_meaning` finds it, looked up once for all families."""
    found: dict[str, ParsedKey] = {}
    by_table = tuple(family for family in families if family.find is None)
    for cut in cuts:
        for prefix, table in _tables(by_table):
            if cut.name.startswith(prefix.text):
                for family, target in table.get(cut.name[len(prefix.text) :], ()):
                    if family.key not in found and prefix in family.prefixes:
                        found[family.key] = _parsed(cut, prefix, target)
        for family in families:
            if family.find is not None and family.key not in found:
                meaning = _found(cut, family)
                if meaning is not None:
                    found[family.key] = meaning
    return found


@cache
def _tables(
    families: tuple[Family, ...],
) -> list[tuple[Prefix, Mapping[str, list[tuple[Family, Target]]]]]:
    """[(prefix, {module name as files write it after this prefix: [(family that has it, where it goes)]})]"""
    prefixes = dict.fromkeys(prefix for family in families for prefix in family.prefixes)
    tables: dict[str, dict[str, list[tuple[Family, Target]]]] = {}
    for separator in {prefix.separator for prefix in prefixes}:
        table = tables[separator] = {}
        for family in families:
            for path, target in _targets(family, separator).items():
                table.setdefault(path, []).append((family, target))
    return [(prefix, tables[prefix.separator]) for prefix in prefixes]


_ENCODERS: tuple[Family | TextEncoder, ...] = tuple(TEXT_ENCODERS.values())


@dataclass(frozen=True)
class _Cut:
    """One way of splitting a key.

    Attributes:
        suffix: a key of `SUFFIXES`.
        stem: the key without suffix and adapter name.
        name: the stem without what got into it by accident.
        accident: what that was, "" for nothing.
        adapter: the name that PEFT gave the adapter, "" if the key has none.
    """

    suffix: str
    stem: str
    name: str
    accident: str
    adapter: str


def _cuts(key: str) -> Iterator[_Cut]:
    named = _ADAPTER_NAME.search(key)
    adapter = named[2] if named else ""
    plain = _ADAPTER_NAME.sub(r"\1", key) if named else key
    for suffix in _SUFFIXES_BY_LAST_PART.get(plain.rpartition(".")[2], ()):
        if plain.endswith(suffix):
            stem = plain[: -len(suffix)]
            yield _Cut(suffix, stem, *_without_accident(stem), adapter)


def _meaning(cuts: Iterable[_Cut], network: Family | TextEncoder) -> ParsedKey | None:
    for cut in cuts:
        for prefix in network.prefixes:
            if cut.name.startswith(prefix.text):
                target = _targets(network, prefix.separator).get(cut.name[len(prefix.text) :])
                if target is not None:
                    return _parsed(cut, prefix, target)
    return None


def _parsed(cut: _Cut, prefix: Prefix, target: Target) -> ParsedKey:
    dialect = _dialect(prefix, target, cut.suffix)
    if cut.accident:
        dialect = f"{dialect} ({cut.accident})"
    elif cut.adapter and prefix.dialect != "raw PEFT":
        dialect = f"{dialect} (adapter names)"
    path = cut.name[len(prefix.text) :]
    return ParsedKey(target, SUFFIXES[cut.suffix], dialect, path, cut.stem, cut.adapter)


def _found(cut: _Cut, family: Family) -> ParsedKey | None:
    """What a key means by a WebUI's own names, which have it as it stands in the file."""
    place = family.find(cut.stem) if family.find is not None else None
    if place is None:
        return None
    target = Target(family.key, place.module, place.layers, HOSTS_OWN)
    dialect = f"{HOSTS_OWN} (adapter names)" if cut.adapter else HOSTS_OWN
    return ParsedKey(target, SUFFIXES[cut.suffix], dialect, cut.stem, cut.stem, cut.adapter)


def foreign_prefix(keys: Iterable[str]) -> str | None:
    """An unknown prefix shared by most of these keys, if they could be parsed without it; else None."""
    some = list(islice(keys, MOST_LOOKED_AT))
    for key in some[:3]:
        for end in (cut.end() for cut in islice(re.finditer(r"[._]", key), 8)):
            prefix = key[:end]
            if sum(key.startswith(prefix) and _is_in_a_block(key[end:]) for key in some) > len(some) / 2:
                return prefix
    return None


def _is_in_a_block(key: str) -> bool:
    """Whether a key can be parsed and names a numbered block; many networks have names such as `conv_in`."""
    meaning = parse_key(key)
    return meaning is not None and any(map(str.isdigit, meaning.path))


MOST_LOOKED_AT = 500


def _without_accident(stem: str) -> tuple[str, str]:
    """A key without what got into it by accident, and what that was ("" for nothing).

    `_orig_mod` comes from torch.compile, and some trainers save it; `base_model.model.` is doubled where PEFT
    wrapped a model twice; `lora_unet__` is written where a module's name begins with a dot.
    """
    accidents = []
    if "_orig_mod" in stem:
        stem = stem.replace("_orig_mod.", "").replace("_orig_mod_", "")
        accidents.append("_orig_mod")
    if stem.startswith(_TWICE):
        accidents.append("base_model.model. twice")
    while stem.startswith(_TWICE):
        stem = stem[len(_TWICE) // 2 :]
    if "__" in stem and (long := _LONG_UNDERSCORE.match(stem)):
        stem = f"{long[1]}_{stem[long.end() :]}"
        accidents.append(f"{long[1]}__")
    return stem, ", ".join(accidents)


_DIALECT_OF_BARE = {NATIVE: "dotted native without prefix", DIFFUSERS: "diffusers without prefix"}
_ODD_NAMES = {DIFFUSERS_FUSED: "with fused projections", SHORT: "without text_model."}
_DIALECT_OF_DOTTED = {NATIVE: "dotted native", DIFFUSERS: "diffusers names after diffusion_model."}


def _dialect(prefix: Prefix, target: Target, suffix: str) -> str:
    if target.naming == XLABS:
        return "XLabs"
    if target.naming == OLD_PROCESSOR or suffix.startswith("_lora"):
        return (
            "paper authors' (unet.unet.)"
            if prefix.text == "unet.unet."
            else "diffusers, old attention processors"
        )
    family = FAMILIES.get(target.base)
    if prefix.dialect == "kohya" and target.naming in (DIFFUSERS, DIFFUSERS_UNREAD) and family is not None:
        return "kohya with diffusers names"
    if prefix.dialect == "doubled unet prefix":
        return "paper authors' (unet.unet.)"
    if target.naming in (DIFFUSERS_FUSED, SHORT):
        return f"{prefix.dialect}, {_ODD_NAMES[target.naming]}"
    if prefix.dialect == "dotted":
        dialect = _DIALECT_OF_DOTTED.get(target.naming, target.naming)
        return dialect if prefix.text == "diffusion_model." else f"{dialect} ({prefix.text})"
    if prefix.dialect in ("bare", "diffusers") and suffix.startswith(".lora."):
        return "diffusers, lora.up keys"
    if prefix.dialect == "bare":
        return _DIALECT_OF_BARE.get(target.naming, target.naming)
    if prefix.dialect != "diffusers":
        return prefix.dialect
    if family is None:
        plain, naming = TEXT_ENCODERS[target.base].diffusers_is_read, ""
    else:
        in_diffusers = target.naming == DIFFUSERS or target.module.diffusers == (target.module.native,)
        own = prefix.text == f"{family.component}." and in_diffusers
        plain = own or not family.diffusers_is_read
        naming = target.naming
    return "diffusers PEFT" if plain else f"diffusers PEFT ({prefix.text}{naming})"


@cache
def _targets(network: Family | TextEncoder, separator: str) -> Mapping[str, Target]:
    """{module name as files write it: its place in the model} for one network and separator."""
    table: dict[str, Target] = {}
    for name, target in _names(network):
        written = name.replace(".", separator)
        if table.setdefault(written, target).layers != target.layers:
            raise AssertionError(f"{written} stands for both {table[written].layers} and {target.layers}")
    return table


def _names(network: Family | TextEncoder) -> Iterator[tuple[str, Target]]:
    if isinstance(network, TextEncoder):
        for encoder in (network, *(TEXT_ENCODERS[key] for key in network.also)):
            for module in encoder.modules:
                yield from _text_encoder_names(encoder.key, module)
        return
    for module in network.modules:
        yield from _module_names(network.key, module)
    for name, module, layers, naming in network.list_aliases():
        yield name, Target(network.key, module, layers, naming)


def _module_names(base: str, module: Module) -> Iterator[tuple[str, Target]]:
    yield module.native, Target(base, module, module.layers, NATIVE)
    naming = DIFFUSERS_UNREAD if module.unread else DIFFUSERS
    if len(module.diffusers) == 1:
        yield module.diffusers[0], Target(base, module, module.layers, naming, module.halves_swapped)
    else:
        for name, layer in zip(module.diffusers, module.layers, strict=True):
            yield name, Target(base, module, (layer,), naming)


def _text_encoder_names(encoder: str, module: Module) -> Iterator[tuple[str, Target]]:
    """A module's own name, its name since transformers 5.6, and both as diffusers wrote them before PEFT."""
    long = module.diffusers[0]
    short = long.removeprefix("text_model.")
    for name, naming in ((long, NATIVE), (short, SHORT))[: 1 if short == long else 2]:
        target = Target(encoder, module, module.layers, naming)
        yield name, target
        block, dot, projection = name.rpartition(".self_attn.")
        if dot:
            yield f"{block}.self_attn.to_{projection.removesuffix('_proj')}", target
