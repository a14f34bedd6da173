"""The tools on files: resize, compose, merge, extract. What they write against dense algebra, and input that is wrong.

(What PEFT makes of their files is in parity/.)
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minilora as ml
from minilora.cli import main
from minilora.lora.files import read_adapter, write_adapter
from minilora.lora.peft_format import CONFIG, WEIGHTS
from minilora.pretrained import merge as merging
from minilora.pretrained import tensors as tensor_files
from minilora.pretrained.adapters import AdapterFolder, distance, norm
from minilora.pretrained.edit import triangle
from minilora.pretrained.extract import approximate, randomised_svd
from minilora.pretrained.tensors import INDEX, SINGLE, Checkpoint, TensorFile, TensorWriter, encode

SHAPES = {"model.layers.0.q_proj": (12, 9), "model.layers.1.q_proj": (12, 9), "model.layers.1.up": (20, 12),
          "model.tall": (30, 1)}


def factors(rng, shape, r, dtype=np.float64, scale=0.5, **more):
    decay = 0.6 ** np.arange(r)
    return {"A": (rng.standard_normal((r, shape[1])) * decay[:, None]).astype(dtype),
            "B": rng.standard_normal((shape[0], r)).astype(dtype), "scale": scale, "embedding": False} | more


def adapter(folder, seed=0, r=6, options=None, shapes=SHAPES, dtype=np.float64, **more):
    rng = np.random.default_rng(seed)
    write_adapter(folder, options or {}, {path: factors(rng, shape, r, dtype) for path, shape in shapes.items()} | more)
    return folder


def updates(folder):
    return {path: e["scale"] * e["B"].astype(float) @ e["A"].astype(float) for path, e in read_adapter(folder)[1].items()
            if "A" in e}


def checkpoint(folder, tensors, dtype="F32", shards=1, config=None, **files):
    """A checkpoint of a dtype, in one file or in shards with their index."""
    folder.mkdir()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else [SINGLE]
    where = {key: names[i * shards // len(tensors)] for i, key in enumerate(tensors)}
    for name in names:
        keys = [key for key in tensors if where[key] == name]
        with TensorWriter(folder / name, keys, {"format": "pt"}) as writer:
            for key in keys:
                writer.add(key, tensors[key], dtype)
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def base_tensors(seed=5, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {f"{path}.weight": rng.standard_normal(shape) for path, shape in shapes.items()} | {"model.norm.weight": np.ones(9)}


@pytest.fixture
def small(tmp_path):
    return adapter(tmp_path / "small")


# ---------------------------------------------------------------------------------------------- safetensors, a tensor at a time


def test_what_is_written_a_tensor_at_a_time_is_read_by_the_library(tmp_path, rng):
    arrays = {"a": rng.standard_normal((3, 4)), "b.ü": rng.standard_normal(5).astype(np.float32), "none": np.zeros((0, 3)),
              "scalar": np.float64(2.5), "h": rng.standard_normal((2, 2)).astype(np.float16)}
    dtypes = {"float64": "F64", "float32": "F32", "float16": "F16"}
    with TensorWriter(tmp_path / "x", arrays, {"format": "pt"}) as writer:
        for key, array in arrays.items():
            writer.add(key, np.asarray(array), dtypes[array.dtype.name])
    with safe_open(tmp_path / "x", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    read, mine = load_file(tmp_path / "x"), TensorFile(tmp_path / "x")
    assert read.keys() == arrays.keys() == mine.places.keys()
    for key, array in arrays.items():
        assert_array_equal(read[key], array)
        assert_array_equal(mine.array(key), array)


def test_bf16_is_rounded_to_nearest_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9, 0.0, 1e-40, 3.3e38], np.float32)
    expected = [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1.0, 0.0, 1e-40, 3.3e38]
    found = (encode("x", values, "BF16").astype(np.uint32) << 16).view(np.float32)
    assert_allclose(found, expected, rtol=4e-3, atol=1e-41)
    assert found[:6].tolist() == expected[:6]
    for dtype, value in (("BF16", 3.4e38), ("F16", 65520.0), ("F32", 1e39)):
        with pytest.raises(ValueError, match=f"too large for {dtype}"):
            encode("x", np.array([value]), dtype)


def test_norms_from_factors(rng):
    B, A = rng.standard_normal((7, 3)), rng.standard_normal((3, 5))
    assert_allclose(norm(B, A), np.linalg.norm(B @ A), rtol=1e-13)
    for size in (1.0, 1e-3, 1e-9):
        C = B + size * rng.standard_normal(B.shape)
        assert_allclose(distance(B, A, C, A, norm(B, A)), np.linalg.norm((B - C) @ A), rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-160, 1e200])
@pytest.mark.parametrize("condition", [1.0, 30.0, 990.0, 1010.0, 1e6, 1e12, np.inf])
@pytest.mark.parametrize("shape", [(60, 12), (47, 12), (9, 12), (40, 1)], ids=str)
def test_the_triangle_of_a_qr(shape, condition, scale, rng, monkeypatch):
    """As exact as Householder's, whose steps it does without where the columns are far from dependent."""
    n, r = min(shape), shape[1]
    S = np.geomspace(1.0, 1.0 / condition, n) if np.isfinite(condition) else np.where(np.arange(n) < max(1, n - 1), 1.0, 0.0)
    U, V = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in shape)
    X = (U * S) @ V.T * scale
    used = []
    real = np.linalg.qr
    monkeypatch.setattr(np.linalg, "qr", lambda *a, **k: used.append(1) or real(*a, **k))
    R = triangle(X)
    assert R.shape == (n, r) and bool(used) == (shape[0] < 4 * r or (condition > 1000 and r > 1) or scale != 1.0)
    assert_allclose(np.linalg.svd(R / scale, compute_uv=False), np.linalg.svd(X / scale, compute_uv=False), rtol=0, atol=1e-14)
    assert_allclose((R / scale).T @ (R / scale), (X / scale).T @ (X / scale), rtol=0, atol=1e-14)
    if condition < 1000:
        assert_allclose(np.linalg.svd(R / scale, compute_uv=False)[:n], S, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("size", [{"rank": 1}, {"rank": 3}, {"rank": 50}, {"energy": 0.9}, {"energy": 1.0}], ids=str)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_resize_is_the_truncated_svd(size, dtype, use_rslora, tmp_path):
    source = adapter(tmp_path / "in", options={"use_rslora": use_rslora}, dtype=dtype)
    report = ml.resize(source, tmp_path / "out", **size)
    before, after = updates(source), updates(tmp_path / "out")
    tolerance = {np.float64: 1e-12, np.float32: 1e-6, np.float16: 5e-3}[dtype]
    for path, row in report.modules.items():
        U, S, Vh = np.linalg.svd(before[path], full_matrices=False)
        share = np.cumsum(S**2) / (S**2).sum()
        q = row["rank"]
        if "rank" in size:
            assert q == min(size["rank"], 6) or path == "model.tall"
        elif size["energy"] < 1:
            assert share[q - 1] >= 0.9 - 1e-6 and (q == 1 or share[q - 2] < 0.9)
        assert_allclose(after[path], U[:, :q] * S[:q] @ Vh[:q], atol=tolerance * S[0])
        assert_allclose(row["predicted_error"], np.sqrt(max(0.0, (S[q:] ** 2).sum() / (S**2).sum())), atol=tolerance)
        assert_allclose(row["measured_error"], np.linalg.norm(after[path] - before[path]) / np.linalg.norm(S), atol=tolerance)
    with safe_open(tmp_path / "out" / WEIGHTS, "numpy") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {np.dtype(dtype)}              # noqa: SIM118
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["use_rslora"] is use_rslora
    assert ml.analyze(tmp_path / "out").summary()["modules"] == 4


def test_resize_keeps_what_is_saved_whole_and_what_is_small_enough(tmp_path, rng):
    source = adapter(tmp_path / "in", score={"weight": rng.standard_normal((2, 12))}, options={"task_type": "SEQ_CLS"},
                     table={"A": np.ones((2, 5)), "B": np.ones((7, 2)), "scale": 0.5, "embedding": True},
                     zero={"A": np.ones((3, 4)), "B": np.zeros((4, 3)), "scale": 2.0, "embedding": False})
    report = ml.resize(source, tmp_path / "out", rank=2)
    before, after = read_adapter(source)[1], read_adapter(tmp_path / "out")[1]
    assert_array_equal(after["score"]["weight"], before["score"]["weight"])
    for name in "AB":
        assert_array_equal(after["table"][name], before["table"][name])
    assert after["table"]["embedding"] and report.modules["zero"]["measured_error"] is None
    assert not (after["zero"]["B"] @ after["zero"]["A"]).any()
    assert report.summary["copied"] == 1 and "score" not in report.modules


# ---------------------------------------------------------------------------------------------------------------------- compose


@pytest.mark.parametrize("weights", [None, [0.7, -0.3], [0.0, 2.0], [1, -1]], ids=str)
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_compose_is_the_weighted_sum(how, weights, tmp_path):
    a, b = adapter(tmp_path / "a", 1, r=3), adapter(tmp_path / "b", 2, r=2, options={"use_rslora": True}, shapes=dict(
        list(SHAPES.items())[1:]) | {"model.new": (4, 4)})
    report = ml.compose([a, b], tmp_path / "out", weights, how)
    wa, wb = weights or (1, 1)
    one, two, found = updates(a), updates(b), updates(tmp_path / "out")
    assert found.keys() == one.keys() | two.keys()
    for path, got in found.items():
        exact = wa * one.get(path, 0) + wb * two.get(path, 0)
        size, row = np.linalg.norm(exact), report.modules[path]
        if how == "cat":
            assert_allclose(got, exact, atol=1e-14 * max(1, abs(exact).max()))
        else:
            S = np.linalg.svd(exact, compute_uv=False)
            assert_allclose(np.linalg.norm(got - exact), np.sqrt((S[row["rank"]:] ** 2).sum()), atol=1e-11)
            assert_allclose((row["predicted_error"] or 0) * size, np.sqrt((S[row["rank"]:] ** 2).sum()), atol=1e-11)
        assert_allclose((row["measured_error"] or 0) * size, np.linalg.norm(got - exact), atol=1e-11)
        if path in one and path in two:
            assert row["linear_error"] is None             # ranks 3 and 2 have no such sum


def test_compose_reports_what_the_naive_sum_gets_wrong(tmp_path):
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    report = ml.compose([a, b], tmp_path / "out", [0.5, -2.0])
    one, two = read_adapter(a)[1], read_adapter(b)[1]
    for path, row in report.modules.items():
        ca, cb = 0.5 * one[path]["scale"], 2.0 * two[path]["scale"]
        B = ca**0.5 * one[path]["B"] + cb**0.5 * two[path]["B"]
        A = ca**0.5 * one[path]["A"] - cb**0.5 * two[path]["A"]
        exact = ca * one[path]["B"] @ one[path]["A"] - cb * two[path]["B"] @ two[path]["A"]
        assert_allclose(row["linear_error"], np.linalg.norm(B @ A - exact) / np.linalg.norm(exact), rtol=1e-9)
        assert row["linear_error"] > 0.1 > row["measured_error"]
    again = ml.compose([a], tmp_path / "one", [3.0])       # one adapter alone: no cross terms
    assert again.summary["linear_error"] < 1e-7 and again.summary["measured_error"] == 0.0


def test_float32_factors_under_one_common_scale_stay_bit_for_bit(tmp_path):
    a, b = (adapter(tmp_path / name, seed, dtype=np.float32) for name, seed in (("a", 1), ("b", 2)))
    ml.compose([a, b], tmp_path / "out")
    one, two, both = (read_adapter(folder)[1] for folder in (a, b, tmp_path / "out"))
    for path in SHAPES:
        assert_array_equal(both[path]["B"], np.concatenate([one[path]["B"], two[path]["B"]], axis=1))
        assert both[path]["scale"] == pytest.approx(0.5, rel=1e-15)


# ------------------------------------------------------------------------------------------------------------------------ merge


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_merge_is_the_sum_rounded_once(dtype, shards, small, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "ROWS", 40)               # several blocks of rows
    base = checkpoint(tmp_path / "base", base_tensors(), dtype, shards, tokenizer="words", **{"pytorch_model.bin": "old"})
    report = ml.merge_checkpoint(base, small, tmp_path / "out")
    W, merged, change = Checkpoint(base), Checkpoint(tmp_path / "out"), updates(small)
    assert W.files.keys() == merged.files.keys()
    along = off = total = 0.0
    for key in W.files:
        assert merged.place(key).dtype == dtype and merged.files[key].path.name == W.files[key].path.name
        old, new, delta = W.array(key).astype(float), merged.array(key).astype(float), change.get(key.removesuffix(".weight"))
        if delta is None:
            assert_array_equal(new, old)
            continue
        exact = encode(key, old + delta, dtype)
        exact = (exact.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else exact
        assert (new != exact).mean() < 0.01                # ties broken by float32 sums aside
        row, size = report.modules[key.removesuffix(".weight")], (delta**2).sum()
        assert_allclose(row["kept"], ((new - old) * delta).sum() / size, rtol=1e-5)
        assert_allclose(row["error"], np.linalg.norm(new - old - delta) / size**0.5, rtol=1e-3, atol=1e-12)
        along, off, total = along + ((new - old) * delta).sum(), off + ((new - old - delta) ** 2).sum(), total + size
    assert_allclose([report.summary["kept"], report.summary["error"]], [along / total, (off / total) ** 0.5], rtol=1e-3,
                    atol=1e-12)
    assert (tmp_path / "out/tokenizer").read_text() == "words" and not (tmp_path / "out/pytorch_model.bin").exists()
    assert "pytorch_model.bin" in report.notes[0]


def test_an_update_below_half_a_step_of_bf16_does_not_survive(tmp_path):
    base = checkpoint(tmp_path / "base", {"m.weight": np.ones((4, 4))}, "BF16")
    write_adapter(tmp_path / "a", {}, {"m": {"A": np.full((1, 4), 1e-3), "B": np.ones((4, 1)), "scale": 1.0,
                                             "embedding": False}})
    report = ml.merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert report.summary["kept"] == 0.0 and report.summary["error"] == pytest.approx(1.0)
    assert_array_equal(Checkpoint(tmp_path / "out").array("m.weight"), np.ones((4, 4)))


def test_merge_where_weights_lie_in_out(tmp_path, rng):
    shapes = {"transformer.h.0.c_attn": (15, 5), "transformer.h.0.c_proj": (5, 5)}
    tensors = {f"{path.removeprefix('transformer.')}.weight": rng.standard_normal(shape[::-1])
               for path, shape in shapes.items()}
    base = checkpoint(tmp_path / "base", tensors, "F64")   # saved without its head: "transformer." is not in the names
    source = adapter(tmp_path / "a", options={"fan_in_fan_out": True}, shapes=shapes, r=2)
    ml.merge_checkpoint(base, source, tmp_path / "out")
    for path, delta in updates(source).items():
        key = f"{path.removeprefix('transformer.')}.weight"
        assert_allclose(Checkpoint(tmp_path / "out").array(key), tensors[key] + delta.T, atol=1e-14)


def test_merge_of_biases_whole_tensors_and_tables(tmp_path, rng):
    base = checkpoint(tmp_path / "base", base_tensors() | {"model.up.bias": np.ones(8), "model.up.weight": np.zeros((8, 9)),
                      "embeddings.weight": np.zeros((11, 4)), "old.weight": np.zeros((2, 3))}, "F64", 2)
    source = adapter(tmp_path / "a", shapes={}, options={"lora_bias": True}, **{
        "model.up": factors(rng, (8, 9), 2, lora_bias=rng.standard_normal(8)),
        "embeddings": factors(rng, (11, 4), 2, embedding=True), "old": {"weight": np.ones((2, 3))},
        "score": {"weight": np.full((2, 9), 7.0)}})
    report = ml.merge_checkpoint(base, source, tmp_path / "out")
    out, entries = Checkpoint(tmp_path / "out"), AdapterFolder(source)
    assert_allclose(out.array("model.up.bias"), 1 + 0.5 * entries["model.up"]["lora_bias"])
    assert_allclose(out.array("embeddings.weight"), 0.5 * entries["embeddings"]["B"] @ entries["embeddings"]["A"])
    assert (out.array("old.weight") == 1).all() and (out.array("score.weight") == 7).all()
    assert any("score.weight (2, 9) is new" in note for note in report.notes)
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]["score.weight"] in out.shards


def test_a_tied_table_is_refused_or_untied(tmp_path, rng):
    tensors = {"model.embed_tokens.weight": rng.standard_normal((11, 4)), "model.up.weight": np.zeros((8, 4))}
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = checkpoint(tmp_path / "base", tensors, "F64", config=config)
    for name, embedding in (("model.embed_tokens", True), ("lm_head", False)):
        source = adapter(tmp_path / name, shapes={}, **{name: factors(rng, (11, 4), 2, embedding=embedding)})
        with pytest.raises(ValueError, match=r"head shares that table .* untie"):
            ml.merge_checkpoint(base, source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        ml.merge_checkpoint(base, source, tmp_path / "out", untie=True)
        out, delta = Checkpoint(tmp_path / "out"), updates(source)[name]
        table = tensors["model.embed_tokens.weight"]
        assert_allclose(out.array("model.embed_tokens.weight"), table + delta * embedding)
        assert_allclose(out.array("lm_head.weight"), table + delta * (not embedding))
        assert out.config()["tie_word_embeddings"] is False
        (tmp_path / "out").rename(tmp_path / f"done-{name}")
    plain = adapter(tmp_path / "plain", shapes={"model.up": (8, 4)})
    ml.merge_checkpoint(base, plain, tmp_path / "out")     # the table is not touched: nothing to untie
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").files


# ---------------------------------------------------------------------------------------------------------------------- extract


@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.9}], ids=str)
def test_extract_finds_the_best_update(size, tmp_path, rng):
    tensors = base_tensors()
    base = checkpoint(tmp_path / "base", tensors, "F64")
    change = {key: rng.standard_normal(value.shape) for key, value in tensors.items() if "q_proj" in key or "norm" in key}
    tuned = checkpoint(tmp_path / "tuned", tensors | {key: tensors[key] + value for key, value in change.items()}, "F64", 2)
    report = ml.extract(base, tuned, tmp_path / "out", **size)
    found = updates(tmp_path / "out")
    assert found.keys() == {"model.layers.0.q_proj", "model.layers.1.q_proj"}
    assert report.notes == ["changed and not in the LoRA: model.norm.weight"]
    for path, got in found.items():
        D, row = change[f"{path}.weight"], report.modules[path]
        U, S, Vh = np.linalg.svd(D, full_matrices=False)
        q = row["rank"]
        assert q == 2 if "rank" in size else (S[:q] ** 2).sum() >= 0.9 * (S**2).sum() > (S[: q - 1] ** 2).sum()
        assert_allclose(got, U[:, :q] * S[:q] @ Vh[:q], atol=1e-5)
        expected = np.sqrt((S[q:] ** 2).sum() / (S**2).sum())
        assert_allclose([row["predicted_error"], row["measured_error"]], [expected, expected], rtol=1e-5)


