"""diffusers' own pipelines of Z-Image and Lumina 2: each LoRA alone, every method, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nextdit_pipelines import lumina_2_pipeline, z_image_pipeline
from numpy.typing import NDArray
from safetensors.torch import save_file

from klora.analysis import analyze
from klora.core.families import of_pipeline
from klora.runner import Request, fused_image
from klora.settings import Settings

STEPS = 4
PIPELINES: dict[str, Callable[[], Any]] = {"z_image": z_image_pipeline, "lumina_2": lumina_2_pipeline}


@dataclass
class Bench:
    base: str
    pipeline: Any
    subject: Path
    style: Path

    def image(self, method: str) -> NDArray[np.int16]:
        settings = Settings(method=method)
        analysis = analyze(self.subject, self.style, settings, steps=STEPS)
        image = fused_image(self.pipeline, analysis, settings, Request("a cat", 3, STEPS, (32, 32)))
        return np.asarray(image, np.int16)

    def own_image(self, lora: Path) -> NDArray[np.int16]:
        """Of the pipeline with one LoRA fused by diffusers itself."""
        self.pipeline.load_lora_weights(lora)
        self.pipeline.fuse_lora()
        try:
            more = {"generator": torch.Generator().manual_seed(3), "width": 32, "height": 32}
            image = self.pipeline("a cat", num_inference_steps=STEPS, **more).images[0]
        finally:
            self.pipeline.unfuse_lora()
            self.pipeline.unload_lora_weights()
        return np.asarray(image, np.int16)


@pytest.fixture(scope="module", params=PIPELINES)
def bench(request: Any, tmp_path_factory: Any) -> Bench:
    pipeline = PIPELINES[request.param]()
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp(request.param)
    paths = [folder / f"{role}.safetensors" for role in ("subject", "style")]
    for seed, path in enumerate(paths):
        write_peft(path, pipeline.transformer, rank=4 + seed, seed=seed)
    return Bench(request.param, pipeline, *paths)


def write_peft(path: Path, transformer: torch.nn.Module, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ("to_" in name or "feed_forward" in name):
            up = torch.randn(module.out_features, rank, generator=generator)
            down = torch.randn(rank, module.in_features, generator=generator)
            tensors[f"transformer.{name}.lora_B.weight"] = up / module.in_features**0.5
            tensors[f"transformer.{name}.lora_A.weight"] = down / rank**0.5
    save_file(tensors, path)


def test_a_pipeline_is_told_by_its_transformer(bench: Bench) -> None:
    family = of_pipeline(bench.pipeline)
    assert family is not None
    assert family.key == bench.base


def test_each_lora_alone_is_as_diffusers_fuses_it(bench: Bench) -> None:
    for method, path in (("Subject only", bench.subject), ("Style only", bench.style)):
        assert np.abs(bench.image(method) - bench.own_image(path)).mean() < 0.5


def test_methods_make_images_of_their_own_and_the_pipeline_is_the_same_afterwards(bench: Bench) -> None:
    before = {name: tensor.clone() for name, tensor in bench.pipeline.transformer.state_dict().items()}
    images = {name: bench.image(name) for name in ("K-LoRA", "Subject only", "Style only", "Direct merge")}
    for name, image in images.items():
        assert (name == "K-LoRA") == bool((image == images["K-LoRA"]).all())
    after = bench.pipeline.transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
