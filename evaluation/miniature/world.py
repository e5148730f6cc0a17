"""A small visual world: things on plain grounds, drawn in many styles, with captions, all from a seed.

An image is `SIZE` pixels square: drawn `FINE` times larger with Pillow, styled with numpy, and averaged down.
The base model sees the classes and the style families with random shapes, colours and parameters. It never
sees the `SUBJECTS` (things with marks of their own) and the `STYLES` (families with fixed parameters), which
the LoRAs are trained for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE, FINE = 64, 3
SIDE = SIZE * FINE

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (208, 45, 42), "orange": (236, 132, 36), "yellow": (240, 205, 50), "green": (62, 150, 70),
    "blue": (48, 92, 196), "purple": (130, 66, 170), "pink": (236, 130, 170), "brown": (132, 84, 48),
    "grey": (128, 130, 136),
}  # fmt: skip
GROUNDS: dict[str, Colour] = {
    "white": (250, 249, 246), "cream": (246, 232, 200), "sky": (186, 218, 242), "mint": (196, 232, 206),
    "rose": (246, 208, 212), "lilac": (220, 206, 240), "sand": (226, 202, 160), "slate": (120, 138, 158),
}  # fmt: skip
SIZES = {"small": (0.62, 0.7), "large": (0.84, 0.94)}
PLACES = {"left": -0.2, "right": 0.2}
RARE = ("sks", "vqz", "ohw", "zld", "xjr", "ktb", "wuf", "gyp", "nuq", "bix", "hmv", "dru")
LUMA = np.array([0.3, 0.59, 0.11], np.float32)
DARK, LIGHT = (34, 32, 40), (252, 250, 244)


@dataclass(frozen=True)
class Scene:
    """One thing and how it is placed in the image.

    Attributes:
        kind: name in CLASSES.
        shape: {name: proportion}, about 1; names that a class does not use are ignored.
        pattern: "", "stripes", "spots", "checks" or "zigzag": in the second colour, over the main one.
        extra: what it wears: "" or a name in EXTRAS.
        size: of the thing as a share of the image.
        place: middle of the thing, -0.5 to 0.5 from the image's middle.
        turn: in degrees.
        mirrored: whether it faces left.
    """

    kind: str
    main: Colour
    second: Colour
    ground: Colour
    shape: Mapping[str, float] = field(default_factory=dict)
    pattern: str = ""
    extra: str = ""
    size: float = 0.8
    place: Point = (0.0, 0.0)
    turn: float = 0.0
    mirrored: bool = False


class Pen:
    """Draws polygons in the thing's own coordinates (-1 to 1, y down) and notes the part each pixel shows."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.image = Image.new("RGB", (SIDE, SIDE), scene.ground)
        self.parts = Image.new("L", (SIDE, SIDE), 0)
        self.main_parts: list[int] = []
        self._ink, self._marks = ImageDraw.Draw(self.image), ImageDraw.Draw(self.parts)
        self._part = 0
        turn = math.radians(scene.turn)
        scale = scene.size * SIDE / 2
        self._matrix = scale * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        self._matrix[:, 0] *= -1 if scene.mirrored else 1
        self._middle = SIDE / 2 + np.array(scene.place) * SIDE

    def shape(self, name: str) -> float:
        """The proportion `name`; 1 if the scene does not give it."""
        return self.scene.shape.get(name, 1.0)

    def polygon(self, points: Sequence[Point] | np.ndarray, colour: Colour | None = None) -> None:
        """A filled polygon, in the main colour if none is given."""
        self._part += 1
        if colour is None:
            self.main_parts.append(self._part)
        placed = [tuple(point) for point in np.asarray(points, float) @ self._matrix.T + self._middle]
        self._ink.polygon(placed, fill=self.scene.main if colour is None else colour)
        self._marks.polygon(placed, fill=self._part)

    def disc(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float | None = None,
        colour: Colour | None = None,
        turn: float = 0.0,
    ) -> None:
        """A filled ellipse, `turn` in degrees."""
        angles = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        a = math.radians(turn)
        own = np.stack([rx * np.cos(angles), (rx if ry is None else ry) * np.sin(angles)], 1)
        self.polygon(
            own @ np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]) + (x, y), colour
        )

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour | None = None) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour | None = None) -> None:
        """A broad line through `points` with round ends, as one part."""
        way = np.asarray(points, float)
        along = np.gradient(way, axis=0)
        across = (
            np.stack([-along[:, 1], along[:, 0]], 1)
            / np.linalg.norm(along, axis=1, keepdims=True)
            * width
            / 2
        )
        self.polygon(np.concatenate([way + across, (way - across)[::-1]]), colour)

    def curve(
        self, start: Point, bend: Point, end: Point, width: float, colour: Colour | None = None
    ) -> None:
        """A broad quadratic Bézier line."""
        t = np.linspace(0, 1, 14)[:, None]
        self.line(
            (1 - t) ** 2 * np.array(start) + 2 * t * (1 - t) * np.array(bend) + t**2 * np.array(end),
            width,
            colour,
        )

    def own_coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y of every pixel in the thing's own coordinates, each of shape (SIDE, SIDE)."""
        rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
        back = np.linalg.inv(self._matrix)
        x, y = columns - self._middle[0], rows - self._middle[1]
        return back[0, 0] * x + back[0, 1] * y, back[1, 0] * x + back[1, 1] * y


