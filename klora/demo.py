"""The demonstration: two small models, two LoRA pairs in different dialects, every selector side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from klora.analysis import Analysis, analyze
from klora.core.score_cache import ScoreCache
from klora.core.selectors import SELECTORS
from klora.demo_models import flux_pipeline, sdxl_pipeline, write_kohya, write_peft
from klora.runner import Request, fused_picture
from klora.selection_map import INK, PAPER, draw_map, font, plain
from klora.settings import Settings

STEPS, SIZE = 10, (192, 192)
PROMPT = "a sks dog in the style of xyz"


@dataclass(frozen=True)
class Result:
    """One picture of the demonstration."""

    label: str
    picture: Image.Image
    share: float
    switches: int
    seconds: float


def demo(folder: Path) -> None:
    """Make models and pairs in `folder`, run `analyze` and `generate` for K-LoRA and all baselines, and say where the results are.

    One thread: layers this small gain nothing from more, and lose much on a busy machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    table: list[str] = []
    cache = ScoreCache(folder / "scores")
    models: dict[str, Any] = {"sdxl": sdxl_pipeline(), "flux": flux_pipeline()}
    for base, pipeline in models.items():
        pipeline.set_progress_bar_config(disable=True)
        settings = Settings(schedule="s*" if base == "flux" else "s")
        subject, style = _write_pair(folder, base, pipeline)
        results = [_run(pipeline, subject, style, changed, cache) for changed in _variants(settings)]
        analysis = analyze(subject, style, settings, steps=STEPS, cache=cache)
        draw_map(analysis.plan, subject.stem, style.stem).save(folder / f"{base}_map.png")
        _side_by_side(results).save(folder / f"{base}_pictures.png")
        for result in results:
            result.picture.save(folder / f"{base}_{_file_name(result.label)}.png")
        table += _table(base, analysis, results)
    text = "\n".join(table)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"\nThe models are random, so the pictures show texture: what to compare is that each selector makes its own.\n"
          f"Pictures side by side, selection maps and this table are in {folder.resolve()}")


def _write_pair(folder: Path, base: str, pipeline: Any) -> tuple[Path, Path]:
    """A subject with kohya's keys and a style with PEFT's, of other rank, magnitude and network alpha."""
    subject, style = folder / f"{base}_subject_kohya.safetensors", folder / f"{base}_style_peft.safetensors"
    denoiser = pipeline.unet if base == "sdxl" else pipeline.transformer
    write_kohya(subject, denoiser, base=base, rank=8, network_alpha=4, seed=11, strength=0.8)
    write_peft(style, denoiser, base=base, rank=4, seed=12, strength=1.6)
    return subject, style


def _variants(settings: Settings) -> list[tuple[str, Settings]]:
    """Every selector; K-LoRA once with each schedule."""
    chosen = [(name, replace(settings, selector=name)) for name in SELECTORS if name != "K-LoRA"]
    return [("K-LoRA S", replace(settings, schedule="s")), ("K-LoRA S*", replace(settings, schedule="s*")), *chosen]


def _run(pipeline: Any, subject: Path, style: Path, variant: tuple[str, Settings], cache: ScoreCache) -> Result:
    label, settings = variant
    analysis = analyze(subject, style, settings, steps=STEPS, seed=7, cache=cache)
    start = time.perf_counter()
    picture = fused_picture(pipeline, analysis, settings, Request(PROMPT, seed=7, steps=STEPS, size=SIZE))
    seconds = time.perf_counter() - start
    switches = sum(map(len, analysis.plan.switches()))
    print(f"  {type(pipeline).__name__}: {label}, {seconds:.1f} s", flush=True)
    return Result(label, picture, float(analysis.plan.subject_share.mean()), switches, seconds)


def _side_by_side(results: list[Result], columns: int = 4) -> Image.Image:
    width, height, caption = *SIZE, 26
    rows = -(-len(results) // columns)
    sheet = Image.new("RGB", (columns * (width + 8) + 8, rows * (height + caption + 8) + 8), PAPER)
    for index, result in enumerate(results):
        left, top = 8 + index % columns * (width + 8), 8 + index // columns * (height + caption + 8)
        sheet.paste(result.picture, (left, top + caption))
        ImageDraw.Draw(sheet).text((left, top + 4), plain(result.label), INK, font(15))
    return sheet


def _table(base: str, analysis: Analysis, results: list[Result]) -> list[str]:
    """One row per selector: the subject's share, how many layer switches, how far the picture is from either LoRA alone."""
    alone = {result.label: np.asarray(result.picture, np.float64) for result in results if result.label.endswith("only")}
    lines = ["", f"{base}: {len(analysis.plan.scores.layers)} layers, gamma {analysis.plan.gamma:.4f}, {STEPS} steps, one seed",
             f"{'selector':14}{'subject share':>14}{'switches':>10}{'seconds':>9}{'grey levels from subject only':>31}{'from style only':>17}"]
    for result in results:
        pixels = np.asarray(result.picture, np.float64)
        far = [np.abs(pixels - alone[name]).mean() for name in ("Subject only", "Style only")]
        lines.append(f"{result.label:14}{result.share:14.1%}{result.switches:10}{result.seconds:9.1f}{far[0]:31.1f}{far[1]:17.1f}")
    return lines


def _file_name(label: str) -> str:
    return label.lower().replace("γ", "gamma").replace("*", "star").replace(" ", "_").replace("-", "_")
