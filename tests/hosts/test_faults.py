"""A run that the user ends early, or that fails in one of the host's own functions, leaves nothing behind."""

import threading
import time

import pytest
from host import complaint, pixels, same, tag


@pytest.fixture(scope="module")
def calls_of_a_run(host, fused):
    """{place: how often the host's function there is called in one K-LoRA run after another prompt}."""
    host.counts()
    host.image(prompt="a dog")
    host.counts()
    host.image(host.pair)
    return host.counts()


@pytest.mark.parametrize("kind", ["RuntimeError", "OutOfMemoryError"])
@pytest.mark.parametrize("where", [0, 0.6])
def test_a_fault_within_a_run_is_answered_and_leaves_nothing_behind(
    host, plain, fused, calls_of_a_run, place, where, kind
):
    if where and calls_of_a_run[place] == 1:
        pytest.skip("called once a run")
    host.image(prompt="a dog")
    with host.fault(place, 1 + int(calls_of_a_run[place] * where), kind, host.facts.places[place]):
        status, answer = host.request(host.pair)
    assert status >= 400
    assert "images" not in answer
    assert len(complaint(answer)) > 20
    if kind == "RuntimeError":
        assert same(host.image(), plain)
    assert same(host.image(host.pair), fused)


@pytest.mark.parametrize(("where", "faults"), [(0, 1), (0.6, 1), (0.6, 3)])
def test_faults_that_a_retry_gets_over_do_not_change_the_image(
    host, fused, calls_of_a_run, retried_place, where, faults
):
    if faults >= host.facts.places[retried_place]:
        pytest.skip("no retry gets over so many")
    host.image(prompt="a dog")
    with host.fault(
        retried_place, 1 + int(calls_of_a_run[retried_place] * where), "OutOfMemoryError", faults
    ):
        assert same(host.image(host.pair), fused)
    assert same(host.image(host.pair), fused)


def test_a_fault_in_a_run_without_klora_does_not_touch_the_next_with_it(host, fused):
    with host.fault("forward", 2, "RuntimeError"):
        assert host.request(prompt="a cat" + tag(host.style))[0] >= 400
    answer = host.answer(host.pair)
    assert same(pixels(answer["images"][0]), fused)


@pytest.mark.parametrize("where", [0, 0.6])
def test_an_interrupt_anywhere_leaves_nothing_behind(host, plain, fused, calls_of_a_run, place, where):
    host.image(prompt="a dog")
    with host.fault(place, 1 + int(calls_of_a_run[place] * where), "interrupt"):
        assert host.request(host.pair)[0] == 200
    assert same(host.image(host.pair), fused)
    assert same(host.image(), plain)


def test_a_fault_after_the_last_step_does_not_cost_the_image(host, plain, fused):
    with host.fault("tell", 1, "RuntimeError"):
        assert same(host.image(host.pair), fused)
    assert same(host.image(), plain)


@pytest.mark.parametrize("end", ["interrupt", "skip"])
def test_a_run_cut_short_by_the_user_leaves_nothing_behind(host, fused, end):
    host.counts()
    thread = threading.Thread(target=lambda: host.request(host.pair, steps=40))
    thread.start()
    while not host.counts().get("forward"):
        time.sleep(0.1)
    host.call(f"/sdapi/v1/{end}", {})
    thread.join()
    assert same(host.image(host.pair), fused)
