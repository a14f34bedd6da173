"""The checker itself: right gradients pass, each planted mistake is found and named, and the cotangent has to be random."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import numpy as np
import pytest

from minilora import autograd as ag
from minilora.autograd import GradcheckError, Op, Tensor, gradcheck, no_grad, tensor
from minilora.backend import array_module, to_device, to_host

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((3, 4)), RNG.standard_normal((2, 4))


def planted(right: type[Op], **methods: Any) -> type[Op]:
    """The op `right` with some methods replaced by wrong ones, kept out of the registry."""
    kind = type("Wrong" + right.__name__, (right,), {k: f for k, f in methods.items() if k != "backward"})
    if "backward" in methods:
        kind.backward = methods["backward"]                    # set later, so that it is not registered
    return kind


class UnsummedBias(Op.registry["Linear"]):                     # defines no backward of its own: not registered
    """Hides from the engine's check of shapes: right shape, one row's cotangent instead of the sum over rows."""


UnsummedBias.backward = lambda self, dy: (None, None, dy.reshape(-1, dy.shape[-1])[0])

SOFTMAX, GETITEM, TANH, NORM = (Op.registry[n] for n in ("Softmax", "GetItem", "Tanh", "LayerNorm"))


def assigned(self, dy):
    da = array_module(dy).zeros(self.kept, dtype=dy.dtype)
    for n in range(dy.shape[0]):
        da[int(self.index[n])] = dy[n]                         # `=`: the last one wins
    return da


def without_the_part_along_x(self, dy):
    _, rho, w = self.kept
    g = dy * w
    return (g - g.sum(axis=-1, keepdims=True) * (1.0 / g.shape[-1])) * rho, *NORM.backward(self, dy)[1:]


# (what is wrong, the function, its inputs, the input that is named)
MISTAKES = {
    "zero softmax": (lambda x: planted(SOFTMAX, backward=lambda self, dy: dy * 0.0)()(x), [X], 0),
    "diagonal-only softmax": (
        lambda x: planted(SOFTMAX, backward=lambda self, dy: dy * self.kept * (1.0 - self.kept))()(x), [X], 0),
    "sign": (lambda a, x: planted(TANH, backward=lambda self, dy: -TANH.backward(self, dy))()(x) + a, [X, X], 1),
    "factor": (lambda x: planted(TANH, backward=lambda self, dy: TANH.backward(self, dy) * 1.0001)()(x), [X], 0),
    "= in place of add": (lambda x: planted(GETITEM, backward=assigned)(to_device(np.array([0, 2, 0])))(x), [X], 0),
    "norm without a term": (
        lambda x, w: planted(NORM, backward=without_the_part_along_x)()(x, w, w), [X, X[0]], 0),
    "bias not summed over rows": (lambda x, w, b: UnsummedBias()(x.detach(), w.detach(), b), [X, W, W[:, 0]], 2),
    "cut graph": (lambda x: x * x.detach(), [X], 0),
    "half the paths": (lambda x: ag.tanh(x) + ag.exp(x.detach()), [X], 0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(device, mistake):
    fn, inputs, culprit = MISTAKES[mistake]
    inputs = [tensor(x, requires_grad=mistake != "bias not summed over rows" or x.ndim == 1) for x in inputs]
    with pytest.raises(GradcheckError) as error:
        gradcheck(fn, inputs)
    assert f"wrong gradient for input {culprit} " in str(error.value)


@pytest.mark.parametrize("mistake", ["zero softmax", "diagonal-only softmax", "sign", "= in place of add", "half the paths"])
def test_a_planted_mistake_is_found_along_random_directions_and_by_the_complex_step(device, mistake):
    fn, inputs, culprit = MISTAKES[mistake]
    for options in ({"directions": 2}, {"method": "complex"}):
        with pytest.raises(GradcheckError, match=f"wrong gradient for input {culprit} "):
            gradcheck(fn, inputs, **options)


def test_the_message_names_input_element_and_both_numbers(device):
    class Tripled(Op.registry["Multiply"]):
        pass

    Tripled.backward = lambda self, dy: (dy * self.kept[1] * to_device(np.array([[1.0, 1.0, 3.0]])), dy * self.kept[0])
    a, b = RNG.standard_normal((2, 1, 3))
    with pytest.raises(GradcheckError) as error:
        gradcheck(lambda a, b: Tripled()(a, b), [a, b], seed=4)
    c = np.random.default_rng(4).standard_normal((1, 3))       # the cotangent
    message = str(error.value)
    found = re.search(r"input 0 \(shape \(1, 3\)\) at element \(0, 2\): backward gives (\S+), finite differences give (\S+), "
                      r"difference (\S+), allowed (\S+); the ratio is 3$", message)
    assert found, message
    analytic, numeric, difference, allowed = (float(x) for x in found.groups())
    assert analytic == pytest.approx(3 * c[0, 2] * b[0, 2], rel=1e-8) and numeric == pytest.approx(c[0, 2] * b[0, 2], rel=1e-8)
    # the message gives these two with three digits
    assert difference == pytest.approx(abs(analytic - numeric), rel=1e-2)
    assert allowed == pytest.approx(1e-8 + 1e-6 * abs(numeric), rel=1e-2)


def test_the_message_hints(device):
    hints = {"sign": "the sign is wrong", "zero softmax": "gives zero here", "factor": r"the ratio is 1\.0001"}
    for mistake, hint in hints.items():
        with pytest.raises(GradcheckError, match=hint):
            gradcheck(*MISTAKES[mistake][:2])


def test_with_a_cotangent_of_ones_a_zero_softmax_gradient_would_pass(device):
    """Each row of a softmax sums to 1, so Σ y is constant, and with ones the slope to compare with is zero everywhere."""
    wrong = MISTAKES["zero softmax"][0]
    x = tensor(X, requires_grad=True)
    wrong(x).sum().backward()                                  # the cotangent of a plain sum is ones
    analytic = to_host(x.grad)
    numeric = np.zeros_like(X)
    for where in np.ndindex(*X.shape):
        step = np.zeros_like(X)
        step[where] = 1e-5
        above, below = (to_host(wrong(tensor(X + sign * step))).sum() for sign in (1, -1))
        numeric[where] = (above - below) / 2e-5
    assert not analytic.any()
    assert (abs(analytic - numeric) <= 1e-8 + 1e-6 * abs(numeric)).all()         # it passes
    with pytest.raises(GradcheckError):                        # and fails here, whatever the seed of the cotangent
        gradcheck(wrong, [X])
    for seed in range(1, 20):
        with pytest.raises(GradcheckError):
            gradcheck(wrong, [X], seed=seed)


def test_a_forgotten_sum_over_a_broadcast_axis_is_found(device, monkeypatch):
    def first(g, shape):                                       # keeps the first slice in place of the sum
        return g if g.shape == shape else g[tuple(slice(0, n) for n in shape)]

    monkeypatch.setattr(sys.modules["minilora.autograd.tensor"], "unbroadcast", first)
    with pytest.raises(GradcheckError, match=r"input 1 \(shape \(1, 4\)\)"):
        gradcheck(lambda a, b: a * b, [X, X[:1]])


def test_right_gradients_pass_in_all_ways(device):
    fn = lambda x, w: (ag.softmax(x @ w.T), ag.tanh(x) / (1.0 + ag.exp(w[:1])))  # noqa: E731
    for options in ({}, {"directions": 3}, {"method": "complex"}, {"method": "complex", "directions": 2}, {"seed": 11},
                    {"eps": 1e-6, "rtol": 1e-5, "atol": 1e-7}):
        assert gradcheck(fn, [X, W], **options) is True


def test_the_complex_step_is_exact_to_rounding(device):
    fn = lambda x: ag.log_softmax(ag.exp(x) * ag.tanh(x))  # noqa: E731
    assert gradcheck(fn, [X], method="complex", rtol=1e-13, atol=1e-14)
    with pytest.raises(GradcheckError):                        # central differences are not
        gradcheck(fn, [X], rtol=1e-13, atol=1e-14)


def test_inputs_of_every_kind(device, put):
    assert gradcheck(lambda a, b, c: a * b + c, [2.0, [1.0, 3.0], put(X[:, :2])])
    assert gradcheck(lambda a, ids: a[ids.data], [X, np.array([0, 0, 2])])       # integers are passed on, not checked
    assert gradcheck(lambda a, c: a * c, [X, tensor(X)])                         # nor is what requires no gradient
    x = tensor(X, requires_grad=True)
    assert gradcheck(lambda a, b: a * b, [x, x])
    assert gradcheck(ag.exp, [np.zeros((0, 3))])


def test_parameters_are_put_back_and_seen_by_closures(device):
    """A model's parameters are perturbed in place: what else looks at their memory must follow."""
    whole = to_device(X.copy())
    view = Tensor(whole[1:], requires_grad=True)
    seen = []

    def fn(v: Tensor) -> Tensor:
        seen.append(to_host(whole).copy())
        return v * v

    array = view.data
    assert gradcheck(fn, [view])
    assert view.data is array
    np.testing.assert_array_equal(to_host(whole), X)
    assert all((s[0] == X[0]).all() for s in seen) and any((s[1:] != X[1:]).any() for s in seen)


