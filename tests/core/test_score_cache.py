"""Profiles on disk: only what was stored comes back, whatever happens to the folder."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klora.core import disk_store, file_state, score_cache
from klora.core.profiles import FileProfile, LayerProfile
from klora.core.score_cache import ScoreCache

CONTENT = "c" * 64


def known(layers=5, seed=0, extra=3):
    random = np.random.default_rng(seed)
    profiles = {
        f"double_blocks.{i}.img_attn.qkv:q": LayerProfile(
            None if i == 2 else i, 1000 + i, *random.random(2).tolist(), np.cumsum(random.random(128))
        )
        for i in range(layers)
    }
    return FileProfile(
        profiles, {("double_blocks.1.img_attn.qkv:q", k): float(k) for k in range(1, extra + 1)}
    )


def same(a, b):
    if a is None or b is None:
        return a is b
    return (
        a.extra_sums == b.extra_sums
        and list(a.layers) == list(b.layers)
        and all(
            (x.rank, x.numel, x.abs_sum, x.squared_sum) == (y.rank, y.numel, y.abs_sum, y.squared_sum)
            and np.array_equal(x.top_sums, y.top_sums)
            for x, y in zip(a.layers.values(), b.layers.values(), strict=True)
        )
    )


@pytest.fixture
def cache(tmp_path):
    return ScoreCache(tmp_path / "cache")


def entry_of(cache):
    (entry,) = cache.folder.glob("*.profile")
    return entry


def test_what_goes_in_comes_out(cache):
    cache.store(CONTENT, known())
    assert same(ScoreCache(cache.folder).load(CONTENT), known())
    assert cache.load("d" * 64) is None


def test_a_file_of_560_layers_takes_less_than_a_mebibyte(cache):
    cache.store(CONTENT, known(560, extra=20_000))
    assert cache.size() < 2**20
    extra = cache.load(CONTENT).extra_sums
    assert len(extra) == score_cache.MAX_EXTRA_SUMS
    assert max(extra)[1] == 20_000, "the oldest go"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_bit_anywhere_is_noticed(cache, place, flip):
    cache.store(CONTENT, known())
    data = bytearray(entry_of(cache).read_bytes())
    data[int(place * len(data))] ^= flip
    entry_of(cache).write_bytes(data)
    assert cache.load(CONTENT) is None


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 500, -1])
def test_a_cut_entry_is_ignored_and_written_again(cache, size):
    cache.store(CONTENT, known())
    entry_of(cache).write_bytes(entry_of(cache).read_bytes()[:size])
    assert cache.load(CONTENT) is None
    cache.store(CONTENT, known(seed=1))
    assert same(cache.load(CONTENT), known(seed=1))


def test_an_entry_of_another_format_or_content_is_ignored(cache, monkeypatch):
    cache.store(CONTENT, known())
    entry_of(cache).rename(cache.folder / f"{'d' * 64}.profile")
    assert cache.load("d" * 64) is None
    cache.store(CONTENT, known())
    monkeypatch.setattr(score_cache, "FORMAT", "klora-profile-of-tomorrow")
    assert cache.load(CONTENT) is None


# --- contents


def test_content_is_of_the_bytes_wherever_they_lie(cache, tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "zwei ü", "three"))
    for path, data in ((one, b"same"), (two, b"same"), (three, b"else")):
        path.write_bytes(data)
    assert cache.content(one) == cache.content(two) != cache.content(three)
    assert cache.content(tmp_path / "missing") is None


@pytest.fixture
def at_rest(monkeypatch):
    """Files of the test's own making count as settled at once."""
    monkeypatch.setattr(file_state, "SETTLED_SECONDS", 0)


def test_a_file_is_hashed_once_by_all_processes(cache, tmp_path, monkeypatch, at_rest):
    lora = tmp_path / "lora"
    lora.write_bytes(b"data")
    content = cache.content(lora)
    monkeypatch.setattr(score_cache, "_hash", lambda _: pytest.fail("hashed again"))
    assert cache.content(lora) == content
    assert ScoreCache(cache.folder).content(lora) == content


@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]", b"3", b"null", b'{"state": 1}', b'{"content": "e"}', b"\xff\xfe"]
)
def test_a_damaged_note_means_hashing_again(cache, tmp_path, note, at_rest):
    lora = tmp_path / "lora"
    lora.write_bytes(b"data")
    content = cache.content(lora)
    (place,) = cache.folder.glob("*.note")
    place.write_bytes(note)
    assert ScoreCache(cache.folder).content(lora) == content


