"""The section "K-LoRA" of the host's settings page.

Each option is declared once. The page is made from the declaration, and the options are read by it.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from klora.accelerators import ACCELERATORS
from klora.core.score_cache import ScoreCache
from klora.hosts.base import Machine, Preferences
from klora.hosts.webui import HOST
from klora.settings import DEFAULTS, SPECS
from klora.webui import paths

SECTION = ("klora", "K-LoRA")
STOP, GO_ON = "stop", "go on without K-LoRA"
AUTO, CPU = "auto", "CPU"
RUN_DEFAULTS = ("text_encoder", "hires")
"""Settings of a run whose initial values are options."""

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Option:
    """What the page needs to know about one option.

    Attributes:
        choices: all values; empty for a switch, a number or a text.
        bounds: the lowest and the highest number, and the slider's step.
        changed: called when the user has changed the option.
    """

    label: str
    help: str
    choices: tuple[str, ...] = ()
    bounds: tuple[int, int, int] | None = None
    changed: Callable[[], None] | None = None


def _option(default: Any, label: str, help: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(label, help, **more)})


def _run_default(name: str) -> Any:
    help = (
        f"{SPECS[name].help} Used for API requests that leave it out, and shown in the panel after Reload UI."
    )
    return _option(DEFAULTS[name], f"{SPECS[name].label} (default)", help, choices=SPECS[name].choices)


@dataclass(frozen=True)
class Options:
    """The options as the user has set them."""

    text_encoder: str = _run_default("text_encoder")
    hires: str = _run_default("hires")
    map_in_gallery: bool = _option(
        False,
        "Show the selection map in the gallery",
        "It comes after the images, in the API's answers too, and shows which LoRA was applied in each "
        "layer at each step. It is left out while a script such as X/Y/Z plot or SD upscale runs. The panel "
        "shows it in any case.",
    )
    map_saved: bool = _option(
        False,
        "Save the selection map beside each saved image",
        "As <image>-klora-map.png.",
    )
    cache_size: int = _option(
        256,
        "Score cache, size limit in MB",
        "It keeps the scores of LoRA files, about 1 MB for each. The least recently used are deleted first.",
        bounds=(1, 2048, 1),
        changed=lambda: read().cache().trim(),
    )
    scoring_device: str = _option(
        AUTO,
        "Scoring device",
        "auto: the WebUI's GPU if it is CUDA or ROCm, otherwise the CPU. CPU: slower, but leaves the GPU's "
        "memory alone.",
        choices=(AUTO, CPU),
    )
    accelerators: str = _option(
        "",
        "More words by which to know accelerator LoRAs",
        "Whole words, separated by commas. An accelerator lets a model work in few steps and has neither a "
        "subject nor a style, so K-LoRA warns if the subject or style LoRA is named like one. It already "
        "knows LCM, Lightning, Hyper, Turbo, Flash, Schnell, DMD, TCD, TDD, PCM and PeRFlow.",
    )
    on_error: str = _option(
        STOP,
        "When K-LoRA cannot be applied",
        "stop: no image, and a sentence that says why. go on without K-LoRA: the image is made as if K-LoRA "
        "were off, and its parameters say why. An error during sampling stops the generation in any case.",
        choices=(STOP, GO_ON),
    )

    def run_defaults(self) -> dict[str, Any]:
        """{setting of a run: its initial value}."""
        return {name: getattr(self, name) for name in RUN_DEFAULTS}

    def cache(self) -> ScoreCache:
        """The score cache, with the chosen size limit."""
        return ScoreCache(paths.cache_folder(), self.cache_size * MEBIBYTE)

    def device(self, host: Machine = HOST) -> torch.device:
        """The device to score on."""
        hosts = host.device()
        return hosts if self.scoring_device == AUTO and hosts.type == "cuda" else torch.device("cpu")

    def for_analysis(self) -> dict[str, Any]:
        """The arguments of `klora.analysis.analyze` that depend on options."""
        return {"cache": self.cache(), "device": self.device(), "accelerators": self.accelerator_words()}

    def accelerator_words(self) -> tuple[str, ...]:
        """Words that mark an accelerator when its name has them: K-LoRA's, then the user's own.

        K-LoRA's are not the option's default, because a WebUI saves defaults with the user's settings: an old
        list would stay in force there.
        """
        own = (word.strip().lower() for word in self.accelerators.split(","))
        return (*ACCELERATORS, *filter(None, own))


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in dataclasses.fields(Options)}
BUILT_IN = Options()


def read(host: Preferences = HOST) -> Options:
    """The options as the host has them now.

    An impossible value, such as from a config file that was edited by hand, counts as the built-in default.
    """
    values: dict[str, Any] = {name: host.option(_key(name), None) for name in OPTIONS}
    return Options(**{name: value for name, value in values.items() if _fits(name, value)})


def register() -> None:
    """Add the section to the host's settings page and API.

    It must be called before the page is built: the API only knows the options that exist then.
    """
    from modules import options, shared

    infos = {_key(name): _info(name) for name in OPTIONS}
    infos[_key("clear_cache")] = options.OptionInfo("", "Clear the score cache", _clear_button)
    infos[_key("clear_cache")].do_not_save = True
    for key, info in options.options_section(SECTION, infos).items():
        shared.opts.add_option(key, info)


def _key(name: str) -> str:
    return f"klora_{name}"


def _fits(name: str, value: Any) -> bool:
    option, default = OPTIONS[name], getattr(BUILT_IN, name)
    if option.choices:
        return value in option.choices
    if option.bounds:
        return isinstance(value, (int, float)) and option.bounds[0] <= value <= option.bounds[1]
    return isinstance(value, type(default))


def _info(name: str) -> Any:
    import gradio as gr
    from modules.options import OptionInfo

    option, default = OPTIONS[name], getattr(BUILT_IN, name)
    component: Any = None
    arguments: dict[str, Any] | None = None
    if option.choices:
        component, arguments = gr.Radio, {"choices": list(option.choices)}
    elif option.bounds:
        low, high, step = option.bounds
        component, arguments = gr.Slider, {"minimum": low, "maximum": high, "step": step}
    return OptionInfo(default, option.label, component, arguments, onchange=option.changed).info(
        html.escape(option.help)
    )


def _clear_button(label: str, value: str, elem_id: str) -> Any:
    """A button that shows the cache's present size.

    Returns an empty control instead of the button, because the host sets the value of what it gets.
    """
    import gradio as gr

    def text() -> str:
        return f"{label} ({read().cache().size() / MEBIBYTE:.1f} MB now)"

    def clear() -> str:
        read().cache().clear()
        return text()

    button = gr.Button(text, elem_id=_key("clear_cache"))
    button.click(fn=clear, inputs=[], outputs=[button], show_progress=False)
    return gr.HTML(value, elem_id=elem_id)
