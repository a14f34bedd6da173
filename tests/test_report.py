"""The report on an adapter, against a dense SVD of every update and the base's own weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

import minilora as ml
from minilora.backend import device_of, to_host
from minilora.lora import LoraConfig, adapters_of, add_adapter, count_parameters, disable_adapter, merge_adapter, set_scale
from minilora.lora.files import save_adapter
from minilora.nn import Transformer, TransformerConfig
from minilora.pretrained import load_pretrained, save_pretrained
from minilora.rank import measures
from minilora.rank.report import analyze

V, D, F, L = 13, 8, 12, 2
TARGETS = {"gpt2": ["qkv_proj", "up_proj", "embed"], "bert": ["q_proj", "down_proj", "embed"],
           "llama": ["v_proj", "up_proj", "head"]}
forms = pytest.mark.parametrize("form", TARGETS)


def build(form="gpt2", dtype="float64", seed=0, **fields):
    sizes = {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": 2, "d_ff": F, "max_len": 8}
    return Transformer(getattr(TransformerConfig, form)(**sizes | fields), seed=seed, dtype=dtype)


def add(model, targets, name="default", **fields):
    add_adapter(model, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets} | fields), name)
    rng = np.random.default_rng(4)
    for adapter in adapters_of(model, name).values():
        for _, p in adapter.named_parameters():
            p.data[...] = device_of(p.data).put(rng.standard_normal(p.shape).astype(p.dtype))
    return model


def update_of(model, path, name="default"):
    """(ΔW, W) of one module, dense, from the adapter's own parameters."""
    adapter, layer = adapters_of(model, name)[path], model.get_module(path)
    arrays = {key.rpartition("_")[2]: to_host(p.data) for key, p in adapter.named_parameters()}
    change = adapter.scale * arrays["B"] @ arrays["A"]
    return change.T if path == "embed" else change, to_host(layer.weight.data)


def by_hand(change, W):
    """relative_norm and amplification by a dense SVD."""
    U, S, Vh = np.linalg.svd(change)
    q = int((1e-10 * S[0] < S).sum())
    size = np.linalg.norm(change)
    return size / np.linalg.norm(W), size / np.linalg.norm(U[:, :q].T @ W @ Vh[:q].T)


@forms
@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_every_number_is_that_of_the_dense_update(device, form, scale):
    model = add(build(form, n_kv_heads=1), TARGETS[form], rank_pattern={"up_proj": 2})
    set_scale(model, "default", scale)
    report = analyze(model).to_dict()["modules"]
    assert list(report) == list(adapters_of(model))
    for path, row in report.items():
        change, W = update_of(model, path)
        S = np.linalg.svd(change, compute_uv=False)[: row["rank"]]
        assert_allclose(row["singular_values"], S, rtol=1e-12, atol=1e-12)
        expected = measures(S)
        for key in expected:
            assert_allclose(row[key], expected[key], rtol=1e-11, atol=1e-12)
        assert row["rank"] == (2 if path.endswith("up_proj") else 3)
        assert row["scale"] == scale * 5 / row["rank"]
        assert row["shape"] == list(W.shape)
        assert_allclose([row["relative_norm"], row["amplification"]], by_hand(change, W), rtol=1e-10)


def test_the_summary_adds_up():
    model = add(build("llama"), ["q_proj", "up_proj"])
    found = analyze(model).to_dict()
    rows, summary = list(found["modules"].values()), found["summary"]
    whole = np.concatenate([update_of(model, path)[0].ravel() for path in found["modules"]])
    assert summary["modules"] == 2 * L == len(rows)
    assert summary["parameters"] == count_parameters(model)["trainable"] == L * 3 * ((D + D) + (D + F))
    assert_allclose(summary["frobenius_norm"], np.linalg.norm(whole), rtol=1e-12)
    for key in ("rank", "effective_rank", "stable_rank", "energy_rank_90", "relative_norm", "amplification"):
        assert_allclose(summary[f"mean_{key}"], np.mean([row[key] for row in rows]), rtol=1e-14)


@forms
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_report_is_ready_for_json(device, form, dtype):
    found = analyze(add(build(form, dtype), TARGETS[form])).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"modules", "summary", "left_out"}


