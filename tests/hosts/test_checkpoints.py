"""A second checkpoint: as a refiner within a run, and between runs."""

import re

import pytest
from host import same
from plans import assert_follows, plan_of, references_of

REFINER_AT = {"refiner_switch_at": 0.5}


@pytest.fixture(scope="module", params=["of its own", "of the other one"])
def second_checkpoint(request, host):
    """Name of a checkpoint whose configuration file is its own or that of the first."""
    if request.param == "of the other one" and not host.facts.configurations:
        pytest.skip("this host has no configuration files")
    with host.another_checkpoint(request.param == "of its own") as name:
        yield name


@pytest.fixture(scope="module")
def plain(host, second_checkpoint):
    """Of the checkpoint loaded anew: its very first load differs from any later one by a grey level in A1111, without K-LoRA too."""
    host.picture(override_settings={"sd_model_checkpoint": second_checkpoint})
    return host.picture()


def test_the_refiner_stops_klora_at_the_model_change(host, fused, second_checkpoint):
    refiner = {"refiner_checkpoint": second_checkpoint, **REFINER_AT}
    without = host.weights(**refiner)
    calls = host.weights(host.pair, **refiner)
    arrays, info = host.pictures(host.pair, **refiner)
    first = int(re.search(r"K-LoRA stopped: at the model change before step (\d)", info)[1]) - 1
    assert 0 < first < 4
    assert_follows(calls[:first], plan_of(host, 4), list(range(first)), references_of(host))
    assert calls[first:] == without[first:]
    assert without[0] != without[-1]
    assert same(arrays[0], host.picture(host.pair, **refiner))
    assert not same(arrays[0], fused)
    assert same(host.picture(host.pair), fused)


def test_after_a_refiner_the_next_picture_of_the_batch_starts_with_klora_again(host, second_checkpoint):
    refiner = {"refiner_checkpoint": second_checkpoint, **REFINER_AT}
    first, second = host.pictures(host.pair, n_iter=2, **refiner)[0][-2:]
    assert same(first, host.picture(host.pair, **refiner))
    assert same(second, host.picture(host.pair, **refiner, seed=43))


def test_a_refiners_conditioning_is_not_taken_for_that_of_a_run_on_its_checkpoint(host, second_checkpoint):
    elsewhere = {"override_settings": {"sd_model_checkpoint": second_checkpoint}}
    expected = host.picture(host.pair, **elsewhere)
    host.picture(host.pair, refiner_checkpoint=second_checkpoint, **REFINER_AT)
    assert same(host.picture(host.pair, **elsewhere), expected)


def test_another_checkpoint_between_runs_changes_nothing_for_the_first(host, plain, fused, second_checkpoint):
    elsewhere = {"override_settings": {"sd_model_checkpoint": second_checkpoint}}
    other = host.picture(**elsewhere)
    assert not same(other, plain)
    other_fused = host.picture(host.pair, **elsewhere)
    assert not same(other_fused, other)
    assert same(host.picture(host.pair), fused)
    assert same(host.picture(), plain)
    with host.options(sd_model_checkpoint=second_checkpoint):
        assert same(host.picture(), other)
        assert same(host.picture(host.pair), other_fused)
    assert same(host.picture(host.pair), fused)