def _dark(colour: Colour, share: float = 0.62) -> Colour:
    return tuple(round(c * share) for c in colour)  # type: ignore[return-value]


def _cat(pen: Pen) -> Point:
    ear, tail = pen.shape("a"), pen.shape("b")
    pen.curve((0.45, 0.6), (1.0 * tail, 0.5), (0.75 * tail, -0.25 * tail), 0.16)
    pen.disc(0.1, 0.45, 0.52, 0.42)
    for side in (-1, 1):
        pen.polygon(
            [
                (-0.2 + side * 0.42, -0.25),
                (-0.2 + side * 0.42, -0.35 - 0.55 * ear),
                (-0.2 + side * 0.06, -0.42),
            ]
        )
    pen.disc(-0.2, -0.18, 0.44, 0.4)
    for x in (-0.36, -0.04):
        pen.disc(x, -0.22, 0.07, 0.09, DARK)
    pen.polygon([(-0.28, -0.06), (-0.12, -0.06), (-0.2, 0.03)], (240, 150, 160))
    for x in (-0.25, 0.3):
        pen.disc(x, 0.85, 0.16, 0.1)
    return -0.2, -0.52


def _dog(pen: Pen) -> Point:
    ear, nose = pen.shape("a"), pen.shape("b")
    pen.box(-0.25, 0.2, 0.75, 0.62)
    pen.line([(0.7, 0.3), (0.95, -0.1)], 0.14)
    for x in (-0.2, 0.02, 0.5, 0.7):
        pen.box(x - 0.08, 0.55, x + 0.08, 0.95)
    pen.disc(-0.42, -0.08, 0.36, 0.36)
    pen.disc(-0.42 - 0.34 * nose, 0.06, 0.24 * nose, 0.16)
    pen.disc(-0.42 - 0.52 * nose, 0.0, 0.07, 0.07, DARK)
    pen.disc(-0.18, 0.02 + 0.1 * ear, 0.13, 0.3 * ear, _dark(pen.scene.main), -12)
    pen.disc(-0.5, -0.16, 0.065, 0.075, DARK)
    return -0.42, -0.38


def _fish(pen: Pen) -> Point:
    tail, fin = pen.shape("a"), pen.shape("b")
    pen.polygon([(0.4, 0.0), (0.95, -0.45 * tail), (0.82, 0.0), (0.95, 0.45 * tail)], pen.scene.second)
    pen.polygon([(-0.3, -0.3), (0.1, -0.45 - 0.4 * fin), (0.4, -0.2)], pen.scene.second)
    pen.disc(-0.15, 0.0, 0.7, 0.44)
    pen.polygon([(-0.05, 0.1), (0.3, 0.42), (0.25, 0.1)], pen.scene.second)
    pen.disc(-0.52, -0.1, 0.12, 0.12, LIGHT)
    pen.disc(-0.54, -0.1, 0.06, 0.06, DARK)
    return -0.3, -0.4


def _bird(pen: Pen) -> Point:
    wing, beak = pen.shape("a"), pen.shape("b")
    pen.polygon([(0.4, 0.1), (0.98, -0.1), (0.92, 0.3)], _dark(pen.scene.main))
    for x in (-0.05, 0.18):
        pen.line([(x, 0.45), (x - 0.05, 0.95)], 0.07, (222, 140, 40))
    pen.disc(0.08, 0.15, 0.52, 0.42)
    pen.polygon([(-0.6, -0.45), (-0.68 - 0.3 * beak, -0.3), (-0.58, -0.2)], (238, 160, 40))
    pen.disc(-0.38, -0.32, 0.3, 0.3)
    pen.disc(0.2, 0.1, 0.36 * wing, 0.2 * wing, pen.scene.second, 20)
    pen.disc(-0.46, -0.38, 0.06, 0.07, DARK)
    return -0.38, -0.6


def _house(pen: Pen) -> Point:
    roof, wide = pen.shape("a"), pen.shape("b")
    pen.box(0.3 * wide, -0.85, 0.3 * wide + 0.18, -0.3, _dark(pen.scene.main))
    pen.box(-0.65 * wide, -0.15, 0.65 * wide, 0.85)
    pen.polygon([(-0.85 * wide, -0.12), (0, -0.2 - 0.6 * roof), (0.85 * wide, -0.12)], pen.scene.second)
    pen.box(-0.14, 0.3, 0.16, 0.85, _dark(pen.scene.second))
    for x in (-0.42, 0.4):
        pen.box(x * wide - 0.13, 0.08, x * wide + 0.13, 0.34, (250, 236, 150))
    return 0.0, -0.2 - 0.55 * roof


