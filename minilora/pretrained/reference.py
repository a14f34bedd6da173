"""Check your own LoRA, in any language: test cases as safetensors, and a judge that says what a wrong answer usually means.

The right answers come from the library itself: LoRALinear and its gradients, LoRA.adapted_weight, AdamW. A wrong answer is
often the right answer to another question (a scale of s², a mask of ones, a transposed W), so a mistake is known by
answering that question, again with the library, and comparing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..autograd.linear import LoRALinear
from ..autograd.tensor import Tensor
from ..lora import Adaptation, LoRA, LoraConfig, LoRAEmbedding
from ..nn import Embedding, Linear, Parameter
from ..rank.report import text_table
from ..training.optim import AdamW
from . import reference_methods
from .tensors import TensorFile, new_folder

Arrays = dict[str, np.ndarray]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}            # of the largest expected value
OPTIONS: dict[str, Any] = {"r": 3, "lora_alpha": 12.0, "use_rslora": False, "p": 0.25, "lr": 0.05, "beta1": 0.9, "beta2": 0.98,
                           "eps": 1e-3, "weight_decay": 0.1, "optimiser": "adamw", "gradient_scale": 1.0, "last_only": False,
                           "detach_norm": True, "method": ""}      # method: a kind of reference_methods.CASES, or none
LAYER = "y = x Wᵀ + b + s·(x∘M) Aᵀ Bᵀ with s = lora_alpha/r (rslora: lora_alpha/√r); b = 0 without `bias`, M = 1 without `keep`"
FORMULAS = {
    "y": LAYER + "; with `keep` (0 or 1): M = keep/(1-p), on the branch's input only",
    "dx": "gradient of Σ y∘dy towards x", "dA": "the same towards A", "dB": "the same towards B",
    "merged": "W + s·B A; of an embedding table (V, D): W + s·(B A)ᵀ",
    "A_step": "A after the first AdamW step with the gradient gA: m = (1-β₁)g, v = (1-β₂)g², m̂ = m/(1-β₁), v̂ = v/(1-β₂), "
              "A - lr·weight_decay·A - lr·m̂/(√v̂ + eps)",
    "B_step": "the same of B with gB", "p1": "p after a first AdamW step with g1, as A_step", "p2": "then a second with g2",
}
EMBEDDING = "y = W[ids] + s·A[:, ids]ᵀ Bᵀ with A (r, V), B (D, r), s = lora_alpha/r"
README = """Test cases for implementations of LoRA, in any language.

Each *.safetensors file is one case. Its metadata has the numbers (lora_alpha, r, p, lr ...), the names of the inputs and of
the answers, and the formula of every answer. Read the inputs, compute the answers, and write them under the same names into a
file of the same name in a folder of your own; a missing answer is no error. Then run

    minilora verify THIS_FOLDER YOUR_FOLDER

It compares each answer with the one in this folder. The error is max|yours - expected| / max|expected|; allowed are 1e-10 in
the float64 cases and 1e-5 in the float32 cases (whose expected answers were computed in float64 from the float32 inputs).

