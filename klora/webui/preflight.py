"""The page's card as JSON: what the files are, whether they fit the checkpoint, and the pair's scores."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klora.analysis import pair_warnings, plan_for
from klora.core.blocks import block_of, forward_order, group_of
from klora.core.changes import as_changes, number
from klora.core.families.base import Family
from klora.core.lora_file import LoraFile
from klora.core.methods import MAGNITUDES, METHODS, Comparison
from klora.core.pair_scores import PairScores
from klora.core.schedule import ALPHA_M, SCHEDULES
from klora.core.scores import Turn, score_pair
from klora.errors import KLoraError, printable
from klora.hosts.base import HostLora
from klora.hosts.webui import HOST
from klora.level_colours import PAIRS, colour_of, words_of
from klora.lora_metadata import trained_on, trigger_words
from klora.report import value_range
from klora.settings import DEFAULTS, SPECS, Settings
from klora.webui import infotext, loras, options

ROLES = ("subject", "style")


def constants() -> dict[str, Any]:
    """What the page's scripts need before they ask for anything.

    These are the colour and the words for every pair of strengths, by its code (`PAIRS`); the rules of the
    methods that compare; the schedules; and the settings' initial values, bounds and names in an image's
    parameters.
    """
    return {
        "levels": [
            {
                "subject": number(subject),
                "style": number(style),
                "colour": "#{:02x}{:02x}{:02x}".format(*colour_of(subject, style)),
                "words": words_of(subject, style),
            }
            for subject, style in PAIRS
        ],
        "comparisons": {
            name: {
                "magnitude": rule.magnitude.field if rule.magnitude else None,
                "gamma": rule.uses_gamma,
                "s": rule.uses_s,
            }
            for name, method in METHODS.items()
            if isinstance(rule := method.strengths, Comparison)
        },
        "magnitudes": {magnitude.field: magnitude.words for magnitude in MAGNITUDES},
        "seeded": [name for name, method in METHODS.items() if method.seeded],
        "schedules": SCHEDULES,
        "alphaM": ALPHA_M,
        "defaults": {
            name: infotext.control_value(name, value)
            for name, value in {**DEFAULTS, **options.read().run_defaults()}.items()
        },
        "infotext": {name: spec.infotexts for name, spec in SPECS.items() if spec.kind != "flag"},
        "numbers": {
            name: {"label": spec.label, "words": spec.choices, "bounds": spec.bounds}
            for name, spec in SPECS.items()
            if spec.kind == "number"
        },
    }


def placeholder() -> str:
    """HTML of the element in the panel that the page's scripts fill."""
    return f'<div class="klora-view" data-constants="{html.escape(json.dumps(constants()))}"></div>'


def card(names: Mapping[str, str]) -> dict[str, Any]:
    """Facts about the files and the checkpoint; of the files only the headers are read.

    Args:
        names: {"subject" | "style": the host's name for the LoRA, "" if none is chosen yet}.

    Returns:
        "subject" and "style": facts about each file, {"problem": sentence}, or None. "checkpoint":
        {"name", "base"}, or None while none is loaded. "layers": the numbers of layers that both files change
        and that only one does, or None. "problems": why Generate would refuse.
    """
    files: dict[str, LoraFile] = {}
    answer: dict[str, Any] = {
        "subject": None,
        "style": None,
        "layers": None,
        "problems": [],
        "checkpoint": None,
    }
    found: dict[str, HostLora] = {}
    loaded = loras.loaded_family()
    for role in ROLES:
        if names.get(role):
            try:
                found[role] = loras.find(names[role], role)
                files[role] = loras.read(found[role].path, loaded)
            except KLoraError as error:
                answer[role] = {"name": printable(names[role]), "problem": str(error)}
    files = loras.as_pair(files)
    answer |= {role: _file(found[role], file) for role, file in files.items()}
    if len(files) == len(ROLES):
        subject, style = (set(files[role].layers) for role in ROLES)
        answer["layers"] = {
            "shared": len(subject & style),
            "subject": len(subject - style),
            "style": len(style - subject),
        }
        _try(answer, lambda: loras.check_pair(files["subject"], files["style"]))
    _try(answer, lambda: _add_checkpoint(answer, list(files.values())))
    return answer