def test_a_changed_file_has_another_content(cache, tmp_path):
    lora = tmp_path / "lora"
    lora.write_bytes(b"data")
    before = cache.content(lora)
    lora.write_bytes(b"date")
    os.utime(lora, ns=(0, 12345))
    assert cache.content(lora) != before
    assert ScoreCache(cache.folder).content(lora) == cache.content(lora)


def overwrite(path, data):
    """As `cp -p` does: the same file, with the times of the one it is copied from."""
    path.write_bytes(data)
    os.utime(path, (1.7e9, 1.7e9))


def replace(path, data):
    new = path.with_suffix(".new")
    overwrite(new, data)
    new.replace(path)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_another_file_of_the_same_path_size_and_time_has_another_content(cache, tmp_path, change, at_rest):
    lora = tmp_path / "lora"
    overwrite(lora, b"data")
    before = cache.content(lora)
    change(lora, b"date")
    assert cache.content(lora) != before
    assert ScoreCache(cache.folder).content(lora) == cache.content(lora)
    change(lora, b"data")
    assert cache.content(lora) == before


def test_a_file_changed_within_the_grain_of_its_time_stamps_has_another_content(cache, tmp_path, monkeypatch):
    """All that is looked at is the same; but the file has only just been written when it is hashed."""
    lora = tmp_path / "lora"
    data = bytearray(2**20)
    lora.write_bytes(data)
    stamps = lora.stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: stamps)
    before = cache.content(lora)
    data[5000] = 1
    lora.write_bytes(data)
    assert cache.content(lora) not in (before, None)
    assert ScoreCache(cache.folder).content(lora) == cache.content(lora)


def test_what_is_read_of_a_file_before_it_is_replaced_has_no_content(cache, tmp_path):
    lora = tmp_path / "lora"
    lora.write_bytes(b"data")
    state = file_state.state_of(lora)
    assert cache.content(lora, state) == cache.content(lora)
    replace(lora, b"date")
    assert cache.content(lora, state) is None
    assert cache.content(lora) is not None


def test_a_file_that_is_changed_while_it_is_hashed_has_no_content(cache, tmp_path, monkeypatch):
    lora = tmp_path / "lora"
    lora.write_bytes(b"data")
    monkeypatch.setattr(score_cache, "_hash", lambda path: replace(path, b"date") or "0" * 64)
    assert cache.content(lora) is None


# --- folders


