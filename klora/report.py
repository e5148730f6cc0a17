"""The report that `analyze` prints: what the two files are, and what K-LoRA will choose."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from klora.analysis import Analysis
from klora.core.lora_file import LoraFile
from klora.core.methods import STYLE, SUBJECT

BAR_WIDTH = 40


def preflight(analysis: Analysis) -> str:
    """The report as text, with one fact in each line."""
    return "\n".join([
        *_file_lines("subject", analysis.subject),
        *_file_lines("style", analysis.style),
        *_pair_lines(analysis),
        *_share_lines(analysis),
        *(f"warning: {warning}" for warning in analysis.warnings),
    ])  # fmt: skip


def _file_lines(role: str, lora: LoraFile) -> Iterator[str]:
    yield f"{role:8} {lora.path}"
    kinds = ", ".join(f"{kind} {count}" for kind, count in lora.kinds.items())
    ranks = value_range([layer.rank for layer in lora.layers.values()])
    alphas = value_range([layer.network_alpha for layer in lora.layers.values()])
    base = lora.family.short_name
    yield f"         {base}, {lora.dialect} keys; {kinds}; rank {ranks}, network alpha {alphas}"
    encoders = (
        ", ".join(f"{name} {count}" for name, count in lora.text_encoder_layers.items() if count) or "none"
    )
    rest = f"norms and biases: {len(lora.unscored)}; unknown tensors: {len(lora.unknown_keys)}"
    yield f"         {len(lora.layers)} layers; text encoder layers: {encoders}; {rest}"


def value_range(values: list) -> str:
    """The smallest and the largest of these numbers as text; None is ignored."""
    known = sorted({value for value in values if value is not None})
    if not known:
        return "none"
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}"


def _pair_lines(analysis: Analysis) -> Iterator[str]:
    plan, layers = analysis.plan, analysis.plan.scores.layers
    alone = {role: sum(layer.only == role for layer in layers) for role in ("subject", "style")}
    only = ", ".join(f"{count} only in the {role}" for role, count in alone.items())
    yield f"pair     {len(layers) - sum(alone.values())} layers shared, {only}"
    yield f"         gamma {plan.gamma:.6g}"
    still = np.array([not steps for steps in plan.switches()])
    first = plan.strengths[0]
    subject, style = (int((still & (first == levels).all(axis=1)).sum()) for levels in (SUBJECT, STYLE))
    mixed = int(still.sum()) - subject - style
    stay = f"{subject} stay with the subject, {style} with the style" + (
        f", {mixed} carry both" if mixed else ""
    )
    yield f"         {int(still.sum())} layers never switch: {stay}"


def _share_lines(analysis: Analysis) -> Iterator[str]:
    plan = analysis.plan
    yield f"step     S       subject's share ({plan.method}, {plan.steps} steps)"
    for step, (s, share) in enumerate(zip(plan.schedule.values(plan.steps), plan.subject_share, strict=True)):
        yield f"{step:4}     {s:5.3f}   {'#' * round(share * BAR_WIDTH):{BAR_WIDTH}} {share:6.1%}"
