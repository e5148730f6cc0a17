"""Trains and validates the recognisers: `python -m evaluation.miniature.recognisers FOLDER`, after train.py.

One recogniser tells subjects apart across styles, one tells styles apart across subjects. Gram statistics are
tested on the same renders.
Half of what they learn from has been through the model's autoencoder, as every image of the model has.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from evaluation.image_metrics import Recogniser, gram
from evaluation.miniature import train, world

RENDERS, HELD_OUT, PASSES, BATCH = 14000, 2000, 14, 32
SUBJECT_LABELS = [*world.CLASSES, *(f"subject_{name}" for name in world.SUBJECTS)]
STYLE_LABELS = [*world.FAMILIES, *(f"style_{name}" for name in world.STYLES)]


def labelled(seed: int) -> tuple[np.ndarray, int, int]:
    """A render with its labels.

    Some ordinary things wear what the subjects wear, and some ordinary styles have the colours of STYLES, so
    that these alone do not give a subject or a style away.
    """
    rng = np.random.default_rng(seed)
    if rng.random() < 0.4:
        name = str(rng.choice(list(world.SUBJECTS)))
        scene, _ = world.subject_scene(rng, world.SUBJECTS[name])
        thing = f"subject_{name}"
    else:
        scene, words = world.random_scene(rng)
        thing = words["kind"]
        if rng.random() < 0.4:
            scene = replace(
                scene,
                pattern=str(rng.choice(["", *world.PATTERNS])),
                extra=str(rng.choice(["", *world.EXTRAS])),
            )
    if rng.random() < 0.45:
        manner = str(rng.choice(list(world.STYLES)))
        style, manner = world.STYLES[manner][1], f"style_{manner}"
    else:
        style = world.Style("plain") if rng.random() < 0.3 else world.random_style(rng)
        manner = style.family
        if manner != "plain" and rng.random() < 0.25:
            other = [own for _, own in world.STYLES.values() if own.family != manner][
                int(rng.integers(len(world.STYLES) - 1))
            ]
            style = replace(style, paper=other.paper, ink=other.ink)
    return world.render(scene, style, seed), SUBJECT_LABELS.index(thing), STYLE_LABELS.index(manner)


def renders(seeds: range) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Images, subject labels and style labels."""
    drawn = [labelled(seed) for seed in seeds]
    return (
        np.stack([p for p, _, _ in drawn]),
        torch.tensor([s for _, s, _ in drawn]),
        torch.tensor([m for _, _, m in drawn]),
    )


def through_the_autoencoder(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """The images as the model can show them at best, uint8 of the same shape."""
    shown = []
    for start in range(0, len(images), 100):
        with torch.no_grad():
            back = vae.decode(
                vae.encode(train.as_tensor(images[start : start + 100])).latent_dist.mean
            ).sample
        shown.append(((back.permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
    return np.concatenate(shown)


def roughened(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Add a little blur, noise and shift of colours, as in the images of a diffusion model."""
    blurred = nn.functional.avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.from_numpy(rng.uniform(0, 0.7, (len(pixels), 1, 1, 1))).float()
    tint = torch.from_numpy(rng.normal(0, 0.06, (len(pixels), 3, 1, 1))).float()
    noise = torch.from_numpy(rng.normal(0, 0.06, tuple(pixels.shape))).float()
    return (1 - share) * pixels + share * blurred + tint + noise


def train_recogniser(
    network: Recogniser, images: np.ndarray, shown: np.ndarray, wanted: torch.Tensor
) -> None:
    """Train on renders and, half of the time, on what `shown` has in their place."""
    steps = PASSES * len(images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    network.train()
    for step in range(steps):
        rng = np.random.default_rng(step)
        torch.manual_seed(step)
        chosen = rng.integers(0, len(images), BATCH)
        seen = np.where(rng.random((BATCH, 1, 1, 1)) < 0.5, images[chosen], shown[chosen])
        logits = network(roughened(train.as_tensor(seen), rng))
        loss = nn.functional.cross_entropy(logits, wanted[chosen], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def accuracy(network: Recogniser, images: np.ndarray, wanted: torch.Tensor, only: str) -> str:
    with torch.no_grad():
        guessed = torch.cat(
            [network(train.as_tensor(images[i : i + 100])).argmax(1) for i in range(0, len(images), 100)]
        )
    right = (guessed == wanted).double()
    own = torch.tensor([network.labels[i].startswith(only) for i in wanted])
    taken = torch.tensor([network.labels[i].startswith(only) for i in guessed])
    return (
        f"{right.mean():.1%} of {len(right)} held-out renders; {right[own].mean():.1%} of those of "
        f"{only[:-1]}s; {(taken & ~own).sum() / (~own).sum():.1%} of the others taken for one"
    )


def gram_accuracy(images: np.ndarray, wanted: torch.Tensor, references: dict[str, list[Image.Image]]) -> str:
    measures = {name: gram(shown) for name, shown in references.items()}
    own = [i for i, label in enumerate(wanted) if STYLE_LABELS[label] in measures]
    found = np.stack([measure([Image.fromarray(images[i]) for i in own]) for measure in measures.values()])
    names = list(measures)
    right = [names[best] == STYLE_LABELS[wanted[i]] for best, i in zip(found.argmax(0), own, strict=True)]
    return (
        f"{np.mean(right):.1%} of {len(own)} held-out renders in {len(names)} styles are nearest to the "
        "images of their own style"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vae = AutoencoderKL.from_pretrained(options.folder / "model" / "vae").eval()
    out = options.folder / "measures"
    out.mkdir(exist_ok=True)
    images, things, manners = renders(range(20_000_000, 20_000_000 + RENDERS))
    test, test_things, test_manners = renders(range(30_000_000, 30_000_000 + HELD_OUT))
    shown, test_shown = (through_the_autoencoder(vae, drawn) for drawn in (images, test))
    torch.manual_seed(0)
    for name, labels, whole, wanted, held in (
        ("subject", SUBJECT_LABELS, True, things, test_things),
        ("style", STYLE_LABELS, False, manners, test_manners),
    ):  # fmt: skip
        network = Recogniser(labels, whole)
        train_recogniser(network, images, shown, wanted)
        network.save(out / f"{name}_recogniser.safetensors")
        train.log(out, f"{name} recogniser: {accuracy(network, test, held, name + '_')}")
        train.log(out, f"the same through the autoencoder: {accuracy(network, test_shown, held, name + '_')}")
    references = {
        f"style_{name}": [
            Image.fromarray(world.render(world.random_scene(np.random.default_rng(i))[0], style, i))
            for i in range(5)
        ]
        for name, (_, style) in world.STYLES.items()
    }
    train.log(out, f"Gram statistics: {gram_accuracy(test, test_manners, references)}")
    train.log(out, f"the same through the autoencoder: {gram_accuracy(test_shown, test_manners, references)}")


if __name__ == "__main__":
    main()
