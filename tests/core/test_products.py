"""Products are exact whatever the process allows, even on (emulated) machines that round factors."""

import json
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_lora import MemoryLora, low_rank

from klora.core import deltas, topk
from klora.core.adapters import loha, lokr
from klora.core.lora_file import read_lora
from klora.core.products import product, second_axis_product, tf32_parts
from klora.core.scores import profile_file, score_pair
from klora.errors import LoraFileError

GOLDEN = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*/expected.json"))
NEW_SWITCHES = hasattr(torch.backends, "fp32_precision")
MM = torch.mm


def rounded(values, bits):
    """float32 values with so many significant bits, as hardware rounds them."""
    step = 1 << (24 - bits)
    whole = values.contiguous().view(torch.int32) + (step >> 1)
    return (whole & -step).view(torch.float32)


def rounding_mm(bits):
    """torch.mm of a machine that rounds the factors of float32 products."""

    def mm(left, right, out=None):
        factors = (
            (left, right) if left.dtype is not torch.float32 else (rounded(left, bits), rounded(right, bits))
        )
        return MM(*factors, out=out)

    return mm


def seen_switches():
    """All that tells how float32 products are made."""
    if not NEW_SWITCHES:
        return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    backends = torch.backends
    return tuple(
        place.fp32_precision
        for place in (backends, backends.mkldnn, backends.mkldnn.matmul, backends.cuda.matmul)
    )


@contextmanager
def set_by_a_host(switch, value):
    """With a switch of torch set as a host or another extension sets it."""
    before = torch.get_float32_matmul_precision()
    try:
        if switch == "precision":
            torch.set_float32_matmul_precision(value)
        elif switch == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = value
        else:
            torch.backends.mkldnn.matmul.fp32_precision = value
        yield
    finally:
        if switch == "mkldnn":
            torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


SWITCHES = [
    ("precision", "highest"), ("precision", "high"), ("precision", "medium"), ("allow_tf32", True),
    *([("mkldnn", "bf16"), ("mkldnn", "tf32")] if NEW_SWITCHES else []),
]  # fmt: skip


@pytest.fixture(params=SWITCHES, ids=lambda switch: "-".join(map(str, switch)))
def switch(request):
    with set_by_a_host(*request.param):
        yield request.param


def equals_the_oracle(folder):
    expected = json.loads((folder / "expected.json").read_text())
    scores = score_pair(read_lora(folder / "subject.safetensors"), read_lora(folder / "style.safetensors"))
    if scores.gamma != pytest.approx(expected["gamma"], rel=1e-5):
        return False
    names = ("subject_score", "style_score", "subject_abs_sum", "style_abs_sum")
    return all(
        [getattr(layer, name) for name in names] == pytest.approx([known[name] for name in names], rel=1e-5)
        for layer, known in zip(scores.layers, expected["layers"], strict=True)
    )


@pytest.mark.parametrize("expected", GOLDEN, ids=lambda path: path.parent.name)
def test_golden_pairs_are_the_oracles_whatever_a_host_has_set(expected, switch):
    assert equals_the_oracle(expected.parent)


@pytest.mark.parametrize("expected", GOLDEN, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("bits", [8, 11], ids=["bfloat16", "TF32"])
def test_on_a_cpu_that_rounds_once_it_is_allowed_to_too(expected, bits, monkeypatch):
    monkeypatch.setattr(torch, "mm", rounding_mm(bits))
    with set_by_a_host("precision", "medium"):
        assert equals_the_oracle(expected.parent)


@pytest.mark.parametrize("expected", GOLDEN, ids=lambda path: path.parent.name)
def test_on_a_gpu_that_rounds_to_tf32_too(expected, monkeypatch):
    def of_gpu(left, right, out=None):
        return rounding_mm(11)(*tf32_parts(left, right), out=out)

    for module in (deltas, loha, lokr, topk):
        monkeypatch.setattr(module, "product", of_gpu)
    monkeypatch.setattr(topk, "_scan_cpu", lambda delta, k, buffer, check: topk._scan_gpu(delta, k, check))
    assert equals_the_oracle(expected.parent)


@pytest.mark.parametrize("bits", [8, 11])
def test_the_emulated_machines_round(bits):
    left, right = torch.randn(50, 20), torch.randn(20, 50)
    found, exact = rounding_mm(bits)(left, right), left.double() @ right.double()
    assert (found - exact).abs().max() > 2.0**-bits * 0.2


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.integers(-30, 30), st.integers(0, 2**32)
)
def test_a_product_of_tf32_parts_loses_a_millionth_at_most(rows, columns, inner, exponent, seed):
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inner, generator=random) * 2.0**exponent
    right = torch.randn(inner, columns, generator=random)
    found = rounding_mm(11)(*tf32_parts(left, right)).double()
    wanted, most = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    assert ((found - wanted).abs() <= 1e-6 * most).all()


def test_the_high_parts_are_tf32_numbers_and_signs_are_kept():
    values = torch.tensor([[1 + 2**-12, -(1 + 2**-12), 3.0, -0.0, 2.0**-126, 1 - 2**-24]])
    high = tf32_parts(values, torch.ones(6, 1))[0][:, :6]
    assert torch.equal(high, rounded(high, 11))
    assert ((high - values).abs() <= values.abs() * 2**-11).all()


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_product_goes_where_it_is_told(precision):
    left, right, out = torch.randn(5, 3), torch.randn(3, 7), torch.empty(5, 7)
    with set_by_a_host("precision", precision):
        assert product(left, right, out=out) is out
        assert torch.equal(out, product(left, right))
    assert torch.allclose(out.double(), left.double() @ right.double(), atol=1e-5)


def test_a_core_is_multiplied_along_its_second_axis():
    core, matrix = torch.randn(3, 4, 2, 5), torch.randn(4, 6)
    wanted = torch.einsum("nmkl,mj->njkl", core.double(), matrix.double())
    assert torch.allclose(second_axis_product(core, matrix).double(), wanted, atol=1e-5)


def many(seed):
    return {f"layer{i:02}": low_rank(200, 300, 16, seed=seed + i) for i in range(60)}


class Broken(MemoryLora):
    def _read(self, name):
        if name == "layer50":
            raise LoraFileError("layer50 is broken.")
        return super()._read(name)


@pytest.mark.parametrize("kind", [MemoryLora, Broken])
def test_another_thread_never_sees_a_switch_turned(switch, kind):
    """That thread is the one that samples an image meanwhile."""
    found, scored = seen_switches(), threading.Event()
    seen = set()

    def sample():
        while not scored.is_set():
            seen.add(seen_switches())

    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        for lora in (kind("subject.safetensors", many(0)), kind("style.safetensors", many(100))):
            if kind is Broken:
                with pytest.raises(LoraFileError):
                    profile_file(lora)
            else:
                profile_file(lora)
    finally:
        scored.set()
        sampling.join()
    assert seen == {found}
    assert seen_switches() == found
