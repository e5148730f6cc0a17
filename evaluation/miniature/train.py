"""Trains the miniature from scratch, on a CPU: `python -m evaluation.miniature.train FOLDER`.

The order is: images, autoencoder, latents, then the denoiser and the text encoders together. Every part keeps
a checkpoint in FOLDER and resumes from it, with the same result as an uninterrupted run, because the random
numbers of a step depend only on its number. FOLDER/log.txt has the losses and the processor seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.miniature import model, world

VAE_IMAGES, VAE_STEPS, VAE_BATCH = 4000, 3600, 8
VAE_GUIDED = 300
"""Steps in which three latent channels are guided, less and less, to the mean colours of their pixels.

Without that the autoencoder needs thousands of steps to find colours.
"""
LATENT_NOISE = 0.08
IMAGES, UNET_STEPS, UNET_BATCH = 14000, 6000, 32
PLAIN_SHARE = 0.45
CHECKPOINT_SECONDS = 180


def image(seed: int) -> tuple[np.ndarray, dict[str, str], str]:
    """One image of the base model's world, the words for it and its style ("" is plain)."""
    rng = np.random.default_rng(seed)
    scene, words = world.random_scene(rng)
    style = world.Style("plain") if rng.random() < PLAIN_SHARE else world.random_style(rng)
    return world.render(scene, style, seed), words, "" if style.family == "plain" else style.family


def spoken(rng: np.random.Generator, words: dict[str, str], style: str) -> str:
    """A caption that leaves things out at random and sometimes has a rare word without meaning."""
    said = {name: word for name, word in words.items() if name == "kind" or rng.random() < 0.8}
    if rng.random() < 0.12:
        said["kind"] = f"{rng.choice(world.RARE)} {said['kind']}"
    if not style and rng.random() < 0.25:
        style = str(rng.choice([*world.RARE, "plain"]))
    return world.caption(said, style)


class Training:
    """One part of the training: a warm-up, a falling rate, an average of the weights and a checkpoint."""

    def __init__(self, path: Path, networks: nn.ModuleList, steps: int, rate: float, averaged: float) -> None:
        self.path, self.networks, self.steps, self.averaged = path, networks, steps, averaged
        self.optimizer = torch.optim.AdamW(
            networks.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.average = {name: value.detach().clone() for name, value in networks.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if path.exists():
            self._load()

    def _rate(self, step: int) -> float:
        return min(1.0, (step + 1) / 150) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        )

    def run(self, loss_of: Callable[[int], Tensor]) -> None:
        """Train until `steps` are done; afterwards the networks hold the averaged weights."""
        saved, losses, started = time.monotonic(), [], time.process_time()
        before = self.seconds
        while self.step < self.steps:
            torch.manual_seed(self.step)
            loss = loss_of(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self._average()
            losses.append(loss.item())
            self.step += 1
            self.seconds = before + time.process_time() - started
            if time.monotonic() - saved > CHECKPOINT_SECONDS or self.step == self.steps:
                self._save()
                log(
                    self.path.parent,
                    f"{self.path.stem}: step {self.step} of {self.steps}, loss {np.mean(losses):.5f}, "
                    f"{self.seconds:.0f} CPU s",
                )
                saved, losses = time.monotonic(), []
        self.networks.load_state_dict(self.average)

    def _average(self) -> None:
        keep = min(self.averaged, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.networks.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - keep)

    def _save(self) -> None:
        state = {
            "networks": self.networks.state_dict(), "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "step": self.step, "seconds": self.seconds,
        }  # fmt: skip
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]


def log(folder: Path, line: str) -> None:
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    print(line, flush=True)


def draw_images(folder: Path, name: str, seeds: range) -> tuple[np.ndarray, list[Any]]:
    """Images of these seeds, uint8 of shape (count, SIZE, SIZE, 3), with their words and styles.

    They are kept in `folder`.
    """
    path = folder / f"{name}.npz"
    if not path.exists():
        started = time.process_time()
        drawn = [image(seed) for seed in seeds]
        np.savez(
            path,
            images=np.stack([p for p, _, _ in drawn]),
            words=json.dumps([(words, style) for _, words, style in drawn]),
        )
        log(folder, f"{name}: {len(seeds)} images, {time.process_time() - started:.0f} CPU s")
    with np.load(path) as file:
        return file["images"], json.loads(str(file["words"]))


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 (n, SIZE, SIZE, 3) to float32 (n, 3, SIZE, SIZE) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(folder: Path) -> nn.Module:
    """The trained autoencoder.

    Its latents are centred and have unit spread; the scaling is part of its outermost convolutions.
    """
    images, _ = draw_images(folder, "vae_images", range(10_000_000, 10_000_000 + VAE_IMAGES))
    torch.manual_seed(1)
    vae = model.vae()
    training = Training(folder / "vae.pt", nn.ModuleList([vae]), VAE_STEPS, 2e-3, 0.998)

    whitened = _colour_whitening(images)

    def loss_of(step: int) -> Tensor:
        chosen = np.random.default_rng(step).integers(0, len(images), VAE_BATCH)
        wanted = as_tensor(images[chosen])
        latents = vae.encode(wanted).latent_dist.mean
        off = whitened(vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample - wanted)
        fine = sum(off.diff(dim=axis).abs().mean() for axis in (2, 3))
        spread = 0.01 * (
            (latents.std((0, 2, 3)) - 1).square().mean() + latents.mean((0, 2, 3)).square().mean()
        )
        guide = (latents[:, :3] - 2 * whitened(nn.functional.avg_pool2d(wanted, 4))).square().mean()
        return (
            off.abs().mean()
            + off.square().mean()
            + 0.5 * fine
            + spread
            + max(0.0, 1 - step / VAE_GUIDED) * guide
        )

    training.run(loss_of)
    vae.eval()
    with torch.no_grad():
        means = torch.cat(
            [vae.encode(as_tensor(images[i : i + 50])).latent_dist.mean for i in range(0, 1000, 50)]
        )
        middle, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ middle
        vae.post_quant_conv.weight *= spread[None, :, None, None]
        vae.quant_conv.weight[:4] /= spread[:, None, None, None]
        vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - middle) / spread
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * (LATENT_NOISE / spread).log()
        again = vae.encode(as_tensor(images[:100])).latent_dist.mean
        off = (vae.decode(again).sample - as_tensor(images[:100])).abs().mean().item() * 127.5
    vae.register_to_config(scaling_factor=1.0)
    log(
        folder,
        f"vae: spread {spread.tolist()}, latents {again.mean():.3f} ± {again.std():.3f}, {off:.2f} grey "
        "levels off",
    )
    return vae


