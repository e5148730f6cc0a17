"""Text on images, in its place in every font: before 10.1 Pillow's own one is a bitmap of one size that ignores anchors and knows latin-1 only."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Fonts = Callable[[int], Font]
"""A font by its size in pixels."""

SPELLED = {"γ": "gamma"}
"""Letters of our own texts that not every font has."""
UNKNOWN = "?"
NO_CHARACTER = "\uffff"
"""Of which a scalable font draws its sign for what it lacks."""


def own_font(size: int) -> Font:
    """Pillow's own font; before 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


class Pen:
    """Writes in one font, in any size."""

    def __init__(self, fonts: Fonts = own_font) -> None:
        self._fonts = fonts
        self._of_size: dict[int, tuple[Font, int]] = {}
        self._instead: dict[str, str] = {}

    def width(self, text: str, size: int) -> int:
        """Pixels from the start of the text to its right edge."""
        font, _ = self._font(size)
        return round(font.getbbox(self.writable(text))[2])

    def write(
        self,
        image: Image.Image,
        x: int,
        middle: int,
        text: str,
        size: int,
        colour: tuple[int, int, int],
        *,
        ends: bool = False,
    ) -> None:
        """Write one line.

        Args:
            x: where the line starts, or where it ends if `ends`.
            middle: the height at which the middle of its digits and capitals stands.
        """
        font, below = self._font(size)
        left = x - self.width(text, size) if ends else x
        ImageDraw.Draw(image).text((left, middle - below), self.writable(text), colour, font)

    def writable(self, text: str) -> str:
        """The text as the font can write it: for a letter it lacks the letter's name, the letter without its accent, or a question mark."""
        text = unicodedata.normalize("NFC", text)
        for letter in set(text) - self._instead.keys():
            self._instead[letter] = self._in_place_of(letter)
        return "".join(map(self._instead.__getitem__, text))

    def _in_place_of(self, letter: str) -> str:
        if self._has(letter):
            return letter
        parts = SPELLED.get(letter) or "".join(
            part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part)
        )
        return parts if parts and all(map(self._has, parts)) else UNKNOWN

    def _has(self, letter: str) -> bool:
        if letter == " " or not letter.isprintable():
            return letter == " "
        font, _ = self._font(13)
        if isinstance(font, ImageFont.FreeTypeFont):
            return bytes(font.getmask(letter)) != bytes(font.getmask(NO_CHARACTER))
        return letter.isascii() or "\xa1" <= letter <= "\xff"

    def _font(self, size: int) -> tuple[Font, int]:
        """The font, and how far below the place of a text the middle of its digits and capitals is."""
        if size not in self._of_size:
            font = self._fonts(size)
            _, top, _, bottom = font.getbbox("0")
            self._of_size[size] = font, round((top + bottom) / 2)
        return self._of_size[size]
