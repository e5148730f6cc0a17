"""The page's own selection rule gives the plan of klora.core bit for bit, ties included. Needs Node, as a browser would."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from klora.core.selectors import SELECTORS

from klora.core.plan import make_plan
from klora.core.schedule import ALPHA_M, SCHEDULES, Schedule
from klora.core.scores import LayerScore, PairScores
from klora.errors import SettingsError
from klora.settings import SPECS, Settings
from klora.webui import card

SCRIPT = Path(__file__).parents[2] / "javascript" / "klora_selection.js"
NODE = shutil.which("node")
WRONG = object()
FIELDS = ("name", "only", "subject_score", "style_score", "subject_frobenius", "style_frobenius")

pytestmark = pytest.mark.skipif(not NODE, reason="there is no node to run the page's script with")


def in_node(program, given):
    source = f"{SCRIPT.read_text(encoding='utf-8')}\nconst given = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n{program}"
    done = subprocess.run(
        [NODE, "-e", source],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pair(layers=40):
    """Layers of random magnitudes, two of one file only, and one that is a tie at every S of the schedule S at γ 1."""
    draw = np.random.default_rng(0)
    numbers = draw.lognormal(0, 0.7, (layers, 4))
    ties = {i: (s, 1.0, s, 1.0) for i, s in enumerate(np.round(1.5 * np.arange(20) / 20 + 0.5, 12).tolist())}
    rows = [ties.get(i, numbers[i].tolist()) for i in range(layers)]
    only = {layers - 1: "style", layers - 2: "subject"}
    scores = tuple(
        LayerScore(f"input_blocks.4.1.{i:03}", 8, 4, 4, row[0], row[1], 1.0, 1.0, row[2], row[3], only.get(i))
        for i, row in enumerate(rows)
    )
    return PairScores(scores, 0.9371)


def test_every_selector_schedule_and_number_of_steps():
    scores = pair()
    grid = [
        {"selector": selector, "schedule": schedule, "alpha": alpha, "beta": SCHEDULES[schedule] if beta is None else beta, "gamma": gamma,
         "steps": steps, "seed": seed}
        for selector, schedule, (alpha, beta), gamma, (steps, seed) in itertools.product(
            SELECTORS, SCHEDULES, [(1.5, None), (0, 1), (-2, 2.6), (3.3333333333333335, -0.1), (99.99, -100)], ["auto", "off", 1.0, 0.123456789],
            [(20, 0), (1, 7), (15, 4294967295), (30, 2**32 + 5), (7, 1234567890)])
    ]  # fmt: skip
    sent = {
        "pair": {"gamma": scores.gamma, "layers": {name: [getattr(layer, name) for layer in scores.layers] for name in FIELDS}},
        "grid": grid, "alphaM": ALPHA_M,
    }  # fmt: skip
    found = in_node(
        """const plans = given.grid.map(settings => klora.makePlan(given.pair, settings, given.alphaM));
        console.log(JSON.stringify(plans.map(({rows, s, gamma}) => ({rows: rows.map(row => row.join("")), s: [...s], gamma}))));""", sent
    )  # fmt: skip
    for settings, answer in zip(grid, found, strict=True):
        schedule = Schedule.named(settings["schedule"], settings["alpha"], settings["beta"])
        plan = make_plan(
            scores,
            steps=settings["steps"],
            schedule=schedule,
            selector=settings["selector"],
            gamma=settings["gamma"],
            seed=settings["seed"],
        )
        assert answer["rows"] == ["".join(map(str, row)) for row in plan.selection.tolist()], settings
        assert answer["s"] == schedule.values(settings["steps"]).tolist(), settings
        assert answer["gamma"] == plan.gamma


def test_the_page_has_every_selector():
    assert in_node("console.log(JSON.stringify(Object.keys(klora.SELECTORS)));", None) == list(SELECTORS)


def test_recorded_digits_are_the_choices_and_a_step_that_did_not_run_has_no_share():
    answer = in_node(
        """const rows = klora.recordedRows(given, 3);
        console.log(JSON.stringify([rows.map(row => [...row]), rows.map(row => klora.subjectShare(row)), klora.switchesOf(rows, 0)]));""",
        {"rows": ["102", "002", None]},
    )
    assert answer == [[[1, 0, 2], [0, 0, 2], [3, 3, 3]], [0.5, 0.5 / 3, None], [1, 2]]


@pytest.mark.usefixtures("shared")
def test_numbers_are_read_as_the_settings_read_them():
    texts = [
        "1.5",
        " 2 ",
        ".5",
        "-0.5",
        "1e2",
        "1e-3",
        "AUTO",
        "off",
        "",
        "x",
        "101",
        "-1e9",
        "1,5",
        "0x10",
        "1_0",
        "٣",
        "inf",
        "1e999",
        "--1",
    ]
    numbers = card.constants()["numbers"]
    read = in_node(
        "console.log(JSON.stringify(given.names.map(name => given.texts.map(text => klora.readNumber(text, given.numbers[name]) ?? null))));",
        {"names": list(numbers), "texts": texts, "numbers": numbers},
    )
    for name, answers in zip(numbers, read, strict=True):
        for text, answer in zip(texts, answers, strict=True):
            try:
                expected = getattr(Settings.parse({name: text}), name)
            except SettingsError:
                expected = WRONG
            if answer is None:
                assert expected is WRONG or text in ("1_0", "٣"), (name, text)
            else:
                assert (None if answer == "auto" and expected is None else answer) == expected, (name, text)
    assert numbers.keys() == {name for name, spec in SPECS.items() if spec.kind == "number"}
