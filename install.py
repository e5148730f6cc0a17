"""Set-up for people and tools. A WebUI calls this file bare at start-up: then there is nothing to do.

    python3 install.py demo [OPTIONS of python -m klora demo]
    python3 install.py test [OPTIONS of pytest]

Both make a virtual environment in .venv beside this file, install what they need from the package index, and run.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

TORCH = "torch==2.13.0"
"""Installed first and by itself: beside a range that admits it, pip would take the newest torch, a CUDA build of gigabytes."""


def set_up(extra: str) -> None:
    """Make .venv and install the dependencies of pyproject.toml's optional group `extra`, once per state of that file."""
    if not PYTHON.exists():
        print(f"Making {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    stamp = VENV / f"klora-{extra}.stamp"
    state = hashlib.sha256(TORCH.encode() + (HERE / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == state:
        return
    print("Installing the dependencies (the first time this takes some minutes)", flush=True)
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*install, TORCH])
    run([*install, "--editable", f"{HERE}[{extra}]"])
    stamp.write_text(state)


def run(command: list) -> None:
    """Run a command in this folder; leave with its exit status if it fails."""
    status = subprocess.run([str(part) for part in command], cwd=HERE).returncode
    if status:
        sys.exit(status)


def demo(options: list) -> None:
    set_up("generate")
    run([PYTHON, "-m", "klora", "demo", *options])


def test(options: list) -> None:
    set_up("dev")
    run([PYTHON, "-m", "ruff", "check", "."])
    run([PYTHON, "-m", "ruff", "format", "--check", "."])
    run([PYTHON, "-m", "mypy"])
    run([PYTHON, "-m", "pytest", *options])


def main(arguments: list) -> None:
    if not arguments:
        return
    commands = {"demo": demo, "test": test}
    if arguments[0] not in commands:
        sys.exit("usage: python install.py demo|test [options]")
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit("K-LoRA needs Python 3.10 or later; this is " + sys.version.split()[0] + ".")
    commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
