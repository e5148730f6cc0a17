"""`python -m klora evaluate | demo`, which `klora.__main__` passes on to this folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluation.demo import demo
from evaluation.evaluate import evaluate
from evaluation.tables import GROUPS
from klora.arguments import RESEARCH, positive, size
from klora.core.families import models_taken


def run(arguments: list[str]) -> None:
    """Run one of the two commands.

    Args:
        arguments: as on the command line, the command's name first.

    Raises:
        KLoraError: with the sentence for the user.
    """
    parser = argparse.ArgumentParser(prog="klora")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(RESEARCH))
    _evaluate_command(commands.add_parser("evaluate", help=RESEARCH["evaluate"]))
    command = commands.add_parser("demo", help=RESEARCH["demo"])
    command.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the results (default ./demo)"
    )
    command.set_defaults(run=lambda options: demo(options.out))
    options = parser.parse_args(arguments)
    options.run(options)


def _evaluate_command(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Without --model: pairs of the miniature. With it: one pair of your own, measured with CLIP and "
        "DINO models that you have."
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("evaluation"),
        help="folder for the results; an evaluation that was stopped continues",
    )
    command.add_argument(
        "--seeds", type=positive, default=10, help="images of each pair and method (default 10)"
    )
    command.add_argument("--steps", type=positive, default=20, help="default 20")
    command.add_argument("--tables", nargs="+", choices=list(GROUPS), help="default: all")
    command.add_argument("--pairs", type=positive, help="only this many pairs of the miniature")
    command.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    command.add_argument(
        "--model",
        type=Path,
        help=f"{models_taken()} (opened as the base model of the LoRAs); with it, use the options below",
    )
    command.add_argument(
        "--config",
        type=Path,
        help="for a single file: a diffusers folder with its configuration, to stay offline",
    )
    command.add_argument("--subject", help="the subject LoRA's file")
    command.add_argument("--style", help="the style LoRA's file")
    command.add_argument("--subject-weight", type=float, default=1.0, help="default 1")
    command.add_argument("--style-weight", type=float, default=1.0, help="default 1")
    command.add_argument("--prompt", help="with the trigger words of both LoRAs")
    command.add_argument("--size", type=size, metavar="WIDTHxHEIGHT", help="default: the base model's own")
    command.add_argument("--subject-images", type=Path, metavar="FOLDER", help="images of the subject")
    command.add_argument("--style-images", type=Path, metavar="FOLDER", help="images in the style")
    command.add_argument("--clip", type=Path, metavar="FOLDER", help="a CLIP model as transformers saves it")
    command.add_argument(
        "--dino", type=Path, metavar="FOLDER", help="a DINO vision transformer as transformers saves it"
    )
    command.set_defaults(run=evaluate)
