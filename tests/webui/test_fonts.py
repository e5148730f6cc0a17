"""A WebUI's maps are written in the font of its grids, which the user may have chosen for Japanese names."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from test_api import NAMES, PAIR
from webui_host import NetworkOnDisk, module

from klora.analysis import analyze
from klora.lettering import own_font
from klora.settings import Settings
from klora.webui import api, loras, paths
from klora.webui.selection_record import FIRST, AppliedMaps, AppliedPass

SIZES = {12, 13, 18}


@pytest.fixture
def asked(shared, monkeypatch):
    """The sizes in which the host was asked for its font."""
    sizes = set()
    images = module("modules.images", get_font=lambda size: sizes.add(size) or own_font(size))
    monkeypatch.setitem(sys.modules, "modules.images", images)
    return sizes


def test_the_map_of_the_http_api(asked, networks, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(loras, "loaded_family", lambda: None)
    networks.put(*(NetworkOnDisk(name, folder=PAIR) for name in ("subject", "style")))
    app = FastAPI()
    api.register(app)
    answer = TestClient(app).post("/klora/v1/analyze", json={**NAMES, "format": "png"})
    assert answer.status_code == 200
    assert asked == SIZES


def test_the_map_of_the_gallery(asked):
    plan = analyze(PAIR / "subject.safetensors", PAIR / "style.safetensors", Settings(), steps=4).plan
    one = AppliedPass(FIRST, 0, plan, plan.strengths.astype(np.int8))
    processed = SimpleNamespace(images=[], infotexts=["a cat"])
    AppliedMaps([one], "dog", "ink").show(processed)
    assert len(processed.images) == 1
    assert asked == SIZES
