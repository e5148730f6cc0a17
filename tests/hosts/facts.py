"""What differs between the kinds of host, as measured on running ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Clocks = Mapping[tuple[str, int], list[int]]


@dataclass(frozen=True)
class Facts:
    """One kind of host.

    Attributes:
        clocks: {kind of base model: {(sampler, steps asked for): the step of each evaluation of the
            denoiser}}.
        upscalers: of the hires pass, with and without a way over pixels where the host has both.
        places: of the probe's faults, with the number of faults in a row that no retry gets over.
        storages: {name: options} of checkpoints kept in fewer bits.
        storage_needs_reload: whether such options take effect only with another checkpoint.
        options: of every run.
        configurations: whether a checkpoint has a configuration file beside it.
    """

    clocks: Mapping[str, Clocks]
    upscalers: tuple[str, ...]
    places: Mapping[str, int]
    storages: Mapping[str, Mapping[str, Any]]
    storage_needs_reload: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    configurations: bool = False


UNET, FLOW = "UNet", "flow matching"
"""The kinds of base model, within which samplers and requests are alike."""

FIELDS: Mapping[str, Mapping[str, Any]] = {
    UNET: {"sampler_name": "Euler a", "scheduler": "Automatic"},
    FLOW: {"sampler_name": "Euler", "scheduler": "Simple", "cfg_scale": 1, "distilled_cfg_scale": 3.5},
}
"""What a request needs for a kind of base model."""


def kind_of(base: str) -> str:
    """The kind of the base model with this key."""
    return UNET if base in ("sdxl", "sd15") else FLOW


def once(steps: int) -> list[int]:
    return list(range(steps))


def twice(steps: int) -> list[int]:
    return [step for step in range(steps) for _ in range(1 if step == steps - 1 else 2)]


FIRST_ORDER = {(name, 4): once(4) for name in ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "LMS")}
SECOND_ORDER = {(name, 4): twice(4) for name in ("Heun", "DPM++ SDE")}
LENGTHS = {
    (name, steps): once(steps)
    for name, steps in (("Euler", 1), ("Euler", 12), ("Euler a", 1), ("Euler a", 30))
}
TIMESTEPS = {("PLMS", 4): once(4), ("DDIM", 4): once(3)}
COMMON = {**FIRST_ORDER, **SECOND_ORDER, **LENGTHS}
OF_UNET = {**COMMON, **TIMESTEPS, ("UniPC", 4): once(4), ("DPM2", 3): twice(3), ("Restart", 6): twice(6)}
ANCESTRAL = {("DPM2 a", 3): twice(3)}

HEUNPP2 = {("HeunPP2", 4): [0, 0, 0, 1, 1, 1, 2, 2, 3], ("HeunPP2", 1): [0]}
KOHAKU = {("Kohaku LoNyu Yog", 4): [0, 0, 0, 1, 1, 1, 2, 2, 2, 3], ("Kohaku LoNyu Yog", 1): [0, 0, 0]}
OF_FORGE = {
    (name, 4): once(4)
    for name in ("DPM++ 2M SDE Heun", "DPM++ 3M SDE", "DPM fast", "IPNDM", "IPNDM_V", "DEIS", "LCM", "DDPM")
}
OF_FORGE_FLOW = {(name, 4): once(4) for name in ("IPNDM", "IPNDM_V", "DEIS", "DPM++ 3M SDE")}
OF_NEO = {
    (name, 4): once(4)
    for name in (
        "DPM++ 3M SDE",
        "ER SDE",
        "LCM",
        "Res Multistep",
        "DPM++ 2M CFG++",
        "Euler a CFG++",
        "Euler CFG++",
    )
}

OF_KLORA = {"process": 1, "warnings": 1, "override": 1, "networks loaded": 1, "begin pass": 1, "callback": 1}
FAMILY_PLACES = {**OF_KLORA, "load": 1, "text encoder": 1, "merge": 1, "forward": 1, "decode": 1}
FAMILY_STORAGES = {
    name: {"forge_unet_storage_dtype": name}
    for name in ("float8-e4m3fn", "float8-e4m3fn (fp16 LoRA)", "Automatic (fp16 LoRA)")
}
"""With "(fp16 LoRA)" LoRAs are online, in Forge for weights of 8 bits and fewer only."""

A1111 = Facts(
    {UNET: {**OF_UNET, **ANCESTRAL}},
    upscalers=("Latent", "None"),
    places={**FAMILY_PLACES, "load": 3, "apply": 1, "restore": 1},
    storages={
        name: {"live_previews_enable": False, "cache_fp16_weight": cached, "fp8_storage": "Enable"}
        for name, cached in (("fp8", False), ("fp8 beside fp16", True))
    },
    storage_needs_reload=False,
    configurations=True,
)
"""On a CPU its fp8 computes in bfloat16, of which it cannot make live previews.

If it cannot load a LoRA it goes on to the next one, and K-LoRA makes it load that LoRA once more.
"""

FORGE = Facts(
    {
        UNET: {**OF_UNET, **ANCESTRAL, **HEUNPP2, **OF_FORGE, ("DPM++ 2S a", 4): twice(4)},
        FLOW: {**COMMON, **HEUNPP2, **OF_FORGE_FLOW},
    },
    upscalers=("Latent", "None"),
    places={**FAMILY_PLACES, "merge": 4},
    storages=FAMILY_STORAGES,
)
"""It retries a merge that fails, and K-LoRA makes it merge once more with the whole model moved away."""

NEO = Facts(
    {
        UNET: {**OF_UNET, **KOHAKU, **OF_NEO},
        FLOW: {**COMMON, **KOHAKU, **OF_NEO, ("DPM++ 2s a RF", 4): twice(4), ("DPM++ 2s a RF", 1): [0]},
    },
    upscalers=("None",),
    places=FAMILY_PLACES,
    storages=FAMILY_STORAGES,
    options={"refiner_use_steps": True},
)

FACTS = {"a1111": A1111, "forge": FORGE, "neo": NEO}
