"""Chroma and FLUX.2 Klein: names and sizes of the real networks, and how their files are told apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import wild_files as wild
from safetensors.torch import load_file, save_file

from klora.analysis import analyze
from klora.core.deltas import dense
from klora.core.families import FAMILIES, of_checkpoint
from klora.core.foreign_files import other_base_by_metadata
from klora.core.key_names import parse_key
from klora.core.lora_file import read_lora
from klora.core.rewrite import is_in, rewrite
from klora.core.topology import LINEAR
from klora.errors import PairError
from klora.settings import Settings

FLUX, CHROMA, KLEIN_4B, KLEIN_9B = (FAMILIES[key] for key in ("flux", "chroma", "klein4b", "klein9b"))
KLEINS = {KLEIN_4B: (5, 20, 3072), KLEIN_9B: (8, 24, 4096)}


def flux2(doubles, singles, width):
    """A real FLUX.2 transformer without its weights."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.Flux2Transformer2DModel(
            num_layers=doubles,
            num_single_layers=singles,
            num_attention_heads=width // 128,
            guidance_embeds=False,
        )


def chroma():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.ChromaTransformer2DModel()


def named(network):
    return {name: module for name, module in network.named_modules() if [*module.parameters(recurse=False)]}


def test_chroma_names_are_those_of_diffusers_own_transformer():
    assert {name for module in CHROMA.modules for name in module.diffusers} == named(chroma()).keys()


@pytest.mark.parametrize("family", KLEINS, ids=lambda family: family.name)
def test_klein_names_are_those_of_diffusers_own_transformer(family):
    assert {name for module in family.modules for name in module.diffusers} == named(
        flux2(*KLEINS[family])
    ).keys()


def shapes(family, network):
    """{native path: (rows, columns)} of a family's matrices, by the sizes of diffusers' network."""
    modules = named(network)
    found = {}
    for module in family.modules:
        if module.kind == LINEAR:
            weights = [modules[name].weight for name in module.diffusers]
            found[module.native] = sum(len(weight) for weight in weights), weights[0].shape[1]
    return found


def test_the_pieces_of_kleins_linear1_are_as_high_as_the_network_cuts_them():
    rows, columns = shapes(KLEIN_9B, flux2(*KLEINS[KLEIN_9B]))["single_blocks.23.linear1"]
    module = KLEIN_9B.fused["single_blocks.23.linear1"]
    heights = [4096, 4096, 4096, 6 * 4096]
    assert (rows, columns) == (sum(heights), 4096)
    assert module.heights(module.layers, rows, columns) == heights
    assert module.heights(module.layers, rows, None) == heights


def lora_of(family, network, tmp_path, only=""):
    """A rank-1 LoRA of a network's real sizes in kohya's keys, for the matrices with `only` in their path."""
    tensors = {}
    for native, (rows, columns) in shapes(family, network).items():
        if only in native:
            tensors |= wild.kohya(
                f"lora_unet_{wild.underscored(native)}", torch.ones(rows, 1), torch.ones(1, columns), 1.0
            )
    path = tmp_path / f"{family.key}.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("only", ["", "double_blocks", "single_blocks.3", "_mlp", "linear2", "_attn.proj"])
@pytest.mark.parametrize("family", KLEINS, ids=lambda family: family.name)
def test_a_klein_file_of_real_sizes_is_of_its_own_size_of_klein(tmp_path, family, only):
    path = lora_of(family, flux2(*KLEINS[family]), tmp_path, only)
    expected = "flux" if (family, only) == (KLEIN_4B, "_attn.proj") else family.key
    assert read_lora(path).base == expected, (
        "attention of 4B has FLUX.1's names and sizes: the checkpoint decides"
    )


@pytest.mark.parametrize(
    ("only", "base"), [("", "chroma"), ("distilled", "chroma"), ("double_blocks", "flux")]
)
def test_a_chroma_file_of_real_sizes_is_told_by_its_guidance_layer_alone(tmp_path, only, base):
    assert read_lora(lora_of(CHROMA, chroma(), tmp_path, only)).base == base


