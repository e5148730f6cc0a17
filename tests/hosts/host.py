"""A WebUI, as the tests see it: its HTTP API and its folder."""

import base64
import io
import json
import os
import signal
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from shutil import copystat

import numpy as np
import torch
from facts import FACTS, FIELDS, kind_of
from PIL import Image
from safetensors.torch import load_file, save_file

from klora.core.lora_file import read_lora
from klora.webui.options import Options

SMALL = {"prompt": "a cat", "steps": 4, "width": 128, "height": 128, "seed": 42}
SAME_MODULES = {"hr_additional_modules": ["Use same choices"]}
"""What Forge has to be told for a hires pass; other hosts ignore it."""
LISTS = {**SAME_MODULES, "styles": []}
"""The fields that the API of Forge cannot read from an infotext (TypeError), with or without K-LoRA."""
OURS = {f"klora_{name}": value for name, value in vars(Options()).items()}
"""K-LoRA's options as they are declared."""
DECLARED = {
    **OURS,
    "sd_lora": "None",
    "lora_add_hashes_to_infotext": True,
    "ad_script_names": (
        "dynamic_prompting,dynamic_thresholding,lora_block_weight,negpip,wildcard_recursive,wildcards"
    ),
}
"""Extensions' options until they are changed, if the API (Neo's, or A1111's for ADetailer) does not tell."""
PROBE_MISSING = "link tests/hosts/probe into the WebUI's extensions and start it again"


