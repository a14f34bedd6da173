"""Every op against finite differences and the complex step; and what every op owes the engine: it changes no input, keeps
dtypes, and never gives two inputs the same gradient array.

CASES says for each op of the registry how to use it. A new op without cases fails `test_every_op_has_cases`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from composed import constant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora import autograd as ag
from minilora.autograd import GradcheckError, Op, Tensor, gradcheck, tensor
from minilora.autograd.linear import LoRALinear
from minilora.autograd.shaping import Dropout, RowBlocks
from minilora.backend import array_module, device_of, get_device, to_device, to_host
from minilora.methods.shira import AddAt

_rng = np.random.default_rng(1)


class Case(NamedTuple):
    label: str
    fn: Callable[..., Any]            # Tensors -> a Tensor, or a tuple of them
    inputs: tuple[np.ndarray, ...]    # on the host, float64
    frozen: tuple[int, ...] = ()      # inputs that require no gradient


def normal(*shape: int) -> np.ndarray:
    return np.asarray(_rng.standard_normal(shape))


def positive(*shape: int) -> np.ndarray:
    return np.asarray(_rng.uniform(0.5, 2.0, shape))


def elementwise(fn: Callable[..., Any], draw: Callable[..., np.ndarray] = normal) -> list[Case]:
    shapes: list[tuple[int, ...]] = [(), (1,), (3, 4), (2, 1, 3), (0, 2)]
    return [Case(f"{shape}", fn, (draw(*shape),)) for shape in shapes]


def reductions(fn: Callable[..., Any]) -> list[Case]:
    forms: list[tuple[tuple[int, ...], Any]] = [
        ((), None), ((1,), 0), ((3, 4), None), ((3, 4), 0), ((3, 4), -1), ((3, 1), 1), ((2, 3, 4), (0, 2)),
        ((2, 3, 4), (-1, 1)), ((2, 3, 2), (0, 1, 2))]
    return [Case(f"{shape} axis={axis} keepdims={keep}", lambda x, axis=axis, keep=keep: fn(x, axis, keep), (normal(*shape),))
            for shape, axis in forms for keep in (False, True)]


HEAD = normal(5, 2)                                                # a frozen weight (V, D)


def take(label: str, shape: tuple[int, ...], index: Any) -> Case:
    return Case(label, lambda x: x[index], (normal(*shape),))


def views_of_one_buffer(*blocks: Tensor) -> Tensor:
    return RowBlocks(blocks[0].data.base)(*blocks)


def drop(mask: np.ndarray) -> Callable[[Tensor], Tensor]:
    return lambda x: Dropout(constant(mask, x).data)(x)


def lora(blocks: list[slice], *, scales: Any = None, masks: Any = None, formed: bool | None = None) -> Callable[..., Tensor]:
    """LoRALinear with everything the model may ask of it. Inputs: x, W, b, A_1, B_1, A_2, …"""
    def fn(x: Tensor, *rest: Tensor) -> Tensor:
        on_device = [None if m is None else constant(m, x).data for m in masks or [None] * len(blocks)]
        s = [v if isinstance(v, float) else constant(v, x).data for v in scales or [0.5 + j for j in range(len(blocks))]]
        return LoRALinear(s, blocks, on_device, formed)(x, *rest)
    return fn


def lora_inputs(lead: tuple[int, ...], d_in: int, d_out: int, ranks: list[tuple[slice, int]], K: tuple[int, ...] = (),
                ) -> tuple[np.ndarray, ...]:
    factors = [f for block, r in ranks for f in (normal(*K, r, d_in), normal(*K, block.stop - block.start, r))]
    return (normal(*lead, d_in), normal(d_out, d_in), normal(d_out), *factors)


def rotate(positions: int, half: int) -> Callable[[Tensor], Tensor]:
    angles = np.outer(np.arange(positions), 0.7 ** np.arange(half))
    return lambda x: ag.rotary(x, constant(np.cos(angles), x).data, constant(np.sin(angles), x).data)


def attend(key_mask: Any = None, **options: Any) -> Callable[..., Tensor]:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None if key_mask is None else to_device(np.array(key_mask))
        return ag.attention(q, k, v, key_mask=mask, **options)
    return fn


def heads(B: int, H: int, KV: int, T: int, S: int, hd: int) -> tuple[np.ndarray, ...]:
    return normal(B, H, T, hd), normal(B, KV, S, hd), normal(B, KV, S, hd)


def feed(activation: str) -> Callable[..., Tensor]:
    return lambda x, W1, b1, W2, b2: ag.feed_forward(x, W1, b1, W2, b2, activation)


WHOLE, TOP, BOTTOM, MIDDLE = slice(0, 5), slice(0, 3), slice(3, 5), slice(1, 4)
SIDES = np.array([[True], [False], [True]])
KEEP = np.array([[0.0, 1.5, 1.5], [1.5, 0.0, 1.5]])

CASES: dict[str, list[Case]] = {
    "Add": [
        Case("same shape", operator.add, (normal(2, 3), normal(2, 3))),
        Case("broadcast", operator.add, (normal(3, 1), normal(1, 4))),
        Case("0-d", operator.add, (normal(), normal(2, 3))),
        Case("more axes", operator.add, (normal(2, 1, 3), normal(3))),
        Case("numbers", lambda x: 2.0 + x + 1, (normal(2, 3),)),
        Case("constant array", lambda x: to_device(np.ones((2, 3), x.dtype)) + x, (normal(3),)),
        Case("x + x", lambda x: x + x, (normal(2, 3),)),
        Case("frozen", operator.add, (normal(2, 3), normal(2, 3)), frozen=(1,)),
    ],
    "Subtract": [
        Case("broadcast", operator.sub, (normal(3, 1), normal(1, 4))),
        Case("0-d", operator.sub, (normal(2, 3), normal())),
        Case("x - x", lambda x: x - x, (normal(2, 3),)),
        Case("number - x", lambda x: 1.0 - x, (normal(1, 3),)),
        Case("x - xᵀ", lambda x: x - x.T, (normal(3, 3),)),
        Case("frozen", operator.sub, (normal(2, 3), normal(2, 3)), frozen=(0,)),
    ],
    "Multiply": [
        Case("broadcast", operator.mul, (normal(3, 1), normal(1, 4))),
        Case("0-d", operator.mul, (normal(), normal(2, 3))),
        Case("0-d twice", operator.mul, (normal(), normal())),
        Case("x x", lambda x: x * x, (normal(2, 3),)),
        Case("x xᵀ", lambda x: x * x.T, (normal(3, 3),)),
        Case("number", lambda x: -1.5 * x * 2, (normal(3),)),
        Case("frozen", operator.mul, (normal(2, 3), normal(2, 3)), frozen=(1,)),
    ],
    "Divide": [
        Case("broadcast", operator.truediv, (normal(3, 1), positive(1, 4))),
        Case("0-d", operator.truediv, (normal(2, 3), positive())),
        Case("x / x", lambda x: x / x, (positive(2, 3),)),
        Case("number / x", lambda x: 2.0 / x, (positive(2, 3),)),
        Case("x / number", lambda x: x / 3, (normal(2, 3),)),
        Case("frozen", operator.truediv, (normal(2, 3), positive(2, 3)), frozen=(1,)),
    ],
    "Negate": elementwise(lambda x: -x),
    "Power": [case for c in (0, 1, 2, 3, 0.5, -1, -1.5) for case in elementwise(lambda x, c=c: x**c, positive)]
             + [Case("negative base", lambda x: x**3, (normal(2, 3),))],
    "Exp": elementwise(ag.exp),
    "Log": elementwise(ag.log, positive),
    "Tanh": elementwise(ag.tanh),
    "Sqrt": elementwise(ag.sqrt, positive),
    "Where": [
        Case("both sides", lambda a, b: ag.where(constant(SIDES, a), a, b), (normal(3, 4), normal(3, 4))),
        Case("broadcast", lambda a, b: ag.where(constant(SIDES, a), a, b), (normal(1, 4), normal())),
        Case("a number", lambda a: ag.where(constant(SIDES, a), a, 0.0), (normal(3, 1),)),
        Case("0 and 1", lambda a, b: ag.where(constant(SIDES.astype(int), a), a, b), (normal(3, 4), normal(3, 4))),
        Case("counts", lambda a, b: ag.where(constant(3 * SIDES.astype(int), a), a, b), (normal(3, 4), normal(3, 4))),
        Case("same tensor", lambda a: ag.where(constant(SIDES, a), a, a), (normal(3, 4),)),
    ],
    "Sum": [*reductions(Tensor.sum), Case("mean", lambda x: x.mean((0, 2)), (normal(2, 3, 4),))],
    "Max": reductions(Tensor.max),
    "Reshape": [
        Case("join", lambda x: x.reshape(6, 4), (normal(2, 3, 4),)),
        Case("tuple with -1", lambda x: x.reshape((4, -1)), (normal(2, 3, 4),)),
        Case("0-d", lambda x: x.reshape(1, 1), (normal(),)),
        Case("to 0-d", lambda x: x.reshape(()), (normal(1, 1),)),
    ],
    "Transpose": [
        Case("reverse", lambda x: x.T, (normal(2, 3, 4),)),
        Case("turn", lambda x: x.transpose(1, 2, 0), (normal(2, 3, 4),)),
        Case("negative", lambda x: x.transpose(-1, 0, -2), (normal(2, 3, 4),)),
        Case("0-d", lambda x: x.transpose(), (normal(),)),
        Case("1-d", lambda x: x.T, (normal(3),)),
    ],
    "GetItem": [
        take("slices", (3, 4), (slice(1, None), slice(None, None, -2))),
        take("number", (3, 4), -1),
        take("element", (3, 4), (1, 2)),
        take("None and ...", (3, 4), (None, ..., slice(1, 2))),
        take("repeated rows", (3, 4), np.array([0, 2, 0, -1, 2])),
        take("list", (3, 4), [1, 1]),
        take("2-D index", (3, 2), np.array([[0, 0], [2, 0]])),
        take("repeated elements", (3, 4), (np.array([0, 0, 2]), np.array([1, 1, 3]))),
        take("slice and rows", (2, 3, 2), (slice(None), np.array([2, 2, 0]))),
        take("0-d index", (3, 4), np.int64(2)),
        take("all of a 0-d", (), ...),
        Case("one row, used twice", lambda x: x[0] * x[0:2] + x[0], (normal(2, 3),)),
    ],
    "Concatenate": [
        Case("axis 0", lambda *a: ag.concatenate(a), (normal(2, 3), normal(1, 3), normal(3, 3))),
        Case("axis -1", lambda *a: ag.concatenate(a, -1), (normal(2, 1), normal(2, 3))),
        Case("same tensor", lambda a: ag.concatenate([a, a, -a], 1), (normal(2, 2),)),
        Case("one", lambda a: ag.concatenate([a]), (normal(3),)),
        Case("frozen", lambda *a: ag.concatenate(a), (normal(2), normal(3)), frozen=(0,)),
    ],
    "Stack": [
        Case("axis 0", lambda *a: ag.stack(a), (normal(2, 3), normal(2, 3))),
        Case("axis -1", lambda *a: ag.stack(a, -1), (normal(2, 3), normal(2, 3))),
        Case("axis 1", lambda *a: ag.stack(a, 1), (normal(1, 3), normal(1, 3), normal(1, 3))),
        Case("0-d", lambda *a: ag.stack(a), (normal(), normal())),
        Case("same tensor", lambda a: ag.stack([a, a]), (normal(2),)),
    ],
    "Split": [
        Case("three parts", lambda x: ag.split(x, [1, 3, 2]), (normal(2, 6),)),
        Case("one part", lambda x: ag.split(x, [4]), (normal(4),)),
        Case("unused part", lambda x: ag.split(x, [1, 3, 2])[1], (normal(2, 6),)),
        Case("only the last", lambda x: ag.split(x, [1, 2])[1], (normal(2, 3),)),
        Case("parts meet", lambda x: operator.mul(*ag.split(x, [2, 2])), (normal(2, 3, 4),)),
    ],
    "RowBlocks": [
        Case("weights", views_of_one_buffer, (normal(2, 3), normal(1, 3), normal(4, 3))),
        Case("biases", views_of_one_buffer, (normal(2), normal(1))),
        Case("frozen", views_of_one_buffer, (normal(2, 3), normal(1, 3)), frozen=(1,)),
    ],
    "Embedding": [
        Case("repeated ids", lambda W: ag.embedding(np.array([[1, 4, 1], [0, 1, 4]]), W), (normal(5, 3),)),
        Case("0-d", lambda W: ag.embedding(np.array(2), W), (normal(3, 2),)),
        Case("one row", lambda W: ag.embedding([0, 0], W), (normal(1, 1),)),
        Case("no ids", lambda W: ag.embedding(np.zeros((0, 2), int), W), (normal(3, 2),)),
    ],
    "Dropout": [
        Case("mask", drop(KEEP), (normal(2, 3),)),
        Case("broadcast", drop(KEEP), (normal(4, 1, 3),)),
        Case("drawn", lambda x: ag.dropout(x, 0.4, np.random.default_rng(3)), (normal(3, 4),)),
    ],
    "MatMul": [
        Case("2-D", ag.matmul, (normal(2, 3), normal(3, 4))),
        Case("size 1", ag.matmul, (normal(1, 1), normal(1, 1))),
        Case("vectors", ag.matmul, (normal(1, 4), normal(4, 1))),
        Case("batched", ag.matmul, (normal(2, 3, 2), normal(2, 2, 3))),
        Case("one for all", ag.matmul, (normal(2, 3), normal(4, 3, 2))),
        Case("broadcast", ag.matmul, (normal(2, 1, 2, 3), normal(3, 3, 1))),
        Case("x x", lambda x: x @ x, (normal(3, 3),)),
        Case("x xᵀ", lambda x: x @ x.T, (normal(2, 3),)),
        Case("array @ x", lambda x: to_device(np.arange(6.0).reshape(2, 3).astype(x.dtype)) @ x, (normal(3, 2),)),
        Case("frozen", ag.matmul, (normal(2, 3), normal(3, 4)), frozen=(1,)),
    ],
    "Linear": [
        Case("2-D", ag.linear, (normal(4, 3), normal(2, 3), normal(2))),
        Case("3-D", ag.linear, (normal(2, 1, 3), normal(4, 3), normal(4))),
        Case("1-D", ag.linear, (normal(3), normal(4, 3))),
        Case("size 1", ag.linear, (normal(1, 1), normal(1, 1), normal(1))),
        Case("no rows", ag.linear, (normal(0, 3), normal(2, 3), normal(2))),
        Case("x xᵀ", lambda x: ag.linear(x, x), (normal(3, 2),)),
        Case("frozen W", ag.linear, (normal(2, 3), normal(4, 3), normal(4)), frozen=(1,)),
        Case("frozen x", ag.linear, (normal(2, 3), normal(4, 3), normal(4)), frozen=(0,)),
        Case("only b", ag.linear, (normal(2, 3), normal(4, 3), normal(4)), frozen=(0, 1)),
    ],
    "Shards": [
        Case("a leaf that all use, one that one uses", lambda x, a, b: ag.in_shards(
            lambda x, rows: x * ag.tanh(a) + x if rows.start else ag.tanh(x * a) * b, x, [slice(0, 2), slice(2, 3)]),
            (normal(3, 2), normal(2), normal(2))),
        Case("a leaf used twice", lambda x, a: ag.in_shards(lambda x, rows: x * a + a * a, x, [slice(0, 1), slice(1, 2)]),
             (normal(2, 3), normal(3))),
        Case("rows as they are", lambda x: ag.in_shards(lambda x, rows: x, x, [slice(0, 2), slice(2, 4)]), (normal(4, 2),)),
        *(Case(f"frozen {f}", lambda x, a: ag.in_shards(lambda x, rows: ag.exp(x) * a, x, [slice(0, 2), slice(2, 5)]),
               (normal(5, 2), normal(2)), f) for f in ((0,), (1,)))],
    "Recomputed": [
        Case("two leaves", lambda x, a, b: ag.recomputed(lambda x: ag.tanh(x * a) * b + a, x),
             (normal(3, 2), normal(2), normal(2))),
        Case("x as it is", lambda x: ag.recomputed(lambda x: x, x), (normal(2, 3),)),
        Case("within itself", lambda x, a: ag.recomputed(lambda x: ag.recomputed(lambda x: ag.exp(x) * a, x) * x, x),
             (normal(2, 3), normal(3))),
        *(Case(f"frozen {f}", lambda x, a: ag.recomputed(lambda x: ag.exp(x) * a, x), (normal(5, 2), normal(2)), f)
          for f in ((0,), (1,)))],
    "FeedForward": [
        *(Case(name, feed(name), (normal(2, 3, 2), normal(4, 2), normal(4), normal(3, 4), normal(3)))
          for name in ("gelu", "gelu_tanh", "silu")),
        Case("no biases", lambda x, W1, W2: feed("silu")(x, W1, None, W2, None), (normal(3, 2), normal(4, 2), normal(2, 4))),
        Case("size 1", feed("gelu_tanh"), (normal(1, 1), normal(1, 1), normal(1), normal(1, 1), normal(1))),
        Case("1-D", feed("gelu_tanh"), (normal(2), normal(3, 2), normal(3), normal(2, 3), normal(2))),
        Case("no rows", feed("gelu_tanh"), (normal(0, 2), normal(3, 2), normal(3), normal(2, 3), normal(2))),
        *(Case(f"frozen {frozen}", feed("gelu_tanh"), (normal(3, 2), normal(4, 2), normal(4), normal(2, 4), normal(2)), frozen)
          for frozen in ((1, 2, 3, 4), (0,), (0, 1, 2), (0, 1, 3, 4), (0, 3, 4), (2, 4), (0, 1, 2, 3))),
    ],
    "LoRALinear": [
        *(Case(f"formed={formed}", lambda *a, f=formed: ag.lora_linear(*a, 0.7, f), lora_inputs((2, 3), 4, 5, [(WHOLE, 2)]))
          for formed in (True, False, None)),
        *(Case(f"rank 1, one row, formed={formed}", lora([WHOLE], formed=formed), lora_inputs((1,), 1, 5, [(WHOLE, 1)]))
          for formed in (True, False)),
        *(Case(f"row blocks that overlap, formed={formed}", lora([TOP, BOTTOM, MIDDLE, WHOLE], formed=formed),
               lora_inputs((3,), 2, 5, [(TOP, 1), (BOTTOM, 2), (MIDDLE, 1), (WHOLE, 1)])) for formed in (True, False)),
        *(Case(f"K=2, formed={formed}", lora([WHOLE, TOP], scales=[np.array([0.5, 2.0]), 1.5], formed=formed),
               lora_inputs((2, 2), 3, 5, [(WHOLE, 2), (TOP, 1)], (2,))) for formed in (True, False)),
        Case("masks", lora([WHOLE, TOP], masks=[normal(2, 3), np.array([[0.0], [1.0]])]),
             lora_inputs((2,), 3, 5, [(WHOLE, 2), (TOP, 1)])),
        Case("mask with K=2", lora([WHOLE], masks=[normal(2, 1, 3)]), lora_inputs((2, 1), 3, 5, [(WHOLE, 2)], (2,))),
        *(Case(f"frozen {frozen}, formed={formed}", lora([WHOLE], formed=formed), lora_inputs((3,), 2, 5, [(WHOLE, 2)]), frozen)
          for frozen in ((1, 2), (0, 1, 2), (1, 2, 3), (1, 2, 4), (1, 2, 3, 4), (0, 2, 3, 4)) for formed in (True, False)),
    ],
    "Softmax": [Case(f"{s}", ag.softmax, (normal(*s),)) for s in ((3, 5), (1, 1), (4,), (2, 1, 3))]
               + [Case("far from 0", lambda x: ag.softmax(x + 1000.0), (normal(2, 3),))],
    "LogSoftmax": [Case(f"{s}", ag.log_softmax, (normal(*s),)) for s in ((3, 5), (1, 1), (4,), (2, 1, 3))]
                  + [Case("far from 0", lambda x: ag.log_softmax(x - 1000.0), (normal(2, 3),))],
    "LinearCrossEntropy": [
        Case(label, lambda x, classes=classes, options=options: ag.linear_cross_entropy(
            x, to_device(HEAD.astype(x.dtype), device_of(x.data).name), classes, **options), (normal(*shape),))
        for label, shape, classes, options in (
            ("rows", (3, 2), [2, 0, 4], {}), ("0-d", (2,), 1, {}), ("ignored", (2, 2, 2), [[2, -100], [-100, 1]], {}),
            ("smoothing", (3, 2), [2, -100, 1], {"label_smoothing": 0.3}),
            ("groups", (2, 2, 2), [[2, -100], [0, 1]], {"groups": 2, "label_smoothing": 0.1}))
    ],
    "CrossEntropy": [
        Case("rows", lambda x: ag.cross_entropy(x, [2, 0, 2]), (normal(3, 4),)),
        Case("one class", lambda x: ag.cross_entropy(x, [0, 0]), (normal(2, 1),)),
        Case("0-d", lambda x: ag.cross_entropy(x, 1), (normal(3),)),
        Case("ignored", lambda x: ag.cross_entropy(x, [[2, -100], [-100, 1]]), (normal(2, 2, 3),)),
        Case("another ignore_index", lambda x: ag.cross_entropy(x, [2, 0, 1], ignore_index=0), (normal(3, 3),)),
        Case("smoothing", lambda x: ag.cross_entropy(x, [2, -100, 1], label_smoothing=0.3), (normal(3, 4),)),
        Case("groups", lambda x: ag.cross_entropy(x, [[2, -100], [0, 1]], groups=2, label_smoothing=0.1), (normal(2, 2, 3),)),
    ],
    "LayerNorm": [Case(f"{s}", ag.layer_norm, (normal(*s), normal(s[-1]), normal(s[-1])))
                  for s in ((3, 4), (2, 1, 3), (4,), (3, 1))]
                 + [Case(f"frozen {f}", ag.layer_norm, (normal(3, 4), normal(4), normal(4)), f) for f in ((0,), (1, 2))],
    "RMSNorm": [Case(f"{s}", ag.rms_norm, (normal(*s), normal(s[-1]))) for s in ((3, 4), (2, 1, 3), (4,), (3, 1))]
               + [Case(f"frozen {f}", ag.rms_norm, (normal(3, 4), normal(4)), f) for f in ((0,), (1,))],
    "GELU": elementwise(ag.gelu),
    "GELUTanh": elementwise(ag.gelu_tanh),
    "SiLU": elementwise(ag.silu),
    "SwiGLU": [
        Case("same shape", ag.swiglu, (normal(2, 3), normal(2, 3))),
        Case("0-d", ag.swiglu, (normal(), normal())),
        Case("same tensor", lambda x: ag.swiglu(x, x), (normal(3),)),
        *(Case(f"frozen {i}", ag.swiglu, (normal(2, 3), normal(2, 3)), frozen=(i,)) for i in (0, 1)),
    ],
    "Rotary": [
        Case("smallest", rotate(1, 1), (normal(1, 1, 1, 2),)),
        Case("heads", rotate(3, 2), (normal(2, 2, 3, 4),)),
    ],
    "Attention": [
        Case("smallest", attend(), heads(1, 1, 1, 1, 1, 1)),
        Case("plain", attend(), heads(2, 2, 2, 3, 3, 2)),
        Case("causal", attend(causal=True), heads(1, 2, 2, 3, 3, 2)),
        Case("grouped", attend(causal=True), heads(1, 4, 2, 2, 2, 3)),
        Case("one key head", attend(), heads(2, 3, 1, 2, 2, 1)),
        Case("cache", attend(causal=True), heads(1, 2, 1, 2, 4, 2)),
        Case("one query", attend(causal=True), heads(2, 2, 2, 1, 3, 2)),
        Case("padding", attend([[1, 1, 0], [0, 1, 1]]), heads(2, 2, 1, 3, 3, 2)),
        Case("padding, causal", attend([[True, True, False], [False, True, True]], causal=True), heads(2, 2, 1, 3, 3, 2)),
        Case("a row without keys", attend([[0, 0], [1, 0]]), heads(2, 1, 1, 2, 2, 2)),
        Case("scale", attend(scale=0.3), heads(1, 1, 1, 2, 3, 2)),
        Case("same tensor", lambda x: ag.attention(x, x, x, causal=True), (normal(1, 2, 3, 2),)),
        *(Case(f"frozen {i}", attend(), heads(1, 2, 1, 2, 2, 2), frozen=(i,)) for i in range(3)),
    ],
    "AddAt": [
        Case("some places", lambda W, v: AddAt(constant(np.array([0, 3, 5, 11]), W).data)(W, v), (normal(3, 4), normal(4))),
        Case("one", lambda W, v: AddAt(constant(np.array([0]), W).data)(W, v), (normal(1, 1), normal(1))),
        *(Case(f"frozen {i}", lambda W, v: AddAt(constant(np.array([1, 2]), W).data)(W, v), (normal(2, 3), normal(2)),
               frozen=(i,)) for i in range(2)),
    ],
}

OWN = {name for name, op in Op.registry.items() if op.__module__.startswith("minilora.")}    # tests may define further ops


def build(case: Case, layout: str = "contiguous", dtype: str = "float64") -> list[Tensor]:
    """The case's inputs as Tensors on the current device. strided: views with gaps and another order of axes."""
    arrays = [a.astype(dtype) for a in case.inputs]
    if case.fn is views_of_one_buffer:
        whole, at = to_device(np.concatenate(arrays).copy()), np.cumsum([0, *(len(a) for a in arrays)])
        on_device = [whole[i:j] for i, j in pairwise(at)]
    elif layout == "strided":
        on_device = []
        for a in arrays:
            gaps = np.full([2 * n for n in a.shape[::-1]], np.nan, dtype)
            every_other = (*[slice(None, None, 2)] * a.ndim, ...)
            gaps[every_other] = a.T
            on_device.append(to_device(gaps)[every_other].transpose())
    else:
        on_device = [to_device(a.copy()) for a in arrays]
    return [Tensor(a, requires_grad=i not in case.frozen) for i, a in enumerate(on_device)]


