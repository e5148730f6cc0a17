"""One pass over layers of a LoRA file: the same work on one delta after another, on a GPU or on threads of the CPU.

The process it runs in also generates images, so nothing of torch is left otherwise than it was found.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from klora.core.deltas import Delta
from klora.core.topk import new_buffer

MAX_WORKERS = 8
"""Threads on the CPU by default: the host lives on the same machine."""

Result = TypeVar("Result")
Work = Callable[[str, Delta, Tensor], Result]
"""work(name, delta, buffer) on one layer; `buffer` is the worker's own."""

_matmul_lock = threading.RLock()
_thread_count_lock = threading.Lock()


class OpensDeltas(Protocol):
    """A LoRA file whose deltas can be read, by several threads at once."""

    def open(self) -> AbstractContextManager[Callable[[str], Delta]]: ...


def scoring_device() -> torch.device:
    """CUDA or ROCm if there is one, else the CPU: MPS limits top-k, and the other backends lack it or float64."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def over_layers(
    lora: OpensDeltas,
    names: Sequence[str],
    work: Work[Result],
    *,
    device: torch.device,
    layer_done: Callable[[], object],
    workers: int | None = None,
) -> dict[str, Result]:
    """`work` on each named layer, {name: its result}.

    Args:
        lora: the file.
        names: canonical layer names.
        work: called on `device`; on the CPU from several threads at once.
        device: a GPU that runs out of memory hands the rest to the CPU.
        layer_done: called after each layer on the caller's thread; what it raises ends the pass.
        workers: threads on the CPU; by default one per core, at most `MAX_WORKERS`.
    """
    results: dict[str, Result] = {}

    def keep(name: str, result: Result) -> None:
        results[name] = result
        layer_done()

    with _full_precision_matmul(), lora.open() as delta_of:
        if device.type == "cuda":
            try:
                _on_gpu(delta_of, names, work, device, keep)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
        rest = [name for name in names if name not in results]
        if rest:
            _on_cpu(delta_of, rest, work, workers or _default_workers(), keep)
    return results


def _on_gpu(
    delta_of: Callable[[str], Delta],
    names: Sequence[str],
    work: Work[Result],
    device: torch.device,
    keep: Callable[[str, Result], None],
) -> None:
    buffer = new_buffer(device)
    with torch.autocast(device.type, enabled=False):
        for name in names:
            keep(name, work(name, _moved(delta_of(name), device), buffer))


def _moved(delta: Delta, device: torch.device) -> Delta:
    """The delta with its factors on `device`."""
    values = {field.name: getattr(delta, field.name) for field in fields(delta)}
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
    }
    return replace(delta, **moved)


def _on_cpu(
    delta_of: Callable[[str], Delta],
    names: Sequence[str],
    work: Work[Result],
    workers: int,
    keep: Callable[[str, Result], None],
) -> None:
    """Threads over layers with one torch thread each: torch's own threads wait for each other at every small operation."""
    per_thread = _thread_count_is_per_thread()
    workers = min(workers, len(names)) if per_thread else 1
    all_started = threading.Barrier(workers)
    own = threading.local()

    def enter() -> None:
        try:
            if per_thread:
                _use_one_torch_thread()
            own.buffer = new_buffer(torch.device("cpu"))
        except BaseException:
            all_started.abort()
            raise
        all_started.wait()

    def one(name: str) -> tuple[str, Result]:
        return name, work(name, delta_of(name), own.buffer)

    with ThreadPoolExecutor(workers, initializer=enter) as pool:
        try:
            futures = [pool.submit(one, name) for name in names]
        except BaseException:
            all_started.abort()
            raise
        try:
            for future in as_completed(futures):
                keep(*future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_WORKERS)


def _thread_count_is_per_thread() -> bool:
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def _use_one_torch_thread() -> None:
    """Runs torch on one thread from the calling thread, a new one, and from no other.

    With OpenMP `torch.set_num_threads` holds for the calling thread, and for all that first use torch later: those get back
    what this one found, from a thread that ends at once.
    """
    with _thread_count_lock:
        found = torch.get_num_threads()
        torch.set_num_threads(1)
        restorer = threading.Thread(target=torch.set_num_threads, args=(found,))
        restorer.start()
        restorer.join()


@contextmanager
def _full_precision_matmul() -> Iterator[None]:
    """Keeps TF32 and bfloat16 out of float32 products, then puts the switches back. One pass at a time: they are global.

    torch 2.9 has new switches and refuses to read the old ones where a host has used the new.
    """
    with _matmul_lock:
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(precision)
            return
        backends: Any = torch.backends
        switches = [backends.cuda.matmul, backends.mkldnn.matmul]
        found = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, precision in zip(switches, found, strict=True):
                switch.fp32_precision = precision
