"""What a LoRA's header says besides its tensors: trigger words, what it was trained on, its own name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from klora.errors import printable

Metadata = Mapping[str, str]

PHRASES = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trigger_word", "instance_prompt")
"""Keys that hold trigger words as a person wrote them.

They are from the model specification, OneTrainer, ai-toolkit and diffusers' DreamBooth.
"""

OWN_NAMES = ("ss_output_name", "modelspec.title", "name", "ss_network_args")
"""Keys that say what the file itself is, not what it was trained on."""

MOST_WORDS = 12
LONGEST_WORD = 120
OFTEN = 0.6
"""A tag that at least this share of a folder's images have counts as a trigger word."""

NO_WORDS = {"", "img", "image", "images", "data", "dataset", "train", "training", "default", "folder"}
"""Names of folders that are not trigger words."""


def trigger_words(metadata: Metadata) -> list[str]:
    """Words that the LoRA needs in a prompt, the most certain first.

    They are phrases that someone wrote, the names of kohya's folders, and tags that most images have.
    """
    found = [*_phrases(metadata), *_folder_words(metadata), *_frequent_tags(metadata)]
    unique: dict[str, str] = {}
    for word in found:
        word = printable(" ".join(word.split()))
        if 0 < len(word) <= LONGEST_WORD:
            unique.setdefault(word.casefold(), word)
    return list(unique.values())[:MOST_WORDS]


def trained_on(metadata: Metadata) -> str:
    """The base model and the checkpoint that the LoRA was trained on, as far as the file names them."""
    base = next(
        (metadata[key] for key in ("ss_base_model_version", "modelspec.architecture") if metadata.get(key)),
        "",
    )
    checkpoint = (
        PurePosixPath(metadata.get("ss_sd_model_name", "").replace("\\", "/"))
        .name.removesuffix(".safetensors")
        .removesuffix(".ckpt")
    )
    return ", ".join(
        printable(part, LONGEST_WORD)
        for part in (base.removesuffix("/lora"), checkpoint)
        if part and part != "None"
    )


def own_names(metadata: Metadata) -> list[str]:
    """The names that the file gives itself."""
    return [metadata[key] for key in OWN_NAMES if metadata.get(key)]


def _phrases(metadata: Metadata) -> Iterator[str]:
    for key in PHRASES:
        yield from metadata.get(key, "").split(",")


def _folder_words(metadata: Metadata) -> Iterator[str]:
    """Words from kohya's folders "<repeats>_<words>", and from the class tokens in its newer files."""
    for dataset in _dicts(_parsed(metadata, "ss_datasets", [])):
        for subset in _dicts(dataset.get("subsets", [])):
            yield from str(subset.get("class_tokens") or "").split(",")
    for folder in _dict(_parsed(metadata, "ss_dataset_dirs", {})):
        words = re.sub(r"^\d+_", "", folder)
        if words.casefold() not in NO_WORDS:
            yield words


def _frequent_tags(metadata: Metadata) -> list[str]:
    """Tags that most images of a folder have, the most frequent first.

    If the number of images is unknown, the most common tag is taken to be on all of them.
    """
    folders = _dict(_parsed(metadata, "ss_dataset_dirs", {}))
    shares: dict[str, float] = {}
    for folder, tags in _dict(_parsed(metadata, "ss_tag_frequency", {})).items():
        counts = {tag.strip(): count for tag, count in _dict(tags).items() if isinstance(count, (int, float))}
        images = _dict(folders.get(folder)).get("img_count") or max(counts.values(), default=0)
        if isinstance(images, (int, float)) and (images > 1 or len(counts) == 1):
            for tag, count in counts.items():
                shares[tag] = max(shares.get(tag, 0.0), count / images)
    return sorted((tag for tag, share in shares.items() if share >= OFTEN), key=lambda tag: -shares[tag])


def _parsed(metadata: Metadata, key: str, otherwise: Any) -> Any:
    try:
        return json.loads(metadata.get(key) or "null") or otherwise
    except (ValueError, RecursionError):
        return otherwise


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(values: Any) -> Iterable[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