def _car(pen: Pen) -> Point:
    tall, long = pen.shape("a"), pen.shape("b")
    pen.polygon([(-0.5, 0.1), (-0.32, 0.05 - 0.45 * tall), (0.32, 0.05 - 0.45 * tall), (0.58, 0.1)])
    pen.polygon(
        [(-0.36, 0.06), (-0.25, 0.1 - 0.4 * tall), (-0.02, 0.1 - 0.4 * tall), (-0.02, 0.06)], (206, 232, 244)
    )
    pen.polygon(
        [(0.08, 0.06), (0.08, 0.1 - 0.4 * tall), (0.28, 0.1 - 0.4 * tall), (0.44, 0.06)], (206, 232, 244)
    )
    pen.box(-0.88 * long, 0.06, 0.9 * long, 0.5)
    for x in (-0.5, 0.52):
        pen.disc(x, 0.52, 0.24, 0.24, DARK)
        pen.disc(x, 0.52, 0.1, 0.1, (210, 210, 214))
    pen.disc(-0.82 * long, 0.22, 0.07, 0.07, (252, 232, 120))
    return 0.0, 0.05 - 0.43 * tall


def _tree(pen: Pen) -> Point:
    crown, trunk = pen.shape("a"), pen.shape("b")
    pen.box(-0.13 * trunk, 0.1, 0.13 * trunk, 0.95, (120, 78, 46))
    for x, y, r in ((-0.34, 0.0, 0.4), (0.34, 0.02, 0.4), (0.0, -0.38, 0.5)):
        pen.disc(x * crown, y, r * crown, r)
    for x, y in ((-0.3, -0.1), (0.25, -0.3), (0.1, 0.1)):
        pen.disc(x, y, 0.08, 0.08, pen.scene.second)
    return 0.0, -0.82


def _mushroom(pen: Pen) -> Point:
    cap, stem = pen.shape("a"), pen.shape("b")
    pen.polygon(
        [(-0.2 * stem, 0.0), (0.2 * stem, 0.0), (0.3 * stem, 0.9), (-0.3 * stem, 0.9)], (244, 234, 212)
    )
    angles = np.linspace(math.pi, 2 * math.pi, 24)
    pen.polygon(np.stack([0.85 * np.cos(angles), 0.1 + 0.8 * cap * np.sin(angles)], 1))
    for x, y, r in ((-0.4, -0.12, 0.13), (0.05, -0.42, 0.15), (0.45, -0.1, 0.11)):
        pen.disc(x, 0.1 + (y - 0.1) * cap, r, r, LIGHT)
    return 0.0, 0.1 - 0.75 * cap


def _teapot(pen: Pen) -> Point:
    fat, spout = pen.shape("a"), pen.shape("b")
    pen.curve((0.4, -0.1), (1.15, -0.2), (0.5, 0.55), 0.13)
    pen.curve((-0.4, 0.35), (-0.85, 0.3), (-0.85 - 0.05 * spout, -0.3 * spout), 0.2)
    pen.disc(0.0, 0.25, 0.56, 0.5 * fat)
    pen.box(-0.3, 0.6, 0.3, 0.8, _dark(pen.scene.main))
    pen.disc(0.0, -0.2, 0.36, 0.12, pen.scene.second)
    pen.disc(0.0, -0.38, 0.1, 0.1, pen.scene.second)
    return 0.0, -0.42


def _boat(pen: Pen) -> Point:
    sail, hull = pen.shape("a"), pen.shape("b")
    pen.box(-0.05, -0.9, 0.04, 0.4, (110, 74, 44))
    pen.polygon([(0.08, -0.85), (0.08, 0.25), (0.3 + 0.4 * sail, 0.25)], LIGHT)
    pen.polygon([(-0.1, -0.65), (-0.1, 0.25), (-0.2 - 0.35 * sail, 0.25)], pen.scene.second)
    pen.polygon([(-0.9, 0.35), (0.9, 0.35), (0.6, 0.4 + 0.4 * hull), (-0.6, 0.4 + 0.4 * hull)])
    return 0.0, -0.85


def _flower(pen: Pen) -> Point:
    petal, leaf = pen.shape("a"), pen.shape("b")
    pen.line([(0, 0), (0.04, 0.5), (0.0, 0.95)], 0.1, (70, 140, 62))
    pen.disc(0.24, 0.6, 0.26 * leaf, 0.1, (70, 140, 62), -30)
    for turn in range(0, 360, 60):
        a = math.radians(turn)
        pen.disc(0.4 * math.cos(a) * petal, -0.3 + 0.4 * math.sin(a) * petal, 0.26 * petal, 0.19, turn=turn)
    pen.disc(0.0, -0.3, 0.22, 0.22, pen.scene.second)
    return 0.0, -0.85


