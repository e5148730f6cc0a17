"""A WebUI in a few objects: a second implementation of `klora.hosts.base.Host`, without a WebUI's modules.

It calls the methods of its processing object and K-LoRA's hooks in the same order as the real ones, and like
them it catches every exception of a hook. It records what was on the layers at every evaluation of its
denoiser.
"""

from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from klora.core.families import FAMILIES
from klora.core.families.unlisted import unlisted
from klora.core.lora_file import read_lora
from klora.hosts.base import Checkpoint, HostLora, PassSchedule
from klora.hosts.sizes import LayerSize
from klora.webui import run as runs

UNLISTED = unlisted("another model", {}, lambda _key: None, {})
SIZES = {f"input_blocks.4.1.transformer_blocks.0.attn1.to_{name}": (8, 8) for name in "qkv"}
RANK = 2


class Model:
    """The object that a checkpoint is loaded into.

    Args:
        base: its base model, None for one that K-LoRA does not know.
    """

    def __init__(self, file, base="sdxl"):
        self.file, self.base = file, base


class Switch:
    """`PairSwitch` that records what is done with it.

    Attributes:
        log: names of the methods called.
        on_layers: {layer: strengths} while attached, else None.
    """

    def __init__(self, model, pair):
        self.model_name, self.log, self.on_layers, self.failure, self._pair = model.file, [], None, None, pair

    def expire_loaded(self):
        self.log.append("expire loaded")

    def tags(self):
        return [(lora.name, lora.weight) for lora in self._pair.loras]

    def networks_loaded(self):
        self.log.append("networks loaded")

    @contextmanager
    def attached(self):
        self.log.append("attached")
        yield
        self.log.append("let go")

    def leave(self):
        self.log.append("leave")

    def fail(self, error):
        self.failure = error

    def attach(self):
        self.log.append("attach")
        self.on_layers = {}

    def apply(self, strengths):
        self.on_layers.update(strengths)

    def detach(self):
        self.on_layers = None


class Adapter:
    """`Adapter` of the host below.

    Attributes:
        switches: those made, the newest last.
    """

    def __init__(self):
        self.switches = []

    def family_of(self, model):
        return FAMILIES[model.base] if model.base else UNLISTED

    def sizes_of(self, _model):
        return {layer: LayerSize(shape) for layer, shape in SIZES.items()}

    def switch(self, model, pair):
        self.switches.append(Switch(model, pair))
        return self.switches[-1]


class Entry:
    """`LoraEntry`."""

    shorthash = None

    def __init__(self, path):
        self.filename, self.alias = str(path), path.stem

    def read_hash(self):
        self.shorthash = f"hash of {self.alias}"


class InMemoryHost:
    """`Host`.

    Args:
        folder: an empty folder for LoRA files.

    Attributes:
        options: {option that was set: its value}.
        loaded: the model of the loaded checkpoint.
        state: of the run at every method of the processing object, [(method, state)].
        reported: messages of `report`.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.options = {}
        self.loaded = Model("first.safetensors")
        self.adapter = Adapter()
        self.state, self.reported = [], []
        self._lock = Lock()
        for seed, name in enumerate(("dog", "ink", "other")):
            write_lora(self.folder / f"{name}.safetensors", seed)

    def loras(self):
        return [HostLora.of(path.stem, Entry(path)) for path in sorted(self.folder.glob("*.safetensors"))]

    def refresh_loras(self):
        pass

    def lora_of_tag(self, name):
        return next((lora for lora in self.loras() if lora.name == name), None)

    def lora_folders(self):
        return [self.folder]

    def preview_of(self, _lora):
        return None

    def checkpoint(self):
        return Checkpoint(self.loaded, self.loaded.file, self.loaded.file, self.adapter)

    checkpoint_at_rest = checkpoint

    def schedule_of_pass(self, p):
        return (
            PassSchedule(p.steps, p.steps // 2, p.steps - p.steps // 2)
            if p.is_hr_pass
            else PassSchedule(p.steps, 0, p.steps)
        )

    def tag_words(self):
        return ["lora"]

    def tag(self, name, weight):
        return SimpleNamespace(positional=[name, str(weight)])

    def activate(self, p, tags):
        p.loaded.append([tag.positional[0] for tag in tags["lora"]])
        self.hook(p, lambda run: run.networks_loaded(tags))

    def queue_lock(self):
        return self._lock

    def is_awaited(self):
        return False

    def is_generating(self):
        return False

    def is_interrupted(self):
        return False

    @contextmanager
    def scoring_progress(self):
        yield lambda _done, _total: None

    def device(self):
        return torch.device("cpu")

    def option(self, name, default):
        return self.options.get(name, default)

    def set_option(self, name, value):
        self.options[name] = value

    def api_credentials(self):
        return {}

    def report(self, message):
        self.reported.append(message)

    def hook(self, p, action):
        """Call the run, if there is one, as scripts/klora_script.py does."""
        run = runs.run_of(p)
        try:
            if run is not None:
                action(run)
        except Exception as error:  # noqa: BLE001 as the script does
            runs.fail(p, error, self)

    def generate(self, p, settings):
        """Run a whole generation. Returns the host's answer."""
        runs.release(p)
        try:
            runs.start(p, settings, self)
        except Exception as error:  # noqa: BLE001 as the script does
            runs.fail(p, error, self)
        p.init()
        for iteration in range(p.n_iter):
            p.iteration = iteration
            p.parse_extra_network_prompts()
            self.activate(p, p.extra_network_data)
            p.setup_conds()
            p.sample()
        answer = SimpleNamespace(extra_generation_params=p.extra_generation_params, images=[])
        self.hook(p, lambda run: run.tell(answer))
        runs.release(p)
        return answer


