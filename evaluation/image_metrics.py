"""How much images look like a subject, and like a style: one number for each image, higher is more alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from klora.errors import KLoraError

Metric = Callable[[Sequence[Image.Image]], np.ndarray]
"""Takes images and returns their values, float64 of shape (images,)."""

SIDE = 64


class Recogniser(nn.Module):
    """A small convolutional classifier for 64-pixel images.

    Args:
        labels: the classes it tells apart.
        whole: whether it matters where in the image something is (it does for things, not for styles).
    """

    def __init__(self, labels: Sequence[str], whole: bool) -> None:
        super().__init__()
        self.labels = list(labels)
        self.whole = whole
        widths = (3, 24, 48, 64, 96) if whole else (3, 24, 40, 64)
        stages: list[nn.Module] = []
        for before, after in pairwise(widths):
            side = 5 if before == 3 else 3
            stages += [
                nn.Conv2d(before, after, side, stride=2, padding=side // 2),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
        pool: list[nn.Module] = [nn.Flatten()] if whole else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features = nn.Sequential(*stages, *pool, nn.Dropout(0.2))
        self.head = nn.Linear(widths[-1] * (16 if whole else 1), len(self.labels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of shape (images, labels) from pixels in [-1, 1] of shape (images, 3, 64, 64)."""
        return self.head(self.features(pixels))

    def save(self, path: Path) -> None:
        tensors = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, path, {"labels": json.dumps(self.labels), "whole": json.dumps(self.whole)})

    @classmethod
    def load(cls, path: Path) -> Recogniser:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        made = cls(json.loads(about["labels"]), json.loads(about["whole"]))
        made.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return made.eval()


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """The images as float32 in [-1, 1] of shape (images, 3, 64, 64)."""
    small = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2).float() / 127.5
        - 1
    )


def recognised(network: Recogniser, label: str) -> Metric:
    """The probability in [0, 1] that `network` gives to `label`."""
    place = network.labels.index(label)

    def metric(images: Sequence[Image.Image]) -> np.ndarray:
        with torch.no_grad():
            return network(as_pixels(images)).softmax(1)[:, place].double().numpy()

    return metric


def gram(references: Sequence[Image.Image]) -> Metric:
    """Likeness of colours and textures: the cosine between Gram statistics and the mean of the references'.

    As Gatys et al. 2016, but with fixed filters.
    """
    wanted = _direction(np.mean([gram_statistics(image) for image in references], axis=0))

    def metric(images: Sequence[Image.Image]) -> np.ndarray:
        return np.array([float(_direction(gram_statistics(image)) @ wanted) for image in images])

    return metric


def gram_statistics(image: Image.Image) -> np.ndarray:
    """Mean colour, and correlations of colours and of their first and second differences at three scales.

    Float64; the image may have any size.
    """
    pixels = np.asarray(image.convert("RGB"), np.float64) / 255 - 0.5
    found = [pixels.mean((0, 1))]
    for _ in range(3):
        across, down = pixels[:-2, 2:] - pixels[:-2, :-2], pixels[2:, :-2] - pixels[:-2, :-2]
        slant = pixels[2:, 2:] - pixels[:-2, :-2]
        bend = (
            pixels[1:-1, 1:-1] * 4
            - pixels[:-2, 1:-1]
            - pixels[2:, 1:-1]
            - pixels[1:-1, :-2]
            - pixels[1:-1, 2:]
        )
        responses = np.concatenate([pixels[:-2, :-2], across, down, slant, bend], 2).reshape(-1, 15)
        matrix = responses.T @ responses / len(responses)
        found.append(matrix[np.triu_indices(15)])
        height, width = (length // 2 * 2 for length in pixels.shape[:2])
        pixels = pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    values = np.concatenate(found)
    return np.sign(values) * np.sqrt(np.abs(values))


def _direction(values: np.ndarray) -> np.ndarray:
    return values / max(float(np.linalg.norm(values)), 1e-12)


def clip_similarity(folder: Path, references: Sequence[Image.Image]) -> Metric:
    """Mean cosine between the CLIP embedding of an image and those of the references.

    Args:
        folder: a CLIP model as transformers saves it.

    Raises:
        KLoraError: transformers cannot load such a model from the folder.
    """
    from transformers import CLIPVisionModelWithProjection

    return _embedded(folder, references, CLIPVisionModelWithProjection, lambda output: output.image_embeds)


def dino_similarity(folder: Path, references: Sequence[Image.Image]) -> Metric:
    """The same with the class token of a DINO vision transformer.

    Raises:
        KLoraError: transformers cannot load such a model from the folder.
    """
    from transformers import AutoModel

    return _embedded(folder, references, AutoModel, lambda output: output.last_hidden_state[:, 0])


def _embedded(folder: Path, references: Sequence[Image.Image], kind: type, embedding_of: Callable) -> Metric:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        network = kind.from_pretrained(folder, local_files_only=True).eval()  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError) as error:
        raise KLoraError(f"transformers cannot load an image model from {folder}: {error}") from error

    def embeddings(images: Sequence[Image.Image]) -> Tensor:
        with torch.no_grad():
            output = network(
                **processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
            )
        return nn.functional.normalize(embedding_of(output), dim=1)

    wanted = embeddings(references)
    return lambda images: (embeddings(images) @ wanted.T).mean(1).double().numpy()
