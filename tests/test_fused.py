"""Each fused op against its composed twin: values and gradients, in float64 to the last digits and in float32 near them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import composed
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import autograd as ag
from minilora.autograd import Tensor, tensor
from minilora.autograd.linear import LoRALinear
from minilora.backend import to_device, to_host

properties = settings(max_examples=15, deadline=None, derandomize=True,
                      suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds, sizes = st.integers(0, 2**32 - 1), st.integers(1, 4)


def run(fn: Callable[..., Tensor], inputs: list[np.ndarray], dtype: str = "float64") -> list[np.ndarray]:
    """The value of fn and its gradients towards all inputs, for a random cotangent."""
    tensors = [tensor(a.astype(dtype), requires_grad=True) for a in inputs]
    y = fn(*tensors)
    y.backward(np.asarray(np.random.default_rng(7).standard_normal(y.shape), dtype))
    assert y.dtype == dtype
    return [to_host(y), *(to_host(t.grad) for t in tensors)]


def assert_near(got: list[np.ndarray], expected: list[np.ndarray], digits: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=digits * max(1.0, abs(b).max(initial=0)))


def assert_twins(fused: Callable[..., Tensor], twin: Callable[..., Tensor], *inputs: np.ndarray) -> None:
    exact = run(fused, list(inputs))
    assert_near(exact, run(twin, list(inputs)), 1e-12)
    assert_near(run(fused, list(inputs), "float32"), exact, 1e-5)


def placed(array: Any, like: Tensor) -> Any:
    return None if array is None else composed.constant(array, like).data


# Softmax and cross-entropy

@properties
@given(shape=st.tuples(sizes, sizes, st.integers(1, 7)), scale=st.sampled_from([0.1, 1.0, 10.0]), seed=seeds)
def test_softmax_and_log_softmax(device, shape, scale, seed):
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    assert_twins(ag.softmax, composed.softmax, x)
    assert_twins(ag.log_softmax, composed.log_softmax, x)
    np.testing.assert_allclose(to_host(ag.softmax(tensor(x))).sum(-1), 1.0, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_neither_overflows_nor_loses_masked_classes(device, put, dtype):
    x = put([[1e4, 1e4, -np.inf], [-1e4, -np.inf, -1e4]], dtype)
    np.testing.assert_array_equal(to_host(ag.softmax(x)), [[0.5, 0.5, 0], [0.5, 0, 0.5]])
    np.testing.assert_allclose(to_host(ag.log_softmax(x[:, :1])), 0.0)
    loss = ag.cross_entropy(Tensor(put([[1e4, -1e4], [-1e4, 1e4]], dtype)), [0, 0])
    assert loss.item() == pytest.approx(1e4)


@properties
@given(rows=st.integers(1, 5), V=st.integers(1, 6), groups=st.sampled_from([None, 1, 2, 3]), seed=seeds,
       smoothing=st.sampled_from([0.0, 0.1, 1.0]), ignored=st.sampled_from([-100, 0, -1]))
def test_cross_entropy(device, rows, V, groups, seed, smoothing, ignored):
    rng = np.random.default_rng(seed)
    lead = (groups or 1, rows)
    targets = rng.integers(0, V, lead)
    targets[rng.random(lead) < 0.4] = ignored
    targets[:, 0] = V - 1                                      # one that counts in every group
    if (targets == ignored).all(axis=1).any():                 # V = 1 with class 0 ignored
        with pytest.raises(ValueError, match="no target counts"):
            ag.cross_entropy(tensor(np.zeros((*lead, V))), targets, ignore_index=ignored, groups=groups)
        return
    options = {"ignore_index": ignored, "label_smoothing": smoothing, "groups": groups}
    assert_twins(lambda x: ag.cross_entropy(x, targets, **options), lambda x: composed.cross_entropy(x, targets, **options),
                 rng.standard_normal((*lead, V)))
    W = rng.standard_normal((V, 3))
    assert_twins(lambda x: ag.linear_cross_entropy(x, tensor(W.astype(x.dtype)), targets, **options),
                 lambda x: composed.cross_entropy(ag.linear(x, tensor(W.astype(x.dtype))), targets, **options),
                 rng.standard_normal((*lead, 3)))


def test_a_head_that_is_trained_needs_its_logits():
    with pytest.raises(ValueError, match=r"use cross_entropy\(linear\(x, W\), …\)"):
        ag.linear_cross_entropy(tensor(np.ones((2, 3))), tensor(np.ones((4, 3)), requires_grad=True), [0, 1])


def test_rows_that_do_not_count_have_no_gradient_and_change_nothing(device):
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((4, 5)), np.array([1, -100, 4, -100])
    x = tensor(logits, requires_grad=True)
    loss = ag.cross_entropy(x, targets)
    loss.backward()
    assert not to_host(x.grad)[[1, 3]].any()
    np.testing.assert_allclose(to_host(x.grad).sum(axis=1), 0.0, atol=1e-15)
    assert loss.item() == pytest.approx(ag.cross_entropy(tensor(logits[[0, 2]]), targets[[0, 2]]).item(), rel=1e-14)


def test_each_group_has_the_loss_it_would_have_alone(device):
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((3, 4, 5)), rng.integers(0, 5, (3, 4))
    targets[1, :3] = -100                                      # its mean is over one row
    x = tensor(logits, requires_grad=True)
    losses = ag.cross_entropy(x, targets, groups=3)
    losses.sum().backward()
    for k in range(3):
        alone = tensor(logits[k], requires_grad=True)
        loss = ag.cross_entropy(alone, targets[k])
        loss.backward()
        assert to_host(losses)[k] == pytest.approx(loss.item(), rel=1e-14)
        np.testing.assert_allclose(to_host(x.grad)[k], to_host(alone.grad), rtol=0, atol=1e-15)


# Norms and activations

@properties
@given(shape=st.tuples(sizes, sizes, st.integers(1, 9)), eps=st.sampled_from([1e-12, 1e-5, 0.1]), seed=seeds)
def test_norms(device, shape, eps, seed):
    rng = np.random.default_rng(seed)
    x, w, b = rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])
    x[..., 0] += 0.5 + np.arange(shape[0])[:, None]            # rows of unlike mean and size
    eps = max(eps, 1e-5) if shape[-1] <= 2 else eps            # one or two numbers: a variance that may be 0
    assert_twins(lambda x, w: ag.rms_norm(x, w, eps), lambda x, w: composed.rms_norm(x, w, eps), x, w)
    if shape[-1] > 2:
        assert_twins(lambda x, w, b: ag.layer_norm(x, w, b, eps), lambda x, w, b: composed.layer_norm(x, w, b, eps), x, w, b)


def test_layer_norm_of_one_number_is_its_bias(device):
    """x - mean x = 0: nothing of x or w arrives, and no gradient goes back to them."""
    y, dx, dw, db = run(ag.layer_norm, [np.array([[3.0], [-1.0]]), np.array([2.0]), np.array([0.5])])
    np.testing.assert_array_equal(y, [[0.5], [0.5]])
    assert not dx.any() and not dw.any() and db.any()


POINTS = np.concatenate([np.linspace(-9, 9, 181), [0.0, 1e-8, -1e-8, 40.0, -40.0]])


def test_exact_gelu_against_math_erf(device):
    y, slope = composed.gelu_oracle(POINTS)
    c = np.random.default_rng(7).standard_normal(POINTS.shape)
    for dtype, digits in (("float64", 3e-15), ("float32", 1e-6)):
        got, dx = run(ag.gelu, [POINTS], dtype)
        np.testing.assert_allclose(got, y, rtol=digits, atol=9 * digits)
        np.testing.assert_allclose(dx, c * slope, rtol=4 * digits, atol=4 * digits)


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_activations(device, name):
    assert_twins(getattr(ag, name), getattr(composed, name), POINTS.reshape(-1, 2, 3))


def test_activations_saturate_without_warning(device, put):
    for dtype in ("float32", "float64"):
        x = put([-1e4, 1e4], dtype)
        for fn in (ag.gelu, ag.gelu_tanh, ag.silu):
            t = Tensor(x, requires_grad=True)
            y = fn(t)
            y.sum().backward()
            np.testing.assert_allclose(to_host(y), [0.0, 1e4], rtol=1e-7, atol=1e4 * 1e-7)     # the erf is 1 - 3e-8 there
            np.testing.assert_allclose(to_host(t.grad), [0.0, 1.0], rtol=1e-7, atol=1e-7)


@properties
@given(shape=st.tuples(sizes, sizes, sizes), seed=seeds)
def test_swiglu(device, shape, seed):
    rng = np.random.default_rng(seed)
    assert_twins(ag.swiglu, composed.swiglu, rng.standard_normal(shape), rng.standard_normal(shape))


# Positions and attention

@properties
@given(B=sizes, H=sizes, T=sizes, half=sizes, seed=seeds)
def test_rotary_is_a_rotation_matrix_at_each_position(device, B, H, T, half, seed):
    rng = np.random.default_rng(seed)
    angles, x = rng.uniform(-4, 4, (T, half)), rng.standard_normal((B, H, T, 2 * half))
    fused = lambda x: ag.rotary(x, placed(np.cos(angles), x), placed(np.sin(angles), x))  # noqa: E731
    assert_twins(fused, lambda x: composed.rotary(x, angles), x)
    np.testing.assert_allclose(np.linalg.norm(to_host(fused(tensor(x))), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-13)


def test_rotated_queries_and_keys_see_only_their_distance(device):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 8))
    angles = np.outer(np.arange(12), 10.0 ** -np.arange(4))
    at = [to_host(ag.rotary(tensor(np.tile(x, (1, 1, 12, 1))), *(placed(f(angles), tensor(x)) for f in (np.cos, np.sin))))[0, 0]
          for x in (q, k)]
    scores = at[0] @ at[1].T                                   # (12, 12)
    for distance in range(-11, 12):
        along = np.diagonal(scores, distance)
        np.testing.assert_allclose(along, along[0], rtol=0, atol=1e-12)


@properties
@given(B=st.integers(1, 3), KV=st.integers(1, 3), share=st.integers(1, 3), T=sizes, more=st.integers(0, 3), hd=sizes,
       causal=st.booleans(), padded=st.booleans(), seed=seeds)
def test_attention(device, B, KV, share, T, more, hd, causal, padded, seed):
    rng = np.random.default_rng(seed)
    S = T + more
    mask = rng.integers(0, 2, (B, S)) if padded else None      # whole rows may be 0
    inputs = [rng.standard_normal(s) for s in ((B, KV * share, T, hd), (B, KV, S, hd), (B, KV, S, hd))]
    assert_twins(lambda q, k, v: ag.attention(q, k, v, causal=causal, key_mask=None if mask is None else to_device(mask)),
                 lambda q, k, v: composed.attention(q, k, v, causal=causal, key_mask=mask), *inputs)


def test_attention_over_more_than_one_block(device):
    """Longer than the blocks that a fast kernel may work in, with sizes that no block divides."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 4, (2, 71)) > 0
    inputs = [rng.standard_normal(s) for s in ((2, 6, 67, 5), (2, 2, 71, 5), (2, 2, 71, 5))]
    assert_twins(lambda q, k, v: ag.attention(q, k, v, causal=True, key_mask=to_device(mask)),
                 lambda q, k, v: composed.attention(q, k, v, causal=True, key_mask=mask), *inputs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_query_without_keys_gets_zero_and_passes_no_gradient_on(device, dtype):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(s) for s in ((2, 2, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4))]
    mask = np.array([[0, 0, 0], [1, 1, 1]])
    o, dq, dk, dv = run(lambda q, k, v: ag.attention(q, k, v, key_mask=to_device(mask)), inputs, dtype)
    for a in (o, dq, dk, dv):
        assert not a[0].any() and a[1].any() and np.isfinite(a).all()
    left = np.array([[0, 1, 1], [1, 1, 1]])                    # causal: only query 0 of row 0 is without keys
    o, dq, dk, dv = run(lambda q, k, v: ag.attention(q, k, v, causal=True, key_mask=to_device(left)), inputs, dtype)
    assert not o[0, :, 0].any() and not dq[0, :, 0].any() and not dk[0, :, 0].any() and not dv[0, :, 0].any()
    assert o[0, :, 1:].all() and np.isfinite(dk).all()


