"""A base model without a record: its layers and its plan come from the WebUI's own names for its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from klora.analysis import analyze
from klora.core.blocks import block_of
from klora.core.families import FAMILIES
from klora.core.families.base import HOSTS_OWN
from klora.core.families.unlisted import Place, unlisted
from klora.core.lora_file import read_lora
from klora.core.rewrite import is_in, rewrite
from klora.errors import LoraFileError
from klora.settings import Settings

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def known_by_its_host(family, shapes, more):
    """A model that a WebUI loads: it knows kohya's and the dotted names of each weight, and `more`.

    Args:
        shapes: {path: shape of the weight}.
        more: {key without its suffix: place}.
    """
    places = dict(more)
    for path in shapes:
        places[f"lora_unet_{path.replace('.', '_')}"] = places[f"diffusion_model.{path}"] = Place(path)
    return unlisted(family, shapes, places.get, places)


@pytest.fixture
def no_tables():
    """Switches all listed models off when called."""
    tables = dict(FAMILIES)
    yield FAMILIES.clear
    FAMILIES.clear()
    FAMILIES.update(tables)


@pytest.fixture
def novel(tmp_path):
    """Two LoRAs of a model with fused weights, in the keys of kohya and of diffusers, and that model."""
    generator = torch.Generator().manual_seed(0)

    def low_rank(rows, columns):
        return torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)

    fused = {f"stages.{n}.qkv": low_rank(24, 8) for n in range(3)}
    plain = {f"stages.{n}.out": low_rank(8, 8) for n in range(3)}
    kohya = {}
    for name, (up, down) in {**fused, **plain}.items():
        kohya[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"] = up
        kohya[f"lora_unet_{name.replace('.', '_')}.lora_down.weight"] = down
    split = {}
    for name, (up, down) in fused.items():
        for index, piece in enumerate(("to_q", "to_k", "to_v")):
            stem = f"transformer.{name.replace('qkv', piece)}"
            split[f"{stem}.lora_B.weight"] = up[8 * index : 8 * index + 8].clone()
            split[f"{stem}.lora_A.weight"] = down.clone()
    for name, (up, down) in plain.items():
        split[f"diffusion_model.{name}.lora_B.weight"] = up
        split[f"diffusion_model.{name}.lora_A.weight"] = down
    paths = {"kohya": tmp_path / "kohya.safetensors", "split": tmp_path / "split.safetensors"}
    save_file(kohya, paths["kohya"])
    save_file(split, paths["split"])
    shapes = {name: (up.shape[0], down.shape[1]) for name, (up, down) in {**fused, **plain}.items()}
    rows = {
        f"transformer.stages.{n}.{piece}": Place(f"stages.{n}.qkv", (8 * index, 8))
        for n in range(3)
        for index, piece in enumerate(("to_q", "to_k", "to_v"))
    }
    return known_by_its_host("Novel", shapes, rows), paths


def test_a_model_that_nobody_listed_has_the_layers_of_its_host(novel):
    family, paths = novel
    one, other = (read_lora(path, family) for path in paths.values())
    assert one.family is other.family is family
    assert list(one.layers) == list(other.layers)
    assert list(one.layers)[:4] == ["stages.0.out", *(f"stages.0.qkv:{piece}" for piece in range(3))]
    assert {info.shape for info in one.layers.values()} == {(8, 8)}


def test_the_dialects_that_its_host_knows_give_one_plan(novel):
    family, paths = novel
    plans = [
        analyze(*pair, Settings(), steps=4, loaded=family).plan
        for pair in ((paths["kohya"], paths["split"]), (paths["split"], paths["kohya"]))
    ]
    assert plans[0].scores == plans[1].scores
    assert plans[0].gamma == pytest.approx(1)


def test_its_files_are_given_to_the_host_as_they_are(novel):
    family, paths = novel
    assert all(is_in(read_lora(path, family), (HOSTS_OWN,)) for path in paths.values())


def test_a_copy_for_the_host_has_names_that_it_knows(novel, tmp_path):
    family, paths = novel
    for path in paths.values():
        rewrite(read_lora(path, family), tmp_path / "copy.safetensors")
        copy = read_lora(tmp_path / "copy.safetensors", family)
        assert not copy.unknown_keys
        assert list(copy.layers) == list(read_lora(path, family).layers)


def test_the_map_groups_its_layers_by_the_first_parts_of_their_names():
    names = ["stages.2.qkv:0", "stem.conv", "tail"]
    assert [block_of(name) for name in names] == ["stages 2", "stem", "tail"]


def test_without_that_model_loaded_its_files_are_refused(novel):
    with pytest.raises(LoraFileError, match="is not a LoRA for"):
        read_lora(novel[1]["kohya"])


def test_a_file_of_a_listed_model_is_that_models_whatever_is_loaded(novel):
    family, _ = novel
    path = GOLDEN / "sdxl_locon_loha" / "subject.safetensors"
    assert read_lora(path, family).base == "sdxl"


def model_of(family, pair):
    """A listed model as its host knows it: what these files change, pieces by the names of diffusers."""
    files = [read_lora(path) for path in pair]
    sizes = {layer: info.shape for file in files for layer, info in file.layers.items()}
    shapes, more = {}, {}
    for module in family.modules:
        pieces = [sizes.get(layer) for layer in module.layers]
        if not any(pieces):
            continue
        columns = next(shape[1] for shape in pieces if shape)
        heights = [shape[0] if shape else columns for shape in pieces]
        shapes[module.native] = (sum(heights), columns)
        for index, name in enumerate(module.diffusers):
            place = Place(module.native, (sum(heights[:index]), heights[index]) if module.pieces else None)
            more[f"{family.component}.{name}"] = more[f"lora_unet_{name.replace('.', '_')}"] = place
    return known_by_its_host(family.name, shapes, more)


def by_host(layer, family):
    """The name of a layer where the pieces of a weight have numbers for names."""
    path, _, piece = layer.partition(":")
    return f"{path}:{family.fused[path].pieces.index(piece)}" if piece else layer


@pytest.mark.parametrize("pair", ["sdxl_attention_same_rank", "sdxl_locon_loha", "flux_fused_split"])
def test_with_all_tables_switched_off_a_pair_has_the_same_plan_by_the_names_of_its_host(pair, no_tables):
    paths = [GOLDEN / pair / f"{role}.safetensors" for role in ("subject", "style")]
    family = read_lora(paths[0]).family
    listed = analyze(*paths, Settings(), steps=8).plan
    model = model_of(family, paths)
    no_tables()
    plan = analyze(*paths, Settings(), steps=8, loaded=model).plan
    renamed = [replace(layer, name=by_host(layer.name, family)) for layer in listed.scores.layers]
    order = sorted(range(len(renamed)), key=lambda index: renamed[index].name)
    assert plan.gamma == pytest.approx(listed.gamma, rel=1e-12)
    assert list(plan.scores.layers) == [renamed[index] for index in order]
    assert (plan.strengths == listed.strengths[:, order]).all()
