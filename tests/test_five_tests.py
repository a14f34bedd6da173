"""is_lora tells a LoRA from recipes that only look like one, by autograd, gradients or differences; audit sees each byte."""

import math

import numpy as np
import pytest

import minilora as ml
from minilora import check

TESTS = ["no-op at the start", "few numbers", "base kept", "low rank", "learns"]


def recipes(d: int, k: int, r: int):
    """{name: (weight_fn, params, frozen, gradient, which of the five tests hold)}: the paper's, and six others."""
    rng = np.random.default_rng(0)
    N = rng.standard_normal
    W = N((d, k)) / math.sqrt(k)
    U, sigma, Vt = np.linalg.svd(W, full_matrices=False)
    cut = (U[:, :r] * sigma[:r]) @ Vt[:r]
    factors = {"A": rng.uniform(-1, 1, (r, k)) / math.sqrt(k), "B": np.zeros((d, r))}
    triple = {"U": N((d, r)), "V": N((k, r)), "L": N(r)}
    return W, {
        "LoRA": (lambda p, f: f["W"] + 2 * p["B"] @ p["A"], factors, {"W": W},
                 lambda p, f, G: {"A": 2 * p["B"].T @ G, "B": 2 * G @ p["A"].T}, "11111"),
        "W = A√d": (lambda p, f: p["A"] * math.sqrt(k), {"A": W / math.sqrt(k)}, {},
                    lambda p, f, G: {"A": G * math.sqrt(k)}, "00001"),
        "W = A + B": (lambda p, f: p["A"] + f["B"], {"A": cut}, {"B": W - cut}, lambda p, f, G: {"A": G}, "00001"),
        "a sum over the rank": (lambda p, f: p["A"].sum(0), {"A": N((r, d, k)), "B": N((d, k))}, {"W": W},
                                lambda p, f, G: {"A": np.stack([G] * r)}, "00100"),
        "W itself": (lambda p, f: p["W"], {"W": W}, triple, lambda p, f, G: {"W": G}, "10001"),
        "no factor zero": (lambda p, f: f["W"] + (p["U"] * p["L"]) @ p["V"].T, triple, {"W": W},
                           lambda p, f, G: {"U": G @ p["V"] * p["L"], "V": G.T @ p["U"] * p["L"],
                                            "L": np.diag(p["U"].T @ G @ p["V"])}, "01110"),
    }


