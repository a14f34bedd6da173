"""Adapter files without PyTorch: there and back, and what happens to files that are wrong. (PEFT's own are in parity/.)"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

from minilora.backend import to_host
from minilora.lora import (
    LoraConfig,
    adapter_names,
    adapters_of,
    add_adapter,
    delete_adapter,
    disable_adapter,
    merge_adapter,
    register,
    set_scale,
)
from minilora.lora.files import load_adapter, read_adapter, save_adapter, write_adapter
from minilora.lora.layer import METHODS
from minilora.lora.lora import LoRA
from minilora.lora.peft_format import CONFIG, NOTES, WEIGHTS, read_safetensors
from minilora.nn import Linear, Transformer, TransformerConfig
from minilora.nn.names import export_state, import_state

SIZES = {"vocab_size": 23, "d_model": 12, "n_layers": 2, "n_heads": 3, "d_ff": 20, "max_len": 9}
FORMS = {
    "gpt2": TransformerConfig.gpt2(**SIZES),
    "bert": TransformerConfig.bert(**SIZES, n_labels=3),
    "llama": TransformerConfig.llama(**SIZES | {"n_kv_heads": 1}),
    "untyped": TransformerConfig(**SIZES),
    "untyped-token": TransformerConfig(**SIZES, n_labels=2, head="token"),
}
IDS = np.arange(12).reshape(2, 6)


def adapted_model(cfg=FORMS["llama"], name="default", seed=1, dtype="float32", **options):
    """A model with an adapter whose update is not zero."""
    model = Transformer(cfg, dtype=dtype)
    add_adapter(model, LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False} | options), name, seed=seed)
    return model.eval()


def fresh(cfg=FORMS["llama"], dtype="float32"):
    return Transformer(cfg, dtype=dtype).eval()


def state_of(model):
    """Everything that a failed load must leave alone."""
    return adapter_names(model), [(path, p.requires_grad, p.data.tobytes()) for path, p in model.named_parameters()]


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    """A good adapter for FORMS["llama"], on q_proj and down_proj."""
    save_adapter(adapted_model(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}), tmp_path / "adapter")
    return tmp_path / "adapter"


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [
    {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "v_proj", "embed"]}, {"target_modules": ["qkv_proj"]},
    {"target_modules": None, "use_rslora": True, "lora_alpha": 0.1}, {"target_modules": r".*\.1\..*(k_proj|o_proj|up_proj)"},
    {"target_modules": ["k_proj", "down_proj"], "rank_pattern": {"1.mlp.down_proj": 1}, "alpha_pattern": {"k_proj": 7},
     "lora_dropout": 0.25}], ids=str)
def test_there_and_back(form, options, device, tmp_path):
    model = adapted_model(FORMS[form], **options)
    save_adapter(model, tmp_path)
    again = fresh(FORMS[form])
    load_adapter(again, tmp_path)
    np.testing.assert_allclose(to_host(again(IDS)), to_host(model(IDS)), rtol=1e-5, atol=1e-7)
    assert {a.dropout for a in adapters_of(again).values() if a.dropout} == ({0.25} if "lora_dropout" in options else set())

    save_adapter(again, tmp_path / "again")                # from the second save on, the same bytes
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == \
        json.loads((tmp_path / CONFIG).read_text()) | {"init_lora_weights": True}
    assert set(os.listdir(tmp_path)) - {NOTES} == {CONFIG, WEIGHTS, "again"}


@pytest.mark.parametrize("form", ["llama", "bert", "untyped"])
def test_scales_and_values_are_exact(form, tmp_path):
    """Where no module is packed differently in the files, every number comes back as it was."""
    model = adapted_model(FORMS[form], dtype="float64", target_modules="all-linear", r=3, lora_alpha=0.1, use_rslora=True,
                          alpha_pattern={"o_proj": 1e-3, "up_proj": 16})
    save_adapter(model, tmp_path)
    again = fresh(FORMS[form], "float64")
    load_adapter(again, tmp_path, "other")
    ours, theirs = adapters_of(model), adapters_of(again, "other")
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert getattr(ours[path], "scale", None) == getattr(theirs[path], "scale", None)
        for (_, a), (_, b) in zip(ours[path].named_parameters(), theirs[path].named_parameters(), strict=True):
            np.testing.assert_array_equal(a.data, b.data)
            assert b.requires_grad


def test_files_speak_the_ecosystems_names(tmp_path):
    save_adapter(adapted_model(FORMS["gpt2"], target_modules=["q_proj", "v_proj", "o_proj"]), tmp_path, base_model="gpt2")
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    shapes = {"c_attn.lora_A": (6, 12), "c_attn.lora_B": (36, 6), "c_proj.lora_A": (3, 12), "c_proj.lora_B": (12, 3)}
    assert {key: value.shape for key, value in tensors.items()} == {
        f"base_model.model.transformer.h.{i}.attn.{part}.weight": shape for i in (0, 1) for part, shape in shapes.items()}
    B = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].reshape(3, 12, 2, 3)
    assert B.any(axis=(1, 3)).tolist() == [[True, False], [False, False], [False, True]]        # of q, k, v: q and v only
    assert (tmp_path / NOTES).read_text().splitlines() == [
        f"transformer.h.{i}.attn.c_attn is layers.{i}.attn.q_proj, layers.{i}.attn.v_proj, each on its own rows"
        for i in (0, 1)]
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] == "gpt2"
    assert config["fan_in_fan_out"] is True and config["inference_mode"] is True and "module_names" not in config
    assert config["target_modules"] == [f"transformer.h.{i}.attn.{m}" for i in (0, 1) for m in ("c_attn", "c_proj")]
    assert (config["r"], config["rank_pattern"]) in [(6, {f"transformer.h.{i}.attn.c_proj": 3 for i in (0, 1)}),
                                                     (3, {f"transformer.h.{i}.attn.c_attn": 6 for i in (0, 1)})]


def test_a_module_that_is_one_in_both_is_saved_as_it_is(tmp_path):
    save_adapter(adapted_model(FORMS["gpt2"], target_modules=["q_proj"]), tmp_path)
    model = adapted_model(FORMS["gpt2"], target_modules=["qkv_proj"])
    save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]   # the note of the old one is gone
    with safe_open(tmp_path / WEIGHTS, "numpy") as file:
        for i in (0, 1):
            adapter = adapters_of(model)[f"layers.{i}.attn.qkv_proj"]
            for leaf in ("lora_A", "lora_B"):
                key = f"base_model.model.transformer.h.{i}.attn.c_attn.{leaf}.weight"
                np.testing.assert_array_equal(file.get_tensor(key), to_host(getattr(adapter, leaf)))


def test_an_untyped_model_says_whose_names_it_uses(tmp_path):
    save_adapter(adapted_model(FORMS["untyped"], target_modules=["q_proj"]), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["module_names"] == "minilora"
    assert "base_model.model.layers.0.attn.q_proj.lora_A.weight" in load_file(tmp_path / WEIGHTS)
    typed = fresh(FORMS["gpt2"])                           # the same shape with GPT-2's names: our paths are its paths too
    load_adapter(typed, tmp_path)
    assert set(adapters_of(typed)) == {"layers.0.attn.q_proj", "layers.1.attn.q_proj"}


@pytest.mark.parametrize("strength", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("form", ["gpt2", "bert"])
def test_strength_is_folded_in(strength, form, tmp_path):
    model = adapted_model(FORMS[form], dtype="float64", target_modules=["q_proj", "v_proj", "up_proj", "embed"],
                          rank_pattern={"v_proj": 1})
    for path, adapter in adapters_of(model).items():
        if path == "classifier":
            adapter.weight.data += 0.5
            adapter.bias.data += 0.25
    set_scale(model, "default", strength)
    expected = model(IDS).data
    merge_adapter(model)                                   # saving does not depend on whether the adapter is merged
    save_adapter(model, tmp_path)
    again = fresh(FORMS[form], "float64")
    load_adapter(again, tmp_path)
    np.testing.assert_allclose(again(IDS).data, expected, rtol=1e-10, atol=1e-14)
    assert {adapter.strength for adapter in adapters_of(again).values()} == {1.0}


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_tables_saved_whole(form, strength, device, tmp_path):
    """modules_to_save of an embedding table: trained, saved, loaded, merged; a tied head keeps the base's table."""
    model = adapted_model(FORMS[form], target_modules=["o_proj"], modules_to_save=["embed"])
    base = to_host(model.embed.weight).copy()
    table = adapters_of(model)["embed"].weight
    table.data += 0.5
    set_scale(model, "default", strength)
    y = model(IDS)
    y.backward(to_host(y))
    assert to_host(table.grad)[IDS].any() and not to_host(table.grad)[12:].any() and model.embed.weight.grad is None
    save_adapter(model, tmp_path)
    np.testing.assert_allclose(read_adapter(tmp_path)[1][
        {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}[form]]["weight"], base + 0.5 * strength, rtol=1e-6)
    again = fresh(FORMS[form])
    load_adapter(again, tmp_path)
    np.testing.assert_allclose(to_host(again(IDS)), to_host(y), rtol=1e-5, atol=1e-6)
    merge_adapter(again)
    np.testing.assert_allclose(to_host(again(IDS)), to_host(y), rtol=1e-5, atol=1e-6)


