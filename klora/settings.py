"""The settings of a K-LoRA run: the one declaration that UI, HTTP API, X/Y/Z plot, infotext, command line and README read.

The order of the fields is the order of the positional arguments of the always-on script: append only.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from klora.core.methods import METHODS
from klora.core.schedule import SCHEDULES, Schedule
from klora.errors import SettingsError

MOST_UNKNOWN = 8
LONGEST_WORD = 80
AUTO = "auto"
OFF = "off"


@dataclass(frozen=True)
class Spec:
    """What every surface needs to know of one field.

    Attributes:
        label: the control's label and the name of the X/Y/Z axis.
        help: the tooltip, the README's text, the schema's description.
        infotext: the name in the picture's parameters.
        kind: "flag", "lora", "choice" or "number".
        choices: for "choice" all values; for "number" the words allowed beside numbers, such as "auto".
        bounds: hard limits of a number, inclusive.
        slider: minimum, maximum and step that the UI offers within the bounds.
        axis: whether the X/Y/Z plot offers it.
        advanced: whether the UI folds it away.
        formerly: the field's earlier name, which requests and infotexts may still have.
    """

    label: str
    help: str
    infotext: str
    kind: str
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] = (-math.inf, math.inf)
    slider: tuple[float, float, float] | None = None
    axis: bool = True
    advanced: bool = True
    formerly: str = ""

    @property
    def infotexts(self) -> tuple[str, ...]:
        """The names under which an image's parameters may have it, today's first."""
        return (self.infotext, f"K-LoRA {self.formerly}") if self.formerly else (self.infotext,)


def _field(default: Any, label: str, help: str, kind: str, **more: Any) -> Any:
    spec = Spec(label, help, "K-LoRA " + more.pop("infotext", label[0].lower() + label[1:]), kind, **more)
    return dataclasses.field(default=default, metadata={"spec": spec})


@dataclass(frozen=True)
class Settings:
    """One run's settings. Build them with `Settings.parse`, which checks every value.

    Attributes:
        subject: name of the subject LoRA, as the host lists it (a path on the command line).
        style: name of the style LoRA.
        beta: start of S; None is the schedule's own (0.5 for S, 1.3 for S*).
        gamma: "auto" is eq. (9), "off" is 1, a number replaces it.
    """

    enabled: bool = _field(
        False,
        "Enable",
        "Fuse the subject LoRA and the style LoRA with K-LoRA in this generation.",
        "flag",
        axis=False,
        advanced=False,
    )
    subject: str = _field("", "Subject", "The LoRA of the thing or person to show.", "lora", advanced=False)
    style: str = _field("", "Style", "The LoRA of the style to show it in.", "lora", advanced=False)
    subject_weight: float = _field(
        1.0,
        "Subject weight",
        "How strongly the subject LoRA is applied where it is chosen, as the number in <lora:name:1>. "
        "It never changes which LoRA is chosen.",
        "number",
        bounds=(-10, 10),
        slider=(0, 2, 0.05),
        advanced=False,
    )
    style_weight: float = _field(
        1.0,
        "Style weight",
        "How strongly the style LoRA is applied where it is chosen, as the number in <lora:name:1>. "
        "It never changes which LoRA is chosen.",
        "number",
        bounds=(-10, 10),
        slider=(0, 2, 0.05),
        advanced=False,
    )
    method: str = _field(
        "K-LoRA",
        "Method",
        "How the two LoRAs are put on the layers at each step: the paper's method, its ablations, and what people compare it with.",
        "choice",
        choices=tuple(METHODS),
        formerly="selector",
    )
    schedule: str = _field(
        "s",
        "Schedule",
        "How the favour moves from subject to style during the run: S rises from start to end; "
        "S* gives the style a short moment first (more of its colours and background, less of its brushwork).",
        "choice",
        choices=tuple(SCHEDULES),
    )
    alpha: float = _field(
        1.5,
        "α",
        "Growth of S over the run: higher hands more of the late steps to the style.",
        "number",
        bounds=(-100, 100),
        slider=(0, 4, 0.05),
        infotext="alpha",
    )
    beta: float | None = _field(
        None,
        "β",
        "Start of S: lower gives the subject more of the early steps. auto: 0.5 for S, 1.3 for S*.",
        "number",
        choices=(AUTO,),
        bounds=(-100, 100),
        slider=(0, 2, 0.05),
        infotext="beta",
    )
    k_scale: float = _field(
        1.0,
        "K scale",
        "Multiplies K, the number of largest entries that are summed in each layer. 1 is the paper's K: "
        "the product of both ranks.",
        "number",
        bounds=(0.001, 10_000),
        slider=(0.1, 10, 0.1),
    )
    gamma: float | str = _field(
        AUTO,
        "γ",
        "Balances two LoRAs of different magnitude. auto: from the files (eq. 9 of the paper); off: 1; or a number.",
        "number",
        choices=(AUTO, OFF),
        bounds=(1e-6, 1e6),
        infotext="gamma",
    )
    text_encoder: str = _field(
        "both",
        "Text encoder",
        "Whose text-encoder part applies: it runs before the first step, so no step can choose there.",
        "choice",
        choices=("both", "subject", "style", "none"),
    )
    hires: str = _field(
        "continue",
        "Hires",
        "In the hires pass and in img2img the schedule continues where the noise level stands (continue), "
        "starts again (restart), or K-LoRA stays out and neither LoRA applies in the hires pass (off).",
        "choice",
        choices=("continue", "restart", "off"),
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from loose values (UI, API, command line, infotext); what is missing keeps its default.

        Raises:
            SettingsError: with one sentence for every bad field at once.
        """
        problems: dict[str, str] = {}
        good: dict[str, Any] = {}
        values = _under_todays_names(values)
        unknown = [name for name in values if name not in SPECS]
        for name in unknown[:MOST_UNKNOWN]:
            problems[name] = f"K-LoRA has no setting {_shown(name)}{_nearest(name, SPECS)}"
        if len(unknown) > MOST_UNKNOWN:
            problems[unknown[MOST_UNKNOWN]] = (
                f"And {len(unknown) - MOST_UNKNOWN} more names that are no settings of K-LoRA."
            )
        for name in (name for name in values if name in SPECS):
            value = values[name]
            try:
                good[name] = PARSERS[SPECS[name].kind](SPECS[name], name, value)
            except ValueError as error:
                problems[name] = str(error)
        if good.get("enabled"):
            for name in ("subject", "style"):
                if not good.get(name) and name not in problems:
                    problems[name] = (
                        f"No {name} LoRA is chosen: choose one in {name!r}, or switch K-LoRA off."
                    )
        if problems:
            raise SettingsError(problems)
        return cls(**good)

    @classmethod
    def parse_api(
        cls,
        args: Sequence[Any],
        overrides: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> Settings:
        """Settings from the arguments of the always-on script: one dict, or values in the order of the fields.

        A dict means enabled unless it says `"enabled": false`; it is the first value and the only dict. What else the arguments of a
        run without K-LoRA say does not matter.

        Args:
            overrides: values by name that win over the arguments before anything is checked (the X/Y/Z plot's).
            defaults: values by name for what the arguments leave out.

        Raises:
            SettingsError: as `parse` does.
        """
        if len(args) > len(SPECS):
            raise SettingsError(
                {
                    "args": f"K-LoRA takes {len(SPECS)} values at most ({', '.join(SPECS)}) but got {len(args)}; "
                    "give one dict with the names instead."
                }
            )
        named = args and isinstance(args[0], Mapping)
        more = [place for place, value in enumerate(args[1:], 2) if isinstance(value, Mapping)]
        values = {"enabled": True, **args[0]} if named else dict(zip(SPECS, args, strict=False))
        merged = {**(defaults or {}), **values, **(overrides or {})}
        if merged.get("enabled", False) is False:
            return cls()
        if more:
            raise SettingsError(
                {
                    "args": f"Value {more[0]} of 'args' is a dict: K-LoRA takes its settings by name in one dict, which is the first value, "
                    "or by position without any dict; put all names into the first value."
                }
            )
        return cls.parse(merged)

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in order."""
        return {name: getattr(self, name) for name in SPECS if getattr(self, name) != DEFAULTS[name]}

    def text_encoder_roles(self) -> tuple[str, ...]:
        """Whose text-encoder parts apply, in order: as the rule says, but never of a LoRA that the method leaves out altogether."""
        by_rule = {"both": ("subject", "style"), "subject": ("subject",), "style": ("style",), "none": ()}[
            self.text_encoder
        ]
        return tuple(role for role in by_rule if role != METHODS[self.method].absent)

    def weight(self, role: str) -> float:
        """The multiplier of "subject" or "style"."""
        return self.subject_weight if role == "subject" else self.style_weight

    def schedule_of_run(self) -> Schedule:
        """The scaling factor S(t) that these settings ask for."""
        return Schedule.named(self.schedule, self.alpha, self.beta)


SPECS: dict[str, Spec] = {f.name: f.metadata["spec"] for f in dataclasses.fields(Settings)}
PLAN_FIELDS = ("method", "schedule", "alpha", "beta", "k_scale", "gamma")
"""The fields that make the plan of a pair; the others only matter where an image is made."""
FORMER_NAMES = {spec.formerly: name for name, spec in SPECS.items() if spec.formerly}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Settings)}


def as_text(name: str, value: Any) -> str:
    """A field's value as infotext, command line and X/Y/Z plot write it; `Settings.parse` reads it back."""
    if value is None:
        return AUTO
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)


