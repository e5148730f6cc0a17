"""The accordion has one control for each setting, in the fixed order, with a tooltip and an id."""

import pytest
from webui_host import Infotext, NetworkOnDisk

from klora.settings import DEFAULTS, SPECS, Settings


@pytest.fixture
def controls(ui, networks):
    networks.put(NetworkOnDisk("ink"), NetworkOnDisk("dog"))
    return ui.build(False, "txt2img")


def test_one_control_per_setting_in_the_order_of_the_arguments(controls):
    ids = [component.elem_id for component in controls.components]
    assert ids == [f"klora_txt2img_{name}" for name in SPECS]


def test_untouched_controls_are_the_defaults_and_off(controls):
    assert Settings.parse_api([component.value for component in controls.components]) == Settings()


def test_every_control_has_its_tooltip(controls):
    enable, *others = controls.components
    assert enable.accordion.webui_tooltip == SPECS["enabled"].help
    assert [component.tooltip for component in others] == [SPECS[name].help for name in list(SPECS)[1:]]


def test_asked_for_again_ui_makes_the_same_controls(ui, controls):
    again = ui.build(True, "img2img")
    assert [type(c) for c in again.components] == [type(c) for c in controls.components]
    assert not set(map(id, again.components)) & set(map(id, controls.components))


def test_loras_are_offered_by_name(controls):
    subject, style = controls.components[1:3]
    assert subject.choices == style.choices == ["None", "dog", "ink"]
    assert subject.do_not_save_to_config


def watched(ui, monkeypatch, name):
    """What `ui` makes with its function `name` while building the accordion, and the components."""
    made, original = [], getattr(ui, name)
    monkeypatch.setattr(ui, name, lambda *args, **kwargs: made.append(original(*args, **kwargs)) or made[-1])
    components = ui.build(False, "txt2img").components
    return made[0], components


def test_refresh_offers_new_files_in_both(ui, networks, monkeypatch):
    button, components = watched(ui, monkeypatch, "create_refresh_button")
    networks.on_disk.append(NetworkOnDisk("new"))
    assert button.clicked.fn() == {"choices": ["None", "new"]}
    assert button.clicked.outputs == components[1:3]


def test_swap_exchanges_names_and_weights(ui, networks, monkeypatch):
    button, components = watched(ui, monkeypatch, "ToolButton")
    clicked = button.clicked
    assert clicked.inputs == clicked.outputs == components[1:5]
    assert clicked.fn("dog", "ink", 1.0, 0.7) == ("ink", "dog", 0.7, 1.0)


def test_what_the_card_offers_are_values_of_the_controls_it_sets(ui):
    for name, value in ui.S_STAR.items():
        assert value in SPECS[name].choices
        assert Settings.parse({name: value})


def test_pasting_fills_every_control(controls):
    pasted = Infotext.read(
        "Steps: 20, K-LoRA subject: dog, K-LoRA style: ink, K-LoRA beta: 0.7, K-LoRA subject weight: 0.8"
    )
    filled = {
        component.elem_id.removeprefix("klora_txt2img_"): restore(pasted)
        for component, restore in controls.infotext_fields
    }
    assert Settings.parse(filled) == Settings(
        enabled=True, subject="dog", style="ink", beta=0.7, subject_weight=0.8
    )
    assert set(filled) == set(DEFAULTS)


def test_sending_an_image_to_another_tab_carries_the_settings(ui, controls):
    """As in the host: the fields of either tab whose target is among the first tab's paste field names."""
    other = ui.build(True, "img2img")
    carried = [
        [component for component, target in fields if target in controls.paste_field_names]
        for fields in (controls.infotext_fields, other.infotext_fields)
    ]
    assert carried == [controls.components, other.components]