@contextmanager
def told(name: str, case: Case) -> Iterator[None]:
    """A failure inside the block says in which case it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {name}, {case.label}")
        raise


def outputs_of(case: Case, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    result = case.fn(*tensors)
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture
def ran(monkeypatch) -> set[str]:
    """The names of the ops whose backward ran."""
    names: set[str] = set()
    pull = Op.pull

    def recorded(self, *args):
        names.add(type(self).__name__)
        return pull(self, *args)

    monkeypatch.setattr(Op, "pull", recorded)
    return names


every_op = pytest.mark.parametrize("name", sorted(CASES))
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "strided"])


def test_every_op_has_cases():
    assert set(CASES) == OWN


def test_the_cases_run_the_backward_of_every_op(ran):
    for name, cases in CASES.items():
        for case in cases:
            with told(name, case):
                for y in outputs_of(case, build(case)):
                    y.backward(np.ones(y.shape), retain_graph=True)
    assert ran == OWN


@both_layouts
@every_op
def test_gradients(device, ran, name, layout):
    """Every element; where a call is slow, the strided inputs along random directions."""
    directions = 3 if layout == "strided" and device != "cpu" else None
    for case in CASES[name]:
        with told(name, case):
            ran.clear()
            tensors = build(case, layout)
            assert gradcheck(case.fn, tensors, directions=directions)
            assert name in ran
            assert all(tensors[i].grad is None for i in case.frozen)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"GELU", "RowBlocks"}))     # RowBlocks reads one shared real buffer
def test_the_complex_step_agrees(name):
    for case in CASES[name]:
        if not case.frozen and case.label.split()[0] != "gelu":       # there is no complex erf
            with told(name, case):
                assert gradcheck(case.fn, build(case), method="complex", rtol=1e-11, atol=1e-13)


def test_the_exact_gelu_refuses_the_complex_step(device):
    with pytest.raises(TypeError, match=r"complex form.*central differences"):
        gradcheck(ag.gelu, [normal(3)], method="complex")


@both_layouts
@every_op
def test_what_an_op_leaves_behind(device, name, layout):
    """No input and no cotangent is changed; each gradient is an array of its own, of the input's shape and dtype."""
    for case in CASES[name]:
        with told(name, case):
            tensors = build(case, layout)
            outputs = outputs_of(case, tensors)
            cotangents = [to_device(_rng.standard_normal(y.shape)) for y in outputs]
            arrays = [*(t.data for t in tensors), *cotangents]
            before = [to_host(a).copy() for a in arrays]
            for y, c in zip(outputs, cotangents):
                y.backward(c, retain_graph=True)

            trained = [t for t in tensors if t.requires_grad]
            once = [to_host(t.grad).copy() for t in trained]
            for t in trained:
                assert isinstance(t.grad, get_device(device).array_type)
                assert (t.grad.shape, t.grad.dtype) == (t.shape, t.dtype)
            shares = array_module(*arrays).shares_memory
            others = [*arrays, *(y.data for y in outputs)]
            for i, t in enumerate(trained):
                assert not any(shares(t.grad, a) for a in [*others, *(s.grad for s in trained[:i])])

            for y, c in zip(outputs, cotangents):              # again: what was kept for the backward is unchanged, too
                y.backward(c, retain_graph=True)
            for t, g in zip(trained, once):
                np.testing.assert_allclose(to_host(t.grad), 2.0 * g, rtol=1e-13, atol=1e-14)
            for a, b in zip(arrays, before):
                np.testing.assert_array_equal(to_host(a), b)