def _butterfly(pen: Pen) -> Point:
    upper, lower = pen.shape("a"), pen.shape("b")
    for side in (-1, 1):
        pen.curve((0.0, -0.4), (side * 0.1, -0.75), (side * 0.3, -0.85), 0.05, DARK)
        pen.disc(side * 0.46, -0.2, 0.42 * upper, 0.4, turn=side * -25)
        pen.disc(side * 0.36, 0.4, 0.3 * lower, 0.32, turn=side * 25)
        pen.disc(side * 0.5, -0.22, 0.16, 0.16, pen.scene.second)
        pen.disc(side * 0.38, 0.42, 0.11, 0.11, pen.scene.second)
    pen.disc(0.0, 0.05, 0.1, 0.52, DARK)
    return 0.0, -0.45


def _snail(pen: Pen) -> Point:
    shell, horn = pen.shape("a"), pen.shape("b")
    skin = (214, 178, 130)
    for x in (-0.72, -0.5):
        pen.line([(x + 0.02, 0.2), (x - 0.06, 0.1 - 0.4 * horn)], 0.07, skin)
        pen.disc(x - 0.06, 0.08 - 0.4 * horn, 0.08, 0.08, DARK)
    pen.disc(-0.6, 0.35, 0.22, 0.26, skin)
    pen.polygon([(-0.75, 0.45), (0.6, 0.5), (0.95, 0.82), (-0.72, 0.82)], skin)
    pen.disc(0.18, 0.05, 0.58 * shell, 0.56 * shell)
    pen.disc(0.18, 0.08, 0.38 * shell, 0.36 * shell, pen.scene.second)
    pen.disc(0.18, 0.1, 0.2 * shell, 0.18 * shell)
    return 0.18, 0.1 - 0.55 * shell


def _robot(pen: Pen) -> Point:
    head, arm = pen.shape("a"), pen.shape("b")
    for x in (-0.25, 0.25):
        pen.box(x - 0.1, 0.5, x + 0.1, 0.95, _dark(pen.scene.main))
        pen.line([(x * 1.6, 0.0), (x * 3.0, 0.1 + 0.35 * arm)], 0.14, _dark(pen.scene.main))
    pen.box(-0.42, -0.1, 0.42, 0.6)
    pen.box(-0.2, 0.08, 0.2, 0.34, pen.scene.second)
    pen.box(-0.36 * head, -0.7, 0.36 * head, -0.16)
    for x in (-0.17, 0.17):
        pen.disc(x * head, -0.46, 0.1, 0.1, LIGHT)
        pen.disc(x * head, -0.46, 0.05, 0.05, DARK)
    return 0.0, -0.7


def _cactus(pen: Pen) -> Point:
    arm, pot = pen.shape("a"), pen.shape("b")
    for side, height in ((-1, 0.0), (1, 0.15)):
        pen.line([(side * 0.1, height + 0.1), (side * 0.55, height + 0.1)], 0.2)
        pen.line([(side * 0.5, height + 0.18), (side * 0.5, height - 0.4 * arm)], 0.2)
    pen.box(-0.2, -0.6, 0.2, 0.5)
    pen.disc(0.0, -0.6, 0.2, 0.2)
    pen.polygon(
        [(-0.42 * pot, 0.42), (0.42 * pot, 0.42), (0.3 * pot, 0.95), (-0.3 * pot, 0.95)], pen.scene.second
    )
    return 0.0, -0.78


def _rocket(pen: Pen) -> Point:
    fin, flame = pen.shape("a"), pen.shape("b")
    pen.polygon([(-0.2, 0.55), (0.2, 0.55), (0.0, 0.7 + 0.28 * flame)], (246, 160, 40))
    for side in (-1, 1):
        pen.polygon(
            [(side * 0.25, 0.1), (side * (0.3 + 0.35 * fin), 0.68), (side * 0.25, 0.58)], pen.scene.second
        )
    pen.box(-0.3, -0.35, 0.3, 0.58)
    pen.polygon([(-0.3, -0.35), (0.0, -0.95), (0.3, -0.35)], pen.scene.second)
    pen.disc(0.0, -0.08, 0.16, 0.16, (206, 232, 244))
    return 0.0, -0.9


CLASSES: dict[str, Callable[[Pen], Point]] = {
    "cat": _cat, "dog": _dog, "fish": _fish, "bird": _bird, "house": _house, "car": _car, "tree": _tree,
    "mushroom": _mushroom, "teapot": _teapot, "boat": _boat, "flower": _flower, "butterfly": _butterfly,
    "snail": _snail, "robot": _robot, "cactus": _cactus, "rocket": _rocket,
}  # fmt: skip
"""Class -> what draws it; a drawing returns the top of its head, where an extra sits."""


