"""A running WebUI, as the tests see it: its HTTP API and its folder."""

import base64
import io
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = {"prompt": "a cat", "steps": 4, "width": 128, "height": 128, "seed": 42, "sampler_name": "Euler a", "scheduler": "Automatic"}


@dataclass(frozen=True)
class Host:
    """Its address, its folder, and two LoRAs of its registry that fit its checkpoint."""

    url: str
    folder: Path
    subject: str
    style: str

    @classmethod
    def from_environment(cls):
        """The host that KLORA_HOST_URL and KLORA_HOST_FOLDER name, None without."""
        url = os.environ.get("KLORA_HOST_URL")
        if not url:
            return None
        subject, style = os.environ.get("KLORA_SUBJECT", "xl_subject"), os.environ.get("KLORA_STYLE", "xl_style")
        return cls(url.rstrip("/"), Path(os.environ["KLORA_HOST_FOLDER"]), subject, style)

    @property
    def pair(self):
        return {"subject": self.subject, "style": self.style}

    def file(self, name):
        return next((self.folder / "models" / "Lora").rglob(f"{name}.safetensors"))

    def call(self, path, body=None):
        """(status, JSON answer) of one request; a POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def request(self, klora=None, **fields):
        body = {**SMALL, **fields}
        if klora is not None:
            body["alwayson_scripts"] = {**body.get("alwayson_scripts", {}), "K-LoRA": {"args": klora if isinstance(klora, list) else [klora]}}
        return self.call("/sdapi/v1/img2img" if "init_images" in body else "/sdapi/v1/txt2img", body)

    def pictures(self, klora=None, **fields):
        """(pixel arrays, infotext of the first) of a request that works."""
        status, answer = self.request(klora, **fields)
        assert status == 200, answer
        arrays = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in answer["images"]]
        return arrays, json.loads(answer["info"])["infotexts"][0]

    def picture(self, klora=None, **fields):
        return self.pictures(klora, **fields)[0][0]

    def applied(self):
        """What the probe saw since it was last asked: networks of every layer at every evaluation, and the layers rewritten."""
        status, answer = self.call("/klora-probe/v1/applied")
        assert status == 200, "link tests/hosts/probe into the WebUI's extensions and start it again"
        return answer["calls"], answer["applies"]
