"""Lesson 07, the family: which of twenty relatives of LoRA is really different?

The oracles put the methods of the library onto a small model and look: what a start changes, what trains, what a first step of
Adam does. HiRA's is the sum of its r columns, and that it comes out right as an adaptation; DoRA's a complex step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np

from ..autograd import GradcheckError, gradcheck, tensor
from ..lora import METHODS, LoRA, LoraConfig, adapters_of, add_adapter, merge_and_unload
from ..methods import HoulsbyConfig, IA3Config, LoHaConfig, PromptTuningConfig, VeraConfig, VirtualTokens
from ..nn import Linear, Transformer, TransformerConfig
from ..training import AdamW
from .exercise import Case, Exercise, Mistake

SHAPES = ((5, 3, 2), (3, 4, 1), (6, 5, 3))                 # (out, in, r): never square, one of rank 1


def small(seed: int = 0) -> Transformer:
    """A model in float64 that is built in a moment."""
    return Transformer(TransformerConfig.gpt2(vocab_size=11, d_model=8, n_layers=1, n_heads=2, max_len=12), seed, "float64")


# --- 07.1 HiRA ------------------------------------------------------------------------------------


def hira_cases(rng: np.random.Generator) -> list[Case]:
    """Arrays W, A, B and a scale that is neither 1 nor 1/r."""
    return [{"W": rng.standard_normal((d, k)), "A": rng.standard_normal((r, k)), "B": rng.standard_normal((d, r)), "s": s}
            for (d, k, r), s in zip(SHAPES, (1.5, 0.75, 4.0), strict=True)]


def hira_expected(W: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
    """Every rank-one term rescales the rows and the columns of W: W + s Σ_i diag(b_i) W diag(a_i)."""
    return W + s * sum(np.diag(b) @ W @ np.diag(a) for a, b in zip(A, B.T, strict=True))


def is_an_adaptation(answer: Callable[..., Any], rng: np.random.Generator) -> str | None:
    """Gradient, start and merge of a method whose adapted weight is the answer."""
    d, k, r = SHAPES[0]
    arrays = [rng.standard_normal(shape) for shape in ((d, k), (r, k), (d, r))]
    try:
        gradcheck(lambda W, A, B: answer(W, A, B, 1.5), [tensor(array, requires_grad=True) for array in arrays])
    except (GradcheckError, AttributeError, TypeError, ValueError):
        return "right on arrays, but not on Tensors: use only their *, + and @, so that autograd sees every step"

    class Answer(LoRA):
        """LoRA's parameters under the answer's weight."""

        def adapted_weight(self, W: Any) -> Any:
            return answer(W, self.lora_A, self.lora_B, self.base_scale)

    class Config(LoraConfig):
        """The config that asks for it."""

        method: ClassVar[str] = "exercise"                 # type: ignore[assignment]  # in the place of LoRA's property

    model, ids = small(), rng.integers(0, 11, (2, 6))
    before = model(ids).data
    METHODS["exercise", Linear] = Answer
    try:
        add_adapter(model, Config(r=2, target_modules="all-linear"))
    finally:
        del METHODS["exercise", Linear]
    if not np.array_equal(model(ids).data, before):
        return "on a model it is not the base at the start, where B = 0"
    for adapter in adapters_of(model).values():
        adapter.lora_B.data[...] = rng.standard_normal(adapter.lora_B.shape)
    after = model(ids).data
    if np.allclose(after, before) or not np.allclose(merge_and_unload(model)(ids).data, after, rtol=0, atol=1e-10):
        return "on a model the merged weight does not give what the adapter gives"
    return None


HIRA = Exercise(
    "07.1", "hira", "HiRA: a method is its adapted weight", 2, 12,
    ("Look at LoRA.adapted_weight, printed above. The product B @ A has the shape of W.",
     "ΔW = W ∘ (s·B A): every entry of W is multiplied by the entry of s·B A at its place.",
     "The answer is the whole adapted weight W + ΔW. It takes only *, + and @."),
    (Mistake("this is the update alone; adapted_weight returns the whole weight, W with the update in it",
             lambda W, A, B, s: W * (B @ A) * s),
     Mistake("this is LoRA itself: in HiRA the product does not stand beside W, it multiplies W entry by entry",
             lambda W, A, B, s: W + s * (B @ A)),
     Mistake("where is the scale?", lambda W, A, B, s: W + W * (B @ A)),
     Mistake("the scale belongs to the update alone; here it multiplies W too", lambda W, A, B, s: s * (W + W * (B @ A))),
     Mistake("s is already α/r: do not divide by r again", lambda W, A, B, s: W + W * (B @ A) * (s / len(A))),
     Mistake("the scale is in it twice", lambda W, A, B, s: W + s * s * W * (B @ A)),
     Mistake("the update is subtracted", lambda W, A, B, s: W - s * W * (B @ A)),
     Mistake("this forgets the W that is added: at B = 0 the answer has to be W", lambda W, A, B, s: W * (B @ A)),
     Mistake("W is in the update twice", lambda W, A, B, s: W + s * W * W * (B @ A)),
     Mistake("the 1 in W ∘ (1 + s·B A) is not scaled by W", lambda W, A, B, s: 1 + s * W * (B @ A))),
    hira_expected, hira_cases, laws=(is_an_adaptation,), scalars=lambda case: {"s": case["s"], "r": float(len(case["A"]))})


# --- 07.2 starts ----------------------------------------------------------------------------------

STARTS: dict[str, Any] = {
    "lora": LoraConfig(r=2), "pissa": LoraConfig(r=2, init_lora_weights="pissa"), "dora": LoraConfig(r=2, use_dora=True),
    "vera": VeraConfig(r=2), "loha": LoHaConfig(r=2), "ia3": IA3Config(), "houlsby": HoulsbyConfig(bottleneck=2),
    "prompt": PromptTuningConfig(num_virtual_tokens=2)}


@cache
def starts_expected() -> set[str]:
    """Those that move a logit of a small model by more than rounding, before any step."""
    found = set()
    for name, config in STARTS.items():
        model, ids = small(), np.arange(12).reshape(2, 6) % 11
        before = model(ids).data
        adapted = VirtualTokens(model) if name == "prompt" else model
        add_adapter(adapted, config)
        if abs(adapted(ids).data - before).max() > 1e-12:
            found.add(name)
    return found


WHY = {
    "pissa": "PiSSA takes a part out of W, but here as ΔW = s(B A - B₀A₀): what is that at the start?",
    "vera": "VeRA: d starts at 0.1, but look at b", "dora": "DoRA: its lengths start as the lengths of W's own rows",
    "loha": "LoHa: one of its four factors is zero", "ia3": "IA3 multiplies, so the neutral start is 1, not 0",
    "lora": "LoRA's A is random, but what is B?"}


def one_of(answer: Any, rng: np.random.Generator) -> str | None:
    """The first thing to say about a set: a name that does not exist, one too many, one that is missing."""
    found = answer()
    if not isinstance(found, set | frozenset) or not all(isinstance(name, str) for name in found):
        return "expected a set of names, as {'lora', 'pissa'}"
    if unknown := sorted(found - set(STARTS)):
        return f"{unknown[0]!r} is none of the eight names: " + ", ".join(STARTS)
    if len(found) > 4:
        return "run it: two of the eight change the output before the first step"
    for name, hint in WHY.items():
        if name in found:
            return hint
    if found == starts_expected():
        return None
    return {1: "not yet: there is another one. One puts something new before the tokens, one starts small, but not at zero",
            0: "two of the eight change the output before the first step"}[len(found)]


NO_OP = Exercise(
    "07.2", "not_the_base", "Which starts are not the base?", 1, 5,
    ("ΔW = 0 needs one factor that is zero, or a multiplier that is one.",
     "help(ml.methods.VeRA) and its sisters say how each one starts. Or add each one to a small model and compare its logits.",
     "'Almost nothing' is not nothing: a start of 0.001 does not count as the base."),
    (Mistake("not yet: there is another one. One puts something new before the tokens, one starts small, but not at zero",
             {"prompt"}),
     *(Mistake(hint, {name, "houlsby", "prompt"}) for name, hint in WHY.items()),
     Mistake("run it: two of the eight change the output before the first step", set(STARTS))),
    laws=(one_of,))


# --- 07.3 counts ----------------------------------------------------------------------------------


def counts_expected(out: int, inn: int, r: int) -> tuple[int, ...]:
    """What the library's own classes train on a layer of that shape."""
    rng = np.random.default_rng(0)
    layer = Linear(np.zeros((out, inn)))
    configs = (LoraConfig(r=r), LoraConfig(r=r, use_dora=True), VeraConfig(r=r), LoHaConfig(r=r), IA3Config())
    adapters = [METHODS[config.method, Linear](layer, config, ("layer",), rng) for config in configs]
    return tuple(sum(p.size for _, p in adapter.named_parameters()) for adapter in adapters)


