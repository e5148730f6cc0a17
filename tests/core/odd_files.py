"""Safetensors files that no trainer writes, made by hypothesis, and a reader that reads all of them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from klora.core.key_names import SUFFIXES
from klora.core.lora_file import read_lora
from klora.core.rewrite import rewrite
from klora.core.scores import profile_file, score_pair

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}
STEMS = (
    "lora_unet_middle_block_1_proj_in",
    "unet.mid_block.attentions.0.proj_in",
    "lora_unet_input_blocks_7_0_in_layers_2",
    "lora_unet_middle_block_1_norm",
    "lora_unet_time_embed_0",
    "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_0_linear1",
    "transformer.single_transformer_blocks.0.proj_mlp",
    "transformer.norm_out.linear",
    "double_blocks.0.processor.qkv_lora1",
    "single_blocks.3.processor.proj_lora1",
    "base_model.model.unet.mid_block.attentions.0.proj_out",
)
KINDS: tuple[Mapping[str, tuple[Any, ...]], ...] = (
    {"up": ("o", "r"), "down": ("r", "i"), "alpha": ()},
    {"up": ("o", "r", 1, 1), "down": ("r", "i", 3, 3), "dora_scale": ("o", 1)},
    {"up": ("o", "r"), "mid": ("r", "r", 3, 3), "down": ("r", "i")},
    {"up": ("o", "r"), "down": ("r", "i"), "peft_magnitude": ("o",), "up_bias": ("o",)},
    {"hada_w1_a": ("o", "r"), "hada_w1_b": ("r", "i"),
     "hada_w2_a": ("o", "r"), "hada_w2_b": ("r", "i"), "alpha": ()},
    {"hada_w1_a": ("r", "o"), "hada_w1_b": ("r", "i"), "hada_t1": ("r", "r", 3, 3),
     "hada_w2_a": ("r", "o"), "hada_w2_b": ("r", "i"), "hada_t2": ("r", "r", 3, 3)},
    {"lokr_w1": (2, 2), "lokr_w2_a": ("o", "r"), "lokr_w2_b": ("r", "i"), "alpha": ()},
    {"lokr_w1_a": ("o", "r"), "lokr_w1_b": ("r", "i"), "lokr_w2": ("o", "i", 3, 3)},
    {"lokr_w1": (2, 2), "lokr_w2_a": ("r", "o"), "lokr_w2_b": ("r", "i"), "lokr_t2": ("r", "r", 3, 3)},
    {"a1": ("i", "r"), "a2": ("r", "i"), "b1": ("o", "r"), "b2": ("r", "i")},
    {"diff": ("o", "i"), "diff_b": ("o",)},
    {"w_norm": ("o",), "b_norm": ("o",)},
    {"diff": ("o",)},
)  # fmt: skip
SUFFIX_OF = {role: [suffix for suffix, of in SUFFIXES.items() if of == role] for role in SUFFIXES.values()}

sizes = st.integers(0, 9) | st.sampled_from([16, 21, 300])
odd_sizes = (
    sizes
    | st.sampled_from([-1, 1 << 20, 1 << 31, 1 << 63, 1 << 64])
    | st.sampled_from([1.5, 1e400, math.nan, "7", None, True])
)
dtypes = st.sampled_from(["F32"] * 6 + ["F16", "BF16", "F8_E4M3", "F8_E5M2"]) | st.sampled_from(
    [*SIZES, "F4", "X"]
)
fillings = st.sampled_from(["zero", "one", "mixed", "mixed", "large", "tiny", "nan", "infinite", "bytes"])


@st.composite
def modules(draw: st.DrawFn) -> dict[str, list[Any]]:
    """{key: shape} of one module whose tensors fit each other but for a change or two."""
    stem, kind = draw(st.sampled_from(STEMS)), draw(st.sampled_from(KINDS))
    size = {
        "o": draw(st.sampled_from([4, 6, 8, 21])),
        "i": draw(st.sampled_from([3, 4, 8])),
        "r": draw(st.sampled_from([1, 2, 30])),
    }
    shapes = {role: [size.get(n, n) for n in shape] for role, shape in kind.items()}
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        role = draw(st.sampled_from(sorted(shapes)))
        shapes[role] = draw(
            st.sampled_from([[*shapes[role], 1], shapes[role][1:], shapes[role][::-1]])
            | st.lists(sizes, max_size=5)
        )
        if draw(st.booleans()):
            shapes[draw(st.sampled_from(sorted(SUFFIX_OF)))] = draw(st.lists(sizes, max_size=4))
    return {stem + draw(st.sampled_from(SUFFIX_OF[role])): shape for role, shape in shapes.items()}


adapter_settings = st.dictionaries(
    st.sampled_from(
        [
            "unet.lora_alpha",
            "unet.alpha_pattern",
            "unet.use_rslora",
            "transformer.lora_alpha",
            "r",
            "lora_alpha",
        ]
    ),
    st.none()
    | st.integers()
    | st.floats()
    | st.text()
    | st.dictionaries(st.sampled_from(["proj_in", "^x$", "(a+)+$"]), st.floats() | st.text()),
)
metadata = st.fixed_dictionaries({"lora_adapter_metadata": adapter_settings.map(json.dumps) | st.text()})
FAULTS = ("none",) * 14 + ("other entry", "other key", "no metadata", "length", "cut")


@st.composite
def odd_files(draw: st.DrawFn) -> bytes:
    """The bytes of a .safetensors file: most of it right, some of it wrong in one of many ways."""
    shapes: dict[str, list[Any]] = {}
    for module in draw(st.lists(modules(), min_size=1, max_size=3)):
        shapes.update(module)
    fault = draw(st.sampled_from(FAULTS))
    if fault == "other key":
        shapes.update(
            draw(st.dictionaries(st.text(max_size=20), st.lists(odd_sizes, max_size=4), max_size=1))
        )
    dtype, filling = draw(dtypes), draw(fillings)
    header: dict[str, Any] = {}
    tensors = bytearray()
    for key, shape in shapes.items():
        dtype = draw(dtypes) if draw(st.integers(0, 9)) == 0 else dtype
        whole = min(math.prod(shape), 40_000) if all(type(n) is int and 0 <= n < 1000 for n in shape) else 4
        end = len(tensors) + whole * SIZES.get(dtype, 1)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(tensors), end]}
        tensors += filled(filling, dtype, end - len(tensors))
    if fault == "other entry":
        some_sizes = st.lists(odd_sizes, max_size=3)
        header[draw(st.sampled_from(sorted(header)))] = draw(
            st.fixed_dictionaries({"dtype": dtypes, "shape": some_sizes, "data_offsets": some_sizes})
            | st.none()
            | st.text()
            | st.lists(st.integers())
            | st.dictionaries(st.text(), st.integers())
        )
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.integers() | st.text() if fault == "no metadata" else metadata)
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    length = (
        draw(st.sampled_from([len(text) - 1, len(text) + 1, 0, 1 << 63])) if fault == "length" else len(text)
    )
    content = struct.pack("<Q", length) + text + bytes(tensors)
    return content[: draw(st.integers(0, len(content)))] if fault == "cut" else content


def filled(filling: str, dtype: str, size: int) -> bytes:
    """`size` bytes of numbers of one sort."""
    values = {
        "zero": [0.0],
        "one": [1.0],
        "mixed": [1.0, -0.5, 0.25],
        "large": [3e38],
        "tiny": [1e-45],
        "nan": [math.nan],
        "infinite": [math.inf],
    }
    if filling == "bytes" or dtype not in ("F64", "F32", "F16"):
        pattern = bytes({"zero": [0], "nan": [255]}.get(filling, [56, 62, 60]))
    else:
        code = {"F64": "d", "F32": "f", "F16": "e"}[dtype]
        limit = 6e4 if code == "e" else math.inf
        pattern = b"".join(
            struct.pack("<" + code, max(-limit, min(n, limit)) if math.isfinite(n) else n)
            for n in values[filling]
        )
    return (pattern * (size // len(pattern) + 1))[:size]


def ask_for_everything(path: Path) -> None:
    """All that the command line, a WebUI or diffusers may ask of a file.

    Raises:
        KLoraError: and nothing else, whatever the file holds.
    """
    lora = read_lora(path)
    with lora.open() as reader:
        for name in (*lora.layers, *lora.text_encoder_modules):
            reader(name), reader.magnitude(name), reader.bias(name), reader.input_factor(name)
        for name in lora.unscored:
            reader.norm(name)
    profile_file(lora, workers=1)
    rewrite(lora, path.with_suffix(".rewritten"))
    score_pair(lora, lora)