class Host(ABC):
    """Its folder, what is known about its kind, and three LoRAs that it lists and that fit its checkpoint."""

    reload_seconds = 0
    """How long to send it no request after "Reload UI"."""

    def __init__(self, kind, folder, subject, style, other, checkpoint):
        self.facts, self.folder = FACTS[kind], Path(folder)
        self.subject, self.style, self.other, self.checkpoint = subject, style, other, checkpoint

    @abstractmethod
    def call(self, path, body=None):
        """(status, JSON answer) of one request, which is a POST if it has a body."""

    @property
    def pair(self):
        return {"subject": self.subject, "style": self.style}

    @cached_property
    def base(self):
        """The key of its checkpoint's family, found from a LoRA."""
        return read_lora(self.file(self.subject)).base

    @property
    def clocks(self):
        return self.facts.clocks[kind_of(self.base)]

    @property
    def configuration(self):
        """The file that it keeps its options in."""
        return self.folder / "config.json"

    def file(self, name):
        return next((self.folder / "models" / "Lora").rglob(f"{name}.safetensors"))

    def request(self, klora=None, **fields):
        body = {**SMALL, **FIELDS[kind_of(self.base)], **fields}
        if klora is not None:
            body["alwayson_scripts"] = {
                **body.get("alwayson_scripts", {}),
                "K-LoRA": {"args": klora if isinstance(klora, list) else [klora]},
            }
        return self.call("/sdapi/v1/img2img" if "init_images" in body else "/sdapi/v1/txt2img", body)

    def answer(self, klora=None, **fields):
        """The JSON answer of a request that succeeds, with its "info" parsed."""
        status, answer = self.request(klora, **fields)
        assert status == 200, answer
        return {**answer, "info": json.loads(answer["info"])}

    def images(self, klora=None, **fields):
        """(pixel arrays, infotext of the first image) of a request that succeeds."""
        answer = self.answer(klora, **fields)
        return [pixels(image) for image in answer["images"]], answer["info"]["infotexts"][0]

    def image(self, klora=None, **fields):
        return self.images(klora, **fields)[0][0]

    def plot(self):
        """What the host tells about its X/Y/Z plot script."""
        return next(
            script
            for script in self.call("/sdapi/v1/script-info")[1]
            if script["name"] == "x/y/z plot" and not script["is_img2img"]
        )

    def grid(self, x, x_values, y="Nothing", y_values=""):
        """Fields of a plot whose answer ends with the single images.

        Controls other than its axes are left as on the host's page.
        """
        controls = self.plot()["args"]
        axes, others = controls[:9], controls[9:]
        labels = axes[0]["choices"]
        text, words = (x_values, []) if isinstance(x_values, str) else ("", x_values)
        args = [labels.index(x), text, words, labels.index(y), y_values, [], 0, "", []]
        args += [control["label"] == "Include Sub Images" or control["value"] for control in others]
        return {"script_name": "x/y/z plot", "script_args": args}

    def applied(self):
        """(networks of each layer at every evaluation, number of layers rewritten) since it was last asked.

        Only for hosts whose layers keep the names of their networks.
        """
        status, answer = self.call("/klora-probe/v1/applied")
        assert status == 200, PROBE_MISSING
        return answer["calls"], answer["applies"]

    def weights(self, klora=None, **fields):
        """Checksums of all weights of the denoiser, at every evaluation of a request that succeeds."""
        self.call("/klora-probe/v1/weights")
        self.images(klora, **fields)
        status, calls = self.call("/klora-probe/v1/weights")
        assert status == 200, PROBE_MISSING
        return calls

    def counts(self):
        """{place: how often the host's function there has been called since this was last asked}."""
        status, counts = self.call("/klora-probe/v1/counts")
        assert status == 200, PROBE_MISSING
        return counts

    @contextmanager
    def options(self, **values):
        """With some of the host's options set to other values."""
        before = self.values_of(values)
        try:
            assert self.call("/sdapi/v1/options", values)[0] == 200
            yield
        finally:
            self.call("/sdapi/v1/options", before)

    def values_of(self, names):
        """{option: its value}, from the file or from `DECLARED` if the API does not tell it."""
        kept = json.loads(self.configuration.read_bytes()) if self.configuration.exists() else {}
        values = {**DECLARED, **kept, **self.call("/sdapi/v1/options")[1]}
        return {name: values[name] for name in names}

    @contextmanager
    def storing(self, storage):
        """With the checkpoint loaded again, in one of the storages of `facts`."""
        values = self.facts.storages[storage]
        if not self.facts.storage_needs_reload:
            with self.options(**values):
                yield
            return
        names = [Path(model["filename"]).name for model in self.call("/sdapi/v1/sd-models")[1]]
        other = next(name for name in names if name != self.checkpoint)
        with (
            self.options(**values, sd_model_checkpoint=other),
            self.options(sd_model_checkpoint=self.checkpoint),
        ):
            yield

    @contextmanager
    def fault(self, place, call, kind, times=1):
        """With the host's own function at `place` failing at its n-th call and `times` times in a row.

        Checks at the end that it did.
        """
        assert (
            self.call("/klora-probe/v1/fault", {"place": place, "call": call, "kind": kind, "times": times})[
                0
            ]
            == 200
        )
        yield
        assert self.call("/klora-probe/v1/fault")[1] == {"armed": False}, (
            f"{place} was not called {call} times"
        )

    @contextmanager
    def more_loras(self, **files):
        """With {name: tensors} as LoRA files that the host lists."""
        paths = [self.file(self.subject).with_name(f"{name}.safetensors") for name in files]
        try:
            for path, tensors in zip(paths, files.values(), strict=True):
                save_file({key: value.clone() for key, value in tensors.items()}, path)
            self.call("/sdapi/v1/refresh-loras", {})
            yield
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
            self.call("/sdapi/v1/refresh-loras", {})

    @contextmanager
    def another_checkpoint(self, of_its_own=True):
        """With another checkpoint, whose weights differ a little; yields its name.

        Args:
            of_its_own: whether it has its own configuration file, if the host has such files. A1111 loads
                such a checkpoint as a new model, and any other into the model that is already there.
        """
        first = self.folder / "models" / "Stable-diffusion" / self.checkpoint
        path = first.with_name("klora_test_second.safetensors") if of_its_own else first.with_suffix(".ckpt")
        configuration = path.with_suffix(".yaml")
        written = [path, configuration] if of_its_own and self.facts.configurations else [path]
        tensors = {
            key: value + value.std(unbiased=False) * 0.05 if value.is_floating_point() else value
            for key, value in load_file(first).items()
        }
        try:
            if of_its_own:
                save_file(tensors, path)
            else:
                torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)
            if configuration in written:
                configuration.write_bytes(first.with_suffix(".yaml").read_bytes())
            self.call("/sdapi/v1/refresh-checkpoints", {})
            yield path.name
        finally:
            for file in written:
                file.unlink(missing_ok=True)
            self.call("/sdapi/v1/refresh-checkpoints", {})

    def reload(self):
        """Like the button "Reload UI"; returns once images can be made again."""

        def started():
            try:
                return self.call("/klora-probe/v1/started")[1].get("started")
            except (OSError, ValueError):
                return None

        before, patience = started(), time.monotonic() + 120
        assert before
        self.call("/klora-probe/v1/reload", {})
        time.sleep(self.reload_seconds)
        while (now := started()) in (None, before):
            assert time.monotonic() < patience, "the WebUI did not come back"
            time.sleep(0.2)
        assert now > before


