"""What a run shares with its host, seen from within its process.

These are progress, interruption, and the checkpoint, which only the host may keep alive.
"""

import gc
import sys
import threading
import time
import weakref

import pytest
from safetensors.torch import load_file

from klora.core import topk
from klora.errors import Cancelled
from klora.webui import paths, preparation, run


@pytest.fixture(scope="module")
def host(standin):
    with standin.in_place(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "EXTENSION", standin.folder)
        yield standin


@pytest.fixture
def state(host):
    return sys.modules["modules.shared"].state


def progress(host):
    return host.call("/sdapi/v1/progress")[1]


def test_the_share_done_rises_while_a_pair_is_scored(host, monkeypatch):
    real, seen = preparation.score_pair, []

    def score_pair(*args, progress, **kwargs):
        for done in range(1, 8):
            progress(done, 7)
            seen.append(globals()["progress"](host))
        return real(*args, progress=progress, **kwargs)

    monkeypatch.setattr(preparation, "score_pair", score_pair)
    host.image(host.pair)
    shares = [answer["progress"] for answer in seen]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5 < shares[-1] <= 1
    assert [answer["textinfo"] for answer in seen] == [
        f"K-LoRA: scoring {done} of 7 layers" for done in range(1, 8)
    ]


@pytest.mark.parametrize(("error", "status"), [(Cancelled, 200), (ValueError, 500)])
def test_a_scoring_that_ends_early_leaves_no_text_behind(host, state, monkeypatch, error, status):
    def score_pair(*_args, progress, **_kwargs):
        progress(3, 7)
        state.interrupted = error is Cancelled
        raise error("within")

    monkeypatch.setattr(preparation, "score_pair", score_pair)
    assert host.request(host.pair)[0] == status
    assert (state.textinfo, progress(host)["progress"]) == (None, 0)


def test_an_interrupt_ends_the_scoring_within_a_layer(host, monkeypatch):
    """Of which all would take half a minute here."""
    under_way, real = threading.Event(), topk.product

    def slow(*args, **kwargs):
        under_way.set()
        time.sleep(0.6)
        return real(*args, **kwargs)

    tensors = {
        name: {key: value * 1.5 for key, value in load_file(host.file(name)).items()}
        for name in host.pair.values()
    }
    with (
        host.more_loras(**{f"{name}_anew": tensors[name] for name in tensors}),
        monkeypatch.context() as patch,
    ):
        patch.setattr(topk, "product", slow)
        pair = {role: f"{name}_anew" for role, name in host.pair.items()}
        answers = []
        generating = threading.Thread(target=lambda: answers.append(host.request(pair)))
        generating.start()
        assert under_way.wait(20)
        start = time.monotonic()
        host.call("/sdapi/v1/interrupt", {})
        generating.join(30)
        assert time.monotonic() - start < 8
        assert answers[0][0] == 200


PLACES = ["process", "networks loaded", "begin pass", "callback", "forward", "decode"]


def checkpoint_after(host, place):
    """A weak reference to the checkpoint of a K-LoRA run that died at `place`."""
    with host.fault(place, 1, "RuntimeError", 2):
        assert host.request(host.pair)[0] >= 400
    return weakref.ref(sys.modules["modules.shared"].sd_model)


@pytest.mark.parametrize("where", PLACES)
def test_a_run_that_died_keeps_no_checkpoint_alive(host, where):
    model = checkpoint_after(host, where)
    with host.another_checkpoint() as name, host.options(sd_model_checkpoint=name):
        gc.collect()
        assert model() is None


def test_not_even_one_that_somebody_keeps(host):
    """An extension that keeps the processing object, say, to which the run belongs."""
    model = checkpoint_after(host, "forward")
    kept = list(run._open_runs)
    assert kept
    with host.another_checkpoint() as name, host.options(sd_model_checkpoint=name):
        gc.collect()
        assert model() is None
