"""The extension's HTTP API answers as documented, and a wrong request with one sentence for each fault."""

import asyncio
import io
import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image, ImageChops
from webui_host import NetworkOnDisk

from klora.analysis import analyze
from klora.core import scores
from klora.core.families import FAMILIES
from klora.errors import Cancelled
from klora.selection_map import draw_map
from klora.settings import Settings, json_schema
from klora.webui import analysis_queue, api, loras, paths

PAIR = Path(__file__).parents[1] / "data" / "golden" / "sdxl_attention_same_rank"
NAMES = {"subject": "subject", "style": "style"}


@pytest.fixture(autouse=True)
def registry(networks, shared, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "cache_folder", lambda: tmp_path / "scores")
    monkeypatch.setattr(loras, "loaded_family", lambda: None)
    return networks.put(
        NetworkOnDisk("subject", folder=PAIR, alias="sks", digest="aa"), NetworkOnDisk("style", folder=PAIR)
    )


def client():
    app = FastAPI()
    api.register(app)
    return TestClient(app)


def test_files_are_read_for_the_loaded_checkpoint(monkeypatch):
    told = []
    monkeypatch.setattr(loras, "loaded_family", lambda: FAMILIES["sdxl"])
    monkeypatch.setattr(
        api, "analyze", lambda *files, loaded, **more: told.append(loaded) or analyze(*files, **more)
    )
    client().post("/klora/v1/analyze", json={**NAMES, "steps": 2})
    assert told == [FAMILIES["sdxl"]]


def test_the_schema_is_that_of_the_declaration():
    assert client().get("/klora/v1/schema").json() == json_schema()


def test_the_loras_are_listed_with_alias_and_hash():
    assert client().get("/klora/v1/loras").json() == [
        {"name": "style", "alias": "style", "hash": ""},
        {"name": "subject", "alias": "sks", "hash": "aa"},
    ]


def test_an_analysis_is_that_of_the_command_line():
    answer = client().post(
        "/klora/v1/analyze",
        json={"subject": "sks", "style": "style", "method": "Random", "steps": 6, "seed": 3},
    )
    assert answer.status_code == 200
    files = PAIR / "subject.safetensors", PAIR / "style.safetensors"
    assert answer.json() == analyze(*files, Settings(method="Random"), steps=6, seed=3).to_json()


def test_an_analysis_as_an_image_is_the_map_of_its_plan():
    answer = client().post("/klora/v1/analyze", json={**NAMES, "steps": 6, "format": "png"})
    assert answer.headers["content-type"] == "image/png"
    plan = analyze(PAIR / "subject.safetensors", PAIR / "style.safetensors", Settings(), steps=6).plan
    assert (
        ImageChops.difference(
            Image.open(io.BytesIO(answer.content)), draw_map(plan, "subject", "style")
        ).getbbox()
        is None
    )


def test_steps_are_twenty_by_default():
    assert client().post("/klora/v1/analyze", json=NAMES).json()["steps"] == 20


@pytest.mark.parametrize(
    ("body", "fields", "said"),
    [
        ({"style": "style"}, ["subject"], "No subject LoRA is chosen"),
        ({**NAMES, "subject": "sbject"}, ["subject"], "nearest: 'subject'"),
        ({**NAMES, "subject": "/etc/passwd"}, ["subject"], "lists no LoRA named"),
        ({**NAMES, "subjct_weight": 1}, ["subjct_weight"], "did you mean 'subject_weight'"),
        (
            {**NAMES, "alpha": "x", "steps": 0, "seed": "1"},
            ["alpha", "steps", "seed"],
            "'steps' must be a whole number from 1 to 1000",
        ),
        ({**NAMES, "steps": True}, ["steps"], "whole number"),
        ({**NAMES, "format": "jpg"}, ["format"], "'format' must be json or png"),
    ],
)
def test_a_wrong_request_gets_a_sentence_for_each_fault(body, fields, said):
    answer = client().post("/klora/v1/analyze", json=body)
    assert answer.status_code == 422
    assert sorted(answer.json()["fields"]) == sorted(fields)
    assert said in answer.json()["detail"]


