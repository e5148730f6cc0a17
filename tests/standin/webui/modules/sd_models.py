"""A small denoiser with SDXL's or SD 1.5's layer names and its text encoders, read as the host does."""

import math
from pathlib import Path
from zlib import crc32

import networks
import numpy as np
import torch
from safetensors.torch import load_file
from standin import ANOTHER_BASE, OF_SD15
from torch import nn

from modules import shared

WIDTH = 16
CHUNK = 75
BLOCKS = {
    "sdxl": {"input_blocks": [4, 7], "middle_block": [None], "output_blocks": [0, 4]},
    "sd15": {"input_blocks": [1, 7], "middle_block": [None], "output_blocks": [3, 11]},
}
"""Some of the places where a UNet has transformers; here each has one block."""

TRANSFORMER = (
    "proj_in", *(f"transformer_blocks.0.{attention}.{part}" for attention in ("attn1",
    "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2", "transformer_blocks.0.norm1",
    "proj_out",
)  # fmt: skip


class Patched:
    """A layer whose forward has the networks in force applied to its weight first, or to its output."""

    def forward(self, x):
        if shared.opts.lora_functional:
            return networks.network_forward(self, x, type(self).own_forward)
        networks.network_apply_weights(self)
        return self.own_forward(x)

    def store(self, weight, dtype):
        """Another checkpoint's weight: whatever was applied to the one before is forgotten."""
        networks.network_reset_cached_weight(self)
        self.fp16_weight = (
            weight.half() if dtype is not torch.float32 and shared.opts.cache_fp16_weight else None
        )
        self.weight.data = weight.float().to(dtype)


class Linear(Patched, nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH, bias=False)

    def own_forward(self, x):
        return x @ self.weight.float().T


class Projection(Patched, nn.Conv2d):
    """SD 1.5's proj_in and proj_out: a linear layer that is written as a convolution of one tap."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH, 1, bias=False)

    def own_forward(self, x):
        return x @ self.weight.float().flatten(1).T


class Conv(Patched, nn.Conv2d):
    def __init__(self):
        super().__init__(4, 4, 3, padding=1, bias=False)

    def own_forward(self, x):
        return nn.functional.conv2d(x, self.weight.float(), padding=1)


class Norm(Patched, nn.LayerNorm):
    def __init__(self):
        super().__init__(WIDTH, bias=False)

    def own_forward(self, x):
        return nn.functional.layer_norm(x, [WIDTH], self.weight.float())


def put(root, path, module):
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, module)
    return module


class Denoiser(nn.Module):
    """Every layer changes what goes through it, so every weight in force shows in the result."""

    def __init__(self, base):
        super().__init__()
        self.embedding = [put(self, f"time_embed.{i}", Linear()) for i in (0, 2)]
        self.conv_in = [put(self, "input_blocks.0.0", Conv())]
        places = [
            f"{stage}.{number}.1" if number is not None else f"{stage}.1"
            for stage, numbers in BLOCKS[base].items()
            for number in numbers
        ]
        kinds = {"norm": Norm, "proj": Projection if base == "sd15" else Linear}
        self.chain = [
            put(self, f"{place}.{name}", next((kinds[part] for part in kinds if part in name), Linear)())
            for place in places
            for name in TRANSFORMER
        ]
        self.conv_out = [put(self, "out.2", Conv())]

    def forward(self, x, timesteps, context):
        emb = torch.outer(timesteps.float() / 1000, torch.linspace(-1, 1, WIDTH))
        for layer in self.embedding:
            emb = torch.tanh(layer(emb)) + emb
        emb = (emb + context.mean(1))[:, None]
        h = self.conv_in[0](x).reshape(len(x), -1, WIDTH) + emb
        for layer in self.chain:
            h = h + 0.3 * torch.tanh(layer(h))
        return self.conv_out[0](torch.tanh(h).reshape(x.shape))


class TextEncoder(nn.Module):
    def __init__(self, paths):
        super().__init__()
        self.chain = [put(self, path, Linear()) for path in paths]

    def forward(self, words):
        for layer in self.chain:
            words = words + 0.5 * torch.tanh(layer(words))
        return words


class Model(nn.Module):
    """The object in shared.sd_model.

    One of another base model has the same layers, so that a LoRA that is applied there by mistake shows.
    """

    def __init__(self, config):
        super().__init__()
        self.used_config = config
        said = Path(config).read_text()
        self.is_sd1 = OF_SD15 in said
        self.is_sdxl = not self.is_sd1 and ANOTHER_BASE not in said
        self.model = nn.Module()
        self.model.diffusion_model = Denoiser("sd15" if self.is_sd1 else "sdxl")
        first = TextEncoder(
            [f"transformer.text_model.encoder.layers.0.mlp.{name}" for name in ("fc1", "fc2")]
        )
        second = TextEncoder([f"model.transformer.resblocks.0.mlp.{name}" for name in ("c_fc", "c_proj")])
        self.encoders = {"te": first} if self.is_sd1 else {"te1": first, "te2": second}
        self.parts = {"model": self.model, **self.encoders}
        prefixes = {"model": "", "te": "", "te1": "0_", "te2": "1_"}
        self.network_layer_mapping = {}
        for prefix, part in ((prefixes[name], part) for name, part in self.parts.items()):
            for path, module in part.named_modules():
                module.network_layer_name = prefix + path.replace(".", "_")
                self.network_layer_mapping[module.network_layer_name] = module

    def layers(self):
        return {
            f"{part}.{path}": module
            for part, root in self.parts.items()
            for path, module in root.named_modules()
            if isinstance(module, Patched)
        }

    def load(self, info, tensors):
        dtype = torch.float8_e4m3fn if shared.opts.fp8_storage != "Disable" else torch.float32
        for name, layer in self.layers().items():
            layer.store(tensors[f"{name}.weight"], torch.float32 if isinstance(layer, Norm) else dtype)
        self.fp8 = dtype is not torch.float32
        self.sd_checkpoint_info = info

    @torch.no_grad()
    def apply_model(self, x, timesteps, context):
        return self.model.diffusion_model(x, timesteps, context)

    @torch.no_grad()
    def get_learned_conditioning(self, prompt):
        """One row a chunk of the prompt, shape (chunks, WIDTH)."""
        words = prompt.split() or [""]
        rows = []
        for first in range(0, len(words), CHUNK):
            seeds = [crc32(word.encode()) for word in words[first : first + CHUNK]]
            row = torch.stack(
                [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            ).mean(0)
            rows.append(sum(encoder(row) for encoder in self.encoders.values()))
        return torch.stack(rows)

    def decode_first_stage(self, latent, width, height):
        """The bits of the latent as pixels, so that no difference is rounded away."""
        return np.resize(latent.numpy().view(np.uint8), (height, width, 3))

    def encode_first_stage(self, pixels):
        height, width, _ = pixels.shape
        blocks = (
            torch.tensor(pixels)
            .float()
            .reshape(height // 8, 8, width // 8, 8, 3)
            .mean((1, 3))
            .permute(2, 0, 1)
            / 127.5
            - 1
        )
        return torch.cat([blocks, blocks.mean(0, keepdim=True)])


class CheckpointInfo:
    def __init__(self, path):
        self.filename, self.name = str(path), path.name
        self.shorthash = f"{crc32(path.read_bytes()):08x}"
        self.title = self.short_title = f"{path.name} [{self.shorthash}]"
        self.config = str(path.with_suffix(".yaml"))

    def tensors(self):
        path = Path(self.filename)
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, weights_only=True)["state_dict"]
        )


checkpoints = {}
SIGMAS = torch.exp(torch.linspace(math.log(0.03), math.log(14.6), 1000))


def list_models():
    checkpoints.clear()
    for path in sorted((shared.cmd_opts.folder / "models" / "Stable-diffusion").iterdir()):
        if path.suffix in (".safetensors", ".ckpt"):
            info = CheckpointInfo(path)
            checkpoints.update({info.name: info, info.title: info})


class ModelData:
    """What has the loaded checkpoint."""

    @property
    def sd_model(self):
        return shared.sd_model


model_data = ModelData()


def get_closet_checkpoint_match(name):
    return checkpoints.get(name)


def reload_model_weights(info=None):
    """Load a checkpoint, by default the one of the options.

    It goes into the model that is there if that has the same configuration file.
    """
    info = info or checkpoints[shared.opts.sd_model_checkpoint]
    model = shared.sd_model
    fp8 = shared.opts.fp8_storage != "Disable"
    if model is not None and model.sd_checkpoint_info.filename == info.filename and model.fp8 == fp8:
        return
    if model is None or model.used_config != info.config:
        model = Model(info.config)
    model.load(info, info.tensors())
    shared.sd_model = model
