"""One generation with K-LoRA in a WebUI: from its settings to its hold on the host, and everything given back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from klora.analysis import pair_warnings
from klora.core.lora_file import LoraFile
from klora.core.scores import PairScores, score_pair
from klora.errors import KLoraError
from klora.hosts.base import Member, Pair, WebUI
from klora.hosts.detect import find_webui
from klora.hosts.sizes import left_out
from klora.settings import Settings
from klora.webui import infotext, loras, options
from klora.webui.applied import AppliedMaps
from klora.webui.hold import GenerationRefused, Hold, let_go, refuse, sentence_of
from klora.webui.passes import Passes
from klora.webui.progress import scoring_progress
from klora.webui.rewritten import readable_copy

WITHOUT_THE_PAIR = (
    "K-LoRA: another extension drew a part of this picture anew, with neither LoRA of the pair. To have K-LoRA there too, add klora_script to the "
    "scripts that this extension runs (ADetailer: Settings, ADetailer, Script names to apply to ADetailer)."
)

OPTION = "sd_lora"
"""The host's option "Add network to prompt": the name of a LoRA that it adds to every prompt, or "None"."""

NAMED_IN_OPTION = (
    'K-LoRA: the WebUI\'s option "Add network to prompt" names a LoRA of the pair too; it is applied once, by K-LoRA, at the weight chosen '
    "there."
)


class Run:
    """K-LoRA in one processing object `p` of the host, from the moment it is prepared until `release`.

    Raises:
        KLoraError: with the sentence for the user.
        Cancelled: the user interrupted the scoring.
    """

    def __init__(self, p: Any, settings: Settings) -> None:
        import networks
        from modules import shared

        self.p = p
        self._settings = settings
        self._options = options.read()
        self._loras = {role: loras.find(getattr(settings, role), role) for role in ("subject", "style")}
        self._files: dict[str, LoraFile] = {role: loras.read(lora.path) for role, lora in self._loras.items()}
        model = shared.sd_model
        webui = find_webui(networks, model)
        self._check(webui, model)
        scores = self._scored()
        self._passes = Passes(p, settings, webui, model, self._pair(scores), scores)
        self._written = infotext.parameters(
            settings, self._loras["subject"], self._loras["style"], loras.hashes_are_written()
        )
        warnings = pair_warnings(
            self._files["subject"],
            self._files["style"],
            self._passes.plan(20),
            self._options.accelerator_words(),
        )
        warnings += left_out(self._files, webui.sizes_of(model))
        if hasattr(p, "klora_option"):
            warnings.append(NAMED_IN_OPTION)
        self._told = False
        self._hold = Hold(p, settings, self._loras, self._passes)
        p.klora_run = self
        _under_way.add(self)
        p.extra_generation_params.update(self._written)
        for warning in warnings:
            self._hold.warn(warning)

    def _check(self, webui: WebUI, model: Any) -> None:
        subject, style = self._files["subject"], self._files["style"]
        if self.p.disable_extra_networks:
            raise KLoraError(
                "This run has extra networks switched off, which K-LoRA needs: switch them on, or K-LoRA off."
            )
        if _is_of((added := _added_to_every_prompt(self.p)), self._loras.values()):
            raise KLoraError(
                f'The WebUI\'s option "Add network to prompt" adds {added}, a LoRA of the pair, to every prompt: set it to None, or choose '
                "another LoRA."
            )
        loras.check_pair(subject, style, self._options.cache())
        loras.check_checkpoint((subject, style), webui, model)

    def _scored(self) -> PairScores:
        """The scores of the pair, from the cache if it was seen before."""
        from modules import shared

        state = shared.state
        with scoring_progress(state) as progress:
            return score_pair(
                self._files["subject"], self._files["style"], k_scale=self._settings.k_scale, cache=self._options.cache(),
                device=self._options.device(), progress=progress, cancelled=lambda: state.interrupted or state.stopping_generation,
            )  # fmt: skip

    def _pair(self, scores: PairScores) -> Pair:
        settings, roles = self._settings, self._settings.text_encoder_roles()
        return Pair(
            tuple(
                Member(role, self._loras[role].name, file, settings.weight(role), role in roles)
                for role, file in self._files.items()
            ),
            [layer.name for layer in scores.layers],
            {name for file in self._files.values() for name in file.carried},
            readable_copy,
        )

    def networks_loaded(self, activated: Any) -> None:
        """The host has activated the networks of a pass.

        Args:
            activated: the host's extra_network_data of that pass.
        """
        self._hold.networks_loaded(activated)
        if problem := self._passes.networks_loaded(activated):
            self._hold.warn(problem)

    def begin_pass(self) -> None:
        """A sampling pass is about to start."""
        self._passes.begin()

    def at_call(self, params: Any) -> None:
        """The denoiser is about to be evaluated."""
        self._passes.at_call(params)

    def tell(self, processed: Any) -> None:
        """All passes are done: put into the host's answer what there is to say, and the map where the user wants it."""
        self._told = True
        self._hold.tell_warnings(processed)
        applied = self._passes.applied
        if not applied:
            return
        told = {"K-LoRA applied": [one.to_json() for one in applied]}
        processed.extra_generation_params = {**processed.extra_generation_params, **told}
        maps = AppliedMaps(applied, self._loras["subject"].name, self._loras["style"].name)
        if self._options.map_saved:
            maps.save(processed)
        if self._options.map_in_gallery and not self._is_part():
            maps.show(processed)

    def _is_part(self) -> bool:
        """Whether a script of the host's or its upscale button works on with all pictures of this run."""
        return bool((self.p.script_args or [0])[0]) or getattr(self.p, "txt2img_upscale", False)

    @property
    def is_sampling(self) -> bool:
        """Whether the passes of a batch are under way: from there only an error of their own gets out."""
        return self._passes.sampling

    def fail(self, error: BaseException) -> None:
        """Make the sampling that is under way stop with `error`."""
        self._passes.fail(GenerationRefused(error))

    @property
    def is_over(self) -> bool:
        """Whether the pictures are made, so that there is nothing left to stop."""
        return self._told

    def give_up(self) -> None:
        """Leave the rest of the generation to the host, as if K-LoRA was off; no pass is under way."""
        self._passes.give_up()
        for name in self._written:
            self.p.extra_generation_params.pop(name, None)
        self._hold.give_back()

    def warn(self, sentence: str) -> None:
        """Tell the user with the picture what is worth knowing of it."""
        self._hold.warn(sentence)

    def end(self) -> None:
        """Detach from the networks; harmless when it was done before."""
        _under_way.discard(self)
        self._passes.end()