@pytest.mark.parametrize("opening", ["transformer", "diffusion_model"])
def test_native_names_of_the_guidance_layer_beside_diffusers_names_are_chromas(tmp_path, opening):
    lora = read_lora(wild.Wild(wild.chroma(opening)).save(tmp_path / "a.safetensors"))
    assert (lora.base, len(lora.layers), lora.unknown_keys) == ("chroma", 11, ())


def test_ai_toolkits_klein_is_planned_with_itself(tmp_path):
    paths = [wild.Wild(wild.klein()).save(tmp_path / f"{name}.safetensors") for name in "ab"]
    found = analyze(*paths, Settings(), steps=4)
    assert (found.subject.base, found.plan.gamma) == ("klein4b", 1.0)


def test_a_lora_of_klein_4b_and_one_of_9b_are_refused_by_their_names(tmp_path):
    files = [lora_of(family, flux2(*size), tmp_path) for family, size in KLEINS.items()]
    with pytest.raises(
        PairError,
        match=r"klein4b.safetensors is made for FLUX.2 Klein 4B but the style LoRA klein9b.safetensors for",
    ):
        analyze(*files, Settings(), steps=4)


@pytest.mark.parametrize(
    ("blocks", "more", "base"),
    [
        ((19, 38), "vector_in", "flux"),
        ((19, 38), "distilled_guidance_layer", "chroma"),
        ((5, 20), "double_stream_modulation_img", "klein4b"),
        ((8, 24), "double_stream_modulation_img", "klein9b"),
        ((8, 48), "double_stream_modulation_img", None),
        ((6, 27), "txt_norm", None),
    ],
)
def test_a_checkpoint_is_told_by_its_blocks_and_what_modulates_them(blocks, more, base):
    doubles, singles = ([None] * count for count in blocks)
    denoiser = SimpleNamespace(double_blocks=doubles, single_blocks=singles, **{more: object()})
    assert of_checkpoint(SimpleNamespace(), denoiser) is FAMILIES.get(base)


# Dialects

KLEIN_NAMES = {
    "double_blocks.4.img_attn.qkv": ("transformer_blocks.4.attn", "to_q", "to_k", "to_v"),
    "double_blocks.0.txt_attn.qkv": ("transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj"),
    "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn", "to_out.0"),
    "double_blocks.0.txt_attn.proj": ("transformer_blocks.0.attn", "to_add_out"),
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff", "linear_in"),
    "double_blocks.0.img_mlp.2": ("transformer_blocks.0.ff", "linear_out"),
    "double_blocks.0.txt_mlp.0": ("transformer_blocks.0.ff_context", "linear_in"),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context", "linear_out"),
    "single_blocks.19.linear1": ("single_transformer_blocks.19.attn", "to_qkv_mlp_proj"),
    "single_blocks.0.linear2": ("single_transformer_blocks.0.attn", "to_out"),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img", "linear"),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt", "linear"),
    "single_stream_modulation.lin": ("single_stream_modulation", "linear"),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder", "linear_1"),
    "img_in": ("", "x_embedder"),
    "txt_in": ("", "context_embedder"),
}
CHROMA_NAMES = {
    "double_blocks.18.img_attn.qkv": ("transformer_blocks.18.attn", "to_q", "to_k", "to_v"),
    "double_blocks.0.txt_mlp.0": ("transformer_blocks.0.ff_context", "net.0.proj"),
    "single_blocks.37.linear1": (
        "single_transformer_blocks.37",
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "proj_mlp",
    ),
    "single_blocks.0.linear2": ("single_transformer_blocks.0", "proj_out"),
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer", "in_proj"),
    "distilled_guidance_layer.layers.4.in_layer": ("distilled_guidance_layer.layers.4", "linear_1"),
    "distilled_guidance_layer.layers.0.out_layer": ("distilled_guidance_layer.layers.0", "linear_2"),
    "img_in": ("", "x_embedder"),
    "final_layer.linear": ("", "proj_out"),
}
"""{native path: diffusers' parent, and what it calls the matrix or each of its pieces}"""

