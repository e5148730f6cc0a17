"""The screenshots in docs, made from the page of a running WebUI.

    KLORA_HOST_URL=http://127.0.0.1:7860 python tests/browser/screenshots.py [FOLDER]

KLORA_SUBJECT and KLORA_STYLE name the two LoRAs. The folder is docs unless another is given.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from webui_page import (
    CHROMIUM,
    FLAGS,
    STYLE,
    SUBJECT,
    URL,
    choose,
    control,
    generate,
    open_page,
    set_number,
    switch_on,
)

WIDTH = 1440


def install(page, path):
    page.click("#tabs button >> text=Extensions")
    page.click("#tab_extensions button >> text=Install from URL")
    page.locator("#tab_extensions input[type=text], #tab_extensions textarea").locator(
        "visible=true"
    ).first.fill("this repository's address")
    page.wait_for_timeout(500)
    page.screenshot(path=path, clip={"x": 0, "y": 0, "width": WIDTH, "height": 480})
    page.click("#tabs button >> text=txt2img")


def choose_pair(page, path):
    set_number(page, "#txt2img_steps", 20)
    page.fill("#txt2img_prompt textarea", "a sks dog in watercolor style")
    switch_on(page)
    choose(page, "subject", SUBJECT)
    choose(page, "style", STYLE)
    page.wait_for_selector(f"{control('view')} .klora-cells >> visible=true")
    page.wait_for_timeout(800)
    page.locator(control("enabled")).screenshot(path=path)


def whole_page(page, path):
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(500)
    page.screenshot(path=path, full_page=True)


def compare(page, path):
    set_number(page, "#txt2img_steps", 4)
    page.click("#script_list input")
    page.fill("#script_list input", "X/Y/Z plot")
    page.press("#script_list input", "Enter")
    for axis, label in (("x", "[K-LoRA] Method"), ("y", "Seed")):
        place = f"#script_txt2img_xyz_plot_{axis}_type input"
        page.click(place)
        page.fill(place, label)
        page.press(place, "Enter")
        page.wait_for_timeout(500)
        if axis == "y":
            page.fill("#script_txt2img_xyz_plot_y_values textarea", "1,2")
        else:
            page.click("#xyz_grid_fill_x_tool_button >> visible=true")
            page.wait_for_timeout(1500)
    generate(page)
    page.wait_for_timeout(2000)
    grid = page.locator("#txt2img_gallery img").first.evaluate("image => image.src")
    path.write_bytes(page.request.get(grid).body())


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs"
    if not URL or not CHROMIUM:
        sys.exit("Set KLORA_HOST_URL to a running WebUI, and install Chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page, _ = open_page(browser, "/?__theme=light", WIDTH)
        install(page, folder / "install.png")
        choose_pair(page, folder / "panel.png")
        generate(page)
        whole_page(page, folder / "generated.png")
        compare(page, folder / "xyz.png")
        browser.close()


if __name__ == "__main__":
    main()
