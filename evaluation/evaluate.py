"""`python -m klora evaluate`: images of many pairs and seeds by every method and setting, measured.

The results are tables and an HTML report.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation.image_metrics import Metric, clip_similarity, dino_similarity, gram
from evaluation.miniature import shipped
from evaluation.tables import GROUPS, Row, as_text, tables
from klora.analysis import analyze
from klora.core.lora_file import read_lora
from klora.core.methods import METHODS, STYLE, SUBJECT, everywhere
from klora.core.plan import Plan
from klora.core.score_cache import ScoreCache
from klora.errors import KLoraError
from klora.runner import Request, fused_images, load_pipeline, own_size
from klora.settings import Settings

K_SCALES = (1.0, 0.125, 0.5, 2.0, 8.0, 64.0)
ALPHAS, BETAS = (1.5, 1.0, 2.0), (0.5, 0.25, 0.75)
"""The grid of the paper's supplement F; the values that the others are compared with come first."""
SHARES = (0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class EvaluationPair:
    """A pair to fuse, and how to measure the result.

    Attributes:
        prompt: contains the trigger words of both LoRAs.
        weights: of the subject and the style.
        metrics: {name: metric}; "subject" and "style" are always there.
        references: training images of subject and style, for the report.
    """

    name: str
    subject: Path
    style: Path
    prompt: str
    weights: tuple[float, float]
    metrics: Mapping[str, Metric]
    references: tuple[Image.Image, Image.Image]


@dataclass(frozen=True)
class Variant:
    """One way to fuse.

    Attributes:
        changed: (plan, seed) -> plan, for what no method does by itself.
        single: whether each seed has a plan of its own; otherwise one plan is used for all.
    """

    group: str
    label: str
    settings: Settings = field(default_factory=Settings)
    changed: Callable[[Plan, int], Plan] | None = None
    single: bool = False


def variants(groups: Sequence[str]) -> list[Variant]:
    """What each table compares, in the order of its rows."""
    return [variant for variant in _all_variants() if variant.group in groups]


def _all_variants() -> Iterator[Variant]:
    yield Variant("methods", "K-LoRA S")
    yield Variant("methods", "K-LoRA S*", Settings(schedule="s*"))
    for name, known in METHODS.items():
        if name != "K-LoRA":
            yield Variant("methods", name, Settings(method=name), single=known.seeded)
    for scale in K_SCALES:
        yield Variant("k-scale", f"K × {scale:g}", Settings(k_scale=scale))
    for beta in BETAS:
        for alpha in ALPHAS:
            yield Variant("alpha-beta", f"α {alpha:g}, β {beta:g}", Settings(alpha=alpha, beta=beta))
    for method in ("K-LoRA", "Frobenius"):
        yield Variant("gamma", f"{method}, γ auto", Settings(method=method))
        yield Variant("gamma", f"{method}, γ off", Settings(method=method, gamma="off"))
    yield Variant("order", "subject, then style", changed=partial(_halves, first=SUBJECT))
    yield Variant("order", "style, then subject", changed=partial(_halves, first=STYLE))
    for role, absent in (("subject", "style"), ("style", "subject")):
        alone = Settings(**{f"{absent}_weight": 0.0}, text_encoder=role)  # type: ignore[arg-type]
        own, other = (SUBJECT, STYLE) if role == "subject" else (STYLE, SUBJECT)
        group = f"{role}-alone"
        yield Variant(group, "all steps and layers", alone, partial(_share, own=own, share=1.0))
        yield Variant(group, "first half of the steps", alone, partial(_halves, first=own))
        yield Variant(group, "second half of the steps", alone, partial(_halves, first=other))
        for share in SHARES:
            yield Variant(
                group, f"{share:.0%} of the layers", alone, partial(_share, own=own, share=share), single=True
            )


def _halves(plan: Plan, _seed: int, *, first: tuple[int, int]) -> Plan:
    second = STYLE if first == SUBJECT else SUBJECT
    strengths = everywhere(plan.strengths.shape[:2], second)
    strengths[np.arange(plan.steps) < plan.steps / 2] = first
    return replace(plan, strengths=strengths)


def _share(plan: Plan, seed: int, *, own: tuple[int, int], share: float) -> Plan:
    """`own` on a random share of the layers, drawn anew at each step.

    The other LoRA has the rest of the layers, at weight 0, so nothing is applied there.
    """
    strengths = everywhere(plan.strengths.shape[:2], STYLE if own == SUBJECT else SUBJECT)
    strengths[np.random.RandomState(seed % 2**32).random_sample(strengths.shape[:2]) < share] = own
    return replace(plan, strengths=strengths)


class Evaluation:
    """Makes and measures images, and keeps the results in a folder so that it can continue after a stop.

    Attributes:
        rows: everything measured so far.
    Args:
        batch: images made at once.
        made_of: identifies the model and the LoRAs, so that an evaluation of others is not continued.

    Raises:
        KLoraError: the folder holds an evaluation under other conditions.
    """

    def __init__(
        self,
        pipeline: Any,
        folder: Path,
        *,
        steps: int,
        seeds: int,
        size: tuple[int, int],
        guidance: float | None,
        batch: int,
        made_of: str,
    ) -> None:
        self.pipeline, self.folder = pipeline, folder
        self.steps, self.seeds, self.size, self.guidance, self.batch = steps, seeds, size, guidance, batch
        self.rows: list[Row] = []
        self._file = folder / "rows.jsonl"
        self._conditions = {
            "steps": steps,
            "seeds": seeds,
            "size": list(size),
            "guidance": guidance,
            "made of": made_of,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._cache = ScoreCache(folder / "scores")
        self._read()

    def _read(self) -> None:
        if not self._file.exists():
            return
        first, *lines = self._file.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != self._conditions:
            raise KLoraError(
                f"{self._file} holds an evaluation of {first}, not of {json.dumps(self._conditions)}: choose "
                "another --out."
            )
        self.rows = [Row(**json.loads(line)) for line in lines]

    def run(
        self, pairs: Sequence[EvaluationPair], wanted: Sequence[Variant], say: Callable[[str], None]
    ) -> None:
        """Measure all variants of all pairs, except those that have been measured before."""
        done = {(row.group, row.variant, row.pair) for row in self.rows}
        left = [
            (pair, variant)
            for pair in pairs
            for variant in wanted
            if (variant.group, variant.label, pair.name) not in done
        ]
        for number, (pair, variant) in enumerate(left, 1):
            rows, images = self._measured(pair, variant)
            self._keep(rows)
            strip = _strip(images[:4])
            strip.save(self.folder / f"{_file_name(pair.name, variant)}.png", optimize=True)
            say(
                f"{number} of {len(left)}: {pair.name}, {variant.label}: "
                f"{np.mean([row.both for row in rows]):.1%}"
            )

    def strip(self, pair: str, variant: Variant) -> Path:
        """The first images of a pair under a variant, in a row."""
        return self.folder / f"{_file_name(pair, variant)}.png"

    def _measured(self, pair: EvaluationPair, variant: Variant) -> tuple[list[Row], list[Image.Image]]:
        settings = replace(
            variant.settings, subject_weight=pair.weights[0] * variant.settings.subject_weight,
            style_weight=pair.weights[1] * variant.settings.style_weight,
        )  # fmt: skip
        size = 1 if variant.single else min(self.batch, self.seeds)
        rows, images = [], []
        for first in range(0, self.seeds, size):
            count = min(size, self.seeds - first)
            # A pair's own seeds: otherwise chance would draw the same layers in every pair.
            seed = first + 1000 * (sum(pair.name.encode()) % 997)
            analysis = analyze(
                pair.subject, pair.style, settings, steps=self.steps, seed=seed, cache=self._cache
            )
            plan = variant.changed(analysis.plan, seed) if variant.changed else analysis.plan
            request = Request(pair.prompt, seed, self.steps, self.size, guidance=self.guidance)
            made = fused_images(self.pipeline, replace(analysis, plan=plan), settings, request, count)
            values = {name: metric(made) for name, metric in pair.metrics.items()}
            share = float(plan.subject_share.mean())
            rows += [
                Row(
                    variant.group,
                    variant.label,
                    pair.name,
                    seed + i,
                    plan.scores.gamma,
                    share,
                    {name: float(v[i]) for name, v in values.items()},
                )
                for i in range(count)
            ]
            images += made
        return rows, images

    def _keep(self, rows: list[Row]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps(self._conditions) + "\n")
            file.writelines(json.dumps(row.__dict__) + "\n" for row in rows)
        self.rows += rows


def _file_name(pair: str, variant: Variant) -> str:
    word = "".join(
        c if c.isalnum() else {"*": "star", "γ": "gamma"}.get(c, "_")
        for c in f"{variant.group} {variant.label}"
    )
    return f"{pair.replace(' ', '_')}-{word}".replace("α", "alpha").replace("β", "beta").replace("γ", "gamma")


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width
    return strip


def miniature_pairs(count: int | None = None) -> list[EvaluationPair]:
    """All pairs of the miniature, or the first `count`, in an order that uses all LoRAs early."""
    subjects, styles = shipped.loras("subject"), shipped.loras("style")
    order = sorted(
        ((i, j) for i in range(len(subjects)) for j in range(len(styles))),
        key=lambda place: ((place[1] - place[0]) % len(styles), place),
    )
    found = []
    for i, j in order[:count]:
        subject, style = subjects[i], styles[j]
        found.append(EvaluationPair(
            f"{subject.name.removeprefix('subject_')} {style.name.removeprefix('style_')}", subject.path,
            style.path,
            f"{subject.words} {style.words}", (subject.weight, style.weight),
            shipped.metrics(subject, style),
            (subject.images()[0], style.images()[0]),
        ))  # fmt: skip
    return found


def own_pair(options: argparse.Namespace) -> EvaluationPair:
    """The user's own pair, measured with CLIP and, if there is a model, DINO.

    Raises:
        KLoraError: an option or a file that this needs is missing.
    """
    needed = ("subject", "style", "prompt", "subject_images", "style_images", "clip")
    missing = ["--" + name.replace("_", "-") for name in needed if not getattr(options, name)]
    if missing:
        raise KLoraError(f"With --model an evaluation also needs {', '.join(missing)}.")
    things, styles = _images(options.subject_images), _images(options.style_images)
    metrics: dict[str, Metric] = {
        "subject": clip_similarity(options.clip, things),
        "style": clip_similarity(options.clip, styles),
    }
    if options.dino:
        metrics["subject (DINO)"] = dino_similarity(options.dino, things)
    metrics["style (Gram)"] = gram(styles)
    subject, style = Path(options.subject), Path(options.style)
    weights = options.subject_weight, options.style_weight
    return EvaluationPair(
        f"{subject.stem} {style.stem}",
        subject,
        style,
        options.prompt,
        weights,
        metrics,
        (things[0], styles[0]),
    )


def _images(folder: Path) -> list[Image.Image]:
    try:
        found = [
            Image.open(path).convert("RGB")
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
        ]
    except OSError as error:
        raise KLoraError(f"Cannot read the images in {folder}: {error}. Choose another folder.") from error
    if not found:
        raise KLoraError(f"There is no image (.png, .jpg or .webp) in {folder}: choose another folder.")
    return found


def evaluate(options: argparse.Namespace) -> None:
    """The command.

    Raises:
        KLoraError: with the sentence for the user.
    """
    from evaluation.report import write_report

    groups = options.tables or list(GROUPS)
    if options.model:
        pairs = [own_pair(options)]
        pipeline = load_pipeline(options.model, read_lora(pairs[0].subject).family, options.config)
        pipeline.set_progress_bar_config(disable=True)
        size, guidance, batch = options.size or own_size(pipeline), options.guidance, 1
        made_of = f"{options.model} {pairs[0].name}"
    else:
        pairs, pipeline = miniature_pairs(options.pairs), shipped.load_model()
        size, guidance, batch = shipped.SIZE, options.guidance or shipped.GUIDANCE, 10
        made_of = shipped.fingerprint()
    evaluation = Evaluation(
        pipeline,
        options.out,
        steps=options.steps,
        seeds=options.seeds,
        size=size,
        guidance=guidance,
        batch=batch,
        made_of=made_of,
    )
    wanted = variants(groups)
    evaluation.run(pairs, wanted, lambda line: print(line, flush=True))
    found = tables([row for row in evaluation.rows if row.pair in {pair.name for pair in pairs}], groups)
    for title, lines in found.items():
        print(f"\n{title}\n{as_text(lines)}")
    write_report(options.out / "report.html", evaluation, pairs, wanted, found)
    print(f"\nwrote {options.out / 'report.html'}")
