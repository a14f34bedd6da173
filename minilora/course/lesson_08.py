"""Lesson 08: real models. Does it hold outside the toy?

Names and sizes are judged against the library's own tables and a file that is written; an adapter's ΔW against the library's
reader; a silent adapter by which repair would make it act. None of it needs a real model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save, save_file

from ..lora.peft_format import CONFIG, WEIGHTS
from ..nn import TransformerConfig
from ..nn.names import file_names
from ..rank import updates
from .diagnose import agree
from .exercise import Case, Exercise, Mistake

PREFIX = "base_model.model."
KINDS = {"attention.self.query": "attn.q_proj", "attention.self.key": "attn.k_proj", "attention.self.value": "attn.v_proj",
         "attention.output.dense": "attn.o_proj", "intermediate.dense": "mlp.up_proj", "output.dense": "mlp.down_proj"}


# ------------------------------------------------------------------------------------------------------- 8.1 names
@cache
def bert_names() -> dict[str, str]:
    """The file's name of each linear layer of a BERT of twelve layers, with and without "bert." -> ours."""
    cfg = TransformerConfig(vocab_size=30, d_model=4, n_layers=12, n_heads=1, model_type="bert")
    names = {theirs.removeprefix("bert."): ours for ours, theirs in file_names(cfg).items() if "_proj" in ours}
    return names | {f"bert.{theirs}": ours for theirs, ours in names.items()}


def name_cases(rng: np.random.Generator) -> list[Case]:
    """Each kind of layer twice, in a layer with one digit and in one with two."""
    return [{"name": f"{first}encoder.layer.{rng.integers(*digits)}.{kind}"}
            for kind in KINDS for first, digits in (("", (1, 10)), ("bert.", (10, 12)))]


def named(layer: Callable[[str], Any] = str, ending: Callable[[str], str | None] = KINDS.get, first: str = "") -> Any:
    """A wrong map of names: layer(number) and ending(rest) as they are given; first: kept before "layers"."""
    def answer(name: str) -> str:
        number, _, rest = name.removeprefix("bert.").removeprefix("encoder.layer.").partition(".")
        kept = first if name.startswith("bert.") else ""
        return f"{kept}layers.{layer(number)}.{ending(rest)}"
    return answer


def replaced_in_turn(name: str) -> str:
    """str.replace with the short ending first, which breaks the long one."""
    name = name.removeprefix("bert.").replace("encoder.layer", "layers")
    for kind in sorted(KINDS, key=lambda kind: (kind != "output.dense", kind)):
        name = name.replace(kind, KINDS[kind])
    return name


def by_ending(rest: str) -> str | None:
    """The first kind, in this order, with whose last words the name ends."""
    kinds = ("output.dense", "intermediate.dense", "attention.self.query", "attention.self.key", "attention.self.value")
    return next((KINDS[kind] for kind in kinds if rest.endswith(kind)), None)


def changed(**others: str) -> Callable[[str], str]:
    """The kinds, with some parts of our names replaced."""
    def ending(rest: str) -> str:
        ours = KINDS[rest]
        for old, new in others.items():
            ours = ours.replace(old, new)
        return ours
    return ending


# ------------------------------------------------------------------------------------------------------- 8.2 sizes
def size_cases(rng: np.random.Generator) -> list[Case]:
    """Targets of several shapes, with and without a classifier, in 4 and in 2 bytes."""
    return [{"targets": [(24, 24)] * 3 + [(24, 7)], "r": 2, "head": (3, 24), "bytes_each": 4},
            {"targets": [(int(n), 11) for n in rng.integers(12, 40, 5)], "r": 3, "head": None, "bytes_each": 2},
            {"targets": [(1, 9), (8, 1)], "r": 1, "head": (2, 5), "bytes_each": 2}]


def written_bytes(targets: list[tuple[int, int]], r: int, head: tuple[int, int] | None, bytes_each: int) -> int:
    """Write such a file, and count what follows its header."""
    dtype = {2: np.float16, 4: np.float32}[bytes_each]
    tensors: dict[str, Any] = {}
    for i, (out, inn) in enumerate(targets):
        tensors |= {f"{i}.lora_A.weight": np.zeros((r, inn), dtype), f"{i}.lora_B.weight": np.zeros((out, r), dtype)}
    if head is not None:
        tensors |= {"classifier.weight": np.zeros(head, dtype), "classifier.bias": np.zeros(head[0], dtype)}
    file = save(tensors)
    return len(file) - 8 - int.from_bytes(file[:8], "little")


