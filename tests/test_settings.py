"""The one declaration of the settings and what every surface makes of it."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import SettingsError
from klora.settings import DEFAULTS, SPECS, Settings, as_text, json_schema

PAIR = {"subject": "cat", "style": "ink"}


def test_order_of_positional_arguments_is_frozen():
    assert list(SPECS) == [
        "enabled", "subject", "style", "subject_weight", "style_weight", "method", "schedule",
        "alpha", "beta", "k_scale", "gamma", "text_encoder", "hires",
    ]  # fmt: skip


def test_a_dict_means_enabled_unless_it_says_no():
    assert Settings.parse_api([PAIR]).enabled
    assert not Settings.parse_api([{**PAIR, "enabled": False}]).enabled
    assert not Settings.parse_api([]).enabled


def test_a_run_without_klora_is_not_refused_for_what_the_controls_hold():
    assert (
        Settings.parse_api([False, "gone", "gone", "x"])
        == Settings.parse_api([{"enabled": False, "alpha": "x"}])
        == Settings()
    )


def test_an_axis_of_the_plot_wins_before_anything_is_checked():
    settings = Settings.parse_api(
        [True, "", "ink", 1, 1, "K-LoRA", "s", "x"], {"subject": "cat", "alpha": "2"}
    )
    assert (settings.subject, settings.alpha) == ("cat", 2)


def test_positional_equals_dict():
    assert Settings.parse_api([True, "cat", "ink", 0.8]) == Settings.parse_api(
        [{**PAIR, "subject_weight": 0.8}]
    )


@pytest.mark.parametrize("args", [[PAIR, {"alpha": 2}], [True, PAIR], [PAIR, "None", PAIR]])
def test_a_dict_that_is_not_the_first_value_is_refused(args):
    with pytest.raises(
        SettingsError, match=r"Value [23] of 'args' is a dict: .* put all names into the first value"
    ) as caught:
        Settings.parse_api(args)
    assert list(caught.value.problems) == ["args"]


def test_too_many_positional_values_are_refused():
    with pytest.raises(SettingsError, match="13 values at most"):
        Settings.parse_api([None] * 14)


def test_all_bad_fields_are_reported_at_once_each_with_a_way_out():
    with pytest.raises(SettingsError) as caught:
        Settings.parse(
            {"alpah": 1, "method": "klora", "beta": "x", "gamma": -1, "enabled": True, "subject": "cat"}
        )
    problems = caught.value.problems
    assert set(problems) == {"alpah", "method", "beta", "gamma", "style"}
    assert "did you mean 'alpha'?" in problems["alpah"]
    assert "did you mean 'K-LoRA'?" in problems["method"]
    assert "auto or a number from -100 to 100" in problems["beta"]
    assert "switch K-LoRA off" in problems["style"]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e400, True, [], {}, "1,5", "x" * 10**6, None]
)
def test_numbers_that_are_none_are_refused_in_a_short_sentence(value):
    with pytest.raises(SettingsError) as caught:
        Settings.parse({"alpha": value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("given", "read"),
    [("auto", "auto"), ("AUTO", "auto"), ("off", "off"), ("0.5", 0.5), (2, 2.0), (None, "auto")],
)
def test_gamma_is_a_word_or_a_number(given, read):
    assert Settings.parse({"gamma": given}).gamma == read


def test_beta_auto_is_the_schedules_own():
    assert Settings(schedule="s").schedule_of_run().beta == 0.5
    assert Settings(schedule="s*").schedule_of_run().beta == 1.3
    assert Settings(schedule="s*", beta=0.5).schedule_of_run().beta == 0.5


def test_a_method_may_be_typed_without_greek():
    assert Settings.parse({"method": "top-k with gamma"}).method == "Top-K with γ"


def test_a_setting_is_known_by_its_former_name_too_and_todays_wins():
    assert Settings.parse({"selector": "Fixed"}).method == "Fixed"
    assert Settings.parse({"method": "Random", "selector": "Fixed"}).method == "Random"
    assert (
        Settings.parse_api([{**PAIR, "selector": "Fixed"}], overrides={"method": "Random"}).method == "Random"
    )


def test_the_declaration_needs_no_torch():
    found = subprocess.run(
        [sys.executable, "-c", "import sys, klora.settings; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert found.stdout.strip() == "False"


numbers = {name: st.floats(*spec.bounds) for name, spec in SPECS.items() if spec.kind == "number"}
values = {
    name: st.one_of(numbers[name], st.sampled_from(spec.choices)) if name in numbers and spec.choices
    else numbers[name] if name in numbers else st.sampled_from(spec.choices)
    for name, spec in SPECS.items() if spec.kind in ("number", "choice")
}  # fmt: skip


@given(st.fixed_dictionaries({}, optional=values))
def test_text_of_any_settings_reads_back_the_same(chosen):
    settings = Settings.parse({"enabled": True, **PAIR, **chosen})
    texts = {name: as_text(name, value) for name, value in settings.changed().items()}
    assert Settings.parse(texts) == settings


def test_schema_lists_every_setting_with_its_default_and_allows_no_other():
    schema = json_schema()
    assert list(schema["properties"]) == list(SPECS)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["gamma"]["default"] == DEFAULTS["gamma"] == "auto"
    assert schema["properties"]["method"]["enum"][0] == "K-LoRA"