def test_queries_are_aligned_to_the_last_keys(device):
    """With S > T, as with a cache, the T queries give what the last T of S queries give."""
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng.standard_normal((2, 3, 6, 4))) for _ in range(3))
    whole = to_host(ag.attention(q, k, v, causal=True))
    np.testing.assert_allclose(to_host(ag.attention(q[:, :, 4:], k, v, causal=True)), whole[:, :, 4:], rtol=0, atol=1e-14)
    np.testing.assert_allclose(to_host(ag.attention(q[:, :, 5:], k, v, causal=True)), whole[:, :, 5:], rtol=0, atol=1e-14)
    seen = to_host(ag.attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True))
    np.testing.assert_allclose(seen, whole[:, :, :4], rtol=0, atol=1e-14)


def test_attention_does_not_overflow(device, put):
    q = Tensor(put(np.full((1, 1, 2, 4), 1e3), "float32"), requires_grad=True)
    v = put(np.arange(8.0).reshape(1, 1, 2, 4), "float32")
    o = ag.attention(q, q.data, v)
    o.sum().backward()
    np.testing.assert_allclose(to_host(o)[0, 0], [[2, 3, 4, 5]] * 2)
    assert np.isfinite(to_host(q.grad)).all()


# Linear layers

@properties
@given(lead=st.lists(sizes, max_size=3), k=sizes, d=sizes, bias=st.booleans(), seed=seeds)
def test_linear(device, lead, k, d, bias, seed):
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal((*lead, k)), rng.standard_normal((d, k)), rng.standard_normal(d)][: 3 if bias else 2]
    assert_twins(ag.linear, composed.linear, *inputs)