def test_names_and_sub_directories(tmp_path):
    model = adapted_model(target_modules=["q_proj"])
    add_adapter(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), "other", seed=5)
    for name in ("default", "other"):
        save_adapter(model, tmp_path, name)
    assert (tmp_path / CONFIG).exists() and (tmp_path / "other" / CONFIG).exists()
    again = fresh()
    for name in ("default", "other"):
        load_adapter(again, tmp_path, name)
    load_adapter(again, tmp_path / "other", "third")       # the folder itself, where there is no sub-directory of the name
    assert [sorted({p.rpartition(".")[2] for p in adapters_of(again, n)}) for n in ("default", "other", "third")] == \
        [["q_proj"], ["v_proj"], ["v_proj"]]
    assert again.adapter_configs["third"].target_modules == ["v_proj"]


def test_reading_needs_no_model(folder):
    model = adapted_model(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    config, modules = read_adapter(folder)
    assert config["bias"] == "none" and config["layer_replication"] is None
    assert modules.keys() == {f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}
    for i in (0, 1):
        for ours, theirs, r in (("attn.q_proj", "self_attn.q_proj", 3), ("mlp.down_proj", "mlp.down_proj", 2)):
            adapter, entry = adapters_of(model)[f"layers.{i}.{ours}"], modules[f"model.layers.{i}.{theirs}"]
            np.testing.assert_array_equal(entry["A"], adapter.lora_A.data)
            np.testing.assert_array_equal(entry["B"], adapter.lora_B.data)
            assert entry["scale"] == 5 / r and entry["embedding"] is False


def test_an_embeddings_update_lies_like_its_table(tmp_path):
    """s·B@A is the update of the table (V, D), whatever the layout of the file."""
    model = adapted_model(dtype="float64", target_modules=["embed"])
    save_adapter(model, tmp_path)
    entry = read_adapter(tmp_path)[1]["model.embed_tokens"]
    merged, table = adapters_of(model)["embed"].adapted_weight(model.embed.weight).data, model.embed.weight.data
    np.testing.assert_allclose(entry["scale"] * entry["B"] @ entry["A"], merged - table, atol=1e-15)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (3, 23)


def test_a_minimal_config_means_pefts_defaults(folder):
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], "alpha_pattern": None,
                                             "r": None, "some_day": {"a": 1}}))
    rng = np.random.default_rng(0)
    save_file({f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{m}.weight": rng.standard_normal(shape)
               for i in (0, 1) for m, shape in (("A", (8, 12)), ("B", (12, 8)))}, folder / WEIGHTS)
    model = fresh()
    load_adapter(model, folder)
    adapter = adapters_of(model)["layers.0.attn.q_proj"]
    assert adapter.scale == 1.0 and adapter.lora_A.shape == (8, 12) and adapter.lora_A.dtype == np.float32


