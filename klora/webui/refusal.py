"""What a user is told of an error that ends a generation, and how the host is made to end it."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from klora.errors import KLoraError, printable
from klora.webui.processing_patches import ProcessingPatches


class GenerationRefused(HTTPException):
    """Ends a generation with one sentence: the host's API answers with it, its UI and console show it. Its cause is the error."""

    def __init__(self, error: BaseException) -> None:
        status = 422 if isinstance(error, KLoraError) else 500
        super().__init__(status, detail=sentence_of(error))
        self.__cause__ = error

    def __str__(self) -> str:
        return str(self.detail)


GenerationRefused.__name__ = "K-LoRA"
"""The hosts' page shows an error as its type's name, a colon and its text."""


def sentence_of(error: BaseException) -> str:
    """What a user is told of an error."""
    if isinstance(error, KLoraError):
        return str(error)
    return (
        f"K-LoRA met an error that it did not expect, {type(error).__name__}: {printable(str(error))} (the WebUI's console has the whole "
        "report)."
    )


def refuse(patches: ProcessingPatches, refused: GenerationRefused) -> None:
    """Make a processing object raise at the next of its own methods that the host calls outside its catch-all around script hooks."""

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise refused

    for name in ("init", "setup_conds", "sample"):
        patches.put(name, stop)
