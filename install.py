"""Runs the demo or the tests in an environment of its own.

    python3 install.py demo [OPTIONS of python -m klora demo]
    python3 install.py test [OPTIONS of pytest]

Both create a virtual environment in .venv beside this file, install what they need from the package index,
and run. `test` then runs the tests again on the library versions that the WebUIs install, in environments
outside this folder (KLORA_ENVIRONMENTS names another place for them): a one-time download of several
gigabytes. With options for pytest it only uses today's environment.

A WebUI runs this file without arguments when it starts; then there is nothing to do.
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
"""Installed first and by itself: from a range pip would take the newest, a CUDA build of gigabytes."""

PYTEST = ["-m", "pytest", "-n", "auto", "--dist", "loadfile"]
"""One process for each core, each file's tests in one of them: files share what takes long to make."""

HOST_PYTHON = "3.10"
HOSTS = {
    "a1111": ["tests"],
    "forge": [
        "tests/core",
        "tests/test_selection_map.py",
        "tests/test_level_colours.py",
        "tests/test_gpu_check.py",
    ],
}
"""{environment of a WebUI, as .ci/environments describes it: the tests that run in it}."""


class Unavailable(Exception):
    """Why this machine cannot have an environment, in one line."""


def set_up(extra: str) -> Path:
    """Create .venv with the optional dependencies `extra` of pyproject.toml, and return its Python.

    They are installed again only when that file has changed.
    """
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
    """Create the environment that .ci/environments describes for a WebUI, and return its Python.

    It is created again only when its description has changed.

    Raises:
        Unavailable: there is no Python of that version, or the packages cannot be installed.
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
    """The folder for the hosts' environments, outside the clone so that they outlive it."""
    if chosen := os.environ.get("KLORA_ENVIRONMENTS"):
        return Path(chosen)
    if os.name == "nt":
        return Path(os.environ["LOCALAPPDATA"]) / "klora" / "environments"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klora" / "environments"


def host_python() -> list:
    """The command that starts a Python of the hosts' version.

    Raises:
        Unavailable: none is installed.
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
    """The version, such as "3.10"; "" if the command is not a Python."""
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
    """Run a command in this folder, and exit with its status if it fails."""
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
    run([python, *PYTEST, *options])
    if not options:
        for name, tests in HOSTS.items():
            test_on_host(name, tests)


def test_on_host(name: str, tests: list) -> None:
    """Run tests on the library versions of a WebUI. If they are unavailable, say so, and fail in CI."""
    try:
        python = set_up_host(name)
    except Unavailable as reason:
        print(f"Not tested on the library versions of {name}: {reason}", flush=True)
        if os.environ.get("CI") == "true":
            sys.exit(1)
        return
    print(f"On the library versions of {name} ({python}):", flush=True)
    run([python, *PYTEST, *tests])


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
