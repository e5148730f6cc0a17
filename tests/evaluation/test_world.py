"""The miniature's world, and that its model has SDXL's names."""

import numpy as np
import pytest

from evaluation.miniature import loras, model, train, world
from klora.core.families.sdxl import sdxl_modules


def test_an_image_follows_from_its_seed():
    first, words, style = train.image(7)
    assert np.array_equal(first, train.image(7)[0])
    assert not np.array_equal(first, train.image(8)[0])
    assert world.caption(words, style)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_every_class_shows_in_every_style(family):
    rng = np.random.default_rng(1)
    for kind in world.CLASSES:
        scene, _ = world.random_scene(rng, kind, "white")
        drawn = world.render(scene, world.random_style(rng, family), 1)
        assert drawn.shape == (64, 64, 3)
        assert drawn.std() > 4, kind


def test_the_tokenizer_knows_every_word_of_every_caption():
    tokenizer = model.tokenizer()
    captions = [train.spoken(np.random.default_rng(seed), *train.image(seed)[1:]) for seed in range(60)]
    for recipe in loras.RECIPES:
        captions.append(
            world.caption(
                loras.examples(recipe)[1][0], world.STYLES[recipe.name][0] if recipe.role == "style" else ""
            )
        )
    tokens = tokenizer(captions, padding="max_length", truncation=True).input_ids
    assert all(len(row) == model.TEXT_LENGTH and tokenizer.unk_token_id not in row for row in tokens)
    assert len({tuple(row) for row in tokens}) > 60


def test_the_base_model_never_sees_what_the_loras_are_for():
    rng = np.random.default_rng(2)
    for _ in range(300):
        style = world.random_style(rng, "dots")
        assert not world.reserved(style)
    for seed in range(200):
        scene, _ = world.random_scene(np.random.default_rng(seed))
        assert not scene.pattern
        assert not scene.extra


def test_all_layers_of_the_unet_have_a_name_of_sdxl():
    known = {path for module in sdxl_modules() for path in module.diffusers}
    parameters = {name.rpartition(".")[0] for name, _ in model.unet().named_parameters()}
    assert parameters <= known
