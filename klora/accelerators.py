"""Recognises by name the LoRAs that make a model need few steps, which are neither a subject nor a style."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from klora.core.families import FAMILIES

AMBIGUOUS = frozenset(("lightning", "turbo", "flash", "hyper", "schnell", "distill"))
"""Words that can also name characters, cars and styles."""

ACCELERATORS = (
    "lcm",
    "lightning",
    "hyper",
    "hypersd",
    "hyperflux",
    "turbo",
    "flash",
    "schnell",
    "dmd",
    "tcd",
    "tdd",
    "pcm",
    "perflow",
    "distill",
    "distillpatch",
    "training adapter",
    "rcm",
    "r cm",
    "lightx2v",
    "causvid",
    "caus vid",
    "accvid",
    "acc vid",
    "acc video",
    "fastwan",
    "fast wan",
    "self forcing",
    "step distill",
    "fusionx",
    "fusion x",
)
"""Words in the name of an accelerator or of its file."""

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_]+")
_LORA = re.compile("lora", re.IGNORECASE)
_STEPS = ("step", "steps")
_MODELS = {word for family in FAMILIES.values() for word in family.words}
_CHECKPOINTS = [
    (name.split(), family.words[0]) for family in FAMILIES.values() for name in family.accelerated_names
]
_VERSIONS = {"v", "version", "alpha", "beta"}
_COUNTED = {"rank", "r", "dim", "fp", "bf"}
_NEUTRAL = {
    *AMBIGUOUS, "lora", "loras", "weights", "unet", "model", "adapter", "base", "to", "cfg", "converted",
    "patch", "image", "edit", "comfyui", "diffusers", "pytorch", "safetensors", "ckpt", "pt", "b", "heun",
    "low", "step", "steps",
}  # fmt: skip


def is_accelerator(name: str, words: Sequence[str] = ACCELERATORS) -> bool:
    """Whether the name of a LoRA contains one of these words.

    Only whole words count, in upper or lower case: "hyper" is not in "hyperrealism". A word in `AMBIGUOUS`
    counts only if the name has a number of steps, or otherwise says nothing but a base model, a version or a
    rank: "sdxl_lightning_4step" and "FLUX.1-Turbo-Alpha", but not "porsche_911_turbo". In the name of a
    checkpoint, such as Z-Image-Turbo, it does not count.

    Args:
        words: each may have several parts, such as "dmd" or "my words".
    """
    parts = _parts(name)
    told = _without_checkpoints(parts)
    found = [
        wanted
        for word in words
        if (wanted := _parts(word)) and _holds(parts if len(wanted) > 1 else told, wanted)
    ]
    return any(len(word) > 1 or word[0] not in AMBIGUOUS for word in found) or (
        bool(found) and (_says_steps(told) or _is_technical(told))
    )


def _parts(name: str) -> list[str]:
    """The words and numbers of a name, in lower case; a capital or a digit begins a new one."""
    return [word.lower() for word in _WORD.findall(_LORA.sub("_lora_", name))]


def _holds(parts: list[str], wanted: list[str]) -> bool:
    return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts)))


def _without_checkpoints(parts: list[str]) -> list[str]:
    """The words of a name, with its family's first word in place of a checkpoint's name."""
    for name, word in _CHECKPOINTS:
        for start in reversed(range(len(parts) - len(name) + 1)):
            if parts[start : start + len(name)] == name:
                parts = [*parts[:start], word, *parts[start + len(name) :]]
    return parts


def _says_steps(parts: list[str]) -> bool:
    return any(number.isdigit() and word in _STEPS for number, word in pairwise(parts))


def _is_technical(parts: list[str]) -> bool:
    """Whether a name says a model, a version or a rank, and has no word of its own."""
    telling = _MODELS | _VERSIONS | _COUNTED
    known = _NEUTRAL | telling
    before = ["", *parts]
    return not telling.isdisjoint(parts) and all(
        part in known or (part.isdigit() and (len(part) < 3 or previous in _COUNTED))
        for previous, part in zip(before, parts, strict=False)
    )
