"""Base models as records: how fused matrices are cut, and how sizes tell families of the same names apart."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from klora.core import foreign_files
from klora.core.blocks import block_of
from klora.core.families import FAMILIES, listed
from klora.core.families.flux import FLUX
from klora.core.lora_file import read_lora
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


@pytest.fixture
def in_order():
    """Afterwards the registry is as it was, in its order too: of several families the first is taken."""
    registry = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(registry)


@pytest.fixture
def twin(monkeypatch):
    """A family of FLUX.1's names, whose single blocks are 9 widths high."""

    def other_by_size(name, rows, columns):
        return "FLUX.1" if name.endswith(".linear1:mlp") and rows != 6 * columns else None

    monkeypatch.setitem(
        FAMILIES,
        "twin",
        replace(FLUX, key="twin", name="FLUX.2", short_name="FLUX.2", other_by_size=other_by_size),
    )


def single_block(folder, widths, name=SINGLE, columns=8):
    path = folder / f"{widths}.safetensors"
    tensors = {"lora_up": torch.ones(widths * columns, 2), "lora_down": torch.ones(2, columns)}
    stem = f"lora_unet_{name.replace('.', '_')}"
    save_file({f"{stem}.{role}.weight": tensor for role, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(("widths", "base"), [(7, "flux"), (9, "twin")])
def test_of_two_families_of_the_same_names_sizes_tell_the_files(tmp_path, twin, widths, base):
    lora = read_lora(single_block(tmp_path, widths))
    assert lora.base == base
    assert lora.layers[f"{SINGLE}:mlp"].shape == ((widths - 3) * 8, 8)


def test_a_file_of_sizes_that_no_family_of_its_names_has_is_refused(tmp_path):
    sentence = re.escape(f"was made for FLUX.2, and K-LoRA fuses LoRAs for {listed('and')}:")
    with pytest.raises(LoraFileError, match=sentence):
        read_lora(single_block(tmp_path, 9))


def test_sentences_list_every_family(in_order, twin):
    for other in FAMILIES.keys() - {"sdxl", "flux", "twin"}:
        del FAMILIES[other]
    assert listed("or") == "SDXL, FLUX.1 or FLUX.2"
    assert listed("and", short=True) == "SDXL, FLUX and FLUX.2"


def test_a_model_is_foreign_only_while_no_family_has_its_name(twin):
    keys = ["diffusion_model.double_stream_modulation_img.lin.lora_A.weight"]
    assert foreign_files.other_base(keys) is None
    del FAMILIES["twin"]
    assert foreign_files.other_base(keys) == "FLUX.2"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_map_has_a_name_for_every_layer_of_a_family(family):
    for module in family.modules:
        head, *rest = module.native.split(".")
        group, numbered = family.blocks[head]
        assert block_of(module.native) == (f"{group} {rest[0]}" if numbered else group)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_text_encoders_of_a_family_are_known(family):
    assert family.text_encoders.keys() <= TEXT_ENCODERS.keys()
