"""What a generation's prompts say about the pair: its tags, and the infotext's hashes under their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from klora.hosts.base import Host, HostLora
from klora.webui import loras

NAMED_IN_PROMPT = (
    "K-LoRA: the prompt also names a LoRA of the pair. That LoRA is applied once, by K-LoRA, at the weight "
    "set in K-LoRA, and the rest of its tag is ignored."
)


class PromptTags:
    """The tags that the host has parsed from the prompts of `p`.

    Tags that name the pair are replaced with the pair's own.

    Args:
        pair: {role: the host's LoRA}.
    """

    def __init__(self, p: Any, pair: Mapping[str, HostLora], host: Host) -> None:
        self._p = p
        self._pair = pair
        self._host = host
        self._own: list[tuple[Any, str, list[Any]]] = []
        self._named: dict[str, HostLora] = {}

    def parsed(self) -> None:
        """The host has parsed a batch's prompts: forget those of the batch before."""
        self._own.clear()
        self._named.clear()

    def put_pair(self, tags: Any, pair: Sequence[tuple[str, float]]) -> bool:
        """Make the host load the pair once, after the prompt's own networks.

        Args:
            tags: the host's tags, {word before the colon: tags}.
            pair: name and weight of each LoRA to load.

        Returns:
            Whether the prompt names a LoRA of the pair.
        """
        named = self.note_names(tags)
        for word in self._host.tag_words():
            own = tags[word]
            self._own.append((tags, word, own))
            tags[word] = [tag for tag in own if not tag.positional or tag.positional[0] not in named]
        tags["lora"] += [self._host.tag(name, weight) for name, weight in pair]
        return bool(named)

    def note_names(self, tags: Any) -> dict[str, HostLora]:
        """{name in a <lora:…> of the prompt: the LoRA of the pair that it means}.

        The infotext will have their hashes under these names.
        """
        words = [tag for word in self._host.tag_words() for tag in tags[word]]
        names = [tag.positional[0] for tag in words if tag.positional]
        found = {name: lora for name in names if (lora := self._of_pair(name)) is not None}
        self._named.update(found)
        return found

    def restore(self) -> None:
        """Put the prompts' own tags back."""
        for tags, word, own in self._own:
            tags[word] = own

    def clean_hashes(self) -> None:
        """Leave the pair's hashes in "Lora hashes" only for tags of the prompt, under the names in the tags.

        The pair chosen in K-LoRA has entries of its own in the infotext.
        """
        if not hashes_are_written(self._host):
            return
        hashes = getattr(self._p, "lora_hashes", {})
        for lora in self._pair.values():
            hashes.pop(_in_hashes(lora.name), None)
        for name, lora in self._named.items():
            if shorthash := lora.hash():
                hashes[_in_hashes(name)] = shorthash
        if hashes:
            self._p.lora_hashes = hashes
            self._p.extra_generation_params["Lora hashes"] = ", ".join(
                f"{name}: {value}" for name, value in hashes.items()
            )
        else:
            self._p.extra_generation_params.pop("Lora hashes", None)

    def _of_pair(self, name: str) -> HostLora | None:
        """The LoRA of the pair that <lora:name> means; None if it means another one."""
        pair = self._pair.values()
        named = next((lora for lora in pair if lora.name == name), None) or self._host.lora_of_tag(name)
        if named is None:
            return None
        return next((lora for lora in pair if loras.same_file(named.path, lora.path)), None)


def hashes_are_written(host: Host) -> bool:
    """Whether the user wants the host to write hashes of LoRAs into an image's parameters."""
    return bool(host.option("lora_add_hashes_to_infotext", True))


def _in_hashes(name: str) -> str:
    """A name as the host writes it in "Lora hashes"."""
    return name.replace(":", "").replace(",", "")
