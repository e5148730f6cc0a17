"""`python -m klora generate`: an image from a diffusers pipeline, without a WebUI."""

from __future__ import annotations

import argparse
import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from klora.analysis import Analysis, Progress, analyze, check_pair
from klora.core.families import models_taken
from klora.core.families.base import Family
from klora.core.lora_file import for_one_base, read_lora
from klora.core.score_cache import ScoreCache
from klora.errors import HostError, KLoraError, PairError
from klora.hosts.diffusers import DiffusersSwitch, Lora, denoiser_of, family_of, text_encoders_with
from klora.session import Session
from klora.settings import SPECS, Settings, as_text


@dataclass(frozen=True)
class Request:
    """The image to make.

    Attributes:
        size: width and height in pixels.
        guidance: guidance scale; None means the pipeline's default.
    """

    prompt: str
    seed: int
    steps: int
    size: tuple[int, int]
    negative: str = ""
    guidance: float | None = None


def fused_image(pipeline: Any, analysis: Analysis, settings: Settings, request: Request) -> Image.Image:
    """Make one image. The pipeline's weights are the same bit for bit when this returns or raises.

    Args:
        pipeline: one of diffusers' for a family, which makes images or videos from text with one denoiser.
        analysis: has a plan for `request.steps` steps.

    Raises:
        PairError: the LoRAs are for another base model than the pipeline's, or have other sizes.
        HostError: the pipeline lacks layers that the LoRAs change.
    """
    return fused_images(pipeline, analysis, settings, request, 1)[0]


def fused_images(
    pipeline: Any, analysis: Analysis, settings: Settings, request: Request, count: int
) -> list[Image.Image]:
    """Make `count` images in one batch under one plan, with consecutive seeds from `request.seed` on.

    Otherwise this does what `fused_image` does.
    """
    subject = Lora(analysis.subject, settings.subject_weight)
    style = Lora(analysis.style, settings.style_weight)
    switch = _switch(pipeline, subject, style)
    encoding = [{"subject": subject, "style": style}[role] for role in settings.text_encoder_roles()]
    with ExitStack() as stack:
        stack.enter_context(text_encoders_with(pipeline, encoding))
        session = stack.enter_context(Session(analysis.plan, switch))
        session.step(0)

        def at_step_end(pipe: Any, call: int, _timestep: Any, values: dict) -> dict:
            session.step(_step_of(pipe.scheduler, call + 1))
            return values

        result = pipeline(**_arguments(pipeline, request, count), callback_on_step_end=at_step_end)
    return result.images if hasattr(result, "images") else [frames[0] for frames in result.frames]


