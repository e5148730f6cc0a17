"""How long scoring a full-size pair takes, next to the plain way and to the least any exact way must do.

    python tests/bench/bench_scoring.py [--network sdxl|flux] [--rank 16] [--rank-style 16]
                                        [--plain-every N] [--repeat N]

plain: up @ down of the whole layer, abs, torch.topk at K = r·r, with torch's own threads.
floor: up @ down in row blocks, abs and sum, in the threads that ours has.
ours: `score_pair` without a cache.
All three read the same files, raise them to float32 and take both LoRAs. They run in turns, and a ratio is
the median of the ratios of the turns.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from klora.core.deltas import LowRank
from klora.core.families.flux import flux_modules
from klora.core.families.sdxl import sdxl_modules
from klora.core.layer_pass import over_layers
from klora.core.lora_file import LoraFile, read_lora
from klora.core.score_cache import ScoreCache
from klora.core.scores import score_pair
from klora.core.topk import BLOCK_NUMEL

Pair = tuple[LoraFile, LoraFile]
FLUX_ROWS = {".qkv": 3, "mlp.0": 4, "mod.lin": 6, "linear1": 7, "modulation.lin": 3}
FLUX_COLUMNS = {"mlp.2": 4, "linear2": 5}
PLAIN_EVERY = {"sdxl": 1, "flux": 20}


def sdxl_shapes() -> dict[str, tuple[int, int]]:
    """The 560 attention layers of SDXL's UNet, {native name: (rows, columns)}."""
    shapes = {}
    for module in sdxl_modules():
        if ".attn" in module.native:
            width = 640 if re.match(r"input_blocks\.[45]\.|output_blocks\.[345]\.", module.native) else 1280
            shapes[module.native] = (width, 2048 if re.search(r"attn2\.to_[kv]$", module.native) else width)
    return shapes


def flux_shapes() -> dict[str, tuple[int, int]]:
    """The 304 fused matrices in FLUX.1's blocks, {native name: (rows, columns)}."""

    def times(table: dict[str, int], name: str) -> int:
        return next((factor for end, factor in table.items() if name.endswith(end)), 1)

    names = [m.native for m in flux_modules() if "_blocks." in m.native and m.kind == "linear"]
    return {name: (3072 * times(FLUX_ROWS, name), 3072 * times(FLUX_COLUMNS, name)) for name in names}


