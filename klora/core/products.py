"""Products of float32 matrices that do not depend on PyTorch's process-wide precision settings.

These settings let PyTorch round factors before it multiplies them: to TF32 (11 significant bits) on a GPU,
which A1111 allows on NVIDIA cards, and to bfloat16 (8) or TF32 on the CPU. Changing one of them would change
the image that another thread is sampling. So nothing is changed here; a product is computed in such a way
that no setting affects it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TF32_BITS = -1 << 13
"""Mask for the bits of a float32 that TF32 keeps: sign, exponent and the upper 10 of the 23 mantissa bits."""

HALF_A_TF32_STEP = 1 << 12

CPU_HAS_ITS_OWN_SETTING = hasattr(torch.backends, "fp32_precision")
"""True from torch 2.9 on. The older setting for all devices also sets the CPU's own; before torch 2.9 only
its value "medium" had an effect on the CPU."""


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, with an error in each entry of about 1e-6 of Σ |left_ik| |right_kj| at most.

    Args:
        left: float32, shape (rows, inner).
        right: float32, shape (inner, columns), on the same device.
        out: where to put the result, float32, shape (rows, columns); a new tensor if None.
    """
    if left.device.type != "cpu":
        return torch.mm(*tf32_parts(left, right), out=out)
    if _cpu_may_round():
        exact = left.double() @ right.double()
        return exact.float() if out is None else out.copy_(exact)
    return torch.mm(left, right, out=out)


def second_axis_product(core: Tensor, matrix: Tensor) -> Tensor:
    """A Tucker core times a matrix along the core's second axis, float32.

    The core has shape (n, m, height, width), the matrix (m, j), and the result (n, j, height, width).
    """
    last = core.movedim(1, -1)
    return product(last.reshape(-1, core.shape[1]), matrix).reshape(*last.shape[:-1], -1).movedim(-1, 1)


def tf32_parts(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices with the same product as left and right, even if a GPU rounds their entries to TF32.

    Let x = high + low, where high is a TF32 number and |low| <= 2^-11 |x|. Then left right = high high + high
    low + low high, which is one product with three times the inner size. The fourth term, and what rounding
    takes from the low parts, are below 2^-21 of |left| |right|. Reading the setting instead would not be
    safe: another thread may change it before the product is computed.
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
    """Whether PyTorch may round the factors of float32 products on the CPU (so far oneDNN does so with AMX).

    Asking before every product costs two microseconds. If the answer is yes, the product is made in float64,
    at half the speed.
    """
    if CPU_HAS_ITS_OWN_SETTING:
        return torch.backends.mkldnn.matmul.fp32_precision not in ("ieee", "none")  # type: ignore[attr-defined]
    return torch.get_float32_matmul_precision() == "medium"
