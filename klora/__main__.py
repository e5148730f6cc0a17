"""`python -m klora analyze | generate | evaluate | demo | settings`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from klora.analysis import Analysis, analyze
from klora.arguments import RESEARCH, positive, size
from klora.core.families import models_taken
from klora.core.score_cache import ScoreCache
from klora.errors import Cancelled, KLoraError
from klora.report import preflight
from klora.selection_map import draw_map
from klora.settings import PLAN_FIELDS, SPECS, Settings, as_text, markdown_table


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    It is 0 on success, 1 if something is wrong with the input (stderr then has one sentence that says what),
    and 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in RESEARCH:
            _research(given)
        else:
            options = _parser().parse_args(given)
            options.run(options)
    except KLoraError as error:
        print(f"klora: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Cancelled):
        print("klora: stopped", file=sys.stderr)
        return 130
    return 0


def cache_folder() -> Path:
    """Where the command line keeps scores: $KLORA_CACHE, or the user's cache folder."""
    if own := os.environ.get("KLORA_CACHE"):
        return Path(own)
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "klora"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klora", description="K-LoRA: this subject in that style, from two LoRA files, without training."
    )
    commands = parser.add_subparsers(required=True, metavar="analyze | generate | evaluate | demo | settings")
    _analyze_command(
        commands.add_parser(
            "analyze", help="score a pair of LoRA files and show which one is chosen where and when"
        )
    )
    _generate_command(commands.add_parser("generate", help="make an image with a diffusers pipeline"))
    for name, does in RESEARCH.items():
        commands.add_parser(name, help=does, add_help=False)
    command = commands.add_parser("settings", help="print the table of all settings, as in docs/api.md")
    command.set_defaults(run=lambda _options: print(markdown_table()))
    return parser


def _analyze_command(command: argparse.ArgumentParser) -> None:
    command.add_argument("subject", type=Path, metavar="SUBJECT", help="the subject LoRA's file")
    command.add_argument("style", type=Path, metavar="STYLE", help="the style LoRA's file")
    command.add_argument("--steps", type=positive, default=30, help="number of steps (default 30)")
    command.add_argument("--seed", type=int, default=0, help="for the method Random (default 0)")
    _add_settings(command, PLAN_FIELDS)
    command.add_argument("--json", metavar="FILE|-", help="write the plan as JSON")
    command.add_argument("--map", type=Path, metavar="FILE.png", help="write the selection map")
    command.set_defaults(run=_analyze)


def _generate_command(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        type=Path,
        required=True,
        help=f"{models_taken()}; a single file is opened as the base model of the LoRAs",
    )
    command.add_argument(
        "--config",
        type=Path,
        help="for a single file: a diffusers folder with its configuration, to stay offline",
    )
    command.add_argument("--subject", required=True, help="the subject LoRA's file")
    command.add_argument("--style", required=True, help="the style LoRA's file")
    command.add_argument("--prompt", required=True)
    command.add_argument("--negative", default="", help="negative prompt")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=positive, default=30, help="default 30")
    command.add_argument("--size", type=size, metavar="WIDTHxHEIGHT", help="default: the base model's own")
    command.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's own)")
    command.add_argument(
        "--scheduler",
        help="a diffusers scheduler class, such as HeunDiscreteScheduler (default: the model's own)",
    )
    _add_settings(command, [name for name in SPECS if name not in ("enabled", "subject", "style", "hires")])
    command.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    command.set_defaults(run=_generate)


def _add_settings(command: argparse.ArgumentParser, names: list[str] | tuple[str, ...]) -> None:
    defaults = Settings()
    for name in names:
        spec = SPECS[name]
        allowed = "|".join([*spec.choices, *(["NUMBER"] if spec.kind == "number" else [])])
        default = as_text(name, getattr(defaults, name))
        command.add_argument(
            "--" + name.replace("_", "-"),
            metavar=allowed,
            help=f"{spec.help} Default: {default}.".replace("%", "%%"),
        )


def _settings(options: argparse.Namespace) -> Settings:
    given = {name: getattr(options, name, None) for name in SPECS}
    return Settings.parse({name: str(value) for name, value in given.items() if value is not None})


def _analyze(options: argparse.Namespace) -> None:
    progress = None if options.json == "-" else _print_progress
    analysis = analyze(
        options.subject, options.style, _settings(options),
        steps=options.steps, seed=options.seed, cache=ScoreCache(cache_folder()), progress=progress,
    )  # fmt: skip
    write_results(analysis, options.json, options.map)
    if options.json != "-":
        print(preflight(analysis))


def write_results(analysis: Analysis, json_file: str | None, map_file: Path | None) -> None:
    """Write the plan as JSON ("-" is standard output) and the selection map as an image, if asked for."""
    if json_file == "-":
        json.dump(analysis.to_json(), sys.stdout)
        print()
    elif json_file:
        _writing(
            Path(json_file), lambda path: path.write_text(json.dumps(analysis.to_json()), encoding="utf-8")
        )
    if map_file:
        image = draw_map(analysis.plan, analysis.subject.path.stem, analysis.style.path.stem)
        _writing(map_file, lambda path: image.save(path))


def _writing(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(path)
    except (OSError, ValueError) as error:
        raise KLoraError(f"Cannot write {path}: {error}. Choose another file name or folder.") from error


def _print_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rscoring {done} of {total} layers", end=end, file=sys.stderr, flush=True)


def _research(arguments: list[str]) -> None:
    try:
        command = importlib.import_module("evaluation.command")
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "evaluation":
            raise
        raise KLoraError(
            f"`{arguments[0]}` needs the folder `evaluation` of the repository: run it in a clone."
        ) from missing
    command.run(arguments)


def _generate(options: argparse.Namespace) -> None:
    from klora.runner import generate  # diffusers is needed here only

    generate(options, _settings(options), ScoreCache(cache_folder()), _print_progress)


if __name__ == "__main__":
    sys.exit(main())
