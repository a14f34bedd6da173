"""The reverse pass itself: where gradients go, what is freed and when, what is refused, and what is never computed."""

from __future__ import annotations

import gc
import operator
import weakref
from typing import Any

import numpy as np
import pytest

from minilora import autograd as ag
from minilora.autograd import Op, Tensor, gradcheck, no_grad, tensor
from minilora.autograd.linear import LoRALinear
from minilora.autograd.tensor import unbroadcast
from minilora.backend import get_device, to_device, to_host


def leaf(*values: float, dtype: str = "float64") -> Tensor:
    return tensor(np.array(values, dtype), requires_grad=True)


def grad(t: Tensor) -> list[float]:
    return to_host(t.grad).tolist()


@pytest.fixture
def products(device, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the results of all matrix products from now on."""
    shapes: list[tuple[int, ...]] = []
    kind = type(get_device(device).kernels)
    right = kind.matmul

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = right(self, *args, **kwargs)
        shapes.append(y.shape)
        return y

    monkeypatch.setattr(kind, "matmul", counted)
    return shapes


def weakly(t: Tensor) -> weakref.ref:
    """A weak reference to the tensor's array; to the tensor itself where arrays of the device take none."""
    array = getattr(t.data, "_host", t.data)                   # the stand-in's own NumPy array
    return weakref.ref(array if isinstance(array, np.ndarray) else t)


# One graph, one reverse pass

def test_gradients_of_a_small_expression_by_hand(device):
    a, b = leaf(2.0, -1.0), leaf(3.0, 5.0)
    ((a * b + a) / b - 2.0 * b).sum().backward()               # a + a/b - 2b
    np.testing.assert_allclose(grad(a), [1 + 1 / 3, 1 + 1 / 5])
    np.testing.assert_allclose(grad(b), [-2 / 9 - 2, 1 / 25 - 2])


def test_a_second_backward_through_a_freed_graph_raises(device):
    x = leaf(1.0, 2.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"second time.*retain_graph=True"):
        y.backward()
    assert grad(x) == [2.0, 4.0]
    shared = x.detach()
    shared.requires_grad = True
    middle = shared * shared
    one, two = middle.sum(), (3.0 * middle).sum()
    one.backward()
    with pytest.raises(RuntimeError, match="Multiply a second time"):
        two.backward()                                         # its lower part was freed by the first


def test_retain_graph_adds_exactly_once_more(device):
    x, w = leaf(0.3, -0.7), leaf(0.1, 0.2)
    y = (ag.tanh(x * w) * ag.softmax(x)).sum()
    y.backward(retain_graph=True)
    once = np.array([grad(x), grad(w)])
    y.backward(retain_graph=True)
    np.testing.assert_allclose([grad(x), grad(w)], 2 * once, rtol=1e-15)
    y.backward()
    np.testing.assert_allclose([grad(x), grad(w)], 3 * once, rtol=1e-15)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_second_forward_and_backward_adds_exactly_once_more(device):
    x = leaf(0.5, -1.5, 2.5)
    for times in (1, 2, 3):
        (x * x * 0.5).sum().backward()
        np.testing.assert_array_equal(grad(x), times * to_host(x.data))
    x.grad = None
    (x * x * 0.5).sum().backward()
    np.testing.assert_array_equal(grad(x), to_host(x.data))


def test_gradients_live_on_leaves_only(device):
    x = leaf(1.0, 2.0)
    h = x * 3.0
    y = ag.exp(h)
    y.sum().backward()
    assert h.grad is None and y.grad is None and x.grad is not None


def test_a_leaf_is_its_own_graph(device):
    x, c = leaf(1.0, 2.0), np.array([3.0, 4.0])
    on_device = to_device(c)
    x.backward(on_device)
    x.backward(on_device)
    assert grad(x) == [6.0, 8.0] and to_host(on_device).tolist() == [3.0, 4.0]


def test_the_same_tensor_as_both_operands(device):
    for fn, expected in ((lambda x: x - x, 0.0), (lambda x: x / x, 0.0), (lambda x: x + x, 2.0), (lambda x: x * x, 8.0)):
        x = tensor(np.array([4.0]), requires_grad=True)
        fn(x).sum().backward()
        assert grad(x) == [expected]


def test_diamonds(device):
    x = leaf(0.4)
    a = x * 2.0
    b, c = ag.exp(a), ag.tanh(a)
    d = b * c + a                                              # a is used three times, at two depths
    (d * b).sum().backward()
    v = 0.8
    e, t, s = np.exp(v), np.tanh(v), 1 - np.tanh(v) ** 2
    np.testing.assert_allclose(grad(x), [2 * ((e * t + e * s + 1) * e + (e * t + v) * e)], rtol=1e-14)


def test_a_ladder_of_diamonds_is_walked_once(device):
    """2^60 paths, 60 ops: each op's backward runs once, with its whole cotangent."""
    x = leaf(1.0)
    y = x
    for _ in range(60):
        y = y + y
    y.sum().backward()
    assert grad(x) == [2.0**60]


@pytest.mark.slow_on_the_stand_in
def test_a_chain_of_20000_ops(device):
    """No recursion, neither in the reverse pass nor when the graph is thrown away unused."""
    x = leaf(1.0)
    y = x
    for _ in range(20_000):
        y = y + 1.0
    y.sum().backward()
    assert grad(x) == [1.0] and to_host(y).tolist() == [20_001.0]
    unused = x
    for _ in range(20_000):
        unused = unused * 1.0
    del unused
    gc.collect()


def test_unused_outputs_and_unused_branches(device):
    x = leaf(1.0, 2.0, 3.0, 4.0)
    first, second, _ = ag.split(x, [1, 2, 1])
    ag.exp(first)                                              # leads nowhere
    (second * 5.0).sum().backward()
    assert grad(x) == [0.0, 5.0, 5.0, 0.0]
    y = leaf(1.0, 2.0)
    parts = ag.split(y, [1, 1])
    (parts[1] * parts[1] * parts[0]).sum().backward()
    assert grad(y) == [4.0, 4.0]


def test_a_cotangent_is_a_weight_on_the_outputs(device):
    x = leaf(1.0, 2.0)
    (x * x).backward(tensor(np.array([10.0, 0.5])))
    assert grad(x) == [20.0, 2.0]


def test_what_backward_refuses(device):
    x, y = leaf(1.0, 2.0), leaf(1.0, dtype="float32")
    with pytest.raises(RuntimeError, match="does not require a gradient"):
        tensor(np.ones(1)).backward()
    with pytest.raises(ValueError, match=r"one-element tensor, got shape \(2,\)"):
        (x * 2.0).backward()
    with pytest.raises(ValueError, match=r"shape \(3,\) float64, expected the tensor's, \(2,\) float64"):
        (x * 2.0).backward(np.ones(3))
    with pytest.raises(ValueError, match=r"float64, expected the tensor's, \(1,\) float32"):
        (y * 2.0).backward(np.ones(1))
    assert x.grad is None and y.grad is None
    y.reshape(1, 1, 1).backward()                              # one element, whatever the shape
    assert grad(y) == [1.0]


def test_a_gradient_of_a_scalar_is_an_array_like_any_other(device):
    x = tensor(np.array(2.0), requires_grad=True)
    for times in (1, 2):
        (x * np.ones(3) if device == "cpu" else x * to_device(np.ones(3))).sum().backward()
        assert isinstance(x.grad, get_device(device).array_type)
        assert x.grad.shape == () and float(to_host(x.grad)) == 3.0 * times


# What needs no gradient

def test_frozen_inputs_get_none_and_cut_nothing(device):
    x, w = leaf(1.0, 2.0), tensor(np.array([3.0, 4.0]))
    h = x * w
    (h * h).sum().backward()
    assert w.grad is None and grad(x) == [18.0, 64.0]
    y = w * w + 1.0
    assert not y.requires_grad and y.op is None


def test_no_grad(device):
    x = leaf(1.0, 2.0)
    with no_grad():
        y = x * x
        with no_grad():
            pass
        z = x + 1.0                                            # still off after an inner block ends
    assert not y.requires_grad and y.op is None and not z.requires_grad
    with pytest.raises(RuntimeError, match="no_grad"):
        y.sum().backward()
    assert (x * x).requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError("an error inside the block")
    (x * x + y).sum().backward()                               # y is a constant here
    assert grad(x) == [2.0, 4.0]


def test_detach_shares_the_array_and_cuts_the_graph(device):
    x = leaf(2.0)
    d = (x * 3.0).detach()
    (d * x).sum().backward()
    assert grad(x) == [6.0] and not d.requires_grad
    assert x.detach().data is x.data


def test_freezing_between_forward_and_backward_changes_nothing(device):
    x, w = leaf(2.0), leaf(5.0)
    y = x * w
    w.requires_grad = False
    y.sum().backward()
    assert grad(x) == [5.0] and grad(w) == [2.0]


# Memory: what is kept, and until when

def test_under_a_frozen_linear_the_input_is_freed_and_no_weight_gradient_computed(device, products):
    x = tensor(np.ones((5, 3)), requires_grad=True)
    W, b = tensor(np.ones((2, 3))), tensor(np.ones(2), requires_grad=True)
    h = ag.tanh(x) + 1.0                                       # nothing but the linear layer could want h
    y = ag.linear(h, W, b)
    assert y.op.kept[0] is None and y.op.kept[1] is W.data
    array = weakly(h)
    del h
    assert array() is None
    products.clear()
    y.sum().backward()
    assert products == [(5, 3)]                                # ȳ W, and no ȳᵀ x
    assert W.grad is None and grad(b) == [5.0, 5.0]


def test_a_trained_linear_on_frozen_input_computes_only_the_weight_gradient(device, products):
    x, W = tensor(np.ones((5, 3))), tensor(np.ones((2, 3)), requires_grad=True)
    y = ag.linear(x, W)
    assert y.op.kept[0] is x.data and y.op.kept[1] is None
    products.clear()
    y.sum().backward()
    assert products == [(2, 3)]


@pytest.mark.parametrize("formed", [False, True])
def test_lora_on_a_frozen_base_never_forms_a_weight_gradient(device, products, formed):
    n, k, d, r = 7, 6, 5, 2
    x, W = tensor(np.ones((n, k)), requires_grad=True), tensor(np.ones((d, k)))
    A, B = tensor(np.ones((r, k)), requires_grad=True), tensor(np.ones((d, r)), requires_grad=True)
    y = ag.lora_linear(x, W, None, A, B, 0.5, formed)
    products.clear()
    y.sum().backward()
    assert (d, k) not in products
    assert sorted(products) == sorted([(n, k), (n, r), (r, k), (d, r)] + ([(n, r)] if formed else [(n, k)]))


@pytest.mark.parametrize("formed", [False, True])
def test_under_frozen_adapters_the_input_is_freed(device, formed):
    x = tensor(np.ones((3, 4)), requires_grad=True)
    constants = [tensor(np.ones(s)) for s in ((2, 4), (1, 4), (2, 1))]
    h = x + 1.0
    y = LoRALinear([1.0], [slice(0, 2)], [None], formed)(h, constants[0], None, *constants[1:])
    array = weakly(h)
    del h
    assert y.op.kept[0] is None and array() is None
    y.sum().backward()
    assert grad(x) == [[4.0] * 4] * 3


def test_a_constant_factor_does_not_keep_the_other(device):
    x = leaf(1.0, 2.0)
    assert (x * 2.0).op.kept == (None, 2.0)
    assert ag.matmul(x.reshape(1, 2), tensor(np.ones((2, 1)))).op.kept[0] is None


def test_backward_frees_the_graph_as_it_goes(device):
    x = leaf(1.0, 2.0)
    h = ag.exp(x)
    y = ag.tanh(h)
    ops = [y.op, h.op]
    kept = weakref.ref(h.op)
    y.sum().backward()
    assert [op.kept for op in ops] == [None, None] and [op.edges for op in ops] == [None, None]
    del ops, h
    assert kept() is None and y.data is not None               # y lives on, what was below it is gone without the collector


def test_intermediate_cotangents_do_not_pile_up(device, monkeypatch):
    """In a chain each cotangent dies as soon as the next one is there."""
    alive: list[weakref.ref] = []
    pull = Op.pull

    def watched(self: Op, cotangents: list[Any], retain_graph: bool) -> Any:
        for edge, gradient in pull(self, cotangents, retain_graph):
            alive.append(weakref.ref(gradient))
            yield edge, gradient

    if device != "cpu":
        pytest.skip("the stand-in's arrays take no weak references")
    monkeypatch.setattr(Op, "pull", watched)
    x = leaf(1.0, 2.0)
    y = x
    for _ in range(50):
        y = y * 1.01
    most = 0
    monkeypatch.setattr(ag.Op.registry["Multiply"], "backward",
                        (lambda right: lambda self, dy: (record(), right(self, dy))[1])(Op.registry["Multiply"].backward))

    def record() -> None:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))

    y.sum().backward()
    assert most <= 2


