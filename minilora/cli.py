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

from . import bench, plots, tasks
from .backend import DeviceError, current_device, set_device
from .course import command
from .lora.files import load_adapter
from .pretrained import reference, stream_text
from .pretrained.analysis import analyze
from .pretrained.edit import compose, resize
from .pretrained.extract import extract
from .pretrained.merge import merge_checkpoint
from .pretrained.outline import SHAPES
from .pretrained.params import METHOD_NAMES, config_for, params
from .studies import STUDIES, Options
from .studies.common import writable_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 not measured or not right, 2 bad input, 130 interrupted)."""
    args = parser().parse_args(arguments)
    try:
        if getattr(args, "device", None):
            set_device(args.device)
        return args.action(args) or 0
    except (ValueError, KeyError, TypeError, ImportError, FileNotFoundError, PermissionError, IsADirectoryError,
            NotADirectoryError, FileExistsError, DeviceError, MemoryError) as error:
        return _complain(error, 2)
    except (RuntimeError, FloatingPointError, OSError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted: finished files are whole, nothing half-written remains", 130)


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
    study.add_argument("--seeds", type=int, metavar="N", help="how many seeds (default: by the size)")
    study.add_argument("--workers", metavar="dask://HOST:PORT", help="compute on a Dask cluster instead of this machine")
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

    _analyze_verb(verbs)
    _generate_verb(verbs)
    _file_verbs(verbs)
    _task_verbs(verbs)
    _params_verb(verbs)
    _course_verb(verbs)
    return top


def _analyze_verb(verbs: Any) -> None:
    """The rank analysis of an adapter's folder."""
    analysis = _verb(verbs, "analyze", _analyze, "singular values and ranks of an adapter, and what it does to its base",
                     "minilora analyze my-adapter --base llama-1b --figure report.png")
    analysis.add_argument("directory", help="a folder with adapter_config.json and adapter_model.safetensors")
    analysis.add_argument("--base", metavar="DIR", help="a folder or name: relative norms, amplification and intruders too")
    analysis.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw ranks and spectra, with a base all of it")
    _json(analysis)


def _generate_verb(verbs: Any) -> None:
    verb = _verb(verbs, "generate", _generate, "let a language model write, a token at a time",
                 'minilora generate smollm2-135m --adapter my-adapter --prompt "What is a list?"')
    verb.add_argument("model", help="a folder, a GGUF file, a hub id, or smollm2-135m")
    verb.add_argument("--adapter", metavar="DIR", help="the folder of an adapter for it")
    verb.add_argument("--prompt", required=True, metavar="TEXT", help="what the model continues or answers")
    verb.add_argument("--max-new-tokens", type=int, metavar="N", help="at most (default 256, or what the context has room for)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default), above 0 samples")
    verb.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    verb.add_argument("--top-p", type=float, metavar="P", help="sample from the least set of this probability, such as 0.9")
    verb.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    verb.add_argument("--chat", action=argparse.BooleanOptionalAction, default=None,
                      help="the prompt is a message, or not (default: if the model has a chat template)")
    verb.add_argument("--device", default=None, help="cpu or gpu (default: $MINILORA_DEVICE, or cpu)")


def _file_verbs(verbs: Any) -> None:
    """The verbs that work on folders of any model, without its code."""
    merge = _verb(verbs, "merge", _merge, "write a checkpoint with an adapter merged in, and measure what rounding kept",
                  "minilora merge llama-7b my-adapter -o merged")
    merge.add_argument("base", help="a folder with model.safetensors, or shards and their index; or a hub id, or minilm-l6")
    merge.add_argument("directory", help="the adapter's folder")
    merge.add_argument("--dequantise", action="store_true", help="write a base in 4 bits, a GGUF file, merged in float32")
    merge.add_argument("--untie", action="store_true", help="give a tied head a tensor of its own")

    resize = _verb(verbs, "resize", _resize, "cut an adapter to a lower rank",
                   "minilora resize my-adapter --energy 0.95 -o small")
    resize.add_argument("directory", help="the adapter's folder")

    compose = _verb(verbs, "compose", _compose, "add up adapters: the weighted sum of their updates, as one adapter",
                    "minilora compose first second --weights 0.7 0.3 -o both")
    compose.add_argument("directories", nargs="+", metavar="directory", help="the adapters' folders")
    compose.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each adapter (default 1)")
    compose.add_argument("--how", choices=["cat", "svd"], default="cat", help="exact, ranks add up; or cut to a rank")
    compose.add_argument("--rank", type=int, help="of the result, with --how svd (default: the largest of the ranks)")

    extract = _verb(verbs, "extract", _extract, "get a LoRA out of a full fine-tune",
                    "minilora extract base tuned --rank 16 -o adapter")
    extract.add_argument("base", help="the folder of the base checkpoint")
    extract.add_argument("tuned", help="the folder of the fine-tuned checkpoint")
    extract.add_argument("--target-modules", nargs="+", metavar="NAME", help="names of matrices (default: all that changed)")

    for verb in (resize, extract):
        size = verb.add_mutually_exclusive_group(required=True)
        size.add_argument("--rank", type=int, help="the rank of every module")
        size.add_argument("--energy", type=float, help="the least rank that keeps this share of Σσ², such as 0.95")
    for verb in (merge, resize, compose, extract):
        verb.add_argument("-o", "--out", required=True, metavar="OUT", help="the folder to write")
        verb.add_argument("--force", action="store_true", help="replace what OUT holds")
        _json(verb)

    reference = _verb(verbs, "reference", _reference, "write test cases for any implementation of LoRA",
                      "minilora reference -o cases")
    reference.add_argument("-o", "--out", required=True, metavar="OUT", help="the folder to write")
    reference.add_argument("--force", action="store_true", help="replace what OUT holds")
    verify = _verb(verbs, "verify", _verify, "check an implementation's answers, and say what a wrong one usually means",
                   "minilora verify cases my-answers")
    verify.add_argument("directory", help="the folder that `minilora reference` wrote")
    verify.add_argument("theirs", help="a folder with safetensors of the same names, holding the answers")
    _json(verify)


