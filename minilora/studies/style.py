"""LoRA on SmolLM2 for a format: explain names of Python's library, in JSON. Small enough for a few minutes on a CPU.

The pairs come from the docstrings that every Python carries: "What is math.gcd in Python?" and an object with the name, the
kind and the first sentence. Names held out are new to the model, so it can learn the form of an answer but not its words;
measured are the loss on held-out answers, and how many greedy answers are such an object.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import plots
from ..data import Passage
from ..tasks import TASKS, Predictor, fit, prepare
from .common import Options, say, writable_folder, write_json

QUESTION = "Can a few minutes of LoRA on a CPU teach SmolLM2 to answer in JSON?"
SOURCE = "smollm2-135m"
MODULES = ("builtins", "math", "os.path", "itertools", "functools", "random", "statistics", "string", "textwrap", "shutil",
           "json", "re", "time", "operator", "heapq", "bisect", "copy", "glob", "gzip", "inspect")
TYPES = ("str", "list", "dict", "set", "bytes", "int", "float")
KEYS = ["name", "kind", "summary"]


@dataclass(frozen=True)
class Size:
    """How much is trained and asked."""

    pairs: int
    held: int
    asked: int
    settings: dict[str, Any]


SIZES = {
    "quick": Size(24, 6, 1, {"steps": 5, "batch": 2, "lr": 2e-3}),
    "default": Size(340, 40, 10, {"steps": 80, "batch": 4, "lr": 1e-3}),
    "full": Size(420, 60, 20, {"steps": 160, "batch": 4, "lr": 1e-3}),
}


def pairs() -> list[Passage]:
    """A question and its answer for every documented public function and method, in the order of their names.

    Of several with the same summary only the first stays, or a held-out one could stand in the training pairs.
    """
    found = {}
    for module in MODULES:
        home = importlib.import_module(module)
        for name, thing in vars(home).items():
            if not name.startswith("_") and inspect.isroutine(thing) and (summary := _summary(thing)):
                path = name if module == "builtins" else f"{module}.{name}"
                found[path] = ("function", summary)
    for name in TYPES:
        for method, thing in vars(getattr(importlib.import_module("builtins"), name)).items():
            if not method.startswith("_") and callable(thing) and (summary := _summary(thing)):
                found[f"{name}.{method}"] = ("method", summary)
    first = {summary: path for path, (_, summary) in reversed(found.items())}
    return [Passage(json.dumps(dict(zip(KEYS, (path, kind, summary))), ensure_ascii=False), i, f"What is {path} in Python?")
            for i, (path, (kind, summary)) in enumerate(sorted(found.items()), 1) if first[summary] == path]


def run(options: Options) -> dict[str, Any]:
    """Train, ask before and after, write figures/style.{png,svg,json}, and return the report."""
    start, out, size = time.perf_counter(), writable_folder(options.out), SIZES[options.size]
    known = pairs()
    order = np.random.default_rng(options.seed).permutation(len(known))[: size.pairs]
    chosen = [known[i] for i in order]
    train, held = chosen[size.held :], chosen[: size.held]
    say(f"{len(train)} names to learn from, {len(held)} held out")
    prepared = prepare(SOURCE, "text", train, held, TASKS["text"].settings.with_(**size.settings), seed=options.seed,
                       where="the library's docstrings", eval_where="the library's docstrings", progress=options.progress)
    asked = [str(pair.prompt) for pair in held[: size.asked]]
    predictor = Predictor(prepared.model, prepared.tokenizer, "text", [], prepared.encoder.max_length)
    before, answers = prepared.evaluate(), predictor.predict(asked)
    say("training")
    history = fit(prepared)
    after, later = prepared.evaluate(), predictor.predict(asked)
    report = {
        "study": "style", "size": options.size, "seed": options.seed, "base": SOURCE, "names": len(known),
        "sha256": hashlib.sha256("\n".join(f"{p.prompt}\n{p.text}" for p in known).encode()).hexdigest(),
        "train": len(train), "held_out": len(held), "settings": prepared.settings.to_dict(), "steps": prepared.config.steps,
        "before": before | {"in_form": float(np.mean([in_form(a) for a in answers]))},
        "after": after | {"in_form": float(np.mean([in_form(a) for a in later]))},
        "samples": [{"prompt": q, "expected": pair.text, "before": a, "after": b}
                    for q, pair, a, b in zip(asked, held, answers, later)],
        "losses": history.loss, "training_seconds": history.seconds, "seconds": time.perf_counter() - start}
    write_json(out / "style.json", report)
    plots.save(plots.answers(report), out / "style")
    return report


def in_form(answer: str) -> bool:
    """Whether an answer is a JSON object with just the three keys, all texts."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and list(found) == KEYS and all(isinstance(value, str) for value in found.values())


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    before, after, sample = report["before"], report["after"], report["samples"][0]
    return "\n".join([
        f"LoRA (r = {report['settings']['r']}) on q and v of {report['base']}, {report['train']} names of Python's library, "
        f"{report['steps']} steps in {report['training_seconds']:.0f} s",
        "",
        f"    {'':40}{'before':>9}{'after':>9}",
        f"    {'loss on held-out answers, nats a token':40}{before['loss']:>9.3f}{after['loss']:>9.3f}",
        f"    {'perplexity':40}{before['perplexity']:>9.2f}{after['perplexity']:>9.2f}",
        f"    {'greedy answers with just the three keys':40}{before['in_form']:>9.0%}{after['in_form']:>9.0%}"
        f"   of {len(report['samples'])}",
        "",
        f"    {sample['prompt']}",
        f"    before: {_one_line(sample['before'])}",
        f"    after:  {_one_line(sample['after'])}",
        f"    {report['seconds']:.0f} s",
    ])


def _summary(thing: Any) -> str | None:
    """The first sentence of a docstring, if it has one of a fair length."""
    lines = (inspect.getdoc(thing) or "").split("\n\n")
    texts = [" ".join(part.split()) for part in lines[:2]]
    text = next((t for t in texts if t and "->" not in t and t.endswith(".")), "")
    sentence = text.partition(". ")[0].rstrip(".") + "."
    return sentence if 15 <= len(sentence) <= 120 else None


def _one_line(text: str, length: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