def counted(each: Callable[[int, int, int], int], head_of: Callable[[int, int], int] = lambda n, d: n * d + n,
            size: Callable[[int], int] = lambda b: b) -> Any:
    """A wrong size: each(out, in, r) numbers for a target, head_of(labels, d) for the classifier, size(bytes) for a number."""
    def answer(targets: list[tuple[int, int]], r: int, head: tuple[int, int] | None, bytes_each: int) -> int:
        return size(bytes_each) * (sum(each(out, inn, r) for out, inn in targets) + (head_of(*head) if head else 0))
    return answer


def thin(out: int, inn: int, r: int) -> int:
    return r * (out + inn)


# ------------------------------------------------------------------------------------------------------- 8.3 ΔW from files
FLOAT = "form ΔW in float64: factors of float32 lose digits in the product"
DELTAS = "expected a dict: module -> ΔW (out, in), with the module's path as in the file, without base_model.model."
FORMS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 12, "use_rslora": False}, {"r": 4, "lora_alpha": 12, "use_rslora": True},
    {"r": 1, "lora_alpha": 3, "use_rslora": False})
SHAPES = {"bert.encoder.layer.0.attention.self.query": (6, 5), "bert.encoder.layer.10.output.dense": (4, 9)}


def write_adapter(folder: str, form: dict[str, Any], rng: np.random.Generator) -> None:
    """A folder as PEFT writes it: two modules, a classifier saved whole, and the config."""
    tensors = {PREFIX + "classifier.weight": rng.standard_normal((2, 6)).astype(np.float32)}
    for module, (out, inn) in SHAPES.items():
        for factor, shape in (("A", (form["r"], inn)), ("B", (out, form["r"]))):
            tensors[f"{PREFIX}{module}.lora_{factor}.weight"] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, Path(folder) / WEIGHTS)
    config = {"peft_type": "LORA", "target_modules": list(SHAPES), "modules_to_save": ["classifier"], **form}
    (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def deltas_agree(answer: Callable[..., Any], rng: np.random.Generator) -> str | None:
    """ΔW of folders of three kinds, against the library's reader."""
    found = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(folder, form, rng)
            got, scale = answer(folder=folder), form["lora_alpha"] / form["r"] ** (0.5 if form["use_rslora"] else 1.0)
            right = {path: np.einsum("or,ri->oi", u.B.astype(float), u.A.astype(float)) * scale
                     for path, u in updates(folder).items()}
        if got is None or got is ...:
            raise NotImplementedError
        if not isinstance(got, dict) or not all(isinstance(value, np.ndarray) for value in got.values()):
            return DELTAS
        found.append((got, right, form))
    for got, right, _ in found:
        if got.keys() != right.keys():
            prefixed = any(name.startswith(PREFIX) for name in got)
            return PREFIXED if prefixed else WHOLE if len(got) > len(right) else MISSED if len(got) < len(right) else DELTAS
    wrong = [(got[name], right[name], form) for got, right, form in found for name in right
             if not agree(got[name], right[name], 1e-9)]
    if not wrong:
        return None
    if all(a.shape == b.shape[::-1] != b.shape for a, b, _ in wrong):
        return "ΔW is transposed; it has the shape of W, (out, in)"
    if any(a.shape != b.shape for a, b, _ in wrong):
        return "ΔW should have the shape of W, (out, in)"
    if all(np.allclose(a, b, rtol=0, atol=1e-4 * abs(b).max()) for a, b, _ in wrong):
        return FLOAT
    if all(form["use_rslora"] for *_, form in wrong):
        return RSLORA
    return UNSCALED


PREFIXED = "take base_model.model. off the keys: it is PEFT's wrapper, and no part of the module's path"
WHOLE = "some keys are no LoRA: a classifier that was saved whole has no ΔW"
MISSED = "a module is missing: layer numbers may have two digits, and every lora_A has its lora_B"
UNSCALED = "the scale is not right: read r and lora_alpha from the config"
RSLORA = "right for α/r; where the config says use_rslora, the scale is another one"


def read_with(scale: Callable[[dict[str, Any]], float] = lambda c: c["lora_alpha"] / (
        c["r"] ** 0.5 if c["use_rslora"] else c["r"]), product: Callable[[Any, Any], Any] = lambda B, A: B @ A,
        dtype: str = "float64", prefix: str = PREFIX, whole: bool = False, only: str = "") -> Any:
    """A wrong reader of an adapter's folder."""
    def answer(folder: str) -> dict[str, np.ndarray]:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        tensors, found = load_file(Path(folder) / WEIGHTS), {}
        for key, A in tensors.items():
            name = key.removesuffix(".lora_A.weight")
            if name != key and only in name:
                B = tensors[f"{name}.lora_B.weight"].astype(dtype)
                found[name.removeprefix(prefix)] = (product(B, A.astype(dtype)) * scale(config)).astype(dtype)
            elif whole and "lora" not in key:
                found[key.removeprefix(prefix).removesuffix(".weight")] = A
        return found
    return answer


# ------------------------------------------------------------------------------------------------------- 8.4 a silent adapter
def silent_cases(rng: np.random.Generator) -> list[Case]:
    """Adapters of two modules: one that works, some with one thing wrong, and one of whose modules only one is silent."""
    paths = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    cases = []
    for fault in ("none", "B", "A", "prefix", "other model", "alpha", "one B", "one name"):
        tensors: dict[str, np.ndarray] = {}
        for i, path in enumerate(paths):
            A, B = rng.standard_normal((2, 5)), rng.standard_normal((4, 2))
            B = B * (0 if fault == "B" or (fault == "one B" and i == 0) else 1)
            A = A * (0 if fault == "A" else 1)
            start = PREFIX * (fault != "prefix")
            name = path.replace("bert", "roberta") if fault == "other model" or (fault == "one name" and i == 1) else path
            tensors |= {f"{start}{name}.lora_A.weight": A, f"{start}{name}.lora_B.weight": B}
        cases.append({"tensors": tensors, "config": {"r": 2, "lora_alpha": 0 if fault == "alpha" else 4}, "modules": paths})
    return cases


def acts(tensors: dict[str, np.ndarray], config: dict[str, Any], modules: list[str]) -> bool:
    """Whether the weight of any module changes."""
    total = 0.0
    for path in modules:
        A, B = (tensors.get(f"{PREFIX}{path}.lora_{factor}.weight") for factor in "AB")
        if A is not None and B is not None:
            total += float(abs(config["lora_alpha"] / config["r"] * np.einsum("or,ri->oi", B, A)).sum())
    return total > 0


def repair_that_helps(tensors: dict[str, np.ndarray], config: dict[str, Any], modules: list[str]) -> str:
    """The cause is what has to be repaired before the adapter acts: try each repair by itself."""
    full = {name: np.ones_like(array) for name, array in tensors.items()}
    order = sorted(tensors)
    placed = {f"{PREFIX}{modules[i // 2]}.lora_{'AB'[i % 2]}.weight": tensors[key] for i, key in enumerate(order)}
    for cause, repaired in (("works", (tensors, config)), ("factor", (full, config)), ("names", (placed, config)),
                            ("scale", (tensors, config | {"lora_alpha": config["r"]}))):
        if acts(*repaired, modules):
            return cause
    return "several"


def known(tensors: dict[str, Any], modules: list[str]) -> list[str]:
    """The modules that have their factors under PEFT's names."""
    return [path for path in modules if f"{PREFIX}{path}.lora_B.weight" in tensors]


def zero_factor(t: dict[str, Any], any_of: Callable[[Any], bool], factors: str = "AB") -> bool:
    return any(any_of(not array.any() for name, array in t.items() if f"lora_{factor}" in name) for factor in factors)


def looks(names: Callable[[dict[str, Any], list[str]], bool] = lambda t, m: not known(t, m), factors: str = "AB",
          any_of: Callable[[Any], bool] = all, scale: Callable[[dict[str, Any]], bool] = lambda c: c["lora_alpha"] == 0) -> Any:
    """A search for the cause that may look at too little, or too much."""
    def answer(tensors: dict[str, Any], config: dict[str, Any], modules: list[str]) -> str:
        if names(tensors, modules):
            return "names"
        if scale(config):
            return "scale"
        return "factor" if zero_factor(tensors, any_of, factors) else "works"
    return answer


EXERCISES = (
    Exercise("08.1", "our_name", "From a file's names to ours", 1, 8,
             ("Cut the layer's number out first: the part after encoder.layer. and before the next dot.",
              "Then compare the whole rest with a dict of six entries: two of the rests end with the same words."),
             (Mistake("attention.output.dense also ends with output.dense: compare the whole rest of the name",
                      named(ending=by_ending)),
              Mistake("the layer's number may have two digits", named(layer=lambda number: number[0])),
              Mistake("a name may begin with bert., or not: either way ours begins with layers.", named(first="bert.")),
              Mistake("intermediate is the wide layer, so up_proj; output goes back down",
                      named(ending=changed(up_proj="x_proj", down_proj="up_proj", x_proj="down_proj"))),
              Mistake("replacing output.dense first also hits attention.output.dense: compare the whole rest",
                      replaced_in_turn),
              Mistake("our path names the block too: attn. or mlp. before the last part",
                      named(ending=changed(**{"attn.": "", "mlp.": ""}))),
              Mistake("up_proj and down_proj are in the MLP: mlp., not attn.", named(ending=changed(mlp="attn"))),
              Mistake("ours are attn and mlp; self_attn is Llama's", named(ending=changed(attn="self_attn"))),
              Mistake("our names end with _proj", named(ending=changed(_proj=""))),
              Mistake("both count layers from 0", named(layer=lambda number: int(number) + 1)),
              Mistake("key and value are exchanged", named(ending=changed(k_proj="x_proj", v_proj="k_proj", x_proj="v_proj")))),
             expected=lambda name: bert_names()[name], cases=name_cases),
    Exercise("08.2", "adapter_bytes", "The size of an adapter's file", 1, 6,
             ("A (r, in) and B (out, r) for each target.", "A classifier is saved whole beside them: weight and bias."),
             (Mistake("these are numbers, and not bytes", counted(thin, size=lambda b: 1)),
              Mistake("the classifier is saved whole too", counted(thin, lambda n, d: 0)),
              Mistake("the classifier has a bias, one number a label", counted(thin, lambda n, d: n * d)),
              Mistake("the classifier gets no A and B: it is saved as it is", counted(thin, lambda n, d: 2 * (n + d))),
              Mistake("A has r·in numbers and B out·r: they are added, not multiplied",
                      counted(lambda out, inn, r: r * out * inn)),
              Mistake("this counts A alone; B (out, r) is in the file too", counted(lambda out, inn, r: r * inn)),
              Mistake("the bias has one number a label, not one a feature", counted(thin, lambda n, d: n * d + d)),
              Mistake("this is full ΔW, which is never in the file", counted(lambda out, inn, r: out * inn)),
              Mistake("this counts A for both factors; B is (out, r)", counted(lambda out, inn, r: 2 * r * inn)),
              Mistake("this counts B for both factors; A is (r, in)", counted(lambda out, inn, r: 2 * r * out)),
              Mistake("these are bits, and not bytes", counted(thin, size=lambda b: 8 * b)),
              Mistake("a number takes bytes_each bytes, which is not always 4", counted(thin, size=lambda b: 4)),
              Mistake("the r×r numbers between A and B are not in the file: LoRA has two factors",
                      counted(lambda out, inn, r: r * (out + inn) + r * r))),
             expected=written_bytes, cases=size_cases),
    Exercise("08.3", "read_deltas", "ΔW from a folder of PEFT's files", 2, 12,
             ("The scale is not in the tensors: read adapter_config.json.",
              "Go through the keys that end with .lora_A.weight; the other factor has the same name with lora_B.",
              "The scale is α/r, or α/√r with use_rslora."),
             (Mistake(UNSCALED, read_with(lambda c: 1.0)), Mistake(UNSCALED, read_with(lambda c: c["lora_alpha"])),
              Mistake(UNSCALED, read_with(lambda c: c["r"] / c["lora_alpha"])),
              Mistake(RSLORA, read_with(lambda c: c["lora_alpha"] / c["r"])), Mistake(FLOAT, read_with(dtype="float32")),
              Mistake("ΔW is transposed; it has the shape of W, (out, in)", read_with(product=lambda B, A: (B @ A).T)),
              Mistake(PREFIXED, read_with(prefix="")), Mistake(WHOLE, read_with(whole=True)),
              Mistake(MISSED, read_with(only=".0.")),
              Mistake("ΔW should have the shape of W, (out, in)", read_with(product=lambda B, A: B.T @ B))),
             laws=(deltas_agree,)),
    Exercise("08.4", "why_silent", "An adapter that does nothing", 2, 10,
             ("ΔW = s·B·A is zero if any of the three is; and it acts only where a name meets a module.",
              "Build the key that each module should have, and see whether it is there."),
             (Mistake("a factor can be zero in A as well as in B", looks(factors="B")),
              Mistake("one silent module is not a silent adapter: the others still act", looks(any_of=any)),
              Mistake("one name that meets no module does not silence the others",
                      looks(names=lambda t, m: len(known(t, m)) < len(m))),
              Mistake("the keys are compared without PEFT's base_model.model. in front, so none is ever found",
                      looks(names=lambda t, m: not any(f"{path}.lora_B.weight" in t for path in m))),
              Mistake("a key without base_model.model. is not found by a loader: compare whole keys, and not their ends",
                      looks(names=lambda t, m: not any(key.endswith(f"{path}.lora_B.weight") for path in m for key in t))),
              Mistake("the scale α/r can be zero too", looks(scale=lambda c: False)),
              Mistake("names are never looked at", looks(names=lambda t, m: False))),
             expected=repair_that_helps, cases=silent_cases),
)
