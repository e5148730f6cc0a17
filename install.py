"""Set-up for people and tools. A WebUI calls this file bare at start-up: then there is nothing to do.

    python3 install.py demo [OPTIONS of python -m klora demo]
    python3 install.py test [OPTIONS of pytest]

Both make a virtual environment in .venv beside this file, install what they need from the package index, and run.
`test` then runs the tests once more on the library versions that the WebUIs install, in environments outside this
folder (KLORA_ENVIRONMENTS names another place for them): a download of several gigabytes, once. With options of
pytest it runs today's environment alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"

TORCH = "torch==2.13.0"
"""Installed first and by itself: beside a range that admits it, pip would take the newest torch, a CUDA build of gigabytes."""

HOST_PYTHON = "3.10"
HOSTS = {
    "a1111": ["tests"],
    "forge": ["tests/core", "tests/test_selection_map.py"],
}
"""Environment of a WebUI, described in .ci/environments: the tests that run in it."""


class Unavailable(Exception):
    """An environment that this machine cannot have, and why, in one line."""


def set_up(extra: str) -> Path:
    """Make .venv, install the dependencies of pyproject.toml's optional group `extra` once per state of that file; its Python."""
    python = python_of(VENV)
    if not python.exists():
        print(f"Making {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    stamp = VENV / f"klora-{extra}.stamp"
    state = hashlib.sha256(TORCH.encode() + (HERE / "pyproject.toml").read_bytes()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == state):
        print("Installing the dependencies (the first time this takes some minutes)", flush=True)
        run(pip_install(python, TORCH))
        run(pip_install(python, "--editable", f"{HERE}[{extra}]"))
        stamp.write_text(state)
    return python


def set_up_host(name: str) -> Path:
    """Make the environment that .ci/environments describes for a WebUI, once per state of that file; its Python.

    Raises:
        Unavailable: there is no Python of the host's version, or the packages cannot be installed.
    """
    described = HERE / ".ci" / "environments" / f"{name}.txt"
    folder = environments() / f"{name}-{hashlib.sha256(described.read_bytes()).hexdigest()[:16]}"
    python, finished = python_of(folder), folder / "klora.stamp"
    if finished.exists():
        return python
    print(f"Making {folder} (a download of several gigabytes, once)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    made = subprocess.run([*host_python(), "-m", "venv", str(folder)])
    if made.returncode:
        raise Unavailable(f"Python {HOST_PYTHON} cannot make a virtual environment in {folder}.")
    if subprocess.run([str(part) for part in pip_install(python, "-r", described)]).returncode:
        raise Unavailable(f"The packages of {described} cannot be installed here; pip has said why.")
    finished.touch()
    return python


def environments() -> Path:
    """The folder of the hosts' environments, outside the clone so that they are kept between runs."""
    if chosen := os.environ.get("KLORA_ENVIRONMENTS"):
        return Path(chosen)
    if os.name == "nt":
        return Path(os.environ["LOCALAPPDATA"]) / "klora" / "environments"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klora" / "environments"


def host_python() -> list:
    """The command of a Python of the hosts' version.

    Raises:
        Unavailable: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    installed = sorted(pyenv.glob(f"{HOST_PYTHON}.*/bin/python"))
    for command in (
        [sys.executable],
        [f"python{HOST_PYTHON}"],
        ["py", f"-{HOST_PYTHON}"],
        *([path] for path in installed),
    ):
        if version_of(command) == HOST_PYTHON:
            return [str(part) for part in command]
    raise Unavailable(f"There is no Python {HOST_PYTHON} here, which AUTOMATIC1111 and Forge run on.")


def version_of(command: list) -> str:
    """ "3.10" and the like; "" where the command is no Python."""
    try:
        asked = subprocess.run(
            [*map(str, command), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return asked.stdout.strip()


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip_install(python: Path, *what: object) -> list:
    return [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]


def run(command: list) -> None:
    """Run a command in this folder; leave with its exit status if it fails."""
    status = subprocess.run([str(part) for part in command], cwd=HERE).returncode
    if status:
        sys.exit(status)


def demo(options: list) -> None:
    run([set_up("generate"), "-m", "klora", "demo", *options])


def test(options: list) -> None:
    python = set_up("dev")
    run([python, "-m", "ruff", "check", "."])
    run([python, "-m", "ruff", "format", "--check", "."])
    run([python, "-m", "mypy"])
    run([python, "-m", "pytest", *options])
    if not options:
        for name, tests in HOSTS.items():
            test_on_host(name, tests)


def test_on_host(name: str, tests: list) -> None:
    """Run tests on what a WebUI installs; where that cannot be had, say so, and fail if this is CI."""
    try:
        python = set_up_host(name)
    except Unavailable as reason:
        print(f"Not tested on the library versions of {name}: {reason}", flush=True)
        if os.environ.get("CI") == "true":
            sys.exit(1)
        return
    print(f"On the library versions of {name} ({python}):", flush=True)
    run([python, "-m", "pytest", *tests])


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
