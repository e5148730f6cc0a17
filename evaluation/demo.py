"""The demonstration: pairs of the miniature under every method side by side, measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from evaluation.evaluate import Evaluation, EvaluationPair, Variant, miniature_pairs, variants
from evaluation.miniature import shipped
from evaluation.report import write_report
from evaluation.tables import as_text, tables
from klora.analysis import analyze
from klora.lettering import Pen
from klora.selection_map import INK, PAPER, draw_map
from klora.settings import Settings

METHODS = (
    "Subject only",
    "Style only",
    "Direct merge",
    "K-LoRA S",
    "K-LoRA S*",
    "Fixed",
    "Random",
    "LoRA Switch",
)
PAIRS, SEEDS, STEPS = 4, 4, 20
CELL, CAPTION = 96, 22


def demo(folder: Path) -> None:
    """Make and measure images of some pairs, and print where the results are.

    Raises:
        HostError: the miniature is missing.
    """
    start = time.perf_counter()
    shutil.rmtree(folder / "rows", ignore_errors=True)
    pairs = miniature_pairs(PAIRS)
    evaluation = Evaluation(
        shipped.load_model(), folder / "rows", steps=STEPS, seeds=SEEDS, size=shipped.SIZE,
        guidance=shipped.GUIDANCE, batch=SEEDS, made_of=shipped.fingerprint(),
    )  # fmt: skip
    of = {variant.label: variant for variant in variants(["methods"])}
    methods = [of[label] for label in METHODS]
    evaluation.run(pairs, methods, lambda line: print(f"  {line}", flush=True))
    for pair in pairs:
        name = pair.name.replace(" ", "_")
        side_by_side(evaluation, pair, methods).save(folder / f"{name}_images.png")
        for schedule, word in (("s", "s"), ("s*", "sstar")):
            plan = analyze(pair.subject, pair.style, Settings(schedule=schedule), steps=STEPS).plan
            draw_map(plan, pair.subject.stem, pair.style.stem).save(folder / f"{name}_map_{word}.png")
    found = tables(evaluation.rows, ["methods"])
    text = "\n\n".join(as_text(lines) for lines in found.values())
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    write_report(folder / "report.html", evaluation, pairs, methods, found)
    print(
        f"\n{text}\n\nMeans with 95 % intervals over {PAIRS} pairs with {SEEDS} images each; 'both' is the "
        f"harmonic mean of subject and style.\n{time.perf_counter() - start:.0f} s. Images side by side, "
        f"selection maps and report.html are in {folder.resolve()}"
    )


def side_by_side(evaluation: Evaluation, pair: EvaluationPair, methods: Sequence[Variant]) -> Image.Image:
    """A row of images for each method, beside a training image of the subject and one of the style."""
    strips = [Image.open(evaluation.strip(pair.name, method)) for method in methods]
    count = strips[0].width // strips[0].height
    columns = -(-len(methods) // 4)
    width, height = columns * (count * CELL + 16) + 16 + CELL, 4 * (CELL + CAPTION) + 16
    sheet, pen = Image.new("RGB", (width, height), PAPER), Pen()
    for row, (word, image) in enumerate(zip(("subject", "style"), pair.references, strict=True)):
        top = 8 + row * (CELL + CAPTION)
        pen.write(sheet, 8, top + CAPTION // 2, word, 13, INK)
        sheet.paste(image.resize((CELL, CELL), Image.Resampling.NEAREST), (8, top + CAPTION))
    for index, (method, strip) in enumerate(zip(methods, strips, strict=True)):
        left, top = 24 + CELL + index // 4 * (count * CELL + 16), 8 + index % 4 * (CELL + CAPTION)
        pen.write(sheet, left, top + CAPTION // 2, method.label, 13, INK)
        sheet.paste(strip.resize((count * CELL, CELL), Image.Resampling.NEAREST), (left, top + CAPTION))
    return sheet
