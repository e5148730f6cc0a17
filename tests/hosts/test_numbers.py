"""Numbers at the ends of what a user can ask for."""

import pytest
import torch
from host import same, tag
from plans import assert_follows, plan_of, references_of
from safetensors.torch import load_file

DTYPES = [name for name in ("float16", "bfloat16", "float8_e4m3fn") if hasattr(torch, name)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_in_few_bits_fuses_as_the_same_numbers_in_float32(host, dtype):
    few = {
        key: value.to(getattr(torch, dtype)) if value.dim() > 1 else value
        for key, value in load_file(host.file(host.subject)).items()
    }
    many = {key: value.float() for key, value in few.items()}
    with host.more_loras(klora_test_few=few, klora_test_many=many):
        fused = [
            host.image({"subject": name, "style": host.style})
            for name in ("klora_test_few", "klora_test_many")
        ]
        assert same(*fused)
        alone = host.image({"subject": "klora_test_few", "style": host.style, "method": "Subject only"})
        assert same(alone, host.image(prompt="a cat" + tag("klora_test_few")))


def test_a_lora_of_network_alpha_zero_is_refused_with_a_sentence(host):
    zero = {
        key: torch.zeros_like(value) if key.endswith(".alpha") else value
        for key, value in load_file(host.file(host.subject)).items()
    }
    with host.more_loras(klora_test_zero=zero):
        status, answer = host.request({"subject": "klora_test_zero", "style": host.style})
    assert status == 422
    assert "changes nothing on the layers it shares" in answer["detail"]


@pytest.mark.parametrize(("weights", "tags"), [((-1, 1), (-1, 1)), ((0, 1), (0, 1)), ((0, 0), (0, 0))])
def test_weights_of_nought_and_below_are_the_hosts_own(host, weights, tags):
    settings = {
        **host.pair,
        "subject_weight": weights[0],
        "style_weight": weights[1],
        "method": "Direct merge",
    }
    assert same(
        host.image(settings),
        host.image(prompt="a cat" + tag(host.subject, tags[0]) + tag(host.style, tags[1])),
    )


def test_weights_never_change_the_choice(host):
    references = references_of(host, subject=0.5, style=-1)
    calls = host.weights({**host.pair, "subject_weight": 0.5, "style_weight": -1})
    assert_follows(calls, plan_of(host, 4), [0, 1, 2, 3], references)


@pytest.mark.parametrize(
    "fields", [{"steps": 150, "sampler_name": "Euler"}, {"batch_size": 8}, {"steps": 1, "cfg_scale": 1}]
)
def test_many_steps_many_images_and_one_step_without_guidance_follow_the_plan(host, references, fields):
    steps = fields.get("steps", 4)
    assert_follows(host.weights(host.pair, **fields), plan_of(host, steps), range(steps), references)
