"""K-LoRA in the page of a running WebUI, in headless Chromium. Screenshots go to the folder that KLORA_SCREENSHOTS names.

    KLORA_HOST_URL=http://127.0.0.1:7860 KLORA_SCREENSHOTS=/tmp pytest tests/browser
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

URL = os.environ.get("KLORA_HOST_URL", "").rstrip("/")
SUBJECT, STYLE = os.environ.get("KLORA_SUBJECT", "xl_subject"), os.environ.get("KLORA_STYLE", "xl_style")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
OF_THE_HOST = ("reading 'props'", "iframeResizer", "ERR_", "Failed to load resource", "manifest")
"""Errors that the hosts' own pages print without any extension."""

pytestmark = pytest.mark.skipif(not (URL and CHROMIUM), reason="KLORA_HOST_URL names no running WebUI, or there is no Chromium")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1400, "height": 1500})
    opened.set_default_timeout(120_000)
    errors = []
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(URL, wait_until="domcontentloaded")
    opened.wait_for_selector("#txt2img_generate")
    opened.wait_for_function("window.opts && Object.keys(opts).length > 0")
    opened.wait_for_timeout(2000)
    for name, value in (("width", 128), ("height", 128), ("steps", 4)):
        opened.fill(f"#txt2img_{name} input[type=number]", str(value))
        opened.press(f"#txt2img_{name} input[type=number]", "Tab")
    yield opened
    opened.close()
    assert not [error for error in errors if not any(known in error for known in OF_THE_HOST)]


def shot(page, name):
    if folder := os.environ.get("KLORA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def control(name):
    return f"#klora_txt2img_{name}"


def choose(page, name, value):
    page.click(f"{control(name)} input")
    page.fill(f"{control(name)} input", value)
    page.wait_for_timeout(300)
    page.press(f"{control(name)} input", "Enter")
    page.press(f"{control(name)} input", "Tab")


def switch_on(page):
    page.check(f"{control('enabled')}-visible-checkbox, {control('enabled')}-checkbox >> visible=true")
    page.wait_for_timeout(500)
    if not page.is_visible(control("subject")):
        page.click(f"{control('enabled')} >> text=K-LoRA")


def generate(page):
    before = page.inner_text("#html_info_txt2img") if page.query_selector("#html_info_txt2img") else ""
    page.click("#txt2img_generate")
    page.wait_for_function("before => { const t = document.querySelector('#html_info_txt2img')?.innerText; return t && t !== before }", arg=before)
    page.wait_for_timeout(1000)
    return page.inner_text("#html_info_txt2img")


def value(page, name):
    return page.input_value(f"{control(name)} input >> nth=0")


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
    page.wait_for_function(f"document.querySelector({json.dumps(control('subject') + ' input')}).value === {json.dumps(STYLE)}")
    assert value(page, "style") == SUBJECT


def test_pasting_parameters_restores_every_control(page):
    text = (f"a dog\nSteps: 4, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 128x128, K-LoRA subject: {STYLE}, K-LoRA style: {SUBJECT}, "
            "K-LoRA subject weight: 0.7, K-LoRA selector: Fixed, K-LoRA schedule: s*, K-LoRA alpha: 2, K-LoRA gamma: off")  # fmt: skip
    page.fill("#txt2img_prompt textarea", text)
    page.click("#paste")
    page.wait_for_function(f"document.querySelector({json.dumps(control('subject') + ' input')})?.value === {json.dumps(STYLE)}")
    page.wait_for_timeout(1000)
    assert [value(page, name) for name in ("subject", "style", "selector")] == [STYLE, SUBJECT, "Fixed"]
    assert float(page.input_value(f"{control('subject_weight')} input[type=number]")) == 0.7
    shot(page, "pasted")
    info = generate(page)
    for part in ("K-LoRA subject weight: 0.7", "K-LoRA selector: Fixed", "K-LoRA schedule: s*", "K-LoRA alpha: 2", "K-LoRA gamma: off"):
        assert part in info, part


def test_a_wrong_value_is_answered_with_the_sentence_and_no_picture(page):
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
    assert {"enabled", "subject", "style", "selector", "schedule", "alpha", "beta", "gamma", "hires", "text_encoder"} <= names
