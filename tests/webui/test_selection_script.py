"""The page's rule for the methods that compare gives the plans of klora.core bit for bit, ties included.

It also reads the plans that the server sends for all other methods. The tests need Node to run the script.
"""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from klora.core.changes import as_changes
from klora.core.methods import FULL, MAGNITUDES, METHODS, Comparison
from klora.core.plan import make_plan, shares
from klora.core.schedule import SCHEDULES, Schedule
from klora.core.scores import LayerScore, PairScores
from klora.errors import SettingsError
from klora.settings import SPECS, Settings
from klora.webui import preflight

SCRIPT = Path(__file__).parents[2] / "javascript" / "klora_selection.js"
NODE = shutil.which("node")
WRONG = object()
COMPARING = [name for name, method in METHODS.items() if isinstance(method.strengths, Comparison)]

pytestmark = pytest.mark.skipif(not NODE, reason="there is no node to run the page's script with")


def in_node(program, given):
    reading = "const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
    source = f"{SCRIPT.read_text(encoding='utf-8')}\n{reading}\n{program}"
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
    """Layers of random magnitudes, two from only one file, and one that ties with every S(t) at γ 1."""
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


@pytest.mark.usefixtures("shared")
def test_the_plans_agree_for_every_comparing_method_schedule_and_number_of_steps():
    scores = pair()
    grid = [
        {"method": method, "schedule": schedule, "alpha": alpha,
         "beta": SCHEDULES[schedule] if beta is None else beta, "gamma": gamma, "steps": steps, "seed": seed}
        for method, schedule, (alpha, beta), gamma, (steps, seed) in itertools.product(
            COMPARING, SCHEDULES, [(1.5, None), (0, 1), (-2, 2.6), (3.3333333333333335, -0.1), (99.99, -100)],
            ["auto", "off", 1.0, 0.123456789],
            [(20, 0), (1, 7), (15, 4294967295), (30, 2**32 + 5), (7, 1234567890)])
    ]  # fmt: skip
    sent = {
        "pair": {
            "gamma": scores.gamma,
            "layers": {"name": [layer.name for layer in scores.layers]},
            "magnitudes": {one.field: {"ratio": one.ratios(scores).tolist()} for one in MAGNITUDES},
        },
        "grid": grid, **preflight.constants(),
    }  # fmt: skip
    found = in_node(
        """const plans = given.grid.map(one => {
            const s = klora.scheduleValues(one, given.alphaM), gamma = klora.gammaOf(given.pair, one.gamma);
            const rows = klora.compared(given.comparisons[one.method], given.pair, s, gamma, given.levels);
            return {rows: rows.map(row => [...row].join("")), s: [...s], gamma};
        });
        console.log(JSON.stringify(plans));""", sent
    )  # fmt: skip
    for settings, answer in zip(grid, found, strict=True):
        schedule = Schedule.named(settings["schedule"], settings["alpha"], settings["beta"])
        plan = make_plan(
            scores,
            steps=settings["steps"],
            schedule=schedule,
            method=settings["method"],
            gamma=settings["gamma"],
            seed=settings["seed"],
        )
        codes = plan.strengths @ np.array([FULL + 1, 1])
        assert answer["rows"] == ["".join(map(str, row)) for row in codes.tolist()], settings
        assert answer["s"] == schedule.values(settings["steps"]).tolist(), settings
        assert answer["gamma"] == plan.gamma


@pytest.mark.usefixtures("shared")
def test_the_page_knows_the_rule_of_every_method_that_compares_and_of_no_other():
    assert list(preflight.constants()["comparisons"]) == COMPARING
    assert "Random" not in COMPARING


READ = """const rows = klora.rowsOf(given.changes, given.levels);
    console.log(JSON.stringify(rows.map(row => row[0] === klora.NOT_RUN ? null :
        [...row].map(code => [given.levels[code].subject, given.levels[code].style]))));"""


@pytest.mark.usefixtures("shared")
def test_changes_that_the_server_sends_are_read_as_it_wrote_them():
    draw = np.random.default_rng(1)
    levels = draw.integers(0, FULL + 1, (12, 30, 2)).astype(np.int8)
    levels[5:8] = levels[4]
    levels[[0, 6, 11]] = -1
    read = in_node(READ, {"changes": json.loads(json.dumps(as_changes(levels))), **preflight.constants()})
    assert read == [None if (row < 0).any() else (row / FULL).tolist() for row in levels]


@pytest.mark.usefixtures("shared")
def test_shares_of_a_row_are_the_plans_and_a_step_that_did_not_run_has_none():
    levels = np.array(
        [[(2, 0), (1, 2), (2, 2), (0, 0)], [(0, 1), (0, 2), (2, 1), (1, 1)], [(-1, -1)] * 4], np.int8
    )
    found = in_node(
        """const rows = klora.rowsOf(given.changes, given.levels);
        console.log(JSON.stringify([rows.map(row => klora.sharesOf(row, given.levels)),
            klora.subjectShare(rows[0], given.levels, [0, 3]), klora.switchesOf(rows.slice(0, 2), 2)]));""",
        {"changes": as_changes(levels), **preflight.constants()},
    )  # fmt: skip
    by_plan = [
        pytest.approx(dict(zip(("subject", "style"), row, strict=True)))
        for row in shares(levels[:2]).tolist()
    ]
    assert found == [[*by_plan, None], 0.5, [1]]


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
    numbers = preflight.constants()["numbers"]
    read = in_node(
        """const read = (name, text) => klora.readNumber(text, given.numbers[name]) ?? null;
        console.log(JSON.stringify(given.names.map(name => given.texts.map(text => read(name, text)))));""",
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
