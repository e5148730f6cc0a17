"""The LoRA files that the host lists, by the names its LoRA tab shows."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from klora import analysis
from klora.core.families.base import Family
from klora.core.file_state import version_of
from klora.core.lora_file import LoraFile, for_one_base, read_lora
from klora.core.score_cache import ScoreCache
from klora.errors import HostError, PairError, SettingsError, printable
from klora.hosts.base import Checkpoint, Host, HostLora, LoraLibrary
from klora.hosts.sizes import check_fit
from klora.hosts.webui import HOST

EXTENSIONS = (".safetensors", ".ckpt", ".pt")


def find(name: str, field: str, host: LoraLibrary = HOST) -> HostLora:
    """The LoRA that `name` means.

    It is compared with, in turn: the LoRAs' names; their aliases; both as `/klora/v1/loras` writes them, with
    what cannot be printed escaped; and both without regard to case, extension and subfolder.

    Args:
        field: the setting whose value `name` is.

    Raises:
        SettingsError: there is none, or several.
    """
    known = host.loras()
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
                    field: f"{name!r} ({field}) could mean any of the LoRAs {names}: "
                    "give the file name of the one you mean."
                }
            )
    raise SettingsError({field: _hidden(name, field, known, host) or _missing(name, field, known)})


def exactly(name: str, host: LoraLibrary = HOST) -> HostLora | None:
    """The LoRA with exactly this name, if the host lists it."""
    return next(iter(_named(name, host.loras())), None)


def find_by_hash(shorthash: str, like: str = "", host: LoraLibrary = HOST) -> HostLora | None:
    """The LoRA with this hash, as the host computes it.

    Files that the host has not hashed yet are hashed until the LoRA is found. That takes about half a second
    for each 200 MB, once.

    Args:
        like: the name it once had; files with similar names are hashed first.
    """
    if not shorthash:
        return None
    known = host.loras()
    for lora in known:
        if lora.shorthash == shorthash:
            return lora
    unhashed = [lora for lora in known if not lora.shorthash]
    unhashed.sort(
        key=lambda lora: difflib.SequenceMatcher(None, lora.name.casefold(), like.casefold()).ratio(),
        reverse=True,
    )
    return next((lora for lora in unhashed if lora.hash() == shorthash), None)


def read(path: Path, loaded: Family | None = None) -> LoraFile:
    """As `read_lora`, but a file that has not changed is not read again. Only names and shapes are kept.

    Args:
        loaded: the family of the loaded checkpoint, None while none is loaded.

    Raises:
        LoraFileError: as `read_lora`.
    """
    return _read(path, version_of(path), loaded)


def read_pair(paths: Mapping[str, Path], loaded: Family | None) -> dict[str, LoraFile]:
    """Files by role, read for the loaded checkpoint if possible, otherwise for one base model if possible.

    Raises:
        LoraFileError: as `read_lora`.
    """
    return as_pair({role: read(path, loaded) for role, path in paths.items()})


def as_pair(files: Mapping[str, LoraFile]) -> dict[str, LoraFile]:
    """The same files, read for one base model if there is one that they may all be for."""
    return dict(zip(files, for_one_base(list(files.values()), read), strict=True))


@lru_cache(maxsize=16)
def _read(path: Path, _version: str, loaded: Family | None) -> LoraFile:
    return read_lora(path, loaded)


def loaded_family(host: Host = HOST) -> Family | None:
    """The family of the loaded checkpoint; None while none is loaded, or if the WebUI does not tell."""
    try:
        checkpoint = host.checkpoint_at_rest()
        return None if checkpoint is None else checkpoint.family
    except HostError:
        return None


def check_pair(subject: LoraFile, style: LoraFile, cache: ScoreCache | None = None) -> None:
    """Refuse the same LoRA in both roles, under whatever names, and two files for different base models.

    Args:
        cache: knows the files' contents, so that a copy is recognised; without it only links are.

    Raises:
        PairError: with the sentence for the user.
    """
    one, other = subject.path, style.path
    if same_file(one, other) or (cache is not None and _same_content(one, other, cache)):
        names = one.name if one == other else f"{one} and {other} with the same content"
        raise PairError(f"Subject and style are the same LoRA, {names}: choose another for one of the two.")
    analysis.check_pair(subject, style)


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, such as through a link."""
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