@every_op
def test_float32_stays_float32(device, name):
    """The stand-in device raises at any float64 array that nobody asked for, so this sees inside the ops as well."""
    for case in CASES[name]:
        with told(name, case):
            results = []
            for dtype in ("float64", "float32"):
                tensors, rng = build(case, dtype=dtype), np.random.default_rng(5)
                outputs = outputs_of(case, tensors)
                for y in outputs:
                    y.backward(np.asarray(rng.standard_normal(y.shape), dtype), retain_graph=True)
                arrays = [y.data for y in outputs] + [t.grad for t in tensors if t.requires_grad]
                assert {a.dtype for a in arrays} == {np.dtype(dtype)}
                results.append([to_host(a) for a in arrays])
            digits = 1e-3 if case.label == "far from 0" else 1e-5          # x + 1000 alone loses three of them
            for exact, single in zip(*results):
                np.testing.assert_allclose(single, exact, rtol=0, atol=digits * max(1.0, abs(exact).max(initial=0)))


# Shapes nobody thought of

properties = settings(max_examples=25, deadline=None, derandomize=True,
                      suppress_health_check=[HealthCheck.function_scoped_fixture])


@properties
@given(shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3), seed=st.integers(0, 99))
def test_arithmetic_broadcasts_like_numpy(device, shapes, seed):
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(rng.uniform(0.5, 2.0, s)) for s in shapes.input_shapes)
    for op in operator.add, operator.sub, operator.mul, operator.truediv:
        np.testing.assert_array_equal(to_host(op(tensor(a), tensor(b))), op(a, b))
    assert gradcheck(lambda a, b: (a + b) * a / b - b, [a, b])


