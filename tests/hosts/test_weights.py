"""At every evaluation of the denoiser the weight of every layer is the one that the host's own tag of the chosen LoRA makes.

The reference is the running host itself: its weights under <lora:subject:1> and under <lora:style:1>, by checksum.
"""

import pytest
from host import tag
from plans import plan_of

from klora.core.lora_file import read_lora

PIECES = {"q": 0, "k": 1, "v": 2, "mlp": 3}
SAMPLERS = [("Euler", 4), ("DPM++ 2M", 4), ("Heun", 4), ("DPM++ SDE", 4), ("Euler", 1), ("Euler", 12)]
HIRES = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, "hr_upscaler": "None", "hr_additional_modules": ["Use same choices"]}


@pytest.fixture(scope="module")
def fields(host):
    """What a request to this host needs beside the defaults, for its base model."""
    flux = read_lora(host.file(host.subject)).base == "flux"
    return {"sampler_name": "Euler", **({"scheduler": "Simple", "cfg_scale": 1} if flux else {})}


def weights_of(host, klora=None, **request):
    host.call("/klora-probe/v1/weights")
    host.pictures(klora, **request)
    status, calls = host.call("/klora-probe/v1/weights")
    assert status == 200, "link tests/hosts/probe into the WebUI's extensions and start it again"
    return calls


@pytest.fixture(scope="module")
def references(host, fields):
    """{Choice: checksums of all layers}: style alone, subject alone, both; and None for neither."""
    tags = {0: tag(host.style), 1: tag(host.subject), 2: tag(host.subject) + tag(host.style), None: ""}
    return {choice: weights_of(host, prompt="a cat" + text, **{**fields, "steps": 1})[0] for choice, text in tags.items()}


def checksum(weights, layer):
    path, _, piece = layer.partition(":")
    return weights[path][PIECES[piece] if piece else 0]


def assert_follows(calls, plan, clock, references):
    assert len(calls) == len(clock)
    for seen, step in zip(calls, clock, strict=True):
        wrong = [
            layer for layer, choice in zip(plan.layer_names, plan.selection[step].tolist(), strict=True)
            if checksum(seen, layer) != checksum(references[choice], layer)
        ]  # fmt: skip
        assert not wrong, f"step {step}: {len(wrong)} layers, {wrong[:3]}"
        ours = {layer.partition(":")[0] for layer in plan.layer_names}
        assert {path: seen[path] for path in seen if path not in ours} == {path: references[None][path] for path in seen if path not in ours}


@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS)
@pytest.mark.parametrize("schedule", ["s", "s*"])
def test_every_weight_is_the_chosen_loras_at_every_evaluation(host, sampler, steps, schedule, fields, references):
    calls = weights_of(host, {**host.pair, "schedule": schedule}, **{**fields, "sampler_name": sampler, "steps": steps})
    assert_follows(calls, plan_of(host, steps, schedule=schedule), host.facts.clocks[sampler, steps], references)


@pytest.mark.parametrize("selector", ["Fixed", "Random", "LoRA Switch", "Direct merge"])
def test_selectors_of_all_kinds(host, selector, fields, references):
    calls = weights_of(host, {**host.pair, "selector": selector}, **{**fields, "steps": 6})
    assert_follows(calls, plan_of(host, 6, seed=42, selector=selector), range(6), references)


@pytest.mark.parametrize(("rule", "steps", "clock"), [("continue", 6, [2, 3, 4, 5]), ("restart", 4, [0, 1, 2, 3])])
def test_the_hires_pass_follows_its_rule(host, rule, steps, clock, fields, references):
    calls = weights_of(host, {**host.pair, "hires": rule}, **fields, **HIRES)
    assert_follows(calls[:4], plan_of(host, 4), [0, 1, 2, 3], references)
    assert_follows(calls[4:], plan_of(host, steps), clock, references)


def test_hires_off_leaves_both_out_of_the_second_pass(host, fields, references):
    calls = weights_of(host, {**host.pair, "hires": "off"}, **fields, **HIRES)
    assert_follows(calls[:4], plan_of(host, 4), [0, 1, 2, 3], references)
    assert all(call == references[None] for call in calls[4:])


def test_every_picture_of_several_batches_starts_anew(host, fields, references):
    calls = weights_of(host, host.pair, **fields, n_iter=2, batch_size=2)
    for batch in (calls[:4], calls[4:]):
        assert_follows(batch, plan_of(host, 4), [0, 1, 2, 3], references)


def test_afterwards_every_weight_is_the_checkpoints(host, fields, references):
    weights_of(host, host.pair, **fields)
    assert all(call == references[None] for call in weights_of(host, **fields))
