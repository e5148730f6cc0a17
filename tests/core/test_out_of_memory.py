"""What the GPU's libraries say when memory runs out, and what they say when something else is wrong."""

import pytest
import torch

from klora.core.out_of_memory import is_out_of_memory

SHORT = [
    "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 7.79 GiB total capacity; 5.92 GiB already "
    "allocated)",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA driver error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "HIP error: hipErrorOutOfMemory",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "miopenStatusAllocFailed",
    "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB)",
    "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "[enforce fail at alloc_cpu.cpp:83] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4194304 bytes.",
    "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: "
    "you tried to allocate 4194304 bytes.",
]
OTHER = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: device-side assert triggered",
    "CUDA error: misaligned address",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling "
    "`cublasSgemm( handle, opa, opb, m, n, k, &alpha, a, lda, b, ldb, &beta, c, ldc)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "The size of tensor a (640) must match the size of tensor b (1280) at non-singleton dimension 1",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "Cannot copy out of meta tensor; no data!",
]


@pytest.mark.parametrize("message", SHORT)
def test_a_shortage_is_told_by_what_the_library_says(message):
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("whatever"), MemoryError()])
def test_a_shortage_is_told_by_its_type(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("message", OTHER)
def test_another_fault_of_a_gpu_is_no_shortage(message):
    assert not is_out_of_memory(RuntimeError(message))


def test_a_users_file_may_be_called_out_of_memory():
    assert not is_out_of_memory(ValueError("out of memory.safetensors is no LoRA"))
