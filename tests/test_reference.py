"""`minilora reference` and `verify`: the cases against closed forms, and each planted mistake gets its own diagnosis.

`implementation` below is somebody else's LoRA, in NumPy by hand, with one bug at will.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minilora as ml
from minilora.cli import main
from minilora.pretrained.reference_methods import CASES as METHODS

KINDS = ("linear", "bias", "square", "rslora", "dropout", "embedding", "adamw")  # of LoRA itself


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "cases"
    ml.reference.write(folder)
    return folder


def read(path):
    with safe_open(path, "numpy") as file:
        return load_file(path), file.metadata()


def step(p, gradients, o, bug):
    lr, b1, b2, eps, wd = (float(o[k]) for k in ("lr", "beta1", "beta2", "eps", "weight_decay"))
    if bug == "betas":
        b1, b2 = b2, b1
    m, v, done = 0 * p, 0 * p, []
    for t, g in enumerate(gradients, 1):
        g = g + wd * p if bug == "coupled" else g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        mh, vh = (m, v) if bug == "uncorrected" else (m / (1 - b1**t), v / (1 - b2**t))
        root = np.sqrt(vh + eps) if bug == "inside" else np.sqrt(vh) + eps
        if bug == "early":
            root = (np.sqrt(v) + eps) / np.sqrt(1 - b2**t)
        update = mh / (vh + eps) if bug == "no root" else mh / root
        decay = 0 if bug in ("coupled", "no decay") else wd if bug == "decay without lr" else lr * wd
        p = p - decay * p + (lr if bug == "uphill" else -lr) * update
        done.append(p)
    return done


def implementation(t, o, bug=None):
    """All answers to one case, from the formulas in the file's metadata."""
    t = {key: value.astype(float) if value.dtype.kind == "f" else value for key, value in t.items()}
    if "p" in t:
        return dict(zip(("p1", "p2"), step(t["p"], [t["g1"], t["g2"]], o, bug), strict=True))
    W, A, B, dy, alpha, r = t["W"], t["A"], t["B"], t["dy"], float(o["lora_alpha"]), int(o["r"])
    root = (o["use_rslora"] == "True") != (bug == "other root")
    s = alpha / (np.sqrt(r) if root else r)
    s = {"twice": s * s, "missing": 1.0, "alpha": alpha, "upside": 1 / s, "sign": -s, "no update": 0.0}.get(bug, s)
    found = {"merged": W + s * ((B @ A).T if "ids" in t else B @ A)}
    if "ids" in t:
        ids = t["ids"]
        found["y"] = W[ids] + s * A[:, ids].T @ B.T
        found["dA"], rows = np.zeros_like(A), s * (dy @ B).T
        for j, i in enumerate(ids):
            found["dA"][:, i] = rows[:, j] + (0 if bug == "repeated" else found["dA"][:, i])
        picked = {i: j for j, i in enumerate(ids)}.values() if bug == "repeated" else range(len(ids))
        found["dB"] = s * sum(np.outer(dy[j], A[:, ids[j]]) for j in picked)
    else:
        W = W.T if bug == "W transposed" else 0 * W if bug == "no base" else W
        A, B = (B.T, A.T) if bug == "swapped" else (A, B)
        b, p = t.get("bias", np.zeros(len(W))), float(o["p"])
        b = b * {"no bias": 0, "two biases": 2, "no base": 0}.get(bug, 1)
        keep = t.get("keep", np.ones_like(t["x"]))
        M = keep / (1 - p) if "keep" in t else keep
        M = {"unscaled": keep, "scaled down": keep * (1 - p), "unmasked": 1 + 0 * keep}.get(bug, M) if "keep" in t else M
        dy = dy / len(dy) if bug == "mean" else np.ones_like(dy) if bug == "ones" else dy
        x = t["x"]
        found |= {"y": (x * M if bug == "both" else x) @ W.T + b + s * (x * M) @ A.T @ B.T, "merged": W + s * B @ A,
                  "dx": dy @ W + s * (dy @ B @ A) * M, "dA": s * (dy @ B).T @ (x * M), "dB": s * dy.T @ ((x * M) @ A.T)}
        if bug == "dx without branch":
            found["dx"] = dy @ W
        if bug == "dx without mask":
            found["dx"] = dy @ W + s * dy @ B @ A
        if bug == "dB without scale":
            found["dB"] = found["dB"] / s
    return found | {f"{key}_step": step(t[key], [t[f"g{key}"]], o, bug)[0] for key in "AB"}


