"""Products of float32 matrices that come out the same whatever the process allows of float32.

PyTorch has switches, one set for the whole process, that let it round factors before it multiplies them: to TF32 (11
significant bits) on a GPU, which A1111 allows on NVIDIA cards, and to bfloat16 (8) or TF32 on the CPU. Whoever turns one
for work of his own changes the image that another thread is sampling. Nothing is turned here: a product is computed so
that no switch can reach it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TF32_BITS = -1 << 13
"""Masks the bits of a float32 that a TF32 number has: sign, exponent and the upper 10 of 23 of the mantissa."""

HALF_A_TF32_STEP = 1 << 12

CPU_HAS_ITS_OWN_SWITCH = hasattr(torch.backends, "fp32_precision")
"""From torch 2.9 on. The older switch for all devices sets it too; before, only "medium" of that one reached the CPU."""


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, each entry to about 1e-6 of Σ |left_ik| |right_kj|.

    Args:
        left: (rows, inner), float32.
        right: (inner, columns), float32, on the same device.
        out: where to put the result, (rows, columns), float32.
    """
    if left.device.type != "cpu":
        return torch.mm(*tf32_parts(left, right), out=out)
    if _cpu_may_round():
        exact = left.double() @ right.double()
        return exact.float() if out is None else out.copy_(exact)
    return torch.mm(left, right, out=out)


def second_axis_product(core: Tensor, matrix: Tensor) -> Tensor:
    """A Tucker core times a matrix along its second axis: (n, m, height, width) and (m, j) to (n, j, height, width), float32."""
    last = core.movedim(1, -1)
    return product(last.reshape(-1, core.shape[1]), matrix).reshape(*last.shape[:-1], -1).movedim(-1, 1)


def tf32_parts(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices with the same product as left and right, of entries that lose next to nothing when rounded to TF32.

    With x = high + low, high a TF32 number and |low| <= 2^-11 |x|: left right = high high + high low + low high, one
    product of three times the inner size. The fourth term, and what rounding takes from the low parts, are below 2^-21 of
    |left| |right|. Asking the switch instead would not do: another thread may turn it between the question and the product.
    """
    (left_high, left_low), (right_high, right_low) = _high_and_low(left), _high_and_low(right)
    return torch.cat([left_high, left_high, left_low], 1), torch.cat([right_high, right_low, right_high], 0)


def _high_and_low(values: Tensor) -> tuple[Tensor, Tensor]:
    high = (
        values.contiguous()
        .view(torch.int32)
        .add(HALF_A_TF32_STEP)
        .bitwise_and_(TF32_BITS)
        .view(torch.float32)
    )
    return high, values - high


def _cpu_may_round() -> bool:
    """Whether the process lets float32 products on the CPU be made from rounded factors (oneDNN; AMX does, so far).

    Asked before every product, which costs two microseconds; the answer costs half the speed where it is yes.
    """
    if CPU_HAS_ITS_OWN_SWITCH:
        return torch.backends.mkldnn.matmul.fp32_precision not in ("ieee", "none")  # type: ignore[attr-defined]
    return torch.get_float32_matmul_precision() == "medium"
