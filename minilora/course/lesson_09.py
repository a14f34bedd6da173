"""Lesson 09, cost: what does LoRA save, and what not?

The oracles write each way to compute as a list of products and count them one by one; the break-even is searched for; the bytes
are those of `minilora params` on real models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import numpy as np

from ..lora import LoraConfig
from ..pretrained.params import params
from .exercise import Exercise, Mistake

Count = Callable[..., Any]

# Forward and backward of one layer, product by product. "nk,dk" is x Wᵀ: every index of the two factors is a loop.
FULL = ("nk,dk", "nd,dk", "nd,nk")                                                 # y, x̄, W̄
THIN = ("nk,dk", "nk,rk", "nr,dr", "nd,dk", "nd,dr", "nr,rk", "nr,nk", "nd,nr")    # y, U, U Bᵀ, x̄, Z, Z A, Ā, B̄
FORMED = ("dr,rk", "nk,dk", "nk,rk", "nd,dk", "nd,dr", "nr,nk", "nd,nr")           # B A, y, U, x̄, Z, Ā, B̄


def multiply_adds(products: tuple[str, ...], **sizes: int) -> int:
    """What the products take: for each of them, the sizes of its indices multiplied."""
    return sum(prod(sizes[index] for index in set(factors) - {","}) for factors in products)


# --- 09.1 multiply-adds of a step -----------------------------------------------------------------


def step_expected(n: int, out: int, inn: int, r: int) -> tuple[int, ...]:
    """Counted product by product."""
    return tuple(multiply_adds(way, n=n, d=out, k=inn, r=r) for way in (FULL, THIN, FORMED))


def _step(full: Count | None = None, thin: Count | None = None, formed: Count | None = None) -> Count:
    """A wrong answer: right but for what is given, each a function of (one large product, one thin round, B A, n)."""
    def answer(n: int, out: int, inn: int, r: int) -> tuple[int, ...]:
        given = zip((full, thin, formed), step_expected(n, out, inn, r), strict=True)
        counts = n * out * inn, n * r * (out + inn), r * out * inn, n
        return tuple(right if way is None else way(*counts) for way, right in given)
    return answer


STEP = Exercise(
    "09.1", "step_cost", "The multiply-adds of one step", 1, 8,
    ("A product of (a, b) by (b, c) takes a·b·c multiply-adds. Full fine-tuning needs three: y, and the gradients of x and W.",
     "The frozen W needs no gradient: two large products are left. Thin, each of A and B stands in three small ones.",
     "Formed: B A once (r·out·in); then y and x's gradient need no branch. U = x Aᵀ and Z = ȳ B are still needed for Ā and B̄."),
    (Mistake("full: the backward pass has two products, one for x's gradient and one for W's",
             _step(full=lambda N, thin, BA, n: 2 * N)),
     Mistake("thin: the gradient of the frozen W is not computed", _step(thin=lambda N, thin, BA, n: 3 * N + 3 * thin)),
     Mistake("W x is still computed with LoRA, and so is the gradient that goes through W",
             _step(thin=lambda N, thin, BA, n: 3 * thin, formed=lambda N, thin, BA, n: BA + 2 * thin)),
     Mistake("thin: the branch has a backward pass too", _step(thin=lambda N, thin, BA, n: 2 * N + thin)),
     Mistake("thin: A and B each stand in three products: forward, own gradient, and on the way back to x",
             _step(thin=lambda N, thin, BA, n: 2 * N + 2 * thin)),
     Mistake("formed: B A itself takes r·out·in", _step(formed=lambda N, thin, BA, n: 2 * N + 2 * thin)),
     Mistake("formed: W + s·B A is formed once for all n tokens, not once a token",
             _step(formed=lambda N, thin, BA, n: 2 * N + n * BA + 2 * thin)),
     Mistake("formed: Ā and B̄ come from thin products; they still have to be paid",
             _step(formed=lambda N, thin, BA, n: 2 * N + BA)),
     Mistake("formed: y and x's gradient have the branch in them already: two thin rounds are left, not three",
             _step(formed=lambda N, thin, BA, n: 2 * N + BA + 3 * thin)),
     Mistake("x needs its gradient too: one more large product, for full fine-tuning and for LoRA",
             _step(full=lambda N, thin, BA, n: 2 * N, thin=lambda N, thin, BA, n: N + 2 * thin)),
     Mistake("thin: the gradient of x goes through the frozen W too, the second large product",
             _step(thin=lambda N, thin, BA, n: N + 3 * thin)),
     Mistake("formed: B A is one product, made once; the backward pass uses the same W + s·B A",
             _step(formed=lambda N, thin, BA, n: 2 * N + 2 * BA + 2 * thin)),
     Mistake("formed: A's and B's gradients need U and Z, and one thin product each with these: two thin rounds",
             _step(formed=lambda N, thin, BA, n: 2 * N + BA + thin)),
     Mistake("formed: the gradient of the formed W itself is never made; Ā and B̄ come from the thin U and Z",
             _step(formed=lambda N, thin, BA, n: 3 * N + 3 * BA)),
     Mistake("count multiply-adds, not single operations: you have everything twice",
             lambda n, out, inn, r: tuple(2 * count for count in step_expected(n, out, inn, r)))),
    step_expected, lambda rng: [{"n": n, "out": int(d), "inn": int(k), "r": r} for (d, k), (n, r) in
                                zip(rng.choice(np.arange(5, 60), (3, 2), replace=False), ((7, 2), (64, 3), (5, 1)))],
    outputs=("full", "thin", "formed"))


# --- 09.2 when forming pays -----------------------------------------------------------------------


def break_even_expected(out: int, inn: int) -> int:
    """The first number of tokens at which the formed way takes fewer multiply-adds, by trying."""
    n = 1
    while multiply_adds(FORMED, n=n, d=out, k=inn, r=1) >= multiply_adds(THIN, n=n, d=out, k=inn, r=1):
        n += 1
    return n


BREAK_EVEN = Exercise(
    "09.2", "break_even", "When does forming W + sBA pay?", 2, 8,
    ("Set the two counts of 09.1 equal and take away what stands on both sides. What happens to r?",
     "r·out·in has to be less than n·r·(out + in).",
     "The answer is a whole number, and 'fewer' is strict: at an exact tie nothing is saved."),
    (Mistake("n is a number of tokens, a whole one", lambda out, inn: out * inn / (out + inn)),
     Mistake("at this n forming is not cheaper yet", lambda out, inn: out * inn // (out + inn)),
     Mistake("right but for a tie: 'fewer' is strict", lambda out, inn: -(-out * inn // (out + inn))),
     Mistake("forming saves one thin round of three, not two or a half", lambda out, inn: 2 * out * inn // (out + inn) + 1),
     Mistake("the saved round is n·r·(out + in); you have taken three of them",
             lambda out, inn: out * inn // (3 * (out + inn)) + 1),
     Mistake("W has out·in numbers, not out + in: you have the ratio upside down",
             lambda out, inn: (out + inn) // (out * inn) + 1),
     Mistake("not rounded, but the next whole number above the break-even, also above an exact one",
             lambda out, inn: round(out * inn / (out + inn))),
     Mistake("this holds only for a square W, and W here is not square", lambda out, inn: min(out, inn) // 2 + 1),
     Mistake("the smaller side of W alone does not decide: both sides are in it",
             lambda out, inn: min(out, inn)),
     Mistake("this holds only for a square W, and W here is not square", lambda out, inn: max(out, inn) // 2 + 1)),
    break_even_expected, lambda rng: [{"out": 20, "inn": 30}, {"out": 7, "inn": 5}, {"out": 10, "inn": 8},
                                      {"out": int(rng.integers(40, 90)), "inn": int(rng.integers(100, 200))}],
    scalars=lambda case: {})


# --- 09.3 bytes -----------------------------------------------------------------------------------


@cache
def real_models() -> dict[tuple[int, int], tuple[int, int]]:
    """(parameters of the base, of the adapter) -> bytes in training without activations, (full, LoRA), by `params`."""
    found = {}
    for name, r in ("gpt2", 4), ("llama-2-7b", 8), ("llama-2-13b", 64):
        full, lora = params(name, None), params(name, LoraConfig(r=r, target_modules="all-linear"))
        found[full.total, lora.trainable] = tuple(
            sum(bytes_of for part, bytes_of in way.memory["bf16"].items() if part != "activations") for way in (full, lora))
    return found                                           # type: ignore[return-value]


LEDGER = Exercise(
    "09.3", "training_bytes", "The bytes of a 7B", 2, 10,
    ("Adam keeps two numbers for each one that trains, in float32: 8 bytes. A frozen number has no gradient and no Adam.",
     "bf16 training of a whole model: weight 2, gradient 2, Adam 8, and a float32 copy of the weight 4.",
     "The base is there with LoRA too: 2 bytes each. An adapter's numbers are float32: 4 + 4 + 8."),
    (Mistake("LoRA: the frozen base has to be in memory too; 'only the adapter is stored' is a common error",
             lambda base, adapter: (16 * base, 16 * adapter)),
     Mistake("full: every trained number has a gradient and Adam's two as well",
             lambda base, adapter: (2 * base, 2 * base + 16 * adapter)),
     Mistake("full: Adam keeps two numbers for each weight", lambda base, adapter: (8 * base, 2 * base + 16 * adapter)),
     Mistake("full: bf16 weights need a float32 copy, or small updates are lost",
             lambda base, adapter: (12 * base, 2 * base + 16 * adapter)),
     Mistake("LoRA: the base is frozen, so it has no gradient and no Adam",
             lambda base, adapter: (16 * base, 16 * (base + adapter))),
     Mistake("LoRA: a frozen base number takes 2 bytes: it is in bf16, and has no gradient",
             lambda base, adapter: (16 * base, 4 * base + 16 * adapter)),
     Mistake("LoRA: the adapter trains, so it has a gradient and Adam's two",
             lambda base, adapter: (16 * base, 2 * base + 4 * adapter)),
     Mistake("LoRA: an adapter's number takes four float32 numbers: itself, its gradient, and Adam's two averages",
             lambda base, adapter: (16 * base, 2 * base + 12 * adapter)),
     Mistake("LoRA: an adapter's number takes four float32 numbers: itself, its gradient, and Adam's two averages",
             lambda base, adapter: (16 * base, 2 * base + 8 * adapter)),
     Mistake("LoRA: the adapter's gradient is float32 too, 4 bytes",
             lambda base, adapter: (16 * base, 2 * base + 14 * adapter)),
     Mistake("LoRA: the adapter is float32, with no bf16 copy beside it",
             lambda base, adapter: (16 * base, 2 * base + 18 * adapter)),
     Mistake("full: the gradient is in bf16 here, 2 bytes a number",
             lambda base, adapter: (18 * base, 2 * base + 16 * adapter)),
     Mistake("a number that trains takes 16 bytes, of the base as of the adapter: which 4 are missing?",
             lambda base, adapter: (12 * base, 2 * base + 12 * adapter)),
     Mistake("LoRA: the frozen base is in bf16, 2 bytes a number",
             lambda base, adapter: (16 * base, 4 * base + 20 * adapter)),
     Mistake("LoRA: the adapter is float32 and needs no second copy",
             lambda base, adapter: (16 * base, 2 * base + 20 * adapter))),
    lambda base, adapter: real_models()[base, adapter],
    lambda rng: [{"base": base, "adapter": adapter} for base, adapter in rng.permutation(sorted(real_models())).tolist()],
    outputs=("full", "LoRA"), scalars=lambda case: {})


# --- 09.4 use -------------------------------------------------------------------------------------


def token_expected(out: int, inn: int, r: int) -> tuple[int, ...]:
    """One token forward: the base, W x + s·B(A x), and the merged W', product by product."""
    sizes = {"n": 1, "d": out, "k": inn, "r": r}
    return tuple(multiply_adds(way, **sizes) for way in (("nk,dk",), ("nk,dk", "nk,rk", "nr,dr"), ("nk,dk",)))