class RunningHost(Host):
    """The host that KLORA_HOST_URL and KLORA_HOST_FOLDER name.

    KLORA_HOST_KIND says what it is: a1111 (the default), forge or neo.
    """

    reload_seconds = 15
    """A1111 exits ("Cannot add middleware") at a request between the start of its server and of its API."""

    @classmethod
    def from_environment(cls):
        """The host that the environment names, None without KLORA_HOST_URL."""
        of = os.environ.get
        if not of("KLORA_HOST_URL"):
            return None
        loras = (
            of("KLORA_SUBJECT", "xl_subject"),
            of("KLORA_STYLE", "xl_style"),
            of("KLORA_OTHER", "xl_style_attn"),
        )
        host = cls(
            of("KLORA_HOST_KIND", "a1111"),
            os.environ["KLORA_HOST_FOLDER"],
            *loras,
            of("KLORA_CHECKPOINT", "tiny_sdxl.safetensors"),
        )
        host.url = os.environ["KLORA_HOST_URL"].rstrip("/")
        if of("KLORA_BASE"):
            host.base = os.environ["KLORA_BASE"]
        return host

    @contextmanager
    def ready(self):
        """With the checkpoint and the options of these tests; its configuration is restored at the end."""
        loaded = (self.call("/sdapi/v1/options")[1]["sd_model_checkpoint"] or "").startswith(self.checkpoint)
        checkpoint = {} if loaded else {"sd_model_checkpoint": self.checkpoint}
        with (
            terminated_as_interrupted(),
            self.configuration_kept(),
            self.options(**OURS, **self.facts.options, **checkpoint),
        ):
            yield

    @contextmanager
    def configuration_kept(self):
        """With a copy of its configuration file, which is put back byte for byte.

        It is needed because the host writes all options that were ever set.

        Raises:
            RuntimeError: the run before was killed; its copy has been put back.
        """
        spare = self.configuration.with_name("config.json.before-klora-tests")
        if spare.exists():
            spare.replace(self.configuration)
            raise RuntimeError(
                f"The tests before these were killed. {self.configuration} is put back as they found it: "
                "start the WebUI again, which still has their options, and then the tests."
            )
        if self.configuration.exists():
            spare.write_bytes(self.configuration.read_bytes())
        try:
            yield
        finally:
            if spare.exists():
                spare.replace(self.configuration)
            else:
                self.configuration.unlink(missing_ok=True)

    def call(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@contextmanager
def terminated_as_interrupted():
    """With SIGINT, even if ignored before, SIGTERM and SIGHUP like Ctrl-C: everything is put back then."""

    def interrupt(*_):
        raise KeyboardInterrupt

    numbers = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pixels(image):
    """An image of an answer, in base64, as an array."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))


def complaint(answer):
    """What an error answer says, in A1111's field or one of Forge's two."""
    return answer.get("errors") or answer.get("message") or answer["detail"]


def as_base64(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def same(a, b):
    return a.shape == b.shape and bool((a == b).all())


def tag(name, weight=1):
    return f"<lora:{name}:{weight}>"


@contextmanager
def replaced(path, tensors, when, in_place):
    """With another file in place of the one at `path`.

    Args:
        when: its modification time, in seconds after that of the file before.
        in_place: whether it is written into the same file.
    """
    before, changed = path.read_bytes(), path.stat().st_mtime
    try:
        new = path.with_suffix(".new")
        save_file({key: value.clone() for key, value in tensors.items()}, new)
        os.utime(new, (changed + when, changed + when))
        if in_place:
            path.write_bytes(new.read_bytes())
            copystat(new, path)
            new.unlink()
        else:
            new.replace(path)
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, (changed, changed))
