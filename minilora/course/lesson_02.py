"""Lesson 02: a Transformer from the ops. What does the model know, and since when?

The oracles are the library itself, by another road than the answers take: its fused attention, its softmax on the visible part
of each row alone, the cross-entropy of logits that are written down, and the sizes of the arrays of a model that is built.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import autograd
from ..autograd import tensor
from ..lora import count_parameters
from ..nn import Transformer, TransformerConfig
from .exercise import Case, Exercise, Mistake
from .lesson_01 import softmax

Array = np.ndarray


# 02.1: attention

def _attention_cases(rng: np.random.Generator) -> list[Case]:
    sizes: list[Any] = [((), 3, 5, 4), ((2,), 4, 6, 3), ((), 1, 4, 2), ((3,), 5, 2, 1), ((2, 2), 3, 7, 9)]
    return [{"q": rng.standard_normal((*lead, T, hd)) * 2, "k": rng.standard_normal((*lead, S, hd)),
             "v": rng.standard_normal((*lead, S, hd))} for lead, T, S, hd in sizes]


def _attention_expected(q: Array, k: Array, v: Array) -> Array:
    """The library's fused op, which wants (B, H, T, hd)."""
    o = autograd.attention(*(tensor(x.reshape(1, -1, *x.shape[-2:])) for x in (q, k, v)))
    return o.data.reshape(q.shape)


def _scores(q: Array, k: Array) -> Array:
    return q @ k.swapaxes(-1, -2)


def _attended(scale: Any = lambda q, k: q.shape[-1] ** -0.5, axis: int = -1) -> Any:
    return lambda q, k, v: softmax(_scores(q, k) * scale(q, k), axis) @ v


attention = Exercise(
    id="02.1", name="attention", title="Attention in four lines", difficulty=2, minutes=15,
    cases=_attention_cases, expected=_attention_expected,
    hints=("One score for each pair of a query and a key: a product of shape (T, S). For leading axes use k.swapaxes(-1, -2).",
           "Divide the scores so that their size does not grow with the width hd; then softmax over the keys.",
           "The output of a query is the mean of the values, weighted with its row of the softmax."),
    mistakes=(
        Mistake("the scores are not scaled: their spread grows with the width of q and k", _attended(lambda q, k: 1.0)),
        Mistake("too much scaling: the spread of a sum of hd products is not hd", _attended(lambda q, k: 1 / q.shape[-1])),
        Mistake("the scale multiplies where it should divide", _attended(lambda q, k: q.shape[-1] ** 0.5)),
        Mistake("scale by the width hd, not by the number of keys", _attended(lambda q, k: k.shape[-2] ** -0.5)),
        Mistake("scale by the width hd, not by the number of queries", _attended(lambda q, k: q.shape[-2] ** -0.5)),
        Mistake("softmax over the keys, not over the queries: each query's weights add up to 1", _attended(axis=-2)),
        Mistake("these are the weights; the values v are not used",
                lambda q, k, v: softmax(_scores(q, k) * q.shape[-1] ** -0.5)),
        Mistake("the softmax ran over the whole array; each query has its own", lambda q, k, v: (
            np.exp(_scores(q, k) * q.shape[-1] ** -0.5) / np.exp(_scores(q, k) * q.shape[-1] ** -0.5).sum() @ v)),
        Mistake("this hides later keys; here every query may see every key", lambda q, k, v: softmax(np.where(
            np.tri(q.shape[-2], k.shape[-2]) > 0, _scores(q, k) * q.shape[-1] ** -0.5, -np.inf)) @ v),
        Mistake("the mean is of the keys; it should be of the values",
                lambda q, k, v: softmax(_scores(q, k) * q.shape[-1] ** -0.5) @ k),
        Mistake("there is no softmax: the weights should be positive and add up to 1",
                lambda q, k, v: _scores(q, k) * q.shape[-1] ** -0.5 @ v),
        Mistake("scaled after the softmax; then the weights no longer add up to 1",
                lambda q, k, v: softmax(_scores(q, k)) * q.shape[-1] ** -0.5 @ v),
    ))


# 02.2: the causal mask

