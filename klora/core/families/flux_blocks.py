"""What FLUX.1, Chroma and FLUX.2 have in common: the names of their blocks, and how to tell them apart.

Native names are Black Forest Labs' (black-forest-labs/flux and flux2, model.py), where one matrix contains
q, k, v (and the MLP input of a single block). diffusers has one module for each, but for FLUX.2's single
blocks. The other names are those of diffusers' conversion scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from klora.core.families.base import ATTENTION_WIDTHS, DIFFUSERS_FUSED, Alias, Block
from klora.core.topology import NORM, Module

_STREAMS = (
    ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1", ("norm_q", "norm_k")),
    (
        "txt",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "ff_context",
        "norm1_context",
        ("norm_added_q", "norm_added_k"),
    ),
)


def double_blocks(
    count: int, mlp: tuple[str, str] = ("net.0.proj", "net.2"), modulated: bool = True
) -> Iterator[Module]:
    """All modules of the blocks that keep image and text apart.

    Args:
        mlp: diffusers' names of the two layers of an MLP.
        modulated: whether each block has modulations of its own.
    """
    for block in range(count):
        diffusers = f"transformer_blocks.{block}"
        for stream, qkv, out, feed_forward, modulation, norms in _STREAMS:
            native = f"double_blocks.{block}.{stream}"
            yield Module(
                f"{native}_attn.qkv",
                tuple(f"{diffusers}.attn.{name}" for name in qkv),
                pieces=("q", "k", "v"),
                widths=3,
            )
            yield Module(f"{native}_attn.proj", (f"{diffusers}.attn.{out}",))
            yield Module(f"{native}_mlp.0", (f"{diffusers}.{feed_forward}.{mlp[0]}",))
            yield Module(f"{native}_mlp.2", (f"{diffusers}.{feed_forward}.{mlp[1]}",))
            if modulated:
                yield Module(f"{native}_mod.lin", (f"{diffusers}.{modulation}.linear",))
            yield Module(f"{native}_attn.norm.query_norm", (f"{diffusers}.attn.{norms[0]}",), NORM)
            yield Module(f"{native}_attn.norm.key_norm", (f"{diffusers}.attn.{norms[1]}",), NORM)


def single_blocks(count: int, modulated: bool = True) -> Iterator[Module]:
    """All modules of FLUX.1's and Chroma's blocks for both streams.

    Args:
        modulated: whether each block has a modulation of its own.
    """
    for block in range(count):
        native, diffusers = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        split = (*(f"{diffusers}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{diffusers}.proj_mlp")
        yield Module(f"{native}.linear1", split, pieces=("q", "k", "v", "mlp"), square=3, widths=7)
        yield Module(f"{native}.linear2", (f"{diffusers}.proj_out",))
        if modulated:
            yield Module(f"{native}.modulation.lin", (f"{diffusers}.norm.linear",))
        yield from single_norms(block)


def single_norms(block: int) -> Iterator[Module]:
    """The norms of a block for both streams."""
    native, diffusers = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
    yield Module(f"{native}.norm.query_norm", (f"{diffusers}.attn.norm_q",), NORM)
    yield Module(f"{native}.norm.key_norm", (f"{diffusers}.attn.norm_k",), NORM)


def fused_projections(modules: Iterable[Module]) -> Iterator[Alias]:
    """diffusers' own fused projections (`fuse_qkv_projections`), where it has q, k and v apart."""
    for module in modules:
        attention, _, first = module.diffusers[0].rpartition(".")
        if module.pieces and first in ("to_q", "add_q_proj"):
            fused = "to_qkv" if first == "to_q" else "to_added_qkv"
            yield Alias(f"{attention}.{fused}", module, module.layers[:3], DIFFUSERS_FUSED)


BLOCKS = {
    "double_blocks": Block("double", numbered=True),
    "single_blocks": Block("single", numbered=True),
    "final_layer": Block("out"),
}
"""What the map calls the blocks and what follows them."""


def depths(denoiser: Any) -> tuple[int, int]:
    """How many double and single blocks a WebUI's denoiser has."""
    double, single = (len(getattr(denoiser, name, ())) for name in ("double_blocks", "single_blocks"))
    return double, single


_WIDTHS = {**ATTENTION_WIDTHS, 3072: "FLUX.2 Klein 4B", 6144: "FLUX.2 dev"}
"""{hidden size: model}, of those whose modules have names of these blocks."""


def other_by_size(width: int, gated: bool, name: str, rows: int, columns: int) -> str | None:
    """`Family.other_by_size` of a model with these blocks.

    Args:
        width: its hidden size.
        gated: whether its MLPs are gated, as FLUX.2's, or simple, as FLUX.1's.
    """
    if not name.startswith(("double_blocks.", "single_blocks.")):
        return None
    own = rows if name.endswith(("_mlp.2", ".linear2")) else columns
    if _is_gated(name, rows, columns) is (not gated):
        return "FLUX.1" if gated else _WIDTHS.get(own, "FLUX.2")
    return None if own == width else _WIDTHS.get(own)


def _is_gated(name: str, rows: int, columns: int) -> bool | None:
    """Whether a layer's size is that of a gated MLP; None if it does not tell.

    A gated MLP has 6 widths of rows in its first matrix and 3 of columns in its second, a simple one 4 and 4.
    linear2 has one width of columns more.
    """
    if name.endswith((".linear1:mlp", "_mlp.0")):
        return {6 * columns: True, 4 * columns: False}.get(rows)
    if name.endswith("_mlp.2"):
        return {3 * rows: True, 4 * rows: False}.get(columns)
    if name.endswith(".linear2"):
        return {4 * rows: True, 5 * rows: False}.get(columns)
    return None


_HEADERS = (
    (r"chroma", "Chroma"),
    (r"klein.*4b", "FLUX.2 Klein 4B"),
    (r"klein.*9b", "FLUX.2 Klein 9B"),
    (r"flux[-_. ]?2", "FLUX.2"),
    (r"flux[-_. ]?1", "FLUX.1"),
    (r"hunyuan", "HunyuanVideo"),
    (r"^(stable-diffusion-3|sd_?3)", "Stable Diffusion 3"),
    (r"qwen", "Qwen-Image"),
    (r"aura_?flow|pony-?v7", "AuraFlow (Pony V7)"),
)


def namesakes(name: str) -> tuple[tuple[str, str], ...]:
    """`Family.namesakes` of the model of this name; "FLUX.2" is said of Klein too."""
    return tuple((pattern, other) for pattern, other in _HEADERS if not name.startswith(other))