def test_float32_factors_give_the_same_report_to_their_precision():
    single, double = add(build("llama", "float32"), TARGETS["llama"]), add(build("llama"), TARGETS["llama"])
    for one, two in zip(analyze(single).modules.values(), analyze(double).modules.values(), strict=True):
        for key in ("singular_values", "effective_rank", "stable_rank", "relative_norm", "amplification"):
            assert_allclose(one[key], two[key], rtol=2e-5)


def test_another_model_may_serve_as_the_base():
    model, base = add(build("llama"), ["up_proj"]), build("llama", seed=9)
    for path, row in analyze(model, base=base).modules.items():
        change = update_of(model, path)[0]
        assert_allclose([row["relative_norm"], row["amplification"]],
                        by_hand(change, base.get_module(path).weight.data), rtol=1e-10)


@forms
def test_a_merged_model_is_compared_with_its_plain_base_and_left_merged(device, form):
    model = add(build(form), TARGETS[form])
    before = analyze(model).to_dict()
    merge_adapter(model)
    state = model.state_dict()
    assert analyze(model).to_dict() == before
    assert all(np.array_equal(value, state[path]) for path, value in model.state_dict().items())
    with disable_adapter(model):
        assert analyze(model).to_dict() == before


def test_each_adapter_has_its_own_report():
    model = add(add(build("llama"), ["q_proj"], "a"), ["up_proj", "down_proj"], "b", r=2)
    assert set(analyze(model, name="a").modules) == {f"layers.{i}.attn.q_proj" for i in range(L)}
    assert {row["rank"] for row in analyze(model, name="b").modules.values()} == {2}
    with pytest.raises(KeyError, match="no adapter 'default' on this model: it has a, b"):
        analyze(model)


# --- special updates ------------------------------------------------------------------------------


def test_a_new_adapter_is_zero_and_has_no_amplification():
    model = build("llama")
    add_adapter(model, LoraConfig(r=2, target_modules=["up_proj"]))
    report = analyze(model)
    for row in report.modules.values():
        assert row["singular_values"] == [0.0, 0.0] and row["effective_rank"] == 0.0 == row["relative_norm"]
        assert row["amplification"] is None
    assert "mean_amplification" not in report.summary() and report.summary()["mean_relative_norm"] == 0.0
    assert str(report).splitlines()[1].split()[-4] == "-"


def test_an_update_of_lower_rank_is_compared_in_its_own_directions_only():
    model = add(build("llama"), ["up_proj"], r=4)
    for adapter in adapters_of(model).values():
        adapter.lora_B.data[:, 2:] = 0.0
    for path, row in analyze(model).modules.items():
        assert_allclose(row["singular_values"][2:], 0.0, atol=1e-12)
        assert_allclose(row["amplification"], by_hand(*update_of(model, path))[1], rtol=1e-9)


def test_the_amplification_of_a_known_update():
    """W = diag(3, 4) padded, ΔW = 2 e₁e₁ᵀ: ‖ΔW‖ = 2, W does 3 in that direction, so 2/3; ‖W‖ = 5, so 2/5."""
    model = add(build("llama"), ["up_proj"], r=1, lora_alpha=1)
    for path, adapter in adapters_of(model).items():
        W = model.get_module(path).weight.data
        W[...] = 0.0
        W[0, 0], W[1, 1] = 3.0, 4.0
        adapter.lora_A.data[...], adapter.lora_B.data[...] = 0.0, 0.0
        adapter.lora_A.data[0, 0], adapter.lora_B.data[0, 0] = 1.0, 2.0
    for row in analyze(model).modules.values():
        assert_allclose([row["relative_norm"], row["amplification"], row["frobenius_norm"]], [2 / 5, 2 / 3, 2.0], rtol=1e-14)
    for path in adapters_of(model):
        model.get_module(path).weight.data[0, 0] = 0.0     # now W does nothing in that direction
    assert {row["amplification"] for row in analyze(model).modules.values()} == {None}


# --- what is refused, what is left out --------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_refused(device, bad):
    model = add(build("llama"), ["up_proj"])
    list(adapters_of(model).values())[-1].lora_B.data[...] = bad
    with pytest.raises(ValueError, match="got NaN or infinite values, expected finite numbers"):
        analyze(model)


