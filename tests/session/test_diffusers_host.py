"""Real diffusers pipelines of small networks: what is applied, when, and that nothing stays behind."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import (
    chroma_pipeline,
    flux_pipeline,
    klein_pipeline,
    sd15_pipeline,
    sdxl_pipeline,
    write_kohya,
    write_peft,
)

from klora.analysis import analyze
from klora.core.lora_file import read_lora
from klora.core.methods import STYLE, SUBJECT
from klora.core.score_cache import ScoreCache
from klora.errors import PairError
from klora.hosts.diffusers import DiffusersSwitch, Lora, denoiser_of, weight_change
from klora.runner import Request, fused_image
from klora.session import Session
from klora.settings import Settings

STEPS = 4


class Bench:
    """One pipeline with a pair of LoRA files in different dialects."""

    def __init__(self, base, pipeline, folder):
        pipeline.set_progress_bar_config(disable=True)
        self.base, self.pipeline = base, pipeline
        self._analyses = {}
        self.subject, self.style = folder / "subject.safetensors", folder / "style.safetensors"
        write_kohya(self.subject, self.denoiser, base=base, rank=4, network_alpha=2, seed=1, strength=0.8)
        write_peft(self.style, self.denoiser, base=base, rank=8, seed=2, strength=0.8)

    @property
    def denoiser(self):
        return denoiser_of(self.pipeline)

    def analysis(self, settings=None, steps=STEPS):
        key = (settings or Settings(), steps)
        if key not in self._analyses:
            self._analyses[key] = analyze(
                self.subject,
                self.style,
                key[0],
                steps=steps,
                cache=ScoreCache(self.subject.parent / "scores"),
            )
        return self._analyses[key]

    def image(self, settings=None, steps=STEPS, **more):
        settings = settings or Settings()
        request = Request("a cat", seed=3, steps=steps, size=(64, 64))
        return np.asarray(
            fused_image(self.pipeline, self.analysis(settings, steps), settings, request), np.int16
        )

    def weights(self):
        return [
            (parameter, parameter.data_ptr(), parameter.detach().clone())
            for part in self.pipeline.components.values()
            if isinstance(part, torch.nn.Module)
            for parameter in part.parameters()
        ]


def assert_untouched(weights):
    assert all(
        parameter.data_ptr() == place and torch.equal(parameter, copy) for parameter, place, copy in weights
    )


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return Bench("sdxl", sdxl_pipeline(), tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return Bench("flux", flux_pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return Bench("sd15", sd15_pipeline(), tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def chroma(tmp_path_factory):
    return Bench("chroma", chroma_pipeline(), tmp_path_factory.mktemp("chroma"))


@pytest.fixture(scope="module")
def klein4b(tmp_path_factory):
    return Bench("klein4b", klein_pipeline(), tmp_path_factory.mktemp("klein4b"))


@pytest.fixture(params=["sdxl", "sd15", "flux", "chroma", "klein4b"])
def bench(request):
    return request.getfixturevalue(request.param)


def test_subject_only_equals_the_pipeline_with_that_lora_fused_by_diffusers(bench):
    settings = Settings(method="Subject only", subject_weight=0.7)
    analysis = analyze(bench.style, bench.subject, settings, steps=STEPS)
    alone = np.asarray(
        fused_image(bench.pipeline, analysis, settings, Request("a cat", 3, STEPS, (64, 64))), np.int16
    )
    bench.pipeline.load_lora_weights(bench.style)
    bench.pipeline.fuse_lora(lora_scale=0.7)
    try:
        own = bench.pipeline(
            prompt="a cat",
            num_inference_steps=STEPS,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
    finally:
        bench.pipeline.unfuse_lora()
        bench.pipeline.unload_lora_weights()
    assert np.abs(alone - np.asarray(own, np.int16)).mean() < 0.2


def test_methods_make_their_own_images_and_repeat_exactly(bench):
    images = {
        name: bench.image(Settings(method=name))
        for name in ("K-LoRA", "Subject only", "Style only", "Direct merge")
    }
    assert (images["K-LoRA"] == bench.image()).all()
    for name in ("Subject only", "Style only", "Direct merge"):
        assert (images["K-LoRA"] != images[name]).any()


def test_pipeline_is_bit_identical_afterwards(bench):
    weights = bench.weights()
    bench.image()
    assert_untouched(weights)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.cuda.OutOfMemoryError])
def test_pipeline_is_bit_identical_after_a_broken_run(sdxl, monkeypatch, error):
    weights = sdxl.weights()
    step = Session.step

    def failing(self, index):
        if index == 2:
            raise error("stop")
        step(self, index)

    monkeypatch.setattr(Session, "step", failing)
    with pytest.raises(error):
        sdxl.image()
    assert_untouched(weights)


def test_pipeline_is_bit_identical_when_a_merge_runs_out_of_memory(sdxl, monkeypatch):
    weights, calls = sdxl.weights(), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 100:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return weight_change(*arguments)

    monkeypatch.setattr("klora.hosts.diffusers.weight_change", failing)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sdxl.image()
    assert_untouched(weights)


CLOCKS = [
    ("sdxl", "EulerDiscreteScheduler", 4, [0, 1, 2, 3]),
    ("sdxl", "HeunDiscreteScheduler", 4, [0, 0, 1, 1, 2, 2, 3]),
    ("sdxl", "DPMSolverMultistepScheduler", 4, [0, 1, 2, 3]),
    ("sdxl", "KDPM2DiscreteScheduler", 3, [0, 0, 1, 1, 2]),
    ("sdxl", "EulerDiscreteScheduler", 1, [0]),
    ("sd15", "PNDMScheduler", 4, [0, 1, 1, 2, 3]),
    ("sd15", "EulerAncestralDiscreteScheduler", 4, [0, 1, 2, 3]),
    ("flux", "FlowMatchEulerDiscreteScheduler", 4, [0, 1, 2, 3]),
    ("flux", "FlowMatchEulerDiscreteScheduler", 1, [0]),
    ("chroma", "FlowMatchEulerDiscreteScheduler", 4, [0, 0, 1, 1, 2, 2, 3, 3]),
    ("klein4b", "FlowMatchEulerDiscreteScheduler", 4, [0, 1, 2, 3]),
]


def weight_of(switch, name):
    """The weight of a layer, which may be some rows of its module's."""
    place = switch._places[name]
    return place.module.weight.data[... if place.rows is None else place.rows]


