"""K-LoRA's hold on one processing object `p` of the host: the methods of `p` that it overrides, and what they tell the host of the pair.

The hold is made of attributes of that very object. Other extensions override methods of it in the same way, before K-LoRA does or after it:
ControlNet its `sample`. So `let_go` takes back what is K-LoRA's and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import HTTPException

from klora.core.file_state import version_of
from klora.errors import KLoraError, printable
from klora.settings import Settings
from klora.webui import loras
from klora.webui.loras import HostLora
from klora.webui.passes import Passes

OVERRIDDEN = ("init", "parse_extra_network_prompts", "cached_params", "setup_conds", "sample")
NAMED_IN_PROMPT = (
    "K-LoRA: the prompt names a LoRA of the pair too; it is applied once, by K-LoRA, at the weight chosen there, and nothing else of its tag "
    "counts."
)


class Hold:
    """Has the host load the pair, encode text with it, and sample within its passes.

    Args:
        pair: {role: the host's LoRA}.
    """

    def __init__(self, p: Any, settings: Settings, pair: Mapping[str, HostLora], passes: Passes) -> None:
        self._p = p
        self._settings = settings
        self._pair = pair
        self._passes = passes
        self._warnings: list[str] = []
        self._own_tags: list[tuple[Any, str, list[Any]]] = []
        self._activated: Any = None
        self._named: dict[str, HostLora] = {}
        self._originals = {name: getattr(p, name) for name in OVERRIDDEN}
        override(p, "parse_extra_network_prompts", self._parse_extra_network_prompts)
        override(p, "cached_params", self._cached_params)
        override(p, "setup_conds", self._setup_conds)
        override(p, "sample", self._sample)

    def warn(self, sentence: str) -> None:
        """Tell the user what is worth knowing of a run that goes on."""
        self._p.comment(sentence)
        if sentence not in self._warnings:
            self._warnings.append(sentence)

    def tell_warnings(self, processed: Any) -> None:
        """Put the warnings into the info of the answer, not of the pictures: the host shows comments in its page, but its API has none."""
        if self._warnings:
            processed.extra_generation_params = {
                **processed.extra_generation_params,
                "K-LoRA warnings": " ".join(self._warnings),
            }

    def networks_loaded(self, activated: Any) -> None:
        """The host has activated networks.

        Args:
            activated: the host's extra_network_data of them.
        """
        self._activated = activated
        self._clean_hashes()

    def give_back(self) -> None:
        """Leave `p` to the host, as if K-LoRA had never been there: with the prompt's own networks, if it has activated any yet."""
        from modules import extra_networks

        let_go(self._p)
        for data, kind, own in self._own_tags:
            data[kind] = own
        if self._activated is not None:
            extra_networks.activate(self._p, self._activated)

    def _parse_extra_network_prompts(self, *args: Any, **kwargs: Any) -> Any:
        result = self._originals["parse_extra_network_prompts"](*args, **kwargs)
        self._own_tags.clear()
        self._named.clear()
        self._activated = self._p.extra_network_data
        self._add_tags(self._p.extra_network_data)
        if getattr(self._p, "enable_hr", False):
            hires = self._p.hr_extra_network_data
            if self._settings.hires != "off":
                self._add_tags(hires)
            else:
                self._named.update(self._naming_the_pair(hires))
        return result

    def _cached_params(self, *args: Any, **kwargs: Any) -> tuple:
        return (*self._originals["cached_params"](*args, **kwargs), self._conditioning_key())

    def _setup_conds(self, *args: Any, **kwargs: Any) -> Any:
        with self._passes.around_encoding():
            return self._originals["setup_conds"](*args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        with self._passes.around_sampling():
            return self._originals["sample"](*args, **kwargs)

    def _add_tags(self, data: Any) -> None:
        """Have the host load the pair once, after the prompt's own networks."""
        named = self._naming_the_pair(data)
        if named:
            self.warn(NAMED_IN_PROMPT)
        self._named.update(named)
        for kind in _kinds_of_tags():
            own = data[kind]
            self._own_tags.append((data, kind, own))
            data[kind] = [
                params for params in own if not params.positional or params.positional[0] not in named
            ]
        data["lora"] += [_tag(name, weight) for name, weight in self._passes.tags()]

    def _naming_the_pair(self, data: Any) -> dict[str, HostLora]:
        """{name in a <lora:…> of the prompt: the LoRA of the pair that it means}."""
        tags = [params for kind in _kinds_of_tags() for params in data[kind]]
        names = [params.positional[0] for params in tags if params.positional]
        return {name: lora for name in names if (lora := self._of_pair(name)) is not None}

    def _of_pair(self, name: str) -> HostLora | None:
        """The LoRA of the pair that <lora:name> means; None if it means another one."""
        pair = self._pair.values()
        named = next((lora for lora in pair if lora.name == name), None) or loras.of_tag(name)
        if named is None:
            return None
        return next((lora for lora in pair if loras.same_file(named.path, lora.path)), None)

    def _clean_hashes(self) -> None:
        """Have in "Lora hashes" those that tags of the prompt name, by the names in the tags; the pair's own are under names of our own."""
        if not loras.hashes_are_written():
            return
        hashes = getattr(self._p, "lora_hashes", {})
        for lora in self._pair.values():
            hashes.pop(_in_hashes(lora.name), None)
        for name, lora in self._named.items():
            if shorthash := loras.hash_of(lora):
                hashes[_in_hashes(name)] = shorthash
        if hashes:
            self._p.lora_hashes = hashes
            self._p.extra_generation_params["Lora hashes"] = ", ".join(
                f"{name}: {value}" for name, value in hashes.items()
            )
        else:
            self._p.extra_generation_params.pop("Lora hashes", None)

    def _conditioning_key(self) -> tuple:
        """What makes this run's text conditioning differ from another's, for the host's cache of it."""
        pair = tuple(
            (version_of(lora.path), self._settings.weight(role)) for role, lora in self._pair.items()
        )
        return ("K-LoRA", pair, self._settings.text_encoder_roles(), self._passes.stopped)


def _kinds_of_tags() -> list[str]:
    """The words before the colon in tags of LoRAs: A1111 takes <lyco:…> for one too."""
    from modules.extra_networks import extra_network_aliases, extra_network_registry

    lora = extra_network_registry.get("lora")
    return ["lora", *(alias for alias, network in extra_network_aliases.items() if network is lora)]


def _tag(name: str, weight: float) -> Any:
    """<lora:name:weight> as the host's parser makes it of most names; in others it would find a parameter, as in "a=b"."""
    from modules.extra_networks import ExtraNetworkParams

    params = ExtraNetworkParams(items=[name, str(weight)])
    params.positional, params.named = [name, str(weight)], {}
    return params


def _in_hashes(name: str) -> str:
    """A name as the host writes it in "Lora hashes"."""
    return name.replace(":", "").replace(",", "")


class GenerationRefused(HTTPException):
    """Ends a generation with one sentence: the host's API answers with it, its UI and console show it. Its cause is the error."""

    def __init__(self, error: BaseException) -> None:
        status = 422 if isinstance(error, KLoraError) else 500
        super().__init__(status, detail=sentence_of(error))
        self.__cause__ = error

    def __str__(self) -> str:
        return str(self.detail)


GenerationRefused.__name__ = "K-LoRA"
"""The hosts' page shows an error as its type's name, a colon and its text."""


def sentence_of(error: BaseException) -> str:
    """What a user is told of an error."""
    if isinstance(error, KLoraError):
        return str(error)
    return (
        f"K-LoRA met an error that it did not expect, {type(error).__name__}: {printable(str(error))} (the WebUI's console has the whole "
        "report)."
    )


def refuse(p: Any, error: BaseException) -> None:
    """Make `p` raise at the next of its own methods that the host calls outside its catch-all around script hooks."""
    refused = GenerationRefused(error)

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise refused

    for name in ("init", "setup_conds", "sample"):
        override(p, name, stop)


class Override:
    """What stands in the place of a method of `p`, until it is let go of: from then on it is the method again.

    Another extension may have put a method of its own in its place, which goes on calling it.

    Attributes:
        p: whose method it is. A copy of `p`, as other extensions make them, has the same object in its place.
        found: what another extension had put there before; None if it was the method of its class.
    """

    def __init__(self, p: Any, name: str, method: Callable) -> None:
        self.p = p
        self.found: Callable | None = p.__dict__.get(name)
        self._method = method
        self._original: Callable = getattr(p, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def let_go(self) -> None:
        self._method = self._original


def override(p: Any, name: str, method: Callable) -> None:
    """Put `method` in the place of one of the methods of `p`."""
    ours = Override(p, name, method)
    setattr(p, name, ours)
    p.klora_overrides = (*_overrides_of(p), ours)


def let_go(p: Any) -> None:
    """Give `p` the methods back that it had, of whichever hold the overriding ones are."""
    for ours in _overrides_of(p):
        ours.let_go()
    p.__dict__.pop("klora_overrides", None)
    for name in OVERRIDDEN:
        while isinstance(ours := p.__dict__.get(name), Override):
            if ours.found is None:
                del p.__dict__[name]
            else:
                p.__dict__[name] = ours.found


def _overrides_of(p: Any) -> list[Override]:
    """Those of this very object, not of one that it was copied from."""
    return [ours for ours in getattr(p, "klora_overrides", ()) if ours.p is p]
