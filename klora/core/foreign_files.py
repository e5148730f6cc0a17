"""What a file is if it is not a LoRA for one of `FAMILIES`, found from its keys, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from klora.core.families import FAMILIES
from klora.core.families.base import Family

_OTHER_BASES = tuple(
    (re.compile(pattern, re.MULTILINE), name)
    for pattern, name in (
        (r"joint_transformer_blocks[._]\d|(^|[._])(double|single)_layers[._]\d", "AuraFlow (Pony V7)"),
        (r"(double|single)_stream_blocks[._]\d", "HiDream"),
        (r"diffusion_model[._]transformer_blocks[._]\d+[._](audio_)?attn1[._]", "LTX-Video"),
        (r"joint_blocks[._]\d", "Stable Diffusion 3"),
        (
            r"(^|[._])transformer_blocks[._](19|[2-9]\d)[._](ff|norm1)_context[._]",
            "Stable Diffusion 3.5 or another transformer",
        ),
        (
            r"(img|txt)_mlp[._]fc[12]|(img|txt)_mod[._]linear"
            r"|single_blocks[._]\d+[._]modulation[._]linear|token_refiner",
            "HunyuanVideo",
        ),
        (r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)", "HunyuanVideo"),
        (
            r"clip_text_pooled_proj|(^|\.|lora_unet_|lycoris_)layers[._]3[0-5][._](attention|feed_forward)[._]",
            "NewBie",
        ),
        (r"(^|\.|lora_unet_|lycoris_)ref_image_refiner[._]", "OmniGen2"),
        (r"adaln_single|caption_projection", "PixArt or LTX"),
        (r"lora_prior_unet", "Stable Cascade"),
    )
)
_BLOCK = r"(^|lora_unet_|lycoris_|base_model\.model\.|transformer[._])transformer_blocks[._]\d+[._]"
_OTHER_BASES_WITHOUT = tuple(
    (re.compile(pattern, re.MULTILINE), re.compile(lacking, re.MULTILINE), name)
    for pattern, lacking, name in (
        (_BLOCK + r"attn1[._]", _BLOCK + r"attn2[._]to_[kv][._]", "LTX-Video, PixArt or CogVideoX"),
        (_BLOCK + r"attn2[._]", _BLOCK + r"attn1[._]", "Stable Diffusion 3"),
    )
)
"""(a key of the model, a key that it lacks, its name).