def write_lora(path: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> LoraFile:
    """A random kohya file in fp16."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (rows, columns) in shapes.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_up.weight"] = torch.randn(rows, rank, generator=random).mul_(0.02).half()
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, columns, generator=random).mul_(0.05).half()
        tensors[f"{key}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)
    return read_lora(path)


def plain(pair: Pair, k: int, every: int) -> None:
    for lora in pair:
        with lora.open() as delta_of:
            for name in list(lora.layers)[::every]:
                delta = low_rank(delta_of(name))
                values = (delta.left @ delta.right).mul_(delta.scale).abs_()
                values.flatten().topk(min(k, values.numel())).values.sum()


def floor(pair: Pair) -> None:
    def work(_name: str, delta: object, buffer: Tensor) -> float:
        delta = low_rank(delta)
        columns = delta.right.shape[1]
        total = 0.0
        for part in delta.left.split(max(1, BLOCK_NUMEL // columns)):
            block = buffer[: part.shape[0] * columns]
            torch.mm(part, delta.right, out=block.view(-1, columns))
            total += float(block.abs_().sum())
        return total

    for lora in pair:
        over_layers(lora, list(lora.layers), work, device=torch.device("cpu"), layer_done=lambda: None)


def low_rank(delta: object) -> LowRank:
    assert isinstance(delta, LowRank)
    return delta


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(pair: Pair, k: int, every: int, repeat: int) -> None:
    """Prints the three ways and their ratios."""
    numels = [info.shape[0] * info.shape[1] for info in pair[0].layers.values()]
    share = sum(numels[::every]) / sum(numels)
    ways = {
        "plain": lambda: plain(pair, k, every),
        "floor": lambda: floor(pair),
        "ours": lambda: score_pair(*pair),
    }
    turns = []
    for _ in range(repeat):
        turn = {name: seconds(way) for name, way in ways.items()}
        turn["plain"] /= share
        turns.append(turn)
    how = (
        "whole"
        if every == 1
        else f"measured on every {every}th layer ({share:.1%} of the elements) and scaled"
    )
    notes = {"plain": f" ({how}; {torch.get_num_threads()} torch threads)"}
    for name in ways:
        print(f"{name:6} {statistics.median(turn[name] for turn in turns):8.2f} s{notes.get(name, '')}")
    for above, below in (("plain", "ours"), ("ours", "floor")):
        ratios = sorted(turn[above] / turn[below] for turn in turns)
        print(
            f"{above} / {below} {statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f} in "
            f"{repeat} turns)"
        )


def compare_cached(pair: Pair, folder: Path) -> None:
    """Prints the time of a first pairing, which fills the cache, and of a second, which reads it."""
    first = seconds(lambda: score_pair(*pair, cache=ScoreCache(folder)))
    second = statistics.median(seconds(lambda: score_pair(*pair, cache=ScoreCache(folder))) for _ in range(9))
    entries = [path.stat().st_size for path in folder.glob("*.profile")]
    print(
        f"first pairing with a cache {first * 1e3:.0f} ms, from the cache {second * 1e3:.1f} ms, at most "
        f"{max(entries) / 1024:.0f} KiB a file"
    )


def status(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    return int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def peak_memory(paths: list[Path]) -> None:
    """Prints the MiB that `score_pair` needs in this process, without and with the files' mapped pages."""
    tiny = write_lora(
        paths[0].with_name("tiny.safetensors"),
        {"middle_block.1.transformer_blocks.0.attn1.to_q": (1280, 1280)},
        4,
        seed=9,
    )
    score_pair(tiny, tiny)
    pair = read_lora(paths[0]), read_lora(paths[1])
    Path("/proc/self/clear_refs").write_text("5")
    own_before, all_before = status("RssAnon"), status("VmRSS")
    done = threading.Event()
    own_peak = own_before

    def watch() -> None:
        nonlocal own_peak
        while not done.wait(0.001):
            own_peak = max(own_peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    score_pair(*pair)
    done.set()
    watcher.join()
    print(json.dumps([own_peak - own_before, status("VmHWM") - all_before]))


def compare_memory(pair: Pair) -> None:
    """Prints the peak memory of a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        print("peak memory: measured on Linux only")
        return
    command = [sys.executable, __file__, "--peak-memory", *(str(lora.path) for lora in pair)]
    own, everything = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"peak memory above the files {own:.0f} MiB (RssAnon read every ms, less what it was before the "
        f"call), {everything:.0f} MiB with the mapped pages of the files (VmHWM, reset before the call)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=("sdxl", "flux"), default="sdxl")
    parser.add_argument("--rank", type=int, default=16, help="of the subject")
    parser.add_argument("--rank-style", type=int, default=16)
    parser.add_argument(
        "--plain-every",
        type=int,
        help="the plain way takes every Nth layer only, 1 on SDXL and 20 on FLUX if not given",
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peak-memory", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        peak_memory(options.peak_memory)
        return
    shapes = sdxl_shapes() if options.network == "sdxl" else flux_shapes()
    with tempfile.TemporaryDirectory() as folder:
        subject = write_lora(Path(folder, "subject.safetensors"), shapes, options.rank, seed=1)
        style = write_lora(Path(folder, "style.safetensors"), shapes, options.rank_style, seed=2)
        numel = sum(rows * columns for rows, columns in shapes.values())
        print(
            f"{options.network} rank {options.rank}/{options.rank_style}: {len(shapes)} matrices, "
            f"{len(subject.layers)} layers, {numel / 1e9:.3f} G elements a LoRA, fp16 files"
        )
        every = options.plain_every or PLAIN_EVERY[options.network]
        compare((subject, style), options.rank * options.rank_style, every, options.repeat)
        compare_cached((subject, style), Path(folder, "cache"))
        compare_memory((subject, style))


if __name__ == "__main__":
    main()
