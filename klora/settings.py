"""The settings of a K-LoRA run, declared once.

The UI, the HTTP API, the X/Y/Z plot, the infotext, the command line and docs/api.md are made from it.

The fields are in the order of the positional arguments of the always-on script, so new ones go at the end.
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
"""Unknown names that get a sentence each; a request may hold any number of them."""
LONGEST_WORD = 80
"""Characters of a word that are compared with the known names: difflib takes quadratic time."""
AUTO = "auto"
OFF = "off"


@dataclass(frozen=True)
class Spec:
    """What every interface needs to know about one field.

    Attributes:
        label: the control's label and the name of the X/Y/Z axis.
        help: the tooltip, the text in docs/api.md and the description in the JSON schema.
        infotext: the name in an image's generation parameters.
        kind: "flag", "lora", "choice" or "number".
        choices: for a "choice" all its values; for a "number" the words it accepts as well, such as "auto".
        bounds: the lowest and the highest number accepted.
        slider: minimum, maximum and step of the slider, within the bounds.
        axis: whether the X/Y/Z plot offers it.
        advanced: whether the UI puts it under "Advanced".
        formerly: the field's earlier name, which old requests and infotexts still use.
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
        """The names it may have in an image's parameters, the current one first."""
        return (self.infotext, f"K-LoRA {self.formerly}") if self.formerly else (self.infotext,)


def _field(default: Any, label: str, help: str, kind: str, **more: Any) -> Any:
    spec = Spec(label, help, "K-LoRA " + more.pop("infotext", label[0].lower() + label[1:]), kind, **more)
    return dataclasses.field(default=default, metadata={"spec": spec})


def _weight(role: str) -> Any:
    return _field(
        1.0,
        f"{role.capitalize()} weight",
        f"How strongly the {role} LoRA is applied where it is chosen, like the number in <lora:name:1>. "
        "It never affects which LoRA is chosen.",
        "number",
        bounds=(-10, 10),
        slider=(0, 2, 0.05),
        advanced=False,
    )