# Dtypes and devices

def test_mixing_precisions_is_refused(device):
    single, double = leaf(1.0, dtype="float32"), leaf(1.0)
    for mix in (lambda: single * double, lambda: single + to_device(np.ones(1)), lambda: ag.concatenate([single, double]),
                lambda: ag.where(to_device(np.array([True])), single, double)):
        with pytest.raises(TypeError, match=r"float32 and float64 together.*astype"):
            mix()
    with pytest.raises(TypeError, match="float32 and float64 together"):
        single * np.float64(2.0)
    with pytest.raises(TypeError, match=r"float32 and int64 together.*astype"):
        single * to_device(np.array([2]))                      # NumPy would make float64 of it
    with pytest.raises(TypeError, match="list among its operands"):
        operator.add(double, [1.0])
    assert (single * to_device(np.array([True]))).dtype == "float32"
    assert (single * to_device(np.array([2], "int8"))).dtype == "float32"
    assert (double * to_device(np.array([2]))).dtype == "float64"


def test_mixing_devices_is_refused(device):
    if device != "fake":
        pytest.skip("needs two devices")
    x, host = tensor(np.ones((1, 1)), requires_grad=True), np.ones((1, 1))
    for mix in (lambda: x * host, lambda: host * x, lambda: x @ host, lambda: host @ x, lambda: ag.linear(x, Tensor(host))):
        with pytest.raises(TypeError, match=r"arrays of two devices.*to_device\("):
            mix()


