"""`minilora VERB`: parses the command line and calls the library. No logic lives here.

Bad input ends with exit code 2 and one line that says what was got, what was expected, and what to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import minilora

from . import bench
from .backend import DeviceError, current_device, set_device
from .rank.report import analyze
from .studies import STUDIES, Options
from .studies.common import writable_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 a measurement could not be made, 2 bad input, 130 interrupted)."""
    args = parser().parse_args(arguments)
    try:
        if getattr(args, "device", None):
            set_device(args.device)
        args.action(args)
    except (ValueError, KeyError, TypeError, ImportError, FileNotFoundError, PermissionError, IsADirectoryError, DeviceError,
            MemoryError) as error:
        return _complain(error, 2)
    except (RuntimeError, FloatingPointError, OSError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted: finished files are whole, nothing half-written remains", 130)
    return 0


def parser() -> argparse.ArgumentParser:
    """All verbs with their options."""
    top = argparse.ArgumentParser(prog="minilora", description="LoRA from scratch in NumPy: studies, analysis, benchmark.")
    top.add_argument("--version", action="version", version=f"minilora {minilora.__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    study = _verb(verbs, "study", _study, "answer one question with one table and one figure",
                  "minilora study rank-quality --quick --out my-figures")
    study.add_argument("name", nargs="?", help="the study's name; --list shows all")
    study.add_argument("--list", action="store_true", help="list the studies and stop")
    size = study.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="size", const="quick", help="a small version, under a minute")
    size.add_argument("--full", action="store_const", dest="size", const="full", help="more seeds and ranks, up to 45 minutes")
    study.set_defaults(size="default")
    study.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    study.add_argument("--device", default=None, help="cpu or gpu (default: $MINILORA_DEVICE, or cpu)")
    study.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="for the figure (default figures)")
    study.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")

    benchmark = _verb(verbs, "bench", _bench, "time training and generation against PyTorch + PEFT",
                      "minilora bench --case course --case sweep --rounds 5")
    benchmark.add_argument("--case", action="append", metavar="NAME",
                           help=f"which case, may be repeated (default: all of the device): {', '.join(bench.CASES)}")
    benchmark.add_argument("--quick", action="store_true", help="the small cases, few rounds")
    benchmark.add_argument("--rounds", type=int, metavar="N", help="turns of each side (default: by the case's size)")
    benchmark.add_argument("--device", default=None, help="cpu or gpu (default: $MINILORA_DEVICE, or cpu)")
    benchmark.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="for the figure (default figures)")
    benchmark.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")

    analysis = _verb(verbs, "analyze", _analyze, "singular values and ranks of an adapter", "minilora analyze my-adapter")
    analysis.add_argument("directory", help="a folder with adapter_config.json and adapter_model.safetensors")
    analysis.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    return top


def _verb(verbs: Any, name: str, action: Any, what: str, example: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"example: {example}")
    verb.set_defaults(action=action)
    return verb


def _study(args: argparse.Namespace) -> None:
    if args.list or args.name is None:
        for name, study in STUDIES.items():
            print(f"{name:16}{study.QUESTION}")
        return
    if args.name not in STUDIES:
        raise ValueError(f"unknown study {args.name!r}: expected one of {', '.join(STUDIES)}")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected a whole number of at least 0")
    study = STUDIES[args.name]
    report = study.run(Options(args.size, args.seed, args.out))
    print(json.dumps(report) if args.json else study.table(report))
    if not args.json:
        print(f"    figure and numbers: {args.out / args.name.replace('-', '_')}.{{png,svg,json}}")


def _bench(args: argparse.Namespace) -> None:
    writable_folder(args.out)
    report = bench.run(args.case, device=current_device().name, quick=args.quick, rounds=args.rounds)
    path = bench.save(report, args.out)
    print(json.dumps(report) if args.json else bench.table(report))
    if not args.json:
        print(f"figure and numbers: {path}.{{png,svg,json}}")


def _analyze(args: argparse.Namespace) -> None:
    report = analyze(args.directory)
    print(json.dumps(report.to_dict()) if args.json else report.table())


def _complain(error: Any, code: int) -> int:
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    print(f"minilora: {' '.join(str(text).split())}", file=sys.stderr)
    return code
