"""What a network is made of: modules with their names, and the pieces of those that fuse several layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

LINEAR, CONV, NORM = "linear", "conv", "norm"


@dataclass(frozen=True)
class Module:
    """One module of a network.

    A native module may have several layers in one matrix where diffusers has a module for each. Then it has
    pieces, stacked from top to bottom, and the layer of a piece is called "<native>:<piece>".

    Attributes:
        native: its dotted path in the original network.
        diffusers: its dotted path in diffusers; one path per piece where diffusers splits it, otherwise one.
        kind: LINEAR, CONV or NORM; norms are applied, but have no score.
        pieces: names of the stacked pieces, empty for a module that is one layer.
        square: how many pieces at the top have as many rows as the matrix has columns; the others share the
            remaining rows equally.
        widths: rows of the matrix divided by its columns in checkpoints. It is needed where only some
            pieces are square, to cut a bias, whose matrix is not known, and to join pieces to a whole matrix.
        halves_swapped: diffusers stores the two halves of the rows (shift, scale) in the opposite order.
        rows: the heights of the pieces, top first, where they are known; otherwise the matrix tells them.
        unread: the WebUIs' loaders do not know its path in diffusers.
    """

    native: str
    diffusers: tuple[str, ...]
    kind: str = LINEAR
    pieces: tuple[str, ...] = ()
    square: int = 0
    widths: int | Fraction = 1
    halves_swapped: bool = False
    rows: tuple[int, ...] = ()
    unread: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The canonical layer names, top rows first."""
        return tuple(f"{self.native}:{piece}" for piece in self.pieces) or (self.native,)

    def heights(self, layers: Sequence[str], rows: int, columns: int | None) -> list[int]:
        """How many rows of a matrix belong to each of these layers, top first.

        For a matrix that does not fit the module, the heights need not add up to its rows.

        Args:
            layers: all or some of the module's layers.
            rows, columns: the size of the matrix; columns is None for a bias alone.
        """
        if self.rows:
            height = dict(zip(self.layers, self.rows, strict=True))
            return [height[layer] for layer in layers]
        square = [layer in self.layers[: self.square] for layer in layers]
        if all(square) or not any(square):
            return [rows // len(layers)] * len(layers)
        width = rows // self.widths if columns is None else columns
        rest = (rows - width * sum(square)) // square.count(False)
        return [width if is_square else rest for is_square in square]
