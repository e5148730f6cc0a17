"""Z-Image (base and Turbo) and Lumina 2 (Lumina-Image 2.0, Neta Lumina, NetaYume): one network in two sizes.

The network is called NextDiT. Native names are those of Alpha-VLLM/Lumina-Image-2.0 (models/model.py).
ComfyUI and Forge Neo use them for both models (backend/nn/lumina.py). The other names are from diffusers,
which has different ones for the two models. Lumina 2 has 24 query heads and 8 key and value heads, so its
k and v have a third of the rows of its q. Z-Image has 30 heads of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from klora.core.families.base import DIFFUSERS, DIFFUSERS_FUSED, Alias, Block, Family, has_transformer
from klora.core.topology import LINEAR, NORM, Module

_QKV = ("q", "k", "v")


class _Build(NamedTuple):
    """What differs between the two.

    Attributes:
        layers: number of blocks after the refiners.
        modulation: name of the projection in a block's modulation.
        ends: {native: diffusers} of the modules around the blocks.
        in_block: {native: diffusers} inside a block with modulation, without q, k and v.
        in_context: {native: diffusers} where names differ in the context refiner, which has no modulation.
        attention: diffusers' name of the attention.
        square, widths: of `qkv`, see `Module`.
    """

    layers: int
    modulation: str
    ends: Mapping[str, str]
    in_block: Mapping[str, str]
    in_context: Mapping[str, str]
    attention: str
    square: int = 0
    widths: int | Fraction = 3


_FEED_FORWARD = {f"feed_forward.w{n}": f"feed_forward.w{n}" for n in (1, 2, 3)}
_NORMS = {name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")}
_Z_IMAGE = _Build(
    layers=30,
    modulation="adaLN_modulation.0",
    ends={
        "x_embedder": "all_x_embedder.2-1",
        "cap_embedder.0": "cap_embedder.0",
        "cap_embedder.1": "cap_embedder.1",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    in_block={
        "attention.out": "attention.to_out.0",
        "attention.q_norm": "attention.norm_q",
        "attention.k_norm": "attention.norm_k",
        **_FEED_FORWARD,
        **_NORMS,
        "adaLN_modulation.0": "adaLN_modulation.0",
    },
    in_context={},
    attention="attention",
)
_LUMINA_2 = _Build(
    layers=26,
    modulation="adaLN_modulation.1",
    ends={
        "x_embedder": "x_embedder",
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "final_layer.linear": "norm_out.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    },
    in_block={
        "attention.out": "attn.to_out.0",
        "attention.q_norm": "attn.norm_q",
        "attention.k_norm": "attn.norm_k",
        **{f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)},
        "attention_norm1": "norm1.norm",
        "attention_norm2": "norm2",
        "ffn_norm1": "ffn_norm1",
        "ffn_norm2": "ffn_norm2",
        "adaLN_modulation.1": "norm1.linear",
    },
    in_context={"attention_norm1": "norm1"},
    attention="attn",
    square=1,
    widths=Fraction(5, 3),
)


def _modules(build: _Build) -> Iterator[Module]:
    for native, diffusers in build.ends.items():
        yield Module(native, (diffusers,), NORM if native == "cap_embedder.0" else LINEAR)
    for part, count in (("context_refiner", 2), ("noise_refiner", 2), ("layers", build.layers)):
        for block in range(count):
            yield from _block(f"{part}.{block}", build)


def _block(path: str, build: _Build) -> Iterator[Module]:
    yield Module(
        f"{path}.attention.qkv",
        tuple(f"{path}.{build.attention}.to_{piece}" for piece in _QKV),
        pieces=_QKV,
        square=build.square,
        widths=build.widths,
    )
    is_context = path.startswith("context_refiner")
    for native, diffusers in {**build.in_block, **(build.in_context if is_context else {})}.items():
        if not (is_context and native == build.modulation):
            kind = NORM if "norm" in native else LINEAR
            yield Module(f"{path}.{native}", (f"{path}.{diffusers}",), kind)


def z_image_modules() -> Iterator[Module]:
    """All modules of Z-Image's transformer: 30 blocks after 2 of the noise and 2 of the context refiner."""
    return _modules(_Z_IMAGE)


def lumina_2_modules() -> Iterator[Module]:
    """All modules of Lumina 2's transformer: 26 blocks after 2 of the noise and 2 of the context refiner."""
    return _modules(_LUMINA_2)


