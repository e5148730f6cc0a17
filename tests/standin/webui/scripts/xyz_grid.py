"""A plot over the values of three axes: one image for each combination."""

from copy import copy

import numpy as np
from gradio import Checkbox, Dropdown, Slider, Textbox
from modules import scripts
from modules.processing import process_images
from PIL import Image


class AxisOption:
    def __init__(
        self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None
    ):
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})

    def values(self, p, text, words):
        if self.label == "Nothing":
            return [0]
        given = (
            words
            if self.choices
            else self.prepare(text)
            if self.prepare
            else [part.strip() for part in text.split(",") if part.strip()]
        )
        values = [self.type(value) for value in given]
        if self.confirm:
            self.confirm(p, values)
        return values


axis_options = [
    AxisOption("Nothing", str, lambda p, value, values: None),
    AxisOption("Seed", int, lambda p, value, values: setattr(p, "seed", value)),
]


class Script(scripts.Script):
    def title(self):
        return "X/Y/Z plot"

    def ui(self, is_img2img):
        self.current = list(axis_options)
        labels = [option.label for option in self.current]
        axes = [
            control for axis in "XYZ" for control in (
                Dropdown(0, label=f"{axis} type", choices=labels),
                Textbox("", label=f"{axis} values"),
                Dropdown([], label="choices", choices=[]),
            )
        ]  # fmt: skip
        flags = (
            "Draw legend",
            "Include Sub Images",
            "Include Sub Grids",
            "Keep -1 for seeds",
            "Vary seeds for X",
            "for Y",
            "for Z",
        )
        return [
            *axes,
            *(Checkbox(False, label=label) for label in flags),
            Slider(0, label="Margins"),
            Checkbox(False, label="Use text inputs"),
        ]

    def run(self, p, *args):
        values = [self.current[args[i] or 0].values(p, args[i + 1], args[i + 2]) for i in (0, 3, 6)]
        cells = []
        for z in values[2]:
            for y in values[1]:
                for x in values[0]:
                    cell = copy(p)
                    for index, value, of_axis in zip((0, 3, 6), (x, y, z), values, strict=True):
                        self.current[args[index] or 0].apply(cell, value, of_axis)
                    cells.append(process_images(cell))
        images = [image for cell in cells for image in cell.images]
        processed = cells[0]
        processed.images = [Image.fromarray(np.concatenate(images, axis=1)), *(images if args[10] else [])]
        return processed
