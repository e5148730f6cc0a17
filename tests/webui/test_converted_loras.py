"""The copy that a host loads instead of a file has the same content, whatever the file is called."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from klora.core import file_state, rewrite
from klora.core.lora_file import read_lora
from klora.errors import LoraFileError
from klora.webui import converted_loras, paths
from klora.webui.converted_loras import readable_copy

STEM = "unet.mid_block.attentions.0.proj_in"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "cache_folder", lambda: tmp_path / "cache" / "scores")
    return tmp_path / "cache" / "rewritten"


def write(path, value, when=1.7e9):
    path.parent.mkdir(exist_ok=True)
    save_file(
        {f"{STEM}.lora_B.weight": torch.full((4, 2), value), f"{STEM}.lora_A.weight": torch.ones(2, 4)}, path
    )
    os.utime(path, (when, when))
    return read_lora(path)


def value_in(copy):
    return load(copy.read_bytes())["lora_unet_middle_block_1_proj_in.lora_up.weight"][0, 0].item()


def test_two_files_of_one_name_size_and_time_get_their_own_tensors(tmp_path):
    """Files from the same archive can be like that."""
    name = "pytorch_lora_weights.safetensors"
    loras = [write(tmp_path / person / name, value) for person, value in (("ann", 1.0), ("bob", 2.0))]
    copies = [readable_copy(lora) for lora in loras]
    assert [value_in(copy) for copy in copies] == [1, 2]
    assert len({copy.stem for copy in copies}) == 2, "hosts remember a file by its name"
    assert [readable_copy(lora) for lora in loras] == copies


@pytest.mark.parametrize("into_place", [Path.replace, lambda new, path: path.write_bytes(new.read_bytes())])
@pytest.mark.parametrize("rest", [0, file_state.SETTLED_SECONDS])
def test_a_file_that_was_replaced_gets_another_copy(tmp_path, into_place, rest, monkeypatch):
    monkeypatch.setattr(file_state, "SETTLED_SECONDS", rest)
    lora = write(tmp_path / "dog.safetensors", 1.0)
    assert value_in(readable_copy(lora)) == 1
    new = write(tmp_path / "new.safetensors", 2.0)
    into_place(new.path, lora.path)
    os.utime(lora.path, (1.7e9, 1.7e9))
    assert value_in(readable_copy(lora)) == 2


def test_one_content_has_one_copy(tmp_path, folder):
    copies = {
        readable_copy(write(tmp_path / name, 1.0, when))
        for name, when in (("a.safetensors", 1e9), ("b.safetensors", 1.1e9))
    }
    assert len(copies) == len(list(folder.iterdir())) == 1


def test_a_copy_of_another_format_is_not_used(tmp_path, folder, monkeypatch):
    lora = write(tmp_path / "dog.safetensors", 1.0)
    first = readable_copy(lora)
    monkeypatch.setattr(converted_loras, "FORMAT", "klora-keys-of-tomorrow")
    assert readable_copy(lora) != first


def test_copies_of_earlier_versions_are_deleted(tmp_path, folder):
    folder.mkdir(parents=True)
    for name in ("pytorch_lora_weights-18f3a0-17979cfe362a0000.safetensors", "dog-1-2.safetensors.0123.part"):
        (folder / name).write_bytes(b"earlier")
    copy = readable_copy(write(tmp_path / "dog.safetensors", 1.0))
    assert list(folder.iterdir()) == [copy]


def test_a_file_that_changes_while_it_is_converted_leaves_no_copy(tmp_path, folder, monkeypatch):
    lora = write(tmp_path / "dog.safetensors", 1.0)
    new = write(tmp_path / "new.safetensors", 2.0)

    def slow(source, place):
        rewrite.rewrite(source, place)
        new.path.replace(lora.path)

    monkeypatch.setattr(converted_loras, "rewrite", slow)
    with pytest.raises(LoraFileError, match=r"dog\.safetensors.*changed.*try again"):
        readable_copy(lora)
    assert list(folder.iterdir()) == []
    monkeypatch.undo()


def test_what_was_read_of_a_file_before_it_was_replaced_is_not_what_is_converted(tmp_path):
    """Its scale, which the copy holds as alpha, may only be in the header."""
    path, tensors = (
        tmp_path / "dog.safetensors",
        {f"{STEM}.lora_B.weight": torch.ones(4, 2), f"{STEM}.lora_A.weight": torch.ones(2, 4)},
    )
    header = '{"unet.r": 2, "unet.lora_alpha": %d}'
    save_file(tensors, path, {"lora_adapter_metadata": header % 4})
    before = read_lora(path)
    save_file(tensors, path, {"lora_adapter_metadata": header % 8})
    assert load_file(readable_copy(before))["lora_unet_middle_block_1_proj_in.alpha"].item() == 8


def test_a_file_that_is_gone_gets_a_sentence(tmp_path):
    lora = write(tmp_path / "dog.safetensors", 1.0)
    lora.path.unlink()
    with pytest.raises(LoraFileError, match=r"dog\.safetensors"):
        readable_copy(lora)


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")]
)
def test_a_folder_that_takes_no_copy_is_named_with_the_way_out(tmp_path, folder, monkeypatch, fault):
    lora = write(tmp_path / "dog.safetensors", 1.0)

    def fail(*_):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(LoraFileError) as caught:
            readable_copy(lora)
    assert str(caught.value) == (
        '"dog.safetensors" has keys that this WebUI cannot load, and the copy that it would load instead '
        "cannot be written to "
        f"{folder} ({fault.strerror}): free some space there, or make the folder writable."
    )
    assert list(folder.iterdir()) == []


FULL = """
import sys; sys.path.insert(0, sys.argv[3])
import resource, signal
from pathlib import Path
from klora.core.lora_file import read_lora
from klora.webui import paths
from klora.webui.converted_loras import readable_copy
paths.cache_folder = lambda: Path(sys.argv[2]) / "scores"
lora = read_lora(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
readable_copy(lora)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is POSIX' own")
def test_a_disk_that_is_full_in_the_middle_of_a_copy_leaves_nothing(tmp_path, folder):
    save_file(
        {f"{STEM}.lora_B.weight": torch.ones(4000, 2), f"{STEM}.lora_A.weight": torch.ones(2, 4000)},
        tmp_path / "dog.safetensors",
    )
    command = [
        sys.executable,
        "-c",
        FULL,
        tmp_path / "dog.safetensors",
        folder.parent,
        Path(__file__).parents[2],
    ]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert "(File too large): free some space there" in ended.stderr
    assert list(folder.iterdir()) == []


MAKER = """
import sys; sys.path.insert(0, sys.argv[3])
from pathlib import Path
from klora.core.lora_file import read_lora
from klora.webui import paths
from klora.webui.converted_loras import readable_copy
paths.cache_folder = lambda: Path(sys.argv[2]) / "scores"
lora = read_lora(sys.argv[1])
print("ready", flush=True)
while True:
    readable_copy(lora).unlink(missing_ok=True)
"""


def test_a_copy_is_whole_while_two_processes_make_it_and_when_they_are_killed(tmp_path, folder):
    path = tmp_path / "dog.safetensors"
    tensors = {f"{STEM}.lora_B.weight": torch.full((3000, 2), 3.0), f"{STEM}.lora_A.weight": torch.ones(2, 4)}
    save_file(tensors, path)
    command = [sys.executable, "-c", MAKER, path, folder.parent, Path(__file__).parents[2]]
    makers = [subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for maker in makers:
            maker.stdout.readline()
        seen, end = 0, time.monotonic() + 60
        while seen < 50 and time.monotonic() < end:
            for copy in folder.glob("*.safetensors"):
                try:
                    assert value_in(copy) == 3
                    seen += 1
                except FileNotFoundError:
                    pass
        assert seen >= 50
    finally:
        for maker in makers:
            maker.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            maker.wait()
            maker.stdout.close()
    assert value_in(readable_copy(read_lora(path))) == 3
    assert len([left for left in folder.iterdir() if left.suffix != ".safetensors"]) <= 2 * len(makers)


def test_several_threads_get_one_copy(tmp_path, folder):
    lora, found = write(tmp_path / "dog.safetensors", 1.0), []
    threads = [threading.Thread(target=lambda: found.append(readable_copy(lora))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert list(folder.iterdir()) == [found[0]]