def test_the_update_that_was_merged_comes_out_again(small, tmp_path):
    base = checkpoint(tmp_path / "base", base_tensors(), "F64")
    ml.merge_checkpoint(base, small, tmp_path / "tuned")
    report = ml.extract(base, tmp_path / "tuned", tmp_path / "out", rank=6, target_modules=["q_proj"])
    for path in ("model.layers.0.q_proj", "model.layers.1.q_proj"):
        assert_allclose(updates(tmp_path / "out")[path], updates(small)[path], atol=1e-6)
        assert report.modules[path]["measured_error"] < 1e-6
    assert "model.tall.weight" in report.notes[0]


def test_the_randomised_svd_comes_close_to_the_exact_one(rng):
    U, V = np.linalg.qr(rng.standard_normal((1100, 200)))[0], np.linalg.qr(rng.standard_normal((1000, 200)))[0]
    S = 1.0 / np.arange(1, 201)                            # a slow fall
    D = (U * S @ V.T).astype(np.float32)
    got = randomised_svd(D, 20, rng)
    assert_allclose(got[1], S[:20], rtol=1e-4)
    B, A, values, method = approximate(D, 20, None)
    assert method == "randomised" and values is None
    best = np.sqrt((S[20:] ** 2).sum())
    assert best * (1 - 1e-4) <= np.linalg.norm(D - B @ A) <= best * 1.001
    B, A, _, method = approximate(D, None, 0.95)           # 32 directions are enough
    assert method == "randomised" and np.linalg.norm(D - B @ A) ** 2 <= 0.0501 * (S**2).sum()
    assert len(A) <= np.flatnonzero(np.cumsum(S**2) >= 0.95 * (S**2).sum())[0] + 2


