"""A miniature that has learnt nothing, made in a second, where only the way through matters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from evaluation.image_metrics import Recogniser
from evaluation.miniature import loras, model, recognisers


def make(folder: Path) -> None:
    """Model, LoRAs, training images and measures, as the shipped miniature has them."""
    pipeline = model.pipeline()
    linear = {
        name: module for name, module in pipeline.unet.named_modules() if isinstance(module, torch.nn.Linear)
    }
    (folder / "loras").mkdir(parents=True)
    (folder / "measures").mkdir()
    index = {}
    for seed, recipe in enumerate(loras.RECIPES):
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name, module in linear.items():
            if name.endswith(recipe.targets):
                state[f"{name}.lora_A.weight"] = (
                    torch.randn(recipe.rank, module.in_features, generator=generator) / 20
                )
                state[f"{name}.lora_B.weight"] = (
                    torch.randn(module.out_features, recipe.rank, generator=generator) / 20
                )
        loras.write(folder / "loras" / recipe.file, recipe, state)
        images, words, style = loras.examples(recipe)
        for number, shown in enumerate(images):
            Image.fromarray(shown).save(folder / "loras" / f"{recipe.role}_{recipe.name}_{number}.png")
        index |= loras.entry(recipe, words, style)
    (folder / "loras" / "loras.json").write_text(json.dumps(index))
    pipeline.to(torch.float16).save_pretrained(folder / "model")
    Recogniser(recognisers.SUBJECT_LABELS, True).save(folder / "measures" / "subject_recogniser.safetensors")
    Recogniser(recognisers.STYLE_LABELS, False).save(folder / "measures" / "style_recogniser.safetensors")