def test_parameters_are_put_back_after_an_error(device):
    x, calls = tensor(X, requires_grad=True), []

    def breaks_later(t: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("in the middle")
        return t * t

    for method in ("central", "complex"):
        calls.clear()
        with pytest.raises(KeyError):
            gradcheck(breaks_later, [x], method=method)
        assert x.dtype == np.float64
        np.testing.assert_array_equal(to_host(x.data), X)


def test_old_gradients_do_not_count(device):
    x = tensor(X, requires_grad=True)
    (x * 7.0).sum().backward()
    assert gradcheck(lambda t: t * t, [x])


def test_what_it_refuses(device):
    with pytest.raises(TypeError, match="input 1 is float32, expected float64"):
        gradcheck(lambda a, b: a, [X, X.astype("float32")])
    with pytest.raises(TypeError, match="float32 and float64"):                  # float32 inside
        gradcheck(lambda a: a * Tensor(to_device(X.astype("float32"))), [X])
    with pytest.raises(ValueError, match="'central' or 'complex'"):
        gradcheck(ag.exp, [X], method="forward")
    with pytest.raises(ValueError, match="nothing to check"):
        gradcheck(lambda ids: ids, [np.arange(3)])
    with pytest.raises(GradcheckError, match="does not depend on any input"):
        gradcheck(lambda x: x.detach() * 2.0, [X])
    with pytest.raises(GradcheckError, match="does not depend on any input"), no_grad():
        gradcheck(ag.exp, [X])
    with pytest.raises(TypeError, match=r"complex.*central"):
        gradcheck(lambda x: ag.exp(x) + ag.gelu(x), [X], method="complex")
    with pytest.raises(TypeError, match=r"returned a real number.*central"):
        gradcheck(lambda x: planted(TANH, forward=lambda self, a: TANH.forward(self, a.real))()(x), [X], method="complex")


def test_float32_would_be_noise():
    """Why float32 is refused: the rounding of f alone moves the slope by more than the whole tolerance."""
    x, eps = np.float32(0.7), np.float32(1e-5)
    slope = (np.exp(x + eps) - np.exp(x - eps)) / (2 * eps)
    assert abs(float(slope) - math.exp(0.7)) > 1000 * (1e-8 + 1e-6 * math.exp(0.7))


def test_a_failed_check_is_an_assertion_error():
    """So that pytest and `assert` users see it as a failed test, not as an error of the test."""
    assert issubclass(GradcheckError, AssertionError)
