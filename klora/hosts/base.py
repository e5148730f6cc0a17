"""What a host must offer so that one run of K-LoRA can switch its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from klora.core.selectors import Choice


class LayerSwitch(Protocol):
    """Puts one LoRA of the pair, or both, on single layers of a host's denoiser.

    An object serves one run. `detach` gives back exactly what `attach` found, may be called at any time and more than once.
    """

    def attach(self) -> None:
        """Take hold of the denoiser; first undo what an earlier run that died may have left."""

    def apply(self, choices: Mapping[str, Choice]) -> None:
        """Put the given choice on each named layer (canonical names); leave all other layers as they are."""

    def detach(self) -> None:
        """Give the denoiser back bit for bit."""