def test_numbers_of_any_kind_leave_float32_alone(device):
    x = leaf(1.5, 2.5, dtype="float32")
    one, eps = np.float64(1.0), np.float64(1e-5)               # float64 scalars that a caller computed, as options
    results = [x + 1, 1 - x, x * 0.1, 3 / x, x / 3, x**2, x**0.5, x**one, -x, x.mean(), x.sum(), x.max(), x.mean(0, True),
               ag.layer_norm(x, x, x, eps), ag.rms_norm(x, x, eps), ag.dropout(x, one / 4, np.random.default_rng(0)),
               ag.cross_entropy(x, 1, label_smoothing=one / 10), ag.lora_linear(x, x.reshape(1, 2), None, x.reshape(1, 2),
                                                                               x[:1].reshape(1, 1), one)]
    q = x.reshape(1, 1, 1, 2)
    results.append(ag.attention(q, q, q, scale=1 / np.sqrt(2)))
    for y in results:
        assert y.dtype == "float32"
        x.grad = None
        y.sum().backward()
        assert x.grad.dtype == "float32"


def test_numpy_arrays_and_scalars_on_the_left():
    a = np.array([[1.0, 2.0], [3.0, 4.0]])
    x = tensor(np.array([[5.0, 6.0], [7.0, 8.0]]), requires_grad=True)
    for y, expected in ((a * x, a * x.data), (a + x, a + x.data), (a - x, a - x.data), (a / x, a / x.data), (a @ x, a @ x.data),
                        (np.float64(2) * x, 2 * x.data), (a[0, 0] - x, 1 - x.data)):
        assert isinstance(y, Tensor)                           # one Tensor, not an array of them
        np.testing.assert_array_equal(to_host(y), expected)
    assert gradcheck(lambda x: a * x + a @ x - a / x + (a - x), [x])


