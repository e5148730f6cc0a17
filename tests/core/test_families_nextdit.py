"""Z-Image and Lumina 2: their names, one plan in every dialect, the host's reading, and whose a file is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nextdit_files as files
import pytest
import torch
from nextdit_files import DIALECTS, MATRICES, PEFT, QKV, Neo, Tensors
from torch import Tensor, nn

from klora.core.deltas import dense
from klora.core.families import FAMILIES, of_checkpoint
from klora.core.families.base import Family
from klora.core.families.nextdit import LUMINA_2, Z_IMAGE
from klora.core.lora_file import LoraFile, read_lora
from klora.core.plan import make_plan
from klora.core.rewrite import is_in, rewrite
from klora.core.schedule import Schedule
from klora.core.scores import score_pair
from klora.errors import LoraFileError

BASES = ["z_image", "lumina_2"]
CASES = [(base, *dialect) for base in BASES for dialect in DIALECTS]
dialects = pytest.mark.parametrize(("base", "kind", "dialect"), CASES, ids=" ".join)


def read(folder: Path, tensors: Tensors, name: str = "lora.safetensors") -> LoraFile:
    return read_lora(files.save(folder / name, tensors))


def deltas_of(lora: LoraFile) -> Tensors:
    with lora.open() as delta_of:
        return {name: dense(delta_of(name)).double() for name in lora.layers}


def for_the_host(lora: LoraFile) -> Path:
    """The file itself if the host's loader reads it, else the copy that it is given."""
    if is_in(lora, FAMILIES[lora.base].readable):
        return lora.path
    copy = lora.path.with_name("copy.safetensors")
    assert rewrite(lora, copy) == ()
    return copy


# Names


def test_names_of_z_image_are_those_of_diffusers_own_transformer() -> None:
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.ZImageTransformer2DModel(
        dim=24, n_layers=30, n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[4, 4, 4], in_channels=4
    )
    assert {name for m in Z_IMAGE.modules for name in m.diffusers} == with_parameters(network)


def test_names_of_lumina_2_are_those_of_diffusers_own_transformer() -> None:
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.Lumina2Transformer2DModel(
        hidden_size=72,
        num_attention_heads=6,
        num_kv_heads=2,
        cap_feat_dim=8,
        axes_dim_rope=(4, 4, 4),
        in_channels=4,
    )
    assert {name for m in LUMINA_2.modules for name in m.diffusers} == with_parameters(network)


def with_parameters(network: nn.Module) -> set[str]:
    return {
        name for name, m in network.named_modules() if name and any(True for _ in m.parameters(recurse=False))
    }


@pytest.mark.parametrize(("family", "blocks"), [(Z_IMAGE, 30), (LUMINA_2, 26)], ids=BASES)
def test_every_block_has_its_seven_or_six_matrices(family: Any, blocks: int) -> None:
    names = [m.native for m in family.modules if m.kind == "linear"]
    assert sum(name.startswith("layers.") for name in names) == 6 * blocks
    assert sum(name.startswith("noise_refiner.") for name in names) == 12
    assert sum(name.startswith("context_refiner.") for name in names) == 10


def test_diffusers_makes_the_same_of_a_lora_of_z_image_in_kohyas_names(tmp_path: Path) -> None:
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    tensors = files.tensors_of("z_image", "split", "musubi-tuner", files.factors_of("z_image"))
    blocks = {key: tensor for key, tensor in tensors.items() if "_attention_" in key or "feed_forward" in key}
    converted = utils._convert_non_diffusers_z_image_lora_to_diffusers(dict(blocks))
    assert_equal(read(tmp_path, blocks, "ours.safetensors"), read(tmp_path, converted, "theirs.safetensors"))


