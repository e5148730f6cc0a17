"""Another file, or another content, is another state, however much of the two is the same."""

import json
import os
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from klora.core import file_state
from klora.core.file_state import BLOCK_BYTES, BLOCKS, state_of, version_of

LONG_AGO = 1.7e9


def safetensors(header_note="", tensor_bytes=2**20):
    header = json.dumps({"__metadata__": {"note": "x" * 20_000 + header_note}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(tensor_bytes)


def put(path, data):
    path.write_bytes(data)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def changed(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.fixture
def lora(tmp_path):
    return put(tmp_path / "lora.safetensors", safetensors("a"))


@pytest.fixture
def at_rest(monkeypatch):
    monkeypatch.setattr(file_state, "SETTLED_SECONDS", 0)


@pytest.fixture
def no_change_times(monkeypatch):
    """A file system without inodes and change times, such as FAT, or Windows when a file is overwritten."""
    real = Path.stat

    def stat(path, **more):
        found = real(path, **more)
        return SimpleNamespace(
            st_mode=found.st_mode,
            st_size=found.st_size,
            st_mtime_ns=found.st_mtime_ns,
            st_ino=0,
            st_ctime_ns=1,
        )

    monkeypatch.setattr(Path, "stat", stat)


def test_an_untouched_file_stays_in_its_state(lora):
    assert state_of(lora) == state_of(lora)
    assert len(lora.read_bytes()) == lora.stat().st_size


def test_a_link_is_the_file_it_leads_to(lora, tmp_path):
    (tmp_path / "link").symlink_to(lora)
    assert state_of(tmp_path / "link") == state_of(lora)


def test_two_files_of_one_content_are_two(lora, tmp_path):
    assert state_of(put(tmp_path / "copy", lora.read_bytes())) != state_of(lora)


def test_overwritten_with_the_same_bytes_and_times_is_another_state_where_changes_are_kept(lora):
    before = state_of(lora)
    put(lora, lora.read_bytes())
    assert state_of(lora) != before


PLACES = [
    0,
    7,
    8,
    30,
    10_000,
    20_020,
    2**20 + 20_000,
    *(20_040 + i * (2**20 - BLOCK_BYTES) // (BLOCKS - 1) + 9 for i in range(BLOCKS)),
]


@pytest.mark.parametrize("place", PLACES)
def test_header_end_and_blocks_tell_where_the_system_keeps_no_time_of_change(lora, no_change_times, place):
    before = state_of(lora)
    put(lora, changed(lora.read_bytes(), place))
    assert state_of(lora) != before


@pytest.mark.parametrize("data", [b"", b"1", b"12345678", b"\xff" * 100, bytes(10_000)], ids=len)
def test_any_file_has_a_state(tmp_path, data, no_change_times):
    one, other = (
        put(tmp_path / "lora", data + last) and state_of(tmp_path / "lora") for last in (b"a", b"b")
    )
    assert one is not None
    assert one != other


def test_what_is_no_file_has_none(tmp_path):
    assert state_of(tmp_path) is None
    assert state_of(tmp_path / "missing") is None
    (tmp_path / "link").symlink_to(tmp_path / "link")
    assert state_of(tmp_path / "link") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX' own")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert state_of(tmp_path / "pipe") is None


def test_versions_are_equal_once_a_file_is_at_rest(lora, at_rest):
    assert version_of(lora) == version_of(lora)


def test_no_two_versions_of_a_file_just_written_are_equal(lora):
    assert state_of(lora) == state_of(lora)
    assert version_of(lora) != version_of(lora)


def test_a_file_comes_to_rest(lora, monkeypatch):
    later = time.time() + 10
    monkeypatch.setattr(file_state.time, "time", lambda: later)
    assert version_of(lora) == version_of(lora)


def test_a_time_stamp_in_the_future_is_no_recent_change(lora, no_change_times):
    os.utime(lora, (LONG_AGO * 2, LONG_AGO * 2))
    assert version_of(lora) == version_of(lora)


def test_a_missing_file_has_a_version_of_its_own(tmp_path, lora, at_rest):
    before = version_of(lora)
    lora.unlink()
    assert version_of(lora) == version_of(lora) != before
    assert version_of(lora) != version_of(tmp_path / "other")
