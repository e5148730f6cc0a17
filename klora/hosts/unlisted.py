"""What all hosts do alike to list a model that K-LoRA has no record of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from klora.core.families.base import Family

FLAGS = {"is_sd2": "Stable Diffusion 2.x", "is_sd3": "Stable Diffusion 3"}
"""What every host sets on a checkpoint of one of the older base models."""


def name_of_checkpoint(model: Any) -> str:
    """What to call the base model of a loaded checkpoint: by its flag, or by the host's class for it."""
    return next((name for flag, name in FLAGS.items() if getattr(model, flag, False)), type(model).__name__)


def kept(model: Any, make: Callable[[Any], Family]) -> Family:
    """The unlisted family of a loaded checkpoint, made only once.

    A LoRA file is read for one particular record, so the record is kept on the checkpoint.
    """
    attributes: dict[str, Any] = model.__dict__
    if "klora_family" not in attributes:
        attributes["klora_family"] = make(model)
    family: Family = attributes["klora_family"]
    return family