def test_diffusers_makes_the_same_of_a_lora_of_lumina_2_in_native_names(tmp_path: Path) -> None:
    """Its function is made for the real width alone, and for the first blocks of a part."""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    sizes = {"attention.qkv": (3840, 2304), "attention.out": (2304, 2304), "adaLN_modulation.1": (9216, 1024)}
    sizes |= {
        "feed_forward.w1": (9216, 2304),
        "feed_forward.w2": (2304, 9216),
        "feed_forward.w3": (9216, 2304),
    }
    native: Tensors = {}
    for name, (rows, columns) in sizes.items():
        native[f"diffusion_model.layers.0.{name}.lora_A.weight"] = torch.randn(1, columns)
        native[f"diffusion_model.layers.0.{name}.lora_B.weight"] = torch.randn(rows, 1)
    converted = utils._convert_non_diffusers_lumina2_lora_to_diffusers(dict(native))
    theirs = {key: tensor.clone() for key, tensor in converted.items()}
    assert_equal(read(tmp_path, native, "ours.safetensors"), read(tmp_path, theirs, "theirs.safetensors"))


def assert_equal(one: LoraFile, other: LoraFile) -> None:
    assert one.base == other.base
    assert one.layers.keys() == other.layers.keys()
    ours, theirs = deltas_of(one), deltas_of(other)
    assert all(torch.equal(delta, theirs[name]) for name, delta in ours.items())


# Dialects


@pytest.mark.parametrize("base", BASES)
def test_one_lora_gives_one_plan_in_whatever_dialect_it_is_saved(tmp_path: Path, base: str) -> None:
    style = read(
        tmp_path, files.tensors_of(base, "fused", "kohya", files.factors_of(base, 1)), "s.safetensors"
    )
    plans = []
    for kind, dialect in DIALECTS:
        lora = read(tmp_path, files.tensors_of(base, kind, dialect, files.factors_of(base)))
        assert (lora.base, lora.unknown_keys) == (base, ())
        assert set(lora.layers) == {layer for matrix in MATRICES[base] for layer in matrix.layers}
        scores = score_pair(lora, style)
        plans.append(
            [make_plan(scores, steps=9, schedule=Schedule.named(s)).to_json([]) for s in ("s", "s*")]
        )
    assert all(plan == plans[0] for plan in plans)
    assert any(layer["switches"] for layer in plans[0][0]["layers"])


@dialects
def test_the_host_makes_of_a_file_what_it_is(tmp_path: Path, base: str, kind: str, dialect: str) -> None:
    factors = files.factors_of(base)
    lora = read(tmp_path, files.tensors_of(base, kind, dialect, factors))
    host = Neo(base)
    assert host.load(for_the_host(lora)) == []
    expected = files.deltas_of(base, factors)
    assert all(torch.equal(weight, expected[name]) for name, weight in host.weights.items())


LEFT_ALONE = {
    "z_image": {
        ("fused", "kohya"), ("fused", "split_qkv"), ("fused", "dotted native"), ("split", "ai-toolkit"),
        ("split", "diffusers PEFT"),
    },
    "lumina_2": {("fused", "kohya"), ("fused", "split_qkv"), ("fused", "dotted native")},
}  # fmt: skip


@dialects
def test_only_what_the_host_reads_rightly_is_left_to_it(
    tmp_path: Path, base: str, kind: str, dialect: str
) -> None:
    lora = read(tmp_path, files.tensors_of(base, kind, dialect, files.factors_of(base)))
    assert is_in(lora, FAMILIES[base].readable) == ((kind, dialect) in LEFT_ALONE[base])


def test_the_hosts_names_of_z_images_pieces_are_understood_for_lumina_2_too(tmp_path: Path) -> None:
    up, down = files.factors_of("lumina_2")[QKV["lumina_2"].native]
    tensors: Tensors = {}
    for piece, rows in zip("qkv", up.split([12, 4, 4]), strict=True):
        files.put(tensors, f"diffusion_model.layers.0.attention.to_{piece}", PEFT, rows, down)
    lora = read(tmp_path, tensors)
    assert lora.base == "lumina_2"
    assert_host_adds(lora, up.double() @ down.double() / 2)


