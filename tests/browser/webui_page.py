"""The page of a running WebUI as a person uses it."""

import os
import shutil
from pathlib import Path

URL = os.environ.get("KLORA_HOST_URL", "").rstrip("/")
SUBJECT, STYLE = os.environ.get("KLORA_SUBJECT", "xl_subject"), os.environ.get("KLORA_STYLE", "xl_style")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OF_THE_HOST = (
    "reading 'props'",
    "iframeResizer",
    "ERR_NAME_NOT_RESOLVED",
    "ERR_INTERNET_DISCONNECTED",
    "manifest",
)
"""Errors that the hosts' own pages print without any extension."""


def open_page(browser, query="", width=1400):
    """A new page of the host, set to small images with few steps, and the list that collects its errors."""
    page, errors = browser.new_page(viewport={"width": width, "height": 1500}), []
    page.set_default_timeout(120_000)
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(URL + query, wait_until="domcontentloaded")
    page.wait_for_selector("#txt2img_generate")
    page.wait_for_function("typeof opts !== 'undefined' && Object.keys(opts).length > 0")
    page.wait_for_timeout(2000)
    for name, number in (("width", 128), ("height", 128), ("steps", 4)):
        set_number(page, f"#txt2img_{name}", number)
    return page, errors


def own(errors):
    return [error for error in errors if not any(known in error for known in OF_THE_HOST)]


def shot(page, name):
    if folder := os.environ.get("KLORA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def control(name):
    return f"#klora_txt2img_{name}"


def set_number(page, place, number):
    page.fill(f"{place} input[type=number]", str(number))
    page.press(f"{place} input[type=number]", "Tab")


def choose(page, name, value):
    page.click(f"{control(name)} input")
    page.fill(f"{control(name)} input", value)
    page.wait_for_timeout(300)
    page.press(f"{control(name)} input", "Enter")
    page.press(f"{control(name)} input", "Tab")


def paste(page, parameters):
    """Have the host paste an image's parameters into its controls."""
    page.fill("#txt2img_prompt textarea", parameters)
    page.click("#paste")


def switch_on(page):
    page.check(f"{control('enabled')}-visible-checkbox, {control('enabled')}-checkbox >> visible=true")
    page.wait_for_timeout(500)
    if not page.is_visible(control("subject")):
        page.click(f"{control('enabled')} >> text=K-LoRA")


def generate(page, while_it_runs=lambda: None):
    """Press Generate and return what the page says below the image."""
    before = page.inner_text("#html_info_txt2img") if page.query_selector("#html_info_txt2img") else ""
    page.click("#txt2img_generate")
    while_it_runs()
    page.wait_for_function(
        "before => { const t = document.querySelector('#html_info_txt2img')?.innerText; "
        "return t && t !== before }",
        arg=before,
    )
    page.wait_for_timeout(1000)
    return page.inner_text("#html_info_txt2img")


def value(page, name):
    return page.input_value(f"{control(name)} input >> nth=0")
