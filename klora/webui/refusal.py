"""What a user is told about an error that ends a generation, and how the host is made to end it."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from klora.errors import KLoraError, printable
from klora.webui.processing_patches import ProcessingPatches


class GenerationRefused(HTTPException):
    """Ends a generation with a sentence, shown by the host's API, UI and console. The error is its cause."""

    def __init__(self, error: BaseException) -> None:
        status = 422 if isinstance(error, KLoraError) else 500
        super().__init__(status, detail=sentence_of(error))
        self.__cause__ = error

    def __str__(self) -> str:
        return str(self.detail)


GenerationRefused.__name__ = "K-LoRA"
"""The hosts' page shows an error as the name of its type, a colon and its text."""


def sentence_of(error: BaseException) -> str:
    """What a user is told about an error."""
    if isinstance(error, KLoraError):
        return str(error)
    return (
        f"K-LoRA met an unexpected error, {type(error).__name__}: {printable(str(error))} (the full report "
        "is in the WebUI's console)."
    )


def refuse(patches: ProcessingPatches, refused: GenerationRefused) -> None:
    """Make a processing object raise as soon as the host calls one of its methods.

    A script's hook cannot end a generation itself, because the host catches whatever it raises.
    """

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise refused

    for name in ("init", "setup_conds", "sample"):
        patches.put(name, stop)
