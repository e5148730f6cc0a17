"""Base models as records: how fused matrices are cut, and how sizes tell families of the same names apart."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from klora.core import foreign_files
from klora.core.blocks import block_of
from klora.core.families import FAMILIES, listed, models_taken, with_pipelines
from klora.core.families.flux import FLUX
from klora.core.lora_file import for_one_base, read_lora
from klora.core.text_encoders import TEXT_ENCODERS
from klora.core.topology import Module
from klora.errors import LoraFileError

SINGLE = "single_blocks.3.linear1"
QKV = Module("blocks.0.qkv", ("q", "k", "v"), pieces=("q", "k", "v"))
GROUPED = replace(QKV, square=1)
LINEAR1 = FLUX.fused[SINGLE]


@pytest.mark.parametrize(
    ("module", "layers", "rows", "columns", "heights"),
    [
        (QKV, QKV.layers, 9216, 3072, [3072, 3072, 3072]),
        (GROUPED, QKV.layers, 3840, 2304, [2304, 768, 768]),
        (LINEAR1, LINEAR1.layers, 21504, 3072, [3072, 3072, 3072, 12288]),
        (LINEAR1, LINEAR1.layers, 27648, 3072, [3072, 3072, 3072, 18432]),
        (LINEAR1, LINEAR1.layers[:3], 9216, 3072, [3072, 3072, 3072]),
        (LINEAR1, LINEAR1.layers[3:], 12288, 3072, [12288]),
        (LINEAR1, LINEAR1.layers, 21504, None, [3072, 3072, 3072, 12288]),
        (QKV, QKV.layers, 9216, None, [3072, 3072, 3072]),
    ],
    ids=[
        "thirds",
        "fewer keys than queries",
        "FLUX.1",
        "a higher MLP",
        "no MLP",
        "one piece",
        "a bias",
        "a bias of thirds",
    ],
)
def test_the_heights_of_pieces_come_from_the_matrix_itself(module, layers, rows, columns, heights):
    assert module.heights(layers, rows, columns) == heights


def single_block(folder, widths, columns=8, name=SINGLE):
    path = folder / f"{widths}.safetensors"
    tensors = {"lora_up": torch.ones(widths * columns, 2), "lora_down": torch.ones(2, columns)}
    stem = f"lora_unet_{name.replace('.', '_')}"
    save_file({f"{stem}.{role}.weight": tensor for role, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(("widths", "base"), [(7, "flux"), (9, "klein4b")])
def test_of_two_families_of_the_same_names_sizes_tell_the_files(tmp_path, widths, base):
    lora = read_lora(single_block(tmp_path, widths))
    assert lora.base == base
    assert lora.layers[f"{SINGLE}:mlp"].shape == ((widths - 3) * 8, 8)


def test_a_file_of_sizes_that_no_family_of_its_names_has_is_refused(tmp_path):
    sentence = re.escape(f"was made for FLUX.2 dev, and K-LoRA fuses LoRAs for {listed('and')}:")
    with pytest.raises(LoraFileError, match=sentence):
        read_lora(single_block(tmp_path, 9, columns=6144))


def test_sentences_list_every_family(monkeypatch):
    three = {key: FAMILIES[key] for key in ("sdxl", "flux", "chroma")}
    monkeypatch.setattr("klora.core.families.FAMILIES", three)
    assert listed("or") == "SDXL, FLUX.1 or Chroma"
    assert with_pipelines("and") == "SDXL, FLUX and Chroma"


def test_a_family_without_a_pipeline_is_not_one_that_diffusers_opens():
    assert "Anima" not in models_taken()
    assert "Anima" in listed("or")


def test_a_model_is_foreign_only_while_no_family_has_its_name(monkeypatch):
    keys = ["lora_prior_unet_0.lora_A.weight"]
    assert foreign_files.other_base(keys) == "Stable Cascade"
    monkeypatch.setitem(FAMILIES, "cascade", replace(FLUX, key="cascade", name="Stable Cascade"))
    assert foreign_files.other_base(keys) is None


SHARED = "double_blocks.3.img_attn.proj"
"""A layer of FLUX.1 and of Chroma, of one size in both."""


def shared_by_two(folder, name="some", layers=(SHARED,), metadata=None):
    tensors = {}
    for layer in layers:
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{stem}.lora_up.weight"] = torch.ones(3072, 2)
        tensors[f"{stem}.lora_down.weight"] = torch.ones(2, 3072)
    save_file(tensors, folder / f"{name}.safetensors", metadata)
    return folder / f"{name}.safetensors"


def test_a_file_that_may_be_for_two_models_says_so_and_is_read_for_the_first(tmp_path):
    lora = read_lora(shared_by_two(tmp_path))
    assert lora.families[:2] == ("flux", "chroma")
    assert lora.base == "flux"


def test_such_a_file_is_read_for_the_loaded_checkpoint(tmp_path):
    lora = read_lora(shared_by_two(tmp_path), FAMILIES["chroma"])
    assert lora.family is FAMILIES["chroma"]
    assert lora.families[:2] == ("chroma", "flux")


def test_a_checkpoint_of_a_third_model_does_not_decide(tmp_path):
    assert read_lora(shared_by_two(tmp_path), FAMILIES["sdxl"]).base == "flux"


@pytest.mark.parametrize(
    ("header", "base"), [("chroma/lora", "chroma"), ("Flux.1-dev/lora", "flux"), ("", "flux")]
)
def test_such_a_file_is_read_for_the_model_that_its_header_names(tmp_path, header, base):
    path = shared_by_two(tmp_path, metadata={"modelspec.architecture": header})
    assert read_lora(path).base == base
    assert read_lora(path, FAMILIES["flux"]).base == "flux"


def test_the_other_file_of_the_pair_decides_where_no_checkpoint_does(tmp_path):
    """Chroma has no modulation in its blocks, and FLUX.1 no guidance layer."""
    either = read_lora(shared_by_two(tmp_path))
    guided = read_lora(
        shared_by_two(tmp_path, "chroma", (SHARED, "distilled_guidance_layer.layers.0.in_layer"))
    )
    modulated = read_lora(shared_by_two(tmp_path, "flux", (SHARED, "time_in.out_layer")))
    assert [lora.base for lora in (guided, modulated)] == ["chroma", "flux"]
    for other in (guided, modulated):
        assert {lora.base for lora in for_one_base([either, other])} == {other.base}
    assert [lora.base for lora in for_one_base([guided, modulated])] == ["chroma", "flux"]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_map_has_a_name_for_every_layer_of_a_family(family):
    for module in family.modules:
        head, *rest = module.native.split(".")
        group, numbered = family.blocks[head]
        assert block_of(module.native) == (f"{group} {rest[0]}" if numbered else group)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_text_encoders_of_a_family_are_known(family):
    assert family.text_encoders.keys() <= TEXT_ENCODERS.keys()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_layer_that_reads_the_image_is_one_of_the_family(family):
    assert family.image_input in {module.native for module in family.modules}