def _causal_cases(rng: np.random.Generator) -> list[Case]:
    shapes: list[Any] = [(4, 4), (2, 5, 5), (1, 1), (2, 3, 6, 6)]
    low = rng.standard_normal((5, 5)) - 3e4                                                    # all scores below -10,000
    high = rng.standard_normal((7, 7)) + np.triu(np.full((7, 7), 2e4), 1)                      # hidden scores far above
    return [{"scores": scores} for scores in (*(rng.standard_normal(shape) * 3 for shape in shapes), low, high)]


def _causal_expected(scores: Array) -> Array:
    """Row i is the softmax of its first i + 1 scores, and nothing else is ever seen."""
    weights = np.zeros(scores.shape)
    for i in range(scores.shape[-1]):
        weights[..., i, : i + 1] = autograd.softmax(tensor(scores[..., i, : i + 1])).data
    return weights


def _visible(scores: Array, k: int = 0) -> Array:
    return np.tri(scores.shape[-1], k=k, dtype=bool)


def _masked(hidden: float, k: int = 0) -> Any:
    return lambda scores: softmax(np.where(_visible(scores, k), scores, hidden))


def _renormalised(scores: Array) -> Array:
    weights = softmax(scores) * _visible(scores)
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


causal_softmax = Exercise(
    id="02.2", name="causal_softmax", title="The causal mask", difficulty=2, minutes=15,
    cases=_causal_cases, expected=_causal_expected,
    hints=("Query i may look at the keys 0 … i: a lower triangle, with its diagonal. np.tri makes one.",
           "A hidden key needs weight 0 after the softmax: which score gives exactly 0, whatever the others are?",
           "np.where(visible, scores, …), then softmax over the last axis."),
    mistakes=(
        Mistake("nothing is hidden", lambda scores: softmax(scores)),
        Mistake("a hidden score of -10,000 is not low enough: other scores may be lower, and then it leaks", _masked(-1e4)),
        Mistake("adding -10,000 is not enough where a hidden score is larger than the others by more; it leaks",
                lambda scores: softmax(scores - 1e4 * ~_visible(scores))),
        Mistake("each query sees one key too many, its own future", _masked(-np.inf, 1)),
        Mistake("each query sees one key too few: it may look at itself", _masked(-1e9, -1)),
        Mistake("the wrong triangle: this hides the past",
                lambda scores: softmax(np.where(_visible(scores).T, scores, -np.inf))),
        Mistake("masked after the softmax: the hidden keys have already taken their share, and rows do not add up to 1",
                lambda scores: softmax(scores) * _visible(scores)),
        Mistake("masked after the softmax and divided again: beside a far larger hidden score all that is visible is already 0",
                _renormalised),
        Mistake("a score of 0 hides nothing: it is a score like others", _masked(0.0)),
        Mistake("softmax over the wrong axis: each query's weights, along the last axis, add up to 1",
                lambda scores: softmax(np.where(_visible(scores), scores, -np.inf), -2)),
    ))


# 02.3: counting

def _count_expected(V: int, D: int, L: int, T: int) -> int:
    """The sizes of all arrays of a model that is built."""
    config = TransformerConfig.gpt2(vocab_size=V, d_model=D, n_layers=L, n_heads=1, max_len=T)
    return count_parameters(Transformer(config, seed=None))["total"]


def _counted(V: int, D: int, L: int, T: int, *, tables: int = 1, positions: int = 1, matrices: int = 12, vectors: int = 13,
             last: int = 2) -> int:
    return tables * V * D + positions * T * D + L * (matrices * D * D + vectors * D) + last * D


def _but(**changed: int) -> Any:
    return lambda V, D, L, T: _counted(V, D, L, T, **changed)


