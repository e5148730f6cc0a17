"""The key dialects of LoRA files, as tables: which trainer's key stands for which tensor of which layer.

A key is <prefix><module><suffix>. The suffix names the role of the tensor, the prefix the network, and the module is
looked up in tables made from the topology, so that a name with underscores has one meaning and no dot is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from types import MappingProxyType

from klora.core import topology
from klora.core.adapters import ADAPTERS, dora
from klora.core.topology import Module

DENOISER = "denoiser"
NATIVE, DIFFUSERS, OLD_PROCESSOR, XLABS = "native", "diffusers", "old processor", "XLabs"
DIFFUSERS_FUSED, SHORT = "diffusers, fused", "without text_model"


@dataclass(frozen=True)
class Target:
    """The place in the model that a module name of a file stands for.

    Attributes:
        base: "sdxl", "flux", or the text encoder "te1", "te2", "t5".
        module: the module of the topology.
        layers: the canonical layers whose rows the file's matrix holds, top first: all or some of the module's.
        naming: the naming convention that matched, one of NATIVE, DIFFUSERS, DIFFUSERS_FUSED, OLD_PROCESSOR, XLABS, SHORT.
        halves_swapped: the file has the two halves of the rows in diffusers' order, the layer in the native one.
    """

    base: str
    module: Module
    layers: tuple[str, ...]
    naming: str
    halves_swapped: bool = False


@dataclass(frozen=True)
class Prefix:
    """How a dialect opens its keys: `text`, the separator inside module names, the network, and what it tells."""

    text: str
    separator: str
    network: str
    dialect: str


_PREFIXES = (
    Prefix("lora_unet_", "_", DENOISER, "kohya"),
    Prefix("lora_transformer_", "_", DENOISER, "OneTrainer"),
    Prefix("lycoris_", "_", DENOISER, "SimpleTuner LyCORIS"),
    Prefix("lora_te1_", "_", "te1", "kohya"),
    Prefix("lora_te2_", "_", "te2", "kohya"),
    Prefix("lora_te3_", "_", "t5", "kohya"),
    Prefix("lora_te_", "_", "te1", "kohya"),
    Prefix("text_encoders.clip_l.transformer.", ".", "te1", "ComfyUI"),
    Prefix("text_encoders.clip_g.transformer.", ".", "te2", "ComfyUI"),
    Prefix("text_encoders.t5xxl.transformer.", ".", "t5", "ComfyUI"),
    Prefix("conditioner.embedders.0.transformer.", ".", "te1", "dotted native"),
    Prefix("text_encoder.", ".", "te1", "diffusers"),
    Prefix("text_encoder_2.", ".", "te2", "diffusers"),
    Prefix("text_encoder_3.", ".", "t5", "diffusers"),
    Prefix("base_model.model.transformer.", ".", DENOISER, "raw PEFT"),
    Prefix("base_model.model.diffusion_model.", ".", DENOISER, "raw PEFT"),
    Prefix("base_model.model.unet.", ".", DENOISER, "raw PEFT"),
    Prefix("base_model.model.", ".", DENOISER, "raw PEFT"),
    Prefix("model.diffusion_model.", ".", DENOISER, "dotted"),
    Prefix("diffusion_model.", ".", DENOISER, "dotted"),
    Prefix("unet.unet.", ".", DENOISER, "doubled unet prefix"),
    Prefix("unet.", ".", DENOISER, "diffusers"),
    Prefix("transformer.", ".", DENOISER, "diffusers"),
    Prefix("", ".", DENOISER, "bare"),
)

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
    """A key of a LoRA file, understood.

    Attributes:
        target: where it goes.
        role: which tensor of the module it is, a value of `SUFFIXES`.
        dialect: what to call the file that has it.
        path: the module's name as the file writes it, without prefix and suffix.
        stem: the key as the file has it, without suffix and adapter name.
        adapter: the name that PEFT gave the adapter, where the key has it.
    """

    target: Target
    role: str
    dialect: str
    path: str
    stem: str
    adapter: str = ""


def parse_key(key: str) -> ParsedKey | None:
    """The meaning of `key`, None if no dialect has it."""
    named = _ADAPTER_NAME.search(key)
    adapter = named[2] if named else ""
    plain = _ADAPTER_NAME.sub(r"\1", key) if named else key
    for suffix in _SUFFIXES_BY_LAST_PART.get(plain.rpartition(".")[2], ()):
        if not plain.endswith(suffix):
            continue
        stem = plain[: -len(suffix)]
        name, accident = _without_accident(stem)
        for prefix in _PREFIXES:
            if name.startswith(prefix.text):
                path = name[len(prefix.text) :]
                target = _targets(prefix.network, prefix.separator).get(path)
                if target is not None:
                    dialect = _dialect(prefix, target, suffix)
                    if accident:
                        dialect = f"{dialect} ({accident})"
                    elif adapter and prefix.dialect != "raw PEFT":
                        dialect = f"{dialect} (adapter names)"
                    return ParsedKey(target, SUFFIXES[suffix], dialect, path, stem, adapter)
    return None


def foreign_prefix(keys: Iterable[str]) -> str | None:
    """What most of these keys open with, if they would be understood without it."""
    some = list(islice(keys, MOST_LOOKED_AT))
    for key in some[:3]:
        for end in (cut.end() for cut in islice(re.finditer(r"[._]", key), 8)):
            prefix = key[:end]
            if sum(key.startswith(prefix) and _is_in_a_block(key[end:]) for key in some) > len(some) / 2:
                return prefix
    return None


def _is_in_a_block(key: str) -> bool:
    """Whether a key is understood, and by more than a name such as `conv_in`, which networks of all sorts have."""
    meaning = parse_key(key)
    return meaning is not None and any(map(str.isdigit, meaning.path))


MOST_LOOKED_AT = 500


def _without_accident(stem: str) -> tuple[str, str]:
    """A key without what got into it by accident and means nothing, and what that was ("" for nothing).

    `_orig_mod` is torch.compile's, which some trainers save; `base_model.model.` stands twice where PEFT wrapped a model twice;
    `lora_unet__` is written where a module's name begins with a dot.
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
    if prefix.dialect == "kohya" and target.naming == DIFFUSERS and target.base in ("sdxl", "flux"):
        return "kohya with diffusers names"
    if prefix.dialect == "doubled unet prefix":
        return "paper authors' (unet.unet.)"
    if target.naming in (DIFFUSERS_FUSED, SHORT):
        return f"{prefix.dialect}, {_ODD_NAMES[target.naming]}"
    if prefix.dialect == "dotted":
        return _DIALECT_OF_DOTTED[target.naming]
    if prefix.dialect in ("bare", "diffusers") and suffix.startswith(".lora."):
        return "diffusers, lora.up keys"
    if prefix.dialect == "bare":
        return _DIALECT_OF_BARE[target.naming]
    if prefix.dialect != "diffusers":
        return prefix.dialect
    if target.base == "t5" or (
        target.base == "flux" and (prefix.text, target.naming) != ("transformer.", DIFFUSERS)
    ):
        return f"diffusers PEFT ({prefix.text}{'' if target.base == 't5' else target.naming})"
    return "diffusers PEFT"


