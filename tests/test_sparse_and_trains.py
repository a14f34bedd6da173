"""What is special about SHiRA and tensor-train LoRA, beyond the suite that every method passes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_models import build
from test_methods import shake

import minilora as ml
from minilora.backend import to_host
from minilora.lora import adapters_of
from minilora.methods.tensor_train import chains, divided


def update_of(model, path, adapter):
    W = dict(model.named_modules())[path].weight
    return to_host((adapter.adapted_weight(W) - W).data)


def test_shira_changes_its_places_only_and_is_of_high_rank():
    model = build(d_model=16, d_ff=24, n_layers=1)
    ml.add_adapter(model, ml.ShiraConfig(r=2, target_modules=["o_proj", "up_proj"]))
    shake(model)
    for path, adapter in adapters_of(model).items():
        dW = update_of(model, path, adapter)
        places, m = to_host(adapter.places), 2 * sum(dW.shape)
        assert len(set(places.tolist())) == m == (dW != 0).sum()
        assert_allclose(dW.reshape(-1)[places], to_host(adapter.values.data), atol=1e-15)
        assert np.linalg.matrix_rank(dW) > 8               # LoRA with as many numbers: 2


def test_shiras_places_are_the_seeds_and_spread_evenly():
    def places(seed, targets=("o_proj",)):
        model = build(d_model=64, n_layers=1)
        ml.add_adapter(model, ml.ShiraConfig(r=8, random_seed=seed, target_modules=list(targets)))
        return {path: to_host(adapter.places) for path, adapter in adapters_of(model).items()}

    one, = places(1).values()
    both = places(1, ("o_proj", "up_proj"))
    assert_array_equal(both["layers.0.attn.o_proj"], one)  # whatever else is targeted
    assert (places(2)["layers.0.attn.o_proj"] != one).any()
    columns = np.bincount(one % 64, minlength=64)
    assert abs(columns - 16).max() < 14 and columns.sum() == 8 * 128


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("r", [1, 3])
def test_a_tensor_train_is_its_contraction(order, r):
    """The oracle: every entry of ΔW as the product of one slice of each core."""
    model = build(d_model=12, d_ff=20, n_layers=1)
    ml.add_adapter(model, ml.TensorTrainConfig(r=r, order=order, lora_alpha=3, target_modules=["up_proj"], init_weights=False))
    (path, adapter), = adapters_of(model).items()
    cores = [to_host(getattr(adapter, f"{side}{i}").data) for side in ("out", "in") for i in range(order)]
    sizes = [core.shape[1] for core in cores]
    assert np.prod(sizes[:order]) == 20 and np.prod(sizes[order:]) == 12
    expected = np.empty(sizes)
    for index in np.ndindex(*sizes):
        product = np.eye(1)
        for core, i in zip(cores, index):
            product = product @ core[:, i]
        expected[index] = product.item() * 3 / r
    assert_allclose(update_of(model, path, adapter), expected.reshape(20, 12), rtol=1e-10, atol=1e-13)
    assert ml.count_parameters(model)["trainable"] == sum(core.size for core in cores)


def test_the_start_of_a_tensor_train_has_loras_variance():
    model = build(d_model=256, n_heads=4, n_layers=1)
    ml.add_adapter(model, ml.TensorTrainConfig(r=8, order=3, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    A = np.concatenate([to_host(chains(adapter, adapter.order)[1].data) for adapter in adapters_of(model).values()])
    assert 0.5 < A.var() * 3 * 256 < 2.0
    assert not any(to_host(chains(adapter, adapter.order)[0].data).any() for adapter in adapters_of(model).values())
    assert ml.count_parameters(model)["trainable"] < 4 * 8 * 512 / 2       # half of LoRA's, and less the wider the model


@pytest.mark.parametrize("n", [1, 7, 12, 64, 576, 768, 1536, 3072, 4097])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_a_dimension_is_the_product_of_its_parts(n, parts):
    assert len(divided(n, parts)) == parts and np.prod(divided(n, parts)) == n


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ml.ShiraConfig(r=0), "r = 0"), (lambda: ml.ShiraConfig(random_seed=-1), "random_seed = -1"),
    (lambda: ml.TensorTrainConfig(order=9), "order = 9"), (lambda: ml.TensorTrainConfig(r=1.5), "r = 1.5"),
    (lambda: ml.add_adapter(build(), ml.TensorTrainConfig(r=9, target_modules=["q_proj"])), "at most 8"),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
