"""Profiles and Top-K sums against a float64 evaluation of the whole delta."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from memory_lora import low_rank

from klora.core import topk
from klora.core.adapters.loha import Hadamard
from klora.core.adapters.lokr import Kronecker
from klora.core.deltas import Dense, LowRank
from klora.core.profiles import TABLE_LENGTH, LayerProfile, table_k
from klora.core.topk import new_buffer, profile, top_sum

CPU = torch.device("cpu")

SIDES = st.integers(1, 24)
FILLS = st.sampled_from(["normal", "heavy tails", "few values", "equal", "zero", "sparse rows"])
EXPONENTS = st.integers(-40, 40)


def fill(shape, kind, exponent, seed):
    random = np.random.default_rng(seed)
    values = {
        "normal": lambda: random.standard_normal(shape),
        "heavy tails": lambda: random.standard_normal(shape) * np.exp(3 * random.standard_normal(shape)),
        "few values": lambda: random.integers(-1, 2, shape),
        "equal": lambda: np.full(shape, -3.0),
        "zero": lambda: np.zeros(shape),
        "sparse rows": lambda: (
            random.standard_normal(shape) * (random.random((shape[0],) + (1,) * (len(shape) - 1)) < 0.3)
        ),
    }[kind]()
    return torch.tensor(np.ldexp(values, exponent), dtype=torch.float32)


@st.composite
def deltas(draw, exponents=EXPONENTS):
    rows, columns, inner, seed = (
        draw(SIDES),
        draw(SIDES),
        draw(st.integers(0, 6)),
        draw(st.integers(0, 2**32)),
    )
    scale = draw(st.sampled_from([1.0, -0.25, 1e-20, 3e7]))

    def factor(*shape):
        return fill(shape, draw(FILLS), draw(exponents), (seed, *shape))

    kind = draw(st.sampled_from(["low rank", "hadamard", "kronecker", "dense"]))
    if kind == "low rank":
        return LowRank(factor(rows, inner), factor(inner, columns), scale, inner)
    if kind == "hadamard":
        return Hadamard(
            factor(rows, inner),
            factor(inner, columns),
            factor(rows, inner),
            factor(inner, columns),
            scale,
            inner,
        )
    rank = draw(st.sampled_from([None, 1, 4]))
    if kind == "kronecker":
        return Kronecker(
            factor(draw(st.integers(1, 5)), 3),
            factor(draw(st.integers(1, 5)), 4, draw(st.sampled_from([1, 9]))),
            scale,
            rank,
        )
    return Dense(factor(rows, columns), scale, rank)


def reference(delta):
    """|ΔW| in float64, flat, falling; and the most that float32 rounding may add to an entry."""
    if isinstance(delta, LowRank):
        values = delta.left.double() @ delta.right.double()
        bound = delta.left.double().abs() @ delta.right.double().abs()
    elif isinstance(delta, Hadamard):
        values = (delta.left1.double() @ delta.right1.double()) * (
            delta.left2.double() @ delta.right2.double()
        )
        bound = (delta.left1.double().abs() @ delta.right1.double().abs()) * (
            delta.left2.double().abs() @ delta.right2.double().abs()
        )
    elif isinstance(delta, Kronecker):
        values = bound = torch.einsum("ab,cds->acbds", delta.first.double(), delta.second.double())
    else:
        values = bound = delta.values.double()
    falling = values.abs().flatten().sort(descending=True).values.numpy() * abs(delta.scale)
    return falling, float(bound.abs().max()) * abs(delta.scale) * 1e-6


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def route(request, monkeypatch):
    """Every test on both routes; the one for a GPU runs on any device."""
    if request.param == "gpu":
        monkeypatch.setattr(
            topk, "_scan_cpu", lambda delta, k, buffer, check: topk._scan_gpu(delta, k, check)
        )
    return request.param


def small_blocks(numel):
    """Blocks so small that little matrices have many."""
    return patch.multiple(topk, BLOCK_NUMEL=numel, GPU_BLOCK_NUMEL=numel, SAMPLE_NUMEL=8)


LARGE = torch.tensor([[-574196.0]])


@settings(max_examples=400, deadline=None)
@given(delta=deltas(), block=st.sampled_from([1, 7, 32, 200, 1 << 18]))
@example(delta=Hadamard(LARGE, LARGE, LARGE, LARGE, 1.0, 1), block=1)
def test_profile_equals_float64(delta, block):
    falling, rounding = reference(delta)
    with small_blocks(block):
        found = profile(delta, new_buffer(CPU))
    running = np.concatenate([[0.0], np.cumsum(falling)])
    ks = np.minimum([table_k(delta.rank, n) for n in range(1, TABLE_LENGTH + 1)], falling.size)
    assert (found.rank, found.numel) == (delta.rank, falling.size)
    assert found.top_sums.dtype == np.float64
    assert np.all(np.abs(found.top_sums - running[ks]) <= 1e-5 * running[ks] + rounding * ks)
    assert found.abs_sum == pytest.approx(running[-1], rel=1e-5, abs=rounding * falling.size)
    assert found.squared_sum == pytest.approx(
        (falling**2).sum(), rel=1e-5, abs=rounding * falling.sum() + rounding**2 * falling.size
    )


@settings(max_examples=400, deadline=None)
@given(delta=deltas(), share=st.floats(0, 1.2), block=st.sampled_from([1, 7, 32, 200, 1 << 18]))
def test_top_sum_equals_float64(delta, share, block):
    falling, rounding = reference(delta)
    k = max(1, round(share * falling.size))
    with small_blocks(block):
        found = top_sum(delta, k, new_buffer(CPU))
    assert found == pytest.approx(falling[:k].sum(), rel=1e-5, abs=rounding * min(k, falling.size))


@settings(max_examples=100, deadline=None)
@given(delta=deltas(), k=st.integers(1, 200))
def test_profile_tells_what_top_sum_finds(delta, k):
    found = profile(delta, new_buffer(CPU)).top_sum(k)
    assume(found is not None)
    assert found == pytest.approx(top_sum(delta, k, new_buffer(CPU)), rel=1e-6, abs=1e-300)


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(640, 640, 4), (1280, 2048, 16), (320, 1280, 128), (1, 5000, 2), (5000, 1, 2)],
)
def test_real_sizes(rows, columns, rank):
    delta = low_rank(rows, columns, rank)
    falling, _ = reference(delta)
    found = profile(delta, new_buffer(CPU))
    ks = np.minimum(rank * np.arange(1, TABLE_LENGTH + 1), falling.size)
    assert found.top_sums == pytest.approx(np.cumsum(falling)[ks - 1], rel=1e-6)
    assert found.abs_sum == pytest.approx(falling.sum(), rel=1e-6)
    assert found.squared_sum == pytest.approx((falling**2).sum(), rel=1e-5)


@pytest.mark.parametrize("exponent", [-140, -126, 100, 120])
def test_factors_at_the_ends_of_float32(exponent):
    """Their products leave float32; denormals of a factor count."""
    delta = LowRank(fill((30, 3), "normal", exponent, 1), fill((3, 40), "normal", exponent, 2), 1.0, 3)
    falling, _ = reference(delta)
    assert falling[0] > 0
    found = profile(delta, new_buffer(CPU))
    assert found.top_sums[0] == pytest.approx(falling[:3].sum(), rel=1e-5)
    assert found.abs_sum == pytest.approx(falling.sum(), rel=1e-5)


def test_rising_rows_and_late_peaks():
    """Each block outdoes all before it."""
    left = torch.arange(1.0, 2001.0)[:, None]
    delta = Dense(left * torch.ones(1, 700), 1.0, 8)
    assert profile(delta, new_buffer(CPU)).top_sums[-1] == pytest.approx(700 * 2000 + 324 * 1999, rel=1e-7)


def test_ties_at_the_edge_count_as_often_as_k_asks():
    values = torch.ones(300, 300)
    values[7, 7] = 5.0
    assert top_sum(Dense(values, 1.0, 8), 1000, new_buffer(CPU)) == 5 + 999


def test_all_entries_is_the_abs_sum():
    delta = low_rank(50, 60, 4)
    found = profile(delta, new_buffer(CPU))
    assert top_sum(delta, 3000, new_buffer(CPU)) == pytest.approx(found.abs_sum, rel=1e-6)
    assert found.top_sum(3000) == found.top_sum(10**9) == found.abs_sum


def test_rank_zero_is_all_zero():
    found = profile(LowRank(torch.empty(5, 0), torch.empty(0, 6), 1.0, 0), new_buffer(CPU))
    assert found.abs_sum == found.squared_sum == found.top_sums.sum() == 0
    assert found.top_sum(1) == 0


def test_a_profile_says_none_where_it_does_not_know():
    ranked = profile(low_rank(200, 200, 4), new_buffer(CPU))
    full = profile(Dense(torch.randn(200, 200), 1.0, None), new_buffer(CPU))
    assert [ranked.top_sum(k) is None for k in (3, 4, 6, 4 * 128, 4 * 129)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert [full.top_sum(k) is None for k in (1, 3, 16, 128**2, 129**2)] == [False, True, False, False, True]


def test_factors_are_left_as_they_were(route):
    for delta in (low_rank(40, 50, 4), Dense(torch.randn(40, 50), 1.0, 4)):
        before = [value.clone() for value in vars(delta).values() if isinstance(value, torch.Tensor)]
        profile(delta, new_buffer(CPU))
        assert all(
            map(
                torch.equal,
                before,
                (value for value in vars(delta).values() if isinstance(value, torch.Tensor)),
            )
        )


def test_one_buffer_serves_layers_of_all_sizes():
    buffer = new_buffer(CPU)
    for rows, columns in ((3, 2 << 18), (700, 900), (2, 2), (700, 900)):
        delta = low_rank(rows, columns, 2, seed=columns)
        assert profile(delta, buffer).abs_sum == pytest.approx(
            float((delta.left @ delta.right).abs().sum() * 0.5), rel=1e-5
        )


def test_table_k_is_the_product_of_ranks():
    assert table_k(8, 4) == 32
    assert table_k(None, 4) == 16
    assert isinstance(LayerProfile(None, 9, 1.0, 1.0, np.ones(128)).top_sum(4), float)
    assert math.isclose(LayerProfile(2, 999, 1.0, 1.0, np.arange(128.0)).top_sum(6), 2.0)
