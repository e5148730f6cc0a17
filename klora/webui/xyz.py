"""Axes for the host's X/Y/Z plot, one for each setting that can be an axis."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klora.errors import SettingsError
from klora.hosts.webui import HOST
from klora.settings import SPECS, Settings
from klora.webui import loras

PLOT = "xyz_grid.py"
SCRIPT = "K-LoRA"
NEW_PAIR_COST = 0.5
"""On the host's scale, where another checkpoint costs 1: the plot puts costly axes into its outer loops."""

NUMBER = r"[+-]?\d+(?:\.\d*)?"
BY_STEP = re.compile(rf"({NUMBER})\s*-\s*({NUMBER})(?:\s*\(({NUMBER})\))?")
BY_COUNT = re.compile(rf"({NUMBER})\s*-\s*({NUMBER})\s*\[(\d+)\]")
MOST_VALUES = 1000


class AxisError(RuntimeError):
    """Values of an axis that cannot be used. The host's API answers with `status_code` and `detail`."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.status_code = 422
        self.detail = sentence


def register() -> None:
    """Add the axes to the host's plot; harmless if they are there already."""
    from modules import scripts

    for data in scripts.scripts_data:
        if Path(data.path).name == PLOT:
            known = {option.label for option in data.module.axis_options}
            data.module.axis_options.extend(
                option for option in axes(data.module.AxisOption) if option.label not in known
            )


def axes(axis_option: Callable[..., Any]) -> list[Any]:
    """The axes, made with the host's own class."""
    return [_axis(axis_option, name) for name, spec in SPECS.items() if spec.axis]


def _axis(axis_option: Callable[..., Any], name: str) -> Any:
    spec = SPECS[name]
    more: dict[str, Any]
    if spec.kind == "lora":
        more = {
            "choices": lambda: [lora.chosen_as for lora in HOST.loras()],
            "cost": NEW_PAIR_COST,
            "format_value": _plain_label,
        }
    elif spec.kind == "choice":
        more = {"choices": lambda: list(spec.choices), "format_value": _plain_label}
    else:
        more = {
            "prepare": words_and_numbers,
            "format_value": lambda _p, _option, value: f"{spec.label}: {value}",
        }
    return axis_option(f"[K-LoRA] {spec.label}", str, _apply(name), confirm=_confirm(name), **more)


def _plain_label(_p: Any, _option: Any, value: str) -> str:
    return value


def words_and_numbers(text: str) -> list[str]:
    """The values of a number axis: words, numbers, and the host's own ranges, such as 0-1 (+0.5) and 0-1 [3].

    They stay text, so that K-LoRA refuses what is not a number with a sentence; the host would show Python's.
    """
    values = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if match := BY_COUNT.fullmatch(part):
            low, high, count = float(match[1]), float(match[2]), min(int(match[3]), MOST_VALUES)
            numbers = [low + (high - low) * i / max(count - 1, 1) for i in range(count)]
        elif match := BY_STEP.fullmatch(part):
            low, high, step = float(match[1]), float(match[2]), float(match[3] or 1)
            count = int((high - low) / step + 1e-9) + 1 if step else 1
            numbers = [low + step * i for i in range(min(count, MOST_VALUES))]
        else:
            values.append(part)
            continue
        values += [f"{round(number, 8):g}" for number in numbers]
    return values


def _apply(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, _values: Sequence[Any]) -> None:
        p.klora_xyz = {**getattr(p, "klora_xyz", {}), name: value}

    return apply


def _confirm(name: str) -> Callable[[Any, Sequence[Any]], None]:
    def confirm(p: Any, values: Sequence[Any]) -> None:
        """Check all values before the first image.

        Raises:
            AxisError: with one sentence for every bad value.
        """
        problems = [] if _is_on(p) else ["K-LoRA is off, so this axis would change nothing: switch it on."]
        if not values:
            problems.append("The axis has no values: give at least one.")
        for value in values:
            try:
                Settings.parse({name: value})
                if SPECS[name].kind == "lora":
                    loras.find(value, name)
            except SettingsError as error:
                problems.append(str(error))
        if problems:
            raise AxisError(f"[K-LoRA] {SPECS[name].label}: {' '.join(problems)}")

    return confirm


def _is_on(p: Any) -> bool:
    """Whether the arguments of the always-on script switch K-LoRA on."""
    script = next((script for script in p.scripts.alwayson_scripts if script.title() == SCRIPT), None)
    first = p.script_args[script.args_from] if script else False
    return str(first.get("enabled", True) if isinstance(first, Mapping) else first).lower() == "true"