def check_checkpoint(files: Sequence[LoraFile], checkpoint: Checkpoint) -> None:
    """Refuse files made for another base model than the loaded checkpoint's, or for layers of other sizes.

    Args:
        files: one, or two of the same base model.

    Raises:
        PairError: with the sentence for the user.
        HostError: LoRAs cannot be applied to single layers of this checkpoint.
    """
    wanted, loaded = files[0].family, checkpoint.family
    if wanted is loaded:
        check_fit(files, checkpoint.sizes())
        return
    raise PairError(
        f"{_named_together(files)} {'is' if len(files) == 1 else 'are'} for {wanted.short_name} and the "
        f"loaded checkpoint is {loaded.short_name}: load a checkpoint of {wanted.short_name}, or choose "
        "LoRAs made for this one."
    )


def _named_together(files: Sequence[LoraFile]) -> str:
    return f"The LoRA{'' if len(files) == 1 else 's'} {' and '.join(file.path.name for file in files)}"


def _named(name: str, known: list[HostLora]) -> list[HostLora]:
    return [lora for lora in known if lora.name == name]


def _alike(name: str, known: list[HostLora]) -> list[HostLora]:
    wanted = _name_parts(name)

    def fits(lora: HostLora) -> bool:
        return _path_parts(lora.path)[-len(wanted) :] == wanted or wanted in (
            (_bare(lora.name),),
            (_bare(lora.alias),),
        )

    return [lora for lora in known if fits(lora)] if wanted else []


def _bare(name: str) -> str:
    low = name.strip().casefold()
    return next((low.removesuffix(extension) for extension in EXTENSIONS if low.endswith(extension)), low)


def _hidden(name: str, field: str, known: list[HostLora], host: LoraLibrary) -> str | None:
    """The sentence for a file that exists but is not listed; None if there is no such file.

    Of several files with the same name the hosts only list the last.
    """
    wanted = _name_parts(name)
    listed = next((lora for lora in known if lora.path.stem.casefold() in wanted[-1:]), None)
    if listed is None or len(wanted) == 1:
        return None
    if not any(_path_parts(path)[-len(wanted) :] == wanted for path in _files(host)):
        return None
    return (
        f"The WebUI lists only one LoRA named {listed.name!r}, the one in the folder "
        f"{listed.path.parent.name!r}, which hides {name!r} ({field}): rename one of the two files, press "
        "the refresh button, and choose the new name."
    )


def _files(host: LoraLibrary) -> Iterator[Path]:
    """All LoRA files in the folders where the host looks for LoRAs."""
    for top in host.lora_folders():
        for folder, _, names in os.walk(top, followlinks=True):
            yield from (Path(folder, name) for name in names if name.casefold().endswith(EXTENSIONS))


def _path_parts(path: Path) -> tuple[str, ...]:
    return tuple(part.casefold() for part in (*path.parent.parts, path.stem))


def _name_parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(_bare(name.replace("\\", "/"))).parts


def _missing(name: str, field: str, known: list[HostLora]) -> str:
    if not name:
        return f"No {field} LoRA is chosen: choose one in {field!r}."
    if not known:
        return (
            f"The WebUI lists no LoRA at all, so {name!r} ({field}) cannot be used: put it into the LoRA "
            "folder and press the refresh button."
        )
    names = {lora.name.casefold(): lora.name for lora in known}
    near = difflib.get_close_matches(_bare(name)[:200], names, 3, 0.5)
    hint = "; nearest: " + ", ".join(repr(names[low]) for low in near) if near else ""
    return (
        f"The WebUI lists no LoRA named {name!r} ({field}){hint}. If you have just added the file, press the "
        "refresh button of the K-LoRA panel (API: POST /sdapi/v1/refresh-loras)."
    )