A text's keys and values beside `attn1` may be Anima's in diffusers' names: sizes tell it from LTX-Video.
"""

_NUMBERED = re.compile(
    r"(?:^|[._])(double_blocks|single_blocks|single_transformer_blocks|transformer_blocks)[._](\d+)[._]",
    re.MULTILINE,
)
_FOREIGN_LORAS = tuple(
    (re.compile(pattern, re.MULTILINE), sentence)
    for pattern, sentence in (
        (r"^lllite_", "is a ControlNet-LLLite: choose a LoRA file"),
        (r"^lora_controlnet$", "is a Control-LoRA, which ControlNet uses: choose a LoRA file"),
        (
            r"\.(qkv_proj|out_proj|mlp_fc[12]|mlp_context_fc[12])\.lora_(down|up)$",
            "is a FLUX LoRA converted for Nunchaku: choose the LoRA that it was made from",
        ),
        (
            r"\.lora_(down|up)\.\d+\.weight$",
            "is part of a training state of sd-scripts: choose the LoRA that was saved beside that state",
        ),
        (
            r"((_attn\.qkv|\.linear1)\.[0-3]|^(clip_[lg]\.text_model|t5\.encoder)\..+)\.(lora_|alpha$|lokr_|hada_)",
            "is OneTrainer's internal copy of a LoRA, with key names that no WebUI knows: "
            "choose the LoRA that OneTrainer saved at its output path",
        ),
    )
)
"""Adapters that a single key gives away, whatever else is in the file."""

_MULTIPLIES = re.compile(r"[._]oft_|^oft_|\.(oft|boft)_|\.on_input$", re.MULTILINE)
_LORA = re.compile(r"lora[._\d]|lokr_|hada_|\.(alpha|diff|diff_b|dora_scale)$", re.MULTILINE)
_NOT_LORAS = tuple(
    (re.compile(pattern, re.MULTILINE), name)
    for pattern, name in (
        (r"emb_params|string_to_param|^clip_[lg]$|^<", "a textual inversion embedding"),
        (r"control_model|^controlnet|^control_", "a ControlNet"),
        (
            r"first_stage_model|^model\.diffusion_model\.|^model\.double_blocks|^conditioner\.",
            "a whole checkpoint",
        ),
        (r"^(encoder|decoder)\.(down|up|mid|conv_in)", "a VAE"),
        (r"^(text_model|encoder)\.", "a text encoder"),
        (r"\.(weight|bias|scale)$", "a model's weights"),
    )
)


def other_base(keys: Iterable[str]) -> str | None:
    """The base model outside `FAMILIES` that a LoRA with these keys was made for; None if no key shows it."""
    lines = _lines(keys)
    name = _first(_OTHER_BASES, lines) or _by_what_is_missing(lines) or _by_number_of_blocks(lines)
    ours = {family.name for family in FAMILIES.values()}
    return None if name is None or not ours.isdisjoint(re.split(", | or ", name)) else name


def _by_what_is_missing(lines: str) -> str | None:
    found = (
        name
        for pattern, lacking, name in _OTHER_BASES_WITHOUT
        if pattern.search(lines) and not lacking.search(lines)
    )
    return next(found, None)


def _by_number_of_blocks(lines: str) -> str | None:
    """The base model with FLUX.1's block names but more blocks than its 19 double and 38 single ones."""
    last = dict.fromkeys(("double_blocks", "single_blocks", "transformer_blocks"), -1)
    for name, number in _NUMBERED.findall(lines):
        name = name.replace("single_transformer", "single")
        last[name] = max(last[name], int(number[:6]))
    double, single, blocks = last.values()
    if double >= 19 or (blocks == 19 and single >= 0) or (single >= 38 and max(double, blocks) >= 8):
        return "HunyuanVideo"
    if single >= 38:
        return "FLUX.2 dev" if single >= 40 else "FLUX.2 dev or HunyuanVideo"
    return None


def other_base_by_metadata(family: Family, metadata: Mapping[str, str]) -> str | None:
    """The other base model that a header names, for a LoRA with the keys of `family`; None if it names none.

    Some models give their modules the same names (`Family.namesakes`), so only the header shows the
    difference.
    """
    given = (metadata.get(key, "").lower() for key in ("modelspec.architecture", "ss_base_model_version"))
    found = (name for text in given for pattern, name in family.namesakes if re.search(pattern, text))
    return next(found, None)


def named_in_header(families: Sequence[Family], metadata: Mapping[str, str]) -> Family:
    """The one of these families that a LoRA's header names, the first if it names none of them."""
    told = other_base_by_metadata(families[0], metadata)
    return next((family for family in families if told and family.name.startswith(told)), families[0])


def foreign_lora(keys: Iterable[str]) -> str | None:
    """What a file is that looks like a LoRA but is accepted by no LoRA loader, and what to choose instead.

    Returns:
        A predicate such as "is a ControlNet-LLLite: choose a LoRA file", or None if no key shows one.
    """
    return _first(_FOREIGN_LORAS, _lines(keys))


def multiplies(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is an OFT, BOFT or IA3 network, which multiplies weights."""
    return _MULTIPLIES.search(_lines(keys)) is not None


def looks_like_lora(keys: Iterable[str]) -> bool:
    """Whether these are the keys of some kind of LoRA, whatever model it is for."""
    return _LORA.search(_lines(keys)) is not None


def not_a_lora(keys: Iterable[str]) -> str | None:
    """What a file is that has these keys and is not a LoRA, such as "a VAE"; None if no key shows it."""
    return _first(_NOT_LORAS, _lines(keys))


LONGEST_KEY = 500
MOST_KEYS = 20_000
"""More than twice what any trainer writes; whatever lies beyond is ignored."""


def _lines(keys: Iterable[str]) -> str:
    return "\n".join(key[:LONGEST_KEY] for key in islice(keys, MOST_KEYS))


def _first(table: tuple[tuple[re.Pattern[str], str], ...], lines: str) -> str | None:
    return next((name for pattern, name in table if pattern.search(lines)), None)