def answer(cases, folder, bug=None, only=KINDS, change=lambda found: found):
    folder.mkdir()
    for path in sorted(cases.glob("*.safetensors")):
        kind, _, dtype = path.stem.rpartition("-")
        if kind in only:
            tensors, options = read(path)
            found = change(implementation(tensors, options, bug))
            save_file({k: np.ascontiguousarray(v).astype(dtype) for k, v in found.items()}, folder / path.name)
    return folder


def test_the_answers_are_the_closed_forms(cases, tmp_path):
    report = ml.reference.verify(cases, answer(cases, tmp_path / "theirs"))
    verdicts = {(name.partition("-float")[0], row["verdict"]) for name, row in report.rows.items()}
    assert report.passed and verdicts == {*((kind, "right") for kind in KINDS), *((kind, "missing") for kind in METHODS)}
    assert report.summary()["right"] == 86


def test_the_gradients_are_finite_differences(cases):
    rng = np.random.default_rng(1)
    for kind in set(KINDS) - {"adamw"}:
        tensors, options = read(cases / f"{kind}-float64.safetensors")
        for name in ("x", "A", "B"):
            if name in tensors:
                direction = rng.standard_normal(tensors[name].shape)
                moved = [tensors | {name: tensors[name] + e * direction} for e in (-1e-5, 1e-5)]
                loss = [float((implementation(at, options)["y"] * tensors["dy"]).sum()) for at in moved]
                np.testing.assert_allclose((tensors[f"d{name}"] * direction).sum(), (loss[1] - loss[0]) / 2e-5, rtol=1e-7)


