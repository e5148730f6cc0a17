"""What these tests change in a running WebUI's options is put back, however they end.

Tested without a WebUI: only the files and the signals.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from host import RunningHost

from klora.webui.options import Options

FOUND = b'{\r\n  "sd_model_checkpoint": "mine.safetensors",\n "samples_save": true }\n'


class Remembering(RunningHost):
    """A host whose API, like Neo's, tells no extension's options. Its file has all that were ever set."""

    def __init__(self, folder):
        super().__init__("neo", folder, "subject", "style", "other", "tiny.safetensors")
        self.values = {**json.loads(FOUND), "refiner_use_steps": False}

    def call(self, path, body=None):
        if body is None:
            return 200, {name: value for name, value in self.values.items() if "klora" not in name}
        self.values.update(body)
        self.configuration.write_text(json.dumps(self.values))
        return 200, {}


@pytest.fixture
def host(tmp_path):
    (tmp_path / "config.json").write_bytes(FOUND)
    return Remembering(tmp_path)


@pytest.fixture(autouse=True)
def off_is_the_host_bit_for_bit():
    """No host makes images here."""


def is_as_found(host):
    assert host.configuration.read_bytes() == FOUND
    assert [path.name for path in host.folder.iterdir()] == ["config.json"]
    found = {**json.loads(FOUND), "refiner_use_steps": False}
    assert {name: host.values[name] for name in found} == found


def test_options_and_their_file_are_put_back(host):
    with host.ready(), host.options(klora_on_error="go on without K-LoRA", samples_save=False):
        assert host.values["samples_save"] is False
        assert host.values["sd_model_checkpoint"] == "tiny.safetensors"
    is_as_found(host)
    assert host.values["klora_on_error"] == "stop"


def test_k_loras_options_are_as_declared_whatever_the_user_has(host):
    host.call("/sdapi/v1/options", {"klora_accelerators": "a word of the user's"})
    with host.ready():
        assert host.values["klora_accelerators"] == Options().accelerators
    assert host.values["klora_accelerators"] == "a word of the user's"


def test_an_option_the_api_does_not_tell_gets_back_what_its_file_has(host):
    host.values["klora_cache_size"] = 99
    host.call("/sdapi/v1/options", {})
    with host.options(klora_cache_size=7):
        assert host.values["klora_cache_size"] == 7
    assert host.values["klora_cache_size"] == 99


@pytest.mark.parametrize("error", [AssertionError, KeyboardInterrupt, OSError])
def test_so_they_are_when_a_test_dies(host, error):
    with pytest.raises(error), host.ready(), host.options(samples_save=False):
        raise error
    is_as_found(host)


def test_the_file_is_put_back_though_the_host_has_died(host, monkeypatch):
    def dead(*_):
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError), host.ready(), host.options(samples_save=False):
        monkeypatch.setattr(host, "call", dead)
    assert host.configuration.read_bytes() == FOUND


def test_a_file_that_was_not_there_is_not_there_afterwards(host):
    host.configuration.unlink()
    with host.ready():
        assert host.configuration.exists()
    assert not list(host.folder.iterdir())


RUN = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]}
from test_configuration import Remembering
with Remembering(sys.argv[1]).ready():
    print("ready", flush=True)
    time.sleep(60)
"""


def ended_by(number, folder):
    """After a run in a process of its own that was ended by this signal."""
    run = subprocess.Popen([sys.executable, "-c", RUN, str(folder)], stdout=subprocess.PIPE)
    assert run.stdout.readline().strip() == b"ready"
    os.kill(run.pid, number)
    run.wait(60)
    run.stdout.close()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_so_they_are_when_the_run_is_ended_by_a_signal(host, name):
    ended_by(getattr(signal, name), host.folder)
    is_as_found(host)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_after_a_run_that_was_killed_the_next_puts_the_file_back_and_asks_for_a_start(host):
    ended_by(signal.SIGKILL, host.folder)
    assert host.configuration.read_bytes() != FOUND
    with pytest.raises(RuntimeError, match="start the WebUI again"), host.ready():
        pass
    is_as_found(host)
    with host.ready():
        pass
    is_as_found(host)
