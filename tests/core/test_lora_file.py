"""Reading LoRA files: golden files, every dialect, every kind against float64, memory, threads, bad input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dialects
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from klora.core.deltas import LowRank, dense
from klora.core.lora_file import LoraFile, read_lora

GOLDEN = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*/expected.json"))
TO_Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
LAYER_Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
CONV = "lora_unet_input_blocks_4_0_in_layers_2"
LAYER_CONV = "input_blocks.4.0.in_layers.2"
ONE_TAP = "lora_unet_input_blocks_7_0_skip_connection"
LAYERS = {TO_Q: LAYER_Q, CONV: LAYER_CONV, ONE_TAP: "input_blocks.7.0.skip_connection"}


def deltas_of(lora: LoraFile) -> dict[str, Tensor]:
    with lora.open() as delta_of:
        return {name: dense(delta_of(name)) for name in lora.layers}


def read_saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> LoraFile:
    path = folder / "some.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return read_lora(path)


def pair(stem: str = TO_Q, rows: int = 8, columns: int = 8, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_up.weight": torch.ones(rows, rank),
        f"{stem}.lora_down.weight": torch.ones(rank, columns),
    }


@pytest.mark.parametrize("expected", GOLDEN, ids=lambda path: path.parent.name)
def test_golden_files_read(expected: Path) -> None:
    layers = {entry["name"]: entry for entry in json.loads(expected.read_text())["layers"]}
    files = {role: read_lora(expected.parent / f"{role}.safetensors") for role in ("subject", "style")}
    assert sorted({*files["subject"].layers, *files["style"].layers}) == sorted(layers)
    for role, lora in files.items():
        assert not lora.unknown_keys
        assert list(lora.layers) == sorted(lora.layers)
        for name, delta in deltas_of(lora).items():
            if layers[name]["only"] is None:
                assert lora.layers[name].rank == layers[name][f"rank_{role}"]
                assert delta.double().abs().sum().item() == pytest.approx(
                    layers[name][f"{role}_abs_sum"], rel=1e-6
                )


def assert_same(lora: LoraFile, expected: dict[str, Tensor]) -> None:
    found = deltas_of(lora)
    assert list(found) == sorted(expected)
    for name, delta in found.items():
        assert torch.equal(delta, expected[name]), name
        assert lora.layers[name].shape == tuple(delta.shape)
        assert lora.layers[name].rank == dialects.RANK


def sdxl_expected(factors: dialects.Factors) -> dict[str, Tensor]:
    return {
        name: up.float() @ down.float() * (dialects.ALPHA / dialects.RANK)
        for name, (up, down) in factors.items()
    }


@pytest.mark.parametrize("dialect", [*dialects.SDXL_DIALECTS, *dialects.SDXL_ATTENTION_DIALECTS])
def test_one_sdxl_lora_in_every_dialect(tmp_path: Path, dialect: str) -> None:
    factors = dialects.sdxl_factors(attention_only=dialect in dialects.SDXL_ATTENTION_DIALECTS)
    lora = read_lora(dialects.write_sdxl(tmp_path / "a.safetensors", dialect, factors))
    assert (lora.base, lora.dialect, lora.unknown_keys) == ("sdxl", dialect.removesuffix(", bare"), ())
    assert_same(lora, sdxl_expected(factors))


def flux_expected(modules: list[dialects.Fused], factors: dialects.Factors) -> dict[str, Tensor]:
    expected = {}
    for module in modules:
        up, down = factors[module.native]
        whole = up.float() @ down.float() * (dialects.ALPHA / dialects.RANK)
        pieces = whole.split(module.heights(down.shape[1])) if module.pieces else (whole,)
        expected.update(zip(module.layers, pieces, strict=True))
    return expected


FLUX = [*dialects.FLUX_BLOCKS, *dialects.FLUX_ENDS]


@pytest.mark.parametrize("dialect", dialects.FLUX_FUSED_DIALECTS)
def test_one_flux_lora_in_every_fused_dialect(tmp_path: Path, dialect: str) -> None:
    factors = dialects.flux_factors(FLUX)
    lora = read_lora(dialects.write_flux_fused(tmp_path / "a.safetensors", dialect, FLUX, factors))
    assert (lora.base, lora.dialect) == ("flux", dialect)
    assert_same(lora, flux_expected(FLUX, factors))


@pytest.mark.parametrize("dialect", dialects.FLUX_SPLIT_DIALECTS)
def test_one_flux_lora_in_every_split_dialect(tmp_path: Path, dialect: str) -> None:
    factors = dialects.flux_factors(FLUX)
    lora = read_lora(dialects.write_flux_split(tmp_path / "a.safetensors", dialect, FLUX, factors))
    assert (lora.base, lora.dialect) == ("flux", dialect)
    assert_same(lora, flux_expected(FLUX, factors))


def test_block_diagonal_pieces_keep_their_own_rank(tmp_path: Path) -> None:
    factors = dialects.flux_factors(FLUX)
    assert_same(
        read_lora(dialects.write_flux_block_diagonal(tmp_path / "a.safetensors", FLUX, factors)),
        flux_expected(FLUX, factors),
    )


def test_xlabs_processors(tmp_path: Path) -> None:
    factors = dialects.flux_factors(dialects.FLUX_BLOCKS)
    lora = read_lora(dialects.write_xlabs(tmp_path / "a.safetensors", factors))
    ends = ("qkv:q", "qkv:k", "qkv:v", "attn.proj", "linear1:q", "linear1:k", "linear1:v", "linear2")
    assert lora.dialect == "XLabs"
    assert_same(
        lora,
        {
            name: delta
            for name, delta in flux_expected(dialects.FLUX_BLOCKS, factors).items()
            if name.endswith(ends)
        },
    )


def test_a_piece_that_is_all_zero_is_no_layer(tmp_path: Path) -> None:
    file = pair("lora_unet_single_blocks_3_linear1", rows=7 * 8)
    file["lora_unet_single_blocks_3_linear1.lora_up.weight"][8:24] = 0
    assert list(read_saved(tmp_path, file).layers) == [
        "single_blocks.3.linear1:mlp",
        "single_blocks.3.linear1:q",
    ]


def test_norm_out_has_its_halves_in_the_native_order(tmp_path: Path) -> None:
    up, down = torch.randn(8, 2), torch.randn(2, 4)
    stem = "transformer.norm_out.linear"
    lora = read_saved(
        tmp_path,
        {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down, f"{stem}.diff_b": torch.arange(8.0)},
    )
    with lora.open() as reader:
        swapped = torch.cat([up[4:], up[:4]]) @ down
        torch.testing.assert_close(dense(reader("final_layer.adaLN_modulation.1")), swapped)
        assert reader.bias("final_layer.adaLN_modulation.1").tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def randoms(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {role: torch.randn(shape, generator=generator) for role, shape in shapes.items()}


def kron(first: Tensor, second: Tensor) -> Tensor:
    """⊗ of the first two axes by definition: entry (i m2 + k, j n2 + l, …) is first[i, j] second[k, l, …]."""
    m1, n1 = first.shape
    m2, n2 = second.shape[:2]
    out = torch.zeros(m1 * m2, n1 * n2, *second.shape[2:], dtype=torch.float64)
    for i in range(m1):
        for j in range(n1):
            out[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2] = first[i, j] * second
    return out


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijkl,io,jn->onkl", core, a, b)


W = {role: f"lora_{role}.weight" for role in ("up", "down", "mid")} | {
    role: f"{role}.weight" for role in ("a1", "a2", "b1", "b2")
}
KINDS = {
    "LoRA": (TO_Q, randoms(up=(6, 2), down=(2, 8)), 2, lambda t: t["up"] @ t["down"]),
    "LoRA stored as 1x1": (
        TO_Q,
        randoms(up=(6, 2, 1, 1), down=(2, 8, 1, 1)),
        2,
        lambda t: t["up"].flatten(1) @ t["down"].flatten(1),
    ),
    "LoRA of a 1x1 convolution": (
        ONE_TAP,
        randoms(up=(6, 2, 1, 1), down=(2, 8, 1, 1)),
        2,
        lambda t: t["up"].flatten(1) @ t["down"].flatten(1),
    ),
    "LoCon 3x3": (
        CONV,
        randoms(up=(6, 2, 1, 1), down=(2, 8, 3, 3)),
        2,
        lambda t: torch.einsum("or,rikl->oikl", t["up"][..., 0, 0], t["down"]),
    ),
    "LoCon mid": (
        CONV,
        randoms(up=(6, 2, 1, 1), down=(2, 8, 1, 1), mid=(2, 2, 3, 3)),
        2,
        lambda t: torch.einsum("nmkl,on,mi->oikl", t["mid"], t["up"].flatten(1), t["down"].flatten(1)),
    ),
    "LoHa": (
        TO_Q,
        randoms(hada_w1_a=(6, 3), hada_w1_b=(3, 8), hada_w2_a=(6, 3), hada_w2_b=(3, 8)),
        3,
        lambda t: (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
    ),
    "LoHa with cores": (
        CONV,
        randoms(
            hada_w1_a=(3, 6),
            hada_w1_b=(3, 8),
            hada_t1=(3, 3, 3, 3),
            hada_w2_a=(3, 6),
            hada_w2_b=(3, 8),
            hada_t2=(3, 3, 3, 3),
        ),
        3,
        lambda t: (
            tucker(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"])
            * tucker(t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
        ),
    ),
    "LoKr full": (
        TO_Q,
        randoms(lokr_w1=(2, 3), lokr_w2=(4, 5)),
        None,
        lambda t: kron(t["lokr_w1"], t["lokr_w2"]),
    ),
    "LoKr w2 factorised": (
        TO_Q,
        randoms(lokr_w1=(2, 3), lokr_w2_a=(4, 2), lokr_w2_b=(2, 5)),
        2,
        lambda t: kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
    ),
    "LoKr w1 factorised": (
        TO_Q,
        randoms(lokr_w1_a=(4, 2), lokr_w1_b=(2, 5), lokr_w2=(2, 3)),
        2,
        lambda t: kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2"]),
    ),
    "LoKr both factorised": (
        TO_Q,
        randoms(lokr_w1_a=(4, 2), lokr_w1_b=(2, 5), lokr_w2_a=(6, 3), lokr_w2_b=(3, 6)),
        3,
        lambda t: kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
    ),
    "LoKr conv": (
        CONV,
        randoms(lokr_w1=(2, 3), lokr_w2=(4, 5, 3, 3)),
        None,
        lambda t: kron(t["lokr_w1"], t["lokr_w2"]),
    ),
    "LoKr conv factorised": (
        CONV,
        randoms(lokr_w1=(2, 3), lokr_w2_a=(4, 2), lokr_w2_b=(2, 45)),
        2,
        lambda t: kron(t["lokr_w1"], (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(4, 5, 3, 3)),
    ),
    "LoKr conv with core": (
        CONV,
        randoms(lokr_w1=(2, 3), lokr_t2=(2, 2, 3, 3), lokr_w2_a=(2, 4), lokr_w2_b=(2, 5)),
        2,
        lambda t: kron(t["lokr_w1"], tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])),
    ),
    "GLoRA": (TO_Q, randoms(a1=(8, 2), a2=(2, 8), b1=(6, 2), b2=(2, 8)), 2, lambda t: t["b1"] @ t["b2"]),
    "GLoRA of LyCORIS 1": (
        TO_Q,
        randoms(a1=(2, 8), a2=(8, 2), b1=(2, 8), b2=(6, 2)),
        2,
        lambda t: t["b2"] @ t["b1"],
    ),
    "GLoRA square": (
        TO_Q,
        randoms(a1=(8, 2), a2=(2, 8), b1=(8, 2), b2=(2, 8)),
        2,
        lambda t: t["b1"] @ t["b2"],
    ),
    "full diff": (TO_Q, randoms(diff=(6, 8)), None, lambda t: t["diff"]),
    "full diff conv": (CONV, randoms(diff=(6, 8, 3, 3)), None, lambda t: t["diff"]),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_its_formula_in_float64(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    stem, tensors, rank, formula = KINDS[kind]
    stored = {role: tensor.to(dtype) for role, tensor in tensors.items()}
    alpha = 0.75
    lora = read_saved(
        tmp_path,
        {f"{stem}.{W.get(role, role)}": t for role, t in stored.items()}
        | {f"{stem}.alpha": torch.tensor(alpha)},
    )
    ((layer, info),) = lora.layers.items()
    assert layer == LAYERS[stem]
    expected = formula({role: t.double() for role, t in stored.items()}) * (alpha / rank if rank else 1.0)
    assert info.rank == rank
    assert kind.startswith(info.kind)
    torch.testing.assert_close(deltas_of(lora)[layer].double(), expected.flatten(1), rtol=1e-5, atol=1e-5)
    assert info.shape == tuple(expected.flatten(1).shape)


def test_glora_gives_the_factor_of_the_base_weights(tmp_path: Path) -> None:
    for name, order in (("GLoRA", ("a1", "a2")), ("GLoRA of LyCORIS 1", ("a2", "a1"))):
        stem, t, _, _ = KINDS[name]
        lora = read_saved(
            tmp_path,
            {f"{stem}.{W[role]}": tensor for role, tensor in t.items()}
            | {f"{stem}.alpha": torch.tensor(1.0)},
        )
        with lora.open() as reader:
            factor = reader.input_factor(LAYER_Q)
            assert factor is not None
            torch.testing.assert_close(dense(factor), t[order[0]] @ t[order[1]] / 2)


def test_dora_is_its_low_rank_delta_with_its_magnitude_beside_it(tmp_path: Path) -> None:
    rows, columns = torch.rand(8, 1), torch.rand(1, 8)
    other = TO_Q.replace("to_q", "to_k")
    lora = read_saved(
        tmp_path, pair() | pair(other) | {f"{TO_Q}.dora_scale": rows, f"{other}.dora_scale": columns}
    )
    assert lora.kinds == {"DoRA": 2}
    with lora.open() as reader:
        assert isinstance(reader(LAYER_Q), LowRank)
        by_row, by_column = reader.magnitude(LAYER_Q), reader.magnitude(LAYER_Q.replace("to_q", "to_k"))
    assert by_row is not None
    assert by_column is not None
    assert (by_row.axis, by_column.axis) == (0, 1)
    assert torch.equal(by_row.values, rows.flatten())
    assert torch.equal(by_column.values, columns.flatten())


def test_a_fused_magnitude_and_bias_are_cut_with_their_rows(tmp_path: Path) -> None:
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    lora = read_saved(
        tmp_path,
        pair(stem, rows=12, columns=4)
        | {f"{stem}.dora_scale": torch.arange(12.0).reshape(12, 1), f"{stem}.diff_b": torch.arange(12.0)},
    )
    with lora.open() as reader:
        magnitude = reader.magnitude("double_blocks.1.img_attn.qkv:k")
        assert magnitude is not None
        assert magnitude.values.tolist() == [4, 5, 6, 7]
        assert reader.bias("double_blocks.1.img_attn.qkv:v").tolist() == [8, 9, 10, 11]
    assert lora.unscored == tuple(f"double_blocks.1.img_attn.qkv:{piece}" for piece in "kqv")


def test_norms_and_biases_are_listed_as_unscored(tmp_path: Path) -> None:
    norm = "lora_unet_input_blocks_4_1_norm"
    lora = read_saved(
        tmp_path,
        pair()
        | {
            f"{norm}.w_norm": torch.ones(4),
            f"{norm}.b_norm": torch.zeros(4),
            f"{CONV}.diff_b": torch.full((6,), 2.0),
        },
    )
    assert lora.unscored == (LAYER_CONV, "input_blocks.4.1.norm")
    assert list(lora.layers) == [LAYER_Q]
    with lora.open() as reader:
        change = reader.norm("input_blocks.4.1.norm")
        assert change.weight is not None
        assert change.weight.tolist() == [1] * 4
        assert reader.bias(LAYER_CONV).tolist() == [2] * 6
        assert reader.bias(LAYER_Q) is None


def test_text_encoders_are_counted_and_readable(tmp_path: Path) -> None:
    one, two = (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_3_mlp_fc1",
    )
    lora = read_saved(tmp_path, pair() | pair(one) | pair(two) | pair(two.replace("fc1", "fc2")))
    assert lora.text_encoder_layers == {"te1": 1, "te2": 2}
    assert list(lora.layers) == [LAYER_Q]
    with lora.open() as reader:
        assert dense(reader("te1:text_model.encoder.layers.0.self_attn.q_proj")).shape == (8, 8)


def test_peft_settings_in_the_header_give_the_scale(tmp_path: Path) -> None:
    up, down = ".lora_B.weight", ".lora_A.weight"
    a, b = "unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_out"
    tensors = {
        a + up: torch.ones(4, 4),
        a + down: torch.ones(4, 4),
        b + up: torch.ones(4, 4),
        b + down: torch.ones(4, 4),
    }
    settings = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"proj_out": 2}}
    lora = read_saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)})
    assert {name: info.scale for name, info in lora.layers.items()} == {
        "middle_block.1.proj_in": 2.0,
        "middle_block.1.proj_out": 0.5,
    }
    assert lora.scale_from_metadata
    rs = read_saved(
        tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings | {"unet.use_rslora": True})}
    )
    assert {info.scale for info in rs.layers.values()} == {4.0, 1.0}
    assert {info.scale for info in read_saved(tmp_path, tensors).layers.values()} == {1.0}
    broken = read_saved(tmp_path, tensors, {"lora_adapter_metadata": "{"})
    assert {info.scale for info in broken.layers.values()} == {1.0}


def test_unknown_keys_and_embeddings_are_kept(tmp_path: Path) -> None:
    extra = {"lora_unet_nowhere.alpha": torch.ones(()), "bundle_emb.cat.clip_l": torch.ones(2, 4)}
    lora = read_saved(tmp_path, pair() | extra)
    assert lora.unknown_keys == ("lora_unet_nowhere.alpha",)
    assert lora.embeddings == ("bundle_emb.cat.clip_l",)


def test_pickled_files_are_read_by_weights_only(tmp_path: Path) -> None:
    for suffix in (".pt", ".ckpt", ".bin"):
        torch.save({"state_dict": pair()}, tmp_path / f"a{suffix}")
        assert torch.equal(deltas_of(read_lora(tmp_path / f"a{suffix}"))[LAYER_Q], torch.full((8, 8), 2.0))


def test_many_threads_read_one_file(tmp_path: Path) -> None:
    factors = dialects.sdxl_factors(width=64)
    lora = read_lora(dialects.write_sdxl(tmp_path / "a.safetensors", "kohya", factors))
    expected = sdxl_expected(factors)
    with lora.open() as delta_of, ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: (name, dense(delta_of(name))), list(lora.layers) * 5)
        assert all(torch.equal(delta, expected[name]) for name, delta in found)


@settings(deadline=None, max_examples=30)
@given(
    rank=st.integers(1, 6),
    width=st.integers(1, 7),
    zeros=st.sets(st.integers(0, 5)),
    alpha=st.floats(0.1, 100),
)
def test_pieces_stacked_make_the_fused_delta(
    tmp_path_factory: pytest.TempPathFactory, rank: int, width: int, zeros: set[int], alpha: float
) -> None:
    stem, generator = "lora_unet_single_blocks_1_linear1", torch.Generator().manual_seed(rank)
    up, down = (
        torch.randn(5 * width, rank, generator=generator),
        torch.randn(rank, width, generator=generator),
    )
    up[width : 2 * width, [c for c in zeros if c < rank]] = 0
    tensors = {
        f"{stem}.lora_up.weight": up,
        f"{stem}.lora_down.weight": down,
        f"{stem}.alpha": torch.tensor(alpha),
    }
    lora = read_saved(tmp_path_factory.mktemp("fused"), tensors)
    pieces = deltas_of(lora)
    whole = torch.cat(
        [
            pieces.get(f"single_blocks.1.linear1:{p}", torch.zeros(width, width))
            for p in ("q", "k", "v", "mlp")
        ]
    )
    torch.testing.assert_close(whole, up @ down * (alpha / rank), rtol=1e-4, atol=1e-4)
    left = rank - len([c for c in zeros if c < rank])
    info = lora.layers.get("single_blocks.1.linear1:k")
    assert (info.rank if info else 0) == left
    with lora.open() as delta_of:
        assert all(delta_of(name).rank == lora.layers[name].rank for name in lora.layers)
