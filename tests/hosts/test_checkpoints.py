"""A second checkpoint: as a refiner within a pass, for the hires pass, and between runs."""

import os
import re
from contextlib import contextmanager

import pytest
from facts import NEO
from host import SAME_MODULES, pixels, same, tag
from plans import assert_follows, plan_of, references_of
from standin import ANOTHER_BASE

from klora.core.families import FAMILIES

REFINER_AT = {"refiner_switch_at": 0.5}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, "hr_upscaler": "None", **SAME_MODULES}


@pytest.fixture(scope="module", params=["of its own", "of the other one"])
def second_checkpoint(request, host):
    """Name of a checkpoint whose configuration file is its own or that of the first."""
    if request.param == "of the other one" and not host.facts.configurations:
        pytest.skip("this host has no configuration files")
    with host.another_checkpoint(request.param == "of its own") as name:
        yield name


@pytest.fixture(scope="module")
def plain(host, second_checkpoint):
    """An image of the checkpoint after it was loaded again.

    In A1111 its very first load differs from later ones by a grey level, without K-LoRA too.
    """
    host.image(override_settings={"sd_model_checkpoint": second_checkpoint})
    return host.image()


def test_the_refiner_stops_klora_at_the_model_change(host, fused, second_checkpoint):
    refiner = {"refiner_checkpoint": second_checkpoint, **REFINER_AT}
    without = host.weights(**refiner)
    calls = host.weights(host.pair, **refiner)
    arrays, info = host.images(host.pair, **refiner)
    first = int(re.search(r"K-LoRA stopped: in the first pass before step (\d)", info)[1]) - 1
    assert 0 < first < 4
    assert_follows(calls[:first], plan_of(host, 4), list(range(first)), references_of(host))
    assert calls[first:] == without[first:]
    assert without[0] != without[-1]
    assert same(arrays[0], host.image(host.pair, **refiner))
    assert not same(arrays[0], fused)
    assert same(host.image(host.pair), fused)


def test_after_a_refiner_the_next_image_of_the_batch_starts_with_klora_again(host, second_checkpoint):
    refiner = {"refiner_checkpoint": second_checkpoint, **REFINER_AT}
    first, second = host.images(host.pair, n_iter=2, **refiner)[0][-2:]
    assert same(first, host.image(host.pair, **refiner))
    assert same(second, host.image(host.pair, **refiner, seed=43))


def test_a_refiners_conditioning_is_not_taken_for_that_of_a_run_on_its_checkpoint(host, second_checkpoint):
    elsewhere = {"override_settings": {"sd_model_checkpoint": second_checkpoint}}
    expected = host.image(host.pair, **elsewhere)
    host.image(host.pair, refiner_checkpoint=second_checkpoint, **REFINER_AT)
    assert same(host.image(host.pair, **elsewhere), expected)


def test_another_checkpoint_between_runs_changes_nothing_for_the_first(host, plain, fused, second_checkpoint):
    elsewhere = {"override_settings": {"sd_model_checkpoint": second_checkpoint}}
    other = host.image(**elsewhere)
    assert not same(other, plain)
    other_fused = host.image(host.pair, **elsewhere)
    assert not same(other_fused, other)
    assert same(host.image(host.pair), fused)
    assert same(host.image(), plain)
    with host.options(sd_model_checkpoint=second_checkpoint):
        assert same(host.image(), other)
        assert same(host.image(host.pair), other_fused)
    assert same(host.image(host.pair), fused)


def test_a_hires_pass_on_another_checkpoint_has_the_pair_as_the_hosts_tags_would(
    host, plain, second_checkpoint
):
    fields = {**HIRES, "hr_checkpoint_name": second_checkpoint}
    prompt, alone = "a cat" + tag(host.other, 0.5), {**host.pair, "method": "Subject only"}
    expected = host.image(prompt=prompt + tag(host.subject), **fields)
    assert same(host.image(alone, prompt=prompt, **fields), expected)
    assert not same(host.image(alone, prompt=prompt, **HIRES), expected)
    for rule in ("subject", "none"):
        weight = "1" if rule == "subject" else "0:1"
        by_tag = host.image(prompt=f"a cat<lora:{host.subject}:{weight}>", **fields)
        assert same(host.image({**alone, "text_encoder": rule}, **fields), by_tag)