def test_a_layer_that_was_trained_whole_is_left_out_and_said_so():
    model = add(build("bert", n_labels=3), ["q_proj"])
    report = analyze(model)
    assert "classifier" not in report.modules
    assert report.to_dict()["left_out"] == {"classifier": "a Replacement, whose update is no product s·B@A"}
    assert str(report).splitlines()[-1] == "left out: classifier, a Replacement, whose update is no product s·B@A"


def test_a_base_that_does_not_fit_is_refused():
    model = add(build("llama"), ["up_proj"])
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: got an update of shape \(12, 8\), expected .* \(20, 8\)"):
        analyze(model, base=build("llama", d_ff=20))
    with pytest.raises(KeyError, match=r"the base has no module 'layers\.1\.mlp\.up_proj'"):
        analyze(model, base=build("llama", n_layers=1))
    with pytest.raises(TypeError, match="base: got dict, expected a Transformer"):
        analyze(model, base={})


# --- text -----------------------------------------------------------------------------------------


def test_the_table_lines_up_and_fits_a_terminal():
    text = str(analyze(add(build("llama", "float32"), "all-linear")))
    head, *rows, ending = text.splitlines()
    assert len(rows) == 7 * L
    assert {len(line) for line in (head, *rows)} == {len(head)} and len(head) <= 110
    assert head.split()[0] == "module" and "‖ΔW‖/‖W‖" in head and "amplif." in head
    assert all(row.split()[1] in ("8×8", "12×8", "8×12") for row in rows)
    assert ending.startswith(f"{7 * L} modules, ") and "mean effective rank" in ending


def test_a_table_without_a_base_has_no_columns_for_it(tmp_path):
    save_adapter(add(build("llama"), ["up_proj"]), tmp_path)
    assert "amplif." not in str(analyze(tmp_path))


# --- a directory ----------------------------------------------------------------------------------

FILES = {
    "gpt2": {"layers.{}.attn.qkv_proj": "transformer.h.{}.attn.c_attn", "layers.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc",
             "embed": "transformer.wte"},
    "bert": {"layers.{}.attn.q_proj": "bert.encoder.layer.{}.attention.self.query",
             "layers.{}.mlp.down_proj": "bert.encoder.layer.{}.output.dense", "embed": "bert.embeddings.word_embeddings"},
    "llama": {"layers.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
              "layers.{}.mlp.up_proj": "model.layers.{}.mlp.up_proj", "head": "lm_head"},
}


@forms
def test_a_directory_gives_the_models_report_under_the_files_names(tmp_path, form):
    model = add(build(form), TARGETS[form], rank_pattern={"up_proj": 2})
    save_adapter(model, tmp_path)
    ours, alone, based = analyze(model).modules, analyze(tmp_path).modules, analyze(str(tmp_path), base=build(form)).modules
    names = {path.format(i): file.format(i) for path, file in FILES[form].items() for i in range(L)}
    assert set(alone) == set(based) == set(names.values())
    for path, row in ours.items():
        assert alone[names[path]].keys() == row.keys() - {"relative_norm", "amplification"}
        for key, value in row.items():
            assert_allclose(based[names[path]][key], value, rtol=1e-12, atol=1e-12)
            if key in alone[names[path]]:
                assert_allclose(alone[names[path]][key], value, rtol=1e-12, atol=1e-12)


def test_a_classifier_in_a_directory_is_left_out(tmp_path):
    save_adapter(add(build("bert", n_labels=3), ["q_proj"]), tmp_path)
    assert analyze(tmp_path).left_out == {"classifier": "saved whole"}


def test_a_directory_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="does not exist: expected a folder with"):
        analyze("no/such/folder")