COUNTS = Exercise(
    "07.3", "family_counts", "How many numbers each relative trains", 1, 6,
    ("Write the shapes of what trains beside each other: LoRA A (r, in), B (out, r).",
     "DoRA has LoRA's two factors and one length for every row of W. VeRA's two matrices are frozen.",
     "LoHa has two pairs of factors. IA3, on an output, has one number per output."),
    (Mistake("LoRA: A has r·in numbers and B out·r; they are added, not multiplied",
             lambda out, inn, r: (r * out * inn, r * out * inn + out, r + out, 2 * r * out * inn, out)),
     Mistake("DoRA: one length for each row of W, and W (out, in) has as many rows as outputs",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + inn, r + out, 2 * r * (out + inn), out)),
     Mistake("DoRA trains its lengths beside LoRA's factors, not instead of them",
             lambda out, inn, r: (r * (out + inn), out, r + out, 2 * r * (out + inn), out)),
     Mistake("VeRA: its matrices are frozen and shared; only two vectors train",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + out, r * (out + inn) + r + out, 2 * r * (out + inn), out)),
     Mistake("LoRA: A has r·in numbers and B out·r; they are added, not multiplied",
             lambda out, inn, r: (r * out * inn, r * (out + inn) + out, r + out, 2 * r * (out + inn), out)),
     Mistake("DoRA: every row of W has a length of its own, not one for the whole matrix",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + 1, r + out, 2 * r * (out + inn), out)),
     Mistake("VeRA: one of its two vectors is as long as the output of the layer, not as the input",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + out, r + inn, 2 * r * (out + inn), out)),
     Mistake("VeRA: b scales the outputs; the other vector scales the r rows between the matrices, not the inputs",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + out, inn + out, 2 * r * (out + inn), out)),
     Mistake("LoHa multiplies two products, so it has two pairs of factors",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + out, r + out, r * (out + inn), out)),
     Mistake("LoHa: the rank of its update can be r², but its factors are still of rank r",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + out, r + out, 2 * r * r * (out + inn), out)),
     Mistake("IA3 rescales what a layer gives, not what it takes, except in the MLP's last product",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + out, r + out, 2 * r * (out + inn), inn)),
     Mistake("IA3 has one number for each output, not one for each weight",
             lambda out, inn, r: (r * (out + inn), r * (out + inn) + out, r + out, 2 * r * (out + inn), out * inn))),
    counts_expected, lambda rng: [{"out": int(d), "inn": int(k), "r": r} for (d, k), r in
                                  zip(rng.choice(np.arange(6, 40), (3, 2), replace=False), (1, 2, 5), strict=True)],
    outputs=("LoRA", "DoRA", "VeRA", "LoHa", "IA3"))