def scores(
    names: Mapping[str, str], k_scale: float, cancelled: Callable[[], bool], turn: Turn
) -> dict[str, Any]:
    """γ and the scores of a pair.

    "layers" has a list for each column, in the plan's order of layers; `place` is a layer's place in the
    order of the network. "magnitudes" has what the methods compare: {field: {"subject", "style", "ratio"}},
    as `Magnitude` gives them.

    Args:
        cancelled, turn: as for `score_pair`.

    Raises:
        KLoraError: with the sentence for the user.
        Cancelled: `cancelled` returned true.
    """
    subject, style, found = _scored(names, k_scale, cancelled, turn)
    layers = found.layers
    in_order = sorted(range(len(layers)), key=lambda i: forward_order(layers[i].name))
    places = {index: place for place, index in enumerate(in_order)}
    return {
        "gamma": found.gamma,
        "layers": {
            **{
                field: [getattr(layer, field) for layer in layers]
                for field in ("name", "only", "k", "rank_subject", "rank_style")
            },
            "block": [block_of(layer.name) for layer in layers],
            "group": [group_of(layer.name) for layer in layers],
            "place": [places[i] for i in range(len(layers))],
        },
        "magnitudes": {
            magnitude.field: {
                **{role: magnitude.of(found, role).tolist() for role in ROLES},
                "ratio": magnitude.ratios(found).tolist(),
            }
            for magnitude in MAGNITUDES
        },
        "warnings": pair_warnings(subject, style, found, options.read().accelerator_words()),
    }


def strengths(
    names: Mapping[str, str],
    settings: Settings,
    steps: int,
    seed: int,
    cancelled: Callable[[], bool],
    turn: Turn,
) -> dict[str, Any]:
    """The plan of a pair as `as_changes` writes it, for a method whose rule the page does not know.

    Args:
        cancelled, turn: as for `score_pair`.

    Raises:
        KLoraError: with the sentence for the user.
        Cancelled: `cancelled` returned true.
    """
    _, _, found = _scored(names, settings.k_scale, cancelled, turn)
    return as_changes(plan_for(found, settings, steps=steps, seed=seed).strengths)


def _scored(
    names: Mapping[str, str], k_scale: float, cancelled: Callable[[], bool], turn: Turn
) -> tuple[LoraFile, LoraFile, PairScores]:
    paths = {role: loras.find(names[role], role).path for role in ROLES}
    subject, style = loras.read_pair(paths, loras.loaded_family()).values()
    chosen = options.read()
    loras.check_pair(subject, style, chosen.cache())
    found = score_pair(
        subject,
        style,
        k_scale=k_scale,
        cache=chosen.cache(),
        device=chosen.device(),
        cancelled=cancelled,
        turn=turn,
    )
    return subject, style, found


def _try(answer: dict[str, Any], step: Callable[[], None]) -> None:
    try:
        step()
    except KLoraError as error:
        answer["problems"].append(str(error))


def _file(lora: HostLora, file: LoraFile) -> dict[str, Any]:
    layers = file.layers.values()
    return {
        "name": printable(lora.name),
        "base": base_name(file.family),
        "schedule": file.family.schedule,
        "advice": _advice(file.family),
        "trainedOn": trained_on(file.metadata),
        "dialect": file.dialect,
        "kinds": ", ".join(
            f"{kind} ({count})" if len(file.kinds) > 1 else kind for kind, count in file.kinds.items()
        ),
        "rank": value_range([layer.rank for layer in layers]),
        "networkAlpha": value_range([layer.network_alpha for layer in layers]),
        "layers": len(layers),
        "textEncoders": dict(file.text_encoder_layers),
        "unknown": len(file.unknown_keys),
        "words": _words(lora.path, file),
        "preview": HOST.preview_of(lora),
    }


def base_name(family: Family) -> str:
    """What the panel calls a base model."""
    own = "" if family.find is None else " (listed by the WebUI's own names)"
    return f"{family.short_name}{own}"


def _advice(family: Family) -> str:
    """Why the panel offers S* for a base model; empty where it does not."""
    if family.schedule == "s":
        return ""
    if family.in_paper:
        return f"For {family.short_name} the paper's authors recommend the schedule S*."
    return (
        f"{family.short_name} is a flow-matching model like FLUX, for which the paper's authors recommend "
        "the schedule S*."
    )


def _words(path: Path, file: LoraFile) -> list[str]:
    """Trigger words: those that the user entered on the host's card for the LoRA, then those in its file."""
    try:
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        own = notes.get("activation text", "") if isinstance(notes, dict) else ""
    except (OSError, ValueError, RecursionError):
        own = ""
    return trigger_words({"trigger_phrase": str(own)}) + [
        word for word in trigger_words(file.metadata) if word not in str(own)
    ]


def _add_checkpoint(answer: dict[str, Any], files: Sequence[LoraFile]) -> None:
    """Add the loaded checkpoint's name and base, and never make the host load one.

    Nothing is added while none is loaded, or while another is about to take its place.

    Raises:
        HostError: K-LoRA does not know this WebUI.
        PairError: the files do not fit the checkpoint.
    """
    checkpoint = HOST.checkpoint_at_rest()
    if checkpoint is None:
        return
    answer["checkpoint"] = {"name": checkpoint.name, "base": base_name(checkpoint.family)}
    if len({file.family for file in files}) == 1:
        loras.check_checkpoint(files, checkpoint)
