"""What a file is when it is not a LoRA for SDXL or FLUX.1, told by its keys, so that the error can say it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

_OTHER_BASES = tuple(
    (re.compile(pattern, re.MULTILINE), name)
    for pattern, name in (
        (r"(down_blocks[._]0|up_blocks[._]3)[._]attentions", "Stable Diffusion 1.x or 2.x"),
        (r"input_blocks[._][12][._]1[._]|output_blocks[._](9|10|11)[._]", "Stable Diffusion 1.x or 2.x"),
        (
            r"joint_blocks[._]\d|(^|lycoris_|transformer[._])transformer_blocks[._]\d+[._]attn2[._]",
            "Stable Diffusion 3",
        ),
        (r"transformer_blocks[._]\d+[._]img_m", "Qwen-Image"),
        (
            r"(?<!single_)transformer_blocks[._](19|[2-9]\d)[._]",
            "Stable Diffusion 3.5 or another transformer",
        ),
        (
            r"single_(transformer_)?blocks[._](3[89]|4\d)[._]|double_stream_modulation|to_qkv_mlp_proj|ff[._]linear_in",
            "FLUX.2",
        ),
        (r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)", "HunyuanVideo"),
        (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn)[._]", "Wan"),
        (r"(^|[._])layers[._]\d+[._](attention|feed_forward)[._]", "Lumina or Z-Image"),
        (r"adaln_single|caption_projection", "PixArt or LTX"),
        (r"lora_prior_unet", "Stable Cascade"),
    )
)

_NOT_LORAS = tuple(
    (re.compile(pattern, re.MULTILINE), name)
    for pattern, name in (
        (r"emb_params|string_to_param|^clip_[lg]$|^<", "a textual inversion embedding"),
        (
            r"[._]oft_|^oft_|\.(oft|boft)_|\.on_input$",
            "an OFT, BOFT or IA3 network, which multiplies weights",
        ),
        (r"control_model|^controlnet|lora_controlnet|^control_", "a ControlNet"),
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
    """The base model, neither SDXL nor FLUX.1, that a LoRA with these keys was made for; None if no key tells."""
    return _first(_OTHER_BASES, keys)


def not_a_lora(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, none of which is a LoRA's; None if no key tells."""
    return _first(_NOT_LORAS, keys)


LONGEST_KEY = 500
MOST_KEYS = 20_000
"""No trainer writes keys half as long, nor half as many; what comes after tells nothing."""


def _first(table: tuple[tuple[re.Pattern[str], str], ...], keys: Iterable[str]) -> str | None:
    lines = "\n".join(key[:LONGEST_KEY] for key in islice(keys, MOST_KEYS))
    return next((name for pattern, name in table if pattern.search(lines)), None)
