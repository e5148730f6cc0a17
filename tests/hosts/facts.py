"""What differs between the kinds of host, as measured on running ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """One kind of host.

    Attributes:
        clocks: {(sampler, steps asked for): the step that each evaluation of the denoiser belongs to}.
        probed_name: canonical layer -> its name in the probe's answer of networks; None where layers keep no names of networks,
            and only their weights tell.
    """

    clocks: Mapping[tuple[str, int], list[int]]
    probed_name: Callable[[str], str] | None


CLOCKS = {
    ("Euler a", 4): [0, 1, 2, 3],
    ("DPM++ 2M", 4): [0, 1, 2, 3],
    ("DPM++ 2M SDE", 4): [0, 1, 2, 3],
    ("Heun", 4): [0, 0, 1, 1, 2, 2, 3],
    ("DPM++ SDE", 4): [0, 0, 1, 1, 2, 2, 3],
    ("DPM2 a", 3): [0, 0, 1, 1, 2],
    ("Restart", 6): [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5],
    ("UniPC", 4): [0, 1, 2, 3],
    ("PLMS", 4): [0, 1, 2, 3],
    ("DDIM", 4): [0, 1, 2],
    ("Euler", 1): [0],
    ("Euler", 4): [0, 1, 2, 3],
    ("Euler", 12): list(range(12)),
    ("Euler a", 1): [0],
    ("Euler a", 30): list(range(30)),
}
"""Of the k-diffusion and the timestep samplers, alike in A1111 and Forge."""

A1111 = Facts(CLOCKS, lambda layer: "diffusion_model_" + layer.replace(".", "_"))
FORGE = Facts(CLOCKS, None)

FACTS = {"a1111": A1111, "forge": FORGE}
