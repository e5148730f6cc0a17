"""Beside other extensions in the stand-in. They take over an image, change strengths, or redraw a part.

test_other_extensions.py asks the same of those that people run, in a running host.
"""

import sys
from copy import copy

import numpy as np
import pytest
from host import pixels, same, tag
from PIL import Image

ALONE = {"method": "Subject only"}


@pytest.fixture(scope="module", autouse=True)
def only_there(host, standin):
    if host is not standin:
        pytest.skip("test_other_extensions.py asks running hosts")


@pytest.fixture
def beside(host):
    """Puts a script of another extension before or behind all others of txt2img."""
    runner = host.txt2img
    own = list(runner.alwayson_scripts)

    def put(script, first=True):
        script.args_from = script.args_to = 0
        script.title = lambda: "a neighbour"
        runner.alwayson_scripts[:] = [script, *own] if first else [*own, script]
        return script

    yield put
    runner.alwayson_scripts[:] = own


class TakesHold:
    """Overrides `sample` of the image, as ControlNet does."""

    def __init__(self):
        self.calls = 0

    def process(self, p):
        own = p.sample

        def sample(**kwargs):
            self.calls += 1
            return own(**kwargs)

        p.sample = sample


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_another_extensions_hold_on_the_image_stays(host, beside, fused, first):
    neighbour = beside(TakesHold(), first)
    assert same(host.image(host.pair, n_iter=2), fused)
    assert neighbour.calls == 2
    host.image()
    assert neighbour.calls == 3


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_another_extensions_hold_stays_when_k_lora_goes_and_nothing_of_k_loras_is_left_in_it(
    host, beside, plain, first
):
    neighbour = beside(TakesHold(), first)
    with (
        host.options(klora_on_error="go on without K-LoRA"),
        host.fault("networks loaded", 1, "RuntimeError"),
    ):
        arrays, infotext = host.images(host.pair, n_iter=2)
    assert same(arrays[-2], plain)
    assert neighbour.calls == 2
    assert "K-LoRA subject" not in infotext


class ChangesStrengths:
    """Gives a LoRA of the prompt another strength at each step, as LoRA block weight does at some."""

    def __init__(self, name):
        self.name = name
        sys.modules["modules.script_callbacks"].on_cfg_denoiser(self.at_step)

    def at_step(self, params):
        for net in sys.modules["networks"].loaded_networks:
            if net.name == self.name:
                net.te_multiplier = net.unet_multiplier = params.sampling_step / 4


def test_strengths_that_another_extension_changes_are_followed_on_every_layer(host, beside):
    callbacks = sys.modules["modules.script_callbacks"].callbacks["cfg_denoiser"]
    neighbour = beside(ChangesStrengths(host.other))
    try:
        prompt = "a cat" + tag(host.other)
        assert same(
            host.image({**host.pair, **ALONE}, prompt=prompt),
            host.image(prompt=prompt + tag(host.subject)),
        )
    finally:
        callbacks.remove(neighbour.at_step)


class DrawsAnew:
    """As ADetailer: makes another image from each one, with only the listed scripts.

    It calls the other scripts with a copy of the processing object.
    """

    def __init__(self, listed=(), prompt="a cat"):
        self.listed, self.prompt = listed, prompt

    def postprocess_batch(self, p, images, **_kwargs):
        processing, scripts = sys.modules["modules.processing"], p.scripts
        scripts.postprocess(copy(p), processing.Processed(p, [], []))
        fields = {
            name: getattr(p, name)
            for name in ("steps", "width", "height", "seed", "sampler_name", "cfg_scale")
        }
        inner = processing.StableDiffusionProcessingImg2Img(
            **fields, prompt=self.prompt, init_images=[Image.fromarray(images[0])]
        )
        inner.scripts, inner.script_args = copy(scripts), p.script_args
        inner.scripts.alwayson_scripts = [
            script for script in scripts.alwayson_scripts if script.title() in self.listed
        ]
        inner.do_not_save_samples, inner.outpath_samples = True, ""
        images[0] = np.asarray(processing.process_images(inner).images[0])
        scripts.process(copy(p))


def warnings(answer):
    return answer["info"]["extra_generation_params"].get("K-LoRA warnings", "")


def test_a_part_drawn_anew_without_the_pair_is_said_and_not_without_klora(host, beside, fused):
    beside(DrawsAnew())
    for fields in ({}, {"n_iter": 2}):
        answer = host.answer(host.pair, **fields)
        assert "with neither LoRA of the pair" in warnings(answer)
    assert not same(pixels(answer["images"][0]), fused)
    assert not warnings(host.answer())


def test_a_part_drawn_anew_with_the_pair_is_the_hosts_own_tag(host, beside):
    prompt = "a cat" + tag(host.subject)
    beside(DrawsAnew(prompt=prompt))
    expected, _ = host.images(prompt=prompt, n_iter=2)
    beside(DrawsAnew(listed=("K-LoRA",)))
    answer = host.answer({**host.pair, **ALONE}, n_iter=2)
    assert all(map(same, map(pixels, answer["images"]), expected))
    assert not warnings(answer)


def test_a_part_that_cannot_be_drawn_anew_is_said_with_the_image_that_is_left(host, beside, fused):
    beside(DrawsAnew(listed=("K-LoRA",)))
    host.counts()
    with host.fault("process", 2, "RuntimeError"):
        answer = host.answer(host.pair)
    assert "could not redraw a part of this image: " in warnings(answer)
    assert "a fault of the test" in warnings(answer)
    assert same(pixels(answer["images"][0]), fused)
