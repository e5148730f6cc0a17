"""The accordion, built from the declaration of the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion, ToolButton

from klora.settings import DEFAULTS, SPECS
from klora.webui import infotext, loras

SWAPPED = (("subject", "style"), ("subject_weight", "style_weight"))


@dataclass(frozen=True)
class Controls:
    """What the script gives to the host.

    Attributes:
        components: one per setting, in the order of the declaration.
        infotext_fields: (component, how to read it from pasted parameters).
        paste_field_names: names of the infotext fields.
    """

    components: list[Any]
    infotext_fields: list[tuple[Any, Any]]
    paste_field_names: list[str]


def build(is_img2img: bool, tab: str) -> Controls:
    """The K-LoRA accordion of one tab; may be called more than once.

    Args:
        tab: "txt2img" or "img2img", for the elements' ids.
    """
    made: dict[str, Any] = {}
    with InputAccordion(False, label="K-LoRA", elem_id=_id(tab, "enabled")) as made["enabled"]:
        with gr.Row(elem_classes=["klora-pair"]):
            made["subject"] = _control("subject", tab)
            swap = ToolButton("\u21c4", elem_id=_id(tab, "swap"), tooltip="Swap subject and style with their weights")
            made["style"] = _control("style", tab)
            refresh = ToolButton("\U0001f504", elem_id=_id(tab, "refresh"), tooltip="Look for new LoRA files")
        with gr.Row():
            made["subject_weight"] = _control("subject_weight", tab)
            made["style_weight"] = _control("style_weight", tab)
        with gr.Accordion("Advanced", open=False, elem_id=_id(tab, "advanced")):
            names = [name for name, spec in SPECS.items() if spec.advanced]
            for left, right in zip(names[::2], [*names[1::2], None], strict=False):
                with gr.Row():
                    made[left] = _control(left, tab)
                    if right:
                        made[right] = _control(right, tab)
    pair = [made["subject"], made["style"]]
    refresh.click(fn=_refreshed, inputs=[], outputs=pair, show_progress=False)
    swapped = [made[name] for names in SWAPPED for name in names]
    swap.click(fn=lambda a, b, c, d: (b, a, d, c), inputs=swapped, outputs=swapped, show_progress=False)
    return Controls(
        [made[name] for name in SPECS],
        [(made[name], infotext.reader(name)) for name in SPECS],
        [spec.infotext for name, spec in SPECS.items() if name != "enabled"],
    )


def _id(tab: str, name: str) -> str:
    return f"klora_{tab}_{name}"


def _control(name: str, tab: str) -> Any:
    spec = SPECS[name]
    common: dict[str, Any] = {"label": spec.label, "value": infotext.control_value(name, DEFAULTS[name]), "elem_id": _id(tab, name)}
    if spec.kind == "lora":
        control = gr.Dropdown(choices=_lora_choices(), **common)
        control.do_not_save_to_config = True
        return control
    if spec.kind == "choice":
        return gr.Dropdown(choices=list(spec.choices), **common)
    if spec.choices:
        return gr.Dropdown(choices=list(spec.choices), allow_custom_value=True, **common)
    low, high, step = spec.slider or (*spec.bounds, 0.01)
    return gr.Slider(minimum=low, maximum=high, step=step, **common)


def _lora_choices() -> list[str]:
    return [infotext.NO_LORA, *(lora.name for lora in loras.list_loras())]


def _refreshed() -> tuple[Any, Any]:
    loras.refresh()
    return gr.update(choices=_lora_choices()), gr.update(choices=_lora_choices())
