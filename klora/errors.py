"""Errors that a user can cause and fix.

Each has one plain sentence that names the file or field at fault and says what to do. The UI, the API's
answers and the console show it unchanged.
"""

LONGEST_SENTENCE = 800


def printable(text: str, longest: int = LONGEST_SENTENCE) -> str:
    """The text in a form that every console, JSON answer and image accepts.

    It may hold names from a file or a request. Characters that cannot be printed are escaped: control
    characters, and the lone surrogates in file names that are not UTF-8. The middle of a text longer than
    `longest` characters is left out.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} […] {text[-(longest // 2) :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class KLoraError(Exception):
    """Any error with a sentence for the user."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class LoraFileError(KLoraError):
    """A LoRA file that cannot be used: unreadable, not a LoRA, broken, or for another base model."""


class PairError(KLoraError):
    """Two LoRA files that cannot be fused with each other, or not with the loaded model."""


class SettingsError(KLoraError):
    """Settings that cannot be used.

    Attributes:
        problems: {name of a bad field: sentence}.
    """

    def __init__(self, problems: dict[str, str]) -> None:
        self.problems = {printable(name): printable(sentence) for name, sentence in problems.items()}
        Exception.__init__(self, " ".join(self.problems.values()))


class HostError(KLoraError):
    """A host (WebUI or pipeline) that lacks something K-LoRA needs."""


class Cancelled(Exception):
    """The user stopped the work between two layers or steps. This is not an error, so nothing is reported."""