WIDTH = 8
HEIGHTS = {"klein4b": {"linear1": 9, "_mlp.0": 6, "qkv": 3}, "chroma": {"linear1": 7, "_mlp.0": 4, "qkv": 3}}
NAMES = {"klein4b": KLEIN_NAMES, "chroma": CHROMA_NAMES}


def pairs(base, seed):
    """{native path: (up, down)} of every name of a table, on a grid so that products are exact."""
    generator = torch.Generator().manual_seed(seed)

    def grid(*shape):
        return (torch.randint(-64, 64, shape, generator=generator) / 64).half()

    found = {}
    for native in NAMES[base]:
        widths = next((n for end, n in HEIGHTS[base].items() if native.endswith(end)), 1)
        inside = HEIGHTS[base]["_mlp.0"]
        inside = inside // 2 if base == "klein4b" else inside
        columns = WIDTH * (
            1 + inside if native.endswith("linear2") else inside if native.endswith("_mlp.2") else 1
        )
        found[native] = grid(widths * WIDTH, 4), grid(4, columns)
    return found


def split(base, native, up):
    """(diffusers' name, rows of up) of a matrix."""
    parent, *names = NAMES[base][native]
    heights = [len(up)] if len(names) == 1 else [WIDTH] * 3 + [len(up) - 3 * WIDTH] * (len(names) - 3)
    return [
        (f"{parent}.{name}".lstrip("."), rows) for name, rows in zip(names, up.split(heights), strict=True)
    ]


DIALECTS = {
    "kohya": (False, "lora_unet_", wild.kohya),
    "ai-toolkit": (False, "diffusion_model.", wild.peft),
    "raw PEFT": (False, "base_model.model.", wild.peft),
    "native after transformer.": (False, "transformer.", wild.kohya),
    "diffusers": (True, "transformer.", wild.peft),
    "diffusers' names after diffusion_model.": (True, "diffusion_model.", wild.peft),
    "DiffSynth": (True, "", wild.peft),
    "OneTrainer": (True, "lora_transformer_", wild.kohya),
    "SimpleTuner": (True, "lycoris_", wild.kohya),
}
"""{dialect: (whether its names are diffusers', what keys open with, suffixes)}"""


def written(base, dialect, path, seed=0):
    in_diffusers, opening, put = DIALECTS[dialect]
    tensors = {}
    for native, (up, down) in pairs(base, seed).items():
        for name, rows in split(base, native, up) if in_diffusers else [(native, up)]:
            stem = opening + (wild.underscored(name) if opening.endswith("_") else name)
            tensors |= put(stem, rows.contiguous().clone(), down.clone())
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("base", NAMES)
def test_a_lora_gives_one_plan_in_every_dialect(tmp_path, base):
    style = written(base, "kohya", tmp_path / "style.safetensors", seed=1)
    plans = {}
    for dialect in DIALECTS:
        path = written(base, dialect, tmp_path / "subject.safetensors")
        lora = read_lora(path)
        assert (lora.base, lora.unknown_keys) == (base, ())
        plans[dialect] = analyze(path, style, Settings(), steps=20).plan.to_json([])
    assert all(plan == plans["kohya"] for plan in plans.values())
    assert any(layer["switches"] for layer in plans["kohya"]["layers"])


