"""Methods of K-LoRA's in the place of methods of the host's processing object `p`.

They are attributes of that very object. Other extensions patch it in the same way, before K-LoRA does or after it: ControlNet its `sample`.
So what is undone is K-LoRA's and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Patch:
    """What stands in the place of a method of `p`, until it is let go of: from then on it is the method again.

    Another extension may have put a method of its own in its place, which goes on calling it.

    Args:
        method: called with the method that it stands for, and with what that would be called with.

    Attributes:
        p: whose method it is. A copy of `p`, as other extensions make them, has the same object in its place.
        found: what another extension had put there before; None if it was the method of its class.
    """

    def __init__(self, p: Any, name: str, method: Callable[..., Any]) -> None:
        self.p = p
        self.found: Callable[..., Any] | None = p.__dict__.get(name)
        self._original: Callable[..., Any] = getattr(p, name)
        self._method: Callable[..., Any] | None = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._method is None:
            return self._original(*args, **kwargs)
        return self._method(self._original, *args, **kwargs)

    def let_go(self) -> None:
        self._method = None

    @property
    def is_let_go(self) -> bool:
        return self._method is None


class ProcessingPatches:
    """The patches that one owner has on `p`, and undoes."""

    def __init__(self, p: Any) -> None:
        self._p = p
        self._patches: list[Patch] = []
        p.klora_patches = (*_owned(p), self)

    def put(self, name: str, method: Callable[..., Any]) -> None:
        """Put `method` in the place of the method `name`, which it is given as its first argument."""
        patch = Patch(self._p, name, method)
        self._patches.append(patch)
        setattr(self._p, name, patch)

    def belong_to(self, p: Any) -> bool:
        return self._p is p

    def undo(self) -> None:
        """Give `p` its methods back; harmless when it was done before."""
        for patch in self._patches:
            patch.let_go()
        self._patches.clear()
        owners = tuple(owner for owner in _owned(self._p) if owner is not self)
        if owners:
            self._p.klora_patches = owners
        else:
            self._p.__dict__.pop("klora_patches", None)
        _take_off(self._p)


def undo_all(p: Any) -> None:
    """Undo all patches on `p`, whoever owns them, and if it is a copy, take those off that it was copied with."""
    for owner in _owned(p):
        owner.undo()
    p.__dict__.pop("klora_patches", None)
    _take_off(p)


def _owned(p: Any) -> tuple[ProcessingPatches, ...]:
    """Owners of patches on this very object, not on one that it was copied from."""
    return tuple(owner for owner in getattr(p, "klora_patches", ()) if owner.belong_to(p))


def _take_off(p: Any) -> None:
    """Take off what is on top and does nothing here any more: patches let go of, and those of an object that `p` was copied from."""
    for name, there in tuple(p.__dict__.items()):
        while isinstance(there, Patch) and (there.is_let_go or there.p is not p):
            if there.found is None:
                del p.__dict__[name]
            else:
                p.__dict__[name] = there.found
            there = p.__dict__.get(name)