Shapes: x (n, in), W (out, in), bias (out,), A (r, in), B (out, r), dy as y; of an embedding: ids (n,), W (V, D), A (r, V),
B (D, r). Cases whose metadata has a `method` are LoRA's relatives on one linear layer: W' is the adapted weight, lora_A and
lora_B are A and B, and the gradient towards an input NAME is the answer d_NAME. eps is large on purpose: so the place where
it is added shows.
"""


def write(out: str | os.PathLike[str], *, force: bool = False, seed: int = 0) -> list[Path]:
    """Write the test cases and a README.txt to the folder `out`; returns the paths. force: it may hold files already.

    Raises ValueError if `out` cannot be used; then nothing is left in it.
    """
    out = Path(out)
    with new_folder(out, force=force) as folder:
        for name, (options, inputs) in _cases(seed).items():
            right, dtype = answers(inputs, options), name.rpartition("-")[2]
            said = reference_methods.formulas_of(options["method"], right) if options["method"] else {
                key: FORMULAS[key] for key in right} | ({"y": EMBEDDING} if "ids" in inputs else {})
            silent = ("optimiser", "gradient_scale", "last_only", *(() if options["method"] else ("method", "detach_norm")))
            facts = {key: str(value) for key, value in options.items() if key not in silent}
            metadata = facts | {f"formula {key}": text for key, text in said.items()} | {
                "inputs": " ".join(inputs), "answers": " ".join(right)}
            tensors = inputs | {key: value.astype(dtype) for key, value in right.items()}
            content = safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in tensors.items()}, metadata)
            (folder / f"{name}.safetensors").write_bytes(content)
        (folder / "README.txt").write_text(README, encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
    return [out / name for name in names]


def _cases(seed: int) -> dict[str, tuple[dict[str, Any], Arrays]]:
    """Name -> (options, inputs): every kind in float64 and in float32, which has the same numbers rounded."""
    rng, cases = np.random.default_rng(seed), dict[str, tuple[dict[str, Any], Arrays]]()

    def add(kind: str, inputs: Arrays, **changes: Any) -> None:
        for dtype in TOLERANCE:
            rounded = {key: value.astype(dtype) if value.dtype.kind == "f" else value for key, value in inputs.items()}
            options = OPTIONS | changes
            if "A" in rounded:                             # the step's gradients are given, so that it is checked by itself
                found = answers(rounded, options)
                rounded |= {"gA": found["dA"].astype(dtype), "gB": found["dB"].astype(dtype)}
            cases[f"{kind}-{dtype}"] = options, rounded

    def layer(n: int, d_in: int, d_out: int) -> Arrays:
        shapes = {"x": (n, d_in), "W": (d_out, d_in), "A": (3, d_in), "B": (d_out, 3), "dy": (n, d_out)}
        return {key: rng.standard_normal(shape) * (0.01 if key == "dy" else 1.0) for key, shape in shapes.items()}

    add("linear", layer(5, 7, 6))
    add("bias", layer(4, 5, 8) | {"bias": rng.standard_normal(8)})
    add("square", layer(5, 6, 6))                          # where a transposed matrix is not noticed by its shape
    add("rslora", layer(5, 7, 6), use_rslora=True)
    add("dropout", layer(6, 8, 5) | {"keep": (rng.random((6, 8)) > 0.25).astype(float)})
    add("embedding", {"ids": np.array([3, 0, 3, 9, 3, 1]), "W": rng.standard_normal((10, 6)), "A": rng.standard_normal((3, 10)),
                      "B": rng.standard_normal((6, 3)), "dy": rng.standard_normal((6, 6)) * 0.01})
    add("adamw", {key: rng.standard_normal((4, 3)) * size for key, size in (("p", 1.0), ("g1", 0.02), ("g2", 0.05))})
    for kind, (_, changes, _) in reference_methods.CASES.items():
        add(kind, reference_methods.inputs_of(kind, OPTIONS | changes, rng), method=kind, **changes)
    return cases


def answers(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    """The library's answers to one case, computed in float64. `options` as in the case's metadata."""
    given: dict[str, Any] = {key: value.astype(np.float64) if value.dtype.kind == "f" else value
                             for key, value in inputs.items()}
    if options["method"]:
        return reference_methods.answers_of(given, options)
    if "p" in given:
        steps = _step(given["p"], [given["g1"], given["g2"]], options)
        return {"p1": steps[0], "p2": steps[1]}
    W, A, B = (Parameter(given[key].copy()) for key in ("W", "A", "B"))
    config = LoraConfig(r=options["r"], lora_alpha=options["lora_alpha"], use_rslora=options["use_rslora"])
    layer: Any = Embedding(W.data) if "ids" in given else Linear(W.data)
    adapter: Any = (LoRAEmbedding if "ids" in given else LoRA)(layer, config, ("",), np.random.default_rng(0))
    names = ("lora_embedding_A", "lora_embedding_B") if "ids" in given else ("lora_A", "lora_B")
    for name, factor in zip(names, (A, B), strict=True):
        setattr(adapter, name, factor)
    adapter.base_scale = options.get("scale", adapter.base_scale)
    W.requires_grad = False
    found = {}
    if "ids" in given:
        layer.weight, layer.adaptation = W, Adaptation()
        layer.adaptation.adapters, layer.adaptation.active = {"default": adapter}, ["default"]
        y = layer(given["ids"])
    else:
        x = Tensor(given["x"], requires_grad=True)
        mask = given["keep"] * options.get("keep_scale", 1.0 / (1.0 - options["p"])) if "keep" in given else None
        bias = Tensor(given["bias"]) if "bias" in given else None
        y = LoRALinear([float(adapter.scale)], [slice(0, W.shape[0])], [mask], formed=False)(x, W, bias, A, B)
    dy = given["dy"] * options["gradient_scale"]
    if options["last_only"]:                               # of repeated ids only the last one counts
        dy = dy * np.array([i not in given["ids"][j + 1 :] for j, i in enumerate(given["ids"])])[:, None]
    y.backward(dy)
    found = {"y": y.data} | ({} if "ids" in given else {"dx": x.grad}) | {"dA": A.grad, "dB": B.grad}
    found["merged"] = adapter.adapted_weight(W).data
    if "gA" in given:
        found |= {f"{key}_step": _step(given[key], [given[f"g{key}"]], options)[0] for key in "AB"}
    return found


def _step(p: np.ndarray, gradients: list[np.ndarray], options: dict[str, Any]) -> list[np.ndarray]:
    """The parameter after each of the first AdamW steps, or after those of a mistake that AdamW cannot make."""
    lr, beta1, beta2, eps, decay = (options[key] for key in ("lr", "beta1", "beta2", "eps", "weight_decay"))
    kind, steps = options["optimiser"], []
    parameter, m, v = Parameter(p.copy()), np.zeros_like(p), np.zeros_like(p)
    optimiser = AdamW([parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0 if kind == "coupled" else decay)
    for t, g in enumerate(gradients, 1):
        if kind in ("adamw", "coupled"):
            parameter.grad = g + decay * parameter.data if kind == "coupled" else g.copy()
            optimiser.step()
        else:
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
            update = {"eps inside": m_hat / (v_hat + eps) ** 0.5, "no root": m_hat / (v_hat + eps),
                      "eps early": m_hat * (1 - beta2**t) ** 0.5 / (v**0.5 + eps), "uncorrected": m / (v**0.5 + eps)}[kind]
            parameter.data[...] = parameter.data - lr * decay * parameter.data - lr * update
        steps.append(parameter.data.copy())
    return steps


# What a wrong answer usually means: the mistake in words, and the changed question (options, inputs) whose answer it is.
Change = Callable[[dict[str, Any], Arrays], tuple[dict[str, Any], Arrays]]


def _scale(of: Callable[[float, dict[str, Any]], float]) -> Change:
    def change(options: dict[str, Any], inputs: Arrays) -> tuple[dict[str, Any], Arrays]:
        s = options["lora_alpha"] / options["r"] ** (0.5 if options["use_rslora"] else 1.0)
        return options | {"scale": of(s, options)}, inputs
    return change


def _given(**changes: Callable[[Arrays], np.ndarray]) -> Change:
    return lambda options, inputs: (options, inputs | {key: of(inputs) for key, of in changes.items() if key in inputs})


def _options(**changes: Any) -> Change:
    return lambda options, inputs: (options | changes, inputs)


MISTAKES: dict[str, Change] = {
    "the scale is applied twice (s²): once is in the layer already, or in B": _scale(lambda s, o: s * s),
    "the scale alpha/r is missing: the update is B·A alone": _scale(lambda s, o: 1.0),
    "the scale is alpha: it was not divided by r (or √r)": _scale(lambda s, o: o["lora_alpha"]),
    "the scale is alpha/r in a case of rsLoRA, or alpha/√r in another": _scale(
        lambda s, o: o["lora_alpha"] / o["r"] ** (1.0 if o["use_rslora"] else 0.5)),
    "the scale is r/alpha: the fraction is upside down": _scale(lambda s, o: 1.0 / s),
    "the sign is wrong: the update is subtracted": _scale(lambda s, o: -s),
    "the update is missing: the base alone was used": _scale(lambda s, o: 0.0),
    "the base is missing: this is the update's part alone": _given(W=lambda i: 0 * i["W"], bias=lambda i: 0 * i["bias"]),
    "W is transposed: it is (out, in), so y = x Wᵀ, with no fan_in_fan_out": _given(
        W=lambda i: i["W"].T if len(set(i["W"].shape)) == 1 else i["W"]),
    "A and B are swapped or transposed: the update is B·A with A (r, in), B (out, r), not its transpose": lambda o, i: (
        o, i | {"A": i["B"].T, "B": i["A"].T} if "A" in i and len(set(i["W"].shape)) == 1 else i),
    "the bias is missing": _given(bias=lambda i: 0 * i["bias"]),
    "the bias is added twice": _given(bias=lambda i: 2 * i["bias"]),
    "dropout is not rescaled: the mask is keep/(1-p), not keep": _options(keep_scale=1.0),
    "dropout is rescaled by (1-p) in place of 1/(1-p)": lambda o, i: (o | {"keep_scale": 1.0 - o["p"]}, i),
    "dropout's mask is not applied": lambda o, i: (
        o | {"keep_scale": 1.0}, i | {"keep": np.ones_like(i["keep"])} if "keep" in i else i),
    "dropout is also on the base: the mask is for the branch's input alone": lambda o, i: (
        o | {"keep_scale": 1.0}, i | {"x": i["x"] * i["keep"] / (1.0 - o["p"])} if "keep" in i else i),
    "the gradients are divided by the number of rows: the loss is a sum, Σ y∘dy": lambda o, i: (
        o | {"gradient_scale": 1.0 / len(i["dy"])} if "dy" in i else o, i),
    "dy is not used: these are the gradients of Σ y": _given(dy=lambda i: np.ones_like(i["dy"])),
    "DoRA's ‖V‖ is held constant in a case where the gradient goes through it, or the other way round": lambda o, i: (
        o | {"detach_norm": not o["detach_norm"]}, i),
    "repeated ids do not add up: each row of dA must sum over all places of its id": lambda o, i: (
        o | {"last_only": "ids" in i}, i),
    "weight decay is coupled: it went through the gradient and √v (Adam with L2), where AdamW takes lr·weight_decay·p from p":
        _options(optimiser="coupled"),
    "weight decay is missing": _options(weight_decay=0.0),
    "weight decay is not multiplied by the learning rate": lambda o, i: (o | {"weight_decay": o["weight_decay"] / o["lr"]}, i),
    "eps is inside the root: it is √v̂ + eps, not √(v̂ + eps)": _options(optimiser="eps inside"),
    "eps is added before the bias correction: it is √v̂ + eps, with v̂ corrected": _options(optimiser="eps early"),
    "bias correction is missing: m and v were used where m̂ and v̂ belong": _options(optimiser="uncorrected"),
    "the root is missing: the step is m̂/(√v̂ + eps), not m̂/(v̂ + eps)": _options(optimiser="no root"),
    "beta1 and beta2 are swapped": lambda o, i: (o | {"beta1": o["beta2"], "beta2": o["beta1"]}, i),
    "the step goes uphill: lr·m̂/(√v̂ + eps) is subtracted": lambda o, i: (
        o, i | {key: -i[key] for key in ("gA", "gB", "g1", "g2") if key in i}),
}
DIRECT: dict[str, tuple[str, Callable[[Any, Arrays, float], Any]]] = {     # mistakes in one gradient alone
    "the scale is missing in this gradient alone": ("dA dB", lambda right, i, s: right / s),
    "the scale is applied twice in this gradient alone": ("dA dB", lambda right, i, s: right * s),
    "the branch is missing in dx: it is dy·W + s·(dy·B·A)∘M": ("dx", lambda right, i, s: i["dy"] @ i["W"]),
    "the mask is missing in dx's branch: it is dy·W + s·(dy·B·A)∘M": (
        "dx", lambda right, i, s: i["dy"] @ i["W"] + s * (i["dy"] @ i["B"]) @ i["A"]),
}


@dataclass
class VerifyReport:
    """What `verify` found. rows: "case: answer" -> error, tolerance, verdict, diagnosis."""

    rows: dict[str, dict[str, Any]]

    @property
    def passed(self) -> bool:
        """Whether no answer is wrong. (A missing one is not wrong.)"""
        return not any(row["verdict"] == "wrong" for row in self.rows.values())

    def summary(self) -> dict[str, int]:
        """How many answers are right, wrong and missing."""
        verdicts = [row["verdict"] for row in self.rows.values()]
        return {verdict: verdicts.count(verdict) for verdict in ("right", "wrong", "missing")}

    def to_dict(self) -> dict[str, Any]:
        """{"passed", "summary", "answers"}, ready for JSON."""
        return {"passed": self.passed, "summary": self.summary(), "answers": self.rows}

    def table(self) -> str:
        """The answers as rows of text, then each wrong one's diagnosis, then the sums."""
        head, *lines = text_table({"verdict": "verdict", "error": "error", "tolerance": "allowed"}, self.rows)
        said = [f"{name}: {row['diagnosis']}" for name, row in self.rows.items() if row["diagnosis"]]
        return "\n".join([head.replace("module", "answer", 1), *lines, *said,
                          ", ".join(f"{count} {verdict}" for verdict, count in self.summary().items())])

    __str__ = table


