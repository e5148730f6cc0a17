"""README.md and docs/ say what is so."""

import re
from pathlib import Path

import pytest

from klora.core.schedule import Schedule
from klora.settings import markdown_table

HOUSE = Path(__file__).parents[1]
PAGES = [HOUSE / "README.md", *sorted((HOUSE / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]*)#?([^)]*)\)")


def text(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_table_of_settings_is_the_declaration():
    assert markdown_table() in text(HOUSE / "docs" / "api.md"), (
        "put what `python -m klora settings` prints under the heading Settings of docs/api.md"
    )


@pytest.mark.parametrize("steps", [4, 8, 9])
def test_the_values_of_few_steps_are_those_of_the_schedules(steps):
    s, s_star = (
        ", ".join(
            f"{value + 1e-9:.2f}".rstrip("0").rstrip(".") for value in Schedule.named(name).values(steps)
        )
        for name in ("s", "s*")
    )
    assert f"| {steps} | {s} | {s_star} |" in text(HOUSE / "docs" / "methods.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    for place, anchor in LINK.findall(text(page)):
        if "://" in place:
            continue
        target = page.parent / place if place else page
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), anchor


def test_the_readme_leads_to_every_page():
    linked = {place for place, _ in LINK.findall(text(HOUSE / "README.md"))}
    assert linked >= {f"docs/{page.name}" for page in PAGES[1:]}
