"""Whatever a file holds, reading it ends soon and either works or says in one sentence what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from odd_files import ask_for_everything, odd_files
from safetensors.torch import save_file

from klora.core.lora_file import read_lora
from klora.errors import KLoraError, LoraFileError

MOST_SECONDS = 5


@contextmanager
def soon() -> Iterator[None]:
    """Fails what hangs. Without POSIX timers it only runs."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def too_long(*_: object) -> None:
        raise AssertionError(f"took longer than {MOST_SECONDS} s of the processor")

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def said(path: Path) -> str:
    with soon(), pytest.raises(LoraFileError) as caught:
        ask_for_everything(path)
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert len(sentence) < 1000
    return sentence


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(content=odd_files())
def test_an_odd_file_is_read_or_refused_in_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.safetensors"
    path.write_bytes(content)
    try:
        with soon():
            ask_for_everything(path)
    except KLoraError as error:
        assert str(error).isprintable()
        assert "odd.safetensors" in str(error)
