"""Faults that a user can cause and mend.

Each carries one plain sentence that names the file or the field at fault and the way out; it is shown as it stands in
the UI, in the API answer and in the console.
"""


class KLoraError(Exception):
    """Any fault with a sentence for the user."""


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
        self.problems = dict(problems)
        super().__init__(" ".join(self.problems.values()))


class HostError(KLoraError):
    """A host (WebUI or pipeline) that lacks something K-LoRA needs."""


class Cancelled(Exception):
    """The user stopped a long work between two layers or steps. Not a fault: nothing is to be reported."""