# --- a base on disk ---------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_base_on_disk_gives_the_models_report_under_the_files_names(tmp_path, form, dtype):
    """GPT-2's weights lie (in, out) in its files, and Llama's head may be tied: the report is that of the model in memory."""
    head = {"n_labels": 3} if form == "bert" else {}       # transformers has no BERT with a language model's head of our kind
    model = add(build(form, **head), TARGETS[form], rank_pattern={"up_proj": 2})
    save_pretrained(build(form, **head), None, tmp_path / "base", dtype=dtype)
    save_adapter(model, tmp_path / "adapter")
    stored = load_pretrained(tmp_path / "base", dtype="float64")[0]
    ours = analyze(model, base=stored).modules
    theirs = ml.analyze(tmp_path / "adapter", base=str(tmp_path / "base")).modules
    names = {path.format(i): file.format(i) for path, file in FILES[form].items() for i in range(L)}
    assert theirs.keys() == {names[path] for path in ours}
    for path, row in ours.items():
        assert {"relative_norm", "amplification", "intruder_count", "intruder_cosines", "projection_top"} < row.keys()
        assert theirs[names[path]].keys() == row.keys()
        for key, value in row.items():
            assert_allclose(theirs[names[path]][key], value, rtol=1e-6, atol=1e-6, err_msg=f"{path} {key}")


def test_what_a_base_adds_is_that_of_dense_svds(device):
    model, base = add(build("llama"), TARGETS["llama"], lora_alpha=30), build("llama", seed=5)
    report = analyze(model, base=base)
    for path, row in report.modules.items():
        change, W = update_of(model, path)[0], to_host(base.get_module(path).weight.data)
        u0, s0, _ = np.linalg.svd(W, full_matrices=False)
        u, _, _ = np.linalg.svd(W + change, full_matrices=False)
        C = np.abs(u.T @ u0)
        assert_allclose(row["intruder_cosines"], C[:10].max(axis=1), atol=1e-8)
        assert row["intruder_count"] == (C[:10].max(axis=1) < 0.5).sum()
        assert_allclose(np.cos(row["rotation"]), C[:, :10].max(axis=0), atol=1e-8)
        U, _, Vh = np.linalg.svd(change, full_matrices=False)
        assert_allclose([row["base_norm"], row["projection"], row["projection_top"], row["projection_random"]],
                        [np.linalg.norm(W), np.linalg.norm(U[:, :3].T @ W @ Vh[:3].T), np.linalg.norm(s0[:3]),
                         np.linalg.norm(W) * 3 / W.size**0.5], rtol=1e-9)
    assert sum(row["intruder_count"] for row in report.modules.values()) > 0
    found = report.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "intruders" in str(report).splitlines()[0] and found["summary"]["mean_intruder_count"] > 0
    plain = analyze(model, base=base, intruders=False).modules
    assert not any("intruder_count" in row for row in plain.values())
    assert all("intruder_count" in row for row in analyze(model, intruders=True).modules.values())


def test_a_base_on_disk_with_a_tied_head(tmp_path):
    model = add(build("llama", tie_embeddings=True), ["up_proj"])
    save_pretrained(build("llama", tie_embeddings=True), None, tmp_path / "base", dtype="float64")
    save_adapter(model, tmp_path / "adapter")
    for path, row in analyze(tmp_path / "adapter", base=build("llama", tie_embeddings=True)).modules.items():
        found = ml.analyze(tmp_path / "adapter", tmp_path / "base").modules[path]
        assert_allclose(found["amplification"], row["amplification"], rtol=1e-12)


def test_a_base_on_disk_that_does_not_fit(tmp_path):
    save_adapter(add(build("llama"), ["up_proj"]), tmp_path / "adapter")
    for name, fields in (("wide", {"d_ff": 20}), ("short", {"n_layers": 1})):
        save_pretrained(build("llama", **fields), None, tmp_path / name)
        with pytest.raises(ValueError, match=r"of shape \(12, 8\), expected \(20, 8\)|has no tensor 'model\.layers\.1"):
            ml.analyze(tmp_path / "adapter", tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        ml.analyze(tmp_path / "adapter", tmp_path)


def test_a_model_takes_a_base_from_disk(tmp_path):
    model = add(build("llama"), ["up_proj"])
    save_pretrained(build("llama", seed=3), None, tmp_path / "base", dtype="float64")
    base = load_pretrained(tmp_path / "base")[0]
    assert ml.analyze(model, tmp_path / "base").to_dict() == ml.analyze(model, base).to_dict()


def test_modules_of_a_directory_come_layer_by_layer(tmp_path):
    save_adapter(add(build("llama", n_layers=11), ["up_proj", "q_proj"]), tmp_path)
    layers = [int(name.split(".")[2]) for name in analyze(tmp_path).modules]
    assert layers == sorted(layers) and layers[-1] == 10