def test_targets_that_the_model_lacks_do_no_harm_beside_others(folder):
    """PEFT's configs list names for many architectures; what counts is that every tensor has its module and vice versa."""
    edit_config(folder, target_modules=["q_proj", "down_proj", "query", "c_attn"], modules_to_save=["score", "classifier"])
    model = fresh()
    load_adapter(model, folder)
    assert len(adapters_of(model)) == 4


@pytest.mark.parametrize("changes", [
    {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "up_proj", "k_proj", "v_proj", "o_proj"]},
    {"target_modules": r".*\.(q|down)_proj"},
    {"target_modules": ["q_proj", "down_proj", "o_proj"], "exclude_modules": r".*o_proj"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}], ids=str)
def test_other_ways_to_say_the_targets(changes, folder):
    edit_config(folder, **changes)
    model = fresh()
    load_adapter(model, folder)
    assert len(adapters_of(model)) == 4


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_write_then_read(data):
    """write_adapter and read_adapter are inverse, for any modules, ranks, dtypes and scales."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    use_rslora, modules = data.draw(st.booleans()), {}
    for i in range(data.draw(st.integers(1, 4))):
        r, out, d_in = (data.draw(st.integers(1, 5)) for _ in range(3))
        dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
        A, B = rng.standard_normal((r, d_in)).astype(dtype), rng.standard_normal((out, r)).astype(dtype)
        alpha = data.draw(st.floats(-100, 100).map(lambda a: float(f"{a:.9g}")))
        modules[f"a.{i}.b"] = {"A": A, "B": B, "scale": alpha / (r**0.5 if use_rslora else r),
                               "embedding": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        modules["head"] = {"weight": rng.standard_normal((2, 3)), "bias": rng.standard_normal(2)}
    with tempfile.TemporaryDirectory() as directory:
        write_adapter(Path(directory) / "new", {"use_rslora": use_rslora, "lora_dropout": 0.5}, modules)
        config, again = read_adapter(Path(directory) / "new")
    assert config["lora_dropout"] == 0.5 and again.keys() == modules.keys()
    for path, entry in modules.items():
        assert again[path].keys() == entry.keys()
        for key, value in entry.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(again[path][key], value)
                assert again[path][key].dtype == value.dtype
            else:
                assert again[path][key] == value


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_names_there_and_back(form):
    cfg = FORMS[form]
    model = fresh(cfg)
    exported = export_state(cfg, model.state_dict())
    again = import_state(cfg, exported)
    assert again.keys() == model.state_dict().keys()
    for path, value in model.state_dict().items():
        np.testing.assert_array_equal(again[path], value)
    assert ("transformer.h.1.attn.c_attn.weight" in exported) == (form == "gpt2")
    adapted = adapted_model(cfg, target_modules=["q_proj"])
    if cfg.model_type:
        with pytest.raises(ValueError, match=rf"lora_[AB] has no name in the files of {cfg.model_type} models"):
            export_state(cfg, adapted.state_dict())


# --------------------------------------------------------------------------------------------------- files that are wrong

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def drop(key):
    return lambda folder: edit_tensors(folder, lambda t: t.pop(key))


def put(key, value):
    return lambda folder: edit_tensors(folder, lambda t: t.update({key: np.asarray(value, np.float32)}))


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def text(content):
    return lambda folder: (folder / CONFIG).write_text(content)


def raw(content):
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


WRONG = {
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "adapter_config.json does not exist"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "adapter_model.safetensors does not exist"),
    "broken json": (text('{"peft_type": "LORA", '), ValueError, "not JSON"),
    "json too deep": (text("[" * 100_000), ValueError, "not JSON"),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), ValueError, "not JSON"),
    "a list": (text("[]"), ValueError, "peft_type is 'list'"),
    "another method": (config(peft_type="OFT"), ValueError, "peft_type is 'OFT', expected \"LORA\""),
    "a method with other keys": (config(peft_type="IA3"), ValueError, r"lacks .*\.0\.mlp\.down_proj\.ia3_l"),
    "dora": (config(use_dora=True), ValueError, "lacks .*lora_magnitude_vector"),
    "bias": (config(bias="q_only"), ValueError, "bias = 'q_only', expected 'none'"),
    "lora_bias": (config(lora_bias=True), ValueError, r"lacks .*\.lora_B\.bias"),
    "lora_bias as text": (config(lora_bias="yes", bias="all"), ValueError, "lora_bias = 'yes'"),
    "a bias with pissa": (config(bias="all", init_lora_weights="pissa"), ValueError, "goes with a base that this init changed"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), ValueError, "goes with a base that this init changed"),
    "rank is text": (config(r="8"), ValueError, "rank r = '8'"),
    "rank is 0": (config(r=0), ValueError, "rank r = 0"),
    "rank is a float": (config(rank_pattern={"q_proj": 2.5}), ValueError, "rank q_proj = 2.5"),
    "alpha is text": (config(lora_alpha="8"), ValueError, "lora_alpha = '8', expected a number"),
    "alpha is infinite": (text('{"peft_type": "LORA", "lora_alpha": 1e999}'), ValueError, "lora_alpha = inf"),
    "dropout": (config(lora_dropout=1.5), ValueError, "lora_dropout = 1.5"),
    "patterns are a list": (config(rank_pattern=["q_proj"]), ValueError, "rank_pattern"),
    "alpha pattern": (config(alpha_pattern={"q_proj": None}), ValueError, "alpha_pattern"),
    "pattern is no regex": (config(alpha_pattern={"(": 1}), ValueError, "not a regular expression"),
    "pattern has late flags": (config(alpha_pattern={"(?i)q": 1}), ValueError, "not a regular expression"),
    "target is no regex": (config(target_modules="*"), ValueError, "not a regular expression"),
    "targets are numbers": (config(target_modules=[1]), ValueError, "target_modules"),
    "rslora is a number": (config(use_rslora=1), ValueError, "use_rslora"),
    "layers": (config(layers_to_transform="0"), ValueError, "layers_to_transform"),
    "empty file": (raw(b""), ValueError, "not a whole safetensors file"),
    "a pickle": (raw(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94."), ValueError, "not a whole safetensors file"),
    "no tensors": (raw(save({})), ValueError, "holds no tensors"),
    "half a file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]), ValueError, "not a whole"),
    "a longer file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x"), ValueError, "not a whole"),
    "a lying shape": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes().replace(b"[12,3]", b"[13,3]")), ValueError,
                      "not a whole safetensors file"),
    "a lying header": (raw(b"\xff" * 8 + b"{}"), ValueError, "not a whole safetensors file"),
    "integers": (lambda f: edit_tensors(f, lambda t: t.update({f"{Q0}.lora_A.weight": np.zeros((3, 12), np.int64)})),
                 ValueError, "has dtype I64, expected one of F64, F32, F16, BF16"),
    "nan": (put(f"{Q0}.lora_A.weight", np.full((3, 12), np.nan)), ValueError, "NaN or infinite"),
    "inf": (put(f"{Q0}.lora_B.weight", np.full((12, 3), np.inf)), ValueError, "NaN or infinite"),
    "wrong input width": (put(f"{Q0}.lora_A.weight", np.zeros((3, 13))), ValueError, "to fit this model"),
    "wrong output width": (put(f"{Q0}.lora_B.weight", np.zeros((11, 3))), ValueError, "to fit this model"),
    "not the config's rank": (put(f"{Q0}.lora_A.weight", np.zeros((2, 12))), ValueError, "the config's rank 3"),
    "config of another rank": (config(r=4), ValueError, "the config's rank 4"),
    "a vector": (put(f"{Q0}.lora_A.weight", np.zeros(3)), ValueError, "the config's rank 3"),
    "lora_B missing": (drop(f"{Q0}.lora_B.weight"), ValueError, "expected lora_A and lora_B"),
    "a module missing": (lambda f: edit_tensors(f, lambda t: [t.pop(f"{Q0}.lora_{m}.weight") for m in "AB"]), ValueError,
                         "lacks tensors of modules that its config names: model.layers.0.self_attn.q_proj"),
    "modules missing": (config(target_modules=["q_proj", "k_proj", "v_proj", "down_proj"]), ValueError, "and 1 more"),
    "a layer too many": (lambda f: edit_tensors(f, lambda t: t.update(
                             {k.replace("layers.0", "layers.7"): v for k, v in t.items() if "down_proj" in k})),
                         ValueError, r"has tensors of modules that this model does not have: model.layers.7.mlp.down_proj"),
    "not targeted": (config(target_modules=["q_proj"]), ValueError, "its config does not target: model.layers.0.mlp.down_proj"),
    "targets of another model": (config(target_modules=["c_attn"]), ValueError, r"\['c_attn'\] are not in this model"),
    "no targets": (config(target_modules=[]), ValueError, "are not in this model"),
    "no prefix": (put("model.layers.0.self_attn.q_proj.lora_A.weight", np.zeros((3, 12))), ValueError, "unexpected key"),
    "dora's magnitude": (put(f"{Q0}.lora_magnitude_vector", np.zeros(12)), ValueError, "unexpected key"),
    "an adapter's name in the key": (put(f"{Q0}.lora_A.default.weight", np.zeros((3, 12))), ValueError, "does not have"),
    "saved whole, not said": (put("base_model.model.lm_head.weight", np.zeros((23, 12))), ValueError, "brings its own base"),
    "said, not saved whole": (config(modules_to_save=["lm_head"]), ValueError, "lacks tensors of modules .* lm_head"),
    "a table of another size": (lambda f: (edit_config(f, modules_to_save=["embed_tokens"]), edit_tensors(f, lambda t: t.update(
        {"base_model.model.model.embed_tokens.weight": np.zeros((24, 12))}))), ValueError, "to fit this model"),
    "a table's keys on a layer": (lambda f: edit_tensors(f, lambda t: t.update(
        {f"{Q0}.lora_embedding_A": t.pop(f"{Q0}.lora_A.weight"), f"{Q0}.lora_embedding_B": t.pop(f"{Q0}.lora_B.weight")})),
        ValueError, "belong to an embedding table"),
    "a bias saved alone": (put("base_model.model.lm_head.bias", np.zeros(23)), ValueError, "lora_A and lora_B, or a weight"),
    "too large for float32": (lambda f: edit_tensors(f, lambda t: t.update({f"{Q0}.lora_A.weight": np.full((3, 12), 1e300)})),
                              ValueError, "too large for the model's float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line_and_leaves_the_model_alone(case, folder):
    damage, kind, message = WRONG[case]
    damage(folder)
    model = fresh()
    before = state_of(model)
    with pytest.raises(kind, match=message) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert state_of(model) == before
    assert np.array_equal(model(IDS).data, fresh()(IDS).data)


@pytest.mark.parametrize("form", ["gpt2", "bert", "untyped"])
def test_an_adapter_of_another_architecture(form, folder):
    model = fresh(FORMS[form])
    before = state_of(model)
    with pytest.raises(ValueError, match="has tensors of modules that this model does not have"):
        load_adapter(model, folder)
    assert state_of(model) == before


def test_refused_for_the_models_sake(folder):
    model = adapted_model(target_modules=["q_proj"])
    before = state_of(model)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        load_adapter(model, folder)
    merge_adapter(model)
    with pytest.raises(ValueError, match="unmerge"):
        load_adapter(model, folder, "other")
    for name in ("a/b", "..", ""):
        with pytest.raises(ValueError, match="adapter name"):
            load_adapter(fresh(), folder, name)
    assert state_of(model)[0] == before[0]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_adapter(fresh(), folder / "nowhere")
    with pytest.raises(FileNotFoundError):
        load_adapter(fresh(), folder / CONFIG)             # a file in the place of the folder


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_never_get_through(data):
    """Flip or cut bytes of either file: it loads, or it raises ValueError with the model as it was."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_adapter(adapted_model(target_modules=["q_proj"]), folder)
        target = folder / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
        content = bytearray(target.read_bytes())
        span = min(len(content), 700)                      # the config, or the header and the first values
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, span - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        target.write_bytes(content)
        model = fresh()
        before = state_of(model)
        try:
            load_adapter(model, folder)
        except ValueError:
            assert state_of(model) == before
        else:
            assert np.isfinite(model(IDS).data).all()
            delete_adapter(model, "default")
            assert np.array_equal(model(IDS).data, fresh()(IDS).data)