# --- 07.4 the same run by plain LoRA --------------------------------------------------------------


def first_update(config: LoraConfig, ratio: float) -> np.ndarray:      # -> (out, in)
    """ΔW after one step of Adam (ε next to 0), where B's rate is `ratio` times A's."""
    model = small()
    add_adapter(model, config)
    model.loss(np.arange(12).reshape(2, 6) % 11, np.arange(3, 15).reshape(2, 6) % 11).backward()
    adapter = adapters_of(model)["layers.0.mlp.up_proj"]
    AdamW([{"params": [adapter.lora_A], "lr": 1e-2}, {"params": [adapter.lora_B], "lr": 1e-2 * ratio}], lr=1e-2, eps=1e-60,
          weight_decay=0.0).step()
    A, B, s = adapter.factors()
    return s * B.data @ A.data


def plain_expected(lora_alpha: float, r: int, use_rslora: bool, lr_ratio: float) -> float:
    """How many times larger the first update is than that of plain LoRA with lora_alpha = 1."""
    place: dict[str, Any] = {"r": r, "target_modules": ["up_proj"]}
    unit = first_update(LoraConfig(lora_alpha=1.0, **place), 1.0)
    wanted = first_update(LoraConfig(lora_alpha=lora_alpha, use_rslora=use_rslora, **place), lr_ratio)
    return float((wanted * unit).sum() / (unit * unit).sum())


