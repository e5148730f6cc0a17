"""A stand-in for AUTOMATIC1111, for machines without one. The tests in tests/hosts run against both.

`webui/` has the modules that the extension and the probe import, under the host's names. They are written
from measurements of a running host and contain none of its code. Each image depends on every bit of the
weights at every evaluation, so it shows whatever an extension leaves behind.
"""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from fastapi.testclient import TestClient
from host import Host
from safetensors.torch import save_file

TESTS = Path(__file__).parents[1]
WEBUI = Path(__file__).parent / "webui"
PROBES = sorted((TESTS / "hosts" / "probe" / "scripts").glob("*.py"))
SCRIPTS = (TESTS.parent / "scripts" / "klora_script.py", *PROBES, WEBUI / "scripts" / "xyz_grid.py")
ANOTHER_BASE = "another base model"
"""In the configuration file of a checkpoint that the stand-in takes for one of another base model."""
OF_SD15 = "Stable Diffusion 1.5"
"""In the configuration file of a checkpoint of SD 1.5; others are of SDXL."""
OF_WEBUI = ("modules", "gradio", "network", "networks", "network_lora", "klora.webui.ui")


NAMES = {
    "sdxl": ("xl_subject", "xl_style", "xl_style_attn", "tiny_sdxl.safetensors"),
    "sd15": ("sd_subject", "sd_style", "sd_other", "tiny_sd15.safetensors"),
}


def is_of_webui(name):
    return name in OF_WEBUI or name.startswith("modules.")


class StandIn(Host):
    """A host in this process. Its modules can be imported only while it is `in_place`.

    Args:
        folder: an empty folder for its checkpoint and its LoRAs.
        base: of its checkpoint and its LoRAs, "sdxl" or "sd15".
    """

    def __init__(self, folder, base="sdxl"):
        super().__init__("a1111", folder, *NAMES[base])
        self._configuration = OF_SD15 if base == "sd15" else "of the stand-in"
        self._modules = {}
        with self.in_place():
            self._write_files()
            self._start()

    @contextmanager
    def in_place(self):
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_of_webui(name)}
        sys.modules.update(self._modules)
        sys.path.insert(0, str(WEBUI))
        try:
            yield self
        finally:
            sys.path.remove(str(WEBUI))
            self._modules = {name: sys.modules.pop(name) for name in list(sys.modules) if is_of_webui(name)}
            sys.modules.update(before)

    def call(self, path, body=None):
        answer = self._client.get(path) if body is None else self._client.post(path, json=body)
        shared = sys.modules["modules.shared"]
        if shared.state.restart_requested:
            shared.state.restart_requested = False
            sys.modules["modules.script_callbacks"].call("script_unloaded")
            self._load_scripts()
        return answer.status_code, answer.json()

    def _write_files(self):
        sd_models = importlib.import_module("modules.sd_models")
        checkpoint = self.folder / "models" / "Stable-diffusion" / self.checkpoint
        for path in (checkpoint, self.folder / "models" / "Lora" / "any"):
            path.parent.mkdir(parents=True)
        configuration = checkpoint.with_suffix(".yaml")
        configuration.write_text(self._configuration)
        generator = torch.Generator().manual_seed(1)
        layers = sd_models.Model(configuration).layers()
        save_file(
            {
                f"{name}.weight": torch.randn(layer.weight.shape, generator=generator) * 0.3
                for name, layer in layers.items()
            },
            checkpoint,
        )
        linear = [
            name
            for name, layer in layers.items()
            if isinstance(layer, (sd_models.Linear, sd_models.Projection)) and "time_embed" not in name
        ]
        attention = [name for name in linear if ".attn" in name]
        loras = [
            (self.subject, linear, 4, 2.0),
            (self.style, linear, 2, 2.0),
            (self.other, attention, 3, 3.0),
        ]
        for seed, (name, changed, rank, alpha) in enumerate(loras):
            random = torch.Generator().manual_seed(seed)
            self._write_lora(name, {path: layers[path] for path in changed}, rank, alpha, random)

    def _write_lora(self, name, layers, rank, alpha, generator):
        width, tensors = sys.modules["modules.sd_models"].WIDTH, {}
        for path, layer in layers.items():
            stem = kohya_name(path)
            taps = layer.weight.shape[2:]
            down = torch.randn(rank, width, generator=generator) * 0.3
            up = torch.randn(width, rank, generator=generator) * torch.rand(1, generator=generator)
            tensors[f"{stem}.lora_down.weight"] = down.reshape(*down.shape, *taps)
            tensors[f"{stem}.lora_up.weight"] = up.reshape(*up.shape, *taps)
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        save_file(tensors, self.folder / "models" / "Lora" / f"{name}.safetensors")

    def _start(self):
        shared, sd_models = (
            importlib.import_module("modules.shared"),
            importlib.import_module("modules.sd_models"),
        )
        shared.cmd_opts.folder = self.folder
        shared.cmd_opts.lora_dir = str(self.folder / "models" / "Lora")
        shared.opts.sd_model_checkpoint = self.checkpoint
        sd_models.list_models()
        sd_models.reload_model_weights()
        importlib.import_module("networks").list_available_networks()
        self._load_scripts()

    def _load_scripts(self):
        scripts, callbacks = (
            importlib.import_module("modules.scripts"),
            importlib.import_module("modules.script_callbacks"),
        )
        scripts.scripts_data.clear()
        callbacks.callbacks.clear()
        for path in SCRIPTS:
            scripts.load(path)
        api = importlib.import_module("modules.api").Api()
        self.txt2img = api.runners[False]
        callbacks.call("app_started", None, api.app)
        self._client = TestClient(api.app, raise_server_exceptions=False)


def kohya_name(layer):
    part, _, path = layer.partition(".")
    if part == "model":
        return "lora_unet_" + path.removeprefix("diffusion_model.").replace(".", "_")
    return f"lora_{part}_text_model_encoder_layers_0_mlp_" + {"c_fc": "fc1", "c_proj": "fc2"}.get(
        path.rpartition(".")[2], path.rpartition(".")[2]
    )
