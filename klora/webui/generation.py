"""One generation with K-LoRA in a WebUI: from its settings to the sessions of its sampling passes, and everything given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import HTTPException

from klora.analysis import BASE_NAMES, check_pair, pair_warnings
from klora.core.lora_file import LoraFile
from klora.core.plan import Plan, make_plan
from klora.core.score_cache import ScoreCache
from klora.core.scores import PairScores, score_pair
from klora.errors import HostError, KLoraError
from klora.hosts.base import Member, Pair
from klora.hosts.detect import find_webui
from klora.session import Session
from klora.settings import Settings
from klora.webui import clock, infotext, loras, paths
from klora.webui.rewritten import readable_copy

OVERRIDDEN = ("init", "parse_extra_network_prompts", "cached_params", "setup_conds", "sample")


class Run:
    """K-LoRA in one processing object `p` of the host. Its hold on `p` are attributes of that very object, which `release` deletes."""

    def __init__(self, p: Any, settings: Settings) -> None:
        import networks
        from modules import shared

        self.p = p
        self.settings = settings
        self._model = shared.sd_model
        self._checkpoint = _checkpoint_of(self._model)
        self._stopped = False
        self._webui = find_webui(networks, self._model)
        self.hosts_loras = {role: loras.find(getattr(settings, role), role) for role in ("subject", "style")}
        self.files: dict[str, LoraFile] = {role: loras.read(lora.path) for role, lora in self.hosts_loras.items()}
        self._session: Session | None = None
        self._scores: PairScores | None = None
        self._offset = 0
        self._steps_of_pass = 1
        self._warnings: list[str] = []
        self._check()

    def _check(self) -> None:
        subject, style = self.files["subject"], self.files["style"]
        if self.p.disable_extra_networks:
            raise KLoraError("This run has extra networks switched off, which K-LoRA needs: switch them on, or K-LoRA off.")
        if self.hosts_loras["subject"].path == self.hosts_loras["style"].path:
            raise KLoraError(f"Subject and style are the same LoRA, {self.settings.subject}: choose another one for one of them.")
        check_pair(subject, style)
        loaded = self._webui.base_of(self._model)
        if subject.base != loaded:
            raise KLoraError(
                f"The LoRAs {subject.path.name} and {style.path.name} are for {BASE_NAMES[subject.base]} and the loaded checkpoint is "
                f"{BASE_NAMES.get(loaded or '', 'neither SDXL nor FLUX.1')}: load {_one(subject.base)} checkpoint, or choose LoRAs made for this one."
            )

    def prepare(self) -> None:
        """Score the pair (from the cache if it was seen before), write the infotext, and take hold of `p`.

        Raises:
            KLoraError: with the sentence for the user.
            Cancelled: the user interrupted the scoring.
        """
        from modules import shared

        state = shared.state

        def progress(done: int, total: int) -> None:
            state.textinfo = f"K-LoRA: scoring {done} of {total} layers"
            state.sampling_step, state.sampling_steps = done, total

        subject, style = self.files["subject"], self.files["style"]
        self._scores = score_pair(
            subject, style, k_scale=self.settings.k_scale, cache=ScoreCache(paths.cache_folder()), progress=progress,
            cancelled=lambda: state.interrupted or state.stopping_generation,
        )  # fmt: skip
        state.textinfo, state.sampling_step = None, 0
        self._switch = self._webui.switch(self._model, self._pair(self._scores))
        for warning in pair_warnings(subject, style, self._plan(20)):
            self._warn(warning)
        self.p.extra_generation_params.update(infotext.parameters(self.settings, self.hosts_loras["subject"], self.hosts_loras["style"]))
        self._hold()
        self.p.klora_run = self

    def _pair(self, scores: PairScores) -> Pair:
        roles = self.settings.text_encoder_roles()
        return Pair(
            tuple(Member(role, self.hosts_loras[role].name, file, self._weight(role), role in roles) for role, file in self.files.items()),
            [layer.name for layer in scores.layers],
            {name for file in self.files.values() for name in file.carried},
            readable_copy,
        )

    def _warn(self, sentence: str) -> None:
        self.p.comment(sentence)
        if sentence not in self._warnings:
            self._warnings.append(sentence)

    def tell_warnings(self, processed: Any) -> None:
        """Put the warnings into the info of the answer, not of the pictures: the host shows comments in its page, but its API has none."""
        if self._warnings:
            processed.extra_generation_params = {**processed.extra_generation_params, "K-LoRA warnings": " ".join(self._warnings)}

    def _hold(self) -> None:
        p = self.p
        originals = {name: getattr(p, name) for name in OVERRIDDEN}

        def parse_extra_network_prompts(*args: Any, **kwargs: Any) -> Any:
            result = originals["parse_extra_network_prompts"](*args, **kwargs)
            self._add_tags(p.extra_network_data)
            if getattr(p, "enable_hr", False) and self.settings.hires != "off":
                self._add_tags(p.hr_extra_network_data)
            return result

        def cached_params(*args: Any, **kwargs: Any) -> tuple:
            return (*originals["cached_params"](*args, **kwargs), self._conditioning_key())

        def setup_conds(*args: Any, **kwargs: Any) -> Any:
            if self._session is not None:
                self._stop_at_other_model()
                return originals["setup_conds"](*args, **kwargs)
            with self._switch.held():
                return originals["setup_conds"](*args, **kwargs)

        def sample(*args: Any, **kwargs: Any) -> Any:
            with self._switch.held():
                try:
                    return originals["sample"](*args, **kwargs)
                finally:
                    self.end_pass()

        p.parse_extra_network_prompts = parse_extra_network_prompts
        p.cached_params = cached_params
        p.setup_conds = setup_conds
        p.sample = sample

    def _add_tags(self, data: Any) -> None:
        """Have the host load the pair once, after the prompt's own networks."""
        from modules.extra_networks import ExtraNetworkParams

        own = [params for params in data["lora"] if not self._is_of_pair(params)]
        if len(own) < len(data["lora"]):
            self._warn("K-LoRA: the prompt names a LoRA of the pair too; it is applied once, by K-LoRA, at the weight chosen there.")
        data["lora"] = own
        data["lora"] += [ExtraNetworkParams(items=[name, str(weight)]) for name, weight in self._switch.tags()]

    def _is_of_pair(self, params: Any) -> bool:
        """Whether <lora:…> of the prompt names a file of the pair, by the name or the alias that the host knows."""
        import networks

        named = networks.available_network_aliases.get(params.positional[0]) if params.positional else None
        return named is not None and any(Path(named.filename) == lora.path for lora in self.hosts_loras.values())

    def _weight(self, role: str) -> float:
        return self.settings.subject_weight if role == "subject" else self.settings.style_weight

    def _conditioning_key(self) -> tuple:
        """What makes this run's text conditioning differ from another's, for the host's cache of it."""
        pair = tuple((str(lora.path), lora.path.stat().st_mtime_ns, self._weight(role)) for role, lora in self.hosts_loras.items())
        return ("K-LoRA", pair, self.settings.text_encoder_roles(), self._stopped)

    def networks_loaded(self, activated: Any) -> None:
        """The host has activated the networks of a pass: tell the pair from the prompt's own, and keep it out of the infotext.

        Args:
            activated: the host's extra_network_data of that pass.
        """
        if activated is getattr(self.p, "hr_extra_network_data", None) and self.settings.hires == "off":
            self.end_pass()
            return
        if self._at_other_model():
            self._stop("at the model change")
            return
        self._follow_model()
        self._switch.networks_loaded()
        self._clean_hashes()

    def _clean_hashes(self) -> None:
        """Take the pair out of the prompt's "Lora hashes" (ours are under names of our own), unless the prompt has it too."""
        hashes = getattr(self.p, "lora_hashes", None)
        if not hashes:
            return
        tagged = "".join(self.p.all_prompts)
        for lora in self.hosts_loras.values():
            if f"<lora:{lora.name}:" not in tagged:
                hashes.pop(lora.name.replace(":", "").replace(",", ""), None)
        if hashes:
            self.p.extra_generation_params["Lora hashes"] = ", ".join(f"{name}: {value}" for name, value in hashes.items())
        else:
            self.p.extra_generation_params.pop("Lora hashes", None)

    def _is_hires(self) -> bool:
        return bool(getattr(self.p, "is_hr_pass", False))

    def begin_pass(self) -> None:
        """A sampling pass is about to start: plan its whole schedule, of which img2img and the hires pass run the end."""
        self.end_pass()
        if self._is_hires() and self.settings.hires == "off":
            return
        steps, self._offset, self._steps_of_pass = self._schedule_of_pass()
        if self.settings.hires == "restart":
            steps, self._offset = self._steps_of_pass, 0
        self._session = Session(self._plan(steps), self._switch)
        self._session.__enter__()
        self._session.step(self._offset)

    def _schedule_of_pass(self) -> tuple[int, int, int]:
        """(steps of the whole schedule, first step that runs, number of steps that run), as the host's samplers count them."""
        from modules.processing import StableDiffusionProcessingImg2Img
        from modules.sd_samplers_common import setup_img2img_steps

        p = self.p
        if not self._is_hires() and not isinstance(p, StableDiffusionProcessingImg2Img):
            return p.steps, 0, p.steps
        steps, t_enc = setup_img2img_steps(p, (getattr(p, "hr_second_pass_steps", 0) or p.steps) if self._is_hires() else None)
        run = t_enc + 1
        return max(steps, run), max(steps - run, 0), run

    def _plan(self, steps: int) -> Plan:
        if self._scores is None:
            raise HostError("K-LoRA was not prepared before sampling; please report this.")
        settings, seeds = self.settings, getattr(self.p, "seeds", None) or [0]
        return make_plan(
            self._scores, steps=steps, schedule=settings.schedule_of_run(), selector=settings.selector, gamma=settings.gamma, seed=int(seeds[0])
        )

    def at_call(self, params: Any) -> None:
        """The denoiser is about to be evaluated: switch to the step that this evaluation belongs to."""
        self._stop_at_other_model()
        if self._session is not None:
            self._session.step(self._index(params))

    def _at_other_model(self) -> bool:
        """Whether the host has loaded another checkpoint, be it into the same model."""
        from modules import shared

        return _checkpoint_of(shared.sd_model) != self._checkpoint

    def _stop_at_other_model(self) -> None:
        """A refiner takes over within a pass: the host loads it, encodes the text anew, and goes on sampling."""
        if self._session is not None and self._at_other_model():
            self._stop(f"at the model change before step {self._step_of(self.p.sampler.model_wrap_cfg.step) + 1}")

    def _follow_model(self) -> None:
        """After a refiner the host may load the checkpoint of the run into a new model."""
        from modules import shared

        self._stopped = False
        if shared.sd_model is not self._model and self._scores is not None:
            self._model = shared.sd_model
            self._switch = self._webui.switch(self._model, self._pair(self._scores))

    def _stop(self, where: str) -> None:
        """Go on without K-LoRA, and write that into the picture."""
        self._stopped = True
        self.end_pass()
        self._switch.leave()
        self.p.extra_generation_params["K-LoRA stopped"] = where

    def _index(self, params: Any) -> int:
        """The step of an evaluation: by counting calls, or, for a sampler without a fixed number, by the place of its noise level."""
        if self.p.sampler.config.name not in clock.UNBOUNDED:
            return self._step_of(params.denoiser.step)
        sigmas = self.p.sampler.get_sigmas(self.p, self._session.plan.steps if self._session else 1)[:-1]
        return int((sigmas > float(params.sigma.max()) * 1.0001).sum())

    def _step_of(self, evaluation: int) -> int:
        sampler, steps = self.p.sampler.config, self._steps_of_pass
        return self._offset + clock.step_of(evaluation, sampler.name, steps=steps, order=max(1, sampler.total_steps(steps) // steps))

    def end_pass(self) -> None:
        """Detach from the networks; harmless when it was done before."""
        if self._session is not None:
            self._session.close()
            self._session = None
        self._switch.detach()

    def fail(self, error: BaseException) -> None:
        """Make the run stop with `error` at the next place from which the host lets it out."""
        if self._session is not None:
            self._switch.fail(error)
        else:
            refuse(self.p, error)


def run_of(p: Any) -> Run | None:
    """The run of this very object, not of one that it was copied from."""
    run = getattr(p, "klora_run", None)
    return run if run is not None and run.p is p else None


def fail(p: Any, error: BaseException) -> None:
    """Make `p` stop with `error` at the next place from which the host lets it out."""
    run = run_of(p)
    if run is None:
        refuse(p, error)
    else:
        run.fail(error)


def _checkpoint_of(model: Any) -> str | None:
    return getattr(getattr(model, "sd_checkpoint_info", None), "filename", None)


def _one(base: str) -> str:
    return {"sdxl": "an SDXL", "flux": "a FLUX.1"}[base]


class GenerationRefused(HTTPException):
    """Ends a generation with one sentence: the host's API answers with it, its UI and console show it."""

    def __init__(self, error: BaseException) -> None:
        status = 422 if isinstance(error, KLoraError) else 500
        super().__init__(status, detail=str(error) or type(error).__name__)

    def __str__(self) -> str:
        return str(self.detail)


GenerationRefused.__name__ = "K-LoRA"
"""The hosts' page shows an error as its type's name, a colon and its text."""


def refuse(p: Any, error: BaseException) -> None:
    """Make `p` raise at the next of its own methods that the host calls outside its catch-all around script hooks."""
    refused = GenerationRefused(error)

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise refused from error

    for name in ("init", "setup_conds", "sample"):
        setattr(p, name, stop)


def release(p: Any) -> None:
    """Free `p` of what an earlier run on it, or on the object it was copied from, may have left."""
    run = p.__dict__.pop("klora_run", None)
    if run is not None:
        run.end_pass()
    for name in OVERRIDDEN:
        p.__dict__.pop(name, None)