def test_a_hires_pass_on_another_checkpoint_follows_the_plan(host, fused, references, second_checkpoint):
    fields = {**HIRES, "hr_checkpoint_name": second_checkpoint}
    with host.options(sd_model_checkpoint=second_checkpoint):
        of_second = references_of(host)
    calls = host.weights(host.pair, n_iter=2, **fields)
    assert len(calls) == 16
    for first in (0, 8):
        assert_follows(calls[first : first + 4], plan_of(host, 4), [0, 1, 2, 3], references)
        assert_follows(calls[first + 4 : first + 8], plan_of(host, 6), [2, 3, 4, 5], of_second)
    answer = host.answer(host.pair, n_iter=2, **fields)
    assert "K-LoRA stopped" not in answer["info"]["infotexts"][0]
    assert "K-LoRA warnings" not in answer["info"]["extra_generation_params"]
    assert same(pixels(answer["images"][-1]), host.image(host.pair, seed=43, **fields))
    assert same(host.image(host.pair), fused)


def test_a_hires_pass_on_another_checkpoint_stays_out_if_the_user_wants_that(host, plain, second_checkpoint):
    fields = {**HIRES, "hr_checkpoint_name": second_checkpoint}
    own = host.weights(**fields)
    calls = host.weights({**host.pair, "hires": "off"}, **fields)
    assert calls[4:] == own[4:]
    assert calls[:4] != own[:4]


@contextmanager
def checkpoint_of_another_base(host, standin):
    """Its name; that of a running host is in KLORA_OTHER_BASE."""
    if host is not standin:
        if not os.environ.get("KLORA_OTHER_BASE"):
            pytest.skip("name a checkpoint of another base model in KLORA_OTHER_BASE")
        yield os.environ["KLORA_OTHER_BASE"]
        return
    first = host.folder / "models" / "Stable-diffusion" / host.checkpoint
    path = first.with_name("klora_test_another_base.safetensors")
    written = [path, path.with_suffix(".yaml")]
    try:
        path.write_bytes(first.read_bytes())
        written[1].write_text(ANOTHER_BASE)
        host.call("/sdapi/v1/refresh-checkpoints", {})
        yield path.name
    finally:
        for file in written:
            file.unlink(missing_ok=True)
        host.call("/sdapi/v1/refresh-checkpoints", {})


def test_a_hires_pass_on_another_base_model_goes_without_the_pair_and_that_is_said(
    host, standin, fused, references
):
    with checkpoint_of_another_base(host, standin) as name:
        fields = {**HIRES, "hr_checkpoint_name": name, "hr_prompt": "a cat" + tag(host.other)}
        own = host.weights(**fields)
        calls = host.weights(host.pair, n_iter=2, **fields)
        expected = host.answer(**fields)["info"]["infotexts"][0]
        answer = host.answer(host.pair, n_iter=2, **fields)
    for first in (0, 8):
        assert_follows(calls[first : first + 4], plan_of(host, 4), [0, 1, 2, 3], references)
        assert calls[first + 4 : first + 8] == own[4:]
    infotext = answer["info"]["infotexts"][0]
    assert "K-LoRA stopped: in the hires pass (the LoRAs do not fit its checkpoint)" in infotext
    said = answer["info"]["extra_generation_params"]["K-LoRA warnings"]
    assert f"the hires pass, on {name}, has neither LoRA of the pair. " in said
    assert f"load a checkpoint of {FAMILIES[host.base].short_name}" in said
    hashes = re.compile(r"Lora hashes: [^\n,]*")
    assert hashes.findall(infotext) == hashes.findall(expected)
    assert same(host.image(host.pair), fused)


@pytest.mark.parametrize("passes", ["second pass", "both"])
def test_the_infotext_says_in_which_pass_a_refiner_took_over(host, plain, second_checkpoint, passes):
    if host.facts is NEO:
        pytest.skip("this host has no refiner in a run with a hires pass")
    refiner = {**HIRES, "refiner_checkpoint": second_checkpoint, **REFINER_AT}
    with host.options(hires_fix_refiner_pass=passes):
        own = host.weights(**refiner)
        calls = host.weights(host.pair, **refiner)
        infotext = host.images(host.pair, **refiner)[1]
    said = re.search(
        r"K-LoRA stopped: ((?:in the first pass before step (\d) [^;]*; )?)"
        r"in the hires pass before step (\d)",
        infotext,
    )
    assert bool(said[1]) == (passes == "both")
    references = references_of(host)
    first, hires = int(said[2] or 5) - 1, int(said[3]) - 1
    assert_follows(calls[:first], plan_of(host, 4), list(range(first)), references)
    assert calls[first:4] == own[first:4]
    assert_follows(calls[4 : hires + 2], plan_of(host, 6), list(range(2, hires)), references)
    assert calls[hires + 2 :] == own[hires + 2 :]