_under_way: WeakSet[Run] = WeakSet()
"""Several only where an extension makes a picture of its own within another's, as ADetailer does for what it has found."""


def warn_outer_runs(p: Any, sentence: str) -> None:
    """Tell it with the pictures within which an extension makes another one, with `p`."""
    for run in tuple(_under_way):
        if run.p is not p:
            run.warn(sentence)


def run_of(p: Any) -> Run | None:
    """The run of this very object, not of one that it was copied from."""
    run = getattr(p, "klora_run", None)
    return run if run is not None and run.p is p else None


def fail(p: Any, error: BaseException) -> None:
    """Make `p` stop with `error` at the next place from which the host lets it out, or go on without K-LoRA if the user wants that."""
    run = run_of(p)
    warn_outer_runs(
        p, f"K-LoRA: another extension could not draw a part of this picture anew: {sentence_of(error)}"
    )
    if run is not None and run.is_over:
        return
    if run is not None and run.is_sampling:
        run.fail(error)
    elif options.read().on_error == options.GO_ON:
        go_on_without(p, error)
    else:
        refuse(p, error)


def go_on_without(p: Any, error: BaseException) -> None:
    """Have the host make the picture as if K-LoRA was off, and say so in its comments and in its parameters."""
    sentence = sentence_of(error)
    p.comment(f"K-LoRA: {sentence}")
    p.extra_generation_params["K-LoRA stopped"] = sentence
    _give_option_back(p)
    run = run_of(p)
    if run is not None:
        run.give_up()
    else:
        let_go(p)


def release(p: Any) -> None:
    """Free `p` of what an earlier run on it, or on the object it was copied from, may have left."""
    run = run_of(p)
    if run is not None:
        run.end()
    p.__dict__.pop("klora_run", None)
    let_go(p)


def take_option_over(p: Any, settings: Settings) -> None:
    """Keep the host from adding a LoRA of the pair to the prompts of `p`, before it sets the options of this run.

    It does so by an override of the run's own, which the host undoes itself however the run ends.

    Raises:
        SettingsError: the LoRAs of the settings are not there.
    """
    p.__dict__.pop("klora_option", None)
    pair = [loras.find(getattr(settings, role), role) for role in ("subject", "style")]
    added = _added_to_every_prompt(p)
    if _is_of(added, pair) and getattr(p, "override_settings_restore_afterwards", False):
        p.klora_option = added
        p.override_settings = {**p.override_settings, OPTION: "None"}


def _give_option_back(p: Any) -> None:
    from modules import shared

    if hasattr(p, "klora_option"):
        setattr(shared.opts, OPTION, p.klora_option)


def _added_to_every_prompt(p: Any) -> str:
    from modules import shared

    return str(p.override_settings.get(OPTION, getattr(shared.opts, OPTION, "None")))


def _is_of(name: str, pair: Iterable[loras.HostLora]) -> bool:
    """Whether a name of the host's list is that of a LoRA of the pair, or leads to the same file."""
    named = loras.exactly(name) if name != "None" else None
    return named is not None and any(loras.same_file(named.path, lora.path) for lora in pair)
