"""The house's promises: which part may import what."""

import ast
import re
from pathlib import Path

import pytest

from klora.core.families import FAMILIES

ROOT = Path(__file__).parents[1]
CORE = sorted(
    [
        *(ROOT / "klora" / "core").rglob("*.py"),
        ROOT / "klora" / "settings.py",
        ROOT / "klora" / "errors.py",
        ROOT / "klora" / "session.py",
    ]
)
CORE_MAY_IMPORT = {"torch", "numpy", "safetensors", "klora"}
HOSTS_ONLY = {"modules", "gradio", "networks", "network", "backend", "ldm_patched", "modules_forge"}


MADE_OF_GRADIO = {"webui/ui.py", "webui/xyz.py", "webui/options.py"}
"""Controls, the axes of the host's plot and its settings page, which are made of the host's own classes."""


def imports(path):
    yield from imported_by(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported_by(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_needs_nothing_but_torch_numpy_and_safetensors(path):
    import sys

    foreign = {name.split(".")[0] for name in imports(path)} - CORE_MAY_IMPORT - set(sys.stdlib_module_names)
    assert not foreign
    assert not [
        name
        for name in imports(path)
        if name.startswith(("klora.hosts.", "klora.webui")) and name != "klora.hosts.base"
    ]


def test_only_hosts_and_what_is_made_of_gradio_know_the_webuis_modules():
    for path in (ROOT / "klora").rglob("*.py"):
        inside = path.relative_to(ROOT / "klora")
        if inside.parts[0] != "hosts":
            known = {name.split(".")[0] for name in imports(path)} & HOSTS_ONLY
            assert not known or inside.as_posix() in MADE_OF_GRADIO, path


def test_the_webuis_modules_are_imported_where_they_are_used():
    """So that every part can be imported, and tested, where there is no WebUI."""
    for path in (ROOT / "klora").rglob("*.py"):
        if path.name != "ui.py":
            top = ast.parse(path.read_text(encoding="utf-8")).body
            assert not {name.split(".")[0] for name in imported_by(top)} & HOSTS_ONLY, path


def test_research_uses_klora_and_never_the_other_way():
    for path in (ROOT / "klora").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"evaluation", "tests"}, path
    for path in (ROOT / "evaluation").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {*HOSTS_ONLY, "tests"}, path


def test_a_family_stands_by_its_name_in_its_own_record_only():
    literal = re.compile("|".join(rf"[\"']{key}[\"']" for key in FAMILIES), re.IGNORECASE)
    for path in [*(ROOT / "klora").rglob("*.py"), *(ROOT / "javascript").glob("*.js")]:
        if "families" not in path.parts:
            assert not literal.search(path.read_text(encoding="utf-8")), path


def test_nobody_asks_for_the_name_of_a_kind_of_lora():
    for path in (ROOT / "klora").rglob("*.py"):
        assert "kind.name ==" not in path.read_text(encoding="utf-8"), path


def test_bare_install_does_nothing():
    import runpy
    import sys

    arguments, sys.argv = sys.argv, ["install.py"]
    try:
        runpy.run_path(str(ROOT / "install.py"), run_name="__main__")
    finally:
        sys.argv = arguments
