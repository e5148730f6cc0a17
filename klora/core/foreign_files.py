"""What a file is when it is not a LoRA for one of `families`, told by its keys, so that the error can say it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice

from klora.core.families import FAMILIES
from klora.core.families.base import Family

_BLOCKS = r"(^|\.|lora_unet_|lycoris_)blocks[._]\d+[._]"
_OTHER_BASES = tuple(
    (re.compile(pattern, re.MULTILINE), name)
    for pattern, name in (
        (r"(down_blocks[._]0|up_blocks[._]3)[._]attentions", "Stable Diffusion 1.x or 2.x"),
        (r"input_blocks[._][12][._]1[._]|output_blocks[._](9|10|11)[._]", "Stable Diffusion 1.x or 2.x"),
        (r"joint_transformer_blocks[._]\d|(^|[._])(double|single)_layers[._]\d", "AuraFlow (Pony V7)"),
        (r"(double|single)_stream_blocks[._]\d", "HiDream"),
        (r"distilled_guidance_layer[._]", "Chroma"),
        (r"diffusion_model[._]transformer_blocks[._]\d+[._](audio_)?attn1[._]", "LTX-Video"),
        (
            r"(^|lycoris_|base_model\.model\.|transformer[._])transformer_blocks[._]\d+[._]attn1[._]",
            "LTX-Video, PixArt or CogVideoX",
        ),
        (
            r"joint_blocks[._]\d|(^|lycoris_|transformer[._])transformer_blocks[._]\d+[._]attn2[._]",
            "Stable Diffusion 3",
        ),
        (r"transformer_blocks[._]\d+[._]img_m", "Qwen-Image"),
        (
            r"(img|txt)_mlp[._]fc[12]|(img|txt)_mod[._]linear|single_blocks[._]\d+[._]modulation[._]linear|token_refiner",
            "HunyuanVideo",
        ),
        (r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)", "HunyuanVideo"),
        (r"double_stream_modulation|to_qkv_mlp_proj|ff[._]linear_in", "FLUX.2"),
        (_BLOCKS + r"(self_attn|cross_attn)[._][qkv]_proj", "Anima or Cosmos"),
        (_BLOCKS + r"((self_attn|cross_attn)[._]|attn1[._]to_)", "Wan"),
        (_BLOCKS + r"attn[._](w[qkvo]|gate)[._]", "Krea 2"),
        (r"(^|[._])layers[._]\d+[._](attention|feed_forward)[._]", "Lumina or Z-Image"),
        (r"(^|[._])layers[._]\d+[._]self_attention[._]", "Ernie-Image"),
        (r"adaln_single|caption_projection", "PixArt or LTX"),
        (r"lora_prior_unet", "Stable Cascade"),
    )
)
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
            "is a part of a training state of sd-scripts: choose the LoRA that was saved beside that state",
        ),
        (
            r"((_attn\.qkv|\.linear1)\.[0-3]|^(clip_[lg]\.text_model|t5\.encoder)\..+)\.(lora_|alpha$|lokr_|hada_)",
            "is OneTrainer's internal copy of a LoRA, in names that no WebUI knows: choose the LoRA that OneTrainer saved at its output path",
        ),
    )
)
"""Adapters that are certain by one key, whatever else is in the file."""

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
    """The base model, none of `FAMILIES`, that a LoRA with these keys was made for; None if no key tells."""
    lines = _lines(keys)
    name = _first(_OTHER_BASES, lines) or _by_number_of_blocks(lines)
    ours = {family.name for family in FAMILIES.values()}
    return None if name is None or not ours.isdisjoint(re.split(", | or ", name)) else name


def _by_number_of_blocks(lines: str) -> str | None:
    """By a block that FLUX.1 (19 double, 38 single blocks) does not have, under a name that it has too."""
    last = dict.fromkeys(("double_blocks", "single_blocks", "transformer_blocks"), -1)
    for name, number in _NUMBERED.findall(lines):
        name = name.replace("single_transformer", "single")
        last[name] = max(last[name], int(number[:6]))
    double, single, blocks = last.values()
    if double >= 19 or (blocks == 19 and single >= 0) or (single >= 38 and max(double, blocks) >= 8):
        return "HunyuanVideo"
    if single >= 38:
        return "FLUX.2" if single >= 40 else "FLUX.2 or HunyuanVideo"
    if blocks >= 38:
        return "Qwen-Image"
    return "Stable Diffusion 3.5 or another transformer" if blocks >= 19 else None


def other_base_by_metadata(family: Family, metadata: Mapping[str, str]) -> str | None:
    """The base model that the header of a LoRA with the names of `family` gives, where it is known as another one of these names."""
    given = (metadata.get(key, "").lower() for key in ("modelspec.architecture", "ss_base_model_version"))
    told = (name for text in given for pattern, name in family.namesakes if re.search(pattern, text))
    return next(told, None)


def foreign_lora(keys: Iterable[str]) -> str | None:
    """What a LoRA-like file is that neither K-LoRA nor a WebUI's LoRA loader takes, with the way out; None if no key tells."""
    return _first(_FOREIGN_LORAS, _lines(keys))


def multiplies(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is an OFT, BOFT or IA3 network, which multiplies weights and adds nothing."""
    return _MULTIPLIES.search(_lines(keys)) is not None


def looks_like_lora(keys: Iterable[str]) -> bool:
    """Whether these are keys of a LoRA of some kind, for whatever model."""
    return _LORA.search(_lines(keys)) is not None


def not_a_lora(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, none of which is a LoRA's; None if no key tells."""
    return _first(_NOT_LORAS, _lines(keys))


LONGEST_KEY = 500
MOST_KEYS = 20_000
"""No trainer writes keys half as long, nor half as many; what comes after tells nothing."""


def _lines(keys: Iterable[str]) -> str:
    return "\n".join(key[:LONGEST_KEY] for key in islice(keys, MOST_KEYS))


def _first(table: tuple[tuple[re.Pattern[str], str], ...], lines: str) -> str | None:
    return next((name for pattern, name in table if pattern.search(lines)), None)