def test_a_file_that_is_not_a_lora_gets_a_sentence(networks, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not a LoRA")
    networks.put(*networks.on_disk, NetworkOnDisk("broken", folder=tmp_path))
    answer = client().post("/klora/v1/analyze", json={**NAMES, "style": "broken"})
    assert answer.status_code == 422
    assert "broken.safetensors" in answer.json()["detail"]
    assert str(tmp_path) not in answer.json()["detail"]


def test_one_analysis_runs_at_a_time_and_a_sentence_says_when_too_many_wait(monkeypatch):
    running, most, goes_on = [], [], threading.Event()

    def slow(*args, turn, **kwargs):
        with turn():
            running.append(1)
            most.append(len(running))
            goes_on.wait(20)
            running.pop()
        return analyze(*args, **kwargs)

    monkeypatch.setattr(api, "analyze", slow)
    host, codes = client(), []

    def ask():
        codes.append(host.post("/klora/v1/analyze", json=NAMES).status_code)

    waiting = [threading.Thread(target=ask) for _ in range(analysis_queue.MOST_AT_ONCE)]
    for thread in waiting:
        thread.start()
    while analysis_queue.slots._value:
        threading.Event().wait(0.01)
    refused = host.post("/klora/v1/analyze", json=NAMES)
    goes_on.set()
    for thread in waiting:
        thread.join()
    assert refused.status_code == 503
    assert "try again" in refused.json()["detail"]
    assert codes == [200] * analysis_queue.MOST_AT_ONCE
    assert max(most) == 1
    assert host.post("/klora/v1/analyze", json=NAMES).status_code == 200


def post(messages):
    """The statuses that a server sends when a client's messages are these; the last message is repeated."""
    app, sent = FastAPI(), []
    api.register(app)
    scope = {
        "type": "http", "method": "POST", "path": "/klora/v1/analyze", "raw_path": b"/klora/v1/analyze",
        "root_path": "", "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"},
        "query_string": b"", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    coming = list(messages)

    async def receive():
        await asyncio.sleep(0.01)
        return coming.pop(0) if len(coming) > 1 else coming[0]

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return [message["status"] for message in sent if "status" in message]


def test_an_analysis_stops_when_its_client_disconnects(monkeypatch):
    def endless(*_args, cancelled, **_kwargs):
        while not cancelled():
            time.sleep(0.01)
        raise Cancelled

    monkeypatch.setattr(api, "analyze", endless)
    request = {"type": "http.request", "body": json.dumps(NAMES).encode(), "more_body": False}
    assert post([request, {"type": "http.disconnect"}]) == [499]
    monkeypatch.undo()


def test_one_that_waits_for_a_generation_stops_too(queue_lock):
    request = {"type": "http.request", "body": json.dumps(NAMES).encode(), "more_body": False}
    with queue_lock:
        assert post([request, {"type": "http.disconnect"}]) == [499]
    assert analysis_queue.slots._value == analysis_queue.MOST_AT_ONCE
    assert client().post("/klora/v1/analyze", json=NAMES).status_code == 200


def test_an_analysis_waits_until_the_generation_is_over(queue_lock):
    codes = []
    asking = threading.Thread(
        target=lambda: codes.append(client().post("/klora/v1/analyze", json=NAMES).status_code)
    )
    with queue_lock:
        asking.start()
        asking.join(0.5)
        assert codes == []
    asking.join(20)
    assert codes == [200]


def test_one_whose_scores_are_known_waits_for_nothing(queue_lock):
    known = client().post("/klora/v1/analyze", json=NAMES).json()
    with queue_lock:
        assert client().post("/klora/v1/analyze", json=NAMES).json() == known


def test_while_a_pair_is_scored_no_generation_can_start(queue_lock, monkeypatch):
    free, real = [], scores.over_layers

    def spy(*args, **kwargs):
        free.append(queue_lock.acquire(blocking=False))
        return real(*args, **kwargs)

    monkeypatch.setattr(scores, "over_layers", spy)
    assert client().post("/klora/v1/analyze", json=NAMES).status_code == 200
    assert free == [False, False]
    assert queue_lock.acquire(blocking=False)


BODIES = {
    "nothing": b"", "no JSON": b"{", "not a number": b"NaN", "a list": b"[]", "a string": b'"subject"',
    "brackets without end": b"[" * 60_000,
    "bytes that are not text": b"\xff\xfe\x00", "a number of 5000 digits": b'{"steps": ' + b"9" * 5000 + b"}",
    "many names": json.dumps({**NAMES, **{f"name{i}": i for i in range(2000)}}).encode(),
    "half a surrogate pair": b'{"subject": "\\ud800", "style": "style"}',
    **{f"{name} {value}": json.dumps({**NAMES, name: value}).encode()
       for name in ("alpha", "gamma", "seed", "steps", "method", "subject_weight")
       for value in (float("nan"), float("inf"), 1e300, -(10**400), [], {"a": [1]}, "x" * 60_000, True)},
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_whatever_is_sent_the_answer_is_a_sentence(body):
    answer = client().post("/klora/v1/analyze", content=BODIES[body])
    assert answer.status_code == 422
    sentence = answer.json()["detail"]
    assert sentence.isprintable()
    assert 20 < len(sentence) < 3000


def test_a_request_of_a_megabyte_is_not_read(monkeypatch):
    answer = client().post("/klora/v1/analyze", json={**NAMES, "subject": "x" * 2**20})
    assert answer.status_code == 413
    assert "longer than" in answer.json()["detail"]


OUTSIDE = (
    "../{}",
    "sub/../../{}",
    "{}",
    "./{}",
    "C:{}",
    "file://{}",
    "{}\x00.safetensors",
    "~/{}",
    "..\\{}",
    "link/{}",
)


@pytest.mark.parametrize("form", OUTSIDE)
def test_no_name_makes_it_open_a_file_that_the_host_does_not_list(networks, tmp_path, form):
    """Python's audit events show every file that it opens."""
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((PAIR / "style.safetensors").read_bytes())
    lora_folder = tmp_path / "Lora"
    lora_folder.mkdir()
    (lora_folder / "link").symlink_to(tmp_path)
    for path in (secret, secret.with_suffix("")):
        with opened() as paths:
            answer = client().post("/klora/v1/analyze", json={**NAMES, "style": form.format(path)})
        assert answer.status_code == 422
        assert not [opened for opened in paths if "secret" in opened]


@contextmanager
def opened():
    """The paths that are opened within it."""
    found = []
    listeners.append(found)
    try:
        yield found
    finally:
        listeners.remove(found)


listeners: list[list[str]] = []


def on_audit(event, arguments):
    if event == "open" and listeners:
        for found in listeners:
            found.append(str(arguments[0]))


sys.addaudithook(on_audit)


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
    assert {path for path in page["paths"] if "klora" in path} == {
        f"/klora/v1/{name}" for name in ("schema", "loras", "analyze")
    }
    request = page["paths"]["/klora/v1/analyze"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert request["properties"].keys() == {*json_schema()["properties"], "steps", "seed", "format"}
    assert "image/png" in page["paths"]["/klora/v1/analyze"]["post"]["responses"]["200"]["content"]
    assert all(
        method["tags"] == ["K-LoRA"] for name, path in page["paths"].items() for method in path.values()
    )