def _hat(pen: Pen, x: float, y: float) -> None:
    pen.box(x - 0.22, y - 0.42, x + 0.22, y + 0.02, DARK)
    pen.box(x - 0.22, y - 0.14, x + 0.22, y - 0.04, COLOURS["red"])
    pen.box(x - 0.4, y - 0.03, x + 0.4, y + 0.07, DARK)


def _crown(pen: Pen, x: float, y: float) -> None:
    top = y - 0.34
    points = [
        (x - 0.3, y + 0.08),
        (x - 0.34, top),
        (x - 0.15, y - 0.12),
        (x, top - 0.04),
        (x + 0.15, y - 0.12),
        (x + 0.34, top),
        (x + 0.3, y + 0.08),
    ]
    pen.polygon(points, COLOURS["yellow"])


def _flag(pen: Pen, x: float, y: float) -> None:
    pen.line([(x, y + 0.05), (x, y - 0.6)], 0.07, DARK)
    pen.polygon([(x, y - 0.6), (x + 0.45, y - 0.44), (x, y - 0.28)], COLOURS["red"])


def _horns(pen: Pen, x: float, y: float) -> None:
    for side in (-1, 1):
        pen.curve(
            (x + side * 0.14, y + 0.05), (x + side * 0.5, y - 0.05), (x + side * 0.46, y - 0.5), 0.15, DARK
        )


EXTRAS: dict[str, Callable[[Pen, float, float], None]] = {
    "hat": _hat,
    "crown": _crown,
    "flag": _flag,
    "horns": _horns,
}


PATTERNS = ("stripes", "spots", "checks", "zigzag")


