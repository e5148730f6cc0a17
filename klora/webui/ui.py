"""The K-LoRA accordion, built from the declaration of the settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules.ui_common import create_refresh_button
from modules.ui_components import InputAccordion, ToolButton

from klora.hosts.webui import HOST
from klora.settings import DEFAULTS, SPECS
from klora.webui import infotext, options, preflight

SWAPPED = ("subject", "style", "subject_weight", "style_weight")
S_STAR = {"schedule": "s*", "beta": "auto"}
"""What the card offers where a family's schedule is S*. Its button presses a hidden one, which sets this."""
OFFERED_NUMBERS = 11
NONE = "None"
"""What the hosts' own lists show for no LoRA.

With an empty value instead, gradio 4.40 takes the first of a list as chosen, so that nobody can choose it.
"""


@dataclass(frozen=True)
class Controls:
    """What the script gives to the host.

    Attributes:
        components: one for each setting, in the order of the declaration.
        infotext_fields: each component, with what reads its value from pasted parameters.
        paste_field_names: the fields that the host takes along when it sends an image to another tab.
    """

    components: list[Any]
    infotext_fields: list[tuple[Any, Any]]
    paste_field_names: list[Any]


def build(is_img2img: bool, tab: str) -> Controls:
    """The K-LoRA accordion of one tab. Hosts call this repeatedly: for the page, and for the API's defaults.

    Args:
        tab: "txt2img" or "img2img", for the ids of the elements.
    """
    made: dict[str, Any] = {}
    with InputAccordion(False, label="K-LoRA", elem_id=_id(tab, "enabled")) as made["enabled"]:
        made["enabled"].accordion.webui_tooltip = SPECS["enabled"].help
        with gr.Row():
            made["subject"] = _control("subject", tab)
            swap = ToolButton(
                "\u21c4", elem_id=_id(tab, "swap"), tooltip="Swap subject and style, with their weights."
            )
            made["style"] = _control("style", tab)
            pair = [made["subject"], made["style"]]
            refresh = create_refresh_button(
                pair, HOST.refresh_loras, lambda: {"choices": _lora_names()}, _id(tab, "refresh")
            )
            refresh.webui_tooltip = "Look for new LoRA files."
        with gr.Row():
            made |= {
                name: _control(name, tab) for name in SPECS if name not in made and not SPECS[name].advanced
            }
        with gr.Accordion("Advanced", open=False, elem_id=_id(tab, "advanced")):
            folded = [name for name, spec in SPECS.items() if spec.advanced]
            for first in range(0, len(folded), 2):
                with gr.Row():
                    made |= {name: _control(name, tab) for name in folded[first : first + 2]}
        gr.HTML(preflight.placeholder(), elem_id=_id(tab, "view"))
        preset = gr.Button("Use S*", elem_id=_id(tab, "preset"))
    components = [made[name] for name in SPECS]
    for component in components:
        component.change(fn=None, _js=_tell_page(tab), inputs=components, outputs=[], show_progress=False)
    preset.click(
        fn=None,
        _js=f"() => {json.dumps(list(S_STAR.values()))}",
        inputs=[],
        outputs=[made[name] for name in S_STAR],
    )
    swapped = [made[name] for name in SWAPPED]
    swap.click(fn=lambda a, b, c, d: (b, a, d, c), inputs=swapped, outputs=swapped, show_progress=False)
    restores = {name: infotext.Restore(name) for name in SPECS}
    return Controls(components, [(made[name], restores[name]) for name in SPECS], list(restores.values()))


def _tell_page(tab: str) -> str:
    """JavaScript that gives the values of all controls to the page's scripts; nothing goes to the server."""
    return f"(...values) => klora.changed({json.dumps(tab)}, {json.dumps(list(SPECS))}, values)"


def _id(tab: str, name: str) -> str:
    return f"klora_{tab}_{name}"


def _control(name: str, tab: str) -> Any:
    spec, starts = SPECS[name], {**DEFAULTS, **options.read().run_defaults()}
    common: dict[str, Any] = {
        "label": spec.label, "value": infotext.control_value(name, starts[name]),
        "elem_id": _id(tab, name), "tooltip": spec.help,
    }  # fmt: skip
    if spec.kind == "lora":
        control = gr.Dropdown(choices=_lora_names(), allow_custom_value=True, **{**common, "value": NONE})
        control.do_not_save_to_config = True
        return control
    if spec.kind == "choice":
        control = gr.Dropdown(choices=list(spec.choices), **common)
        control.do_not_save_to_config = name in options.RUN_DEFAULTS
        return control
    if spec.choices:
        return gr.Dropdown(choices=[*spec.choices, *_offered(spec.slider)], allow_custom_value=True, **common)
    low, high, step = spec.slider or (*spec.bounds, 0.01)
    return gr.Slider(minimum=low, maximum=high, step=step, **common)


def _offered(slider: tuple[float, float, float] | None) -> list[str]:
    """Numbers to choose from besides the words, evenly spaced over a slider's range."""
    if slider is None:
        return []
    low, high, _ = slider
    return [f"{low + (high - low) * i / (OFFERED_NUMBERS - 1):g}" for i in range(OFFERED_NUMBERS)]


def _lora_names() -> list[str]:
    return [NONE, *(lora.chosen_as for lora in HOST.loras())]