def test_tensors_are_copies_with_the_dtypes_one_expects(device, put):
    array = put([1.0, 2.0], "float32")
    x = tensor(array)
    x.data[0] = 9.0
    assert to_host(array).tolist() == [1.0, 2.0] and x.dtype == "float32"
    for value, dtype in ((1.0, "float32"), ([1.0, 2.0], "float32"), (np.float64(1.0), "float64"), (np.ones(2), "float64"),
                         ([1, 2], "int64"), (3, "int64"), (True, "bool"), (x, "float32"), (np.ones(2, "float16"), "float16")):
        t = tensor(value)
        assert t.dtype == dtype and isinstance(t.data, get_device(device).array_type)
    with pytest.raises(TypeError, match="only floating-point tensors can require a gradient, got int64"):
        tensor([1, 2], requires_grad=True)


def test_the_parts_of_a_tensor(device):
    x = tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    assert (x.shape, x.dtype, x.ndim, x.size, len(x)) == ((2, 3), np.dtype("float64"), 2, 6, 2)
    assert x.T.shape == x.transpose((1, 0)).shape == x.transpose(1, 0).shape == (3, 2)
    assert x[1, 2].item() == 5.0 and isinstance(x[1, 2].item(), float)
    assert repr(tensor([1.0, 2.0])) == "tensor([1. 2.])" and "requires_grad=True" in repr(x)
    assert [to_host(row).tolist() for row in x] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


