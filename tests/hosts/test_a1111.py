"""What only AUTOMATIC1111 has: its options, and layers that keep the names of their networks."""

import pytest
from facts import A1111
from host import pixels, same, tag
from plans import plan_of

from klora.core.methods import STYLE, SUBJECT


@pytest.fixture(scope="module", autouse=True)
def only_there(host):
    if host.facts is not A1111:
        pytest.skip("not an A1111")


def test_functional_mode_keeps_the_promises(host, plain):
    """The option lora_functional adds networks to the outputs of the layers instead of to their weights."""
    with host.options(lora_functional=True):
        expected = host.image(prompt="a cat" + tag(host.subject))
        assert same(host.image({**host.pair, "method": "Subject only"}), expected)
        assert same(
            host.image({**host.pair, "method": "Direct merge"}),
            host.image(prompt="a cat" + tag(host.subject) + tag(host.style)),
        )
        functional = host.image(host.pair)
        assert same(host.image(host.pair), functional)
        assert not same(functional, expected)
        assert not same(functional, plain)
        assert same(host.image(), plain)


def assert_applied(host, calls, plan, clock):
    assert len(calls) == len(clock)
    names = {STYLE: [host.style], SUBJECT: [host.subject]}
    layers = ["diffusion_model_" + layer.replace(".", "_") for layer in plan.layer_names]
    for seen, step in zip(calls, clock, strict=True):
        levels = map(tuple, plan.strengths[step].tolist())
        wanted = {layer: names[pair] for layer, pair in zip(layers, levels, strict=True)}
        assert {layer: seen[layer] for layer in wanted} == wanted
        assert not any(kept for layer, kept in seen.items() if layer not in wanted)


@pytest.mark.parametrize(("sampler", "steps"), [("Euler a", 4), ("Heun", 4), ("DDIM", 4), ("Euler a", 30)])
@pytest.mark.parametrize("schedule", ["s", "s*"])
def test_layers_bear_the_names_of_the_plan_and_are_rewritten_only_when_they_switch(
    host, sampler, steps, schedule
):
    host.image()
    host.applied()
    host.image({**host.pair, "schedule": schedule}, sampler_name=sampler, steps=steps)
    calls, applies = host.applied()
    plan = plan_of(host, steps, schedule=schedule)
    assert_applied(host, calls, plan, host.clocks[sampler, steps])
    assert applies <= len(plan.layer_names) + sum(map(len, plan.switches()))


def test_a_lyco_tag_of_the_pair_is_the_pairs_too(host, fused):
    prompt = f"a cat{tag(host.other, 0)}<lyco:{host.subject}:0.3>"
    answer = host.answer(host.pair, prompt=prompt)
    assert same(pixels(answer["images"][0]), fused)
    assert "is applied once, by K-LoRA" in answer["info"]["extra_generation_params"]["K-LoRA warnings"]