@pytest.mark.parametrize("name", list(recipes(24, 20, 2)[1]))
def test_five_tests_on_six_recipes(name):
    W, all_recipes = recipes(24, 20, 2)
    weight_fn, params, frozen, gradient, holds = all_recipes[name]
    before = {key: value.copy() for key, value in {**params, **frozen}.items()}
    by_autograd = check.is_lora(weight_fn, params, frozen, r=2, base=W)
    by_hand = check.is_lora(weight_fn, params, frozen, r=2, base=W, gradient=gradient)
    for report in (by_autograd, by_hand):
        assert list(report.ticks) == TESTS and [*report.ticks.values()] == [mark == "1" for mark in holds], report
        assert bool(report) == (name == "LoRA") and repr(report).count("\n") == 4
    np.testing.assert_allclose(by_autograd.loss, by_hand.loss, rtol=1e-6)
    for key, value in {**params, **frozen}.items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize(("d", "k", "r"), [(7, 5, 1), (5, 7, 2), (1, 4, 1), (4, 1, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_lora_of_every_shape_passes_in_plain_numpy_too(d, k, r, seed):
    rng = np.random.default_rng(seed)
    W, A = rng.standard_normal((d, k)), rng.uniform(-1, 1, (r, k)) / math.sqrt(k)
    params = {"A": A, "B": np.zeros((d, r))}
    assert check.is_lora(lambda p, f: f["W"] + 2 * p["B"] @ p["A"], params, {"W": W}, r=r)
    report = check.is_lora(lambda p, f: f["W"] + 2 * np.matmul(p["B"], p["A"]), params, {"W": W}, r=r, steps=150)
    assert report, report                                        # np.matmul refuses a Tensor: central differences


def test_a_recipe_that_writes_into_the_base_is_seen():
    found = recipes(6, 5, 1)[1]

    def merges(p, f):
        f["W"] += 2 * p["B"] @ p["A"]
        return f["W"]
    report = check.is_lora(merges, *found["LoRA"][1:3], r=1, gradient=found["LoRA"][3], steps=20)
    assert not report.ticks["base kept"] and "W changed" in report.texts["base kept"]

    def counts(p, f):
        f["calls"] += 1
        return f["W"] + 2 * p["B"] @ p["A"]
    _, params, frozen, gradient, _ = found["LoRA"]
    report = check.is_lora(counts, params, {**frozen, "calls": np.zeros(1)}, r=1, gradient=gradient, steps=20)
    assert not report.ticks["base kept"] and report.texts["base kept"] == "frozen calls changed"


def test_a_recipe_that_explodes_is_a_finding():
    W = np.ones((6, 5))
    report = check.is_lora(lambda p, f: f["W"] * p["a"] ** 9, {"a": np.array([1e200])}, {"W": W}, r=1)
    assert not report and report.texts["low rank"] == "the update is not finite" and not report.ticks["learns"]


@pytest.mark.parametrize(("method", "holds"), [(ml.LoraConfig, True), (lambda **k: ml.LoraConfig(use_dora=True, **k), False)])
def test_our_own_adapters(method, holds):
    model = ml.Transformer(ml.TransformerConfig(vocab_size=16, d_model=12, n_layers=1, n_heads=2, max_len=8))
    ml.add_adapter(model, method(r=2, target_modules=["q_proj"]))
    layer = model.layers[0].attn.q_proj
    adapter = layer.adaptation.adapters["default"]
    before = {name: p.data.copy() for name, p in adapter.named_parameters()}
    report = check.is_lora(adapter, frozen={"W": layer.weight.data}, r=2)
    assert bool(report) is holds, report
    assert report.ticks["learns"] and report.ticks["base kept"]
    for name, parameter in adapter.named_parameters():
        np.testing.assert_array_equal(parameter.data, before[name])


def test_what_is_missing_is_said():
    W = np.ones((3, 2))
    with pytest.raises(ValueError, match="give base=W"):
        check.is_lora(lambda p, f: p["A"], {"A": W}, {}, r=1)
    with pytest.raises(ValueError, match="got no params"):
        check.is_lora(lambda p, f: f["W"], frozen={"W": W}, r=1)
    with pytest.raises(ValueError, match=r"gave shape \(2, 3\), expected W's \(3, 2\)"):
        check.is_lora(lambda p, f: p["A"], {"A": W.T}, {"W": W}, r=1)
    with pytest.raises(ValueError, match="do not fit W"):
        check.is_lora(lambda p, f: p["A"], {"A": W}, {"W": W}, r=1, data=(np.ones((4, 3)), np.ones((4, 3))))
    with pytest.raises(KeyError):
        check.is_lora(lambda p, f: p["B"], {"A": W}, {"W": W}, r=1)


def test_audit():
    before = {"same": np.ones(3), "moved": np.ones((2, 2)), "cut": np.ones(4), "cast": np.ones(2), "gone": np.ones(5),
              "zero": np.zeros(1)}
    after = {"same": np.ones(3), "moved": np.ones((2, 2)) + np.eye(2), "cut": np.ones(3), "cast": np.ones(2, np.float32),
             "new": np.ones(6), "zero": -np.zeros(1)}
    found = check.audit(before, after)
    assert (found.changed, found.unchanged, found.reshaped, found.appeared, found.vanished) == (
        ("moved", "zero"), ("same",), ("cast", "cut"), ("new",), ("gone",))             # -0.0 has other bytes than 0.0
    assert repr(found).splitlines()[0] == "changed: 2 arrays, 5 numbers (moved, zero)"
    with pytest.raises(ValueError, match="share the memory of same"):
        check.audit(after, after)


def test_audit_of_a_training_step():
    model = ml.Transformer(ml.TransformerConfig(vocab_size=16, d_model=12, n_layers=1, n_heads=2, max_len=8))
    ml.add_adapter(model, ml.LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: array.copy() for name, array in model.state_dict().items()}
    ids = np.random.default_rng(0).integers(0, 16, (4, 8))
    ml.train(model, lambda step: (ids[:, :-1], ids[:, 1:]), ml.TrainConfig(steps=1, lr=1e-2))
    found = check.audit(before, model)
    assert [name.rpartition(".")[2] for name in found.changed] == ["lora_B"]             # A's first gradient is zero
    assert not found.reshaped and not found.appeared and not found.vanished
