"""One pass over layers of a LoRA file: the same work on one delta after another, on a GPU or on CPU threads.

The same process generates images, so no torch setting that other threads can see is changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from klora.core.deltas import Delta
from klora.core.out_of_memory import is_out_of_memory
from klora.core.topk import Check, new_buffer, no_check

MAX_WORKERS = 8
"""The most CPU threads used by default, as the WebUI needs the machine too."""

SECONDS_BETWEEN_CHECKS = 0.05

Result = TypeVar("Result")
Work = Callable[[str, Delta, Tensor], Result]
"""work(name, delta, buffer) on one layer; `buffer` is the worker's own."""

_thread_count_lock = threading.Lock()


class OpensDeltas(Protocol):
    """A LoRA file whose deltas can be read, by several threads at once."""

    def open(self) -> AbstractContextManager[Callable[[str], Delta]]: ...


def scoring_device() -> torch.device:
    """CUDA or ROCm if available, else the CPU: MPS limits top-k, and other backends lack it or float64."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def over_layers(
    lora: OpensDeltas,
    names: Sequence[str],
    work: Work[Result],
    *,
    device: torch.device,
    layer_done: Callable[[], object],
    check: Check = no_check,
    workers: int | None = None,
) -> dict[str, Result]:
    """`work` on each named layer, {name: its result}.

    Args:
        lora: the file.
        names: canonical layer names.
        work: called for each layer with its delta on `device`; on the CPU from several threads at once.
        device: where to compute. When a GPU runs out of memory, the CPU does the remaining layers.
        layer_done: called after each layer on the caller's thread; an exception from it ends the pass.
        check: called on the caller's thread before each layer, and every `SECONDS_BETWEEN_CHECKS` while the
            CPU is working. An exception from it ends the pass, but only after the layers being worked on are
            done, unless `work` ends early by itself.
        workers: CPU threads; by default one per core, at most `MAX_WORKERS`.

    Raises:
        LoraFileError: a tensor of the file cannot be read or holds NaN or Inf.
    """
    results: dict[str, Result] = {}

    def keep(name: str, result: Result) -> None:
        results[name] = result
        layer_done()

    with lora.open() as delta_of:
        if device.type == "cuda" and not _on_gpu(delta_of, names, work, device, keep, check):
            torch.cuda.empty_cache()
        rest = [name for name in names if name not in results]
        if rest:
            _on_cpu(delta_of, rest, work, workers or _default_workers(), keep, check)
    return results


def _on_gpu(
    delta_of: Callable[[str], Delta],
    names: Sequence[str],
    work: Work[Result],
    device: torch.device,
    keep: Callable[[str, Result], None],
    check: Check,
) -> bool:
    """Whether the GPU's memory was enough. If not, the results so far are kept."""
    try:
        buffer = new_buffer(device)
        with torch.autocast(device.type, enabled=False):
            for name in names:
                check()
                keep(name, work(name, _moved(delta_of(name), device), buffer))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


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
    check: Check,
) -> None:
    """Several layers at once, one thread each: torch's own threads wait for each other at every operation."""
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

    done: SimpleQueue[Future[tuple[str, Result]]] = SimpleQueue()
    with ThreadPoolExecutor(workers, initializer=enter) as pool:
        try:
            for name in names:
                pool.submit(one, name).add_done_callback(done.put)
        except BaseException:
            all_started.abort()
            raise
        try:
            for _ in names:
                keep(*_next(done, check).result())
        finally:
            pool.shutdown(cancel_futures=True)


def _next(done: SimpleQueue[Future[Result]], check: Check) -> Future[Result]:
    while True:
        check()
        try:
            return done.get(timeout=SECONDS_BETWEEN_CHECKS)
        except Empty:
            pass


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_WORKERS)


def _thread_count_is_per_thread() -> bool:
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def _use_one_torch_thread() -> None:
    """Limits torch to one thread for calls from the current thread, which must be a new one.

    With OpenMP, `torch.set_num_threads` applies to the calling thread and to every thread that first uses
    torch afterwards. A short-lived second thread sets the old number again, so that those others keep it.
    """
    with _thread_count_lock:
        found = torch.get_num_threads()
        torch.set_num_threads(1)
        restorer = threading.Thread(target=torch.set_num_threads, args=(found,))
        restorer.start()
        restorer.join()