# bug -> (the kinds in which it shows, words of its diagnosis)
LAYERS = ("linear", "bias", "square", "rslora", "dropout")
BUGS = {
    "twice": ((*LAYERS, "embedding"), "applied twice (s²)"), "missing": ((*LAYERS, "embedding"), "alpha/r is missing"),
    "alpha": ((*LAYERS, "embedding"), "not divided by r"), "other root": (LAYERS, "alpha/r in a case of rsLoRA"),
    "upside": (LAYERS, "upside down"), "sign": ((*LAYERS, "embedding"), "the sign is wrong"),
    "no update": (LAYERS, "the update is missing"), "no base": (LAYERS, "the base is missing"),
    "W transposed": (("square",), "W is transposed"), "swapped": (("square",), "A and B are swapped or transposed"),
    "no bias": (("bias",), "the bias is missing"), "two biases": (("bias",), "added twice"),
    "unscaled": (("dropout",), "not rescaled"), "scaled down": (("dropout",), "in place of 1/(1-p)"),
    "unmasked": (("dropout",), "mask is not applied"), "both": (("dropout",), "also on the base"),
    "mean": (LAYERS, "divided by the number of rows"), "ones": (LAYERS, "dy is not used"),
    "repeated": (("embedding",), "repeated ids do not add up"), "dx without branch": (LAYERS, "the branch is missing in dx"),
    "dx without mask": (("dropout",), "the mask is missing in dx"),
    "dB without scale": (LAYERS, "missing in this gradient alone"),
    "coupled": (KINDS, "coupled"), "no decay": (KINDS, "weight decay is missing"),
    "decay without lr": (KINDS, "not multiplied by the learning rate"), "inside": (KINDS, "inside the root"),
    "early": (KINDS, "before the bias correction"), "uncorrected": (KINDS, "bias correction is missing"),
    "no root": (KINDS, "the root is missing"), "betas": (("adamw",), "beta1 and beta2 are swapped"),
    "uphill": (KINDS, "uphill"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_each_mistake_has_its_diagnosis(bug, cases, tmp_path):
    kinds, words = BUGS[bug]
    report = ml.reference.verify(cases, answer(cases, tmp_path / "theirs", bug, kinds))
    wrong = {name: row for name, row in report.rows.items() if row["verdict"] == "wrong"}
    assert not report.passed
    for kind in kinds:
        for dtype in ("float64", "float32"):
            assert any(name.startswith(f"{kind}-{dtype}") for name in wrong), f"{kind} {dtype} did not notice"
    assert {name: row["diagnosis"] for name, row in wrong.items() if words not in row["diagnosis"]} == {}


def test_what_no_known_mistake_explains(cases, tmp_path):
    def damaged(found):
        if "dA" in found:
            found = found | {"dA": found["dA"].T, "y": found["y"] * 3.0, "dB": found["dB"] + 1.0,
                             "merged": found["merged"] * np.nan}
        return found
    rows = ml.reference.verify(cases, answer(cases, tmp_path / "theirs", only=("linear",), change=damaged)).rows
    said = {name: row["diagnosis"] for name, row in rows.items() if name.startswith("linear-float64")}
    assert "right but transposed" in said["linear-float64: dA"] and "3 times" in said["linear-float64: y"]
    assert "no known mistake" in said["linear-float64: dB"] and "no finite numbers" in said["linear-float64: merged"]
    assert said["linear-float64: dx"] is None and rows["rslora-float64: y"]["verdict"] == "missing"


def test_float32_answers_to_float64_cases_are_told_so(cases, tmp_path):
    rows = ml.reference.verify(cases, answer(cases, tmp_path / "theirs", only=("linear",), change=lambda found: {
        key: value.astype(np.float32) for key, value in found.items()})).rows
    assert "right to float32" in rows["linear-float64: y"]["diagnosis"]
    assert rows["linear-float32: y"]["verdict"] == "right"


def test_missing_answers_are_missing_and_not_wrong(cases, tmp_path, capsys):
    theirs = answer(cases, tmp_path / "theirs", only=("linear",), change=lambda found: {"y": found["y"]})
    assert main(["verify", str(cases), str(theirs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["summary"] == {"right": 2, "wrong": 0, "missing": len(found["answers"]) - 2}
    assert found["answers"]["linear-float32: dx"]["verdict"] == "missing"


def test_the_command_line(tmp_path, capsys):
    folder = tmp_path / "cases"
    assert main(["reference", "-o", str(folder)]) == 0
    assert str(folder / "README.txt") in capsys.readouterr().out
    assert "max|yours - expected|" in (folder / "README.txt").read_text()
    assert main(["reference", "-o", str(folder)]) == 2 and "not empty" in capsys.readouterr().err
    assert main(["reference", "-o", str(folder), "--force"]) == 0
    capsys.readouterr()
    assert main(["verify", str(folder), str(answer(folder, tmp_path / "right"))]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("86 right, 0 wrong, ")
    assert main(["verify", str(folder), str(answer(folder, tmp_path / "wrong", "sign"))]) == 1
    assert "the sign is wrong" in capsys.readouterr().out


def test_bad_input_is_one_line(cases, tmp_path, capsys):
    def fails(*arguments):
        assert main(["verify", *map(str, arguments)]) == 2
        line, = capsys.readouterr().err.splitlines()
        return line

    assert "has no test cases" in fails(tmp_path, cases)
    assert "has none of the cases' answers" in fails(cases, tmp_path)
    theirs = answer(cases, tmp_path / "theirs", only=("linear",))
    path = theirs / "linear-float32.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert "not a whole safetensors file" in fails(cases, theirs)
    save_file({"y": np.zeros(2)}, tmp_path / "linear-float32.safetensors")
    assert "is no test case" in fails(tmp_path, tmp_path)


def test_files_say_what_they_ask(cases):
    for path in cases.glob("*.safetensors"):
        tensors, metadata = read(path)
        names = [*metadata["inputs"].split(), *metadata["answers"].split()]
        assert sorted(names) == sorted(tensors)
        assert all(f"formula {name}" in metadata for name in metadata["answers"].split())
        floats = [value for key, value in tensors.items() if key not in ("ids", "places")]
        assert {value.dtype.name for value in floats} == {path.stem.rpartition("-")[2]}