parameter_count = Exercise(
    id="02.3", name="parameter_count", title="Count the parameters", difficulty=1, minutes=10,
    cases=lambda rng: [{"V": int(V), "D": int(D), "L": int(L), "T": int(T)} for V, D, L, T in
                       [(256, 64, 2, 64), (11, 1, 1, 3), *zip(*(rng.integers(2, top, 4) for top in (90, 30, 6, 50)))]],
    expected=_count_expected, scalars=lambda case: {},
    hints=("Matrices of a layer: q, k, v and o are D × D; up is 4D × D, and down goes back.",
           "Every matrix of a layer has a bias. A norm has a weight and a bias, each D. A layer has two norms.",
           "Outside the layers: the table of bytes, the table of positions, a last norm. The head is the table of bytes."),
    mistakes=(
        Mistake("the head is the table of bytes itself (tied): it is not counted twice", _but(tables=2)),
        Mistake("the table of positions is missing", _but(positions=0)),
        Mistake("the biases of the linear layers are missing", _but(vectors=4)),
        Mistake("the norms are missing", _but(vectors=9, last=0)),
        Mistake("the last norm, after all layers, is missing", _but(last=0)),
        Mistake("a norm has a bias beside its weight", _but(vectors=11, last=1)),
        Mistake("the bias of up is as long as the MLP is wide", _but(vectors=10)),
        Mistake("a layer has two norms", _but(vectors=11)),
        Mistake("the head has no bias", lambda V, D, L, T: _counted(V, D, L, T) + V),
        Mistake("all biases and norms are missing: only the matrices are counted", _but(vectors=0, last=0)),
        Mistake("attention has a fourth matrix, o", _but(matrices=11, vectors=12)),
        Mistake("the MLP has two matrices, up and down", _but(matrices=8, vectors=12)),
        Mistake("the MLP is four times as wide as the model", _but(matrices=6, vectors=10)),
        Mistake("these are the parameters of one layer; there are L", lambda V, D, L, T: _counted(V, D, 1, T)),
    ))


# 02.4: the first loss

def _loss_expected(V: int, c: float, p: float) -> float:
    """The library's cross-entropy of the logits, once with each kind of target."""
    logits = np.zeros((1, V))
    logits[0, 0] = c
    same, other = (autograd.cross_entropy(tensor(logits), np.array([target])).item() for target in (0, 1))
    return p * same + (1 - p) * other


first_loss = Exercise(
    id="02.4", name="first_loss", title="Predict the first loss", difficulty=1, minutes=10,
    cases=lambda rng: [{"V": V, "c": c, "p": p} for V, c, p in
                       [(256, 0.0, 0.2), (1000, 0.0, 0.0), (256, 12.8, 0.25), (37, 2.0, 1.0), (1000, 3.0, 0.1), (2, -1.0, 0.5),
                        (500, float(rng.uniform(4, 6)), float(rng.uniform(0.1, 0.9)))]],
    expected=_loss_expected, scalars=lambda case: {},
    hints=("The loss of one prediction is ln Σ exp(logits) minus the logit of the target.",
           "One logit is c, and V - 1 logits are 0.",
           "The logit of the target is c in a share p of the cases, and 0 in the others."),
    mistakes=(
        Mistake("right for c = 0, where all are equal; the one large logit changes both terms", lambda V, c, p: np.log(V)),
        Mistake("in nats: the natural logarithm", lambda V, c, p: (np.log(V - 1 + np.exp(c)) - p * c) / np.log(2)),
        Mistake("this is the loss if the target is never the byte itself; it is in a share p",
                lambda V, c, p: np.log(V - 1 + np.exp(c))),
        Mistake("this is the loss if the target is always the byte itself", lambda V, c, p: np.log(V - 1 + np.exp(c)) - c),
        Mistake("p is the share in which the target is the byte itself, not the share in which it is not",
                lambda V, c, p: np.log(V - 1 + np.exp(c)) - (1 - p) * c),
        Mistake("the logit of the target is subtracted, not added", lambda V, c, p: np.log(V - 1 + np.exp(c)) + p * c),
        Mistake("V logits in all: one is c, so how many are 0?", lambda V, c, p: np.log(V + np.exp(c)) - p * c),
        Mistake("inside the logarithm stand exponentials of logits, not logits",
                lambda V, c, p: np.log(max(V - 1 + c, 1e-9)) - p * c),
        Mistake("a loss is not negative: it is ln Σ exp(logits) minus the logit of the target",
                lambda V, c, p: p * c - np.log(V - 1 + np.exp(c))),
        Mistake("this is the logarithm of a mean probability; the loss is the mean of the logarithms",
                lambda V, c, p: -np.log((p * np.exp(c) + 1 - p) / (V - 1 + np.exp(c)))),
        Mistake("this is the mean of probabilities; the loss is the mean of minus their logarithms",
                lambda V, c, p: (p * np.exp(c) + 1 - p) / (V - 1 + np.exp(c))),
    ))

EXERCISES = (attention, causal_softmax, parameter_count, first_loss)