PLAIN = Exercise(
    "07.4", "plain_alpha", "Three names, one run", 2, 10,
    ("Two things multiply here. Look at each alone: first rsLoRA without a ratio, then LoRA+ without rsLoRA.",
     "Write out s for plain LoRA and for rsLoRA, and ask which lora_alpha makes them equal.",
     "For LoRA+ take the law with p = 1, and choose q so that both rates are equal again."),
    (Mistake("this is the α that was there before: neither rsLoRA nor the ratio is in it",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha),
     Mistake("B learns faster in LoRA+: should plain LoRA's update be larger or smaller to keep up?",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha / lr_ratio * (r**0.5 if use_rslora else 1.0)),
     Mistake("rsLoRA is right, but the ratio of the rates is not in it",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * (r**0.5 if use_rslora else 1.0)),
     Mistake("the ratio is right, but rsLoRA is not in it", lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * lr_ratio),
     Mistake("α/r = α'/√r, or α/√r = α'/r? Here the second is asked for",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * lr_ratio / (r**0.5 if use_rslora else 1.0)),
     Mistake("both are upside down: a faster B, and √r in place of r, make the update larger. So plain LoRA needs a larger α",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha / lr_ratio / (r**0.5 if use_rslora else 1.0)),
     Mistake("rsLoRA and the ratio can come together: then both count",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * (r**0.5 if use_rslora else lr_ratio)),
     Mistake("the answer is a lora_alpha, and s = lora_alpha/r: you have divided by r as well",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * lr_ratio / (r**0.5 if use_rslora else r)),
     Mistake("rsLoRA divides by √r, not by 1: r itself is too much",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * lr_ratio * (r if use_rslora else 1)),
     Mistake("√r is only for rsLoRA", lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * lr_ratio * r**0.5),
     Mistake("with p = 1 the whole ratio goes into q, not its root",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * lr_ratio**0.5 * (r**0.5 if use_rslora else 1.0)),
     Mistake("that would be plain SGD's law, where the scale counts twice; Adam's step does not know how large a gradient is",
             lambda lora_alpha, r, use_rslora, lr_ratio: lora_alpha * lr_ratio**2 * (r**0.5 if use_rslora else 1.0))),
    plain_expected, lambda rng: [
        {"lora_alpha": float(rng.integers(3, 40)), "r": r, "use_rslora": rs, "lr_ratio": float(rng.integers(2, 9))}
        for r, rs in ((4, True), (3, False), (1, False), (2, True))])


# --- 07.5 DoRA's gradient -------------------------------------------------------------------------


def dora_cases(rng: np.random.Generator) -> list[Case]:
    """V (out, in), m (out,) and the gradient G (out, in) of the weight m ⊙ V / ‖V‖."""
    return [{"V": rng.standard_normal(shape) * 2, "m": rng.uniform(0.5, 3, shape[0]), "G": rng.standard_normal(shape)}
            for shape in ((3, 5), (1, 4), (6, 2))]


