"""The pass over layers: a worker that cannot start, a GPU out of memory, and a cancellation."""

import threading
import time
from concurrent.futures.thread import BrokenThreadPool

import pytest
import torch
from memory_lora import MemoryLora, low_rank

from klora.core import layer_pass, topk
from klora.core.layer_pass import over_layers
from klora.core.lora_file import read_lora
from klora.core.scores import profile_file
from klora.errors import Cancelled

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_worker_without_memory_ends_the_pass(monkeypatch, request):
    lora = read_lora(
        request.config.rootpath
        / "tests"
        / "data"
        / "golden"
        / "sdxl_attention_same_rank"
        / "subject.safetensors"
    )
    real, calls = layer_pass.new_buffer, []

    def failing(device):
        calls.append(device)
        if len(calls) == 1:
            raise MemoryError
        return real(device)

    monkeypatch.setattr(layer_pass, "new_buffer", failing)
    with pytest.raises(BrokenThreadPool):
        profile_file(lora, device=CPU, workers=2)


# --- a GPU, stood in for by the CPU


class Gpu:
    """A device whose memory lasts for some layers; then whatever is moved to it raises.

    Attributes:
        emptied: how often its cache was emptied.
    """

    def __init__(self, monkeypatch, layers, error):
        self.left, self.error, self.emptied = layers, error, 0
        real = layer_pass.new_buffer
        monkeypatch.setattr(layer_pass, "new_buffer", lambda device: real(CPU))
        monkeypatch.setattr(layer_pass, "_moved", self.moved)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)

    def moved(self, delta, device):
        assert device == GPU
        if self.left == 0:
            raise self.error
        self.left -= 1
        return delta

    def empty(self):
        self.emptied += 1


def many(count=9):
    return MemoryLora("a.safetensors", {f"layer{i}": low_rank(30, 40, 2, seed=i) for i in range(count)})


SHORTAGES = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("CUDA driver error: out of memory"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
@pytest.mark.parametrize("layers", [0, 4])
def test_where_a_gpu_runs_out_of_memory_the_cpu_goes_on(monkeypatch, error, layers):
    expected = profile_file(many(), device=CPU)
    gpu, lora, seen = Gpu(monkeypatch, layers, error), many(), []
    found = profile_file(lora, device=GPU, progress=lambda *at: seen.append(at))
    assert {name: one.abs_sum for name, one in found.items()} == {
        name: one.abs_sum for name, one in expected.items()
    }
    assert gpu.emptied == 1
    assert seen == [(done, 9) for done in range(1, 10)]
    assert len(lora.reads) == 10, "the layers that were done are not read again"


def test_another_fault_of_a_gpu_gets_out(monkeypatch):
    gpu = Gpu(monkeypatch, 2, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        profile_file(many(), device=GPU)
    assert gpu.emptied == 0


def test_a_pass_on_a_gpu_is_given_up_before_the_next_layer(monkeypatch):
    Gpu(monkeypatch, 9, None)
    lora, done = many(), []
    with pytest.raises(Cancelled):
        profile_file(lora, device=GPU, progress=lambda *at: done.append(at), cancelled=lambda: len(done) == 3)
    assert len(lora.reads) == 3


# --- giving up


class Slow(MemoryLora):
    """Its one layer takes as long to read as the test lets it."""

    def __init__(self):
        super().__init__("slow.safetensors", {"layer": low_rank(30, 40, 2)})
        self.may_end = threading.Event()

    def _read(self, name):
        assert self.may_end.wait(20)
        return super()._read(name)


def test_while_a_layer_is_under_way_the_caller_keeps_asking():
    lora, asked = Slow(), []

    def check():
        asked.append(threading.get_ident())
        if len(asked) == 4:
            lora.may_end.set()

    over_layers(lora, ["layer"], lambda *_: None, device=CPU, layer_done=lambda: None, check=check)
    assert asked == [threading.get_ident()] * len(asked)


def test_a_layer_is_given_up_between_its_blocks(monkeypatch):
    """One of 400 blocks of 0.05 s each, 20 s in all."""
    under_way = threading.Event()
    real = topk.product

    def slow(*args, **kwargs):
        under_way.set()
        time.sleep(0.05)
        return real(*args, **kwargs)

    monkeypatch.setattr(topk, "product", slow)
    monkeypatch.setattr(topk, "BLOCK_NUMEL", 64)
    lora = MemoryLora("long.safetensors", {"layer": low_rank(400, 64, 2)})
    start = time.monotonic()
    with pytest.raises(Cancelled):
        profile_file(lora, device=CPU, cancelled=under_way.is_set)
    assert time.monotonic() - start < 5
