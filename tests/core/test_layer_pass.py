"""The pool of threads over layers: a worker that cannot start ends the pass, it does not stall it."""

from concurrent.futures.thread import BrokenThreadPool

import pytest
import torch

from klora.core import layer_pass
from klora.core.lora_file import read_lora
from klora.core.scores import profile_file


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
        profile_file(lora, device=torch.device("cpu"), workers=2)
