"""The extension's HTTP API answers as documented, and a wrong request with a sentence per fault."""

import io
import threading
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image, ImageChops
from webui_host import NetworkOnDisk

from klora.analysis import analyze
from klora.selection_map import draw_map
from klora.settings import Settings, json_schema
from klora.webui import api, paths, turns

PAIR = Path(__file__).parents[1] / "data" / "golden" / "sdxl_attention_same_rank"
NAMES = {"subject": "subject", "style": "style"}


@pytest.fixture(autouse=True)
def registry(networks, shared, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "cache_folder", lambda: tmp_path / "scores")
    return networks.put(NetworkOnDisk("subject", folder=PAIR, alias="sks", digest="aa"), NetworkOnDisk("style", folder=PAIR))


def client():
    app = FastAPI()
    api.register(None, app)
    return TestClient(app)


def test_schema_is_the_declarations():
    assert client().get("/klora/v1/schema").json() == json_schema()


def test_loras():
    assert client().get("/klora/v1/loras").json() == [
        {"name": "style", "alias": "style", "hash": ""}, {"name": "subject", "alias": "sks", "hash": "aa"},
    ]


def test_analysis_is_that_of_the_command_line():
    answer = client().post("/klora/v1/analyze", json={"subject": "sks", "style": "style", "selector": "Random", "steps": 6, "seed": 3})
    assert answer.status_code == 200
    files = PAIR / "subject.safetensors", PAIR / "style.safetensors"
    assert answer.json() == analyze(*files, Settings(selector="Random"), steps=6, seed=3).to_json()


def test_analysis_as_a_picture_is_the_map_of_its_plan():
    answer = client().post("/klora/v1/analyze", json={**NAMES, "steps": 6, "format": "png"})
    assert answer.headers["content-type"] == "image/png"
    plan = analyze(PAIR / "subject.safetensors", PAIR / "style.safetensors", Settings(), steps=6).plan
    assert ImageChops.difference(Image.open(io.BytesIO(answer.content)), draw_map(plan, "subject", "style")).getbbox() is None


def test_steps_are_twenty_by_default():
    assert client().post("/klora/v1/analyze", json=NAMES).json()["steps"] == 20


@pytest.mark.parametrize(("body", "fields", "said"), [
    ({"style": "style"}, ["subject"], "no subject LoRA is chosen"),
    ({**NAMES, "subject": "sbject"}, ["subject"], "nearest: 'subject'"),
    ({**NAMES, "subject": "/etc/passwd"}, ["subject"], "lists no LoRA named"),
    ({**NAMES, "subjct_weight": 1}, ["subjct_weight"], "did you mean 'subject_weight'"),
    ({**NAMES, "alpha": "x", "steps": 0, "seed": "1"}, ["alpha", "steps", "seed"], "'steps' is a whole number from 1 to 1000"),
    ({**NAMES, "steps": True}, ["steps"], "whole number"),
    ({**NAMES, "format": "jpg"}, ["format"], "'format' is json or png"),
])
def test_a_wrong_request_is_said(body, fields, said):
    answer = client().post("/klora/v1/analyze", json=body)
    assert answer.status_code == 422
    assert sorted(answer.json()["fields"]) == sorted(fields)
    assert said in answer.json()["detail"]


def test_a_file_that_is_no_lora_is_said(networks, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not a LoRA")
    networks.put(*networks.on_disk, NetworkOnDisk("broken", folder=tmp_path))
    answer = client().post("/klora/v1/analyze", json={**NAMES, "style": "broken"})
    assert answer.status_code == 422
    assert "broken.safetensors" in answer.json()["detail"]
    assert str(tmp_path) not in answer.json()["detail"]


def test_one_analysis_at_a_time_and_a_sentence_when_many_wait(monkeypatch):
    running, most, goes_on = [], [], threading.Event()

    def slow(*args, **kwargs):
        running.append(1)
        most.append(len(running))
        goes_on.wait(20)
        running.pop()
        return analyze(*args, **kwargs)

    monkeypatch.setattr(api, "analyze", slow)
    host, codes = client(), []
    def ask():
        codes.append(host.post("/klora/v1/analyze", json=NAMES).status_code)

    waiting = [threading.Thread(target=ask) for _ in range(turns.MOST_AT_ONCE)]
    for thread in waiting:
        thread.start()
    while turns.places._value:
        threading.Event().wait(0.01)
    refused = host.post("/klora/v1/analyze", json=NAMES)
    goes_on.set()
    for thread in waiting:
        thread.join()
    assert refused.status_code == 503
    assert "try again" in refused.json()["detail"]
    assert codes == [200] * turns.MOST_AT_ONCE
    assert max(most) == 1
    assert host.post("/klora/v1/analyze", json=NAMES).status_code == 200


@pytest.mark.parametrize("path", ["schema", "loras"])
def test_api_auth_guards_the_routes(shared, path):
    shared.cmd_opts.api_auth = "ann:secret,bob:x"
    host = client()
    assert host.get(f"/klora/v1/{path}").status_code == 401
    assert host.get(f"/klora/v1/{path}", auth=("ann", "x")).status_code == 401
    assert host.get(f"/klora/v1/{path}", auth=("ünknown", "ü")).status_code == 401
    assert host.get(f"/klora/v1/{path}", auth=("ann", "secret")).status_code == 200


def test_api_auth_guards_the_analysis(shared):
    shared.cmd_opts.api_auth = "ann:secret"
    assert client().post("/klora/v1/analyze", json=NAMES).status_code == 401


def test_the_openapi_page_describes_the_request():
    page = client().get("/openapi.json").json()
    assert {path for path in page["paths"] if "klora" in path} == {f"/klora/v1/{name}" for name in ("schema", "loras", "analyze")}
    request = page["paths"]["/klora/v1/analyze"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert request["properties"].keys() == {*json_schema()["properties"], "steps", "seed", "format"}
    assert "image/png" in page["paths"]["/klora/v1/analyze"]["post"]["responses"]["200"]["content"]
    assert all(method["tags"] == ["K-LoRA"] for name, path in page["paths"].items() for method in path.values())