# An op that is wrong is told so

def once(forward: Any, backward: Any) -> Op:
    """An op of these two functions, which the registry does not keep."""
    kind = type("Planted", (Op,), {"forward": lambda self, *a: forward(*a)})
    kind.backward = lambda self, *dys: backward(*dys)          # set later, so that it is not registered
    return kind()


@pytest.mark.parametrize(("backward", "message"), [
    (lambda dy: dy[:1], r"returned \(1,\) float64 for input 0, expected \(2,\) float64"),
    (lambda dy: dy.sum(), r"returned \(\) float64 for input 0"),
    (lambda dy: dy.astype("float32"), r"returned \(2,\) float32 for input 0"),
    (lambda dy: None, "returned None for input 0"),
    (lambda dy: (dy, dy), "returned 2 gradients for 1 inputs"),
    (lambda dy: (), "returned 0 gradients for 1 inputs"),
])
def test_wrong_gradients_are_named(device, backward, message):
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match=f"Planted.backward {message}"):
        once(lambda a: a * 1.0, backward)(x).sum().backward()
    assert "Planted" not in Op.registry


def test_gradients_that_share_an_array_do_not_share_it_on_the_leaves(device):
    """The cotangent itself, as the gradient of two inputs; a view of it; the second output's cotangent."""
    a, b, c = leaf(1.0, 2.0), leaf(1.0, 2.0), leaf(1.0, 2.0)
    given = to_device(np.array([1.0, 1.0]))
    once(lambda a, b, c: a + b + c, lambda dy: (dy, dy, dy[...]))(a, b, c).backward(given)
    a.grad += 5.0
    assert grad(b) == grad(c) == [1.0, 1.0] == to_host(given).tolist() and grad(a) == [6.0, 6.0]
    one, two = once(lambda a, b: (a * 1.0, b * 1.0), lambda da, db: (da * 1.0, db))(a, b)
    b.grad = None
    total = one.sum() + (two * to_device(np.array([2.0, 2.0]))).sum()
    total.backward()
    assert grad(b) == [2.0, 2.0]


def test_unbroadcast_is_the_adjoint_of_broadcasting():
    rng = np.random.default_rng(0)
    for small, big in (((), (2, 3)), ((1,), (4,)), ((3, 1), (3, 4)), ((1, 1), (2, 5)), ((4,), (2, 3, 4)),
                       ((2, 1, 3), (2, 4, 3))):
        x, dy = rng.standard_normal(small), rng.standard_normal(big)
        back = unbroadcast(dy, small)
        assert back.shape == small
        np.testing.assert_allclose((np.broadcast_to(x, big) * dy).sum(), (x * back).sum(), rtol=1e-13)