def json_schema(defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the settings, as the HTTP API takes them.

    Args:
        defaults: {field: default} where it is not the built-in one.
    """
    defaults = {**DEFAULTS, **(defaults or {})}

    def of(name: str, spec: Spec) -> dict[str, Any]:
        common = {"title": spec.label, "description": spec.help}
        if spec.kind == "flag":
            return {**common, "type": "boolean", "default": True}
        if spec.kind == "lora":
            return {**common, "type": "string"}
        if spec.kind == "choice":
            return {**common, "enum": list(spec.choices), "default": defaults[name]}
        number: dict[str, Any] = {"type": "number", "minimum": spec.bounds[0], "maximum": spec.bounds[1]}
        default = AUTO if defaults[name] is None else defaults[name]
        if spec.choices:
            return {**common, "anyOf": [{"enum": list(spec.choices)}, number], "default": default}
        return {**common, **number, "default": default}

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "K-LoRA",
        "type": "object",
        "properties": {name: of(name, spec) for name, spec in SPECS.items()},
        "required": ["subject", "style"],
        "additionalProperties": False,
    }


def markdown_table() -> str:
    """The settings as the README lists them."""
    lines = ["| setting | values | default | |", "| --- | --- | --- | --- |"]
    for name, spec in SPECS.items():
        default = {"": "", "False": "false"}.get(str(DEFAULTS[name]), as_text(name, DEFAULTS[name]))
        lines.append(
            f"| `{name}` | {_values(spec)} | {default} | {spec.help} |".replace("*", "\\*").replace(
                "<", "\\<"
            )
        )
    return "\n".join(lines)


def _under_todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values; of a field that is there under both of its names, the one under today's."""
    former = {FORMER_NAMES[name]: value for name, value in values.items() if name in FORMER_NAMES}
    return {**former, **{name: value for name, value in values.items() if name not in FORMER_NAMES}}


def _values(spec: Spec) -> str:
    if spec.kind == "number":
        return ", ".join([*spec.choices, f"{spec.bounds[0]:g} to {spec.bounds[1]:g}"])
    return {"flag": "true, false", "lora": "name of a LoRA"}.get(spec.kind, ", ".join(spec.choices))


def _nearest(word: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word[:LONGEST_WORD].lower(), [k.lower() for k in known], 1, 0.5)
    names = {k.lower(): k for k in known}
    return f"; did you mean {names[near[0]]!r}?" if near else f"; it has {', '.join(known)}."


def _parse_flag(spec: Spec, name: str, value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{name!r} ({spec.label}) is true or false, not {_shown(value)}.")


def _parse_lora(spec: Spec, name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return "" if value.strip() == "None" else value.strip()
    raise ValueError(f"{name!r} is the name of a LoRA, not {_shown(value)}.")


def _parse_choice(spec: Spec, name: str, value: Any) -> str:
    wanted = str(value).strip().lower().replace("gamma", "γ")
    for choice in spec.choices:
        if choice.lower() == wanted:
            return choice
    raise ValueError(f"{name!r} ({spec.label}) cannot be {_shown(value)}{_nearest(str(value), spec.choices)}")


def _parse_number(spec: Spec, name: str, value: Any) -> float | str | None:
    word = value.strip().lower() if isinstance(value, str) else AUTO if value is None else ""
    if word in spec.choices:
        return None if DEFAULTS[name] is None else word
    low, high = spec.bounds
    allowed = " or ".join([*spec.choices, f"a number from {low:g} to {high:g}"])
    wrong = ValueError(f"{name!r} ({spec.label}) is {allowed}, not {_shown(value)}.")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if not low <= number <= high:
        raise wrong
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


PARSERS = cast(
    "dict[str, Callable[[Spec, str, Any], Any]]",
    {"flag": _parse_flag, "lora": _parse_lora, "choice": _parse_choice, "number": _parse_number},
)