@properties
@given(data=st.data(), shape=hnp.array_shapes(max_dims=3, max_side=4), seed=st.integers(0, 99))
def test_indexing_is_numpys(device, data, shape, seed):
    x = np.random.default_rng(seed).standard_normal(shape)
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True) | hnp.integer_array_indices(shape, dtype=np.int64))
    np.testing.assert_array_equal(to_host(tensor(x)[index]), x[index])
    assert gradcheck(lambda t: t[index] * 1.0, [x])


@properties
@given(data=st.data(), shape=hnp.array_shapes(min_dims=0, max_dims=3, max_side=3), keepdims=st.booleans(),
       seed=st.integers(0, 99))
def test_sums_means_and_maxima_are_numpys(device, data, shape, keepdims, seed):
    x = np.asarray(np.random.default_rng(seed).standard_normal(shape))
    axis = data.draw(st.none() | (hnp.valid_tuple_axes(len(shape), min_size=1) if shape else st.nothing()))
    for ours, numpys in ((Tensor.sum, np.sum), (Tensor.mean, np.mean), (Tensor.max, np.max)):
        got = to_host(ours(tensor(x), axis, keepdims))
        np.testing.assert_allclose(got, numpys(x, axis=axis, keepdims=keepdims), rtol=1e-13, atol=1e-14)
        assert gradcheck(lambda t, ours=ours: ours(t, axis, keepdims), [x])


