"""An evaluation as one self-contained HTML file: tables, images, selection maps."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from klora.analysis import analyze
from klora.selection_map import draw_map
from klora.settings import Settings

if TYPE_CHECKING:
    from evaluation.evaluate import Evaluation, EvaluationPair, Variant
    from evaluation.tables import Line

MAPS = 4
"""Pairs whose selection maps are shown."""

STYLE_SHEET = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em }
body { color: #222 } small { color: #777 } img { image-rendering: pixelated; display: block }
table { border-collapse: collapse; margin: 0.6em 0 1.6em }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
.images td { padding: 2px; border: 0; text-align: left }
.scroll { overflow-x: auto } .best { font-weight: 600 }
"""


def write_report(
    path: Path,
    evaluation: Evaluation,
    pairs: Sequence[EvaluationPair],
    variants: Sequence[Variant],
    tables: Mapping[str, Sequence[Line]],
) -> None:
    """Write the report.

    Args:
        tables: {title: table}, as `evaluation.tables.tables` makes them.
    """
    parts = [
        "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>K-LoRA: evaluation</title>",
        f"<style>{STYLE_SHEET}</style>",
        "<h1>K-LoRA: evaluation</h1>", *_conditions(evaluation, pairs), *_tables(tables),
        *_images(evaluation, pairs, variants),
        *_maps(evaluation, pairs),
    ]  # fmt: skip
    path.write_text("\n".join(parts), encoding="utf-8")


def _conditions(evaluation: Evaluation, pairs: Sequence[EvaluationPair]) -> Iterator[str]:
    guidance = "the pipeline's own" if evaluation.guidance is None else f"{evaluation.guidance:g}"
    yield (
        f"<p>{len(pairs)} pairs, {evaluation.seeds} seeds each, {evaluation.steps} steps, "
        f"{evaluation.size[0]} × {evaluation.size[1]} pixels, guidance {guidance}. Brackets: 95 % interval "
        "of the mean by a bootstrap over pairs and their images. <em>both</em> is the harmonic mean of "
        "subject and style, taken image by image; the last column is its difference from the table's first "
        "row with the same pairs and seeds.</p>"
    )


def _tables(tables: Mapping[str, Sequence[Line]]) -> Iterator[str]:
    for title, lines in tables.items():
        names = list(lines[0].columns)
        best = {name: max(line.columns[name].value for line in lines) for name in names}
        yield f"<h2>{html.escape(title)}</h2><div class='scroll'><table>"
        yield "<tr><th></th><th>images</th><th>subject's share</th>"
        yield (
            "".join(f"<th>{html.escape(name)}</th>" for name in names)
            + "<th>both, against the first</th></tr>"
        )
        for line in lines:
            cells = "".join(
                f"<td class='{'best' if mean.value == best[name] else ''}'>{mean.value:.1%} "
                f"<small>[{mean.low:.1%}, {mean.high:.1%}]</small></td>"
                for name, mean in line.columns.items()
            )
            against = (
                f"{line.against.value:+.1%} <small>[{line.against.low:+.1%}, "
                f"{line.against.high:+.1%}]</small>"
                if line.against
                else ""
            )
            own = f"<td>{html.escape(line.label)}</td><td>{line.count}</td><td>{line.share:.0%}</td>"
            yield f"<tr>{own}{cells}<td>{against}</td></tr>"
        yield "</table></div>"


def _images(
    evaluation: Evaluation, pairs: Sequence[EvaluationPair], variants: Sequence[Variant]
) -> Iterator[str]:
    shown = [variant for variant in variants if variant.group == "methods"] or list(variants)
    yield "<h2>Images</h2><p>The first seeds of every pair, after a training image of the subject and one of "
    yield "the style.</p>"
    yield "<div class='scroll'><table class='images'><tr><td></td><td></td>"
    yield "".join(f"<td>{html.escape(variant.label)}</td>" for variant in shown) + "</tr>"
    for pair in pairs:
        references = "".join(_image(_small(image)) for image in pair.references)
        yield f"<tr><td>{html.escape(pair.name)}</td><td style='display: flex'>{references}</td>"
        for variant in shown:
            with Image.open(evaluation.strip(pair.name, variant)) as strip:
                yield f"<td>{_image(strip)}</td>"
        yield "</tr>"
    yield "</table></div>"


def _maps(evaluation: Evaluation, pairs: Sequence[EvaluationPair]) -> Iterator[str]:
    yield "<h2>Selection maps</h2>"
    for pair in pairs[:MAPS]:
        plan = analyze(pair.subject, pair.style, Settings(), steps=evaluation.steps).plan
        yield f"<h3>{html.escape(pair.name)}</h3>" + _image(
            draw_map(plan, pair.subject.stem, pair.style.stem)
        )


def _small(image: Image.Image, side: int = 128) -> Image.Image:
    return image if max(image.size) <= side else image.resize((side, side), Image.Resampling.LANCZOS)


def _image(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return f"<img src='data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}'>"