TOKEN = Exercise(
    "09.4", "token_cost", "One token: base, branch, merged", 1, 5,
    ("y = W x is one product. With the branch there are three: W x, A x, and B times that.",
     "A merged weight has the shape of W."),
    (Mistake("the branch does not replace W x; it stands beside it",
             lambda out, inn, r: (out * inn, r * (out + inn), out * inn)),
     Mistake("the branch is two products, A x and then B (A x)",
             lambda out, inn, r: (out * inn, out * inn + r * inn, out * inn)),
     Mistake("A x first: B A is never formed for one token",
             lambda out, inn, r: (out * inn, out * inn + r * out * inn, out * inn)),
     Mistake("A x first: B A is never formed for one token",
             lambda out, inn, r: (out * inn, 2 * out * inn + r * out * inn, out * inn)),
     Mistake("the branch is thin: A x first, then B times that. A product of W's size is made only once",
             lambda out, inn, r: (out * inn, 2 * out * inn, out * inn)),
     Mistake("merged is one matrix of W's shape: the branch is gone",
             lambda out, inn, r: (out * inn, out * inn + r * (out + inn), out * inn + r * (out + inn))),
     Mistake("merging does not make W smaller",
             lambda out, inn, r: (out * inn, out * inn + r * (out + inn), r * (out + inn))),
     Mistake("in use there is no backward pass",
             lambda out, inn, r: (2 * out * inn, 2 * out * inn + 3 * r * (out + inn), 2 * out * inn)),
     Mistake("W' is formed once when it is merged, not for each token",
             lambda out, inn, r: (out * inn, out * inn + r * (out + inn), out * inn + r * out * inn)),
     Mistake("count multiply-adds: you have everything twice",
             lambda out, inn, r: (2 * out * inn, 2 * (out * inn + r * (out + inn)), 2 * out * inn))),
    token_expected, lambda rng: [{"out": int(d), "inn": int(k), "r": r} for (d, k), r in
                                 zip(rng.choice(np.arange(9, 70), (3, 2), replace=False), (2, 1, 4), strict=True)],
    outputs=("base", "branch", "merged"))

EXERCISES = (STEP, BREAK_EVEN, LEDGER, TOKEN)