# Single facts

def test_elements_that_tie_share_the_gradient_of_the_maximum(device):
    x = tensor(np.array([[2.0, 5.0, 5.0], [5.0, 1.0, 0.0]]), requires_grad=True)
    x.max().backward()
    np.testing.assert_allclose(to_host(x.grad), np.array([[0, 1, 1], [1, 0, 0]]) / 3)


def test_a_row_that_is_looked_up_twice_gets_both_gradients(device):
    W = tensor(np.zeros((3, 2)), requires_grad=True)
    (ag.embedding(np.array([1, 1, 2]), W) + W[np.array([1, 1, 1])]).sum().backward()
    np.testing.assert_array_equal(to_host(W.grad), [[0, 0], [5, 5], [1, 1]])


def test_dropout_keeps_the_mean_and_the_seed_decides(device):
    x = tensor(np.ones((100, 100)))
    one, two, three = (to_host(ag.dropout(x, 0.25, np.random.default_rng(s))) for s in (0, 0, 1))
    assert set(np.unique(one)) == {0.0, 1 / 0.75}
    assert abs((one == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / one.size)
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three)


@pytest.mark.parametrize(("wrong", "error", "message"), [
    (lambda x: x**x, TypeError, "Python number"),
    (lambda x: x[np.array([True, False])], TypeError, "where"),
    (lambda x: x[np.array([0.5])], TypeError, "integers"),
    (lambda x: ag.split(x, [1, 1]), ValueError, "add up to 2, expected the last axis, 3"),
    (lambda x: ag.embedding([2], x), IndexError, r"id 2 is out of range: expected 0\.\.1"),
    (lambda x: ag.embedding([-1], x), IndexError, "id -1 is out of range"),
    (lambda x: ag.embedding([0.0], x), TypeError, "integers"),
    (lambda x: ag.matmul(x, x[0]), ValueError, "two axes"),
    (lambda x: ag.swiglu(x, x[:, :1]), ValueError, "expected one shape"),
    (lambda x: ag.where(True, x, 0.0), TypeError, "array of booleans"),
    (lambda x: ag.dropout(x, 1.0, np.random.default_rng(0)), ValueError, "0 <= p < 1"),
    (lambda x: ag.cross_entropy(x, [0]), ValueError, r"targets of shape \(1,\), expected"),
    (lambda x: ag.cross_entropy(x, [0, 3]), IndexError, r"0\.\.2"),
    (lambda x: ag.cross_entropy(x, [0, -1]), IndexError, "-1"),
    (lambda x: ag.cross_entropy(x, [0.0, 1.0]), TypeError, "integers"),
    (lambda x: ag.cross_entropy(x, [-100, -100]), ValueError, "no target counts"),
    (lambda x: ag.cross_entropy(x, [-100, 1], groups=2), ValueError, "no target counts"),
    (lambda x: ag.cross_entropy(x, [0, 1], groups=0), ValueError, "groups = 0, expected a number that divides the 2 targets"),
    (lambda x: ag.cross_entropy(x, [0, 1], groups=3), ValueError, "groups = 3, expected"),
    (lambda x: ag.cross_entropy(x, [0, 1], label_smoothing=1.5), ValueError, "label_smoothing"),
])
def test_what_the_functions_refuse(device, wrong, error, message):
    with pytest.raises(error, match=message):
        wrong(tensor(np.ones((2, 3))))


