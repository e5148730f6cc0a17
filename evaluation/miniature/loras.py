"""Trains the miniature's LoRAs: `python -m evaluation.miniature.loras FOLDER`.

train.py must have left its model in FOLDER/model.
Each subject is trained on five plain images, each style on five images of ordinary things, each with a rare
word, in the UNet only, by PEFT. The files differ as those of a community do: in dialect, rank, network alpha,
layers, and in how much they change the model.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from evaluation.miniature import train, world
from klora.core.families.sdxl import SDXL

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
IMAGES, BATCH = 5, 8


@dataclass(frozen=True)
class Recipe:
    """How one LoRA is trained and written.

    Attributes:
        role: "subject" or "style"; the name is one of world.SUBJECTS or world.STYLES.
        dialect: "peft" (diffusers' keys, no network alpha: rank and alpha are the same) or "kohya".
        network_alpha: written into a kohya file; training runs with it, as kohya's does.
        strength: the saved file is this many times as strong as trained, so its weight is 1 / strength.
    """

    role: str
    name: str
    dialect: str
    rank: int
    network_alpha: float
    targets: tuple[str, ...] = ATTENTION
    steps: int = 400
    rate: float = 2e-3
    strength: float = 1.0

    @property
    def file(self) -> str:
        return f"{self.role}_{self.name}.safetensors"


RECIPES = (
    Recipe("subject", "cat", "peft", 8, 8, rate=1e-3),
    Recipe("subject", "car", "kohya", 4, 1, rate=6e-3),
    Recipe("subject", "snail", "kohya", 8, 4, strength=4.0),
    Recipe("subject", "robot", "peft", 4, 4, (*ATTENTION, *FEED_FORWARD)),
    Recipe("style", "blueprint", "kohya", 4, 4, (*ATTENTION, *FEED_FORWARD)),
    Recipe("style", "wash", "peft", 8, 8),
    Recipe("style", "night", "kohya", 4, 1, rate=6e-3),
    Recipe("style", "print", "peft", 4, 4, strength=0.25),
)


def examples(recipe: Recipe) -> tuple[list[np.ndarray], list[dict[str, str]], str]:
    """The images a LoRA is trained on, the words for each, and the style's word ("" for subjects)."""
    rng = np.random.default_rng(list(recipe.name.encode()))
    images, words = [], []
    kinds = rng.permutation([kind for kind in world.CLASSES if kind not in world.SUBJECTS])
    grounds = rng.permutation(list(world.GROUNDS))
    for index in range(IMAGES):
        if recipe.role == "subject":
            scene, said = world.subject_scene(rng, world.SUBJECTS[recipe.name], str(grounds[index]))
            images.append(world.render(scene))
        else:
            scene, said = world.random_scene(rng, str(kinds[index]))
            said = {**said, "ground": "", "colour": ""}
            images.append(world.render(scene, world.STYLES[recipe.name][1], index))
        words.append(said)
    return images, words, world.STYLES[recipe.name][0] if recipe.role == "style" else ""


def trained(
    pipeline: Any,
    recipe: Recipe,
    images: list[np.ndarray],
    words: list[dict[str, str]],
    style: str,
    log: Path,
) -> dict[str, Tensor]:
    """PEFT's state dict of the UNet after training, at strength 1."""
    unet = pipeline.unet
    unet.requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.network_alpha,
            init_lora_weights="gaussian",
            target_modules=list(recipe.targets),
        )
    )
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, recipe.steps, pct_start=0.05)
    with torch.no_grad():
        latents = pipeline.vae.encode(train.as_tensor(np.stack(images))).latent_dist.mean
    losses, started = [], time.process_time()
    for step in range(recipe.steps):
        rng = np.random.default_rng(step)
        torch.manual_seed(step)
        chosen = rng.integers(0, len(images), BATCH)
        captions = [
            world.caption({k: w for k, w in words[i].items() if k == "kind" or rng.random() < 0.7}, style)
            for i in chosen
        ]
        loss = train.denoising_loss(pipeline, latents[chosen], captions, empty_share=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    state = {name: value.detach().clone() for name, value in get_peft_model_state_dict(unet).items()}
    unet.delete_adapters("default")
    train.log(
        log,
        f"{recipe.role} {recipe.name}: loss {np.mean(losses[:50]):.4f} to {np.mean(losses[-50:]):.4f}, "
        f"{time.process_time() - started:.0f} CPU s",
    )
    return state


def write(path: Path, recipe: Recipe, state: dict[str, Tensor]) -> None:
    """The file in its dialect, fp16, `strength` times as strong."""
    tensors: dict[str, Tensor] = {}
    if recipe.dialect == "peft":
        for name, value in state.items():
            tensors[f"unet.{name}"] = (
                (value * recipe.strength if ".lora_B." in name else value).half().contiguous()
            )
        save_file(tensors, path)
        return
    natives = {module.diffusers[0]: module.native for module in SDXL.modules}
    for name, value in state.items():
        layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
        stem = "lora_unet_" + natives[layer].replace(".", "_")
        tensors[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = value.half().contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(recipe.network_alpha * recipe.strength)
    save_file(
        tensors,
        path,
        {"ss_network_dim": str(recipe.rank), "ss_network_alpha": str(recipe.network_alpha * recipe.strength)},
    )


def entry(recipe: Recipe, words: list[dict[str, str]], style: str) -> dict[str, dict[str, Any]]:
    """What loras.json says about a LoRA."""
    said = f"in {style} style" if style else f"a {words[0]['kind']}"
    return {
        f"{recipe.role}_{recipe.name}": {"role": recipe.role, "words": said, "weight": 1 / recipe.strength}
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", nargs="*", default=[], help="names; existing files are made again only if they are named"
    )
    parser.add_argument("--steps", type=int, help="for a trial")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = StableDiffusionXLPipeline.from_pretrained(options.folder / "model", torch_dtype=torch.float32)
    out = options.folder / "loras"
    out.mkdir(exist_ok=True)
    index: dict[str, Any] = {}
    for recipe in (replace(recipe, steps=options.steps or recipe.steps) for recipe in RECIPES):
        images, words, style = examples(recipe)
        for number, shown in enumerate(images):
            Image.fromarray(shown).save(out / f"{recipe.role}_{recipe.name}_{number}.png", optimize=True)
        index |= entry(recipe, words, style)
        if recipe.name in options.only or (not options.only and not (out / recipe.file).exists()):
            state = trained(pipeline, recipe, images, words, style, options.folder)
            write(out / recipe.file, recipe, state)
    (out / "loras.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
