"""Headless Chromium on the page of the WebUI that KLORA_HOST_URL names.

Screenshots go to the folder that KLORA_SCREENSHOTS names.

KLORA_HOST_URL=http://127.0.0.1:7860 KLORA_SCREENSHOTS=/tmp pytest tests/browser
"""

import pytest
from webui_page import CHROMIUM, FLAGS, URL, open_page, own


@pytest.fixture(scope="session")
def browser():
    if not (URL and CHROMIUM):
        pytest.skip("KLORA_HOST_URL names no running WebUI, or there is no Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(browser):
    opened, errors = open_page(browser)
    yield opened
    opened.close()
    assert not own(errors)
