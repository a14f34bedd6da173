"""LoRA and six listings that are taken for it: lesson 10 tells them apart by running them.

Each is a function (W (out, in), r, rng) -> Listing: what the optimiser may change, what it may not, and the weight that the
layer then multiplies by. The six are translations of listings in widely read texts; `lora` is the paper's (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..autograd import linear
from ..lora.lora import initial_factors
from ..nn import Parameter
from ..training import AdamW, Optimizer

Arrays = dict[str, np.ndarray]


@dataclass
class Listing:
    """trained and frozen: name -> array; weight(trained, frozen) -> (out, in), of arrays or Tensors, by + - * @ .T and sum."""

    trained: Arrays
    frozen: Arrays
    weight: Callable[[Any, Any], Any]


def lora(W: np.ndarray, r: int, rng: np.random.Generator) -> Listing:
    """The paper: W + s·B@A, W frozen, A random, B zero."""
    A, B = initial_factors(True, W.shape[0], W.shape[1], r, rng)
    return Listing({"A": A, "B": B}, {"W": W}, lambda t, f: f["W"] + 2.0 * (t["B"] @ t["A"]))


def scaled_copy(W: np.ndarray, r: int, rng: np.random.Generator) -> Listing:
    """ "W = A √d, only A is trained": A has W's shape."""
    root = len(W) ** 0.5
    return Listing({"A": W / root}, {}, lambda t, f: t["A"] * root)


def split(W: np.ndarray, r: int, rng: np.random.Generator) -> Listing:
    """ "W = A + B with a low-rank A; B is frozen, A is trained": A is low-rank until the first step."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    A = (U[:, :r] * S[:r]) @ Vt[:r]
    return Listing({"A": A}, {"B": W - A}, lambda t, f: t["A"] + f["B"])


def summed(W: np.ndarray, r: int, rng: np.random.Generator) -> Listing:
    """ "class LowRankAdapter": r whole matrices, summed; W occurs nowhere."""
    A, B = rng.standard_normal((r, *W.shape)), rng.standard_normal(W.shape)
    return Listing({"A": A, "B": B}, {"W": W}, lambda t, f: t["A"].sum(0))


def from_data(W: np.ndarray, r: int, rng: np.random.Generator) -> Listing:
    """ "R = X Σ⁻¹, K = Xᵀ U, the new weight is R Kᵀ": in place of W. It needs as many examples X as W has rows and columns."""
    U, S, _ = np.linalg.svd(W)
    X = rng.standard_normal(W.shape)
    return Listing({"R": X / S, "K": X.T @ U}, {}, lambda t, f: t["R"] @ t["K"].T)


def unused_factors(W: np.ndarray, r: int, rng: np.random.Generator) -> Listing:
    """ "W + U Λ Vᵀ", as listed: the product is never added, and the optimiser gets all of the model."""
    (d, k), draw = W.shape, rng.standard_normal
    return Listing({"W": W.copy()}, {"U": draw((d, r)), "Lambda": draw(r), "V": draw((k, r))}, lambda t, f: t["W"])


def random_factors(W: np.ndarray, r: int, rng: np.random.Generator) -> Listing:
    """ "W + U Λ Vᵀ", added: three random factors, so the model is broken before the first step."""
    (d, k), draw = W.shape, rng.standard_normal
    return Listing({"U": draw((d, r)), "Lambda": draw(r), "V": draw((k, r))}, {"W": W},
                   lambda t, f: f["W"] + (t["U"] * t["Lambda"]) @ t["V"].T)


LISTINGS: dict[str, Callable[[np.ndarray, int, np.random.Generator], Listing]] = {
    "W + s·B@A: LoRA": lora, "W = A·√d": scaled_copy, "W = A + B, train A": split, "A summed over the rank": summed,
    "W = R·Kᵀ from the data": from_data, "U·Λ·Vᵀ never added": unused_factors, "W + U·Λ·Vᵀ, all random": random_factors}


def train_listing(listing: Listing, X: np.ndarray, Y: np.ndarray, steps: int, lr: float, optimiser: type[Optimizer] = AdamW,
                  **options: Any) -> list[float]:
    """Train a listing in place on Y (n, out) ≈ X (n, in) weightᵀ; the mean squared errors before each step, and after the last.

    options: of the optimiser.
    """
    trained = {name: Parameter(array) for name, array in listing.trained.items()}
    opt, losses = optimiser(list(trained.values()), lr=lr, weight_decay=0.0, **options), []
    for step in range(steps + 1):
        loss = ((linear(X, listing.weight(trained, listing.frozen)) - Y) ** 2).mean()
        losses.append(loss.item())
        if step < steps:
            opt.zero_grad()
            loss.backward()
            opt.step()
    return losses