def test_bf16_and_f16(tmp_path):
    values = np.array([[1.0, -2.5, 3.0e38, 1e-40, 0.0, -0.0]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1, 6], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    got = read_safetensors(tmp_path / "x")["a"]
    assert got.dtype == np.float32 and got.shape == (1, 6)
    np.testing.assert_array_equal(got.view(np.uint32), values.view(np.uint32) & 0xFFFF0000)
    save_file({"a": np.array([[1.5, -65504.0]], np.float16)}, tmp_path / "y")
    np.testing.assert_array_equal(read_safetensors(tmp_path / "y")["a"], np.array([[1.5, -65504.0]], np.float16))
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x7f" * 6)          # infinities
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_safetensors(tmp_path / "x")


# ------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("fails", ["write", "weights", "config"])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_save_leaves_the_old_adapter_or_none(fails, there, tmp_path, monkeypatch):
    old, new = adapted_model(target_modules=["q_proj"]), adapted_model(target_modules=["q_proj"], seed=2, lora_alpha=50)
    if there:
        save_adapter(old, tmp_path)
    real = os.replace

    def replace(source, target):
        if fails == "write" or str(target).endswith({"weights": WEIGHTS, "config": CONFIG}[fails]):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(new, tmp_path)
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_adapter(fresh(), tmp_path)
    save_adapter(new, tmp_path)                            # and nothing is in the way of the next try
    again = fresh()
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(again(IDS).data, new(IDS).data)


def test_saving_again_with_the_same_config_never_leaves_it_missing(tmp_path, monkeypatch):
    """A checkpoint that is overwritten while training changes only its values: at every moment there is a whole adapter."""
    first, second = adapted_model(target_modules=["q_proj"]), adapted_model(target_modules=["q_proj"], seed=2)
    save_adapter(first, tmp_path)

    def replace(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(second, tmp_path)
    monkeypatch.undo()
    again = fresh()
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(again(IDS).data, first(IDS).data)


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = adapted_model(target_modules=["q_proj"])
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot write an adapter to .*: give a folder that you can write to") as caught:
            save_adapter(model, target)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way" and os.listdir(tmp_path) == ["file"]


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(KeyError, match="no adapter 'default'"):
        save_adapter(fresh(), tmp_path)
    with pytest.raises(ValueError, match="head has no name of its own in the files of bert models"):
        cfg = TransformerConfig.bert(**SIZES)
        save_adapter(adapted_model(cfg, target_modules=["head"]), tmp_path)
    with pytest.raises(ValueError, match="expected a plain name"):
        save_adapter(adapted_model(target_modules=["q_proj"], name="a/b"), tmp_path, "a/b")
    with pytest.raises(ValueError, match="no module has a low-rank update, got classifier"):
        save_adapter(adapted_model(FORMS["bert"], target_modules=["classifier"]), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_method_that_is_no_product_is_refused(tmp_path):
    @register("twice")
    class Twice(LoRA):
        def adapted_weight(self, W):
            return W * 2.0

    try:
        model = fresh()
        add_adapter(model, type("TwiceConfig", (LoraConfig,), {"method": "twice"})(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"layers.0.attn.q_proj has a Twice, whose update is no product s·B@A"):
            save_adapter(model, tmp_path)
    finally:
        METHODS.pop(("twice", Linear))


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = adapted_model(FORMS["gpt2"], target_modules=["q_proj", "v_proj", "embed"])
    before, expected = state_of(model), model(IDS).data.copy()
    save_adapter(model, tmp_path)
    assert state_of(model) == before
    np.testing.assert_array_equal(model(IDS).data, expected)
    with disable_adapter(model):
        np.testing.assert_array_equal(model(IDS).data, fresh(FORMS["gpt2"])(IDS).data)