def verify(directory: str | os.PathLike[str], theirs: str | os.PathLike[str]) -> VerifyReport:
    """Compare the answers in the folder `theirs` with the cases in `directory`, and say what is wrong with wrong ones.

    Each answer's error is max|theirs - expected| / max|expected|. Raises FileNotFoundError and ValueError for folders without
    cases or without any answer, and for files that are damaged.
    """
    cases, answered = Path(directory), Path(theirs)
    paths = sorted(cases.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{cases} has no test cases: expected the folder that `minilora reference -o` wrote")
    if not any((answered / path.name).exists() for path in paths):
        raise FileNotFoundError(f"{answered} has none of the cases' answers: expected files such as {paths[0].name}, as "
                                f"{cases}/README.txt says")
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        tensors, metadata = _load(path)
        try:
            options = OPTIONS | {key: type(value)(metadata[key] == "True" if isinstance(value, bool) else metadata[key])
                                 for key, value in OPTIONS.items() if key in metadata}
            inputs = {key: tensors[key] for key in metadata["inputs"].split()}
            expected = {key: tensors[key] for key in metadata["answers"].split()}
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is no test case ({error}): write the folder again with `minilora reference`") from None
        got = _load(answered / path.name)[0] if (answered / path.name).exists() else {}
        rows |= _judged(path.stem, options, inputs, expected, got)
    return VerifyReport(rows)


def _load(path: Path) -> tuple[Arrays, dict[str, str]]:
    file = TensorFile(path)                                # checks the header
    try:
        return safetensors.numpy.load_file(path), file.metadata
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has a dtype that NumPy lacks ({error}): expected the case's own") from None


def _judged(case: str, options: dict[str, Any], inputs: Arrays, expected: Arrays, got: Arrays) -> dict[str, dict[str, Any]]:
    """The rows of one case."""
    tolerance = TOLERANCE[case.rpartition("-")[2]]
    errors = {key: _error(got[key], value) if key in got else None for key, value in expected.items()}
    wrong = [key for key, error in errors.items() if error is not None and not error <= tolerance]
    right = [key for key, error in errors.items() if error is not None and key not in wrong]
    explained = _explained(options, inputs, expected, {key: got[key] for key in wrong}, right, tolerance) if wrong else {}
    return {f"{case}: {key}": {"error": None if error is None or not np.isfinite(error) else error, "tolerance": tolerance,
                               "verdict": "missing" if error is None else "wrong" if key in wrong else "right",
                               "diagnosis": explained.get(key)} for key, error in errors.items()}


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    """max|got - expected| / max|expected|; infinite where shapes differ or a value is not finite."""
    if got.shape != expected.shape or got.dtype.kind not in "fiu" or not np.isfinite(got).all():
        return float("inf")
    with np.errstate(over="ignore"):
        return float(abs(got.astype(np.float64) - expected).max() / (abs(expected).max() or 1.0))


def _explained(options: dict[str, Any], inputs: Arrays, expected: Arrays, wrong: Arrays, right: list[str],
               tolerance: float) -> dict[str, str]:
    """Wrong answer -> its likely mistake: of those that fit, the one that explains most wrong answers of the case, and would
    have spoiled fewest of the right ones."""
    fits: dict[str, list[str]] = {key: [] for key in wrong}
    spoiled = dict.fromkeys([*MISTAKES, *DIRECT], 0)
    for mistake, change in MISTAKES.items():
        other = answers(*reversed(change(options, inputs)))
        for key, value in wrong.items():
            if _error(value, other[key]) <= 10 * tolerance < _error(other[key], expected[key]):
                fits[key].append(mistake)
        spoiled[mistake] = sum(_error(other[key], expected[key]) > 10 * tolerance for key in right)
    s = options["lora_alpha"] / options["r"] ** (0.5 if options["use_rslora"] else 1.0)
    wide = {key: value.astype(np.float64) for key, value in inputs.items()}
    for mistake, (keys, of) in DIRECT.items():
        for key in wrong.keys() & set(keys.split()):
            if {"dy", "A", "B"} <= wide.keys() and ("x" in wide or key != "dx"):
                other_value = of(expected[key].astype(np.float64), wide, s)
                if _error(wrong[key], other_value) <= 10 * tolerance < _error(other_value, expected[key]):
                    fits[key].append(mistake)
    score = {mistake: sum(mistake in found for found in fits.values()) - lost for mistake, lost in spoiled.items()}
    return {key: max(found, key=lambda mistake: score[mistake]) if found else _general(wrong[key], expected[key], tolerance)
            for key, found in fits.items()}


def _general(got: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
    """What can be said where no known mistake fits."""
    if got.shape != expected.shape:
        turned = got.ndim == 2 and got.T.shape == expected.shape and _error(got.T, expected) <= 10 * tolerance
        return f"got shape {got.shape}, expected {expected.shape}" + (": it is right but transposed" if turned else "")
    if got.dtype.kind not in "fiu" or not np.isfinite(got).all():
        return f"got {got.dtype} with values that are no finite numbers"
    if got.ndim == 2 and got.T.shape == expected.shape and _error(got.T, expected) <= 10 * tolerance:
        return "it is right but transposed"
    factor = float(np.vdot(expected, got) / np.vdot(expected, expected))
    if factor and _error(got / factor, expected) <= 10 * tolerance:
        return f"it is {factor:.6g} times the right answer"
    if _error(got, expected) <= 100 * TOLERANCE["float32"] and tolerance < TOLERANCE["float32"]:
        return "it is right to float32: this case is to be computed in float64"
    return "no known mistake gives these numbers: compare with the formula in the file's metadata"
