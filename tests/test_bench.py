"""The benchmark's own half: what it counts is what a step does. (Times are measured, never asserted.)"""

import numpy as np
import pytest

from minilora import bench
from minilora.autograd import Op
from minilora.backend import kernels
from minilora.backend.numpy_fast import NumpyKernels
from minilora.nn import TransformerConfig

SMALL = bench.Case(TransformerConfig.gpt2(vocab_size=11, d_model=8, n_layers=1, n_heads=2, max_len=4), 3, 4, ("qkv_proj",))


def test_both_sides_see_the_same_batches():
    a, b = SMALL.batches(), SMALL.batches()
    for _ in range(3):
        (ids, targets), (ids_again, _) = next(a), next(b)
        assert np.array_equal(ids, ids_again) and np.array_equal(ids[:, 1:], targets[:, :-1]) and ids.shape == (3, 4)


def test_a_step_learns_and_the_profile_counts_its_products(tmp_path):
    side = bench.MiniloraSide(SMALL, str(tmp_path))
    ready = side.prepare(0)
    assert ready["trainable"] == 8 * (8 + 24)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A.safetensors", "base.safetensors"]
    matmul, forward = NumpyKernels.matmul, Op.registry["Linear"].forward
    profile = side.profile(0)
    assert abs(sum(profile["by_op"].values()) - 1.0) < 1e-9 and "LoRALinear" in profile["by_op"]
    assert profile["gemm_floor_ms"] > 0
    assert NumpyKernels.matmul is matmul and Op.registry["Linear"].forward is forward      # nothing stays wrapped


def test_the_products_of_a_step_in_closed_form(tmp_path):
    side = bench.MiniloraSide(SMALL, str(tmp_path))
    side.prepare(0)
    shapes = []
    with bench._timed_ops({}, shapes):
        side.step()
    n, d, f, V, r = 12, 8, 32, 11, 8
    multiply_adds = sum(a[0] * a[1] * b[1] for a, b in shapes)
    base = n * d * (3 * d + d + 2 * f + V)                 # qkv, o, up and down, head: forward
    backward = base - n * d * 3 * d                        # the same again for x̄, but the first qkv's input needs none
    thin = 2 * n * r * (d + 3 * d)                         # U and B̄, Z and Ā
    formed = r * d * 3 * d
    assert n > d * 3 * d / (d + 3 * d)                      # so W + s·B@A is formed, and multiplied once
    assert multiply_adds == base + backward + thin + formed


def test_unknown_case():
    with pytest.raises(ValueError, match="coarse"):
        bench.run(["coarse"])


def test_kernels_of_numpy_are_the_fast_ones():
    assert type(kernels(np.zeros(1))) is NumpyKernels