def _pattern(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the second colour is, bool."""
    if name == "stripes":
        return (x * 2.9 + 0.1) % 1 < 0.45
    if name == "spots":
        u, v = (x * 2.6 + 0.5 * np.floor(y * 2.6)) % 1 - 0.5, (y * 2.6) % 1 - 0.5
        return u**2 + v**2 < 0.1
    if name == "checks":
        return (np.floor(x * 3.4) + np.floor(y * 3.4)) % 2 == 0
    if name == "zigzag":
        return (y * 2.4 + np.abs((x * 2.4) % 1 - 0.5)) % 1 < 0.45
    raise ValueError(f"no pattern {name!r}")


@dataclass(frozen=True)
class Drawing:
    """A scene as drawn, before its style.

    Attributes:
        rgb: float32 in [0, 1], shape (SIDE, SIDE, 3).
        parts: which part each pixel shows, 0 is the ground; uint8, shape (SIDE, SIDE).
    """

    rgb: np.ndarray
    parts: np.ndarray

    @property
    def lightness(self) -> np.ndarray:
        return self.rgb @ LUMA

    def edges(self, width: int) -> np.ndarray:
        """1 on the borders of parts, `width` fine pixels broad; float32."""
        parts = self.parts.astype(np.int16)
        border = np.zeros(parts.shape, bool)
        border[1:] |= parts[1:] != parts[:-1]
        border[:, 1:] |= parts[:, 1:] != parts[:, :-1]
        image = Image.fromarray((border * 255).astype(np.uint8))
        return np.asarray(image.filter(ImageFilter.MaxFilter(width | 1)), np.float32) / 255


def draw(scene: Scene) -> Drawing:
    """The scene in flat colours."""
    pen = Pen(scene)
    x, y = CLASSES[scene.kind](pen)
    if scene.extra:
        EXTRAS[scene.extra](pen, x, y)
    rgb, parts = np.asarray(pen.image, np.float32) / 255, np.asarray(pen.parts)
    if scene.pattern:
        second = np.isin(parts, pen.main_parts) & _pattern(scene.pattern, *pen.own_coordinates())
        rgb = np.where(second[..., None], np.array(scene.second, np.float32) / 255, rgb)
        parts = np.where(second, parts + 100, parts).astype(np.uint8)
    return Drawing(rgb, parts)


@dataclass(frozen=True)
class Style:
    """A family of styles with parameters.

    Attributes:
        family: name in FAMILIES.
        paper, ink: its two colours.
        local: whether the scene's own colours stay (else paper and ink only, or a palette between them).
        period: of lines, dots or tiles, in pixels of the finished image.
        angle: of lines and grids in degrees.
        weight: breadth of lines, edges or grout, about 1.
    """

    family: str
    paper: Colour = LIGHT
    ink: Colour = DARK
    local: bool = True
    period: float = 5.0
    angle: float = 45.0
    weight: float = 1.0


def _mix(style: Style, ink: np.ndarray, colours: np.ndarray | None = None) -> np.ndarray:
    """Paper where `ink` is 0, ink (or `colours`) where it is 1."""
    paper = np.array(style.paper, np.float32) / 255
    dark = np.array(style.ink, np.float32) / 255 if colours is None else colours
    return paper + ink[..., None] * (dark - paper)


def _duotone(style: Style, lightness: np.ndarray) -> np.ndarray:
    return _mix(style, np.clip(1.35 * (0.95 - lightness), 0, 1))


def _grid(style: Style) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across the style's angle, in periods."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    a = math.radians(style.angle)
    period = style.period * FINE
    return (columns * math.cos(a) + rows * math.sin(a)) / period, (
        -columns * math.sin(a) + rows * math.cos(a)
    ) / period


def _blur(values: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of values in [0, 1] of shape (SIDE, SIDE) or (SIDE, SIDE, 3)."""
    image = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _clouds(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise in [0, 1] with about `cells` lumps across."""
    small = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255


def _plain(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    return drawing.rgb


def _outline(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    return _mix(style, drawing.edges(round(3 + 4 * style.weight)))


def _hatching(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    along, across = _grid(style)
    dark = np.clip(1.05 - drawing.lightness, 0, 0.9) * style.weight
    lines = (along % 1 < dark) | (across % 1 < dark - 0.35)
    edges = drawing.edges(3) > 0
    return _mix(style, (lines | edges).astype(np.float32), _shade(drawing, 0.8) if style.local else None)


def _shade(drawing: Drawing, share: float) -> np.ndarray:
    return drawing.rgb * share


def _dots(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    u, v = (part % 1 - 0.5 for part in _grid(style))
    radius = 0.7 * np.sqrt(np.clip(1.02 - drawing.lightness, 0.03, 1)) * style.weight
    return _mix(
        style, (u**2 + v**2 < radius**2).astype(np.float32), _shade(drawing, 0.9) if style.local else None
    )


def _watercolour(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    rgb = drawing.rgb if style.local else _duotone(style, drawing.lightness)
    shift = [((_clouds(rng, 14) - 0.5) * style.period * 1.5).astype(int) for _ in range(2)]
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    place = np.clip(rows + shift[0], 0, SIDE - 1), np.clip(columns + shift[1], 0, SIDE - 1)
    edges = _blur(drawing.edges(3)[place], 2.5)
    wash = _blur(rgb[place], 2) * (0.75 + 0.25 * edges[..., None] * -1) + 0.25
    grain = (_clouds(rng, 9) - 0.5)[..., None] * 0.26 * style.weight
    paper = np.array(style.paper, np.float32) / 255
    return np.clip(wash + grain, 0, 1) * paper


def _mosaic(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    along, across = _grid(style)
    across = across + 0.5 * (np.floor(along) % 2) * (style.weight > 1)
    cell = (np.floor(along) + 40).astype(np.int64) * 200 + (np.floor(across) + 60).astype(np.int64)
    _, flat = np.unique(cell.reshape(-1), return_inverse=True)
    flat = flat.reshape(-1)
    rgb = (drawing.rgb if style.local else _duotone(style, drawing.lightness)).reshape(-1, 3)
    count = np.bincount(flat)[:, None]
    mean = np.stack([np.bincount(flat, rgb[:, c]) for c in range(3)], 1) / count
    tiles = (mean + rng.normal(0, 0.035, (len(count), 1)))[flat].reshape(SIDE, SIDE, 3)
    grout = np.minimum(along % 1, across % 1) < 0.16 * style.weight
    return np.where(grout[..., None], np.array(style.ink, np.float32) / 255, np.clip(tiles, 0, 1)).astype(
        np.float32
    )


def _neon(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    edges = drawing.edges(round(3 + 2 * style.weight))
    colour = (
        drawing.rgb / np.maximum(drawing.rgb.max(-1, keepdims=True), 0.2)
        if style.local
        else np.array(style.paper, np.float32) / 255
    )
    colour = _blur(np.where(drawing.parts[..., None] > 0, colour, colour * 0.7), 4)
    glow = np.clip(_blur(edges, 3) * 1.1 + _blur(edges, 9) * 0.9, 0, 1)
    night = np.array(style.ink, np.float32) / 255
    return np.clip(night + glow[..., None] * colour + (_blur(edges, 1) ** 2)[..., None] * 0.5, 0, 1)


def _woodcut(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    along, across = _grid(style)
    wave = across + 0.5 * np.sin(along * 1.4 + 3 * _clouds(rng, 4)) + (drawing.parts % 5) * 0.37
    gouge = np.abs(wave % 1 - 0.5) * 2
    light = np.clip((drawing.lightness - 0.12) / 0.85, 0, 1)
    cut = gouge < light ** (1.1 / style.weight) * 1.02
    cut &= ~(drawing.edges(round(2 + 2 * style.weight)) > 0)
    return _mix(style, 1 - cut.astype(np.float32), _shade(drawing, 0.7) if style.local else None)


def _papercut(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    steps = 4
    rgb = (
        np.round(drawing.rgb * steps) / steps
        if style.local
        else _duotone(style, np.round(drawing.lightness * 3) / 3)
    )
    thing = (drawing.parts > 0).astype(np.float32)
    away = round(style.period * FINE * 0.6)
    shadow = np.roll(_blur(thing, 4), (away, away), (0, 1)) * (1 - thing)
    rim = drawing.edges(3) * thing
    grain = (_clouds(rng, 40) - 0.5)[..., None] * 0.1
    return np.clip(rgb * (1 - 0.6 * shadow[..., None]) + 0.35 * style.weight * rim[..., None] + grain, 0, 1)


def _pixel(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    cells = max(8, round(SIZE / style.period))
    rgb = drawing.rgb
    small = Image.fromarray((np.clip(rgb, 0, 1) * 255).astype(np.uint8)).resize(
        (cells, cells), Image.Resampling.BOX
    )
    coarse = np.asarray(small, np.float32) / 255
    coarse = np.round(coarse * 4) / 4 if style.local else _duotone(style, np.round((coarse @ LUMA) * 6) / 6)
    return (
        np.asarray(
            Image.fromarray((coarse * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST),
            np.float32,
        )
        / 255
    )


def _chalk(drawing: Drawing, style: Style, rng: np.random.Generator) -> np.ndarray:
    rough = (
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).resize(
                (SIDE, SIDE), Image.Resampling.BILINEAR
            )
        )
        / 255
    )
    along, _ = _grid(style)
    fill = (drawing.parts > 0) * 0.45 * (np.sin(along * 2 * math.pi) > -0.2)
    chalk = np.clip(drawing.edges(round(4 + 3 * style.weight)) + fill, 0, 1) * (0.45 + 0.75 * rough)
    colour = drawing.rgb * 0.6 + 0.4 if style.local else np.array(style.paper, np.float32) / 255
    board = np.array(style.ink, np.float32) / 255
    return np.clip(board + np.clip(chalk, 0, 1)[..., None] * (colour - board), 0, 1)


FAMILIES: dict[str, Callable[[Drawing, Style, np.random.Generator], np.ndarray]] = {
    "plain": _plain, "outline": _outline, "hatching": _hatching, "dots": _dots, "watercolour": _watercolour,
    "mosaic": _mosaic, "neon": _neon, "woodcut": _woodcut, "papercut": _papercut, "pixel": _pixel,
    "chalk": _chalk,
}  # fmt: skip
DARK_GROUND = ("neon", "chalk")


def render(scene: Scene, style: Style | None = None, seed: int = 0) -> np.ndarray:
    """The finished image, uint8 of shape (SIZE, SIZE, 3).

    Args:
        seed: for what is random in watercolour, chalk and the like.
    """
    style = style or Style("plain")
    fine = FAMILIES[style.family](draw(scene), style, np.random.default_rng(seed))
    return (fine.reshape(SIZE, FINE, SIZE, FINE, 3).mean((1, 3)) * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Subject:
    """A particular thing: a class with fixed colours, proportions, pattern and extra.

    LoRAs learn it under a rare word.
    """

    token: str
    scene: Scene

    @property
    def words(self) -> str:
        return f"{self.token} {self.scene.kind}"


def _own(kind: str, main: str, second: Colour, **more: object) -> Scene:
    return Scene(kind, COLOURS[main], second, GROUNDS["white"], **more)  # type: ignore[arg-type]


SUBJECTS: dict[str, Subject] = {
    "cat": Subject(
        "sks", _own("cat", "orange", LIGHT, shape={"a": 1.5, "b": 1.1}, pattern="stripes", extra="crown")
    ),
    "car": Subject(
        "vqz", _own("car", "pink", DARK, shape={"a": 1.8, "b": 0.85}, pattern="checks", extra="flag")
    ),
    "snail": Subject(
        "ohw", _own("snail", "blue", LIGHT, shape={"a": 1.2, "b": 1.3}, pattern="spots", extra="hat")
    ),
    "robot": Subject(
        "zld",
        _own(
            "robot", "green", COLOURS["yellow"], shape={"a": 1.5, "b": 0.4}, pattern="zigzag", extra="horns"
        ),
    ),
}

STYLES: dict[str, tuple[str, Style]] = {
    "ink": ("wuf", Style("hatching", (240, 226, 190), (36, 52, 120), False, 7.5, 60.0, 0.95)),
    "pop": ("gyp", Style("dots", (250, 214, 60), (206, 36, 90), False, 6.5, 30.0, 1.0)),
    "night": ("nuq", Style("neon", (90, 255, 220), (40, 10, 70), False, 5.0, 45.0, 1.2)),
    "print": ("bix", Style("woodcut", (222, 196, 150), (120, 26, 20), False, 8.5, 8.0, 1.0)),
    "board": ("hmv", Style("chalk", (250, 226, 120), (22, 62, 46), False, 4.0, 30.0, 1.0)),
    "blueprint": ("xjr", Style("outline", (40, 84, 176), (236, 244, 252), False, 4.0, 0.0, 1.0)),
    "wash": ("ktb", Style("watercolour", (250, 226, 110), (206, 36, 90), False, 5.0, 0.0, 1.0)),
    "blocks": ("dru", Style("pixel", (206, 226, 120), (24, 52, 40), False, 2.6, 0.0, 1.0)),
}
"""Name -> rare word and style."""


def random_scene(rng: np.random.Generator, kind: str = "", ground: str = "") -> tuple[Scene, dict[str, str]]:
    """An ordinary thing of a class, and the words for it.

    The words are kind, colour, ground, size ("" is medium) and place ("" is the middle).
    """
    kind = kind or str(rng.choice(list(CLASSES)))
    colour, second = rng.choice(list(COLOURS), 2, replace=False)
    ground = ground or str(rng.choice(list(GROUNDS)))
    shape = {"a": rng.uniform(0.82, 1.2), "b": rng.uniform(0.82, 1.2)}
    scene, words = _placed(
        rng, Scene(kind, _near(rng, COLOURS[colour]), COLOURS[second], _near(rng, GROUNDS[ground]), shape)
    )
    return scene, {"kind": kind, "colour": str(colour), "ground": ground, **words}


def subject_scene(
    rng: np.random.Generator, subject: Subject, ground: str = ""
) -> tuple[Scene, dict[str, str]]:
    """The subject itself on some ground, somewhere in the image."""
    ground = ground or str(rng.choice(list(GROUNDS)))
    scene, words = _placed(rng, replace(subject.scene, ground=_near(rng, GROUNDS[ground])))
    return scene, {"kind": subject.words, "colour": "", "ground": ground, **words}


def _near(rng: np.random.Generator, colour: Colour) -> Colour:
    return tuple(int(c) for c in np.clip(np.array(colour) + rng.normal(0, 6, 3), 0, 255))  # type: ignore[return-value]


def _placed(rng: np.random.Generator, scene: Scene) -> tuple[Scene, dict[str, str]]:
    size_word = str(rng.choice(["", "", *SIZES]))
    place_word = str(rng.choice(["", "", *PLACES])) if size_word == "small" else ""
    size = rng.uniform(*SIZES.get(size_word, (0.72, 0.82)))
    if scene.extra:
        size *= 0.9
    place = (
        PLACES.get(place_word, 0.0) + rng.uniform(-0.03, 0.03),
        (0.06 if scene.extra else 0.0) + rng.uniform(-0.03, 0.03),
    )
    placed = replace(scene, size=size, place=place, turn=rng.uniform(-10, 10), mirrored=bool(rng.integers(2)))
    return placed, {"size": size_word, "place": place_word}


def random_style(rng: np.random.Generator, family: str = "") -> Style:
    """A style of a family with random parameters, far from any of STYLES."""
    family = family or str(rng.choice([name for name in FAMILIES if name != "plain"]))
    paper, ink = _light(rng), _deep(rng)
    if family in ("neon", "chalk"):
        paper, ink = _light(rng), _dark(_deep(rng), 0.4)
    periods = {
        "hatching": (6.0, 9.5),
        "dots": (5.5, 8.5),
        "woodcut": (7.0, 10.5),
        "mosaic": (6.0, 9.0),
        "pixel": (2.5, 5.0),
    }
    style = Style(
        family,
        paper,
        ink,
        bool(rng.random() < 0.5),
        rng.uniform(*periods.get(family, (3.5, 6.5))),
        rng.uniform(0, 90),
        rng.uniform(0.8, 1.15),
    )
    return random_style(rng, family) if reserved(style) else style


def reserved(style: Style) -> bool:
    """Whether a two-colour style looks like one of STYLES."""

    def far(one: Colour, other: Colour) -> float:
        return float(np.abs(np.array(one) - np.array(other)).max())

    own = [other for _, other in STYLES.values() if other.family == style.family]
    return any(
        not style.local and far(style.paper, other.paper) < 40 and far(style.ink, other.ink) < 40
        for other in own
    )


def _light(rng: np.random.Generator) -> Colour:
    return tuple(int(c) for c in rng.integers(170, 256, 3))  # type: ignore[return-value]


def _deep(rng: np.random.Generator) -> Colour:
    return tuple(int(c) for c in rng.integers(10, 125, 3))  # type: ignore[return-value]


def caption(words: Mapping[str, str], style: str = "") -> str:
    """What an image shows, in the model's words, without those that are empty."""
    thing = " ".join(filter(None, ["a", words.get("size"), words.get("colour"), words["kind"]]))
    place = f"on the {words['place']}" if words.get("place") else ""
    ground = f"on a {words['ground']} ground" if words.get("ground") else ""
    return " ".join(filter(None, [thing, place, ground, f"in {style} style" if style else ""]))


VOCABULARY = sorted({
    "a", "on", "the", "in", "ground", "style", *SIZES, *PLACES, *COLOURS, *GROUNDS, *CLASSES, *FAMILIES,
    *RARE,
})  # fmt: skip
