"""A LoRA file that was never written: what the scores need of one, with deltas from memory."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from klora.core.deltas import LowRank


class MemoryLora:
    """Stands in for LoraFile.

    Attributes:
        reads: names of the layers read so far.
    """

    def __init__(self, path, deltas):
        self.path = Path(path)
        self.state = None
        self.deltas = dict(sorted(deltas.items()))
        self.layers = {
            name: SimpleNamespace(rank=delta.rank, shape=delta.shape) for name, delta in self.deltas.items()
        }
        self.reads = []

    @contextmanager
    def open(self):
        yield self._read

    def check_unscored(self):
        pass

    def _read(self, name):
        self.reads.append(name)
        return self.deltas[name]


def low_rank(rows, columns, rank, seed=0, scale=0.5):
    """A random LowRank delta."""
    random = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random), scale, rank
    )
