"""Scores and γ of a pair, on deltas from memory: K, γ, one-sided layers, errors, and no side effects."""

import contextlib
import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from memory_lora import MemoryLora, low_rank

from klora.core import layer_pass
from klora.core.deltas import Dense, LowRank, dense
from klora.core.profiles import TABLE_LENGTH
from klora.core.score_cache import ScoreCache
from klora.core.scores import profile_file, score_pair
from klora.errors import Cancelled, LoraFileError, PairError


def falling(delta):
    if isinstance(delta, LowRank):
        delta = Dense(delta.left.double() @ delta.right.double(), delta.scale, delta.rank)
    return (delta.values.double() * delta.scale).abs().flatten().sort(descending=True).values


def full(rows, columns, seed=0):
    return Dense(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), 0.1, None)


def pair(subject, style):
    return MemoryLora("subject.safetensors", subject), MemoryLora("style.safetensors", style)


def only_layer(scores):
    (layer,) = scores.layers
    return layer


@pytest.mark.parametrize(
    ("subject", "style", "k_scale", "k"),
    [
        (low_rank(60, 50, 4), low_rank(60, 50, 8), 1.0, 32),
        (low_rank(60, 50, 4), low_rank(60, 50, 8), 2.0, 64),
        (low_rank(60, 50, 4), low_rank(60, 50, 8), 0.33, 11),
        (low_rank(60, 50, 4), low_rank(60, 50, 8), 1e-9, 1),
        (low_rank(60, 50, 4), low_rank(60, 50, 8), 1e9, 3000),
        (low_rank(9, 9, 16), low_rank(9, 9, 16), 1.0, 81),
        (low_rank(200, 300, 200), low_rank(200, 300, 3), 1.0, 600),
        (full(60, 50), low_rank(60, 50, 8), 1.0, 64),
        (low_rank(60, 50, 4), full(60, 50), 1.0, 16),
        (low_rank(300, 300, 150), full(300, 300), 1.0, 22500),
        (full(60, 50), full(60, 50, 1), 1.0, 2500),
        (full(60, 50), full(60, 50, 1), 0.01, 25),
        (
            replace(low_rank(6, 5, 1), left=torch.empty(6, 0), right=torch.empty(0, 5), rank=0),
            low_rank(6, 5, 4),
            1.0,
            1,
        ),
    ],
)
def test_k_and_sums(subject, style, k_scale, k):
    other = low_rank(4, 4, 1)
    scores = score_pair(*pair({"a": subject, "z": other}, {"a": style, "z": other}), k_scale=k_scale)
    layer = scores.layers[0]
    assert (layer.name, layer.k, layer.only) == ("a", k, None)
    assert (layer.rank_subject, layer.rank_style) == (subject.rank, style.rank)
    for delta, score, abs_sum, frobenius in (
        (subject, layer.subject_score, layer.subject_abs_sum, layer.subject_energy),
        (style, layer.style_score, layer.style_abs_sum, layer.style_energy),
    ):
        values = falling(delta)
        assert score == pytest.approx(float(values[:k].sum()), rel=1e-6)
        assert abs_sum == pytest.approx(float(values.sum()), rel=1e-6)
        assert frobenius == pytest.approx(float(values.square().sum()), rel=1e-5)


def test_gamma_is_a_ratio_of_sums_over_shared_layers():
    subject = {"a": low_rank(30, 20, 2, 1), "b": low_rank(40, 20, 4, 2), "mine": low_rank(9, 9, 2, 3)}
    style = {
        "a": low_rank(30, 20, 3, 4),
        "b": low_rank(40, 20, 5, 5, scale=-7.0),
        "yours": low_rank(9, 9, 2, 6),
    }
    scores = score_pair(*pair(subject, style))
    expected = [sum(float(falling(deltas[name]).sum()) for name in "ab") for deltas in (subject, style)]
    assert scores.gamma == pytest.approx(expected[0] / expected[1], rel=1e-6)


@pytest.mark.parametrize("factor", [-2.0, 0.3, 1e-12, 1e12])
def test_uniform_rescaling_changes_scores_and_gamma_alike(factor):
    """So it changes no choice: r = S_subject / (γ S_style) stays."""
    subject, style = (
        {"a": low_rank(30, 20, 2, 1), "b": full(40, 20)},
        {"a": low_rank(30, 20, 3, 4), "b": full(40, 20, 1)},
    )
    before = score_pair(*pair(subject, style))
    after = score_pair(
        *pair({name: replace(delta, scale=delta.scale * factor) for name, delta in subject.items()}, style)
    )
    assert after.gamma == pytest.approx(before.gamma * abs(factor), rel=1e-9)
    for old, new in zip(before.layers, after.layers, strict=True):
        assert new.subject_score == pytest.approx(old.subject_score * abs(factor), rel=1e-9)
        assert new.style_score == old.style_score