@cache
def _targets(network: str, separator: str) -> Mapping[str, Target]:
    """{module name as files write it: where it goes} for one network and separator."""
    table: dict[str, Target] = {}
    for name, target in _names(network):
        written = name.replace(".", separator)
        if table.setdefault(written, target).layers != target.layers:
            raise AssertionError(f"{written} stands for both {table[written].layers} and {target.layers}")
    return table


def _names(network: str) -> Iterator[tuple[str, Target]]:
    if network == DENOISER:
        for module in topology.sdxl_modules():
            yield from _module_names("sdxl", module)
            yield from _sdxl_aliases(module)
        for module in topology.flux_modules():
            yield from _module_names("flux", module)
        yield from _flux_aliases()
        return
    # Forge reads T5 under lora_te1_, lora_te2_ and lora_te3_; diffusers calls FLUX's T5 text_encoder_2.
    for encoder in (network, "t5") if network != "t5" else ("t5",):
        for module in topology.text_encoder_modules(encoder):
            yield from _text_encoder_names(encoder, module)


def _module_names(base: str, module: Module) -> Iterator[tuple[str, Target]]:
    yield module.native, Target(base, module, module.layers, NATIVE)
    if module.pieces:
        for name, layer in zip(module.diffusers, module.layers, strict=True):
            yield name, Target(base, module, (layer,), DIFFUSERS)
    else:
        yield module.diffusers[0], Target(base, module, module.layers, DIFFUSERS, module.halves_swapped)


def _sdxl_aliases(module: Module) -> Iterator[tuple[str, Target]]:
    """Attention as diffusers wrote it before PEFT: `attn1.processor.to_q_lora.up.weight`, `attn1.to_out_lora…`."""
    for name, naming in ((module.diffusers[0], DIFFUSERS), (module.native, NATIVE)):
        block, dot, projection = name.rpartition(".to_")
        if not dot:
            continue
        short = projection.removesuffix(".0")
        yield f"{block}.processor.to_{short}", Target("sdxl", module, module.layers, OLD_PROCESSOR)
        if short != projection:
            yield f"{block}.to_{short}", Target("sdxl", module, module.layers, naming)


def _flux_aliases() -> Iterator[tuple[str, Target]]:
    """XLabs' processors (XLabs-AI/x-flux) and diffusers' own fused projections (`fuse_qkv_projections`)."""
    for module in topology.flux_modules():
        block, _, end = module.native.partition("_attn.")
        block = block.removesuffix(".img").removesuffix(".txt")
        number = "1" if ".img_attn" in module.native else "2"
        attention = module.diffusers[0].rpartition(".")[0]
        if end == "qkv":
            yield f"{block}.processor.qkv_lora{number}", Target("flux", module, module.layers, XLABS)
            fused = "to_qkv" if number == "1" else "to_added_qkv"
            yield f"{attention}.{fused}", Target("flux", module, module.layers, DIFFUSERS_FUSED)
        elif end == "proj":
            yield f"{block}.processor.proj_lora{number}", Target("flux", module, module.layers, XLABS)
        elif module.native.endswith(".linear1"):
            block = module.native.removesuffix(".linear1")
            yield f"{block}.processor.qkv", Target("flux", module, module.layers[:3], XLABS)
            yield f"{attention}.to_qkv", Target("flux", module, module.layers[:3], DIFFUSERS_FUSED)
        elif module.native.endswith(".linear2"):
            block = module.native.removesuffix(".linear2")
            yield f"{block}.processor.proj", Target("flux", module, module.layers, XLABS)


def _text_encoder_names(encoder: str, module: Module) -> Iterator[tuple[str, Target]]:
    """A module's own name, the one that transformers 5.6 and later give it, and both as diffusers wrote them before PEFT."""
    long = module.diffusers[0]
    short = long.removeprefix("text_model.")
    for name, naming in ((long, NATIVE), (short, SHORT))[: 1 if short == long else 2]:
        target = Target(encoder, module, module.layers, naming)
        yield name, target
        block, dot, projection = name.rpartition(".self_attn.")
        if dot:
            yield f"{block}.self_attn.to_{projection.removesuffix('_proj')}", target
