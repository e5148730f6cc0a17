"""How strengths are shown, in images and in the page alike: the colour and the words of each pair of levels."""

from __future__ import annotations

from klora.core.methods import FULL

Colour = tuple[int, int, int]

SUBJECT, STYLE, BOTH, NEITHER = (31, 95, 191), (124, 205, 108), (226, 164, 60), (196, 196, 196)
"""Told apart by lightness as well as by hue, so that colour-blind people can."""

BY_BALANCE = (STYLE, (184, 189, 70), BOTH, (168, 92, 160), SUBJECT)
"""From the style alone by both alike to the subject alone, the weaker one at half the other's level in between.

Chosen, not computed: half-way between blue and orange lies grey.
"""

PAIRS = tuple((subject, style) for subject in range(FULL + 1) for style in range(FULL + 1))
"""All pairs of levels; a pair's place here is its code, subject · (FULL + 1) + style."""


def colour_of(subject: int, style: int) -> Colour:
    """The colour of a layer that has the subject and the style at these levels: paler where neither is there in full."""
    strongest = max(subject, style)
    if not strongest:
        return NEITHER
    place = (len(BY_BALANCE) - 1) * (strongest + subject - style) // (2 * strongest)
    red, green, blue = (255 - (255 - channel) * strongest // FULL for channel in BY_BALANCE[place])
    return red, green, blue


def words_of(subject: int, style: int) -> str:
    """What is on a layer that has the subject and the style at these levels."""
    if subject == style:
        return {0: "neither LoRA", FULL: "both LoRAs"}.get(subject, "half of both LoRAs")
    levels = (("the subject", subject), ("the style", style))
    return " and ".join(name if level == FULL else f"half {name}" for name, level in levels if level)
