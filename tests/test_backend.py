"""The doors between host and device: who owns an array, how arrays cross, and what is said when that fails."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import fake_device
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import minilora.backend.device as device_module
from minilora.backend import (
    Device,
    array_module,
    current_device,
    device_of,
    get_device,
    host_rng,
    kernels,
    register_device,
    set_device,
    to_device,
    to_host,
)


@pytest.fixture
def fresh(monkeypatch):
    """The backend as it is right after import, and without CuPy's device, whatever ran before."""
    devices = {kind: d for kind, d in device_module._devices.items() if d.name != "gpu"}
    monkeypatch.setattr(device_module, "_devices", devices)
    monkeypatch.setattr(device_module, "_current", [])
    monkeypatch.delenv("MINILORA_DEVICE", raising=False)
    return monkeypatch


# Who owns an array

def test_the_owner_of_an_array(device, put):
    x = put([[1.0, 2.0]], "float32")
    owner = get_device(device)
    assert current_device() is owner and device_of(x) is owner
    assert array_module(x) is owner.xp and kernels(x) is owner.kernels
    assert isinstance(x, owner.array_type) and owner.xp.tanh(x).shape == (1, 2)


def test_numbers_and_none_have_no_device(device, put):
    x = put([1.0], "float32")
    assert device_of(2.0, None, x, True, 1j) is device_of(x)
    assert array_module() is array_module(1.0, None) is get_device(device).xp


def test_numpy_scalars_and_subclasses_live_on_the_cpu():
    class Named(np.ndarray):
        pass

    assert array_module(np.float32(1.0)) is array_module(np.zeros(2).view(Named)) is np


def test_a_mix_of_devices_is_an_error_that_says_what_to_do():
    host, x = np.ones(2), to_device(np.ones(2), "fake")
    for arrays in ((host, x), (x, 1.0, None, host)):
        for ask in (device_of, array_module, kernels):
            with pytest.raises(TypeError) as error:
                ask(*arrays)
            for part in ("numpy.ndarray", "fake_device.FakeArray", "to_device(", "to_host(", "model.to("):
                assert part in str(error.value)


@pytest.mark.parametrize("value", [[1.0], "cpu", object()])
def test_what_is_no_array_is_named(value):
    with pytest.raises(TypeError, match=f"got builtins.{type(value).__name__}; .*numpy.asarray"):
        array_module(value)


# The current device

def test_set_device_moves_the_default(device):
    assert isinstance(to_device([1, 2]), get_device(device).array_type)
    for name in ("cpu", device):
        set_device(name)
        assert current_device().name == name and array_module() is get_device(name).xp


def test_an_unknown_device_is_named_with_those_known(fresh):
    before = current_device()
    for ask in (set_device, get_device, lambda name: to_device([1.0], name)):
        with pytest.raises(ValueError, match="unknown device 'cuda': expected one of cpu, fake, gpu"):
            ask("cuda")
    assert current_device() is before


def test_the_first_device_is_the_cpu_or_what_the_environment_says(fresh):
    assert current_device().name == "cpu"
    fresh.setattr(device_module, "_current", [])
    fresh.setenv("MINILORA_DEVICE", "fake")
    assert current_device().name == "fake"
    set_device("cpu")
    assert current_device().name == "cpu"


def test_a_wrong_name_in_the_environment_is_an_error(fresh):
    fresh.setenv("MINILORA_DEVICE", "tpu")
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        current_device()


def test_gpu_without_cupy_says_what_to_install(fresh):
    fresh.setitem(sys.modules, "cupy", None)                                 # how Python notes "cannot be imported"
    for ask in (set_device, get_device, lambda name: to_device([1.0], name)):
        with pytest.raises(RuntimeError, match=r'needs CuPy.*pip install "minilora\[cuda13\]"') as error:
            ask("gpu")
        assert "\n" not in str(error.value)


def test_gpu_without_a_driver_says_where_to_look(fresh):
    cupy = ModuleType("cupy")
    cupy.is_available = lambda: False
    fresh.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(RuntimeError, match=r'no usable NVIDIA GPU.*nvidia-smi.*set_device\("cpu"\)'):
        set_device("gpu")


def test_the_backend_does_not_import_cupy_by_itself():
    code = "import sys, minilora.backend as b; b.kernels(b.to_device([1.0])); assert 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_registering_a_device(fresh):
    class Mine:
        pass

    mine = register_device(Device("mine", SimpleNamespace(), Mine, None, lambda host: Mine(), lambda array: np.ones(1)))
    set_device("mine")
    assert device_of(Mine()) is mine and isinstance(to_device([1.0]), Mine)
    assert_array_equal(to_host(Mine()), [1.0])


# Crossing

@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2), (0, 4)])
def test_there_and_back(device, rng, shape, dtype):
    host = rng.integers(0, 5, shape).astype(dtype)
    back = to_host(to_device(host, device))
    assert isinstance(back, np.ndarray) and back.dtype == host.dtype and back.shape == shape
    assert_array_equal(back, host)


def test_a_view_crosses_with_its_values(device, rng):
    host = rng.standard_normal((3, 4))
    x = to_device(host.T[::2], device)
    assert_array_equal(to_host(x.T), host[:, ::2])


def test_an_array_that_is_there_is_not_copied(device, put):
    x = put([1.0, 2.0])
    assert to_device(x, device) is x and to_device(x) is x


def test_from_one_device_to_another(device, put):
    x = put([1.0, 2.0])
    for name in ("cpu", "fake"):
        y = to_device(x, name)
        assert device_of(y).name == name
        assert_array_equal(to_host(y), [1.0, 2.0])


def test_to_host_takes_lists_numbers_and_tensors(device, put):
    tensor = SimpleNamespace(data=put([1.0, 2.0]), requires_grad=False)
    values = {"list": [1, 2], "tuple": (1, 2), "number": 3.0, "scalar": np.float32(3.0), "tensor": tensor}
    expected = {"list": [1, 2], "tuple": [1, 2], "number": 3.0, "scalar": 3.0, "tensor": [1.0, 2.0]}
    for kind, value in values.items():
        host = to_host(value)
        assert isinstance(host, np.ndarray)
        assert_array_equal(host, expected[kind])
    with pytest.raises(TypeError, match=r"got builtins\.set"):
        to_host({1.0})


def test_to_host_waits_once():
    x = to_device(np.ones(3), "fake")
    with fake_device.count() as counts:
        to_host(x)
        to_device(x, "fake")
    assert counts.syncs == 1


def test_host_rng():
    generator = np.random.default_rng(3)
    assert host_rng(generator) is generator
    expected = np.random.default_rng(3).random(4)
    assert_array_equal(host_rng(3).random(4), expected)
    assert_array_equal(host_rng(np.random.SeedSequence(3)).random(4), expected)
