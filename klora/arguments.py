"""What the parts of the command line share."""

from __future__ import annotations

import argparse

RESEARCH = {
    "evaluate": "make images of many pairs and seeds by every method, and measure them",
    "demo": "compare the methods on pairs of the miniature, in two minutes",
}
"""Commands of the folder `evaluation`, which is optional: klora itself never needs it."""


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise argparse.ArgumentTypeError("must be WIDTHxHEIGHT, such as 1024x1024") from None
