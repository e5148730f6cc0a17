"""The axes of the X/Y/Z plot: added once, checked before the first image, collected on the image's object."""

import sys
from collections import namedtuple
from copy import copy
from types import SimpleNamespace

import pytest
from webui_host import NetworkOnDisk, module

from klora.settings import SPECS, Settings
from klora.webui import xyz

ScriptData = namedtuple("ScriptData", "script_class path basedir module")


class AxisOption:
    def __init__(
        self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None
    ):
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})


def new_plot():
    return module("xyz_grid.py", AxisOption=AxisOption, axis_options=[AxisOption("Nothing", str, None)])


@pytest.fixture
def plot(monkeypatch, shared, networks):
    networks.put(NetworkOnDisk("dog"), NetworkOnDisk("ink", alias="ink_style"))
    made = new_plot()
    scripts = module(
        "modules.scripts",
        scripts_data=[
            ScriptData(None, "/webui/scripts/loopback.py", "", module("loopback.py")),
            ScriptData(None, "/webui/scripts/xyz_grid.py", "", made),
        ],
    )
    monkeypatch.setitem(sys.modules, "modules.scripts", scripts)
    monkeypatch.setattr(sys.modules["modules"], "scripts", scripts, raising=False)
    xyz.register()
    return made


@pytest.fixture
def axis(plot):
    return {option.label.removeprefix("[K-LoRA] "): option for option in plot.axis_options}


def processing(*args):
    script = SimpleNamespace(title=lambda: "K-LoRA", args_from=1, args_to=1 + len(SPECS))
    return SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[script]), script_args=[0, *args])


ON = processing(True)


def test_the_axes_of_the_issue_are_there_once(plot):
    xyz.register()
    assert [option.label for option in plot.axis_options] == ["Nothing"] + [
        f"[K-LoRA] {name}"
        for name in (
            "Subject",
            "Style",
            "Subject weight",
            "Style weight",
            "Method",
            "Schedule",
            "α",
            "β",
            "K scale",
            "γ",
            "Text encoder",
            "Hires",
        )
    ]


def test_a_plot_that_is_loaded_again_gets_them_again(plot, monkeypatch):
    anew = new_plot()
    monkeypatch.setattr(
        sys.modules["modules.scripts"], "scripts_data", [ScriptData(None, "scripts/xyz_grid.py", "", anew)]
    )
    xyz.register()
    assert len(anew.axis_options) == len(plot.axis_options)


def test_choices(axis):
    assert axis["Subject"].choices() == ["dog", "ink"]
    assert axis["Method"].choices() == list(SPECS["method"].choices)
    assert axis["Schedule"].choices() == ["s", "s*"]
    assert axis["α"].choices is None


def test_values_collect_on_the_copy_of_each_image(axis):
    p = processing(True)
    first, second = copy(p), copy(p)
    axis["Method"].apply(first, "Random", ["Random"])
    axis["α"].apply(first, "2", ["2"])
    axis["Method"].apply(second, "Fixed", ["Fixed"])
    assert (first.klora_xyz, second.klora_xyz) == (
        {"method": "Random", "alpha": "2"},
        {"method": "Fixed"},
    )
    assert not hasattr(p, "klora_xyz")
    third = copy(first)
    axis["α"].apply(third, "3", ["3"])
    assert first.klora_xyz["alpha"] == "2"


def test_good_values_pass(axis):
    axis["Subject"].confirm(ON, ["dog", "INK_STYLE"])
    axis["Method"].confirm(ON, list(SPECS["method"].choices))
    axis["β"].confirm(ON, ["auto", "0.5"])
    axis["γ"].confirm(ON, ["auto", "off", "2"])
    axis["α"].confirm(ON, ["0", "1.5", "-2"])


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("Subject", ["dog", "cat", "bird"], "named 'cat'.*named 'bird'"),
        ("Method", ["K-LoRA", "Rendom"], "did you mean 'Random'"),
        ("α", ["1", "1e9"], "a number from -100 to 100"),
        ("α", ["1", "zz"], "a number from -100 to 100, not 'zz'"),
        ("γ", ["of"], "auto or off or a number"),
        ("Hires", [], "no values"),
    ],
)
def test_all_bad_values_are_named_before_the_first_image(axis, name, values, said):
    with pytest.raises(RuntimeError, match=rf"^\[K-LoRA\] {name}: .*{said}") as error:
        axis[name].confirm(ON, values)
    assert error.value.status_code == 422
    assert error.value.detail == str(error.value)


@pytest.mark.parametrize("args", [(False,), ({"enabled": False},), ("False",)])
def test_an_axis_is_refused_while_klora_is_off(axis, args):
    with pytest.raises(RuntimeError, match="K-LoRA is off"):
        axis["α"].confirm(processing(*args), ["1"])


def test_a_dict_from_the_api_means_on(axis):
    axis["α"].confirm(processing({"subject": "dog"}), ["1"])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("auto, 0.5, off", ["auto", "0.5", "off"]),
        ("0-1 (+0.5), auto", ["0", "0.5", "1", "auto"]),
        ("0.1-0.3 (+0.1)", ["0.1", "0.2", "0.3"]),
        ("1-0 (-0.5)", ["1", "0.5", "0"]),
        ("0-1 [3]", ["0", "0.5", "1"]),
        ("1-3", ["1", "2", "3"]),
        ("-1", ["-1"]),
        (" , ", []),
    ],
)
def test_ranges_beside_words(text, values):
    assert xyz.words_and_numbers(text) == values


def test_labels_in_the_grid_are_short(axis):
    assert axis["α"].format_value(ON, axis["α"], "0.3") == "α: 0.3"
    assert axis["γ"].format_value(ON, axis["γ"], "off") == "γ: off"
    assert axis["Method"].format_value(ON, axis["Method"], "Top-K only") == "Top-K only"


def test_every_axis_value_is_a_setting(axis):
    for name, option in ((field, axis[spec.label]) for field, spec in SPECS.items() if spec.axis):
        p = SimpleNamespace()
        option.apply(p, option.choices()[0] if option.choices else "1", [])
        Settings.parse(p.klora_xyz)
        assert list(p.klora_xyz) == [name]