def _aliases(family: Family, build: _Build) -> Iterator[Alias]:
    """diffusers' fused projection (`fuse_qkv_projections`), and Z-Image's names of attention for Lumina 2.

    The host's key map has the latter, so files may have them too.
    """
    for module in family.modules:
        block, dot, name = module.native.rpartition(".attention.")
        if not dot or name not in ("qkv", "out"):
            continue
        fused = name == "qkv"
        if fused:
            yield Alias(f"{block}.{build.attention}.to_qkv", module, module.layers, DIFFUSERS_FUSED)
        else:
            yield Alias(f"{block}.{build.attention}.to_out", module, module.layers, DIFFUSERS)
        if build.attention != "attention":
            names = [f"{block}.attention.to_{piece}" for piece in (_QKV if fused else ("out.0",))]
            for alias, layer in zip(names, module.layers, strict=True):
                yield Alias(alias, module, (layer,), DIFFUSERS)


_NAMES = {2304: "Lumina 2", 2520: "OmniGen2", 3840: "Z-Image"}
"""By width."""


def _by_size(name: str, rows: int, columns: int) -> str | None:
    """The model that has a layer of this size; None if both may have it.

    Its width shows it. In small checkpoints the heights of k, v and the feed-forward show it, as multiples of
    the width.
    """
    if name.endswith((":k", ":v")):
        if rows == columns:
            return "Z-Image"
        return "Lumina 2" if 3 * rows == columns else _NAMES.get(columns)
    if name.endswith((":q", ".attention.out")):
        return _NAMES.get(columns)
    if name.endswith((".w1", ".w2", ".w3")):
        width, inner = sorted((rows, columns))
        if inner == 4 * width:
            return "Lumina 2"
        return "Z-Image" if 3 * inner == 8 * width else _NAMES.get(width)
    if ".adaLN_modulation." in name:
        return _NAMES.get(rows if name.startswith("final_layer") else rows // 4)
    if name in ("x_embedder", "cap_embedder.1"):
        return _NAMES.get(rows)
    return _NAMES.get(columns) if name == "final_layer.linear" else None


def _other_than(own: str, name: str, rows: int, columns: int) -> str | None:
    """The model found by `_by_size`, None if it is `own`.

    If a fused matrix of the other model is cut as if it were this one's, its q is not square.
    """
    if name.endswith(":q") and rows != columns:
        return "Lumina 2" if own == "Z-Image" else "Z-Image"
    found = _by_size(name, rows, columns)
    return None if found == own else found


def _modulation_length(denoiser: Any) -> int | None:
    """The number of modules in a NextDiT's modulation, None for another network.

    It is 1 in Z-Image, a projection, and 2 in Lumina 2, an activation and a projection.
    """
    if not all(len(getattr(denoiser, part, ())) for part in ("noise_refiner", "context_refiner", "layers")):
        return None
    return len(getattr(denoiser.layers[0], "adaLN_modulation", ()))


_BLOCKS = {
    **dict.fromkeys(("x_embedder", "t_embedder", "cap_embedder"), Block("in")),
    "context_refiner": Block("context", numbered=True),
    "noise_refiner": Block("noise", numbered=True),
    "layers": Block("layer", numbered=True),
    "final_layer": Block("out"),
}

Z_IMAGE: Family = Family(
    key="z_image",
    name="Z-Image",
    short_name="Z-Image",
    words=("zimage", "z"),
    accelerated_names=("z image turbo", "zimage turbo"),
    list_modules=z_image_modules,
    list_aliases=lambda: _aliases(Z_IMAGE, _Z_IMAGE),
    blocks=_BLOCKS,
    component="transformer",
    text_encoders={},
    readable=("kohya", "dotted native", "diffusers names after diffusion_model.", "diffusers PEFT"),
    is_checkpoint=lambda _model, denoiser: _modulation_length(denoiser) == 1,
    is_pipeline=has_transformer("ZImageTransformer2DModel"),
    other_by_size=lambda name, rows, columns: _other_than("Z-Image", name, rows, columns),
    namesakes=((r"newbie", "NewBie"), (r"lumina|neta", "Lumina 2")),
    image_input="x_embedder",
    schedule="s*",
)

LUMINA_2: Family = Family(
    key="lumina_2",
    name="Lumina 2",
    short_name="Lumina 2",
    words=("lumina", "neta", "netayume"),
    list_modules=lumina_2_modules,
    list_aliases=lambda: _aliases(LUMINA_2, _LUMINA_2),
    blocks=_BLOCKS,
    component="transformer",
    text_encoders={},
    # The host cuts q, k and v into three equal parts, so only the names of whole matrices are right there.
    readable=("kohya", "dotted native"),
    is_checkpoint=lambda _model, denoiser: _modulation_length(denoiser) == 2,
    is_pipeline=has_transformer("Lumina2Transformer2DModel"),
    other_by_size=lambda name, rows, columns: _other_than("Lumina 2", name, rows, columns),
    namesakes=((r"newbie", "NewBie"), (r"z[-_. ]?image", "Z-Image")),
    image_input="x_embedder",
    schedule="s*",
)
