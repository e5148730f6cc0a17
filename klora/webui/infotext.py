"""Settings in an image's parameters: writing them, and restoring the controls from them.

Characters in the names of LoRAs are percent-encoded where the host's own quoting would lose them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from klora.errors import SettingsError
from klora.hosts.base import HostLora
from klora.settings import DEFAULTS, SPECS, Settings, as_text
from klora.webui import loras

HASH = " hash"
SIZE = re.compile(r"\d+x\d+")


def parameters(settings: Settings, subject: HostLora, style: HostLora, hashes: bool = True) -> dict[str, str]:
    """What the host is to write about a run: both LoRAs, their hashes, and every setting that was changed.

    Args:
        hashes: whether the user wants hashes of LoRAs in an image's parameters.
    """
    found: dict[str, str] = {}
    for role, lora in (("subject", subject), ("style", style)):
        name = SPECS[role].infotext
        found[name] = _encoded(lora.chosen_as)
        if hashes and (shorthash := lora.hash()):
            found[name + HASH] = shorthash
    for field, value in settings.changed().items():
        if SPECS[field].kind not in ("flag", "lora"):
            found[SPECS[field].infotext] = as_text(field, value)
    return found


@dataclass(frozen=True)
class Restore:
    """Returns the value for the control of `field`, or None to leave it alone.

    The host calls it with the parameters of a pasted infotext. If that is of an image made without K-LoRA,
    K-LoRA is switched off and the other controls, with the chosen pair, stay as they are. Instances for the
    same field are equal, because the host pairs the controls of txt2img with those of img2img by them when
    it sends an image there.
    """

    field: str

    def __call__(self, params: Mapping[str, Any]) -> bool | float | str | None:
        used = SPECS["subject"].infotext in params
        spec = SPECS[self.field]
        if spec.kind == "flag":
            return used
        if not used:
            return None
        if spec.kind == "lora":
            return _restored_name(params.get(spec.infotext, ""), params.get(spec.infotext + HASH, ""))
        return self._value(next((params[name] for name in spec.infotexts if name in params), None))

    def _value(self, text: Any) -> float | str | None:
        if text is None:
            return control_value(self.field, DEFAULTS[self.field])
        try:
            return control_value(self.field, getattr(Settings.parse({self.field: text}), self.field))
        except SettingsError as error:
            print(f"K-LoRA: the pasted text is not used for {SPECS[self.field].label}: {error}")
            return None


def control_value(field: str, value: Any) -> Any:
    """A setting as its control holds it: text where words are allowed beside numbers."""
    spec = SPECS[field]
    return as_text(field, value) if spec.kind == "number" and spec.choices else value


def _restored_name(text: str, shorthash: str) -> str:
    name = unquote(text)
    listed = loras.exactly(name)
    if listed and (not shorthash or listed.shorthash in ("", shorthash)):
        return name
    renamed = loras.find_by_hash(shorthash, like=name)
    if renamed is None and listed:
        print(
            f"K-LoRA: the LoRA {name!r} of the pasted text (hash {shorthash}) is not the one that the WebUI "
            f"lists under this name (hash {listed.shorthash}): if you have it in another folder, rename one "
            "of the two files, press the refresh button, and choose the new name."
        )
    return renamed.chosen_as if renamed else name


def _encoded(name: str) -> str:
    """A name, escaped where the host would lose a character.

    These are quotes and blanks at either end, control characters, and the x of what looks like a size.
    """
    unsafe = {i for i, c in enumerate(name) if c == "%" or c < " "}
    unsafe |= {i for i in (0, len(name) - 1) if name[i].isspace() or name[i] == '"'}
    if SIZE.fullmatch(name):
        unsafe.add(name.index("x"))
    return "".join(
        "".join(f"%{byte:02X}" for byte in c.encode()) if i in unsafe else c for i, c in enumerate(name)
    )
