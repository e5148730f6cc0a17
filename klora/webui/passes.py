"""The sampling passes of one generation: of each its schedule, its clock and its session, and what happens when the host changes the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

from klora.core.plan import Plan, make_plan
from klora.core.scores import PairScores
from klora.errors import KLoraError
from klora.hosts.base import Pair, PairSwitch, WebUI
from klora.session import Session
from klora.settings import Settings
from klora.webui import clock, loras
from klora.webui.applied import FIRST, HIRES, AppliedPass


class Passes:
    """A first pass, and with hires a second one, for every batch of the processing object `p`.

    Args:
        webui: the host's adapter.
        model: the checkpoint that the host has loaded, of which the run is.

    Attributes:
        switch: the pair's hold on that checkpoint.
        stopped: whether the run goes on without K-LoRA.
        applied: what was applied in the passes that are over.
        sampling: whether the passes of a batch are under way, with K-LoRA or without.
    """

    def __init__(
        self, p: Any, settings: Settings, webui: WebUI, model: Any, pair: Pair, scores: PairScores
    ) -> None:
        self.switch: PairSwitch = webui.switch(model, pair)
        self.stopped = False
        self.applied: list[AppliedPass] = []
        self.sampling = False
        self._given_up = False
        self._p = p
        self._settings = settings
        self._webui = webui
        self._model = ref(model)
        self._checkpoint = _checkpoint_of(model)
        self._held = ExitStack()
        self._stops: list[str] = []
        self._pair = pair
        self._scores = scores
        self._session: Session | None = None
        self._under_way = False
        self._begun: tuple[str, int] | None = None
        self._failure: BaseException | None = None
        self._place = FIRST, 0
        self._offset = 0
        self._steps_of_pass = 1

    @contextmanager
    def around_encoding(self) -> Iterator[None]:
        """Around the host's encoding of the prompts, which happens before a pass, and within one when a refiner takes over."""
        if self._under_way:
            self._stop_at_other_model()
        if self._under_way or self.stopped:
            yield
        else:
            with self.switch.held():
                yield

    @contextmanager
    def around_sampling(self) -> Iterator[None]:
        """Around the passes of one batch.

        Raises:
            BaseException: what `fail` was given, if the host has swallowed it.
        """
        with self._held:
            self._hold()
            self.sampling = True
            try:
                yield
            finally:
                self.sampling, self._begun = False, None
                self.end()
        if self._failure is not None:
            raise self._failure

    def networks_loaded(self, activated: Any) -> str | None:
        """The host has activated the networks of a pass: tell the pair from the prompt's own.

        Args:
            activated: the host's extra_network_data of that pass.

        Returns:
            What is to be said with the picture.
        """
        if self._given_up:
            return None
        problem = None
        if self._begun == self._this_pass():
            self._stop_at_other_model()
        else:
            self.end()
            if self._settings.hires == "off" and activated is getattr(self._p, "hr_extra_network_data", None):
                return None
            problem = self._follow_model()
        if self.stopped:
            self.switch.leave()
        else:
            self.switch.networks_loaded()
        return problem

    def begin(self) -> None:
        """A pass is about to start: plan its whole schedule, of which img2img and the hires pass run the end."""
        self.end()
        self._begun = self._this_pass()
        if self.stopped or (self._is_hires() and self._settings.hires == "off"):
            return
        self._under_way = True
        steps, self._offset, self._steps_of_pass = self._schedule_of_pass()
        if self._settings.hires == "restart":
            steps, self._offset = self._steps_of_pass, 0
        self._place = self._begun
        self._session = Session(self.plan(steps), self.switch)
        self._session.__enter__()
        self._session.prepare(self._offset)

    def at_call(self, params: Any) -> None:
        """The denoiser is about to be evaluated: switch to the step that this evaluation belongs to."""
        self._stop_at_other_model()
        if self._session is not None:
            self._session.step(self._index(params))

    def end(self) -> None:
        """Detach from the networks; harmless when it was done before."""
        self._under_way = False
        if self._session is not None:
            self._session.close()
            self.applied.append(AppliedPass(*self._place, self._session.plan, self._session.recorded()))
            self._session = None
        self.switch.detach()

    def fail(self, error: BaseException) -> None:
        """Make the sampling of this batch stop with `error`: at its next evaluation, or at its end if K-LoRA is not attached."""
        self._failure = error
        self.switch.fail(error)

    def give_up(self) -> None:
        """Go on without K-LoRA in this and all further batches."""
        self._given_up = self.stopped = True
        self.end()
        self.switch.leave()

    def tags(self) -> Sequence[tuple[str, float]]:
        """Name and weight of what the host itself is to load, as by <lora:name:weight>."""
        return () if self._given_up else self.switch.tags()

    def plan(self, steps: int) -> Plan:
        """The plan of the batch for a whole schedule of `steps` steps."""
        settings, seeds = self._settings, getattr(self._p, "seeds", None) or [0]
        return make_plan(
            self._scores,
            steps=steps,
            schedule=settings.schedule_of_run(),
            method=settings.method,
            gamma=settings.gamma,
            seed=int(seeds[0]),
        )

    def _is_hires(self) -> bool:
        return bool(getattr(self._p, "is_hr_pass", False))

    def _this_pass(self) -> tuple[str, int]:
        """Name and batch of the pass that the host is about to run, or runs."""
        return HIRES if self._is_hires() else FIRST, int(self._p.iteration)

    def _hold(self) -> None:
        """Have the switch in force held until the passes of the batch are over."""
        self._held.close()
        if not self.stopped:
            self._held.enter_context(self.switch.held())

    def _schedule_of_pass(self) -> tuple[int, int, int]:
        """(steps of the whole schedule, first step that runs, number of steps that run), as the host's samplers count them."""
        from modules.processing import StableDiffusionProcessingImg2Img
        from modules.sd_samplers_common import setup_img2img_steps

        p = self._p
        if not self._is_hires() and not isinstance(p, StableDiffusionProcessingImg2Img):
            return p.steps, 0, p.steps
        steps, t_enc = setup_img2img_steps(
            p, (getattr(p, "hr_second_pass_steps", 0) or p.steps) if self._is_hires() else None
        )
        run = t_enc + 1
        return max(steps, run), max(steps - run, 0), run

    def _index(self, params: Any) -> int:
        """The step of an evaluation: by counting calls, or, for a sampler without a fixed number, by the place of its noise level."""
        if self._p.sampler.config.name not in clock.UNBOUNDED:
            return self._step_of(params.denoiser.step)
        sigmas = self._p.sampler.get_sigmas(self._p, self._session.plan.steps if self._session else 1)[:-1]
        return int((sigmas > float(params.sigma.max()) * 1.0001).sum())

    def _step_of(self, evaluation: int) -> int:
        sampler, steps = self._p.sampler.config, self._steps_of_pass
        return self._offset + clock.step_of(
            evaluation, sampler.name, steps=steps, order=max(1, sampler.total_steps(steps) // steps)
        )

    def _at_other_model(self) -> bool:
        """Whether the host has loaded another checkpoint, be it into the same model."""
        from modules import shared

        return _checkpoint_of(shared.sd_model) != self._checkpoint

    def _stop_at_other_model(self) -> None:
        """A refiner takes over within a pass: the host loads it, encodes the text anew, and goes on sampling."""
        if self._session is not None and self._at_other_model():
            self._stop_within_pass()

    def _follow_model(self) -> str | None:
        """A pass begins on the model that is loaded: that of the pass before, or of another checkpoint, or of the same one loaded anew.

        Returns:
            What is to be said with the picture, if the pass has to do without the pair.
        """
        from modules import shared

        model = shared.sd_model
        if self._at_other_model():
            try:
                loras.check_checkpoint([member.file for member in self._pair.members], self._webui, model)
            except KLoraError as error:
                name = self._this_pass()[0]
                self._stop(f"in the {name} pass (the LoRAs do not fit its checkpoint)")
                return f"K-LoRA: the {name} pass, on {Path(str(_checkpoint_of(model))).name}, has neither LoRA of the pair. {error}"
        self.stopped = False
        self._checkpoint = _checkpoint_of(model)
        if model is not self._model():
            self._model = ref(model)
            self.switch = self._webui.switch(model, self._pair)
        if self.sampling:
            self._hold()
        return None

    def _stop_within_pass(self) -> None:
        step = self._step_of(self._p.sampler.model_wrap_cfg.step) + 1
        self._stop(f"in the {self._place[0]} pass before step {step} (another model took over)")

    def _stop(self, where: str) -> None:
        """Go on without K-LoRA in this pass, and write that into the picture."""
        self.stopped = True
        self.end()
        self.switch.leave()
        if where not in self._stops:
            self._stops.append(where)
        self._p.extra_generation_params["K-LoRA stopped"] = "; ".join(self._stops)


def _checkpoint_of(model: Any) -> str | None:
    return getattr(getattr(model, "sd_checkpoint_info", None), "filename", None)
