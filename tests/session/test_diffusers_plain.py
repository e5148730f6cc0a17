"""diffusers' pipelines of Qwen-Image, Krea 2, ERNIE-Image and Wan: what is applied, and what stays behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")

from small_plain_pipelines import PIPELINES, wan_pipeline, write_pair

from klora.analysis import analyze
from klora.errors import HostError
from klora.hosts.diffusers import denoiser_of, family_of
from klora.runner import Request, _arguments, fused_image, fused_images
from klora.settings import Settings

STEPS = 3
REQUEST = Request("a cat", seed=3, steps=STEPS, size=(64, 64))


class Bench:
    def __init__(self, base, folder):
        self.base, self.pipeline = base, PIPELINES[base]()
        self.pipeline.set_progress_bar_config(disable=True)
        self.pair = write_pair(folder, base, denoiser_of(self.pipeline))

    def analysis(self, settings):
        return analyze(*self.pair, settings, steps=STEPS)

    def image(self, **settings):
        own = Settings(**settings)
        return np.asarray(fused_image(self.pipeline, self.analysis(own), own, REQUEST), np.int16)

    def alone(self, path, multiplier):
        """The image with a LoRA loaded and fused by diffusers, without K-LoRA."""
        self.pipeline.load_lora_weights(path)
        self.pipeline.fuse_lora(lora_scale=multiplier)
        try:
            return self.made()
        finally:
            self.pipeline.unfuse_lora()
            self.pipeline.unload_lora_weights()

    def made(self):
        """The image of the pipeline as it is."""
        result = self.pipeline(**_arguments(self.pipeline, REQUEST, 1))
        return np.asarray(result.images[0] if hasattr(result, "images") else result.frames[0][0], np.int16)


@pytest.fixture(scope="module", params=PIPELINES)
def bench(request, tmp_path_factory):
    return Bench(request.param, tmp_path_factory.mktemp(request.param))


def test_the_pipeline_is_known_by_its_transformer(bench):
    assert family_of(bench.pipeline).key == bench.base


def test_style_only_is_the_pipeline_with_that_lora_fused_by_diffusers(bench):
    ours, own = bench.image(method="Style only", style_weight=0.7), bench.alone(bench.pair[1], 0.7)
    assert np.abs(ours - own).mean() < np.abs(ours - bench.made()).mean() / 10


def test_methods_make_images_of_their_own_and_leave_the_weights_as_they_were(bench):
    parameters = [
        (parameter, parameter.detach().clone()) for parameter in denoiser_of(bench.pipeline).parameters()
    ]
    fused = bench.image()
    assert (fused == bench.image()).all()
    assert all(
        (fused != bench.image(method=method)).any()
        for method in ("Subject only", "Style only", "Direct merge")
    )
    assert all(torch.equal(parameter, copy) for parameter, copy in parameters)


def test_a_batch_has_an_image_for_each_seed(bench):
    settings = Settings()
    first, second = fused_images(bench.pipeline, bench.analysis(settings), settings, REQUEST, 2)
    assert first.size == second.size == (64, 64)
    assert (np.asarray(first) != np.asarray(second)).any()


def test_the_guidance_scale_goes_where_the_pipeline_looks_for_it(bench):
    request = Request("a cat", seed=3, steps=STEPS, size=(64, 64), guidance=2.5, negative="a dog")
    given = _arguments(bench.pipeline, request, 1)
    assert given["negative_prompt"] == "a dog"
    assert given.get("true_cfg_scale" if bench.base == "qwen" else "guidance_scale") == 2.5
    bench.pipeline(**given)


def test_two_denoisers_that_take_turns_are_refused():
    """Wan 2.2 14B: the pair would be on the first and silently not on the second."""
    with pytest.raises(HostError, match="two transformers that take turns"):
        family_of(wan_pipeline(two=True))
