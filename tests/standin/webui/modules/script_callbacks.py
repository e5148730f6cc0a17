"""Callbacks of scripts; an exception in one is printed and forgotten."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from modules.errors import reported

callbacks = defaultdict(list)


@dataclass
class CFGDenoiserParams:
    x: Any
    sigma: Any
    sampling_step: int
    total_sampling_steps: int
    text_cond: Any
    text_uncond: Any
    denoiser: Any


@dataclass
class CFGDenoisedParams:
    x: Any
    sampling_step: int
    total_sampling_steps: int


@dataclass
class AfterCFGCallbackParams:
    x: Any
    sampling_step: int
    total_sampling_steps: int


def call(name, *args):
    for callback in list(callbacks[name]):
        with reported(f"callback {name}"):
            callback(*args)


def on_cfg_denoiser(callback):
    callbacks["cfg_denoiser"].append(callback)


def on_cfg_denoised(callback):
    callbacks["cfg_denoised"].append(callback)


def on_cfg_after_cfg(callback):
    callbacks["cfg_after_cfg"].append(callback)


def on_app_started(callback):
    callbacks["app_started"].append(callback)


def on_script_unloaded(callback):
    callbacks["script_unloaded"].append(callback)
