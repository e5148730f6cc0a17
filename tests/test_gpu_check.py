"""The check for machines with a GPU (tests/gpu/check.py), as far as it can be tried without one."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from gpu import check

MIB = check.MIB
PAIR = [
    str(check.TESTS / "data" / "golden" / "sdxl_lokr" / f"{role}.safetensors")
    for role in ("subject", "style")
]
GOLDEN = ["--device", "cpu", "--golden", check.NO_SWITCH]
PAIRS = len(list((check.TESTS / "data" / "golden").glob("*/expected.json")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_has_checked_nothing(capsys):
    assert check.main([]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().out


def test_golden_pairs_are_right(capsys):
    assert check.main(GOLDEN) == 0
    assert capsys.readouterr().out.startswith(f"ok    {PAIRS} of {PAIRS} golden pairs")


@pytest.mark.parametrize("change", [{"subject_score": 1.0}, {"k": 5}, {"style_abs_sum": float("nan")}])
def test_a_wrong_score_is_seen(monkeypatch, capsys, change):
    real = check.score_pair

    def wrong(*pair, **more):
        scores = real(*pair, **more)
        first, *others = scores.layers
        return dataclasses.replace(scores, layers=(dataclasses.replace(first, **change), *others))

    monkeypatch.setattr(check, "score_pair", wrong)
    assert check.main(GOLDEN) == 1
    assert f"WRONG 0 of {PAIRS} golden pairs" in capsys.readouterr().out


def test_a_precision_left_changed_is_seen(monkeypatch, capsys):
    made = iter([torch.zeros(2), torch.ones(2)])
    monkeypatch.setattr(check, "product", lambda _device: next(made))
    monkeypatch.setattr(check, "error_of", lambda _found: 0.0)
    assert check.main(GOLDEN) == 1
    assert "products outside of it differ" in capsys.readouterr().out


def test_layers_done_on_the_cpu_are_counted_once_memory_is_taken_midway(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(check, "taken", lambda device, left: taken.append(left) or [])
    assert check.main(["--device", "cpu", "--short", check.MIDWAY, *PAIR]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert taken == [0]
    assert answer["on_cpu"] == answer["layers"] > 0


def test_memory_is_taken_but_for_what_is_to_be_left(monkeypatch):
    """Of a GPU whose driver fails before its memory is used up."""
    total, lost, held = 3000 * MIB + 12345, 100 * MIB, []

    def empty(size, **_more):
        if sum(held) + size > total - lost:
            raise torch.cuda.OutOfMemoryError
        held.append(size)
        return size

    free = SimpleNamespace(
        empty_cache=lambda: None,
        mem_get_info=lambda _index: (total - sum(held), total),
        OutOfMemoryError=torch.cuda.OutOfMemoryError,
    )
    monkeypatch.setattr(check, "torch", SimpleNamespace(cuda=free, empty=empty, uint8=torch.uint8))
    check.taken(torch.device("cuda", 0), 200 * MIB)
    assert 200 * MIB <= total - sum(held) < 201 * MIB
    check.taken(torch.device("cuda", 0), 0)
    assert total - lost - sum(held) < MIB
