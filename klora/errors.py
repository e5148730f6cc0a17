"""Faults that a user can cause and mend.

Each carries one plain sentence that names the file or the field at fault and the way out; it is shown as it stands in
the UI, in the API answer and in the console.
"""

LONGEST_SENTENCE = 800


def printable(text: str, longest: int = LONGEST_SENTENCE) -> str:
    """`text`, which may hold names from a file or a request, as every console, JSON answer and image takes it.

    What cannot be printed (control characters, halves of surrogate pairs from names that are not UTF-8) is escaped, and the middle of what
    is longer than `longest` characters is left out.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} […] {text[-(longest // 2) :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class KLoraError(Exception):
    """Any fault with a sentence for the user."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class LoraFileError(KLoraError):
    """A LoRA file that cannot be used: unreadable, not a LoRA, broken numbers, or made for another base model."""


class PairError(KLoraError):
    """Two LoRA files that cannot be fused with each other or with the model at hand."""


class SettingsError(KLoraError):
    """Settings that do not fit.

    Attributes:
        problems: one sentence per bad field, {field name: sentence}.
    """

    def __init__(self, problems: dict[str, str]) -> None:
        self.problems = {printable(name): printable(sentence) for name, sentence in problems.items()}
        Exception.__init__(self, " ".join(self.problems.values()))


class HostError(KLoraError):
    """A host (WebUI or pipeline) that lacks something K-LoRA needs."""


class Cancelled(Exception):
    """The user stopped a long work between two layers or steps. Not a fault: nothing is to be reported."""
