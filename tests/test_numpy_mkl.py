"""Products by MKL equal NumPy's however the operands lie, and what MKL cannot take stays with NumPy.

A stand-in that reads and writes by address, as cblas_sgemm does, checks the addresses and strides where the package is missing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest

import minilora as ml
from minilora.backend import numpy_mkl as mkl
from minilora.backend.numpy_elf import open_apart

REAL = mkl.sgemm
installed = pytest.mark.skipif(REAL is None, reason="the package mkl is not installed, or switched off")


def at(address: int, rows: int, columns: int, stride: int) -> np.ndarray:          # (rows, columns), `stride` elements apart
    size = (rows - 1) * stride + columns
    memory = np.frombuffer((ctypes.c_float * size).from_address(address), np.float32)
    return np.lib.stride_tricks.as_strided(memory, (rows, columns), (4 * stride, 4))


def stand_in(order, how_a, how_b, n, m, k, alpha, a, lda, b, ldb, beta, out, ldc):
    assert (order, alpha, beta) == (101, 1.0, 0.0) and {how_a, how_b} <= {111, 112}
    left = at(a, k, n, lda).T if how_a == 112 else at(a, n, k, lda)
    right = at(b, m, k, ldb).T if how_b == 112 else at(b, k, m, ldb)
    at(out, n, m, ldc)[...] = left @ right


@pytest.fixture(params=["stand-in", pytest.param("mkl", marks=installed)])
def calls(request, monkeypatch):
    """The calls of sgemm, one entry each."""
    made, sgemm = [], stand_in if request.param == "stand-in" else REAL

    def noted(*args):
        made.append(args)
        sgemm(*args)

    monkeypatch.setattr(mkl, "sgemm", noted)
    return made


def lying(how: str, n: int, m: int, seed: int) -> np.ndarray:                          # (n, m)
    big = np.random.default_rng(seed).standard_normal((160, 160)).astype(np.float32)
    match how:
        case "as it is":
            return big[:n, :m].copy()
        case "transposed":
            return big[:m, :n].copy().T
        case "part":
            return big[2 : n + 2, 5 : m + 5]
        case "part, transposed":
            return big[4 : m + 4, 1 : n + 1].T
        case "every second column":
            return big[:n, : 2 * m : 2]
        case "backwards":
            return big[:n, :m][::-1]
    raise ValueError(how)


@pytest.mark.parametrize("b", ["as it is", "transposed", "part", "part, transposed"])
@pytest.mark.parametrize("a", ["as it is", "transposed", "part", "part, transposed"])
def test_the_product_is_numpys_however_the_operands_lie(calls, a, b):
    x, W, around = lying(a, 40, 70, 0), lying(b, 70, 33, 1), np.full((44, 50), 7.0, np.float32)
    out = around[2:42, 9:42]
    assert mkl.multiply(x, W, out) is out
    np.testing.assert_allclose(out, x.astype(float) @ W.astype(float), rtol=0, atol=2e-5)
    out[...] = 7.0
    assert (around == 7.0).all()                                   # nothing beside it was written
    assert len(calls) == 1


@pytest.mark.parametrize(("x", "W"), [
    (lying("as it is", 40, 70, 0).astype(float), lying("as it is", 70, 33, 1).astype(float)),
    (lying("as it is", 40, 31, 0), lying("as it is", 31, 33, 1)),
    (lying("as it is", 40, 70, 0), lying("as it is", 70, 8, 1)),
    (lying("every second column", 40, 70, 0), lying("as it is", 70, 33, 1)),
    (lying("backwards", 40, 70, 0), lying("as it is", 70, 33, 1)),
    (lying("as it is", 40, 70, 0), np.broadcast_to(np.float32(2.0), (70, 33))),
], ids=["float64", "thin", "narrow", "two strides", "backwards", "broadcast"])
def test_what_mkl_cannot_take_stays_with_numpy(calls, x, W):
    out = np.empty((len(x), W.shape[1]), x.dtype)
    np.testing.assert_array_equal(mkl.multiply(x, W, out), x @ W)
    assert not calls


def test_a_step_is_the_same_with_and_without(calls, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 96, (4, 80))

    def step():
        model = ml.Transformer(ml.TransformerConfig.gpt2(vocab_size=96, d_model=64, n_layers=2, n_heads=2, max_len=80), seed=0)
        ml.add_adapter(model, ml.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=0)
        loss = model.loss(ids, np.roll(ids, -1, axis=1))
        loss.backward()
        return [loss.data, *[p.grad for _, p in model.named_parameters(trainable=True)]]

    through_mkl = step()
    assert len(calls) > 2 * 8                                      # eight linear layers, forward and backward
    monkeypatch.setattr(mkl, "sgemm", None)
    for ours, numpys in zip(through_mkl, step(), strict=True):
        np.testing.assert_allclose(ours, numpys, rtol=0, atol=2e-6 * abs(numpys).max())


@pytest.mark.parametrize(("a", "b", "out"), [
    ((64, 70), (40, 70), (64, 70)), ((64, 40), (70, 70), (64, 70)), ((64, 70), (70, 70), (64, 40)),
    ((64, 70), (70, 70), (40, 70))])
@pytest.mark.parametrize("how", ["as it is", "transposed"])
def test_shapes_that_do_not_fit_are_refused(calls, how, a, b, out):
    with pytest.raises(ValueError, match="mismatch"):
        mkl.multiply(lying(how, *a, 0), lying(how, *b, 1), np.empty(out, np.float32))
    assert not calls


def test_a_transposed_result_stays_with_numpy(calls):
    x, W, out = lying("as it is", 40, 70, 0), lying("as it is", 70, 33, 1), np.empty((33, 40), np.float32).T
    np.testing.assert_allclose(mkl.multiply(x, W, out), x.astype(float) @ W.astype(float), rtol=0, atol=2e-5)
    assert not calls


class Library:
    """An MKL that says how many threads it takes, and whether it agrees to be set to give the same bits."""

    def __init__(self, threads=1, bits=0):
        self.MKL_Get_Max_Threads, self.MKL_CBWR_Set, self.cblas_sgemm = (lambda: threads), (lambda _: bits), (lambda *_: None)


class File:
    def __init__(self, name):
        self.name = name

    def locate(self):
        return f"/nowhere/{self.name}"


FILES = ["libmkl_rt.so.3", "libmkl_intel_lp64.so.3", "libmkl_intel_thread.so.3", "libmkl_sequential.so.3", "libmkl_core.so.3"]


@pytest.mark.parametrize(("found", "files", "taken"), [
    (Library(), FILES, True), (Library(threads=2), FILES, False), (Library(bits=-1), FILES, False), (object(), FILES, False),
    (OSError("broken"), FILES, False), (Library(), FILES[:-1], False), (Library(), [], False)])
def test_a_library_that_is_set_otherwise_or_not_whole_is_not_used(found, files, taken, monkeypatch):
    asked = []

    def open_it(paths):
        asked.append(paths)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.delenv("MINILORA_MKL", raising=False)
    monkeypatch.setattr(metadata, "files", lambda name: [File(name) for name in files])
    monkeypatch.setattr(mkl, "open_apart", open_it)
    assert (mkl.load() is not None) == taken
    assert asked == [[f"/nowhere/{FILES[i]}" for i in (1, 3, 4)]] * (files == FILES)
    monkeypatch.setenv("MINILORA_MKL", "0")
    assert mkl.load() is None


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="for Linux on x86-64")
def test_libraries_opened_apart():
    for libraries, name in ((["libm.so.6"], "cos"), (["libc.so.6", "libm.so.6"], "tan"), (["libm.so.6", "libc.so.6"], "atoi")):
        assert hasattr(open_apart(libraries), name)                # each opened by itself: no earlier one is given again
    assert not hasattr(open_apart(["libc.so.6"]), "cos")
    with pytest.raises(OSError, match="libnowhere"):
        open_apart(["libm.so.6", "/nowhere/libnowhere.so"])


def test_without_the_package_numpy_multiplies(monkeypatch):
    def files(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)
    assert mkl.load() is None
    monkeypatch.setattr(mkl, "sgemm", None)
    x = lying("as it is", 40, 70, 0)
    assert mkl.version() is None
    np.testing.assert_array_equal(mkl.multiply(x, x.T, np.empty((40, 40), np.float32)), x @ x.T)


@installed
def test_bits_do_not_depend_on_where_the_arrays_lie():
    x, W = lying("as it is", 64, 150, 0), lying("as it is", 150, 96, 1)
    results = []
    for places in [(0, 0, 0), (4, 0, 0), (0, 36, 0), (0, 0, 4), (16, 4, 36), (64, 64, 64)]:
        moved = [np.ndarray(shape, np.float32, np.empty(4 * 150 * 100 + 128, np.uint8), place)
                 for shape, place in zip(((64, 150), (150, 96), (64, 96)), places)]
        moved[0][...], moved[1][...] = x, W
        results.append(mkl.multiply(*moved))
    assert all(np.array_equal(result, results[0]) for result in results)


@installed
def test_no_other_library_of_the_process_sees_it():
    """Else a PyTorch that is imported later would take inner functions of this MKL for its own."""
    code = """if True:
        import ctypes
        from minilora.backend import numpy_mkl
        assert numpy_mkl.sgemm
        for name in ("cblas_sgemm", "mkl_blas_sgemm", "mkl_serv_get_max_threads", "mkl_serv_malloc"):
            assert not hasattr(ctypes.CDLL(None), name), name
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@installed
def test_an_mkl_that_the_whole_process_sees_is_not_called():
    """It would multiply in threads of its own, or find no library for them and end the process."""
    everybodys = next(str(file.locate()) for file in metadata.files("mkl") if file.name.startswith("libmkl_rt.so"))
    code = """if True:
        import numpy as np
        from minilora.backend import numpy_mkl
        x = np.ones((300, 300), np.float32)
        assert numpy_mkl.sgemm and (numpy_mkl.multiply(x, x, np.empty_like(x)) == 300).all()
        mapped = open("/proc/self/maps").read()
        assert "libmkl_sequential" in mapped and "libmkl_intel_thread" not in mapped
    """
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"LD_PRELOAD": everybodys}, timeout=120)


@installed
def test_three_threads_at_once_in_a_process_without_limits():
    """Each thread's products are its own: nothing in the environment but our count of threads."""
    code = """if True:
        import numpy as np
        from minilora.backend import kernels, numpy_fast, numpy_mkl, parallel
        parallel.workers = numpy_fast.workers = lambda: 3
        rng, inner, real = np.random.default_rng(0), [], numpy_mkl.sgemm
        def noted(*args):
            inner.append(args[3])
            real(*args)
        numpy_mkl.sgemm = noted
        for _ in range(20):
            x, W = rng.standard_normal((1200, 300), np.float32), rng.standard_normal((257, 300), np.float32)
            y = kernels(x).linear(x, W, None)
            assert abs(y - x.astype(float) @ W.T.astype(float)).max() < 1e-3
        assert inner == [400] * 60, inner
    """
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
