"""The error function against `math.erf`, in the readable form and in the form that the device's GELU uses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.backend import array_module, kernels, to_host
from minilora.backend.erf import TANH_LIMIT, erf

POINTS = np.unique(np.concatenate([
    np.linspace(-7, 7, 14001), np.logspace(-300, 0, 301), -np.logspace(-300, 0, 301),
    np.nextafter(TANH_LIMIT, [0, 9]), np.nextafter(-TANH_LIMIT, [0, -9]), [0.0, 1e-320]]))
ALLOWED = {"float32": 5e-7, "float64": 1e-15}


def exact(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(a) for a in x.astype("float64").ravel()]).reshape(x.shape)


@pytest.mark.parametrize("dtype", ALLOWED)
def test_absolute_error(device, put, dtype):
    with np.errstate(under="ignore"):                          # 1e-300 is 0 in float32
        x = put(POINTS.astype(dtype))
    y = erf(array_module(x), x)
    assert y.dtype == dtype and y.shape == x.shape
    assert abs(to_host(y) - exact(to_host(x))).max() <= ALLOWED[dtype]


def test_float32_keeps_its_relative_precision_down_to_zero(device, put):
    """tanh(x p(x²)) → 2x/√π; a form 1 - erfc(x), as the float64 one, would have lost every digit at 1e-6."""
    x = np.logspace(-30, -1, 400).astype("float32")
    np.testing.assert_allclose(to_host(erf(array_module(put(x)), put(x))), exact(x), rtol=1e-6)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=st.floats(allow_nan=False, width=32))
def test_odd_bounded_and_right_everywhere(put, x):
    for dtype, allowed in ALLOWED.items():
        a = put([x, -x], dtype)
        with np.errstate(over="ignore", under="ignore"):       # x² of the largest floats
            y = to_host(erf(array_module(a), a))
        assert y[0] == -y[1] and abs(y[0]) <= 1.0
        assert abs(float(y[0]) - math.erf(x)) <= allowed


@pytest.mark.parametrize("dtype", ALLOWED)
def test_ends_nan_and_the_order_of_values(device, put, dtype):
    x = put([-np.inf, np.inf, np.nan, 0.0], dtype)
    y = to_host(erf(array_module(x), x))
    np.testing.assert_allclose(y[:2], [-1.0, 1.0], rtol=ALLOWED[dtype])
    assert np.isnan(y[2]) and y[3] == 0.0
    rising = to_host(erf(array_module(x), put(np.linspace(-7, 7, 2001), dtype)))
    assert (np.diff(rising) >= -ALLOWED[dtype]).all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", ALLOWED)
def test_shape_and_dtype_are_kept_and_the_input_is_not_changed(device, put, shape, dtype):
    x = put(np.full(shape, 0.5), dtype)
    y = erf(array_module(x), x)
    assert y.shape == shape and y.dtype == dtype
    np.testing.assert_allclose(to_host(y), math.erf(0.5), rtol=1e-6)
    np.testing.assert_array_equal(to_host(x), 0.5)


def test_strided_input(device, put):
    x = put(np.linspace(-3, 3, 24).reshape(4, 6))[::2, ::-1].T
    np.testing.assert_allclose(to_host(erf(array_module(x), x)), exact(to_host(x)), rtol=0, atol=1e-15)


def test_complex_is_refused(device, put):
    for x in (put([1.0 + 2.0j]), put([0.5j], "complex64")):
        with pytest.raises(TypeError, match=r"no complex form.*central differences"):
            erf(array_module(x), x)
        with pytest.raises(TypeError, match="complex form"):
            kernels(x).gelu(x, True)


@pytest.mark.parametrize("size", [1, 1000, 70_000])
@pytest.mark.parametrize("dtype", ALLOWED)
def test_the_gelu_of_the_device_has_the_same_precision(device, put, dtype, size):
    """Long arrays too: a fast kernel works in blocks, and the last block is shorter."""
    x = np.linspace(-7, 7, size).astype(dtype)
    y, slope = (to_host(a) for a in kernels(put(x)).gelu(put(x), True))
    wide = x.astype("float64")
    cdf = 0.5 * (1.0 + exact(wide * math.sqrt(0.5)))
    allowed = ALLOWED[dtype] * 2
    assert y.dtype == slope.dtype == dtype
    assert abs(y - wide * cdf).max() <= 7 * allowed
    assert abs(slope - (cdf + wide * np.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi))).max() <= 7 * allowed
    alone, none = kernels(put(x)).gelu(put(x), False)
    assert none is None
    np.testing.assert_array_equal(to_host(alone), y)
