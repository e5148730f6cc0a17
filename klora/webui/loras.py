"""The LoRA files that the host lists, by the names its LoRA tab shows."""

from __future__ import annotations

import difflib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from klora import analysis
from klora.core.file_state import version_of
from klora.core.lora_file import LoraFile, read_lora
from klora.core.score_cache import ScoreCache
from klora.errors import PairError, SettingsError, printable
from klora.hosts.base import WebUI
from klora.hosts.detect import name_of_base
from klora.hosts.sizes import check_fit
from klora.lora_metadata import trained_on

EXTENSIONS = (".safetensors", ".ckpt", ".pt")
LONGEST_REFRESH_SECONDS = 60.0
PRECISE_NAMES = {**analysis.BASE_NAMES, "flux": "FLUX.1"}
"""Of the base models where others of nearly the same name are about."""


@dataclass(frozen=True)
class HostLora:
    """One LoRA file of the host.

    Attributes:
        name: as the host's LoRA tab shows it.
        alias: the name that its trainer wrote into the file; the name where there is none.
        shorthash: first digits of the host's hash of it; "" while the host has not hashed it.
        entry: the host's record of the file, good for as long as it is held, whatever the host lists by then.
    """

    name: str
    alias: str
    path: Path
    shorthash: str
    entry: Any = field(repr=False, compare=False)

    @property
    def chosen_as(self) -> str:
        """What stands for it in a control, a request and an infotext: its name, but for "None", which means no LoRA there."""
        return self.path.name if self.name == "None" else self.name


def list_loras() -> list[HostLora]:
    """All LoRAs that the host lists, by name."""
    names, _ = _registry()
    return sorted((_of(name, entry) for name, entry in names.items()), key=lambda lora: lora.name.casefold())


def refresh() -> None:
    """Have the host read its LoRA folders again."""
    import networks

    networks.list_available_networks()