def test_attention_and_rotary_refuse_shapes_that_do_not_fit(device, put):
    q, k = (tensor(np.ones((2, h, 3, 4))) for h in (4, 2))
    for bad in (lambda: ag.attention(q, k, q), lambda: ag.attention(k, q, q), lambda: ag.attention(q, k[:1], k[:1]),
                lambda: ag.attention(q, k, k, key_mask=put(np.ones((2, 1)))), lambda: ag.attention(q, k[..., :2], k[..., :2]),
                lambda: ag.attention(q, k, k, key_mask=put(np.ones(3)))):
        with pytest.raises(ValueError, match="expected"):
            bad()
    with pytest.raises(ValueError, match="3 queries but only 2 keys"):
        ag.attention(q, k[:, :, :2], k[:, :, :2], causal=True)
    for shape in ((3, 4), (2, 2), (3, 1)):
        with pytest.raises(ValueError, match=r"expected \(3, 2\)"):
            ag.rotary(q, put(np.ones(shape)), put(np.ones(shape)))


def test_a_wrong_op_would_be_caught(monkeypatch):
    """The table is strong enough: each of these plausible mistakes fails in it."""
    def assigned(self, dy):
        dW = np.zeros((self.kept, dy.shape[-1]))
        dW[self.ids] = dy                                                                # `=` in place of `add.at`
        return dW

    wrong = {
        "Embedding": assigned,
        "Max": lambda self, dy: dy.sum() * self.kept,                                    # all winners get everything
        "Tanh": lambda self, dy: dy * (1.0 - self.kept),                                 # forgot the square
        "Where": lambda self, dy: (None, dy * ~self.kept, dy * self.kept),               # the sides exchanged
        "Stack": lambda self, dy: tuple(np.moveaxis(dy, self.axis, 0)[::-1]),            # the parts in another order
        "LogSoftmax": lambda self, dy: dy - np.exp(self.kept) * dy,                      # forgot the sum
    }
    for name, backward in wrong.items():
        monkeypatch.setattr(Op.registry[name], "backward", backward)
        with pytest.raises(GradcheckError):
            for case in CASES[name]:
                gradcheck(case.fn, build(case))
