"""The studies of methods and of bases of 4 bits, tiny: files, tables, budgets that are met, searches, costs."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import matplotlib.pyplot as plt
import numpy as np
import pytest

import minilora as ml
from minilora import plots
from minilora.lora import adapters_of, count_parameters
from minilora.studies import Options, cells, costs, methods, quantisation, ways
from minilora.studies.common import Pretraining
from minilora.studies.text import Setting

SHAPE = ml.TransformerConfig.gpt2(vocab_size=256, d_model=32, n_layers=1, n_heads=4, max_len=24)
BERT = ml.TransformerConfig.bert(vocab_size=50, d_model=32, n_layers=1, n_heads=4, max_len=24, n_labels=2)
TINY = Setting(32, 1, Pretraining(4, 4, 3e-3, 24), 4, 4, 8, tokens=16)
REVIEWS = methods.Reviews(8, 4, 1, 4, 1, ("LoRA", "prefix tuning", ways.FULL), 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cells, "_run", lambda name, pending, cluster: (          # in this process
        cells.run_cell(name, key, cell) for key, cell in pending.items()))
    monkeypatch.setattr(methods, "ROOM", 8)


@pytest.fixture
def no_processes(monkeypatch):
    """Memory without processes of its own."""
    given = {"peak_mb": 2.0, "weights_mb": 1.0}
    monkeypatch.setattr(methods, "peaks", lambda cfg, wanted, batch, tokens: [dict(given) for _ in wanted])
    monkeypatch.setattr(costs, "peaks", lambda cfg, wanted, batch, tokens: [dict(given) for _ in wanted])


def absent(*_, **__):
    raise FileNotFoundError("no such package: pip install --no-deps something")


@pytest.mark.slow
def test_the_methods_leave_their_files_and_a_table(tmp_path, monkeypatch, no_processes):
    size = methods.Size(TINY, 1, 2, 1, 0, REVIEWS, SHAPE, 2, 1, ("LoRA", "LoRA-FA"))
    monkeypatch.setitem(methods.SIZES, "quick", size)
    monkeypatch.setattr(methods, "packaged_file", absent)
    report = methods.run(Options("quick", out=tmp_path, progress=False))
    assert sorted(path.name for path in tmp_path.glob("methods.*")) == [f"methods.{s}" for s in ("json", "png", "svg")]
    assert json.loads((tmp_path / "methods.json").read_text()) == json.loads(json.dumps(report))
    assert [row["method"] for row in report["rows"]] == list(ways.WAYS) and len(report["rows"]) == 21
    assert all(row["runs"] == 1 for row in report["rows"])
    why = "no such package: pip install --no-deps something" if find_spec("sklearn") else "sklearn.metrics is not installed"
    assert report["reviews"].keys() == {"left_out"} and report["reviews"]["left_out"].startswith(why)
    table = methods.table(report)
    assert f"the real model is left out: {why}" in table and "frozen base" in table
    assert all(claim["claim"] in table and claim["found"] in table for claim in report["verdict"])
    assert {type(claim["agrees"]) for claim in report["verdict"]} == {bool}
    found = {row["method"]: row for row in report["rows"]}
    assert found["PiSSA"]["trainable"] == found["LoRA"]["trainable"] == report["budget"]
    assert 0 < found["AdaLoRA"]["kept"] <= found["AdaLoRA"]["trainable"] and found["LoRA"]["kept"] is None
    cost = report["costs"]["rows"]
    assert cost["Houlsby"]["merged"] is None and cost["prefix tuning"]["merged"] is None and cost["DoRA"]["merged"] > 0
    assert cost["LoRA"]["peak_mb"] == 2.0 and cost["DoRA"]["peak_mb"] is None


@pytest.mark.slow
def test_bases_of_four_bits_leave_their_files_and_a_table(tmp_path, monkeypatch, no_processes):
    size = quantisation.Size(TINY, 1, 2, 1, 0, ("smollm2-135m",), 1, SHAPE, 2, 1)
    monkeypatch.setitem(quantisation.SIZES, "quick", size)
    monkeypatch.setattr(quantisation, "load_pretrained", absent)
    report = quantisation.run(Options("quick", out=tmp_path, progress=False))
    assert sorted(path.name for path in tmp_path.glob("q*")) == [f"quantisation.{s}" for s in ("json", "png", "svg")]
    assert [row["base"] for row in report["rows"]] == list(quantisation.BASES)
    table = quantisation.table(report)
    assert "smollm2-135m is left out: no such package" in table
    assert all(claim["claim"] in table and claim["found"] in table for claim in report["verdict"])
    assert {type(claim["agrees"]) for claim in report["verdict"]} == {bool}
    bits = {row["base"]: row["bits"] for row in report["rows"]}
    assert bits["float32"] == 32.0 and bits["NF4"] == bits["FP4"] == 4.5 and 4.12 < bits["NF4, double"] < 4.3


@pytest.mark.parametrize("cfg", [SHAPE, BERT], ids=["gpt2", "bert"])
def test_every_plan_is_what_trains(cfg):
    budget, found = ways.plan(cfg, 4, 8)
    assert list(found) == list(ways.WAYS)
    for name, way in found.items():
        if "size" not in way:
            assert (name, cfg) == ("prefix tuning", BERT) and "not causal" in way["why"]
            continue
        model = ways.adapt(ml.Transformer(cfg), name, way["size"], 0, 40)
        assert count_parameters(model)["trainable"] == way["trainable"], name
        near = abs(way["trainable"] / budget - 1.0) <= 0.15
        assert bool(way["why"]) != near, (name, way)
        if ways.WAYS[name].size == ways.FITTED and way["size"] < 8:               # one size more is above the budget
            assert way["trainable"] <= ways.SLACK * budget < ways.trained(cfg, name, way["size"] + 1)


def test_the_largest_that_fits():
    assert [ways.largest(lambda n, m=m: n <= m, 9) for m in (1, 5, 9, 100)] == [1, 5, 9, 9]
    with pytest.raises(ValueError, match="least size"):
        ways.largest(lambda n: False, 9)


def test_each_method_trains_in_its_own_way(monkeypatch):
    batches, config = costs.drawn(SHAPE, 2, 8), ml.TrainConfig(steps=40, lr=1e-2, progress=False)
    seen = []
    monkeypatch.setattr(ways, "train", lambda *args, **options: seen.append(options) or ml.train(*args, **options))
    model = ways.adapt(ml.Transformer(SHAPE), "LoRA+", 2, 0, 40)
    ways.fit(model, "LoRA+", batches, config)
    rates = {group["lr"] for group in seen[0]["optimizer"].groups}
    assert max(rates) / min(rates) == pytest.approx(ways.RATIO)
    model = ways.adapt(ml.Transformer(SHAPE), "AdaLoRA", 2, 0, 40)
    ways.fit(model, "AdaLoRA", batches, config)
    on = sum(int((a.lora_E.data != 0).sum()) for a in adapters_of(model).values())
    assert on == 2 * len(adapters_of(model)) < 3 * len(adapters_of(model))        # the budget at the end, of three at the start
    assert ways.kept(model, "AdaLoRA") < count_parameters(model)["trainable"]
    model = ways.adapt(ml.Transformer(SHAPE), "SoRA", 4, 0, 40)
    for adapter in adapters_of(model).values():
        adapter.gate.data[:3] = 1e-6                       # so small that the proximal step closes them
    ways.fit(model, "SoRA", batches, replace(config, steps=1, lr=1e-5))
    assert ways.kept(model, "SoRA") < count_parameters(model)["trainable"]
    assert ways.kept(model, "LoRA") is None


def test_the_search_goes_past_an_edge_and_stops_inside(monkeypatch):
    asked = []

    def cell(way, size, seed, lr):
        asked.append((seed, round(lr, 6)))
        return {"seed": seed, "lr": lr, "loss": None if lr > 0.3 else (np.log2(lr) - np.log2(0.01)) ** 2 + seed}

    monkeypatch.setattr(methods, "compute", lambda cell, cells, options, what: [cell(**c) for c in cells])
    plan = {"a": {"size": 3, "trainable": 5, "why": ""}}
    found = methods.search(cell, {}, plan, {"a": 0.04}, [0, 1, 2], Options(), tried=3, widen=4, what="")
    assert asked == [(0, 0.02), (0, 0.04), (0, 0.08), (0, 0.01), (0, 0.005), (1, 0.01), (2, 0.01)]
    row = methods.summary("a", plan["a"], found["a"], ["loss"])
    assert row["lr"] == 0.01 and row["inside"] and row["runs"] == 3 and row["diverged"] == 0
    assert (row["loss_mean"], row["loss_sd"]) == (1.0, 1.0)
    asked.clear()
    few = methods.search(cell, {}, plan, {"a": 0.04}, [0], Options(), tried=1, widen=0, what="")
    assert asked == [(0, 0.04)] and not methods.summary("a", plan["a"], few["a"], ["loss"])["inside"]


def test_a_run_that_diverges_is_a_row_without_numbers():
    row = methods.text_cell(TINY.to_dict(), "LoRA", 2, 0, 1e30)
    assert row == {"seed": 0, "lr": 1e30, "loss": None, "source_loss": None, "kept": None}


def test_the_ratio_of_two_times_does_not_see_a_drift():
    slow = iter(np.linspace(1.0, 3.0, 12))                 # the machine slows down all the time
    assert costs.ratio(lambda: 2.0 * next(slow), lambda: float(next(slow)), 5) == pytest.approx(2.0)


def test_the_size_of_files(tmp_path):
    both = ways.adapt(ml.Transformer(BERT), "prompt tuning", 3, 0, 4)             # with a classifier: no file holds that
    assert costs.file_bytes(both) == 4 * count_parameters(both)["trainable"]
    model = ways.adapt(ml.Transformer(SHAPE), "LoRA", 2, 0, 4)
    assert 4 * count_parameters(model)["trainable"] < costs.file_bytes(model) < 4 * count_parameters(model)["trainable"] + 4096


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's high-water mark")
def test_memory_is_measured_in_a_process_of_its_own():
    cfg = ml.TransformerConfig.gpt2(vocab_size=4000, d_model=256, n_layers=2, n_heads=4, max_len=16)
    whole, lora = costs.peaks(cfg, [{"name": ways.FULL, "size": 1}, {"name": "LoRA", "size": 2}], 1, 8)
    size = sum(p.size for _, p in ml.Transformer(cfg).named_parameters()) * 4 / 2**20         # MB
    assert 0.9 * size < lora["weights_mb"] < lora["peak_mb"] < 2.5 * size
    assert 3.5 * size < whole["peak_mb"] < 6.0 * size      # weights, gradients, AdamW's two moments
    with pytest.raises(RuntimeError, match="the memory of nothing failed"):
        costs.peaks(cfg, [{"name": "nothing", "size": 1}], 1, 8)


def test_labels_are_apart_and_as_near_as_may_be(rng):
    values = rng.standard_normal(30)
    places = plots.spread(values, 0.2)
    assert np.diff(np.sort(places)).min() > 0.2 - 1e-9 and (np.argsort(places) == np.argsort(values)).all()
    np.testing.assert_allclose(plots.spread([0.0, 10.0, 0.0], 1.0), [-0.5, 10.0, 0.5])
    np.testing.assert_allclose(plots.spread([3.0], 1.0), [3.0])


def test_no_label_lies_on_another():
    rows = [{"method": name, "trainable": 8192 if i % 4 else 900, "loss_mean": 2.0 + 0.001 * i, "loss_sd": 0.01}
            for i, name in enumerate(ways.WAYS)]
    figure, ax = plt.subplots(figsize=(10, 8))
    plots.against_numbers(ax, rows, "loss", {"frozen base": 2.3})
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    text_boxes = [plt.Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == len(rows)
    assert not any(a.overlaps(b) for i, a in enumerate(text_boxes) for b in text_boxes[:i])
    plt.close(figure)


def test_the_verdicts_follow_the_numbers():
    def row(name, loss=2.0, source=2.0, trainable=100):
        return {"method": name, "loss_mean": loss, "loss_sd": 0.01, "source_loss_mean": source, "source_loss_sd": 0.01,
                "trainable": trainable}

    rows = [row(name) for name in ways.WAYS]
    better = {ways.FULL: (1.0, 3.0), "LoRA+": (1.9, 2.1), "PiSSA": (1.9, 2.2), "DoRA": (1.9, 2.1), "AdaLoRA": (1.9, 2.1),
              "MiLoRA": (2.0, 2.1), "Houlsby": (1.1, 2.5)}
    rows = [row(each["method"], *better.get(each["method"], (2.0, 2.0))) for each in rows]
    cost = {name: {"step": 0.9, "merged": 1.0, "peak_mb": 9.0 if name == "LoRA-FA" else 10.0} for name in ways.WAYS}
    report = {"rows": rows, "costs": {"rows": cost}, "text": {"base": {"loss": 2.1, "source_loss": 1.5}},
              "reviews": {"left_out": "no package"}}
    assert [claim["agrees"] for claim in methods.verdict(report)] == [True] * 14
    real = [{"method": name, "accuracy_mean": value} for name, value in
            (("LoRA", 0.8), (ways.FULL, 0.81), ("prompt tuning", 0.7))]
    assert [claim["agrees"] for claim in methods.verdict(report | {"reviews": {"rows": real}})] == [True] * 16
    assert [claim["agrees"] for claim in methods.real_verdict([real[0], real[2] | {"accuracy_mean": 0.79}])] == [False]
    for each in rows:
        each["loss_sd"] = each["source_loss_sd"] = 2.0     # more than any difference
    cost["LoRA"] |= {"step": 1.6, "merged": 1.2, "peak_mb": 8.0}
    rows[[each["method"] for each in rows].index("VeRA")]["loss_mean"] = 2.05
    assert [i for i, claim in enumerate(methods.verdict(report)) if claim["agrees"]] == [2, 9]


def test_loftq_on_a_matrix_is_loftq_on_a_model(rng):
    model = ml.Transformer(SHAPE, seed=1)
    layer = model.layers[0].mlp.up_proj
    W = layer.weight.data.copy()
    config = ml.LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"])
    found = ml.methods.loftq(model, config, iterations=quantisation.ROUNDS)
    expected = quantisation.loftq_error(W, 4) / np.linalg.norm(W)
    assert found["layers.0.mlp.up_proj"][-1] == pytest.approx(expected, rel=1e-4)


def test_the_errors_of_codes_on_a_known_matrix(rng):
    codes = ml.methods.codes.code_values("nf4")
    W = codes[rng.integers(0, 16, (64, 64))].astype("float32")
    W[:, 0] = 1.0                                          # the largest of every block
    found = quantisation.errors_of([W], 4)
    assert found["matrices"] == 1 and found["codes"]["NF4"]["most"] < 1e-6 < 1e-2 < found["codes"]["FP4"]["least"]
    normal = quantisation.errors_of([rng.standard_normal((128, 96)).astype("float32")], 4)["codes"]
    assert normal["NF4"]["mean"] == pytest.approx(0.092, abs=0.002)      # as test_four_bit.py has it for normal numbers


def test_the_verdicts_on_bases_follow_the_numbers():
    def row(base, loss, prose, bits=4.5):
        return {"base": base, "bits": bits, "loss_mean": loss, "loss_sd": 0.01, "prose": prose, "start_mean": 2.0}

    rows = [row("float32", 1.0, 1.5, 32.0), row("NF4", 1.0, 1.6), row("NF4, double", 1.005, 1.6, 4.127), row("FP4", 1.0, 1.7),
            row("FP4, double", 1.0, 1.7, 4.127), row(quantisation.LOFTQ, 0.9, 1.55, 4.127)]
    values = {"NF4": 0.09, "NF4, double": 0.0901, "FP4": 0.12, "FP4, double": 0.1201, "LoftQ, r = 4": 0.08}
    codes = {name: {"mean": value} for name, value in values.items()}
    memory = [{"base": "float32", "peak_mb": 10.0, "step": 1.0}, {"base": "NF4, double", "peak_mb": 8.0, "step": 2.0}]
    report = {"rows": rows, "rank": 4, "errors": [{"weights": "some", "codes": codes}], "memory": {"rows": memory}}
    assert [claim["agrees"] for claim in quantisation.verdict(report)] == [True] * 8
    codes |= {"NF4": {"mean": 0.13}, "LoftQ, r = 4": {"mean": 0.1}}
    rows[1]["prose"], rows[2]["loss_mean"], rows[5]["prose"], memory[1]["peak_mb"] = 1.8, 1.1, 1.7, 11.0
    assert [i for i, claim in enumerate(quantisation.verdict(report)) if claim["agrees"]] == [6]


@pytest.mark.slow
@pytest.mark.real
def test_the_methods_on_a_real_model(monkeypatch, no_processes):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(methods, "costs", lambda cfg, sizes, *_: {name: {} for name in sizes})
    size = methods.Size(TINY, 1, 2, 1, 0, REVIEWS, SHAPE, 2, 1, ())
    found = methods.on_reviews(size, [0], Options(progress=False))
    if "left_out" in found:
        pytest.skip(found["left_out"])
    assert [row["method"] for row in found["rows"]] == ["LoRA", ways.FULL]
    assert "not causal" in found["cannot"]["prefix tuning"]
    assert found["rows"][0]["trainable"] == found["budget"] == 2 * (6 * (4 * 768 + 2 * 1920) + 768) + 770      # pooler, head