def find(name: str, field: str) -> HostLora:
    """The LoRA that `name` means: its name, else its alias, else either as `/klora/v1/loras` writes what cannot be printed, else either
    without regard to case, extension and subfolder.

    Args:
        field: the setting that `name` is the value of.

    Raises:
        SettingsError: there is none, or several.
    """
    known = list_loras()
    for matches in (
        _named(name, known),
        [lora for lora in known if lora.alias == name],
        [lora for lora in known if name in (printable(lora.name), printable(lora.alias))],
        _alike(name, known),
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(repr(lora.name) for lora in matches)
            raise SettingsError(
                {
                    field: f"{name!r} ({field}) could be any of the LoRAs {names}: give the one you mean by its file name."
                }
            )
    raise SettingsError({field: _hidden(name, field, known) or _missing(name, field, known)})


def exactly(name: str) -> HostLora | None:
    """The LoRA of this very name, if the host lists it."""
    return next(iter(_named(name, list_loras())), None)


def of_tag(name: str) -> HostLora | None:
    """The LoRA that the host takes for <lora:name>: that of this name or, unless several share it, of this alias."""
    import networks

    names, aliases = _registry()
    known = names if name.lower() in networks.forbidden_network_aliases else aliases
    return _of(known[name].name, known[name]) if name in known else None


def find_by_hash(shorthash: str, like: str = "") -> HostLora | None:
    """The LoRA with this hash of the host's.

    Hashes files that the host has not hashed yet (about half a second for each 200 MB, once) until the one is found.

    Args:
        like: the name it once had; files with names like that are hashed first.
    """
    if not shorthash:
        return None
    known = list_loras()
    for lora in known:
        if lora.shorthash == shorthash:
            return lora
    unhashed = [lora for lora in known if not lora.shorthash]
    unhashed.sort(
        key=lambda lora: difflib.SequenceMatcher(None, lora.name.casefold(), like.casefold()).ratio(),
        reverse=True,
    )
    return next((lora for lora in unhashed if hash_of(lora) == shorthash), None)


def read(path: Path) -> LoraFile:
    """As `read_lora`, without reading a file again that has not changed since. Kept are names and shapes, no tensors.

    Raises:
        LoraFileError: as `read_lora`.
    """
    return _read(path, version_of(path))


@lru_cache(maxsize=16)
def _read(path: Path, _version: str) -> LoraFile:
    return read_lora(path)


def check_pair(subject: LoraFile, style: LoraFile, cache: ScoreCache | None = None) -> None:
    """Refuse one file in both roles, by whatever names, and two files of different base models.

    Args:
        cache: tells a file from its copy, by content; without one only the names of one and the same file are seen through.

    Raises:
        PairError: with the sentence for the user.
    """
    one, other = subject.path, style.path
    if same_file(one, other) or (cache is not None and _same_content(one, other, cache)):
        names = one.name if one == other else f"{one} and {other} with the same content"
        raise PairError(f"Subject and style are the same LoRA, {names}: choose another one for one of them.")
    analysis.check_pair(subject, style)


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, as a link does."""
    try:
        return one.samefile(other)
    except OSError:
        return one == other


def _same_content(one: Path, other: Path, cache: ScoreCache) -> bool:
    try:
        if one.stat().st_size != other.stat().st_size:
            return False
    except OSError:
        return False
    content = cache.content(one)
    return content is not None and content == cache.content(other)


def check_checkpoint(files: Sequence[LoraFile], webui: WebUI, model: Any) -> None:
    """Refuse files that were made for another base model than the loaded checkpoint's, or for other sizes of its layers.

    Args:
        files: one, or two of the same base model.
        webui: the host's adapter.
        model: the loaded checkpoint.

    Raises:
        PairError: with the sentence for the user.
        HostError: LoRAs cannot be put on single layers of this checkpoint.
    """
    base, loaded = files[0].base, webui.base_of(model)
    if base == loaded:
        check_fit(files, webui.sizes_of(model))
    elif loaded is None:
        raise PairError(_of_another_base(files, name_of_base(model)))
    else:
        wanted = analysis.BASE_NAMES[base]
        raise PairError(
            f"{_named_together(files)} {'is' if len(files) == 1 else 'are'} for {wanted} and the loaded checkpoint is "
            f"{analysis.BASE_NAMES[loaded]}: load a checkpoint of {wanted}, or choose LoRAs made for this one."
        )


def _of_another_base(files: Sequence[LoraFile], checkpoint: str | None) -> str:
    """What to tell where K-LoRA knows no such checkpoint: LoRAs of Chroma and some of FLUX.2 have FLUX.1's keys and may well be for it."""
    wanted = PRECISE_NAMES[files[0].base]
    notes = ", ".join(dict.fromkeys(filter(None, (trained_on(file.metadata) for file in files))))
    one = len(files) == 1
    return (
        f"K-LoRA fuses on checkpoints of {' and '.join(PRECISE_NAMES.values())}, and the loaded one is {checkpoint or 'of another kind'}. "
        f"{_named_together(files)} {'has' if one else 'have'} the keys of {wanted}{f' (and in the header: {notes})' if notes else ''}: load a "
        f"checkpoint of {wanted} if that is what {'it was' if one else 'they were'} made for; otherwise use "
        f"{'it' if one else 'them'} in the prompt, with K-LoRA off."
    )


def _named_together(files: Sequence[LoraFile]) -> str:
    return f"The LoRA{'' if len(files) == 1 else 's'} {' and '.join(file.path.name for file in files)}"


def hash_of(lora: HostLora) -> str:
    """The host's short hash of a LoRA, read from the file if need be; "" where the host does no hashing."""
    lora.entry.read_hash()
    return lora.entry.shorthash or ""


def hashes_are_written() -> bool:
    """Whether the user wants the host to write hashes of LoRAs into a picture's parameters."""
    from modules import shared

    return bool(getattr(shared.opts, "lora_add_hashes_to_infotext", True))


def _registry() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the host lists, {name: entry} and {name or alias: entry}: all of it, also while the host reads its folders again.

    It does so without a lock, in the thread of whoever asks for it: it empties its lists and fills them with new entries. So two looks
    that see the same entries, with no reading under way between them, have seen everything.
    """
    import networks

    patience = time.monotonic() + LONGEST_REFRESH_SECONDS
    names = dict(networks.available_networks)
    while True:
        while _is_refreshing() and time.monotonic() < patience:
            time.sleep(0.01)
        aliases = dict(networks.available_network_aliases)
        before, names = names, dict(networks.available_networks)
        unchanged = before.keys() == names.keys() and all(before[name] is names[name] for name in names)
        if unchanged or time.monotonic() >= patience:
            return names, aliases


def _is_refreshing() -> bool:
    """Whether another thread is within the host's reading of its LoRA folders."""
    import networks

    reading, own = getattr(networks.list_available_networks, "__code__", None), threading.get_ident()
    for thread, frame in sys._current_frames().items():
        inner: FrameType | None = frame if thread != own else None
        while inner is not None:
            if inner.f_code is reading:
                return True
            inner = inner.f_back
    return False


def _of(name: str, entry: Any) -> HostLora:
    return HostLora(name, entry.alias, Path(entry.filename), entry.shorthash or "", entry)


def _named(name: str, known: list[HostLora]) -> list[HostLora]:
    return [lora for lora in known if lora.name == name]


def _alike(name: str, known: list[HostLora]) -> list[HostLora]:
    wanted = _wanted(name)

    def fits(lora: HostLora) -> bool:
        return _place(lora.path)[-len(wanted) :] == wanted or wanted in (
            (_bare(lora.name),),
            (_bare(lora.alias),),
        )

    return [lora for lora in known if fits(lora)] if wanted else []


def _bare(name: str) -> str:
    low = name.strip().casefold()
    return next((low.removesuffix(extension) for extension in EXTENSIONS if low.endswith(extension)), low)


def _hidden(name: str, field: str, known: list[HostLora]) -> str | None:
    """What to tell of a file of this name that is there but not listed: of several files of one name the hosts list the last one only."""
    wanted = _wanted(name)
    listed = next((lora for lora in known if lora.path.stem.casefold() in wanted[-1:]), None)
    if listed is None or len(wanted) == 1:
        return None
    if not any(_place(path)[-len(wanted) :] == wanted for path in _files()):
        return None
    return (
        f"The WebUI lists only one LoRA named {listed.name!r}, the one in the folder {listed.path.parent.name!r}, and it hides {name!r} "
        f"({field}): rename one of the two files, press the refresh button, and choose the new name."
    )


def _files() -> Iterator[Path]:
    """All LoRA files in the folders where the hosts look for them."""
    from modules import shared

    given = shared.cmd_opts
    folders = [
        getattr(given, "lora_dir", None),
        getattr(given, "lyco_dir_backcompat", None),
        *(getattr(given, "lora_dirs", None) or ()),
    ]
    for top in filter(None, folders):
        for folder, _, names in os.walk(top, followlinks=True):
            yield from (Path(folder, name) for name in names if name.casefold().endswith(EXTENSIONS))


def _place(path: Path) -> tuple[str, ...]:
    return tuple(part.casefold() for part in (*path.parent.parts, path.stem))


def _wanted(name: str) -> tuple[str, ...]:
    return PurePosixPath(_bare(name.replace("\\", "/"))).parts


def _missing(name: str, field: str, known: list[HostLora]) -> str:
    if not name:
        return f"No {field} LoRA is chosen: choose one in {field!r}."
    if not known:
        return f"The WebUI lists no LoRA at all, so {name!r} ({field}) cannot be used: put it into the LoRA folder and press the refresh button."
    names = {lora.name.casefold(): lora.name for lora in known}
    near = difflib.get_close_matches(_bare(name)[:200], names, 3, 0.5)
    hint = "; nearest: " + ", ".join(repr(names[low]) for low in near) if near else ""
    return (
        f"The WebUI lists no LoRA named {name!r} ({field}){hint}. If you have just added the file, press the refresh button of the "
        "K-LoRA panel (API: POST /sdapi/v1/refresh-loras)."
    )
