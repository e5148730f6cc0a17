"""Whether an error means that memory ran out: torch has an exception for its own allocator only.

The libraries that it calls raise RuntimeErrors with messages of their own.
"""

from __future__ import annotations

import re

import torch

SIGNS = (
    "outofmemory",
    "outofdevicememory",
    "outofhostmemory",
    "memoryallocation",
    "allocfailed",
    "allocationfailed",
    "statusnotinitialized",
    "statusmemoryerror",
    "allocatememory",
    "notenoughmemory",
)
"""Parts of messages, in lower case without blanks and underscores.

They are from CUDA and HIP ("CUDA error: out of memory", CUDA_ERROR_OUT_OF_MEMORY, hipErrorOutOfMemory,
cudaErrorMemoryAllocation), MPS, Intel (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY), cuBLAS and cuDNN
(CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED, CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED),
rocBLAS (rocblas_status_memory_error), and torch's CPU allocator on Linux and Windows.
CUBLAS_STATUS_NOT_INITIALIZED and CUDNN_STATUS_NOT_INITIALIZED are what these two libraries report if there is
no memory left for their handle."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error from torch says that a GPU or the machine ran out of memory."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    message = re.sub(r"[\s_]", "", str(error)).lower()
    return isinstance(error, RuntimeError) and any(sign in message for sign in SIGNS)
