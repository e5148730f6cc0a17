"""The miniature, shipped with the sources: a trained toy SDXL, its LoRAs, and the metrics for its world."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.image_metrics import Metric, Recogniser, gram, recognised
from klora.core.families.sdxl import SDXL
from klora.errors import HostError

FOLDER = Path(__file__).resolve().parent / "data"
SIZE = (64, 64)
GUIDANCE = 3.0


@dataclass(frozen=True)
class OwnLora:
    """One of the miniature's LoRAs.

    Attributes:
        words: what calls it in a prompt, such as "a sks cat" or "in ktb style".
        weight: the weight to use it at.
    """

    name: str
    role: str
    words: str
    weight: float

    @property
    def path(self) -> Path:
        return FOLDER / "loras" / f"{self.name}.safetensors"

    def images(self) -> list[Image.Image]:
        """The images it was trained on."""
        return [
            Image.open(path).convert("RGB") for path in sorted(self.path.parent.glob(f"{self.name}_*.png"))
        ]


def fingerprint() -> str:
    """A text that changes with any file of the miniature."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def loras(role: str) -> list[OwnLora]:
    """All subjects, or all styles.

    Raises:
        HostError: the miniature is missing.
    """
    try:
        index = json.loads((FOLDER / "loras" / "loras.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(
            f"The miniature is not in {FOLDER}: get the whole repository, not the package alone."
        ) from error
    return [
        OwnLora(name, about["role"], about["words"], about["weight"])
        for name, about in index.items()
        if about["role"] == role
    ]


def load_model() -> Any:
    """The miniature's StableDiffusionXLPipeline, float32 on the CPU.

    Raises:
        HostError: the miniature is missing.
    """
    from klora.runner import load_pipeline

    pipeline = load_pipeline(FOLDER / "model", SDXL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cpu")


def metrics(subject: OwnLora, style: OwnLora) -> dict[str, Metric]:
    """The probabilities that an image shows the subject and the style, and a second opinion on the style."""
    return {
        "subject": recognised(
            Recogniser.load(FOLDER / "measures" / "subject_recogniser.safetensors"), subject.name
        ),
        "style": recognised(
            Recogniser.load(FOLDER / "measures" / "style_recogniser.safetensors"), style.name
        ),
        "style (Gram)": gram(style.images()),
    }