@pytest.mark.parametrize(("base", "scheduler", "steps", "clock"), CLOCKS)
def test_every_model_evaluation_runs_on_the_plan_of_its_step(
    request, monkeypatch, base, scheduler, steps, clock
):
    """A probe at the denoiser sees that each layer's weight has the LoRA that the plan names for the step."""
    bench = request.getfixturevalue(base)
    pipeline = bench.pipeline
    before = pipeline.scheduler
    more = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}  # as SD 1.5 has it
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(before.config, **more)
    analysis = bench.analysis(steps=steps)
    plan, seen = analysis.plan, []
    switch = DiffusersSwitch(bench.denoiser, Lora(analysis.subject, 1.0), Lora(analysis.style, 1.0))
    expected = {}
    with analysis.subject.open() as subject, analysis.style.open() as style:
        for name in plan.layer_names:
            weight = weight_of(switch, name)
            expected[name] = {
                SUBJECT: weight + weight_change(subject, name, weight),
                STYLE: weight + weight_change(style, name, weight),
            }

    def probe(*_):
        seen.append(
            [
                next(
                    (
                        levels
                        for levels, weight in expected[n].items()
                        if torch.equal(weight_of(switch, n), weight)
                    ),
                    None,
                )
                for n in plan.layer_names
            ]
        )

    hook = bench.denoiser.register_forward_pre_hook(probe)
    try:
        bench.image(steps=steps)
    finally:
        hook.remove()
        pipeline.scheduler = before
    assert [[tuple(levels) for levels in row.tolist()] for row in plan.strengths[clock]] == seen


@pytest.mark.parametrize("strengths", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.0), (0.0, 0.0)])
def test_a_layer_at_half_levels_is_that_of_the_loras_at_half_the_multipliers(bench, strengths):
    analysis, weights = bench.analysis(), []
    layers = analysis.plan.layer_names
    for multipliers, own in (
        ((0.7, 0.6), strengths),
        ([a * b for a, b in zip((0.7, 0.6), strengths, strict=True)], None),
    ):
        loras = [
            Lora(file, m) for file, m in zip((analysis.subject, analysis.style), multipliers, strict=True)
        ]
        switch = DiffusersSwitch(bench.denoiser, *loras)
        switch.attach()
        switch.apply(dict.fromkeys(layers, own or tuple(float(m > 0) for m in multipliers)))
        weights.append([weight_of(switch, name).clone() for name in layers])
        switch.detach()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_work_is_one_merge_a_layer_and_one_a_switch(sdxl, monkeypatch):
    merges = []
    monkeypatch.setattr(
        "klora.hosts.diffusers.weight_change", lambda *a: merges.append(a[1]) or weight_change(*a)
    )
    sdxl.image(steps=6)
    plan = sdxl.analysis(steps=6).plan
    assert len(merges) == len(plan.layer_names) + sum(map(len, plan.switches()))


