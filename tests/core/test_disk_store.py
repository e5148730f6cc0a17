"""A folder of files that can be made again: bounded, never half-written, and able to live with open files."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from klora.core import disk_store
from klora.core.disk_store import DiskStore

KILOBYTE = bytes(1000)


@pytest.fixture
def store(tmp_path):
    return DiskStore(
        tmp_path / "store", 3500, (".data", ".part"), lambda name: name.endswith("-2.data"), in_use_seconds=60
    )


def filled(place):
    place.write_bytes(KILOBYTE)


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def put(store, name, seconds_ago, data=KILOBYTE):
    store.folder.mkdir(exist_ok=True)
    path = store.folder / name
    path.write_bytes(data)
    age(path, seconds_ago)
    return path


def test_a_file_is_made_once(store):
    path = store.get_or_make("a-2.data", filled)
    assert path.read_bytes() == KILOBYTE
    assert store.get_or_make("a-2.data", lambda _: pytest.fail("made again")) == path


def test_the_least_recently_used_go_when_the_folder_is_full(store):
    for name, seconds in (("a", 400), ("b", 300), ("c", 200)):
        put(store, f"{name}-2.data", seconds)
    store.get_or_make("a-2.data", filled)
    store.get_or_make("d-2.data", filled)
    assert names(store) == ["a-2.data", "c-2.data", "d-2.data"]


def test_what_was_used_just_now_stays_although_the_folder_is_full(store):
    for name in "abcde":
        store.get_or_make(f"{name}-2.data", filled)
    assert len(names(store)) == 5
    for path in store.folder.iterdir():
        age(path, 100)
    store.get_or_make("e-2.data", filled)
    store.trim()
    assert len(names(store)) == 3
    assert "e-2.data" in names(store)


def test_what_is_made_stays_although_other_files_are_from_the_future(store):
    for name in "abcd":
        put(store, f"{name}-2.data", -10_000)
    assert store.get_or_make("e-2.data", filled).exists()


def test_files_of_earlier_versions_go_first_and_those_of_others_never(store):
    for name in ("pytorch_lora_weights-3e8-17.data", "dog.data.0123.part", "readme.txt"):
        put(store, name, 10)
    store.get_or_make("a-2.data", filled)
    assert names(store) == ["a-2.data", "readme.txt"]
    assert store.size() == 1000


@pytest.mark.parametrize("name", ["0123.tmp", ".tmpJ14F1b"])
def test_what_a_killed_writer_left_goes_when_it_is_old(store, name):
    """Our own temporary file, or the one that safetensors writes first."""
    put(store, name, 7200)
    put(store, f"{name}2", 30)
    store.get_or_make("a-2.data", filled)
    assert names(store) == sorted(
        ["a-2.data", f"{name}2"] if name.startswith(".") else ["0123.tmp2", "a-2.data"]
    )


@pytest.fixture
def open_on_windows(monkeypatch):
    """The files in this set can be neither deleted nor replaced, like files open or mapped on Windows."""
    opened = set()
    unlink, replace = Path.unlink, Path.replace

    def refuse(path):
        if path.name in opened:
            raise PermissionError(errno.EACCES, "in use", str(path))

    def unlink_closed(path, missing_ok=False):
        refuse(path)
        unlink(path, missing_ok)

    def replace_closed(path, target):
        refuse(Path(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "unlink", unlink_closed)
    monkeypatch.setattr(Path, "replace", replace_closed)
    return opened


def test_a_file_that_cannot_be_deleted_stays_until_it_can(store, open_on_windows):
    for name, seconds in (("a", 400), ("b", 300), ("c", 200)):
        put(store, f"{name}-2.data", seconds)
    open_on_windows.add("a-2.data")
    store.get_or_make("d-2.data", filled)
    assert names(store) == ["a-2.data", "c-2.data", "d-2.data"], "the next one goes in its place"
    open_on_windows.clear()
    store.get_or_make("e-2.data", filled)
    assert "a-2.data" not in names(store)


def test_clear_leaves_what_cannot_be_deleted(store, open_on_windows):
    for name in "ab":
        store.get_or_make(f"{name}-2.data", filled)
    open_on_windows.add("a-2.data")
    store.clear()
    assert names(store) == ["a-2.data"]


def test_a_file_that_another_process_made_and_opened_meanwhile_is_taken(store, open_on_windows):
    def fill(place):
        filled(place)
        put(store, "a-2.data", 0)
        open_on_windows.add("a-2.data")

    assert store.get_or_make("a-2.data", fill).read_bytes() == KILOBYTE
    assert names(store) == ["a-2.data"]


def test_a_folder_that_cannot_be_written_to_is_said(store, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    with pytest.raises(PermissionError, match="read-only"):
        store.get_or_make("a-2.data", filled)
    assert names(store) == []


def test_a_full_disk_gets_what_the_store_can_spare(store):
    put(store, "old-2.data", 400)
    kept = put(store, "used-2.data", 0)

    def fill(place):
        place.write_bytes(b"half")
        if (store.folder / "old-2.data").exists():
            raise OSError(errno.ENOSPC, "disk full")
        filled(place)

    assert store.get_or_make("a-2.data", fill).read_bytes() == KILOBYTE
    assert names(store) == ["a-2.data", kept.name]


def test_a_disk_that_stays_full_is_said_and_nothing_half_written_stays(store):
    def fill(place):
        place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        store.get_or_make("a-2.data", fill)
    assert names(store) == []


def test_what_is_made_is_on_the_disk_before_it_has_its_name(store, monkeypatch):
    """Else a loss of power leaves a file of zeros under a name that is trusted."""
    seen = []
    monkeypatch.setattr(disk_store.os, "fsync", lambda _: seen.append(names(store)))
    store.get_or_make("a-2.data", filled)
    ((only,),) = seen
    assert only.endswith(".tmp")


def test_a_file_system_that_cannot_flush_is_no_fault_and_a_failing_disk_is(store, monkeypatch):
    def fail(code):
        monkeypatch.setattr(disk_store.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(code, "fsync")))

    fail(errno.EINVAL)
    assert store.get_or_make("a-2.data", filled).exists()
    fail(errno.EIO)
    with pytest.raises(OSError, match="fsync"):
        store.get_or_make("b-2.data", filled)
    assert names(store) == ["a-2.data"]


MAKER = """
import sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
from klora.core.disk_store import DiskStore
store = DiskStore(Path(sys.argv[1]), 10**9, (".data",))
sys.stdin.readline()
for name in range(200):
    path = store.get_or_make(f"{name}.data", lambda place: place.write_bytes(bytes([name]) * 10_000))
    assert path.read_bytes() == bytes([name]) * 10_000
"""


def test_two_processes_make_the_same_files_at_once(tmp_path):
    command = [sys.executable, "-c", MAKER, str(tmp_path / "store"), str(Path(__file__).parents[2])]
    makers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
    for maker in makers:
        maker.stdin.close()
    assert [maker.wait() for maker in makers] == [0, 0]
    assert len(list((tmp_path / "store").iterdir())) == 200