@dataclass(frozen=True)
class Settings:
    """The settings of one run. Build them with `Settings.parse`, which checks every value.

    Attributes:
        subject: name of the subject LoRA, as the host lists it (a path on the command line).
        style: name of the style LoRA, likewise.
        beta: where S starts; None means the schedule's default (0.5 for S, 1.3 for S*).
        gamma: "auto" computes it by K-LoRA eq. (9), "off" means 1, a number is used as it is.
    """

    enabled: bool = _field(
        False,
        "Enable",
        "Fuse the subject LoRA with the style LoRA in this generation.",
        "flag",
        axis=False,
        advanced=False,
    )
    subject: str = _field(
        "", "Subject", "The LoRA of the person, animal or thing to show.", "lora", advanced=False
    )
    style: str = _field("", "Style", "The LoRA of the style to show it in.", "lora", advanced=False)
    subject_weight: float = _weight("subject")
    style_weight: float = _weight("style")
    method: str = _field(
        "K-LoRA",
        "Method",
        "How the two LoRAs are combined. K-LoRA is the method of the paper; the others are for comparison: "
        "the paper's ablations and the usual alternatives.",
        "choice",
        choices=tuple(METHODS),
        formerly="selector",
    )
    schedule: str = _field(
        "s",
        "Schedule",
        "How the preference moves from the subject to the style during the run. S moves steadily, which "
        "brings out the style's brushwork. S* begins with a moment of style, which brings out more of its "
        "colours and background and less of its brushwork.",
        "choice",
        choices=tuple(SCHEDULES),
    )
    alpha: float = _field(
        1.5,
        "α",
        "How much S grows over the run. Higher values give more of the late steps to the style.",
        "number",
        bounds=(-100, 100),
        slider=(0, 4, 0.05),
        infotext="alpha",
    )
    beta: float | None = _field(
        None,
        "β",
        "Where S starts. Lower values give more of the early steps to the subject. auto means 0.5 for S and "
        "1.3 for S*.",
        "number",
        choices=(AUTO,),
        bounds=(-100, 100),
        slider=(0, 2, 0.05),
        infotext="beta",
    )
    k_scale: float = _field(
        1.0,
        "K scale",
        "A layer's score is the sum of its K largest entries, and this multiplies K. 1 is the value of the "
        "paper: K is then the product of the two ranks.",
        "number",
        bounds=(0.001, 10_000),
        slider=(0.1, 10, 0.1),
    )
    gamma: float | str = _field(
        AUTO,
        "γ",
        "Balances two LoRAs of different magnitude; larger values favour the style. auto computes it from "
        "the two files (eq. 9 of the paper), off means 1, and you can type a number.",
        "number",
        choices=(AUTO, OFF),
        bounds=(1e-6, 1e6),
        infotext="gamma",
    )
    text_encoder: str = _field(
        "both",
        "Text encoder",
        "Whose text encoder part is applied. The prompt is encoded before the first step, so this part "
        "cannot change from step to step.",
        "choice",
        choices=("both", "subject", "style", "none"),
    )
    hires: str = _field(
        "continue",
        "Hires",
        "What the schedule does in the hires. fix pass and in img2img, which start at a lower noise level. "
        "continue: it carries on from that noise level. restart: it starts again. off: neither LoRA is "
        "applied in the hires. fix pass.",
        "choice",
        choices=("continue", "restart", "off"),
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from unchecked values of the UI, the API, the command line or an infotext.

        Missing fields keep their defaults.

        Raises:
            SettingsError: lists all bad fields, with one sentence for each.
        """
        problems: dict[str, str] = {}
        good: dict[str, Any] = {}
        values = _under_current_names(values)
        unknown = [name for name in values if name not in SPECS]
        for name in unknown[:MOST_UNKNOWN]:
            problems[name] = f"K-LoRA has no setting {_shown(name)}{_nearest(name, SPECS)}"
        if len(unknown) > MOST_UNKNOWN:
            problems[unknown[MOST_UNKNOWN]] = (
                f"{len(unknown) - MOST_UNKNOWN} more names are not settings of K-LoRA: leave them out."
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
        """Settings from the always-on script's arguments: one dict, or values in the order of the fields.

        A dict must be the first value and the only dict. It means that K-LoRA is enabled unless it says
        `"enabled": false`. When K-LoRA is not enabled, the other values are not checked.

        Args:
            overrides: values by name that replace the arguments before anything is checked (for X/Y/Z plots).
            defaults: values by name for the settings that the arguments leave out.

        Raises:
            SettingsError: as `parse` does.
        """
        if len(args) > len(SPECS):
            raise SettingsError(
                {
                    "args": f"K-LoRA takes {len(SPECS)} values at most ({', '.join(SPECS)}) but got "
                    f"{len(args)}: pass one dict of names and values instead."
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
                    "args": f"Value {more[0]} of 'args' is a dict: K-LoRA takes its settings either by name, "
                    "in one dict that is the first value, or by position without a dict; put all names into "
                    "the first value."
                }
            )
        return cls.parse(merged)

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in order."""
        return {name: getattr(self, name) for name in SPECS if getattr(self, name) != DEFAULTS[name]}

    def text_encoder_roles(self) -> tuple[str, ...]:
        """The roles whose text encoder parts are applied, in order.

        A LoRA that the method leaves out altogether is left out here too, whatever `text_encoder` says.
        """
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
"""The fields that determine the plan of a pair; the others only matter when an image is made."""
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
        defaults: {field: default} for the fields whose default the user has changed.
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
    """The table of settings in docs/api.md."""
    lines = ["| setting | values | default | what it does |", "| --- | --- | --- | --- |"]
    for name, spec in SPECS.items():
        default = {"": "", "False": "false"}.get(str(DEFAULTS[name]), as_text(name, DEFAULTS[name]))
        lines.append(
            f"| `{name}` | {_values(spec)} | {default} | {spec.help} |".replace("*", "\\*").replace(
                "<", "\\<"
            )
        )
    return "\n".join(lines)


def _under_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under their current names; where both names are given, the current one counts."""
    former = {FORMER_NAMES[name]: value for name, value in values.items() if name in FORMER_NAMES}
    return {**former, **{name: value for name, value in values.items() if name not in FORMER_NAMES}}


def _values(spec: Spec) -> str:
    if spec.kind == "number":
        return ", ".join([*spec.choices, f"{spec.bounds[0]:g} to {spec.bounds[1]:g}"])
    return {"flag": "true, false", "lora": "name of a LoRA"}.get(spec.kind, ", ".join(spec.choices))


def _nearest(word: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word[:LONGEST_WORD].lower(), [k.lower() for k in known], 1, 0.5)
    names = {k.lower(): k for k in known}
    return f"; did you mean {names[near[0]]!r}?" if near else f"; choose one of {', '.join(known)}."


def _parse_flag(spec: Spec, name: str, value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{name!r} ({spec.label}) must be true or false, not {_shown(value)}.")


def _parse_lora(spec: Spec, name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return "" if value.strip() == "None" else value.strip()
    raise ValueError(f"{name!r} must be the name of a LoRA, not {_shown(value)}.")


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
    wrong = ValueError(f"{name!r} ({spec.label}) must be {allowed}, not {_shown(value)}.")
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
