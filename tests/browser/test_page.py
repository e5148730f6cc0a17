"""K-LoRA's controls in the page of a running WebUI."""

import json
import re

from webui_page import STYLE, SUBJECT, choose, control, generate, paste, shot, switch_on, value


def test_choosing_two_loras_and_pressing_generate_is_enough(page):
    page.fill("#txt2img_prompt textarea", "a cat")
    switch_on(page)
    choose(page, "subject", SUBJECT)
    choose(page, "style", STYLE)
    shot(page, "chosen")
    info = generate(page)
    shot(page, "generated")
    assert f"K-LoRA subject: {SUBJECT}" in info
    assert f"K-LoRA style: {STYLE}" in info
    assert "<lora:" not in info


def test_swap_exchanges_the_pair(page):
    switch_on(page)
    choose(page, "subject", SUBJECT)
    choose(page, "style", STYLE)
    page.click(control("swap"))
    page.wait_for_function(
        f"document.querySelector({json.dumps(control('subject') + ' input')}).value === {json.dumps(STYLE)}"
    )
    assert value(page, "style") == SUBJECT


def test_pasting_parameters_restores_every_control(page):
    text = (
        "a dog\nSteps: 4, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 128x128, "
        f"K-LoRA subject: {STYLE}, K-LoRA style: {SUBJECT}, K-LoRA subject weight: 0.7, "
        "K-LoRA method: Fixed, K-LoRA schedule: s*, K-LoRA alpha: 2, K-LoRA gamma: off"
    )
    paste(page, text)
    page.wait_for_function(
        f"document.querySelector({json.dumps(control('subject') + ' input')})?.value === {json.dumps(STYLE)}"
    )
    page.wait_for_timeout(1000)
    assert [value(page, name) for name in ("subject", "style", "method")] == [STYLE, SUBJECT, "Fixed"]
    assert float(page.input_value(f"{control('subject_weight')} input[type=number]")) == 0.7
    shot(page, "pasted")
    info = generate(page)
    for part in (
        "K-LoRA subject weight: 0.7",
        "K-LoRA method: Fixed",
        "K-LoRA schedule: s*",
        "K-LoRA alpha: 2",
        "K-LoRA gamma: off",
    ):
        assert part in info, part


def test_a_wrong_value_is_answered_with_the_sentence_and_no_image(page):
    switch_on(page)
    choose(page, "subject", SUBJECT)
    choose(page, "style", SUBJECT)
    page.click("#txt2img_generate")
    page.wait_for_function("document.body.innerText.includes('the same LoRA')")
    shot(page, "refused")
    assert not page.query_selector("#txt2img_gallery img")


def test_every_control_has_a_tooltip(page):
    switch_on(page)
    controls = page.query_selector_all("[id^=klora_txt2img_]")
    assert len(controls) > 12
    names = {re.sub(r"^klora_txt2img_", "", element.get_attribute("id")) for element in controls}
    assert {
        "enabled",
        "subject",
        "style",
        "method",
        "schedule",
        "alpha",
        "beta",
        "gamma",
        "hires",
        "text_encoder",
    } <= names