def test_session_records_what_was_applied(sdxl):
    analysis = sdxl.analysis()
    switch = DiffusersSwitch(sdxl.denoiser, Lora(analysis.subject, 1.0), Lora(analysis.style, 1.0))
    with Session(analysis.plan, switch) as session:
        for index in (0, 1, 1):
            session.step(index)
    assert sorted(session.applied) == [0, 1]
    assert all((session.applied[index] == analysis.plan.strengths[index]).all() for index in (0, 1))


def test_text_encoder_rule(sdxl, tmp_path):
    """The text-encoder part of a LoRA applies where the rule says so, and only there."""
    tensors = load_file(sdxl.style)
    path = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    shape = sdxl.pipeline.text_encoder_2.text_model.encoder.layers[0].self_attn.q_proj.weight.shape
    tensors |= {
        f"{path}.lora_A.weight": torch.randn(4, shape[1]),
        f"{path}.lora_B.weight": torch.randn(shape[0], 4),
    }
    with_text = Bench("sdxl", sdxl.pipeline, tmp_path)
    save_file(tensors, with_text.style)
    assert dict(with_text.analysis().style.text_encoder_layers) == {"te2": 1}
    images = {
        rule: with_text.image(Settings(text_encoder=rule)) for rule in ("both", "subject", "style", "none")
    }
    assert (images["both"] == images["style"]).all()
    assert (images["subject"] == images["none"]).all()
    assert (images["both"] != images["none"]).any()


def test_the_one_text_encoder_of_sd15_has_what_the_rule_says(sd15, tmp_path):
    tensors = load_file(sd15.style)
    stem = "lora_te_text_model_encoder_layers_11_self_attn_v_proj"
    tensors |= {f"{stem}.lora_down.weight": torch.randn(4, 32), f"{stem}.lora_up.weight": torch.randn(32, 4)}
    with_text = Bench("sd15", sd15.pipeline, tmp_path)
    save_file(tensors, with_text.style)
    images = {rule: with_text.image(Settings(text_encoder=rule)) for rule in ("both", "style", "none")}
    assert (images["both"] == images["style"]).all()
    assert (images["both"] != images["none"]).any()


def test_weights_of_zero_give_the_plain_image(bench):
    plain = bench.pipeline(
        prompt="a cat",
        num_inference_steps=STEPS,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert (bench.image(Settings(subject_weight=0.0, style_weight=0.0)) == np.asarray(plain)).all()


def test_loras_of_another_base_are_refused_in_one_sentence(sdxl, flux):
    settings = Settings()
    with pytest.raises(PairError, match=r"made for FLUX but the model is SDXL"):
        fused_image(sdxl.pipeline, flux.analysis(), settings, Request("a", 0, STEPS, (64, 64)))
    with pytest.raises(
        PairError, match=r"subject.safetensors is made for FLUX but the style LoRA style.safetensors for SDXL"
    ):
        analyze(flux.subject, sdxl.style, replace(settings), steps=2)


def test_loras_of_other_sizes_are_refused_before_anything_is_scored(flux, tmp_path):
    tensors = load_file(flux.style)
    key = next(key for key in tensors if key.startswith("transformer.transformer_blocks.0.attn.to_k.lora_B"))
    tensors[key] = torch.cat([tensors[key], torch.full_like(tensors[key], torch.nan)])
    save_file(tensors, tmp_path / "style.safetensors")
    subject, style = (Lora(read_lora(path), 1.0) for path in (flux.subject, tmp_path / "style.safetensors"))
    rows, columns = subject.file.layers["double_blocks.0.img_attn.qkv:k"].shape
    with pytest.raises(
        PairError,
        match=r"LoRA style.safetensors does not fit the model: its layer double_blocks.0.img_attn.qkv:k is "
        rf"{2 * rows} × {columns} and there it is {rows} × {columns} ",
    ):
        DiffusersSwitch(flux.denoiser, subject, style)
