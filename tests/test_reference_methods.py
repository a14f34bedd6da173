"""The test cases of LoRA's relatives: W' by hand in NumPy, its gradients by the complex step, each answer judged right."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_methods import CASES as METHOD_CASES
from test_reference import cases, read

from minilora.pretrained import reference
from minilora.pretrained.reference_methods import CASES

__all__ = ["cases"]                                        # the fixture
LAYER = ("x", "W", "bias", "dy")
FROZEN = ("A0", "B0", "vera_A", "vera_B", "places")


def norm(V, detached):
    V = V.real if detached else V
    return np.sqrt((V * V).sum(axis=1, keepdims=True))     # analytic, for the complex step


def weight_and_bias(kind, t, o, bug):
    """W' and b' of one method from the formula in the metadata; analytic in every parameter."""
    W, b, r, alpha = t["W"], t["bias"], int(o["r"]), float(o["lora_alpha"])
    s = alpha / r * (alpha / r if bug == "twice" else 1.0)
    if kind in ("ia3", "ia3-input"):
        return t["ia3_l"] * W, b * t["ia3_l"][:, 0] if kind == "ia3" else b
    if kind == "vera":
        return W + t["vera_lambda_b"][:, None] * t["vera_B"] @ (t["vera_lambda_d"][:, None] * t["vera_A"]), b
    if kind == "loha":
        return W + s * (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"]), b
    if kind.startswith("lokr"):
        return W + s * np.kron(t["w1"], t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]), b
    if kind == "shira":
        flat = W.reshape(-1).astype(t["values"].dtype)
        flat[t["places"]] += t["values"]
        return flat.reshape(W.shape), b
    if kind == "tt-lora":
        B = np.einsum("zia,ajr->zijr", t["out0"], t["out1"]).reshape(len(W), r)
        return W + s * B @ np.einsum("ria,ajz->rijz", t["in0"], t["in1"]).reshape(r, W.shape[1]), b
    A, B = t["lora_A"], t["lora_B"]
    if kind == "adalora":
        return W + alpha / (r + 1e-5) * (B * t["lora_E"][:, 0]) @ A, b
    if kind == "sora":
        return W + s * (B * t["gate"]) @ A, b
    if kind.startswith("dora"):
        V = W + s * B @ A
        return t["magnitude"][:, None] * V / norm(V, (kind == "dora") != (bug == "detach")), b
    if "A0" in t:
        return W + s * (B @ A - t["B0"] @ t["A0"]), b
    return W + s * B @ A, t["bias_own"] + s * t["lora_B_bias"] if kind == "lora-bias" else b


def implementation(kind, t, o, expected, bug=None):
    t = {key: value.astype(float) if value.dtype.kind == "f" else value for key, value in t.items()}
    W, b = weight_and_bias(kind, t, o, bug)
    found = {"y": t["x"] @ W.T + b, "dx": t["dy"] @ W, "merged": W}
    if "merged_bias" in expected:
        found["merged_bias"] = b
    g, g_b = t["dy"].T @ t["x"], t["dy"].sum(axis=0)
    for name in t.keys() - {*LAYER, *FROZEN}:
        if f"d_{name}" in expected:
            gradient = np.zeros(t[name].shape)
            for i in np.ndindex(t[name].shape):
                moved = t[name].astype(complex)
                moved[i] += 1e-30j
                W_i, b_i = weight_and_bias(kind, t | {name: moved}, o, bug)
                gradient[i] = ((W_i.imag * g).sum() + (b_i.imag * g_b).sum()) / 1e-30
            found[f"d_{name}"] = gradient
    return found


def judged(cases, folder, kind, bug=None):
    """The rows of verify for one method, answered by hand."""
    folder.mkdir()
    for dtype in ("float64", "float32"):
        tensors, metadata = read(cases / f"{kind}-{dtype}.safetensors")
        inputs = {name: tensors[name] for name in metadata["inputs"].split()}
        found = implementation(kind, inputs, metadata, metadata["answers"].split(), bug)
        assert found.keys() == set(metadata["answers"].split())
        save_file({name: np.ascontiguousarray(value.astype(dtype)) for name, value in found.items()},
                  folder / f"{kind}-{dtype}.safetensors")
    rows = reference.verify(cases, folder).rows
    return {name: row for name, row in rows.items() if row["verdict"] != "missing"}


@pytest.mark.parametrize("kind", CASES)
def test_the_answers_are_the_formula_by_hand(kind, cases, tmp_path):
    rows = judged(cases, tmp_path / "theirs", kind)
    assert len(rows) >= 2 * 4 and {row["verdict"] for row in rows.values()} == {"right"}, rows


@pytest.mark.parametrize(("kind", "bug", "words"), [
    *((kind, "twice", "applied twice") for kind in ("loha", "lokr", "pissa", "eva", "lora-fa", "tt-lora", "sora", "dora")),
    ("dora", "detach", "held constant in a case"), ("dora-full", "detach", "held constant in a case")])
def test_mistakes_are_named(kind, bug, words, cases, tmp_path):
    wrong = {name: row for name, row in judged(cases, tmp_path / "theirs", kind, bug).items() if row["verdict"] == "wrong"}
    assert any(name.startswith(f"{kind}-float64") for name in wrong) and any("float32" in name for name in wrong)
    assert all(words in row["diagnosis"] for row in wrong.values()), wrong


def test_every_method_that_changes_a_weight_has_a_case():
    """By the suite of methods: all that merge, but LoRA and rsLoRA (in reference.py), biases alone, and whole weights."""
    covered = {config({"r": 3, "lora_alpha": 12.0, "detach_norm": True}).method for config, _, _ in CASES.values()}
    methods = {case.config(None).method for case in METHOD_CASES.values() if case.merges}
    assert methods - covered == {"lora", "bitfit", "full"} and covered <= methods
