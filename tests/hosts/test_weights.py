"""At every evaluation of the denoiser, every layer's weight is the one that the host's own tags make of it.

The reference is the running host itself: its weights under <lora:subject:1> and under <lora:style:1>, by
checksum.
"""

import pytest
from host import SAME_MODULES, as_base64, same
from plans import assert_follows, plan_of

HIRES = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, **SAME_MODULES}
FOUR = [0, 1, 2, 3]


def test_every_weight_is_the_chosen_loras_at_every_evaluation(host, timed, references):
    sampler, steps = timed
    calls = host.weights(host.pair, sampler_name=sampler, steps=steps)
    assert_follows(calls, plan_of(host, steps), host.clocks[timed], references)


@pytest.mark.parametrize(("sampler", "steps"), [("Euler", 1), ("Heun", 4), ("Euler", 12)])
def test_layers_that_switch_twice(host, sampler, steps, references):
    calls = host.weights({**host.pair, "schedule": "s*"}, sampler_name=sampler, steps=steps)
    assert_follows(calls, plan_of(host, steps, schedule="s*"), host.clocks[sampler, steps], references)


@pytest.mark.parametrize("method", ["Fixed", "Random", "LoRA Switch", "Direct merge"])
def test_methods_of_all_kinds(host, method, references):
    calls = host.weights({**host.pair, "method": method}, steps=6)
    assert_follows(calls, plan_of(host, 6, seed=42, method=method), range(6), references)


@pytest.mark.parametrize(("rule", "steps", "clock"), [("continue", 6, [2, 3, 4, 5]), ("restart", 4, FOUR)])
def test_the_hires_pass_follows_its_rule(host, upscaler, rule, steps, clock, references):
    klora, hires = {**host.pair, "hires": rule}, {**HIRES, "hr_upscaler": upscaler}
    calls = host.weights(klora, **hires)
    assert_follows(calls[:4], plan_of(host, 4), FOUR, references)
    assert_follows(calls[4:], plan_of(host, steps), clock, references)
    assert same(host.image(klora, **hires), host.image(klora, **hires))


def test_hires_off_leaves_both_out_of_the_second_pass(host, upscaler, references):
    calls = host.weights({**host.pair, "hires": "off"}, **HIRES, hr_upscaler=upscaler)
    assert_follows(calls[:4], plan_of(host, 4), FOUR, references)
    assert len(calls) == 8
    assert all(call == references[None] for call in calls[4:])


def test_img2img_continues_where_the_noise_level_stands(host, plain, references):
    calls = host.weights(host.pair, init_images=[as_base64(plain)], denoising_strength=0.5)
    assert_follows(calls, plan_of(host, 4), [1, 2, 3], references)


@pytest.mark.parametrize("fields", [
    {"prompt": "a [cat:dog:0.5]"}, {"prompt": "a cat AND a dog"}, {"cfg_scale": 1}, {"prompt": "a cat " * 60},
    {"batch_size": 2},
    {"n_iter": 2, "batch_size": 2}, {"s_min_uncond": 4.0},
])  # fmt: skip
def test_prompts_and_batches_of_all_kinds_keep_the_clock(host, fields, references):
    calls = host.weights(host.pair, **fields)
    assert len(calls) == 4 * fields.get("n_iter", 1)
    for first in range(0, len(calls), 4):
        assert_follows(calls[first : first + 4], plan_of(host, 4), FOUR, references)


def test_skip_early_cfg_keeps_the_clock(host, references):
    with host.options(skip_early_cond=0.5):
        assert_follows(host.weights(host.pair), plan_of(host, 4), FOUR, references)


def test_afterwards_every_weight_is_the_checkpoints(host, references):
    host.weights(host.pair)
    assert all(call == references[None] for call in host.weights())
