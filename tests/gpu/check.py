"""Checks scoring on this machine's GPU: its numbers under any host's switches, short memory, and speed.

    python tests/gpu/check.py [--device cpu] [--no-times]

Needs torch, numpy and safetensors, and a CUDA GPU whose memory nobody else is using. --device cpu checks the
numbers and the times of the CPU. Ends with 0 if all is right, 1 if something is not, 2 if there is no CUDA
GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "bench")]

import torch  # noqa: E402
from bench_scoring import flux_shapes, sdxl_shapes, write_lora  # noqa: E402
from torch import Tensor  # noqa: E402

from klora.core.lora_file import LoraFile, read_lora  # noqa: E402
from klora.core.methods import FULL  # noqa: E402
from klora.core.plan import make_plan  # noqa: E402
from klora.core.schedule import Schedule  # noqa: E402
from klora.core.scores import PairScores, score_pair  # noqa: E402

Pair = tuple[LoraFile, LoraFile]

EXACT = ("name", "k", "rank_subject", "rank_style", "only")
NEAR = ("subject_score", "style_score", "subject_abs_sum", "style_abs_sum")
TOLERANCE = 1e-5
MIB = 1 << 20
LEFT_MIB = (0, 4, 16, 64, 128, 192, 256, 384, 512)
"""From nothing, through too little for cuBLAS to start, to more than the largest layer needs.

