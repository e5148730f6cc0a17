"""Beside the extensions that people run with K-LoRA, each installed in the running host: off, and on.

Skipped where the host has not the extension. docs/developing.md, tells what the tests need of it.
"""

import os

import pytest
from facts import A1111
from host import as_base64, pixels, same, tag
from plans import assert_follows, plan_of

from klora.core.methods import STYLE, SUBJECT

STEPS = [0, 1, 2, 3]
CONTINUED = [1, 2, 3]
"""The steps of a second pass at 0.6 of the noise: 3 of 4."""

DETECTOR = os.environ.get("KLORA_DETECTOR", "one_box.pt")
CONTROL = os.environ.get("KLORA_CONTROLNET", "tiny_t2i_sdxl")
WITHOUT_THE_PAIR = "another extension redrew a part of this image with neither LoRA of the pair"


def script(host, name):
    """What the host tells of the extension's always-on script."""
    status, scripts = host.call("/sdapi/v1/script-info")
    found = (
        [
            one
            for one in scripts
            if one["name"].startswith(name) and one["is_alwayson"] and not one["is_img2img"]
        ]
        if status == 200
        else []
    )
    if not found:
        pytest.skip(f"this host has no extension {name!r}")
    return found[0]


def using(host, name, changes, **fields):
    """Fields of a request with the extension's controls as its page has them, except for `changes`.

    These name a control by its label, or by its place if it has none.
    """
    of_host = script(host, name)
    args = [
        changes.get(control["label"] or place, control["value"])
        for place, control in enumerate(of_host["args"])
    ]
    return {"alwayson_scripts": {of_host["name"]: {"args": args}}, **fields}


def adetailer(host, on=True, **settings):
    fields = using(
        host,
        "adetailer",
        {"ADetailer": on, 2: {"ad_model": DETECTOR, "ad_denoising_strength": 0.6, **settings}},
    )
    if DETECTOR not in host.call("/adetailer/v1/ad_model")[1]["ad_model"]:
        pytest.skip(
            f"ADetailer has no detector {DETECTOR}: name one in KLORA_DETECTOR that finds one thing in any "
            "image"
        )
    return fields


def controlnet(host, image, on=True, **unit):
    unit = {"enabled": on, "image": as_base64(image), "module": "none", "model": "None", **unit}
    if unit["model"] == "None" and unit["module"] == "none":
        unit["model"] = CONTROL
    elif on and host.facts is not A1111:
        pytest.skip(
            "the ControlNet of the Forge family applies a reference to layers of 220 channels and more only"
        )
    fields = using(host, "controlnet", {0: unit})
    if unit["model"] == CONTROL and not any(
        CONTROL in name for name in host.call("/controlnet/model_list?update=true")[1]["model_list"]
    ):
        pytest.skip(f"ControlNet has no model {CONTROL}: name one for this checkpoint in KLORA_CONTROLNET")
    return fields


OFF = {
    "adetailer": lambda host, plain: adetailer(host, on=False),
    "controlnet": lambda host, plain: controlnet(host, plain, on=False, module="reference_only"),
    "dynamic prompts": lambda host, plain: using(host, "dynamic prompts", {"Dynamic Prompts enabled": False}),
    "lora block weight": lambda host, plain: using(host, "lora block weight", {"LoRA Block Weight": False}),
}
ON = {
    "controlnet with a model": lambda host, plain: controlnet(host, plain),
    "controlnet on the prompt's side only": lambda host, plain: controlnet(
        host, plain, control_mode="ControlNet is more important",
    ),
    "controlnet's reference_only": lambda host, plain: controlnet(host, plain, module="reference_only"),
    "dynamic prompts": lambda host, plain: using(host, "dynamic prompts", {}, prompt="a {dog|bird}"),
    "dynamic prompts with a LoRA": lambda host, plain: using(
        host, "dynamic prompts", {"Combinatorial generation": True},
        prompt=f"a {{cat{tag(host.other)}|dog{tag(host.other, 0.5)}}}",
    ),
    **{
        f"lora block weight {word}": lambda host, plain, word=word: using(
            host, "lora block weight", {}, prompt=f"a cat<lora:{host.other}:1:{word}>",
        )
        for word in ("lbw=OUTALL", "start=2", "stop=2", "lbw=INS:step=1-3")
    },
}  # fmt: skip


@pytest.fixture(params=OFF)
def off(request, host, plain):
    return OFF[request.param](host, plain)


@pytest.fixture(params=ON)
def on(request, host, plain):
    return {"prompt": "a cat", **ON[request.param](host, plain)}


@pytest.fixture
def switched_off(request, host, plain, on):
    """The same request with the extension off: what it does shows by the difference alone."""
    name = request.node.callspec.params["on"]
    make = next(make for opening, make in OFF.items() if name.startswith(opening))
    return {**on, **make(host, plain)}


def adding(fields, text):
    return {**fields, "prompt": fields["prompt"] + text}


def all_same(images, others):
    return len(images) == len(others) and all(map(same, images, others))


def warnings(answer):
    return answer["info"]["extra_generation_params"].get("K-LoRA warnings", "")


def test_installed_and_off_it_changes_nothing(host, off, plain, fused):
    assert same(host.image(**off), plain)
    assert same(host.image(host.pair, **off), fused)


def test_it_does_beside_the_pair_what_it_does_beside_the_hosts_own_tag(host, on, switched_off):
    alone, _ = host.images(**on)
    expected, _ = host.images(**adding(on, tag(host.subject)))
    seen, _ = host.images({**host.pair, "method": "Subject only"}, **on)
    assert all_same(seen, expected)
    assert not same(alone[0], host.image(**switched_off))
    assert not same(alone[0], expected[0])
    assert all_same(host.images(**on)[0], alone)


