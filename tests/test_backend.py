"""The doors between host and device: who owns an array, how arrays cross, and what is said when that fails."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import fake_device
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import minilora as ml
import minilora.backend.device as device_module
from minilora.backend import (
    Device,
    DeviceError,
    array_module,
    current_device,
    device_of,
    enough_memory,
    get_device,
    host_rng,
    kernels,
    register_device,
    set_device,
    to_device,
    to_host,
)
from minilora.backend.cupy_kernels import CupyKernels


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
        with pytest.raises(DeviceError, match=r'needs CuPy.*pip install "minilora\[cuda13\]"') as error:
            ask("gpu")
        assert "\n" not in str(error.value)


def pretended_cupy(patch, available=True, built=13020, driver=12040, cublas=True, nvrtc=True):
    """A CuPy as far as opening it looks at it: CUDA versions of its wheel and of the driver, libraries found or not."""
    def version():
        if not nvrtc:
            raise RuntimeError('Failure finding "libnvrtc.so.13": No such file')
        return 13, 0

    cupy, backends, libs = ModuleType("cupy"), ModuleType("cupy_backends.cuda"), ModuleType("cupy_backends.cuda.libs")
    runtime = SimpleNamespace(runtimeGetVersion=lambda: built, driverGetVersion=lambda: driver)
    cupy.cuda = SimpleNamespace(runtime=runtime, nvrtc=SimpleNamespace(getVersion=version),
                                device=SimpleNamespace(get_cublas_handle=lambda: 1))
    cupy.is_available, cupy.ndarray = lambda: available, type("ndarray", (), {})
    cupy.asarray = cupy.asnumpy = lambda array: array
    cupy.__name__ = "cupy"
    if cublas:
        libs.cublas = SimpleNamespace(sgemm=None, dgemm=None, sgemmStridedBatched=None, dgemmStridedBatched=None)
    for name, module in (("cupy", cupy), ("cupy_backends", ModuleType("cupy_backends")), ("cupy_backends.cuda", backends),
                         ("cupy_backends.cuda.libs", libs)):
        patch.setitem(sys.modules, name, module)
    return cupy


@pytest.mark.parametrize("driver", [0, 13020, 14000])
def test_gpu_without_a_driver_says_where_to_look(fresh, driver):
    pretended_cupy(fresh, available=False, driver=driver)
    with pytest.raises(DeviceError, match=r'no usable NVIDIA GPU.*nvidia-smi.*set_device\("cpu"\)') as error:
        set_device("gpu")
    assert "\n" not in str(error.value)


def test_gpu_whose_driver_cannot_be_asked(fresh):
    cupy = ModuleType("cupy")
    cupy.is_available = lambda: False
    fresh.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(DeviceError, match="no usable NVIDIA GPU"):
        set_device("gpu")


def test_a_wheel_newer_than_the_driver_names_the_one_that_fits(fresh):
    pretended_cupy(fresh, available=False)
    with pytest.raises(DeviceError, match=r'built for CUDA 13, but the NVIDIA driver knows only CUDA 12: pip uninstall '
                                          r'cupy-cuda13x, then pip install "minilora\[cuda12\]", or update') as error:
        set_device("gpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["cublas", "nvrtc"])
def test_a_wheel_without_its_libraries_says_what_brings_them(fresh, missing):
    pretended_cupy(fresh, **{missing: False})
    with pytest.raises(DeviceError, match=r'no cuBLAS or NVRTC .*: pip install "minilora\[cuda13\]"') as error:
        set_device("gpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["shared library", "another module"])
def test_a_cupy_that_does_not_load_is_told_from_none(fresh, tmp_path, what):
    told = "\n====\nFailed to import CuPy.\n\nOriginal error:\n  libcudart.so.13 not found\n====\n"
    (tmp_path / "cupy.py").write_text(f"raise ImportError({told!r})" if what == "shared library" else "import no_such_module")
    fresh.syspath_prepend(tmp_path)
    fresh.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(DeviceError, match=r"installed but does not load \((Failed|No module).*pip install") as error:
        set_device("gpu")
    assert "\n" not in str(error.value)


# TF32

def test_tf32_is_asked_for(fresh):
    pretended_cupy(fresh)
    set_device("gpu")
    assert get_device("gpu").kernels.tf32 is False and isinstance(get_device("gpu").kernels, CupyKernels)
    for asked, then in ((True, True), (None, True), (False, False)):
        set_device("gpu", tf32=asked)
        assert get_device("gpu").kernels.tf32 is then


@pytest.mark.parametrize(("value", "then"), [("1", True), ("0", False), ("", False)])
def test_tf32_from_the_environment(fresh, value, then):
    pretended_cupy(fresh)
    fresh.setenv("MINILORA_TF32", value)
    assert get_device("gpu").kernels.tf32 is then


def test_tf32_is_the_gpus_alone(fresh):
    with pytest.raises(ValueError, match=r"tf32=True on device 'cpu', which has no TF32: leave it out"):
        set_device("cpu", tf32=True)
    set_device("cpu", tf32=False)
    assert current_device().name == "cpu"


# Out of memory

class OutOfMemory(MemoryError):
    """As CuPy's."""


def exhausted(*args):
    raise OutOfMemory("Out of memory allocating 1,024 bytes\n(allocated so far: 512 bytes).")


TOO_LITTLE = (r"out of memory on device '(\w+)' \(Out of memory allocating 1,024 bytes \(allocated so far: 512 bytes\)\.\): "
              r"use fewer rows or shorter sequences .*chunk=")


def test_out_of_memory_on_the_way_to_the_device_says_what_to_change(fresh):
    cupy = pretended_cupy(fresh)
    cupy.asarray = exhausted
    with pytest.raises(MemoryError, match=TOO_LITTLE) as error:
        to_device(np.ones(3), "gpu")
    assert "\n" not in str(error.value) and "'gpu'" in str(error.value)


def test_out_of_memory_is_explained_once():
    with pytest.raises(MemoryError) as error, enough_memory("gpu"), enough_memory("gpu"):
        exhausted()
    assert str(error.value).count("use fewer rows") == 1


@pytest.mark.parametrize("how", ["train", "sweep"])
def test_out_of_memory_in_training_says_what_to_change(device, how, monkeypatch):
    model = ml.Transformer(ml.TransformerConfig.gpt2(vocab_size=9, d_model=4, n_layers=1, n_heads=1), seed=0)
    config, settings = ml.LoraConfig(r=1, target_modules=["q_proj"]), ml.TrainConfig(steps=1, progress=False)
    batch = np.zeros((1, 3), int), np.zeros((1, 3), int)
    monkeypatch.setattr(type(get_device(device).kernels), "linear_cross_entropy", exhausted)
    with pytest.raises(MemoryError, match=TOO_LITTLE):
        if how == "train":
            ml.add_adapter(model, config)
            ml.train(model, [batch], settings)
        else:
            ml.sweep(model, lambda i, rng: batch, [config], seeds=(0,), lrs=(0.1,), train=settings)


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