With each of them memory runs out in another place.
"""
MIDWAY = "midway"


class Report:
    """Prints what was checked, and remembers whether all was right."""

    def __init__(self) -> None:
        self.right = True

    def line(self, right: bool, text: str) -> None:
        self.right &= right
        print(f"{'ok   ' if right else 'WRONG'} {text}", flush=True)


def numbers_of(scores: PairScores) -> list[float]:
    return [scores.gamma, *(getattr(layer, name) for layer in scores.layers for name in NEAR)]


def worst(found: list[float], expected: list[float]) -> float:
    """The largest relative difference; infinite where the counts differ or something is not a number."""
    if len(found) != len(expected):
        return float("inf")
    differences = [
        0.0 if a == b else abs(a - b) / abs(b) if b else float("inf")
        for a, b in zip(found, expected, strict=True)
    ]
    return max(difference if difference == difference else float("inf") for difference in differences)


def fault_of(scores: PairScores, known: dict) -> str:
    """What differs from a golden pair's expected.json; empty if nothing does."""
    layers = known["layers"]
    if [[getattr(layer, name) for name in EXACT] for layer in scores.layers] != [
        [layer[name] for name in EXACT] for layer in layers
    ]:
        return "the layers, their ranks or K differ"
    difference = worst(numbers_of(scores), [known["gamma"], *(one[name] for one in layers for name in NEAR)])
    if difference > TOLERANCE:
        return f"a number is off by {difference:.1e}"
    for schedule, selection in known["selection"].items():
        plan = make_plan(scores, steps=known["steps"], schedule=Schedule.named(schedule))
        if (plan.strengths[..., 0] // FULL).tolist() != selection:
            return f"the choices under {schedule} differ"
    return ""


def old_switch(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def new_switch(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


NO_SWITCH = "as torch comes"
SWITCHES: dict[str, Callable[[], object]] = {
    NO_SWITCH: lambda: None,
    "allow_tf32 = True": lambda: old_switch(True),
    'set_float32_matmul_precision("high")': lambda: torch.set_float32_matmul_precision("high"),
    'set_float32_matmul_precision("medium")': lambda: torch.set_float32_matmul_precision("medium"),
    'fp32_precision = "tf32"': lambda: new_switch("tf32"),
}
"""What a host may have set before.

Each runs in a process of its own, because torch refuses to mix its old and new switches.
"""


def switches_here() -> list[str]:
    new = hasattr(torch.backends, "fp32_precision")
    return [name for name in SWITCHES if new or not name.startswith("fp32_precision")]


def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(512, 512, generator=generator), torch.randn(512, 512, generator=generator)


def product(device: torch.device) -> Tensor:
    """A product of float32 matrices whose bits tell in which precision the switches have it done."""
    left, right = (factor.to(device) for factor in factors())
    return (left @ right).cpu()


def error_of(found: Tensor) -> float:
    left, right = (factor.double() for factor in factors())
    exact = left @ right
    return float((found.double() - exact).abs().max() / exact.abs().max())


def has_tf32(device: torch.device) -> bool:
    return (
        device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def check_golden(device: torch.device, switch: str, report: Report) -> None:
    """Score all golden pairs with this switch set; afterwards products are bit for bit the same as before."""
    SWITCHES[switch]()
    before = product(device)
    folders = sorted(path.parent for path in (TESTS / "data" / "golden").glob("*/expected.json"))
    faults = {}
    for folder in folders:
        pair = read_lora(folder / "subject.safetensors"), read_lora(folder / "style.safetensors")
        fault = fault_of(
            score_pair(*pair, device=device), json.loads((folder / "expected.json").read_text("utf-8"))
        )
        if fault:
            faults[folder.name] = fault
    error = error_of(before)
    report.line(
        bool(folders) and not faults,
        f"{len(folders) - len(faults)} of {len(folders)} golden pairs, {switch} (float32 products outside of "
        f"scoring are off by {error:.0e})"
        + "".join(f"\n      {name}: {fault}" for name, fault in faults.items()),
    )
    if not torch.equal(product(device), before):
        report.line(False, f"after scoring, products outside of it differ from those before, {switch}")
    if has_tf32(device) and switch != NO_SWITCH and error < TOLERANCE:
        report.line(False, f"{switch} changed nothing on this GPU, so this shows nothing")


def on_cpu_now() -> bool:
    """Whether scoring has its threads on the CPU at work."""
    return any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


def taken(device: torch.device, left: int) -> list[Tensor]:
    """Tensors that leave `left` bytes of the GPU's memory free, as far as they can be had."""
    torch.cuda.empty_cache()
    held, chunk = [], 1 << 30
    while chunk >= MIB:
        room = torch.cuda.mem_get_info(device.index)[0] - left
        if room < chunk:
            chunk //= 2
            continue
        try:
            held.append(torch.empty(chunk, dtype=torch.uint8, device=device))
        except torch.cuda.OutOfMemoryError:
            chunk //= 2
    return held


def score_short(device: torch.device, pair: Pair, left: str) -> dict:
    """Score while nearly all of the GPU's memory is taken: before the first layer, or in the middle.

    Returns:
        {"numbers": as `numbers_of`, "on_cpu": layers done on the CPU, "layers": in all}.
    """
    counted = {"on_cpu": 0, "layers": 0}
    held = [] if left == MIDWAY else taken(device, int(left) * MIB)

    def progress(done: int, total: int) -> None:
        counted["layers"] = total
        counted["on_cpu"] += on_cpu_now()
        if left == MIDWAY and done == total // 4:
            held.extend(taken(device, 0))

    scores = score_pair(*pair, device=device, progress=progress)
    return {"numbers": numbers_of(scores), **counted}


def check_shortage(device: torch.device, report: Report) -> None:
    """Score two blocks of FLUX with less and less memory.

    Each run has a process of its own, because cuBLAS allocates when it starts.
    """
    shapes = {
        name: shape
        for name, shape in flux_shapes().items()
        if name.startswith(("double_blocks.0.", "single_blocks.0."))
    }
    with full_size_pair(shapes, 16) as pair:
        expected = numbers_of(score_pair(*pair, device=torch.device("cpu")))
        for left in (*map(str, LEFT_MIB), MIDWAY):
            what = "all memory taken midway" if left == MIDWAY else f"{left} MiB of its memory left"
            paths = [str(lora.path) for lora in pair]
            ended = child("--device", str(device), "--short", left, *paths)
            if ended.returncode:
                report.line(False, f"{what}: {(ended.stderr.strip().splitlines() or ['it died'])[-1]}")
                continue
            answer = json.loads(ended.stdout.splitlines()[-1])
            difference = worst(answer["numbers"], expected)
            enough_on_cpu = left not in ("0", MIDWAY) or answer["on_cpu"] > 0
            report.line(
                difference <= TOLERANCE and enough_on_cpu,
                f"{what}: {answer['on_cpu']} of {answer['layers']} layers on the CPU, numbers off by "
                f"{difference:.0e} at most",
            )


def check_times(device: torch.device) -> None:
    """Prints how long full pairs take without a cache, after one that is not counted."""
    for network, shapes in (("SDXL", sdxl_shapes()), ("FLUX", flux_shapes())):
        for rank in (16, 128):
            with full_size_pair(shapes, rank) as pair:
                score_pair(*pair, device=device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                start = time.perf_counter()
                score_pair(*pair, device=device)
                seconds = time.perf_counter() - start
            peak = (
                f", {torch.cuda.max_memory_allocated(device) / MIB:.0f} MiB of the GPU's memory at most"
                if device.type == "cuda"
                else ""
            )
            print(
                f"      {network} rank {rank:3}: {seconds:6.2f} s for a pair of {len(shapes)} layers "
                f"each{peak}"
            )


@contextmanager
def full_size_pair(shapes: dict[str, tuple[int, int]], rank: int) -> Iterator[Pair]:
    """Two random LoRA files of these shapes, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield (
            write_lora(Path(folder, "subject.safetensors"), shapes, rank, seed=1),
            write_lora(Path(folder, "style.safetensors"), shapes, rank, seed=2),
        )


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--no-times", action="store_true", help="leave out the full-size pairs")
    parser.add_argument("--golden", choices=SWITCHES, help=argparse.SUPPRESS)
    parser.add_argument("--short", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA GPU on this machine, so nothing was checked.")
        return 2
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    report = Report()
    if options.golden:
        check_golden(device, options.golden, report)
        return int(not report.right)
    if options.short:
        left, *paths = options.short
        subject, style = (read_lora(Path(path)) for path in paths)
        print(json.dumps(score_short(device, (subject, style), left)))
        return 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}")
    for switch in switches_here():
        ended = child("--device", str(device), "--golden", switch)
        if ended.returncode not in (0, 1) or not ended.stdout:
            report.line(False, f"{switch}: {(ended.stderr.strip().splitlines() or ['it died'])[-1]}")
            continue
        print(ended.stdout, end="", flush=True)
        report.right &= ended.returncode == 0
    if device.type == "cuda":
        check_shortage(device, report)
    if not options.no_times:
        check_times(device)
    print("All is right." if report.right else "Something is WRONG, see above.")
    return int(not report.right)


if __name__ == "__main__":
    sys.exit(main())
