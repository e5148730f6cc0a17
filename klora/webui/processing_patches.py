"""K-LoRA's methods in place of methods of the host's processing object `p`.

They are attributes of that very object. Other extensions patch it in the same way, before or after K-LoRA:
ControlNet patches `sample`. So only K-LoRA's own patches are undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Patch:
    """Takes the place of a method of `p`. Once disabled, it only calls the original method.

    It may still be called then: another extension may have wrapped it in a method of its own.

    Args:
        method: called with the original method, followed by that method's own arguments.

    Attributes:
        p: the object it was made for. A copy of `p`, as other extensions make them, has the same patch.
        found: what another extension had put there before; None if it was the method of the class.
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

    def disable(self) -> None:
        self._method = None

    @property
    def is_disabled(self) -> bool:
        return self._method is None


class ProcessingPatches:
    """The patches that one owner has put on `p`, and undoes together."""

    def __init__(self, p: Any) -> None:
        self._p = p
        self._patches: list[Patch] = []
        p.klora_patches = (*_owned(p), self)

    def put(self, name: str, method: Callable[..., Any]) -> None:
        """Put `method` in place of the method `name`, which it gets as its first argument."""
        patch = Patch(self._p, name, method)
        self._patches.append(patch)
        setattr(self._p, name, patch)

    def belong_to(self, p: Any) -> bool:
        return self._p is p

    def undo(self) -> None:
        """Give `p` its methods back; harmless if that has been done before."""
        for patch in self._patches:
            patch.disable()
        self._patches.clear()
        owners = tuple(owner for owner in _owned(self._p) if owner is not self)
        if owners:
            self._p.klora_patches = owners
        else:
            self._p.__dict__.pop("klora_patches", None)
        _remove_idle(self._p)


def undo_all(p: Any) -> None:
    """Undo all patches on `p`, whoever owns them; from a copy, remove those that it was copied with."""
    for owner in _owned(p):
        owner.undo()
    p.__dict__.pop("klora_patches", None)
    _remove_idle(p)


def _owned(p: Any) -> tuple[ProcessingPatches, ...]:
    """The owners of patches on this very object, not on one that it was copied from."""
    return tuple(owner for owner in getattr(p, "klora_patches", ()) if owner.belong_to(p))


def _remove_idle(p: Any) -> None:
    """Remove the outermost patches that have no purpose here.

    These are disabled ones, and those of an object that `p` was copied from.
    """
    for name, there in tuple(p.__dict__.items()):
        while isinstance(there, Patch) and (there.is_disabled or there.p is not p):
            if there.found is None:
                del p.__dict__[name]
            else:
                p.__dict__[name] = there.found
            there = p.__dict__.get(name)
