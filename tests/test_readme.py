"""The README says what is so."""

import re
from pathlib import Path

from klora.settings import markdown_table

HOUSE = Path(__file__).parents[1]
README = (HOUSE / "README.md").read_text(encoding="utf-8")


def test_its_table_of_settings_is_the_declaration():
    assert markdown_table() in README, (
        "put what `python -m klora settings` prints under the README's heading Settings"
    )


def test_what_it_links_to_is_there():
    places = [place for place in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if "://" not in place]
    assert places
    assert not [place for place in places if not (HOUSE / place).exists()]
