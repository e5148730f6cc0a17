"""What only AUTOMATIC1111 has: its options, and faults at its own functions."""

import pytest
from host import pixels, same, tag


def test_functional_mode_keeps_the_promises(host, plain):
    """The option lora_functional: networks are added to the outputs of the layers instead of to their weights."""
    with host.options(lora_functional=True):
        expected = host.picture(prompt="a cat" + tag(host.subject))
        assert same(host.picture({**host.pair, "selector": "Subject only"}), expected)
        assert same(host.picture({**host.pair, "selector": "Direct merge"}), host.picture(prompt="a cat" + tag(host.subject) + tag(host.style)))
        functional = host.picture(host.pair)
        assert same(host.picture(host.pair), functional)
        assert not same(functional, expected)
        assert not same(functional, plain)
        assert same(host.picture(), plain)


PLACES = ["load", "text encoder", "callback", "apply", "restore", "merge", "forward", "decode"]


@pytest.fixture(scope="module")
def calls_of_a_run(host, fused):
    """{place: how often the host's function there is called in one K-LoRA run after another prompt}."""
    host.call("/klora-probe/v1/counts")
    host.picture(prompt="a dog")
    host.call("/klora-probe/v1/counts")
    host.picture(host.pair)
    return host.call("/klora-probe/v1/counts")[1]


@pytest.mark.parametrize("kind", ["RuntimeError", "OutOfMemoryError"])
@pytest.mark.parametrize("where", [0, 0.6])
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_within_a_run_is_answered_and_leaves_nothing_behind(host, plain, fused, calls_of_a_run, place, where, kind):
    if where and calls_of_a_run[place] == 1:
        pytest.skip("called once a run")
    host.picture(prompt="a dog")
    with host.fault(place, 1 + int(calls_of_a_run[place] * where), kind):
        status, answer = host.request(host.pair)
    assert status >= 400
    assert "images" not in answer
    assert len(answer["errors"]) > 20
    if kind == "RuntimeError":
        assert same(host.picture(), plain)
    assert same(host.picture(host.pair), fused)


def test_a_fault_in_a_run_without_klora_does_not_touch_the_next_with_it(host, fused):
    with host.fault("forward", 2, "RuntimeError"):
        assert host.request(prompt="a cat" + tag(host.style))[0] >= 400
    answer = host.answer(host.pair)
    assert same(pixels(answer["images"][0]), fused)
