"""The options: declared once for the page and for reading; wrong values in a config file do no harm."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from standin.webui import gradio as components
from standin.webui.modules import options as hosts_options
from webui_host import module

from klora.accelerators import ACCELERATORS
from klora.settings import DEFAULTS
from klora.webui import options, paths


@pytest.fixture
def page(shared, monkeypatch, tmp_path):
    """The host's options with the section on them, {name: what the page shows of it}."""
    names = ("Radio", "Slider", "Button", "HTML")
    monkeypatch.setitem(
        sys.modules, "gradio", module("gradio", **{name: getattr(components, name) for name in names})
    )
    monkeypatch.setitem(sys.modules, "modules.options", hosts_options)
    monkeypatch.setattr(sys.modules["modules"], "options", hosts_options, raising=False)
    monkeypatch.setattr(paths, "cache_folder", lambda: tmp_path / "scores")
    options.register()
    return {key.removeprefix("klora_"): info for key, info in shared.opts.data_labels.items()}


def test_the_page_has_every_option_in_one_section_with_a_label_and_a_help(page):
    declared = [field.name for field in dataclasses.fields(options.Options)]
    assert list(page) == [*declared, "clear_cache"]
    assert all(info.section == ("klora", "K-LoRA") and info.label for info in page.values())
    assert all(page[name].comment_after for name in declared)
    assert not any("<" in page[name].comment_after for name in declared), "the page takes it for HTML"


def test_untouched_the_options_are_the_built_in_ones(page, shared):
    assert options.read() == options.BUILT_IN
    shared.opts.data.clear()
    assert options.read() == options.BUILT_IN
    assert options.BUILT_IN.run_defaults() == {name: DEFAULTS[name] for name in ("text_encoder", "hires")}
    assert options.BUILT_IN.accelerator_words() == ACCELERATORS


@pytest.mark.parametrize(("name", "value"), [
    ("text_encoder", "neither"), ("hires", None), ("map_saved", "yes"), ("cache_size", "big"),
    ("cache_size", -1), ("accelerators", 3),
    ("on_error", ["stop"]), ("scoring_device", "cuda:7"),
])  # fmt: skip
def test_an_impossible_value_counts_as_the_built_in_one(page, shared, name, value):
    shared.opts.data[f"klora_{name}"] = value
    assert options.read() == options.BUILT_IN


def test_words_are_separated_by_commas(page, shared):
    shared.opts.klora_accelerators = " Turbo,, my Words ,"
    assert options.read().accelerator_words() == (*ACCELERATORS, "turbo", "my words")


@pytest.mark.parametrize(("hosts", "chosen", "device"), [
    ("cuda:1", "auto", "cuda:1"), ("cuda:1", "CPU", "cpu"), ("mps", "auto", "cpu"), ("cpu", "auto", "cpu"),
])  # fmt: skip
def test_scores_are_computed_on_the_hosts_own_gpu_where_possible(
    page, shared, monkeypatch, hosts, chosen, device
):
    devices = SimpleNamespace(device=torch.device(hosts))
    monkeypatch.setitem(sys.modules, "modules.devices", devices)
    monkeypatch.setattr(sys.modules["modules"], "devices", devices)
    shared.opts.klora_scoring_device = chosen
    assert options.read().device() == torch.device(device)


def fill(folder, megabytes):
    folder.mkdir(exist_ok=True)
    for i in range(megabytes):
        (folder / f"{i}.profile").write_bytes(bytes(2**20))


def test_a_smaller_cache_is_made_smaller_at_once(page, shared, tmp_path):
    fill(tmp_path / "scores", 4)
    shared.opts.set("klora_cache_size", 2)
    assert options.read().cache().size() == 2 * 2**20
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"2.profile", "3.profile"}


def test_the_clear_button_shows_the_present_size_and_clears(page, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        sys.modules["gradio"],
        "Button",
        lambda *args, **more: made.append(components.Button(*args, **more)) or made[-1],
    )
    control = page["clear_cache"].component(
        label="Clear the score cache", value="", elem_id="setting_klora_clear_cache"
    )
    assert (control.value, control.elem_id) == ("", "setting_klora_clear_cache")
    fill(tmp_path / "scores", 3)
    (button,) = made
    assert button.value() == "Clear the score cache (3.0 MB now)"
    assert button.clicked.fn() == "Clear the score cache (0.0 MB now)"
    assert button.clicked.outputs == [button]
    assert options.read().cache().size() == 0