@pytest.mark.parametrize("base", NAMES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_copy_for_the_hosts_has_keys_that_forge_neo_knows_and_the_same_deltas(tmp_path, base, dialect):
    """Native names after `lora_unet_`; after `transformer.` diffusers' names of what FLUX.1 has, too."""
    lora = read_lora(written(base, dialect, tmp_path / "old.safetensors"))
    rewrite(lora, tmp_path / "new.safetensors")
    new = read_lora(tmp_path / "new.safetensors")
    assert is_in(new, FAMILIES[base].readable)
    stems = {
        key.rpartition(".lora_")[0] for key in load_file(tmp_path / "new.safetensors") if ".lora_" in key
    }
    native = {f"lora_unet_{wild.underscored(name)}" for name in NAMES[base]}
    unknown = ("time_guidance_embed", "stream_modulation", "distilled_guidance_layer.layers")
    assert all(
        stem in native or (stem.startswith("transformer.") and not any(part in stem for part in unknown))
        for stem in stems
    )
    with lora.open() as before, new.open() as after:
        assert lora.layers.keys() == new.layers.keys()
        assert all(torch.equal(dense(before(name)), dense(after(name))) for name in lora.layers)


@pytest.mark.parametrize("base", NAMES)
def test_kohyas_keys_are_given_to_the_host_as_they_are(tmp_path, base):
    assert is_in(read_lora(written(base, "kohya", tmp_path / "a.safetensors")), FAMILIES[base].readable)


@pytest.mark.parametrize("base", NAMES)
def test_diffusers_names_that_the_host_does_not_know_are_converted(tmp_path, base):
    """The maps have no names of diffusers for FLUX.2's modulations and time, and Forge's none for Chroma."""
    lora = read_lora(written(base, "diffusers", tmp_path / "a.safetensors"))
    assert not is_in(lora, FAMILIES[base].readable)
    tensors = load_file(tmp_path / "a.safetensors")
    in_blocks = {key: tensor for key, tensor in tensors.items() if "transformer_blocks." in key}
    save_file(in_blocks, tmp_path / "b.safetensors")
    assert is_in(read_lora(tmp_path / "b.safetensors"), FAMILIES[base].readable) is (base != "chroma")


def test_blocks_whose_names_were_cut_off_are_those_of_klein():
    """diffusers reads `sformer_blocks`, which some exports write for `transformer_blocks`."""
    parsed = parse_key("diffusion_model.sformer_blocks.3.attn.add_k_proj.lora_A.weight", [KLEIN_4B])
    assert parsed.target.layers == ("double_blocks.3.txt_attn.qkv:k",)


def test_the_halves_of_kleins_last_modulation_are_swapped_in_diffusers(tmp_path):
    up, down = torch.arange(16.0).reshape(16, 1), torch.ones(1, 8)
    names = {"diffusion_model.final_layer.adaLN_modulation.1": 0, "transformer.norm_out.linear": 8}
    more = wild.peft("diffusion_model.single_stream_modulation.lin", torch.ones(24, 1), torch.ones(1, 8))
    for stem, shift in names.items():
        save_file(wild.peft(stem, up.roll(shift, 0), down) | more, tmp_path / "a.safetensors")
        with read_lora(tmp_path / "a.safetensors").open() as reader:
            assert torch.equal(dense(reader("final_layer.adaLN_modulation.1")), up @ down)


# Headers


@pytest.mark.parametrize(
    ("base", "header", "said"),
    [
        ("flux", "chroma/lora", "Chroma"),
        ("flux", "flux2_klein_4b", "FLUX.2 Klein 4B"),
        ("flux", "flux-2-dev/lora", "FLUX.2"),
        ("flux", "flux-1-dev/lora", None),
        ("chroma", "chroma/lora", None),
        ("chroma", "flux-1-dev/lora", "FLUX.1"),
        ("klein4b", "flux-2-klein-base-4b/lora", None),
        ("klein4b", "flux2", None),
        ("klein4b", "flux2_klein_9b", "FLUX.2 Klein 9B"),
        ("klein9b", "flux-2-klein-9b/lora", None),
        ("klein9b", "flux.1", "FLUX.1"),
    ],
)
def test_a_header_tells_another_model_only_if_it_is_not_the_files_own(base, header, said):
    assert other_base_by_metadata(FAMILIES[base], {"modelspec.architecture": header}) == said