def _colour_whitening(images: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Turns colours (n, 3, h, w) into coordinates with equal spread over the world's images.

    Lightness varies ten times as much as hue, so with plain red, green and blue the autoencoder learns grey
    long before it learns colours.
    """
    sample = torch.from_numpy(images[:500, ::4, ::4].reshape(-1, 3)).double() / 127.5 - 1
    variances, axes = torch.linalg.eigh(torch.cov(sample.T))
    matrix = (axes / (variances + 0.01).sqrt() @ axes.T / 2).float()
    return lambda pixels: torch.einsum("nchw,dc->ndhw", pixels, matrix)


def encode_images(folder: Path, vae: Any) -> tuple[Tensor, list[Any]]:
    """Latents of all training images, float32 of shape (IMAGES, 4, SIZE / 4, SIZE / 4), and their words."""
    images, words = draw_images(folder, "images", range(IMAGES))
    path = folder / "latents.pt"
    if not path.exists():
        with torch.no_grad():
            latents = torch.cat(
                [
                    vae.encode(as_tensor(images[i : i + 50])).latent_dist.mean
                    for i in range(0, len(images), 50)
                ]
            )
        torch.save(latents, path)
    return torch.load(path, weights_only=True), words


def encoded(pipeline: Any, captions: list[str], empty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Text states (n, TEXT_LENGTH, 2 TEXT_WIDTH) and pooled text (n, TEXT_WIDTH).

    They are as SDXL's pipeline makes them, and zero where `empty` is true.
    """
    tokens = pipeline.tokenizer(
        captions, padding="max_length", max_length=model.TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    first = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    states, pooled = torch.cat([first, second.hidden_states[-2]], -1), second[0]
    if empty is not None:
        states, pooled = states * ~empty[:, None, None], pooled * ~empty[:, None]
    return states, pooled


def denoising_loss(pipeline: Any, latents: Tensor, captions: list[str], empty_share: float = 0.1) -> Tensor:
    """Mean squared error of v at random times."""
    count = len(latents)
    signal = pipeline.scheduler.alphas_cumprod
    # Evenly spread over the batch, shifted at random: less noise in the loss than independent times.
    times = ((torch.arange(count) + torch.rand(())) / count * len(signal)).long().clamp(max=len(signal) - 1)
    a, b = signal[times].sqrt()[:, None, None, None], (1 - signal[times]).sqrt()[:, None, None, None]
    noise = torch.randn_like(latents)
    states, pooled = encoded(pipeline, captions, torch.rand(count) < empty_share)
    sizes = torch.tensor(model.TIME_IDS, dtype=torch.float32).repeat(count, 1)
    got = pipeline.unet(
        a * latents + b * noise,
        times,
        states,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        return_dict=False,
    )[0]
    return (got - (a * noise - b * latents)).square().mean()


def train_denoiser(folder: Path, pipeline: Any, latents: Tensor, words: list[Any]) -> None:
    """UNet and text encoders of `pipeline`, from random weights."""
    networks = nn.ModuleList([pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2])
    training = Training(folder / "unet.pt", networks, UNET_STEPS, 1.2e-3, 0.9985)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng(step)
        chosen = rng.integers(0, len(latents), UNET_BATCH)
        return denoising_loss(pipeline, latents[chosen], [spoken(rng, *words[i]) for i in chosen])

    training.run(loss_of)


def parts(folder: Path) -> Iterator[nn.Module]:
    vae = train_vae(folder)
    yield vae
    latents, words = encode_images(folder, vae)
    pipeline = model.pipeline()
    pipeline.vae = vae
    train_denoiser(folder, pipeline, latents, words)
    pipeline.to(torch.float16).save_pretrained(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for checkpoints and the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only-vae", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for _ in parts(options.folder):
        if options.only_vae:
            break


if __name__ == "__main__":
    main()
