"""A WebUI, as the tests see it: its HTTP API and its folder."""

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from facts import FACTS
from PIL import Image

SMALL = {"prompt": "a cat", "steps": 4, "width": 128, "height": 128, "seed": 42, "sampler_name": "Euler a", "scheduler": "Automatic"}


class Host(ABC):
    """Its folder, what is known of its kind, and two LoRAs of its registry that fit its checkpoint."""

    def __init__(self, kind, folder, subject, style, other, checkpoint):
        self.facts, self.folder = FACTS[kind], Path(folder)
        self.subject, self.style, self.other, self.checkpoint = subject, style, other, checkpoint

    @abstractmethod
    def call(self, path, body=None):
        """(status, JSON answer) of one request; a POST if there is a body."""

    @property
    def pair(self):
        return {"subject": self.subject, "style": self.style}

    def file(self, name):
        return next((self.folder / "models" / "Lora").rglob(f"{name}.safetensors"))

    def request(self, klora=None, **fields):
        body = {**SMALL, **fields}
        if klora is not None:
            body["alwayson_scripts"] = {**body.get("alwayson_scripts", {}), "K-LoRA": {"args": klora if isinstance(klora, list) else [klora]}}
        return self.call("/sdapi/v1/img2img" if "init_images" in body else "/sdapi/v1/txt2img", body)

    def answer(self, klora=None, **fields):
        """The JSON answer of a request that works, its "info" parsed."""
        status, answer = self.request(klora, **fields)
        assert status == 200, answer
        return {**answer, "info": json.loads(answer["info"])}

    def pictures(self, klora=None, **fields):
        """(pixel arrays, infotext of the first) of a request that works."""
        answer = self.answer(klora, **fields)
        return [pixels(image) for image in answer["images"]], answer["info"]["infotexts"][0]

    def picture(self, klora=None, **fields):
        return self.pictures(klora, **fields)[0][0]

    def applied(self):
        """What the probe saw since it was last asked: networks of every layer at every evaluation, and the layers rewritten."""
        if self.facts.probed_name is None:
            pytest.skip("the layers of this host keep no names of networks: test_weights.py looks at their weights")
        status, answer = self.call("/klora-probe/v1/applied")
        assert status == 200, "link tests/hosts/probe into the WebUI's extensions and start it again"
        return answer["calls"], answer["applies"]

    @contextmanager
    def options(self, **values):
        """With some of the host's options set otherwise."""
        before = self.call("/sdapi/v1/options")[1]
        assert self.call("/sdapi/v1/options", values)[0] == 200
        try:
            yield
        finally:
            self.call("/sdapi/v1/options", {name: before[name] for name in values})

    @contextmanager
    def fault(self, place, call, kind):
        """Within it the host's own function at `place` raises at its n-th call, which the end checks."""
        assert self.call("/klora-probe/v1/fault", {"place": place, "call": call, "kind": kind})[0] == 200
        yield
        assert self.call("/klora-probe/v1/fault")[1] == {"armed": False}, f"{place} was not called {call} times"

    def reload(self):
        """As the button "Reload UI"; ends when pictures can be made again."""
        def started():
            try:
                return self.call("/klora-probe/v1/started")[1].get("started")
            except (OSError, ValueError):
                return None

        before, patience = started(), time.monotonic() + 120
        assert before
        self.call("/klora-probe/v1/reload", {})
        while (now := started()) in (None, before):
            assert time.monotonic() < patience, "the WebUI did not come back"
            time.sleep(0.2)
        assert now > before


class RunningHost(Host):
    """One that KLORA_HOST_URL and KLORA_HOST_FOLDER name; KLORA_HOST_KIND says what it is (a1111, the default, or forge)."""

    @classmethod
    def from_environment(cls):
        """None without KLORA_HOST_URL."""
        of = os.environ.get
        if not of("KLORA_HOST_URL"):
            return None
        loras = of("KLORA_SUBJECT", "xl_subject"), of("KLORA_STYLE", "xl_style"), of("KLORA_OTHER", "xl_style_attn")
        host = cls(of("KLORA_HOST_KIND", "a1111"), os.environ["KLORA_HOST_FOLDER"], *loras, of("KLORA_CHECKPOINT", "tiny_sdxl.safetensors"))
        host.url = os.environ["KLORA_HOST_URL"].rstrip("/")
        return host

    def call(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def pixels(image):
    """A picture of an answer (base64) as an array."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))


def as_base64(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def same(a, b):
    return a.shape == b.shape and bool((a == b).all())


def tag(name, weight=1):
    return f"<lora:{name}:{weight}>"
