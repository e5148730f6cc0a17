"""Axes of the host's X/Y/Z plot, one per setting that offers one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from klora.errors import SettingsError
from klora.settings import SPECS, Settings, Spec
from klora.webui import loras


def register() -> None:
    """Add the axes to the host's plot, once for each time that the host loads it."""
    from modules import scripts

    for data in scripts.scripts_data:
        plot = data.module
        if getattr(plot, "AxisOption", None) is None or not hasattr(plot, "axis_options"):
            continue
        known = {option.label for option in plot.axis_options}
        plot.axis_options.extend(option for option in axes(plot.AxisOption) if option.label not in known)


def axes(axis_option: Callable[..., Any]) -> list[Any]:
    """The axes, made with the host's own class."""
    return [_axis(axis_option, name, spec) for name, spec in SPECS.items() if spec.axis]


def _axis(axis_option: Callable[..., Any], name: str, spec: Spec) -> Any:
    choices: Callable[[], list[str]] | None = None
    if spec.kind == "lora":
        choices = lambda: [lora.name for lora in loras.list_loras()]  # noqa: E731
    elif spec.choices and spec.kind == "choice":
        choices = lambda: list(spec.choices)  # noqa: E731
    kind = float if spec.kind == "number" and not spec.choices else str
    return axis_option(f"[K-LoRA] {spec.label}", kind, _apply(name), confirm=_confirm(name), choices=choices)


def _apply(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, _values: Sequence[Any]) -> None:
        p.klora_xyz = {**getattr(p, "klora_xyz", {}), name: value}

    return apply


def _confirm(name: str) -> Callable[[Any, Sequence[Any]], None]:
    """Checks all values before the first picture; the host shows a RuntimeError as it stands."""

    def confirm(_p: Any, values: Sequence[Any]) -> None:
        for value in values:
            try:
                Settings.parse({name: value})
                if SPECS[name].kind == "lora":
                    loras.find(value, name)
            except SettingsError as error:
                raise RuntimeError(f"[K-LoRA] {SPECS[name].label}: {error}") from error

    return confirm