class Processing:
    """One generation.

    Args:
        tags: names of the LoRAs that its prompt has tags for.
        during: {method or evaluation, as "evaluation 3": what happens there}.

    Attributes:
        loaded: names of what the host loaded, each time.
        evaluations: what was on the layers, [(pass, step, strengths or None)].
    """

    def __init__(self, host, tags=(), n_iter=1, enable_hr=False, steps=4, during=()):
        self.host, self.tags, self.n_iter, self.enable_hr, self.steps = host, tags, n_iter, enable_hr, steps
        self.during = dict(during)
        self.is_hr_pass, self.iteration, self.seeds, self.script_args = False, 0, [1], [0]
        self.disable_extra_networks, self.override_settings = False, {}
        self.extra_generation_params, self.comments = {}, []
        self.loaded, self.evaluations = [], []

    def comment(self, text):
        self.comments.append(text)

    def init(self):
        self._at("init")

    def parse_extra_network_prompts(self):
        def tags():
            return defaultdict(list, lora=[self.host.tag(name, 0.5) for name in self.tags])

        self.extra_network_data, self.hr_extra_network_data = tags(), tags()

    def cached_params(self):
        return ("prompt",)

    def setup_conds(self):
        self._at("setup_conds")

    def sample(self):
        self._at("sample")
        self._pass()
        if self.enable_hr:
            self.is_hr_pass = True
            self.host.activate(self, self.hr_extra_network_data)
            self._pass()
            self.is_hr_pass = False

    def _pass(self):
        config = SimpleNamespace(name="Euler", total_steps=lambda steps: steps)
        self.sampler = SimpleNamespace(config=config, model_wrap_cfg=SimpleNamespace(step=0))
        self.host.hook(self, lambda run: run.begin_pass())
        for step in range(self.host.schedule_of_pass(self).runs):
            self.sampler.model_wrap_cfg.step = step
            self._at(f"evaluation {len(self.evaluations)}")
            params = SimpleNamespace(denoiser=self.sampler.model_wrap_cfg)
            self.host.hook(self, lambda run, params=params: run.at_call(params))
            self._evaluate(step)

    def _evaluate(self, step):
        switch = self.host.adapter.switches[-1] if self.host.adapter.switches else None
        on_layers = switch.on_layers if switch else None
        if on_layers is not None and switch.failure:
            raise switch.failure
        self.evaluations.append(
            ("hires" if self.is_hr_pass else "first", step, on_layers and dict(on_layers))
        )

    def _at(self, place):
        run = runs.run_of(self)
        self.host.state.append((place, run and run.state.value))
        if place in self.during:
            self.during[place](self)


def write_lora(path, seed, sizes=SIZES):
    """Write a LoRA for the layers of `sizes`, with kohya's keys."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (rows, columns) in sizes.items():
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{stem}.lora_up.weight"] = torch.randn(rows, RANK, generator=random)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(RANK, columns, generator=random)
        tensors[f"{stem}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)
    return read_lora(path)
