"""One suite for every device: a test that takes `device` runs on NumPy, on the stand-in for CuPy, and on a GPU.

    def test_something(device, put, rng):
        x = put(rng.standard_normal((3, 4)))       # on the device under test
        assert_allclose(to_host(f(x)), expected)
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")      # before NumPy loads: the matrices are small, and the tests run side by side

import fake_device  # noqa: F401  (registers the device "fake")
import numpy as np
import pytest

from minilora.backend import current_device, set_device, to_device

DEVICES = {"numpy": "cpu", "fake": "fake", "cupy": "gpu"}     # the name in the test's id -> the name for set_device


def why_no_gpu() -> str | None:
    """Why the tests on a GPU cannot run here; None if they can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy
    return None if cupy.is_available() else "CuPy finds no GPU"


@pytest.hookimpl(tryfirst=True)                            # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The stand-in is written in Python: what is quick on NumPy may be slow there."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.get_closest_marker("slow_on_the_stand_in") and params.get("device") == "fake":
            item.add_marker("slow")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.cupy if name == "cupy" else ()) for name in DEVICES])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device under test, made the current one: "cpu", "fake" or "gpu"."""
    if request.param == "cupy" and (reason := why_no_gpu()):
        pytest.skip(reason)
    before = current_device()
    set_device(DEVICES[request.param])
    yield DEVICES[request.param]
    set_device(before.name)


@pytest.fixture
def put(device: str) -> Callable[..., Any]:
    """put(array, dtype=None): a host array, moved to the device under test."""
    return lambda array, dtype=None: to_device(np.asarray(array, dtype), device)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _state() -> dict[str, str]:
    return {"device": current_device().name, **np.geterr()}


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    """Fail a test that changes the current device, or what NumPy does on overflow, and does not change it back."""
    before = _state()
    yield
    after = _state()
    if after != before:
        set_device(before.pop("device"))
        np.seterr(**before)
        pytest.fail(f"the test leaves {after}: restore it (the fixture `device`, numpy.errstate)")