def test_a_layer_of_one_file_is_listed_but_not_scored():
    scores = score_pair(
        *pair({"a": low_rank(3, 3, 1), "c": low_rank(3, 3, 2)}, {"a": low_rank(3, 3, 1), "b": full(3, 3)})
    )
    assert [layer.name for layer in scores.layers] == ["a", "b", "c"]
    sums = (
        "subject_score",
        "style_score",
        "subject_abs_sum",
        "style_abs_sum",
        "subject_energy",
        "style_energy",
    )
    for layer, only, ranks in zip(scores.layers[1:], ("style", "subject"), ((0, None), (2, 0)), strict=True):
        assert (layer.only, layer.k, layer.rank_subject, layer.rank_style) == (only, 0, *ranks)
        assert {getattr(layer, name) for name in sums} == {0.0}


def test_a_file_with_itself():
    lora = MemoryLora("same.safetensors", {"a": low_rank(30, 20, 2), "b": full(9, 8)})
    scores = score_pair(lora, lora)
    assert scores.gamma == 1.0
    assert all(layer.subject_score == layer.style_score > 0 for layer in scores.layers)
    assert sorted(lora.reads) == ["a", "b"]


@pytest.mark.parametrize(
    ("subject", "style", "words"),
    [
        (
            {"a": low_rank(3, 3, 1)},
            {"b": low_rank(3, 3, 1)},
            ["no layer in common", "put both into the prompt"],
        ),
        ({}, {}, ["no layer in common"]),
        ({"a": low_rank(3, 3, 1)}, {"a": low_rank(3, 4, 1)}, ["layer a", "3×3", "3×4", "same base model"]),
        (
            {"a": low_rank(3, 3, 1)},
            {"a": low_rank(3, 3, 1, scale=0.0)},
            ['"style.safetensors" changes nothing', "another file"],
        ),
        ({"a": full(3, 3), "b": full(3, 3)}, {"a": low_rank(3, 3, 1)}, None),
        (
            {"a": Dense(torch.zeros(3, 3), 1.0, None)},
            {"a": full(3, 3)},
            ['"subject.safetensors" changes nothing'],
        ),
    ],
)
def test_pairs_that_do_not_fit(subject, style, words):
    if words is None:
        assert score_pair(*pair(subject, style)).gamma > 0
        return
    with pytest.raises(PairError) as caught:
        score_pair(*pair(subject, style))
    for word in ['"subject.safetensors"', '"style.safetensors"', *words]:
        assert word in str(caught.value)


def test_pairs_that_do_not_fit_are_refused_before_any_layer_is_read():
    subject, style = pair({"a": low_rank(3, 3, 1)}, {"a": low_rank(3, 4, 1)})
    with pytest.raises(PairError):
        score_pair(subject, style)
    assert subject.reads == style.reads == []


def test_profile_of_a_file():
    deltas = {f"layer{i:02}": low_rank(20 + i, 30, 1 + i % 3, seed=i) for i in range(20)}
    profiles = profile_file(MemoryLora("a.safetensors", deltas), workers=3)
    assert list(profiles) == list(deltas)
    assert all(
        profiles[name].abs_sum == pytest.approx(float(dense(delta).abs().sum()), rel=1e-5)
        for name, delta in deltas.items()
    )
    assert all(profiles[name].top_sums.shape == (TABLE_LENGTH,) for name in deltas)


def many(count=30, seed=0):
    return {f"layer{i:02}": low_rank(64, 64, 2, seed=seed + i) for i in range(count)}


def test_progress_counts_both_files_and_comes_on_the_callers_thread():
    seen = []
    score_pair(
        *pair(many(), many(20, seed=99)), progress=lambda *at: seen.append((*at, threading.get_ident()))
    )
    assert seen == [(done, 50, threading.get_ident()) for done in range(1, 51)]


