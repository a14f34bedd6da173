"""A model whose batch is shared out to threads, or whose activations are computed again, gives the same numbers; and is refused
where it would not."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minilora as ml
from minilora import autograd as ag
from minilora.backend import numpy_fast, parallel

FORMS = {
    "gpt2": ml.TransformerConfig.gpt2(vocab_size=11, d_model=8, n_layers=2, n_heads=2, max_len=6),
    "bert": ml.TransformerConfig.bert(vocab_size=11, d_model=8, n_layers=2, n_heads=2, max_len=6, n_labels=3),
    "llama": ml.TransformerConfig.llama(vocab_size=11, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=12, max_len=6),
}


@pytest.fixture
def three_threads(monkeypatch):
    """Three workers, and batches of any size worth sharing out."""
    monkeypatch.setattr(parallel, "workers", lambda: 3)
    monkeypatch.setattr(numpy_fast, "workers", lambda: 3)
    monkeypatch.setattr(numpy_fast, "SHARDS", 0)
    parallel._helpers.cache_clear()
    yield
    parallel._helpers().shutdown()
    parallel._helpers.cache_clear()


@pytest.fixture
def seen(monkeypatch):
    """The shards that models were cut into, pass by pass."""
    seen = []

    def noted(fn, x, shards):
        seen.append([(rows.start, rows.stop) for rows in shards])
        return ag.in_shards(fn, x, shards)

    monkeypatch.setattr("minilora.nn.transformer.in_shards", noted)
    return seen


def adapted_model(cfg, targets, dropout=0.0):
    model = ml.Transformer(cfg, seed=0, dtype="float64")
    ml.add_adapter(model, ml.LoraConfig(r=2, target_modules=targets, lora_dropout=dropout))
    rng = np.random.default_rng(1)
    for _, p in model.named_parameters(trainable=True):
        p.data[...] = rng.standard_normal(p.shape)
    return model


def step(model, B=5):
    """Logits and gradients of one pass, with padding."""
    rng = np.random.default_rng(2)
    ids, mask = rng.integers(0, 11, (B, 6)), np.ones((B, 6), np.int64)
    mask[1, 3:] = 0
    logits = model(ids, attention_mask=mask)
    model.zero_grad()
    logits.backward(rng.standard_normal(logits.shape))
    return logits.data, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "all parameters"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_do_not_depend_on_the_shards(form, whole, three_threads, seen, monkeypatch):
    model = adapted_model(FORMS[form], ["q_proj", "v_proj", "down_proj"])
    if whole:
        model.unfreeze()
    logits, gradients = step(model)
    assert seen == [[(0, 2), (2, 4), (4, 5)]]
    monkeypatch.setattr(numpy_fast, "SHARDS", 1 << 30)
    want, wanted = step(model)
    assert seen[1:] == [[(0, 5)]]
    assert_allclose(logits, want, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == wanted.keys()
    for name in wanted:
        assert_allclose(gradients[name], wanted[name], rtol=1e-11, atol=1e-11, err_msg=name)


def test_rows_are_shared_out_only_where_they_are_independent(three_threads, seen):
    model = adapted_model(FORMS["gpt2"], ["q_proj"], dropout=0.5)
    ids = np.zeros((6, 4), np.int64)
    whole, cut = [(0, 6)], [(0, 2), (2, 4), (4, 6)]
    model.train()
    model(ids)                                                     # draws random numbers
    model.eval()
    model(ids)
    with ml.no_grad():
        model(ids)
        model(ids, cache=model.new_cache())                        # one cache for all rows
        model(ids, adapter_names=["default"] * 3 + ["__base__"] * 3)
    assert seen == [whole, cut, cut, whole, whole]
    ml.delete_adapter(model, "default")
    seen.clear()
    ml.sweep(model, lambda i, rng: (rng.integers(0, 11, (2, 5)), rng.integers(0, 11, (2, 5))), [ml.LoraConfig(r=2)],
             seeds=[0, 1], lrs=[0.1], train=ml.TrainConfig(steps=1))
    assert seen and all(len(shards) == 1 for shards in seen)       # the rows of a sweep are groups


def test_an_unused_adapter_gets_no_gradient(three_threads):
    model = adapted_model(FORMS["gpt2"], ["q_proj"])
    with ml.disable_adapter(model):
        assert not model(np.zeros((6, 4), np.int64)).requires_grad


def test_the_graph_is_freed_unless_it_is_retained():
    x, a = ml.tensor(np.arange(4.0), requires_grad=True), ml.tensor(np.array(2.0), requires_grad=True)
    y = ag.in_shards(lambda x, rows: x * a, x, [slice(0, 2), slice(2, 4)])
    y.backward(np.ones(4, np.float64), retain_graph=True)
    y.backward(np.ones(4, np.float64))
    assert_array_equal(x.grad, [4.0] * 4)
    assert a.grad == 12.0
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(np.ones(4, np.float64))


def test_a_tensor_from_outside_is_refused():
    x, a = ml.tensor(np.arange(4.0)), ml.tensor(np.ones(4), requires_grad=True)
    outside = a * 2.0
    with pytest.raises(RuntimeError, match=r"uses the result of Multiply, .* pass it in as x"):
        ag.in_shards(lambda x, rows: x * outside[rows], x, [slice(0, 2), slice(2, 4)])


def test_shards_run_in_threads_and_an_exception_comes_out(three_threads):
    names, barrier = set(), threading.Barrier(2, timeout=10)

    def noting(x, rows):
        barrier.wait()                                             # passes only if two are inside at once
        names.add(threading.current_thread().name)
        return x

    ag.in_shards(noting, ml.tensor(np.zeros(4)), [slice(0, 2), slice(2, 4)])
    assert len(names) == 2
    with pytest.raises(ZeroDivisionError):
        ag.in_shards(lambda x, rows: x * (1 / rows.start), ml.tensor(np.zeros(4)), [slice(0, 2), slice(2, 4)])


# Computed again


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_computing_again_changes_no_number(form, shards, three_threads, monkeypatch):
    monkeypatch.setattr(numpy_fast, "SHARDS", 0 if shards == 3 else 1 << 30)
    model = adapted_model(FORMS[form], ["q_proj", "v_proj", "down_proj"])
    want, wanted = step(model)
    model.recompute = True
    logits, gradients = step(model)
    assert_array_equal(logits, want)
    assert gradients.keys() == wanted.keys()
    for name in wanted:
        assert_array_equal(gradients[name], wanted[name], err_msg=name)


def test_computing_again_saves_memory():
    """Eight layers: their inputs and the activations of one, instead of those of all."""
    cfg = ml.TransformerConfig.gpt2(vocab_size=11, d_model=64, n_layers=8, n_heads=2, max_len=64)
    model = ml.Transformer(cfg)
    ml.add_adapter(model, ml.LoraConfig(r=2, target_modules=["q_proj"]))
    peaks = []
    for model.recompute in (False, True):
        tracemalloc.start()
        model.loss(np.zeros((4, 64), np.int64), np.zeros((4, 64), np.int64)).backward()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.4 * peaks[0]


def test_what_would_differ_is_not_computed_again():
    ids = np.zeros((2, 4), np.int64)
    model = adapted_model(FORMS["gpt2"], ["q_proj"], dropout=0.5)
    model.recompute = True
    with pytest.raises(ValueError, match="recompute with dropout or adapter_names"):
        model(ids)
    model.eval()
    with pytest.raises(ValueError, match="recompute with dropout or adapter_names"):
        model(ids, adapter_names=["default", "__base__"])
    logits = model(ids)
    with ml.disable_adapter(model), pytest.raises(RuntimeError, match="other parameters than the first; was an adapter"):
        logits.backward(np.ones(logits.shape))
    with ml.no_grad():
        assert_array_equal(model(ids).data, logits.data)
        model(ids, cache=model.new_cache())
