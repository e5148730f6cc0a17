"""From two LoRA files to a plan, with the warnings a person should read before pressing Generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from klora.accelerators import ACCELERATORS, is_accelerator
from klora.core.families.base import Family
from klora.core.foreign_files import other_base_by_metadata
from klora.core.lora_file import LoraFile, for_one_base, read_lora
from klora.core.pair_scores import PairScores
from klora.core.plan import Plan, make_plan
from klora.core.score_cache import ScoreCache
from klora.core.scores import Turn, score_pair
from klora.errors import PairError, printable
from klora.lora_metadata import own_names
from klora.settings import Settings

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Analysis:
    """A pair of LoRA files, its plan, and what the user should know about it."""

    subject: LoraFile
    style: LoraFile
    plan: Plan
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """The JSON of `python -m klora analyze` and of the HTTP API."""
        return self.plan.to_json(self.warnings)


def analyze(
    subject: Path,
    style: Path,
    settings: Settings,
    *,
    steps: int,
    seed: int = 0,
    loaded: Family | None = None,
    cache: ScoreCache | None = None,
    device: torch.device | None = None,
    accelerators: Sequence[str] = ACCELERATORS,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    turn: Turn = nullcontext,
) -> Analysis:
    """Read both files, score the pair and plan a schedule of `steps` steps.

    Args:
        settings: only the method, schedule, α, β, K scale and γ are used.
        seed: for methods that draw random numbers.
        loaded: the family of the checkpoint that the files are to be used with; without it they are read
            for one base model that both fit.
        device: where to score; None means a CUDA or ROCm GPU if there is one, otherwise the CPU.
        accelerators: words in the names of LoRAs that are neither a subject nor a style.
        progress: called as progress(layers done, layers in all) while scoring.
        cancelled: called repeatedly while scoring, which stops once it returns true.
        turn: makes a context manager, which is entered for every pass over a file.

    Raises:
        LoraFileError: a file cannot be used.
        PairError: the files cannot be fused with each other.
        Cancelled: `cancelled` returned true.
    """
    one, other = for_one_base([read_lora(subject, loaded), read_lora(style, loaded)])
    files = one, other
    check_pair(*files)
    scores = score_pair(
        *files,
        k_scale=settings.k_scale,
        cache=cache,
        device=device,
        progress=progress,
        cancelled=cancelled,
        turn=turn,
    )
    plan = plan_for(scores, settings, steps=steps, seed=seed)
    return Analysis(*files, plan, pair_warnings(*files, scores, accelerators))


def plan_for(scores: PairScores, settings: Settings, *, steps: int, seed: int) -> Plan:
    """The plan that these settings make of a pair's scores, for a whole schedule of `steps` steps.

    Args:
        seed: for methods that draw random numbers.
    """
    return make_plan(
        scores,
        steps=steps,
        schedule=settings.schedule_of_run(),
        method=settings.method,
        gamma=settings.gamma,
        seed=seed,
    )


def check_pair(subject: LoraFile, style: LoraFile) -> None:
    """Refuse two files for different base models or inputs, before any work is done.

    Raises:
        PairError: names both files, and their base models or the sizes of their inputs.
    """
    if subject.family is not style.family:
        raise PairError(
            f"The subject LoRA {subject.path.name} is made for {subject.family.short_name} but the style "
            f"LoRA {style.path.name} for {style.family.short_name}: choose two LoRAs of the same base model."
        )
    name = subject.family.image_input
    shapes = [lora.layers[name].shape for lora in (subject, style) if name in lora.layers]
    if len(shapes) == 2 and shapes[0] != shapes[1] and shapes[0][0] == shapes[1][0]:
        one, other = (f"{rows}×{columns}" for rows, columns in shapes)
        raise PairError(
            f"The subject LoRA {subject.path.name} and the style LoRA {style.path.name} were made for "
            f"different inputs ({name} is {one} in the first and {other} in the second): one of them is a "
            "control LoRA, or one for a checkpoint that takes a second image, as for inpainting. Choose "
            "another LoRA in its place."
        )


def pair_warnings(
    subject: LoraFile, style: LoraFile, scores: PairScores, accelerators: Sequence[str] = ACCELERATORS
) -> list[str]:
    """What the user should know about a pair that can be fused, one sentence each."""
    warnings = []
    for role, lora in (("subject", subject), ("style", style)):
        name = lora.path.name
        if any(is_accelerator(text, accelerators) for text in (name, *own_names(lora.metadata))):
            warnings.append(
                f"The {role} LoRA {name} looks like an accelerator, which lets a model work in few steps and "
                "has neither a subject nor a style: put it into the prompt and choose another LoRA here."
            )
        family = lora.family
        shapes = {layer: info.shape for layer, info in lora.layers.items()}
        if (control := family.control_of(lora.unknown_keys, shapes)) is not None:
            warnings.append(
                f"The {role} LoRA {name} is {control}, which follows an image given with the prompt and has "
                "neither a subject nor a style: choose another LoRA here."
            )
        elif (other := other_base_by_metadata(family, lora.metadata)) is not None:
            warnings.append(
                f"The header of the {role} LoRA {name} says that it was made for {other}, whose LoRAs have "
                f"the same names and sizes as those of {family.name}: fuse it only with LoRAs for the "
                "same model."
            )
        elif lora.unknown_keys:
            few = ", ".join(printable(key, 80) for key in lora.unknown_keys[:3]) + (
                ", …" if len(lora.unknown_keys) > 3 else ""
            )
            warnings.append(
                f"{len(lora.unknown_keys)} tensors of the {role} LoRA {name} are left out because K-LoRA "
                f"does not know their names ({few}): if the LoRA works without K-LoRA, please report these "
                "names."
            )
    layers = scores.layers
    alone = {role: sum(layer.only == role for layer in layers) for role in ("subject", "style")}
    for role, lora in (("subject", subject), ("style", style)):
        if alone[role] > len(layers) / 2:
            warnings.append(
                f"{alone[role]} of {len(layers)} layers are changed by the {role} LoRA {lora.path.name} only "
                "and have it at every step: the two files train different parts of the model, so there is "
                "little to choose."
            )
    return [printable(warning) for warning in warnings]
