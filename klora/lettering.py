"""Text on images, placed alike in every font.

Before 10.1 Pillow's default font is a bitmap in one size that ignores anchors and has only latin-1 letters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Fonts = Callable[[int], Font]
"""Returns a font in a size given in pixels."""

SPELLED = {"γ": "gamma"}
"""Letters in our own texts that some fonts lack, spelled out."""
UNKNOWN = "?"
NO_CHARACTER = "\uffff"
"""No font has it, so a scalable font draws its sign for a missing letter."""


def own_font(size: int) -> Font:
    """Pillow's default font; before Pillow 10.1 it has only one size."""
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
            x: where the line starts, or where it ends if `ends` is true.
            middle: the y coordinate of the middle of its digits and capitals.
        """
        font, below = self._font(size)
        left = x - self.width(text, size) if ends else x
        ImageDraw.Draw(image).text((left, middle - below), self.writable(text), colour, font)

    def writable(self, text: str) -> str:
        """The text with letters that the font has.

        A letter it lacks becomes its name, the same letter without its accent, or a question mark.
        """
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
        """The font, and how far the middle of its digits and capitals is below the position of a text."""
        if size not in self._of_size:
            font = self._fonts(size)
            _, top, _, bottom = font.getbbox("0")
            self._of_size[size] = font, round((top + bottom) / 2)
        return self._of_size[size]
