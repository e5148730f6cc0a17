"""One generation with K-LoRA in a WebUI: one object, in one of a few states, from `start` until `close`.

In every pass of every batch the host activates the networks (`networks_loaded`), encodes the prompts if it
has not yet, and samples (`begin_pass`, then `at_call` for each evaluation of the denoiser). At the end comes
`tell`. Any of these calls may be the last, because the user may interrupt, and an error in a hook or in the
host skips the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet, ref

from klora.core.file_state import version_of
from klora.errors import KLoraError
from klora.hosts.base import Checkpoint, Host, PassSchedule
from klora.hosts.detect import UnknownHost
from klora.settings import Settings
from klora.webui import added_network, loras, options
from klora.webui.preparation import Preparation, prepare
from klora.webui.processing_patches import ProcessingPatches, undo_all
from klora.webui.prompt_tags import NAMED_IN_PROMPT, PromptTags
from klora.webui.refusal import GenerationRefused, refuse, sentence_of
from klora.webui.run_states import OVER, SAMPLING, TRANSITIONS, WITHOUT, Event, State
from klora.webui.sampling_passes import PassName, SamplingPass, is_hires, pass_of, seed_of
from klora.webui.selection_record import AppliedMaps, AppliedPass

WITHOUT_THE_PAIR = (
    "K-LoRA: another extension redrew a part of this image with neither LoRA of the pair. To have K-LoRA "
    "there too, add klora_script to the scripts that this extension runs (ADetailer: Settings, ADetailer, "
    "Script names to apply to ADetailer)."
)


class Run:
    """K-LoRA in one processing object `p` of the host.

    Attributes:
        state: only changed according to `TRANSITIONS`.
    """

    def __init__(self, p: Any, host: Host, prepared: Preparation, checkpoint: Checkpoint) -> None:
        self.p = p
        self.state = State.PREPARED
        self._host = host
        self._prepared = prepared
        self._switch = checkpoint.switch(prepared.pair)
        self._model = ref(checkpoint.model)
        self._file = checkpoint.file
        self._patches = ProcessingPatches(p)
        self._tags = PromptTags(p, prepared.loras, host)
        self._activated: Any = None
        self._attached = ExitStack()
        self._begun: PassName | None = None
        self._pass: SamplingPass | None = None
        self._applied: list[AppliedPass] = []
        self._stops: list[str] = []
        self._warnings: list[str] = []
        self._failure: BaseException | None = None
        self._told = False

    @property
    def is_sampling(self) -> bool:
        """Whether the passes of a batch are running, from which the host only lets their own errors out."""
        return self.state in SAMPLING

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to stop: the images are made, or the run has ended otherwise."""
        return self._told or self.state in OVER

    def begin(self) -> None:
        """Make the host load the pair, encode text with it, and sample within the run's passes."""
        self._patches.put("parse_extra_network_prompts", self._parse)
        self._patches.put("cached_params", self._cached_params)
        self._patches.put("setup_conds", self._setup_conds)
        self._patches.put("sample", self._sample)
        self.p.extra_generation_params.update(self._prepared.parameters)
        for warning in self._prepared.warnings:
            self.warn(warning)

    def networks_loaded(self, activated: Any) -> None:
        """The host has activated the networks of a pass, or during a pass those of another checkpoint.

        The switch then finds out which of them are the pair, and which the prompt's own.

        Args:
            activated: the host's tags that name the networks.
        """
        if self.state in OVER:
            return
        self._activated = activated
        self._tags.clean_hashes()
        problem = None
        if self._begun == pass_of(self.p):
            self._lose_to_other_model()
        else:
            self._end_pass()
            if self._settings.hires == "off" and activated is getattr(self.p, "hr_extra_network_data", None):
                return
            problem = self._follow_model()
        if self.state in WITHOUT:
            self._switch.leave()
        else:
            self._switch.networks_loaded()
        if problem:
            self.warn(problem)

    def begin_pass(self) -> None:
        """A pass is about to start: plan its whole schedule. img2img and the hires pass only run its end."""
        if self.state in OVER:
            return
        self._end_pass()
        self._begun = pass_of(self.p)
        if self.state in WITHOUT or (is_hires(self.p) and self._settings.hires == "off"):
            return
        schedule = self._host.schedule_of_pass(self.p)
        if self._settings.hires == "restart":
            schedule = PassSchedule(schedule.runs, 0, schedule.runs)
        plan = self._prepared.plan(schedule.steps, seed_of(self.p))
        self._pass = SamplingPass(self.p, plan, schedule, self._switch)

    def at_call(self, params: Any) -> None:
        """The denoiser is about to be evaluated."""
        if self.state in OVER:
            return
        self._lose_to_other_model()
        if self._pass is not None:
            self._pass.at_call(params)

    def tell(self, processed: Any) -> None:
        """All passes are done: add warnings and what was applied to the host's answer, and maps if wanted.

        Warnings go into the answer's info, not the images': the host shows comments in its page, but its API
        does not return them.
        """
        self._told = True
        told: dict[str, Any] = {}
        if self._warnings:
            told["K-LoRA warnings"] = " ".join(self._warnings)
        if self._applied:
            told["K-LoRA applied"] = [one.to_json() for one in self._applied]
        if told:
            processed.extra_generation_params = {**processed.extra_generation_params, **told}
        if not self._applied:
            return
        names = (lora.name for lora in self._prepared.loras.values())
        maps = AppliedMaps(self._applied, *names)
        if self._prepared.options.map_saved:
            maps.save(processed)
        if self._prepared.options.map_in_gallery and not self._is_part():
            maps.show(processed)

    def warn(self, sentence: str) -> None:
        """Show the user, with the images, something worth knowing about them."""
        self.p.comment(sentence)
        if sentence not in self._warnings:
            self._warnings.append(sentence)

    def fail(self, error: BaseException) -> None:
        """End the generation with `error`, at the next evaluation or wherever else the host lets it out."""
        sampling = self.is_sampling
        if not self._happens(Event.FAIL):
            return
        self._failure = GenerationRefused(error)
        if sampling:
            self._switch.fail(self._failure)
        else:
            refuse(self._patches, self._failure)

    def give_up(self) -> None:
        """Leave the rest of the generation to the host, as if K-LoRA were off.

        If the host has loaded networks already, it loads the prompt's own instead.
        """
        if not self._happens(Event.GIVE_UP):
            return
        self._end_pass()
        self._switch.leave()
        for name in self._prepared.parameters:
            self.p.extra_generation_params.pop(name, None)
        self._patches.undo()
        self._tags.restore()
        if self._activated is not None:
            self._host.activate(self.p, self._activated)

    def close(self) -> None:
        """Give everything back; harmless if that has been done before."""
        if not self._happens(Event.CLOSE):
            return
        _open_runs.discard(self)
        self._end_pass()
        self._patches.undo()

    @property
    def _settings(self) -> Settings:
        return self._prepared.settings

    def _happens(self, event: Event) -> bool:
        """Change to the state that follows, and return whether the event has one in the present state."""
        following = TRANSITIONS[self.state].get(event)
        if following is not None:
            self.state = following
        return following is not None

    def _parse(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._activated = self.p.extra_network_data
        self._tags.parsed()
        self._switch.expire_loaded()
        self._put_pair(self.p.extra_network_data)
        if getattr(self.p, "enable_hr", False):
            hires = self.p.hr_extra_network_data
            if self._settings.hires == "off":
                self._tags.note_names(hires)
            else:
                self._put_pair(hires)
        return result

    def _put_pair(self, tags: Any) -> None:
        if self._tags.put_pair(tags, self._switch.tags()):
            self.warn(NAMED_IN_PROMPT)

    def _cached_params(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The host's key for the conditionings that it keeps, and what sets this run's apart."""
        pair = tuple(
            (version_of(lora.path), self._settings.weight(role))
            for role, lora in self._prepared.loras.items()
        )
        own = ("K-LoRA", pair, self._settings.text_encoder_roles(), self.state in WITHOUT)
        return (*original(*args, **kwargs), own)

    def _setup_conds(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._encoding():
            return original(*args, **kwargs)

    def _sample(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._sampling():
            return original(*args, **kwargs)

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Around the host's encoding of the prompts: before a pass, or during it if a refiner takes over."""
        self._lose_to_other_model()
        if self._pass is not None or self.state in WITHOUT or self.state in OVER:
            yield
            return
        with self._switch.attached():
            self._happens(Event.ENCODE)
            try:
                yield
            finally:
                self._happens(Event.ENCODED)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Around the passes of one batch.

        Raises:
            GenerationRefused: the error with which the run has failed, if the host has swallowed it.
        """
        with self._attached:
            self._attach()
            self._happens(Event.SAMPLE)
            try:
                yield
            finally:
                self._begun = None
                self._end_pass()
                self._happens(Event.SAMPLED)
        if self._failure is not None:
            raise self._failure

    def _attach(self) -> None:
        """Keep the present switch attached until the passes of the batch are over."""
        self._attached.close()
        if self.state not in WITHOUT:
            self._attached.enter_context(self._switch.attached())

    def _end_pass(self) -> None:
        if self._pass is not None:
            self._applied.append(self._pass.close())
            self._pass = None
        self._switch.detach()

    def _lose_to_other_model(self) -> None:
        """Lose the pair if a refiner has taken over: the host loads it during a pass and goes on sampling."""
        if self._pass is not None and self._host.checkpoint().file != self._file:
            step = self._pass.next_step() + 1
            self._lose(f"in the {self._pass.name} pass before step {step} (another model took over)")

    def _follow_model(self) -> str | None:
        """Begin a pass on the loaded model: that of the last pass, another one, or the same one loaded again.

        Returns:
            A warning for the user, if the pass has to run without the pair.
        """
        checkpoint = self._host.checkpoint()
        if checkpoint.file != self._file:
            try:
                loras.check_checkpoint(self._prepared.files, checkpoint)
            except KLoraError as error:
                name = pass_of(self.p).name
                self._lose(f"in the {name} pass (the LoRAs do not fit its checkpoint)")
                on = Path(str(checkpoint.file)).name
                return f"K-LoRA: the {name} pass, on {on}, has neither LoRA of the pair. {error}"
        self._happens(Event.FIT)
        self._file = checkpoint.file
        if checkpoint.model is not self._model():
            self._model = ref(checkpoint.model)
            self._switch = checkpoint.switch(self._prepared.pair)
        if self.is_sampling:
            self._attach()
        return None

    def _lose(self, where: str) -> None:
        """Go on without the pair, and write that into the image."""
        self._happens(Event.LOSE)
        self._end_pass()
        self._switch.leave()
        if where not in self._stops:
            self._stops.append(where)
        self.p.extra_generation_params["K-LoRA stopped"] = "; ".join(self._stops)

    def _is_part(self) -> bool:
        """Whether all images of this run go into a script of the host or its upscale button."""
        return bool((self.p.script_args or [0])[0]) or getattr(self.p, "txt2img_upscale", False)


_open_runs: WeakSet[Run] = WeakSet()
"""Runs that are not closed.

There are several only while an extension makes an image during another one, as ADetailer does.
"""


def start(p: Any, settings: Settings, host: Host) -> Run:
    """Start a run in `p`, which `run_of` finds from then on.

    Raises:
        KLoraError: with the sentence for the user.
        Cancelled: the user interrupted the scoring.
    """
    run = Run(p, host, *prepare(p, settings, host))
    p.klora_run = run
    _open_runs.add(run)
    run.begin()
    return run


def run_of(p: Any) -> Run | None:
    """The run of this very object, not of the one that it was copied from."""
    run: Run | None = getattr(p, "klora_run", None)
    return run if run is not None and run.p is p else None


def warn_outer_runs(p: Any, sentence: str) -> None:
    """Give a warning with the images during which an extension is making another one, with `p`."""
    for run in tuple(_open_runs):
        if run.p is not p:
            run.warn(sentence)


def fail(p: Any, error: BaseException, host: Host) -> None:
    """Make `p` stop with `error` as soon as the host lets it out.

    It goes on without K-LoRA instead if that is what the user wants, or if K-LoRA does not know this host.
    """
    run = run_of(p)
    warn_outer_runs(
        p, f"K-LoRA: another extension could not redraw a part of this image: {sentence_of(error)}"
    )
    if run is not None and run.is_over:
        return
    if run is not None and run.is_sampling:
        run.fail(error)
    elif isinstance(error, UnknownHost) or options.read(host).on_error == options.GO_ON:
        _go_on_without(p, error, host)
    elif run is not None:
        run.fail(error)
    else:
        refuse(ProcessingPatches(p), GenerationRefused(error))


def _go_on_without(p: Any, error: BaseException, host: Host) -> None:
    """Let the host make the image as if K-LoRA were off, and say so in its comments and its parameters."""
    sentence = sentence_of(error)
    p.comment(f"K-LoRA: {sentence}")
    p.extra_generation_params["K-LoRA stopped"] = sentence
    added_network.give_back(p, host)
    run = run_of(p)
    if run is not None:
        run.give_up()
    else:
        undo_all(p)


def release(p: Any) -> None:
    """Free `p` from anything that an earlier run left on it or on the object it was copied from."""
    run = run_of(p)
    if run is not None:
        run.close()
    p.__dict__.pop("klora_run", None)
    undo_all(p)