def _step_of(scheduler: Any, call: int) -> int:
    """The step that a call of the denoiser belongs to, both 0-based.

    A scheduler of second order calls it twice a step, and PNDM, which Stable Diffusion 1.5 comes with, twice
    at its second timestep.
    """
    if scheduler.order > 1:
        return int(call // scheduler.order)
    return len(scheduler.timesteps[: call + 1].unique_consecutive()) - 1


def _switch(pipeline: Any, subject: Lora, style: Lora) -> DiffusersSwitch:
    """The switch for the pipeline's denoiser; raises PairError if the LoRAs are for another model."""
    family, loaded = subject.file.family, family_of(pipeline)
    if family is not loaded:
        raise PairError(
            f"The LoRAs {subject.file.path.name} and {style.file.path.name} are made for {family.short_name} "
            f"but the model is {loaded.short_name}: choose a model or LoRAs that fit."
        )
    return DiffusersSwitch(denoiser_of(pipeline), subject, style)


def _arguments(pipeline: Any, request: Request, count: int) -> dict[str, Any]:
    """What to call the pipeline with; a pipeline of videos makes some of one frame."""
    accepted = inspect.signature(pipeline.__call__).parameters
    width, height = request.size
    arguments: dict[str, Any] = {
        "prompt": request.prompt, "width": width, "height": height, "num_inference_steps": request.steps,
        "num_images_per_prompt" if "num_images_per_prompt" in accepted else "num_videos_per_prompt": count,
        "output_type": "pil",
        "generator": [torch.Generator().manual_seed(request.seed + index) for index in range(count)],
    }  # fmt: skip
    if "num_frames" in accepted:
        arguments["num_frames"] = 1
    if request.negative and "negative_prompt" in accepted:
        arguments["negative_prompt"] = request.negative
    if request.guidance is not None:
        arguments[family_of(pipeline).guidance] = request.guidance
    return arguments


def generate(options: argparse.Namespace, settings: Settings, cache: ScoreCache, progress: Progress) -> None:
    """Load the model, check that the LoRAs fit, score them, make the image, and save it with its settings.

    Raises:
        KLoraError: a file, an option or the model cannot be used.
    """
    paths = options.subject, options.style
    files = for_one_base([read_lora(path) for path in paths])
    check_pair(*files)
    pipeline = load_pipeline(options.model, files[0].family, options.config)
    loaded = family_of(pipeline)
    files = [read_lora(path, loaded) for path in paths]
    _switch(pipeline, *(Lora(file, 1.0) for file in files))
    analysis = analyze(
        Path(options.subject),
        Path(options.style),
        settings,
        steps=options.steps,
        seed=options.seed,
        loaded=loaded,
        cache=cache,
        progress=progress,
    )
    for warning in analysis.warnings:
        print(f"warning: {warning}")
    if options.scheduler:
        pipeline.scheduler = _scheduler(options.scheduler).from_config(pipeline.scheduler.config)
    size = options.size or own_size(pipeline)
    request = Request(options.prompt, options.seed, options.steps, size, options.negative, options.guidance)
    image = fused_image(pipeline, analysis, settings, request)
    _save(image, options.out, _parameters(request, analysis, settings))
    print(f"wrote {options.out}")


def _parameters(request: Request, analysis: Analysis, settings: Settings) -> str:
    """The generation parameters of an image, as the WebUIs write them."""
    own = {
        SPECS[role].infotext: lora.path.stem
        for role, lora in (("subject", analysis.subject), ("style", analysis.style))
    }
    own |= {
        SPECS[name].infotext: as_text(name, value)
        for name, value in settings.changed().items()
        if SPECS[name].kind != "lora"
    }
    size = f"{request.size[0]}x{request.size[1]}"
    fields = {"Steps": str(request.steps), "Seed": str(request.seed), "Size": size, **own}
    negative = f"Negative prompt: {request.negative}\n" if request.negative else ""
    return f"{request.prompt}\n{negative}" + ", ".join(f"{name}: {value}" for name, value in fields.items())


def _save(image: Image.Image, path: Path, parameters: str) -> None:
    text = PngInfo()
    text.add_itxt("parameters", parameters)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, pnginfo=text)
    except (OSError, ValueError) as error:
        raise KLoraError(
            f"Cannot write {path}: {error}. Choose another file name or folder, ending in .png."
        ) from error


def own_size(pipeline: Any) -> tuple[int, int]:
    """Width and height of the images that a pipeline's base model was trained on, in pixels."""
    side = family_of(pipeline).side
    return side, side


def load_pipeline(model: Path, family: Family, config: Path | None = None) -> Any:
    """A pipeline from a diffusers folder or a single file, on the GPU if there is one.

    Args:
        family: the LoRAs', as which a single file is opened: it does not say what it is.
        config: a diffusers folder with a single file's configuration.

    Raises:
        HostError: there is no such model, it is a single file of a family that is not opened from one, or
            diffusers cannot load it.
    """
    import diffusers

    if not model.exists():
        raise HostError(f"There is no model at {model}: give --model {models_taken()}.")
    if not model.is_dir() and family.single_file is None:
        raise HostError(
            f"The LoRAs are for {family.short_name}, which is opened from a diffusers folder, not from one "
            f"file such as {model}: give --model a folder."
        )
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        if model.is_dir() or family.single_file is None:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(str(model), torch_dtype=dtype)
        else:
            more = {"config": str(config)} if config else {}
            kind = getattr(diffusers, family.single_file)
            pipeline = kind.from_single_file(str(model), torch_dtype=dtype, **more)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise HostError(f"diffusers cannot load the model {model}: {error}") from error
    family_of(pipeline)
    return pipeline.to(device)


def _scheduler(name: str) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name, None)
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        raise HostError(
            f"diffusers has no scheduler {name!r}: give --scheduler a class such as EulerDiscreteScheduler."
        )
    return scheduler