# ---------------------------------------------------------------------------------------------------------- input that is wrong


def fails(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    line, = capsys.readouterr().err.splitlines()
    return line


def damaged(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.q_proj.lora_A.weight"
WRONG_ADAPTERS = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "not a whole safetensors file"),
    "a lying header": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes().replace(b"[6,9]", b"[6,8]")),
                       "not a whole"),
    "nan": (lambda f: damaged(f, WEIGHTS, lambda t: t[Q].fill(np.nan)), "NaN or infinite values"),
    "extra key": (lambda f: damaged(f, WEIGHTS, lambda t: t.update(extra=np.ones(3))), "unexpected key 'extra'"),
    "missing key": (lambda f: damaged(f, WEIGHTS, lambda t: t.pop(Q)), "expected lora_A and lora_B"),
    "wrong rank": (lambda f: damaged(f, WEIGHTS, lambda t: t.update({Q: np.ones((5, 9))})), "the config's rank 6"),
    "dora": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace('"use_dora": false', '"use_dora": true')),
             "use_dora = True, expected False"),
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json does not exist"),
}


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_a_wrong_adapter_is_one_line_and_nothing_is_written(case, small, tmp_path, capsys):
    damage, words = WRONG_ADAPTERS[case]
    damage(small)
    base, out = checkpoint(tmp_path / "base", base_tensors()), tmp_path / "out"
    good = adapter(tmp_path / "good", 1)
    before = sorted(tmp_path.rglob("*"))
    for arguments in (["resize", small, "--rank", 2, "-o", out], ["compose", good, small, "-o", out],
                      ["merge", base, small, "-o", out], ["analyze", small]):
        assert words in fails(capsys, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


WRONG_BASES = {
    "missing module": (lambda t: t.pop("model.layers.0.q_proj.weight"), "has no tensor 'model.layers.0.q_proj.weight'"),
    "another shape": (lambda t: t.update({"model.layers.0.q_proj.weight": np.ones((12, 8))}), "got an update of shape (12, 9)"),
    "transposed": (lambda t: t.update({"model.layers.0.q_proj.weight": np.ones((9, 12))}), "lacks fan_in_fan_out"),
    "nan": (lambda t: t["model.layers.1.up.weight"].fill(np.nan), "NaN or infinite values"),
    "integers": (lambda t: t.update({"model.layers.0.q_proj.weight": np.ones((12, 9), np.int8)}), "quantised"),
    "overflow": (lambda t: t.update({"model.layers.0.q_proj.weight": np.full((12, 9), 65504, np.float16) + np.float16(0)}),
                 "too large for F16"),
}


@pytest.mark.parametrize("case", WRONG_BASES)
def test_a_wrong_base_is_one_line_and_nothing_is_written(case, tmp_path, capsys):
    damage, words = WRONG_BASES[case]
    tensors = base_tensors()
    damage(tensors)
    source = adapter(tmp_path / "a", r=1)
    damaged(source, WEIGHTS, lambda t: [value.__imul__(100) for value in t.values()])
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / SINGLE)
    before = sorted(tmp_path.rglob("*"))
    assert words in fails(capsys, "merge", tmp_path / "base", source, "-o", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("change", "words"), [
    (lambda m: m.update({"model.norm.weight": "../secret.safetensors"}), "in its own folder"),
    (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "in its own folder"),
    (lambda m: m.update({"model.norm.weight": "gone.safetensors"}), "gone.safetensors does not exist"),
    (lambda m: m.update({"model.other.weight": min(m.values())}), "'model.other.weight' is in no file"),
    (lambda m: m.pop("model.norm.weight"), "the index says nothing of it"),
    (lambda m: m.update({"model.norm.weight": 3}), "no weight_map"),
], ids=["outside", "absolute", "gone", "missing", "extra", "number"])
def test_a_lying_index(change, words, small, tmp_path, capsys):
    base = checkpoint(tmp_path / "base", base_tensors(), shards=2)
    index = json.loads((base / INDEX).read_text())
    change(index["weight_map"])
    (base / INDEX).write_text(json.dumps(index))
    assert words in fails(capsys, "merge", base, small, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_are_looked_at_first(small, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert "not empty" in fails(capsys, "resize", small, "--rank", 1, "-o", full)
    assert "also an input" in fails(capsys, "resize", small, "--rank", 1, "-o", small, "--force")
    assert "is a file" in fails(capsys, "resize", small, "--rank", 1, "-o", full / "notes.txt")
    assert "cannot write the result to" in fails(capsys, "resize", small, "--rank", 1, "-o", full / "notes.txt" / "deep")
    assert main(["resize", str(small), "--rank", "1", "-o", str(full), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["modules"] == 4
    assert sorted(path.name for path in full.iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]
    for name, value in (("rank", 0), ("energy", 1.5), ("energy", "nan")):
        assert f"{name} = {value}" in fails(capsys, "resize", small, f"--{name}", value, "-o", tmp_path / "new")
    assert "one finite number for each" in fails(capsys, "compose", small, "-o", tmp_path / "new", "--weights", 1, 2)
    assert 'take how = "svd"' in fails(capsys, "compose", small, "-o", tmp_path / "new", "--rank", 2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(error, small, tmp_path, monkeypatch):
    base = checkpoint(tmp_path / "base", base_tensors(), shards=2)
    old = tmp_path / "old"
    ml.resize(small, old, rank=3)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    calls, real = [], TensorWriter.add_chunks

    def broken(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        real(self, *arguments)

    monkeypatch.setattr(tensor_files.TensorWriter, "add_chunks", broken)
    for run in (lambda: ml.merge_checkpoint(base, small, tmp_path / "out"), lambda: ml.resize(small, old, rank=2, force=True)):
        calls.clear()
        with pytest.raises(type(error)):
            run()
        assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_each_other(small, tmp_path, capsys, rng):
    other = adapter(tmp_path / "other", shapes={"model.layers.0.q_proj": (12, 8)})
    assert "expected adapters of one base" in fails(capsys, "compose", small, other, "-o", tmp_path / "out")
    whole = [adapter(tmp_path / name, score={"weight": rng.standard_normal((2, 3))}) for name in "ab"]
    assert "cannot be added without their base" in fails(capsys, "compose", *whole, "-o", tmp_path / "out")
    turned = adapter(tmp_path / "turned", options={"fan_in_fan_out": True})
    assert "fan_in_fan_out" in fails(capsys, "compose", small, turned, "-o", tmp_path / "out")


def test_extract_refuses(tmp_path, capsys):
    tensors = base_tensors()
    base, same = checkpoint(tmp_path / "base", tensors), checkpoint(tmp_path / "same", tensors)
    short = checkpoint(tmp_path / "short", {key: value for key, value in tensors.items() if "tall" not in key})
    for tuned, more, words in ((same, [], "no target differs"), (short, [], "model.tall.weight is in"),
                               (same, ["--target-modules", "k_proj"], "are not in")):
        assert words in fails(capsys, "extract", base, tuned, "--rank", 1, "-o", tmp_path / "out", *more)
    assert "expected the folder of a model" in fails(capsys, "extract", base, tmp_path, "--rank", 1, "-o", tmp_path / "out")


def test_analyze_draws(small, tmp_path, capsys):
    assert main(["analyze", str(small), "--figure", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG" and "q_proj" in capsys.readouterr().out
    assert "ends in .png" in fails(capsys, "analyze", small, "--figure", tmp_path / "map.pdf")
