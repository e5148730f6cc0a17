"""The host's option "Add network to prompt" when it names a LoRA of the pair: K-LoRA applies it alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from klora.errors import KLoraError
from klora.hosts.base import Host, HostLora
from klora.settings import Settings
from klora.webui import loras

OPTION = "sd_lora"
"""The name of a LoRA that the host adds to every prompt, or "None"."""

NAMED_IN_OPTION = (
    'K-LoRA: the WebUI\'s option "Add network to prompt" also names a LoRA of the pair. That LoRA is applied '
    "once, by K-LoRA, at the weight set in K-LoRA."
)


def take_over(p: Any, settings: Settings, host: Host) -> None:
    """Keep the host from adding a LoRA of the pair to the prompts of `p`.

    It overrides the option for this run only, so it must be called before the host sets the run's options.
    The host undoes the override itself, however the run ends.

    Raises:
        SettingsError: a LoRA of the settings is not there.
    """
    p.__dict__.pop("klora_option", None)
    pair = [loras.find(getattr(settings, role), role, host) for role in ("subject", "style")]
    added = _added(p, host)
    if _is_of(added, pair, host) and getattr(p, "override_settings_restore_afterwards", False):
        p.klora_option = added
        p.override_settings = {**p.override_settings, OPTION: "None"}


def is_taken_over(p: Any) -> bool:
    """Whether `take_over` has overridden the option."""
    return hasattr(p, "klora_option")


def give_back(p: Any, host: Host) -> None:
    """Restore the option, so that the host adds what the user wants."""
    if is_taken_over(p):
        host.set_option(OPTION, p.klora_option)


def check(p: Any, pair: Iterable[HostLora], host: Host) -> None:
    """Refuse a run if the host will add a LoRA of the pair to its prompts.

    Raises:
        KLoraError: with the sentence for the user.
    """
    added = _added(p, host)
    if _is_of(added, pair, host):
        raise KLoraError(
            f'The WebUI\'s option "Add network to prompt" adds {added}, a LoRA of the pair, to every prompt: '
            "set it to None, or choose another LoRA."
        )


def _added(p: Any, host: Host) -> str:
    return str(p.override_settings.get(OPTION, host.option(OPTION, "None")))


def _is_of(name: str, pair: Iterable[HostLora], host: Host) -> bool:
    """Whether a name from the host's list means a LoRA of the pair, or one in the same file."""
    named = loras.exactly(name, host) if name != "None" else None
    return named is not None and any(loras.same_file(named.path, lora.path) for lora in pair)