def _task_verbs(verbs: Any) -> None:
    """Fine-tuning on a file, and its result at work."""
    tune = _verb(verbs, "finetune", _finetune, "fine-tune a pretrained model on a file with LoRA, and measure before and after",
                 "minilora finetune minilm-l6 --task sentiment --data reviews.csv -o my-adapter")
    tune.add_argument("model", help="a folder, a .gguf file, a hub id, or minilm-l6 or smollm2-135m")
    tune.add_argument("--task", required=True, choices=list(tasks.TASKS), help="labels of texts, tags of words, or text")
    tune.add_argument("--data", required=True, metavar="FILE", help="sentiment: .csv, .tsv or .jsonl with columns text and "
                      "label; ner: CoNLL-style lines; text: plain text, or .jsonl with text, or with prompt and completion")
    tune.add_argument("--eval", metavar="FILE", help="to evaluate on (default: a tenth of the data, drawn by the seed)")
    tune.add_argument("-o", "--out", metavar="OUT", help="the folder to write (default: TASK-adapter); the same call goes "
                      "on with an unfinished run")
    tune.add_argument("--force", action="store_true", help="replace what OUT holds")
    for name, kind, what in (
            ("r", int, "the rank"), ("alpha", float, "lora_alpha: the update is scaled by alpha / r"),
            ("lora-dropout", float, "on the input of the update"), ("dropout", float, "of the base"),
            ("lr", float, "the peak learning rate"), ("epochs", float, "passes over the data"),
            ("steps", int, "updates, in place of epochs"), ("batch", int, "examples in a batch"),
            ("tokens", int, "tokens in a batch at most, in place of --batch"),
            ("max-length", int, "of an example, in tokens; what is longer is cut"),
            ("warmup", float, "steps, or a share below 1"),
            ("limit", int, "use only so many examples, drawn by the seed")):
        tune.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=f"{what} (default: by the task)")
    tune.add_argument("--schedule", choices=["linear", "cosine", "constant"], help="of the rate (default: by the task)")
    tune.add_argument("--quantise", choices=tasks.QUANTISED, help="keep the base in 4 bits (QLoRA): the blocks of a .gguf file "
                      "in Q4_0 or Q4_1 as they are, or NF4 or FP4")
    tune.add_argument("--target-modules", nargs="+", metavar="NAME", help="layers to adapt, or all-linear")
    tune.add_argument("--eval-share", type=float, default=0.1, metavar="X", help="held out without --eval (default 0.1)")
    tune.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    tune.add_argument("--text-column", default="text", metavar="NAME", help="where the texts are (default text)")
    tune.add_argument("--label-column", default="label", metavar="NAME", help="where the labels are (default label)")
    tune.add_argument("--labels", nargs="+", metavar="NAME", help="all labels, in the order of their numbers (default: sorted)")
    tune.add_argument("--device", default=None, help="cpu or gpu (default: $MINILORA_DEVICE, or cpu)")
    _json(tune)

    ask = _verb(verbs, "predict", _predict, "label, tag or continue new texts with what `minilora finetune` wrote",
                'minilora predict my-adapter "a film to see twice"')
    ask.add_argument("directory", help="the folder that `minilora finetune` wrote")
    ask.add_argument("texts", nargs="*", metavar="text", help="the texts (default: the lines of standard input)")
    ask.add_argument("--base", metavar="MODEL", help="where the base is (default: where it was)")
    ask.add_argument("--device", default=None, help="cpu or gpu (default: $MINILORA_DEVICE, or cpu)")
    _json(ask)