def assert_host_adds(lora: LoraFile, qkv: Tensor, rel: float = 0.0) -> None:
    host = Neo(lora.base)
    assert host.load(for_the_host(lora)) == []
    torch.testing.assert_close(host.weights[QKV[lora.base].native], qkv, rtol=rel, atol=rel)


# Pieces of Lumina 2's qkv become one matrix

TO = "transformer.layers.0.attn.to_"
HEIGHTS = {"q": 12, "k": 4, "v": 4}
TOPS = {"q": 0, "k": 12, "v": 16}


def pieces_of(names: str, ranks: dict[str, int] | None = None, dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(0)
    tensors: Tensors = {}
    for name in names:
        rank = (ranks or {}).get(name, 2)
        tensors[f"{TO}{name}.lora_A.weight"] = torch.randn(rank, 12).to(dtype)
        tensors[f"{TO}{name}.lora_B.weight"] = torch.randn(HEIGHTS[name], rank).to(dtype)
    return tensors


def stacked(lora: LoraFile) -> Tensor:
    whole = torch.zeros(20, 12, dtype=torch.float64)
    for layer, delta in deltas_of(lora).items():
        top = TOPS[layer.rpartition(":")[2]]
        whole[top : top + len(delta)] = delta
    return whole


@pytest.mark.parametrize("names", ["qkv", "q", "k", "qv", "kv"])
def test_pieces_that_a_file_lacks_stay_as_they_are(tmp_path: Path, names: str) -> None:
    lora = read(tmp_path, pieces_of(names) | out_projection())
    assert lora.base == "lumina_2"
    assert_host_adds(lora, stacked(lora), 1e-6)


def out_projection() -> Tensors:
    """A layer by whose name the file is Lumina 2's, unchanged."""
    name = "transformer.layers.0.norm1.linear"
    return {f"{name}.lora_A.weight": torch.zeros(1, 12), f"{name}.lora_B.weight": torch.zeros(48, 1)}


def test_ranks_of_pieces_add_up_and_each_keeps_its_own(tmp_path: Path) -> None:
    ranks = {"q": 3, "k": 1, "v": 2}
    lora = read(tmp_path, pieces_of("qkv", ranks))
    copy = read_lora(for_the_host(lora))
    assert {layer: info.rank for layer, info in copy.layers.items()} == {
        f"layers.0.attention.qkv:{name}": rank for name, rank in ranks.items()
    }
    assert_equal(lora, copy)


def test_pieces_of_one_scale_keep_their_numbers_and_others_become_float32(tmp_path: Path) -> None:
    alike = pieces_of("qkv", dtype=torch.float16) | {f"{TO}{name}.alpha": torch.tensor(3.0) for name in "qkv"}
    lora = read(tmp_path, alike)
    assert_host_adds(lora, stacked(lora), 1e-6)
    assert dtypes_of(for_the_host(lora)) == {torch.float16}
    lora = read(tmp_path, alike | {f"{TO}k.alpha": torch.tensor(0.7)})
    assert_host_adds(lora, stacked(lora), 1e-6)
    assert torch.float32 in dtypes_of(for_the_host(lora))


def dtypes_of(path: Path) -> set[torch.dtype]:
    return {tensor.dtype for key, tensor in files.load_file(path).items() if not key.endswith(".alpha")}


def test_other_kinds_become_the_difference_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lokr = {f"{TO}q.lokr_w1": torch.randn(3, 3), f"{TO}q.lokr_w2": torch.randn(4, 4)}
    loha = {f"{TO}v.hada_w{n}_a": torch.randn(4, 2) for n in (1, 2)}
    loha |= {f"{TO}v.hada_w{n}_b": torch.randn(2, 12) for n in (1, 2)}
    lora = read(tmp_path, lokr | loha | pieces_of("k"))
    assert set(lora.kinds) == {"LoKr", "LoHa", "LoRA"}
    assert_host_adds(lora, stacked(lora), 1e-6)


def test_magnitudes_and_biases_of_all_rows_are_stacked(tmp_path: Path) -> None:
    magnitudes = {f"{TO}{n}.lora_magnitude_vector": torch.full((HEIGHTS[n],), TOPS[n] + 1.0) for n in "qkv"}
    biases = {f"{TO}k.lora_B.bias": torch.full((4,), 5.0), f"{TO}k.alpha": torch.tensor(1.0)}
    copy = files.load_file(for_the_host(read(tmp_path, pieces_of("qkv") | magnitudes | biases)))
    stem = "lora_unet_layers_0_attention_qkv"
    assert copy[f"{stem}.dora_scale"].flatten().tolist() == [1.0] * 12 + [13.0] * 4 + [17.0] * 4
    assert copy[f"{stem}.dora_scale"].shape == (20, 1)
    assert copy[f"{stem}.diff_b"].tolist() == [0.0] * 12 + [2.5] * 4 + [0.0] * 4


IMPOSSIBLE: dict[str, Tensors] = {
    "a DoRA of some rows": pieces_of("qkv") | {f"{TO}q.dora_scale": torch.ones(12, 1)},
    "a DoRA of two pieces": pieces_of("qk")
    | {f"{TO}{n}.dora_scale": torch.ones(HEIGHTS[n], 1) for n in "qk"},
    "a DoRA by inputs": pieces_of("qkv") | {f"{TO}{n}.dora_scale": torch.ones(1, 12) for n in "qkv"},
    "GLoRA": {f"{TO}q.{role}.weight": torch.ones(12, 12) for role in ("a1", "a2", "b1", "b2")},
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_would_change_other_pieces_too_is_refused(tmp_path: Path, case: str) -> None:
    lora = read(tmp_path, IMPOSSIBLE[case] | out_projection())
    with pytest.raises(
        LoraFileError, match=r'of "lora\.safetensors" belongs to a DoRA or GLoRA for one part'
    ):
        for_the_host(lora)


def test_pieces_of_sizes_that_no_network_has_are_refused(tmp_path: Path) -> None:
    odd = {f"{TO}k.lora_A.weight": torch.ones(1, 12), f"{TO}k.lora_B.weight": torch.ones(5, 1)}
    lora = read(tmp_path, odd | out_projection())
    with pytest.raises(LoraFileError, match="sizes of its parts do not fit together: export the LoRA again"):
        for_the_host(lora)


# A file that holds one LoRA twice


def twice(gain: float = 1.0) -> Tensors:
    """Every change with fused names and with split names, as a real file has it (diffusers' issue 13203)."""
    factors = files.factors_of("z_image")
    fused = files.tensors_of("z_image", "fused", "kohya", factors)
    split = files.tensors_of("z_image", "split", "musubi-tuner", factors)
    again = {key: tensor for key, tensor in split.items() if "_attention_to_" in key}
    return fused | {key: tensor * gain if "lora_up" in key else tensor for key, tensor in again.items()}


def test_a_lora_that_stands_in_a_file_twice_counts_once(tmp_path: Path) -> None:
    factors = files.factors_of("z_image")
    once = read(tmp_path, files.tensors_of("z_image", "fused", "kohya", factors), "once.safetensors")
    lora = read(tmp_path, twice())
    assert_equal(lora, once)
    assert len(lora.unused_keys) == 4 * 4 * 3
    assert all("_attention_to_" in key for key in lora.unused_keys)
    host = Neo("z_image")
    assert host.load(for_the_host(lora)) == []
    assert torch.equal(
        host.weights[QKV["z_image"].native], files.deltas_of("z_image", factors)[QKV["z_image"].native]
    )


def test_rounding_of_one_of_the_two_does_not_matter(tmp_path: Path) -> None:
    rounded = {key: t.bfloat16() if "_attention_to_" in key else t for key, t in twice(1.001).items()}
    assert read(tmp_path, rounded).unused_keys


def test_two_loras_for_one_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFileError, match="two tensors for one place"):
        read(tmp_path, twice(1.1))


# Whose a file is


def pair(stem: str, rows: int, columns: int) -> Tensors:
    return {f"{stem}.lora_B.weight": torch.ones(rows, 1), f"{stem}.lora_A.weight": torch.ones(1, columns)}


ONE_LAYER = {
    "qkv of Z-Image": ("diffusion_model.layers.0.attention.qkv", 11520, 3840, "z_image"),
    "qkv of Lumina 2": ("diffusion_model.layers.0.attention.qkv", 3840, 2304, "lumina_2"),
    "out of Z-Image": ("diffusion_model.layers.0.attention.out", 3840, 3840, "z_image"),
    "out of Lumina 2": ("diffusion_model.layers.0.attention.out", 2304, 2304, "lumina_2"),
    "q of Z-Image": ("diffusion_model.layers.0.attention.to_q", 3840, 3840, "z_image"),
    "k of Lumina 2 in Z-Image's names": ("diffusion_model.layers.0.attention.to_k", 768, 2304, "lumina_2"),
    "w1 of Z-Image": ("diffusion_model.context_refiner.0.feed_forward.w1", 10240, 3840, "z_image"),
    "w1 of Lumina 2": ("diffusion_model.context_refiner.0.feed_forward.w1", 9216, 2304, "lumina_2"),
    "w2 of Lumina 2": ("diffusion_model.layers.3.feed_forward.w2", 2304, 9216, "lumina_2"),
    "modulation of Z-Image": ("diffusion_model.layers.0.adaLN_modulation.0", 15360, 256, "z_image"),
    "modulation of Lumina 2": ("diffusion_model.layers.0.adaLN_modulation.1", 9216, 1024, "lumina_2"),
    "q of Lumina 2 by diffusers": ("transformer.layers.0.attn.to_q", 2304, 2304, "lumina_2"),
    "caption input of Z-Image": ("diffusion_model.cap_embedder.1", 3840, 2560, "z_image"),
    "w1 of a small Z-Image": ("diffusion_model.layers.0.feed_forward.w1", 768, 256, "z_image"),
}


@pytest.mark.parametrize("case", ONE_LAYER)
def test_one_layer_tells_whose_a_file_is(tmp_path: Path, case: str) -> None:
    stem, rows, columns, base = ONE_LAYER[case]
    assert read(tmp_path, pair(stem, rows, columns)).base == base


@pytest.mark.parametrize(
    ("tensors", "model"),
    [
        (pair("diffusion_model.layers.35.attention.qkv", 3840, 2304), "NewBie"),
        (pair("diffusion_model.clip_text_pooled_proj.1", 1024, 1024), "NewBie"),
        (pair("transformer.ref_image_refiner.0.attn.to_q", 2520, 2520), "OmniGen2"),
        (pair("transformer.layers.0.attn.to_q", 2520, 2520), "OmniGen2"),
    ],
    ids=["NewBie by its depth", "NewBie by its text input", "OmniGen2 by a name", "OmniGen2 by its width"],
)  # fmt: skip
def test_relatives_of_the_same_names_are_told_by_their_own(
    tmp_path: Path, tensors: Tensors, model: str
) -> None:
    with pytest.raises(LoraFileError, match=f"was made for {model}"):
        read(tmp_path, tensors)


# What is loaded


def denoiser(modulation: int, *parts: str) -> Any:
    block = SimpleNamespace(adaLN_modulation=[None] * modulation)
    return SimpleNamespace(
        **{part: [block] for part in parts or ("noise_refiner", "context_refiner", "layers")}
    )


@pytest.mark.parametrize(
    ("network", "family"),
    [
        (denoiser(1), Z_IMAGE),
        (denoiser(2), LUMINA_2),
        (denoiser(2, "layers"), None),
        (SimpleNamespace(layers=[SimpleNamespace()]), None),
    ],
    ids=["Z-Image", "Lumina 2", "without refiners", "Ernie-Image"],
)
def test_a_checkpoint_is_told_by_its_refiners_and_modulation(network: Any, family: Family | None) -> None:
    """Forge Neo's NextDiT (backend/nn/lumina.py) holds a Linear, or an activation and a Linear."""
    assert of_checkpoint(SimpleNamespace(), network) is family
