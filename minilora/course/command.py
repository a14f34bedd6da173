"""`minilora course WHAT`: the lecturer's commands. It parses and calls, as cli.py does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import exercises
from .build import build
from .grade import grade
from .sheets import otter_files, teachers_sheet

__all__ = ["arguments"]


def arguments(verb: argparse.ArgumentParser) -> None:
    """Give the verb its commands: build, grade, otter, teach."""
    whats = verb.add_subparsers(dest="what", metavar="WHAT", required=True)
    making = whats.add_parser("build", help="make the notebooks from their sources, and run them",
                              epilog="example: minilora course build 03 04")
    making.add_argument("numbers", nargs="*", metavar="NN", help="lessons (default all)")
    how = making.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="run every cell in its short form and write nothing")
    how.add_argument("--check", action="store_true", help="run nothing: are notebooks and translations what the sources give?")
    how.add_argument("--lang", default="en", metavar="LANG", help="make the translation, from the English notebook's outputs")

    grading = whats.add_parser("grade", help="judge students' notebooks or .py files, each answer in a process of its own",
                               epilog="example: minilora course grade submitted/*.ipynb --csv marks.csv")
    grading.add_argument("files", nargs="+", type=Path, metavar="FILE", help="notebooks or .py files")
    grading.add_argument("--csv", type=Path, metavar="OUT", help="also write name, exercise, verdict, hint")
    grading.add_argument("--seconds", type=float, default=20.0, help="for one answer (default 20)")
    grading.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")

    otter = whats.add_parser("otter", help="write the exercises' test files for otter-grader",
                             epilog="example: minilora course otter tests")
    otter.add_argument("out", type=Path, metavar="DIR", help="for the files, one an exercise")
    for each in (grading, otter):
        each.add_argument("--seed", type=int, default=0, help="other cases under the same laws (default 0)")

    teaching = whats.add_parser("teach", help="write the teacher's sheet, TEACH.md, into the notebooks' folder",
                                epilog="example: minilora course teach")
    for each in (making, otter, teaching):
        each.add_argument("--notebooks", type=Path, default=Path("notebooks"), metavar="DIR", help="(default notebooks)")
    for each, action in ((making, _build), (grading, _grade), (otter, _otter), (teaching, _teach)):
        each.set_defaults(action=action)


def _folder(args: argparse.Namespace) -> Path:
    if not (args.notebooks / "src").is_dir():
        raise ValueError(f"{args.notebooks} has no folder src: run this in the repository's root, or give --notebooks DIR")
    return args.notebooks


def _build(args: argparse.Namespace) -> None:
    for line in build(_folder(args), exercises(), args.numbers, lang=args.lang, quick=args.quick, check=args.check):
        print(line, flush=True)


def _grade(args: argparse.Namespace) -> None:
    if args.seconds <= 0 or args.seed < 0:
        raise ValueError(f"--seconds {args.seconds:g} --seed {args.seed}: expected a time above 0 and a seed of at least 0")
    report = grade(args.files, exercises(), seconds=args.seconds, seed=args.seed)
    if args.csv:
        report.write_csv(args.csv)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else report.table())


def _otter(args: argparse.Namespace) -> None:
    print("\n".join(str(path) for path in otter_files(args.out, _folder(args), exercises(), args.seed)))


def _teach(args: argparse.Namespace) -> None:
    target = _folder(args) / "TEACH.md"
    target.write_text(teachers_sheet(args.notebooks, exercises()), encoding="utf-8")
    print(target)
