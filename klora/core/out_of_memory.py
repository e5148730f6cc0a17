"""Telling that memory ran out: torch has an exception for its own allocator only, the libraries below it raise RuntimeErrors."""

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
"""In messages without blanks and underscores, lower case: "CUDA error: out of memory", hipErrorOutOfMemory and
CUDA_ERROR_OUT_OF_MEMORY of the drivers; MPS; UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY of Intel's; cudaErrorMemoryAllocation;
CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED and CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, and
CUBLAS_STATUS_NOT_INITIALIZED and CUDNN_STATUS_NOT_INITIALIZED, which these libraries say where they find no memory for their
handle; rocblas_status_memory_error; torch's allocator of the CPU, on Linux and on Windows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    message = re.sub(r"[\s_]", "", str(error)).lower()
    return isinstance(error, RuntimeError) and any(sign in message for sign in SIGNS)