def test_a_folder_that_cannot_be_made_is_no_fault(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    lora = tmp_path / "lora"
    lora.write_bytes(b"data")
    cache = ScoreCache(tmp_path / "file" / "cache")
    content = cache.content(lora)
    assert content is not None
    cache.store(content, known())
    assert cache.load(content) is None
    assert cache.size() == 0
    cache.clear()


@pytest.mark.parametrize(
    "failing", ["pathlib.Path.mkdir", "pathlib.Path.write_bytes", "pathlib.Path.replace"]
)
@pytest.mark.parametrize(
    "fault",
    [OSError(errno.ENOSPC, "disk full"), PermissionError("in use"), OSError(errno.EROFS, "read-only")],
)
def test_a_write_that_fails_leaves_the_old_entry_and_nothing_else(cache, monkeypatch, failing, fault):
    cache.store(CONTENT, known())

    def fail(*_, **__):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(failing, fail)
        cache.store(CONTENT, known(seed=1))
    assert same(cache.load(CONTENT), known())
    assert list(cache.folder.glob("*.tmp")) == []


def test_a_hit_on_a_read_only_folder_is_a_hit(cache, monkeypatch):
    cache.store(CONTENT, known())
    monkeypatch.setattr("os.utime", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    assert same(cache.load(CONTENT), known())


def age(cache, content, seconds):
    entry = cache.folder / f"{content}.profile"
    os.utime(entry, (time.time() - seconds,) * 2)
    return entry


def test_the_least_recently_used_go_when_the_folder_is_full(cache):
    cache.store("0" * 64, known())
    limit = int(cache.size() * 3.5)
    cache = ScoreCache(cache.folder, limit)
    for name, seconds in (("1", 300), ("2", 200)):
        cache.store(name * 64, known())
        age(cache, name * 64, seconds)
    age(cache, "0" * 64, 400)
    assert cache.load("0" * 64) is not None, "a hit makes it the youngest"
    cache.store("3" * 64, known())
    assert [cache.load(name * 64) is not None for name in "0123"] == [True, False, True, True]
    assert cache.size() <= limit


def test_left_over_temporary_files_go_but_not_those_being_written(cache):
    cache.folder.mkdir()
    for name, seconds in (("left", 7200), ("live", 10)):
        path = cache.folder / f"{name}.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - seconds,) * 2)
    cache.store(CONTENT, known())
    assert {path.name for path in cache.folder.iterdir()} == {"live.tmp", f"{CONTENT}.profile"}


def test_clear_takes_what_is_ours(cache, tmp_path):
    lora = tmp_path / "lora"
    lora.write_bytes(b"data")
    cache.store(cache.content(lora), known())
    (cache.folder / "notes of the user.txt").write_text("hello")
    assert cache.size() > 0
    cache.clear()
    assert cache.size() == 0
    assert [path.name for path in cache.folder.iterdir()] == ["notes of the user.txt"]
    assert cache.load(cache.content(lora)) is None


# --- several processes

WRITER = """
import sys; sys.path[:0] = sys.argv[3:]
from pathlib import Path
from test_score_cache import CONTENT, known
from klora.core.score_cache import ScoreCache
cache, profile = ScoreCache(Path(sys.argv[1])), known(200, seed=int(sys.argv[2]))
print("ready", flush=True)
while True:
    cache.store(CONTENT, profile)
"""


@pytest.fixture
def writers(cache):
    here = Path(__file__).parent
    command = [sys.executable, "-c", WRITER, str(cache.folder)]
    found = [
        subprocess.Popen([*command, str(seed), str(here), str(here.parents[1])], stdout=subprocess.PIPE)
        for seed in (1, 2)
    ]
    for process in found:
        process.stdout.readline()
    yield found
    for process in found:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_processes_write_while_one_reads_and_are_killed(cache, writers):
    expected = [known(200, seed=seed) for seed in (1, 2)]
    while not cache.load(CONTENT):
        time.sleep(0.01)
    for _ in range(100):
        found = cache.load(CONTENT)
        assert any(same(found, one) for one in expected)
    for process in writers:
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
        assert any(same(cache.load(CONTENT), one) for one in expected)


def test_each_killed_writer_leaves_one_temporary_file_at_most_until_it_is_stale(cache, writers):
    while not cache.load(CONTENT):
        time.sleep(0.01)
    for process in writers:
        process.kill()
        process.wait()
    left = list(cache.folder.glob("*.tmp"))
    assert len(left) <= len(writers)
    for path in left:
        os.utime(path, (time.time() - 2 * disk_store.STALE_TEMPORARY_SECONDS,) * 2)
    cache.store(CONTENT, known())
    assert list(cache.folder.glob("*.tmp")) == []


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes to a read-only folder all the same"
)
def test_a_read_only_folder_is_no_fault(cache):
    cache.store(CONTENT, known())
    cache.folder.chmod(0o500)
    try:
        cache.store("d" * 64, known())
        assert cache.load("d" * 64) is None
        assert same(cache.load(CONTENT), known())
        cache.clear()
    finally:
        cache.folder.chmod(0o700)


FULL = """
import sys; sys.path[:0] = sys.argv[2:]
import resource, signal
from pathlib import Path
from test_score_cache import CONTENT, known
from klora.core.score_cache import ScoreCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
ScoreCache(Path(sys.argv[1])).store(CONTENT, known(200, seed=1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is POSIX' own")
def test_a_disk_that_is_full_in_the_middle_of_a_write_leaves_what_was_there(cache):
    cache.store(CONTENT, known())
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", FULL, str(cache.folder), str(here), str(here.parents[1])], check=True
    )
    assert same(cache.load(CONTENT), known())
    assert list(cache.folder.glob("*.tmp")) == []


def test_every_single_bit_of_an_entry_counts(cache):
    """The checksum covers format, content and all that follows it, so a changed entry is no entry."""
    cache.store(CONTENT, known(2, extra=1))
    entry = entry_of(cache)
    data = entry.read_bytes()
    for place in range(len(data)):
        entry.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert cache.load(CONTENT) is None
    entry.write_bytes(data)
    assert same(cache.load(CONTENT), known(2, extra=1))