def dora_expected(V: np.ndarray, m: np.ndarray, G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of L = Σ G ⊙ (m V / ‖V‖) by a complex step, which has no rounding error to speak of."""
    def change(V: Any, m: Any) -> float:
        return float((G * (m / np.sqrt((V * V).sum(1)))[:, None] * V).sum().imag)

    def step(at: int, size: int) -> Any:
        return (1e-30j * (np.arange(size) == at))

    dV = [change(V + step(i, V.size).reshape(V.shape), m) / 1e-30 for i in range(V.size)]
    return np.array(dV).reshape(V.shape), np.array([change(V, m + step(i, m.size)) / 1e-30 for i in range(m.size)])


def _dora(project: Callable[..., Any], magnitude: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A wrong answer: dV from (G, V, its row norms, m, the unit rows), and dm, right unless given."""
    def answer(V: np.ndarray, m: np.ndarray, G: np.ndarray) -> Any:
        n = np.sqrt((V * V).sum(1, keepdims=True))
        unit = V / n
        return project(G, V, n, m[:, None], unit), (magnitude or (lambda G, V, n, u: (G * u).sum(1)))(G, V, n, unit)
    return answer


def _along(G: np.ndarray, u: np.ndarray) -> np.ndarray:
    return (G * u).sum(1, keepdims=True) * u


def _by_columns(V: np.ndarray, m: np.ndarray, G: np.ndarray) -> Any:
    n = np.sqrt((V * V).sum(0, keepdims=True))
    unit = V / n
    return m[:, None] / n * (G - (G * unit).sum(0, keepdims=True) * unit), (G * unit).sum(1)


DORA = Exercise(
    "07.5", "dora_grad", "Is DoRA's detached norm a gradient?", 3, 15,
    ("One row at a time: w = m v/‖v‖. What is the derivative of ‖v‖ towards v?",
     "The derivative of v/‖v‖ is (I - v̂ v̂ᵀ)/‖v‖ with v̂ = v/‖v‖.",
     "Making v longer changes nothing. So every row of dV must be orthogonal to its row of V."),
    (Mistake("this is the detached form: it takes ‖V‖ for a constant, and finite differences do not. If V grows along itself, "
             "does w change?", _dora(lambda G, V, n, m, u: m / n * G)),
     Mistake("m is missing in dV", _dora(lambda G, V, n, m, u: (G - _along(G, u)) / n)),
     Mistake("1/‖V‖ is missing in dV", _dora(lambda G, V, n, m, u: m * (G - _along(G, u)))),
     Mistake("the part along V is added, but it has to be taken out", _dora(lambda G, V, n, m, u: m / n * (G + _along(G, u)))),
     Mistake("the direction must have length one: you project with V itself",
             _dora(lambda G, V, n, m, u: m / n * (G - _along(G, V)))),
     Mistake("of ⟨G, V⟩ V you have divided by ‖V‖ only once", _dora(lambda G, V, n, m, u: m / n * (G - _along(G, V) / n))),
     Mistake("only the part along V is left; that is the part to take out", _dora(lambda G, V, n, m, u: m / n * _along(G, u))),
     Mistake("dm: the direction must have length one; divide by ‖V‖",
             _dora(lambda G, V, n, m, u: m / n * (G - _along(G, u)), lambda G, V, n, u: (G * V).sum(1))),
     Mistake("one length for each row, not one for the whole matrix",
             lambda V, m, G: (m[:, None] / np.linalg.norm(V) * (G - (G * V).sum() * V / (V * V).sum()),
                              (G * V).sum(1) / np.linalg.norm(V))),
     Mistake("‖V‖ is the length of each row (axis 1, along the inputs), not of each column",
             _by_columns),
     Mistake("dV: the part along v̂ is taken out row by row: sum over axis 1 only, with keepdims",
             _dora(lambda G, V, n, m, u: m / n * (G - (G * u).sum() * u))),
     Mistake("V/‖V‖ is divided by the norm once, its derivative too; you have 1/‖V‖²",
             _dora(lambda G, V, n, m, u: m / n**2 * (G - _along(G, u))))),
    dora_expected, dora_cases, outputs=("dV", "dm"))

EXERCISES = (HIRA, NO_OP, COUNTS, PLAIN, DORA)