@pytest.mark.parametrize("klora", [False, True], ids=["off", "on"])
def test_controlnet_tells_the_prompts_side_from_the_negative_ones(host, plain, klora):
    """It does so in a method of the processing object, which it overrides.

    If that is lost, all its modes give the same image with reference_only.
    """
    modes = [
        controlnet(host, plain, module="reference_only", control_mode=mode)
        for mode in ("Balanced", "ControlNet is more important")
    ]
    balanced, more = (host.image(host.pair if klora else None, **fields) for fields in modes)
    assert not same(balanced, more)


def test_a_run_repeats_exactly_with_every_layer_as_planned_at_every_evaluation(host, on):
    first, _ = host.images(host.pair, **on)
    assert all_same(host.images(host.pair, **on)[0], first)
    references = {
        levels: host.weights(**adding(on, text))
        for levels, text in {STYLE: tag(host.style), SUBJECT: tag(host.subject), None: ""}.items()
    }
    calls = host.weights(host.pair, **on)
    assert calls
    assert len(calls) % len(STEPS) == 0
    for i, call in enumerate(calls):
        assert_follows(
            [call], plan_of(host, 4), [STEPS[i % 4]], {levels: seen[i] for levels, seen in references.items()}
        )


def test_what_is_wrong_with_a_request_is_said_as_ever(host, on):
    status, answer = host.request({**host.pair, "style": "nothing_of_this_name"}, **on)
    assert status == 422
    assert "no LoRA named 'nothing_of_this_name'" in answer["detail"]


@pytest.mark.parametrize("word", ["lbw=OUTALL", "start=2"])
def test_block_weights_in_a_tag_of_the_pair_itself_are_left_out_and_that_is_said(host, fused, word):
    fields = using(host, "lora block weight", {}, prompt=f"a cat<lora:{host.subject}:1:{word}>")
    answer = host.answer(host.pair, **fields)
    assert "the rest of its tag is ignored" in warnings(answer)
    assert same(host.image(host.pair, **fields), fused)


@pytest.fixture
def detailed(host, plain):
    fields = adetailer(host)
    assert not same(host.image(**fields), plain)
    return fields


@pytest.fixture
def listed(host, detailed):
    """With the K-LoRA script among those that run in ADetailer's passes."""
    names = host.values_of(["ad_script_names"])["ad_script_names"]
    with host.options(ad_script_names=f"{names},klora_script"):
        yield detailed


BATCHES = [{}, {"batch_size": 2, "n_iter": 2}]


def split(calls, batches):
    """(evaluations of the first passes, of ADetailer's)."""
    images, rounds = batches.get("batch_size", 1), batches.get("n_iter", 1)
    one = len(STEPS) + images * len(CONTINUED)
    assert len(calls) == rounds * one
    own = [call for first in range(0, len(calls), one) for call in calls[first : first + len(STEPS)]]
    return own, [
        call for first in range(0, len(calls), one) for call in calls[first + len(STEPS) : first + one]
    ]


@pytest.mark.parametrize("batches", BATCHES, ids=["one", "four"])
def test_adetailers_pass_has_neither_lora_unless_told_to_and_that_is_said(
    host, detailed, references, batches
):
    own, second = split(host.weights(host.pair, **detailed, **batches), batches)
    assert_follows(own, plan_of(host, 4), STEPS * batches.get("n_iter", 1), references)
    assert all(call == references[None] for call in second)
    answer = host.answer(host.pair, **detailed, **batches)
    assert WITHOUT_THE_PAIR in warnings(answer)
    assert "klora_script" in warnings(answer)
    again = host.answer(host.pair, **detailed, **batches)
    assert again["images"] == answer["images"]


@pytest.mark.parametrize("batches", BATCHES, ids=["one", "four"])
def test_with_the_script_listed_adetailers_pass_continues_the_schedule(host, listed, references, batches):
    own, second = split(host.weights(host.pair, **listed, **batches), batches)
    assert_follows(own, plan_of(host, 4), STEPS * batches.get("n_iter", 1), references)
    assert_follows(second, plan_of(host, 4), CONTINUED * (len(second) // len(CONTINUED)), references)
    answer = host.answer(host.pair, **listed, **batches)
    assert not warnings(answer)
    again = host.answer(host.pair, **listed, **batches)
    assert again["images"] == answer["images"]


@pytest.mark.parametrize("batches", BATCHES, ids=["one", "four"])
def test_with_the_script_listed_one_lora_alone_is_the_hosts_own_tag_in_both_passes(host, listed, batches):
    expected, _ = host.images(**listed, **batches, prompt="a cat" + tag(host.subject))
    assert all_same(host.images({**host.pair, "method": "Subject only"}, **listed, **batches)[0], expected)


@pytest.mark.parametrize("hook", ["process", "begin pass"])
def test_what_goes_wrong_in_adetailers_pass_is_said_with_the_image_it_leaves_as_it_was(
    host, listed, fused, hook
):
    host.counts()
    with host.fault(hook, 2, "RuntimeError"):
        answer = host.answer(host.pair, **listed)
    assert "could not redraw a part of this image: " in warnings(answer)
    assert "a fault of the test" in warnings(answer)
    assert same(pixels(answer["images"][0]), fused)


def test_without_klora_nothing_is_said(host, detailed):
    assert not warnings(host.answer(**detailed))