def test_progress_goes_on_through_the_extra_pass():
    seen = []
    score_pair(*pair(many(3), many(3, seed=9)), k_scale=1.3, progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == list(range(1, 13))
    assert seen[-1] == (12, 12)


class Slow(MemoryLora):
    def _read(self, name):
        time.sleep(0.02)
        return super()._read(name)


@pytest.mark.parametrize("after", [0, 1, 7])
def test_cancelled_between_layers(after):
    done = []
    subject, style = Slow("subject.safetensors", many()), Slow("style.safetensors", many(seed=99))
    with pytest.raises(Cancelled):
        score_pair(subject, style, progress=lambda *at: done.append(at), cancelled=lambda: len(done) >= after)
    assert len(done) == after
    assert after <= len(subject.reads) < len(subject.layers)
    assert style.reads == []


class Broken(MemoryLora):
    def _read(self, name):
        if name == "layer07":
            raise LoraFileError("broken.safetensors has NaN in layer07.")
        return super()._read(name)


def test_a_fault_of_the_file_reaches_the_caller():
    with pytest.raises(LoraFileError, match="NaN in layer07"):
        profile_file(Broken("broken.safetensors", many()), workers=2)


def in_new_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(params=[1, 2, 5])
def torch_threads(request):
    """A number of torch threads other than the default."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(
    not layer_pass._thread_count_is_per_thread(), reason="this torch has one thread count for all"
)
@pytest.mark.parametrize("lora", [MemoryLora("a", many()), Broken("b", many())])
def test_torch_threads_are_what_they_were(torch_threads, lora):
    """Of the caller, of threads that start later, and of threads that start meanwhile."""
    meanwhile = []
    with contextlib.suppress(LoraFileError):
        profile_file(
            lora,
            workers=3,
            progress=lambda *_: meanwhile.append(
                (torch.get_num_threads(), in_new_thread(torch.get_num_threads))
            ),
        )
    assert set(meanwhile) <= {(torch_threads, torch_threads)}
    assert torch.get_num_threads() == torch_threads
    assert in_new_thread(torch.get_num_threads) == torch_threads


@pytest.mark.skipif(
    not layer_pass._thread_count_is_per_thread(), reason="this torch has one thread count for all"
)
def test_workers_use_one_torch_thread(torch_threads):
    seen = set()

    class Spy(MemoryLora):
        def _read(self, name):
            seen.add((torch.get_num_threads(), threading.get_ident()))
            return super()._read(name)

    profile_file(Spy("spy.safetensors", many()), workers=2)
    assert {count for count, _ in seen} == {1}
    assert threading.get_ident() not in {thread for _, thread in seen}


def test_two_pairs_at_once():
    loras = pair(many(), many(seed=99))
    expected = score_pair(*loras)
    found = []
    threads = [threading.Thread(target=lambda: found.append(score_pair(*loras))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_under_inference_mode_and_another_default_type():
    loras = pair(many(4), many(4, seed=99))
    expected = score_pair(*loras)
    with torch.inference_mode():
        torch.set_default_dtype(torch.float64)
        try:
            assert score_pair(*loras) == expected
        finally:
            torch.set_default_dtype(torch.float32)


# --- with a cache


def files(folder, subject, style):
    """A pair whose files exist; the cache looks at their bytes, the deltas are from memory."""
    loras = []
    for name, deltas in (("subject", subject), ("style", style)):
        path = folder / f"{name}.safetensors"
        path.write_bytes(name.encode())
        loras.append(MemoryLora(path, deltas))
    return loras


@pytest.mark.parametrize("k_scale", [1.0, 0.7])
def test_a_pair_seen_before_is_not_read_again(tmp_path, k_scale):
    subject, style = files(
        tmp_path, many() | {"full": full(50, 40)}, many(seed=99) | {"full": full(50, 40, 1)}
    )
    first = score_pair(subject, style, k_scale=k_scale, cache=ScoreCache(tmp_path / "cache"))
    reads = len(subject.reads)
    assert reads > 30
    seen = []
    again = score_pair(
        subject,
        style,
        k_scale=k_scale,
        cache=ScoreCache(tmp_path / "cache"),
        progress=lambda *at: seen.append(at),
    )
    assert again == first
    assert seen == []
    assert len(subject.reads) == reads
    swapped = score_pair(style, subject, k_scale=k_scale, cache=ScoreCache(tmp_path / "cache"))
    assert swapped.gamma == pytest.approx(1 / first.gamma)
    assert len(subject.reads) == reads


def test_another_k_reads_only_the_layers_it_misses(tmp_path):
    subject, style = files(
        tmp_path, many(5) | {"b": low_rank(9, 9, 3)}, many(5, seed=99) | {"b": low_rank(9, 9, 2)}
    )
    cache = ScoreCache(tmp_path / "cache")
    score_pair(subject, style, cache=cache)
    del subject.reads[:], style.reads[:]
    scores = score_pair(subject, style, k_scale=0.5, cache=cache)
    assert (subject.reads, style.reads) == ([], ["b"]), (
        "K = 3 is in the table of rank 3, not in that of rank 2"
    )
    assert [layer.k for layer in scores.layers] == [3, 2, 2, 2, 2, 2]


def test_a_profile_of_other_layers_than_the_file_is_read_as_is_not_used(tmp_path):
    subject, style = files(tmp_path, many(3), many(3, seed=99))
    cache = ScoreCache(tmp_path / "cache")
    score_pair(subject, style, cache=cache)
    changed = MemoryLora(subject.path, {f"{name}:q": delta for name, delta in subject.deltas.items()})
    other = MemoryLora(style.path, {f"{name}:q": delta for name, delta in style.deltas.items()})
    scores = score_pair(changed, other, cache=cache)
    assert [layer.name for layer in scores.layers] == ["layer00:q", "layer01:q", "layer02:q"]
    assert math.isfinite(scores.gamma)


def test_a_file_replaced_while_it_is_scored_is_not_stored_under_its_new_content(tmp_path):
    subject, style = files(tmp_path, many(3), many(3, seed=99))
    cache = ScoreCache(tmp_path / "cache")
    score_pair(subject, style, cache=cache, progress=lambda *_: subject.path.write_bytes(b"another file"))
    assert cache.load(cache.content(subject.path)) is None
    assert cache.load(cache.content(style.path)) is not None


# --- among others


class OtherCache:
    """A cache that hashes for as long as the test lets it."""

    def __init__(self):
        self.may_end = threading.Event()

    def content(self, path, state):
        assert self.may_end.wait(20)

    def load(self, content):
        pytest.fail("nothing is known of it")


def test_hashing_a_file_is_not_waited_for_once_the_call_is_given_up():
    cache, start = OtherCache(), time.monotonic()
    with pytest.raises(Cancelled):
        score_pair(*pair(many(), many(seed=99)), cache=cache, cancelled=lambda: True)
    assert time.monotonic() - start < 5
    cache.may_end.set()


def test_what_is_known_already_is_told_even_when_nothing_may_be_computed(tmp_path):
    loras, cache = files(tmp_path, many(3), many(3, seed=99)), ScoreCache(tmp_path / "cache")
    known = score_pair(*loras, cache=cache)
    assert score_pair(*loras, cache=cache, cancelled=lambda: True, turn=pytest.fail) == known


class Machine:
    """Lets one at a time have it.

    Attributes:
        turns: how often it was had.
        had: whether it is now.
    """

    def __init__(self):
        self.turns, self.had = 0, False

    @contextlib.contextmanager
    def turn(self):
        assert not self.had
        self.turns, self.had = self.turns + 1, True
        try:
            yield
        finally:
            self.had = False


def test_the_machine_is_had_for_each_pass_and_for_nothing_else():
    machine, had = Machine(), []

    class Spy(MemoryLora):
        def _read(self, name):
            had.append(machine.had)
            return super()._read(name)

    loras = Spy("subject.safetensors", many(4)), Spy("style.safetensors", many(4, seed=99))
    score_pair(*loras, turn=machine.turn)
    assert (machine.turns, set(had)) == (2, {True})
    score_pair(*loras, k_scale=1.3, turn=machine.turn)
    assert machine.turns == 6
    assert not machine.had


def test_the_machine_is_given_back_by_a_call_that_is_given_up_or_fails():
    machine = Machine()
    with pytest.raises(Cancelled):
        score_pair(
            *pair(many(), many(seed=99)),
            turn=machine.turn,
            progress=lambda *at: machine.__setattr__("seen", at),
            cancelled=lambda: hasattr(machine, "seen"),
        )
    with pytest.raises(LoraFileError):
        score_pair(Broken("broken", many()), Broken("style", many()), turn=machine.turn)
    assert (machine.turns, machine.had) == (2, False)


def test_a_file_that_was_scored_while_this_call_waited_is_not_read_again(tmp_path):
    loras, cache = files(tmp_path, many(3), many(3, seed=99)), ScoreCache(tmp_path / "cache")
    others = files(tmp_path, many(3), many(3, seed=99))

    @contextlib.contextmanager
    def turn():
        score_pair(*others, cache=ScoreCache(tmp_path / "cache"))
        yield

    scores = score_pair(*loras, cache=cache, turn=turn)
    assert (loras[0].reads, loras[1].reads) == ([], [])
    assert scores == score_pair(*others)
