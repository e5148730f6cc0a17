"""The colour and the words for each pair of levels, for the images and for the page."""

from __future__ import annotations

from klora.core.methods import FULL

Colour = tuple[int, int, int]

SUBJECT, STYLE, BOTH, NEITHER = (31, 95, 191), (124, 205, 108), (226, 164, 60), (196, 196, 196)
"""They differ in lightness as well as in hue, so that colour-blind people can tell them apart."""

BY_BALANCE = (STYLE, (184, 189, 70), BOTH, (168, 92, 160), SUBJECT)
"""From the style alone to the subject alone: in the middle both alike, between these one at half the level.

They are chosen by eye: a computed mean of blue and orange would be grey.
"""

PAIRS = tuple((subject, style) for subject in range(FULL + 1) for style in range(FULL + 1))
"""All pairs of levels. The index of a pair is its code, subject · (FULL + 1) + style."""


def colour_of(subject: int, style: int) -> Colour:
    """The colour of a layer with subject and style at these levels, paler if neither is at full level."""
    strongest = max(subject, style)
    if not strongest:
        return NEITHER
    place = (len(BY_BALANCE) - 1) * (strongest + subject - style) // (2 * strongest)
    red, green, blue = (255 - (255 - channel) * strongest // FULL for channel in BY_BALANCE[place])
    return red, green, blue


def words_of(subject: int, style: int) -> str:
    """The words for a layer with subject and style at these levels."""
    if subject == style:
        return {0: "neither LoRA", FULL: "both LoRAs"}.get(subject, "half of both LoRAs")
    levels = (("the subject", subject), ("the style", style))
    return " and ".join(name if level == FULL else f"half {name}" for name, level in levels if level)