@properties
@given(lead=st.lists(sizes, max_size=3), k=sizes, F=sizes, d=sizes, bias=st.booleans(), seed=seeds,
       activation=st.sampled_from(["gelu", "gelu_tanh", "silu"]))
def test_feed_forward(device, lead, k, F, d, bias, seed, activation):
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal(s) for s in ((*lead, k), (F, k), (d, F), (F,), (d,))][: 5 if bias else 3]
    act = ag.gelu if activation == "gelu" else getattr(composed, activation)
    assert_twins(lambda x, W1, W2, b1=None, b2=None: ag.feed_forward(x, W1, b1, W2, b2, activation),
                 lambda x, W1, W2, b1=None, b2=None: composed.linear(act(composed.linear(x, W1, b1)), W2, b2), *inputs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_feed_forward_over_more_than_one_block(device, dtype):
    """More rows than the blocks that a fast kernel may work in, and no multiple of them."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(s) * 0.3 for s in ((1031, 24), (96, 24), (96,), (24, 96), (24,))]
    got = run(lambda *a: ag.feed_forward(*a, "gelu_tanh"), inputs, dtype)
    expected = run(lambda x, W1, b1, W2, b2: composed.linear(composed.gelu_tanh(composed.linear(x, W1, b1)), W2, b2), inputs)
    assert_near(got, expected, 1e-12 if dtype == "float64" else 1e-5)


@properties
@given(B=sizes, T=sizes, k=sizes, d=sizes, r=st.integers(1, 3), bias=st.booleans(), scale=st.sampled_from([0.5, -2.0]),
       seed=seeds)
def test_lora_linear_thin_formed_and_composed(device, B, T, k, d, r, bias, scale, seed):
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal(s) for s in ((B, T, k), (d, k), (r, k), (d, r))] + ([rng.standard_normal(d)] if bias else [])
    twin = lambda x, W, A, B, b=None: composed.lora_linear(x, W, b, [(A, B)], [scale], [slice(0, d)], [None])  # noqa: E731
    for formed in (False, True, None):
        assert_twins(lambda x, W, A, B, b=None, f=formed: ag.lora_linear(x, W, b, A, B, scale, f), twin, *inputs)


BLOCKS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda p: p[0] < p[1]), min_size=1, max_size=4)


@properties
@given(B=sizes, T=sizes, k=sizes, edges=BLOCKS, masked=st.booleans(), seed=seeds)
def test_several_adapters_on_row_blocks_with_masks(device, B, T, k, edges, masked, seed):
    rng = np.random.default_rng(seed)
    blocks, scales = [slice(*e) for e in edges], [0.5 + j for j in range(len(edges))]
    kinds = [lambda: None, lambda: 1.0 * rng.integers(0, 2, (B, 1, 1)), lambda: rng.integers(0, 2, (B, T, k)) / 0.5]
    masks = [kinds[rng.integers(3) if masked else 0]() for _ in blocks]
    ranks = [int(rng.integers(1, 4)) for _ in blocks]
    inputs = [rng.standard_normal(s) for s in ((B, T, k), (5, k), (5,))]
    inputs += [rng.standard_normal(s) for block, r in zip(blocks, ranks) for s in ((r, k), (block.stop - block.start, r))]

    def fused(x: Tensor, *rest: Tensor, formed: bool | None = None) -> Tensor:
        return LoRALinear(scales, blocks, [placed(m, x) for m in masks], formed)(x, *rest)

    def twin(x: Tensor, W: Tensor, b: Tensor, *factors: Tensor) -> Tensor:
        return composed.lora_linear(x, W, b, list(zip(factors[::2], factors[1::2])), scales, blocks, masks)

    assert_twins(fused, twin, *inputs)
    if all(m is None for m in masks):
        assert_twins(lambda *a: fused(*a, formed=True), twin, *inputs)
        assert_twins(lambda *a: fused(*a, formed=False), twin, *inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("formed", [False, True, None])
def test_adapters_along_the_leading_axis_run_as_they_would_alone(device, put, formed, masked):
    if formed and masked:
        pytest.skip("a mask on the branch has no formed order")
    rng = np.random.default_rng(0)
    K, n, k, d, r = 3, 4, 5, 6, 2
    block, scales = slice(1, 5), np.array([0.5, 1.0, 2.0])
    x, W, b = rng.standard_normal((K, n, k)), rng.standard_normal((d, k)), rng.standard_normal(d)
    A, B = rng.standard_normal((K, r, k)), rng.standard_normal((K, 4, r))
    A2, B2 = rng.standard_normal((K, 1, k)), rng.standard_normal((K, d, 1))
    mask = rng.integers(0, 2, (K, n, k)) / 0.5 if masked else None

    def together(x, W, b, A, B, A2, B2):
        return LoRALinear([put(scales), 0.25], [block, slice(0, d)], [placed(mask, x), None], formed)(x, W, b, A, B, A2, B2)

    y, dx, dW, db, *factors = run(together, [x, W, b, A, B, A2, B2])
    c = np.random.default_rng(7).standard_normal(y.shape)
    sums = [np.zeros_like(W), np.zeros_like(b)]
    for i in range(K):
        own = [tensor(a, requires_grad=True) for a in (x[i], W, b, A[i], B[i], A2[i], B2[i])]
        masks = [None if mask is None else mask[i], None]
        alone = composed.lora_linear(*own[:3], [(own[3], own[4]), (own[5], own[6])], [float(scales[i]), 0.25],
                                     [block, slice(0, d)], masks)
        alone.backward(c[i])
        got = [y[i], dx[i], *(g[i] for g in factors)]
        expected = [to_host(alone), to_host(own[0].grad), *(to_host(t.grad) for t in own[3:])]
        assert_near(got, expected, 1e-13)
        sums[0] += to_host(own[1].grad)
        sums[1] += to_host(own[2].grad)
    assert_near([dW, db], sums, 1e-13)                         # W and b are shared: their gradients add up


class TwiceTheIdentity:
    """A base that is no array, as a quantised one: W = 2·1."""

    shape = (4, 4)

    def linear(self, x: Any) -> Any:
        return 2.0 * x

    def linear_grad(self, dy: Any) -> Any:
        return 2.0 * dy


def test_a_base_that_multiplies_by_itself(device):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(s) for s in ((2, 3, 4), (2, 4), (4, 2))]
    dense = lambda x: Tensor(to_device(2.0 * np.eye(4, dtype=x.dtype)))  # noqa: E731
    assert_twins(lambda x: ag.linear(x, TwiceTheIdentity()), lambda x: composed.linear(x, dense(x)), inputs[0])
    assert_twins(lambda x, A, B: ag.lora_linear(x, TwiceTheIdentity(), None, A, B, 0.5),
                 lambda x, A, B: composed.lora_linear(x, dense(x), None, [(A, B)], [0.5], [slice(0, 4)], [None]), *inputs)


def test_the_cheaper_order_is_chosen_and_a_wrong_wish_refused(device, put):
    k, d, r = 12, 6, 2                                         # forming pays beyond n = 2 · 72/18 = 8 rows
    W, A, B = (put(np.ones(s)) for s in ((d, k), (r, k), (d, r)))
    for n, formed in ((8, False), (9, True)):
        op = LoRALinear([1.0], [slice(0, d)], [None])
        op(put(np.ones((n, k))), W, None, A, B)
        assert op.formed is formed
    x = put(np.ones((9, k)))
    op = LoRALinear([1.0], [slice(0, d)], [x])
    op(x, W, None, A, B)
    assert op.formed is False
    for masks, base in (([x], W), ([None], TwiceTheIdentity())):
        with pytest.raises(ValueError, match="formed=True with a mask"):
            LoRALinear([1.0], [slice(0, d)], masks, True)(x, base, None, A, B)


def test_the_twins_can_tell_a_mistake(device, monkeypatch):
    """Planted: a softmax whose gradient forgets the sum; a scale that is applied twice in the gradient of B."""
    monkeypatch.setattr(ag.Op.registry["Softmax"], "backward", lambda self, dy: self.kept * dy)
    x = np.random.default_rng(0).standard_normal((2, 3))
    with pytest.raises(AssertionError):
        assert_twins(ag.softmax, composed.softmax, x)
    right = LoRALinear.backward
    monkeypatch.setattr(LoRALinear, "backward", lambda self, dy: (*right(self, dy)[:4], right(self, dy)[4] * 0.5))
    with pytest.raises(AssertionError):
        test_lora_linear_thin_formed_and_composed.hypothesis.inner_test(device, 1, 2, 3, 2, 1, False, 0.5, 0)