def _params_verb(verbs: Any) -> None:
    """What a method costs on a model, from shapes."""
    verb = _verb(verbs, "params", _params, "count what a method trains and saves, and estimate the memory of training",
                 "minilora params llama-2-7b --method lora --r 8 --targets q_proj v_proj")
    verb.add_argument("model", help=f"a folder with config.json, such a file, a hub id, or one of {', '.join(SHAPES)}")
    verb.add_argument("--method", default="lora", choices=METHOD_NAMES, help="full trains every parameter (default lora)")
    verb.add_argument("--r", type=int, metavar="N", help="the rank (default: the method's own, 8 for LoRA)")
    verb.add_argument("--targets", nargs="+", metavar="NAME", help="layers to adapt, or all-linear (default: the method's own)")
    verb.add_argument("--batch", type=int, default=1, metavar="N", help="sequences in a batch (default 1)")
    verb.add_argument("--tokens", type=int, metavar="N", help="tokens in a sequence (default 512, or the most it takes)")
    verb.add_argument("--recompute", action="store_true", help="keep only the inputs of the layers")
    _json(verb)


def _course_verb(verbs: Any) -> None:
    command.arguments(_verb(verbs, "course", None, "build the course's notebooks, grade answers, write the teacher's sheet",
                            "minilora course grade submitted/*.ipynb --csv marks.csv"))


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")


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
    _seed(args)
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: expected a whole number of at least 1")
    study = STUDIES[args.name]
    report = study.run(Options(args.size, args.seed, args.out, seeds=args.seeds, workers=args.workers))
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
    if args.figure is not None:
        if args.figure.suffix != ".png":
            raise ValueError(f"--figure {args.figure}: expected a name that ends in .png")
        writable_folder(args.figure.parent, "--figure")
    report = analyze(args.directory, args.base)
    if args.figure is not None:
        plots.save(plots.adapter_map(report.to_dict()), args.figure.with_suffix(""))
    _print(report, args)


def _generate(args: argparse.Namespace) -> None:
    _seed(args)
    model, tokenizer = tasks.load_base(args.model, None if args.adapter is None else tasks.trained_on(args.adapter))
    if args.adapter is not None:
        load_adapter(model, args.adapter)
    for piece in stream_text(model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, chat=args.chat,
                             temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed):
        print(piece, end="", flush=True)
    print()


def _merge(args: argparse.Namespace) -> None:
    _print(merge_checkpoint(args.base, args.directory, args.out, untie=args.untie, force=args.force,
                            dequantise=args.dequantise, progress=True), args)


def _resize(args: argparse.Namespace) -> None:
    _print(resize(args.directory, args.out, rank=args.rank, energy=args.energy, force=args.force, progress=True), args)


def _compose(args: argparse.Namespace) -> None:
    _print(compose(args.directories, args.out, args.weights, args.how, rank=args.rank, force=args.force, progress=True), args)


def _extract(args: argparse.Namespace) -> None:
    _print(extract(args.base, args.tuned, args.out, rank=args.rank, energy=args.energy, target_modules=args.target_modules,
                   force=args.force, progress=True), args)


def _finetune(args: argparse.Namespace) -> None:
    names = ("r", "lora_dropout", "dropout", "lr", "epochs", "steps", "batch", "tokens", "max_length", "warmup", "schedule",
             "quantise")
    settings = {name: getattr(args, name) for name in names}
    targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    report = tasks.finetune(
        args.model, args.data, args.task, eval=args.eval, out=args.out or f"{args.task}-adapter", force=args.force,
        text_column=args.text_column, label_column=args.label_column, labels=args.labels, eval_share=args.eval_share,
        limit=args.limit, seed=args.seed, lora_alpha=args.alpha, target_modules=targets, **settings)
    _print(report, args)


def _predict(args: argparse.Namespace) -> None:
    texts = args.texts or [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    found = tasks.predict(args.directory, texts, base=args.base)
    if args.json:
        print(json.dumps([vars(each) if isinstance(each, tasks.Prediction) else each for each in found]))
        return
    for text, each in zip(texts, found):
        if isinstance(each, tasks.Prediction):
            print(f"{each.label}\t{each.score:.3f}\t{text}")
        else:
            print(each if isinstance(each, str) else " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in each))


def _params(args: argparse.Namespace) -> None:
    targets = args.targets[0] if args.targets == ["all-linear"] else args.targets
    config = config_for(args.method, args.r, targets)
    _print(params(args.model, config, batch=args.batch, tokens=args.tokens, recompute=args.recompute), args)


def _reference(args: argparse.Namespace) -> None:
    print("\n".join(str(path) for path in reference.write(args.out, force=args.force)))


def _verify(args: argparse.Namespace) -> int:
    report = reference.verify(args.directory, args.theirs)
    _print(report, args)
    return 0 if report.passed else 1


def _seed(args: argparse.Namespace) -> None:
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected a whole number of at least 0")


def _print(report: Any, args: argparse.Namespace) -> None:
    print(json.dumps(report.to_dict()) if args.json else report.table())


def _complain(error: Any, code: int) -> int:
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    print(f"minilora: {' '.join(str(text).split())}", file=sys.stderr)
    return code
