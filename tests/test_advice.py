"""Rank advice against what `resize` then measures, and the recorder against the report on the trained model."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minilora as ml
from minilora.backend import device_of, to_host
from minilora.lora import LoraConfig, adapters_of, add_adapter
from minilora.lora.files import load_adapter, save_adapter
from minilora.nn import Transformer, TransformerConfig
from minilora.rank import Recorder, advise, energy_rank
from minilora.rank.report import analyze

IDS = np.arange(12).reshape(2, 6) % 13


def adapted(targets=("q_proj", "up_proj"), seed=3, dtype="float64"):
    cfg = TransformerConfig.llama(vocab_size=13, d_model=8, n_layers=2, n_heads=2, d_ff=12, max_len=8)
    model = Transformer(cfg, dtype=dtype)
    add_adapter(model, LoraConfig(r=4, lora_alpha=6, target_modules=list(targets)))
    rng = np.random.default_rng(seed)
    for adapter in adapters_of(model).values():
        for _, p in adapter.named_parameters():
            p.data[...] = device_of(p.data).put((rng.standard_normal(p.shape) * 0.5).astype(p.dtype))
    return model


def loss(model):
    return ml.cross_entropy(model(IDS), np.roll(IDS, -1)).item()


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("targets", [("q_proj", "up_proj"), ("embed", "v_proj")])
def test_the_predicted_error_is_what_resize_measures(tmp_path, share, targets):
    save_adapter(adapted(targets), tmp_path / "full")
    advice = advise(tmp_path / "full", share).to_dict()
    report = ml.resize(tmp_path / "full", tmp_path / "cut", energy=share).to_dict()
    assert advice["modules"].keys() == report["modules"].keys()
    for path, row in advice["modules"].items():
        made = report["modules"][path]
        assert (row["rank"], row["advised_rank"]) == (made["rank_before"], made["rank"])
        assert_allclose(row["error"], made["measured_error"], atol=1e-9)
        assert row["error"] <= (1 - share) ** 0.5 + 1e-12
    assert advice["summary"]["advised_parameters"] == report["summary"]["parameters"]
    assert_allclose(advice["summary"]["error"], report["summary"]["measured_error"], atol=1e-9)


def test_the_measured_loss_is_that_of_the_cut_adapter(tmp_path):
    model = adapted()
    before = {path: p.data.copy() for path, p in model.named_parameters()}
    advice = advise(model, 0.7, loss)
    for path, p in model.named_parameters():
        assert_array_equal(p.data, before[path])
    assert advice.losses["before"] == loss(model)
    save_adapter(model, tmp_path / "full")
    ml.resize(tmp_path / "full", tmp_path / "cut", energy=0.7)
    other = adapted()
    load_adapter(other, tmp_path / "cut", "cut")
    assert_allclose(advice.losses["after"], loss(other), rtol=1e-9)
    path = "layers.1.mlp.up_proj"                                          # one module alone, cut by hand
    adapter, q = adapters_of(model)[path], advice.modules[path]["advised_rank"]
    U, S, Vh = np.linalg.svd(adapter.lora_B.data @ adapter.lora_A.data, full_matrices=False)
    adapter.lora_A.data[...], adapter.lora_B.data[...] = 0, 0
    adapter.lora_A.data[:q], adapter.lora_B.data[:, :q] = Vh[:q], U[:, :q] * S[:q]
    assert q < 4 and abs(loss(model) - advice.losses["before"]) > 1e-6
    assert_allclose(advice.modules[path]["loss"], loss(model), rtol=1e-10)


@pytest.mark.parametrize("targets", [("q_proj", "up_proj"), ("embed",)])
def test_advice_on_every_device(device, targets):
    model = adapted(targets)
    advice = advise(model, 0.8, loss)
    rows = analyze(model).modules
    for path, row in advice.modules.items():
        assert row["advised_rank"] == energy_rank(rows[path]["singular_values"], 0.8)
    found = advice.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["summary"]["loss_before"] == loss(model)
    assert all(row["loss_change"] == row["loss"] - loss(model) for row in advice.modules.values())
    text = str(advice).splitlines()
    assert text[0].split() == ["module", "shape", "rank", "advised", "error", "loss", "change"]
    assert " as advised, error " in text[-1] and ", loss " in text[-1]


def test_a_loss_that_fails_leaves_the_adapter_as_it_was():
    model, calls = adapted(), []
    before = {path: p.data.copy() for path, p in model.named_parameters()}

    def fails(model):
        calls.append(any(not np.array_equal(p.data, before[path]) for path, p in model.named_parameters()))
        if calls[-1]:
            raise RuntimeError("no data")
        return 0.0

    with pytest.raises(RuntimeError, match="no data"):
        advise(model, 0.5, fails)
    assert calls == [False, True]                                          # whole, then cut when the loss was asked for
    for path, p in model.named_parameters():
        assert_array_equal(p.data, before[path])


def test_advice_refuses(tmp_path):
    save_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match="loss: got one for a directory, expected a model"):
        advise(tmp_path, 0.9, loss)
    with pytest.raises(ValueError, match=r"^share: got 1\.5"):
        advise(tmp_path, 1.5)


def test_an_update_of_zero_is_advised_rank_one():
    model = adapted(("q_proj",))
    for adapter in adapters_of(model).values():
        adapter.lora_B.data[...] = 0
    advice = advise(model)
    assert {(row["advised_rank"], row["error"]) for row in advice.modules.values()} == {(1, 0.0)}
    assert advice.summary()["error"] == 0.0


# --- over training --------------------------------------------------------------------------------


def run(callback=None):
    model = adapted(dtype="float32")
    batches = [(IDS, np.roll(IDS, -1))] * 7
    ml.train(model, batches, ml.TrainConfig(steps=7, lr=1e-2, progress=False), callback=callback)
    return model


def test_the_recorder_follows_the_report_and_changes_nothing(device):
    recorder = Recorder(every=3, follow=["effective_rank", "frobenius_norm", "energy_rank_90"])
    model = run(recorder)
    assert recorder.steps == [1, 3, 6]
    found = recorder.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["modules"].keys() == adapters_of(model).keys()
    last = Recorder(every=7)
    again = run(last)
    for path, row in analyze(again).modules.items():
        for key in ("frobenius_norm", "effective_rank", "stable_rank", "energy_rank_90"):
            assert last.modules[path][key][-1] == row[key]
    for (_, one), (_, two) in zip(model.named_parameters(), run().named_parameters(), strict=True):
        assert_array_equal(to_host(one.data), to_host(two.data))


def test_the_recorder_refuses():
    for bad in ({"every": 0}, {"follow": ["efective_rank"]}):
        with pytest.raises(ValueError, match="expected at least 1, and some of singular_values, frobenius_norm"):
            Recorder(**bad)
