"""The shipped miniature: its size, and that fusion on it stays as good as it was measured."""

import numpy as np

from evaluation import evaluate
from evaluation.miniature import shipped

LOW, HIGH = 0.09, 0.16
"""Mean of `both` on this slice when it was shipped (torch 2.13, CPU): 0.121.

Direct merge had 0.200, style only 0.182, subject only 0.000.
"""


def test_the_miniature_with_its_loras_and_measures_is_at_most_12_megabytes():
    assert sum(path.stat().st_size for path in shipped.FOLDER.rglob("*") if path.is_file()) <= 12_000_000


def test_k_lora_fuses_as_well_as_it_was_measured(tmp_path):
    run = evaluate.Evaluation(
        shipped.load_model(),
        tmp_path,
        steps=15,
        seeds=4,
        size=shipped.SIZE,
        guidance=shipped.GUIDANCE,
        batch=4,
        made_of="",
    )
    run.run(evaluate.miniature_pairs(3), [evaluate.Variant("methods", "K-LoRA S")], lambda _line: None)
    assert LOW < np.mean([row.both for row in run.rows]) < HIGH
