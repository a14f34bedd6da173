"""Adapter files both ways: what we save, PEFT loads; what PEFT saves, we load; each with the same logits."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from parity_twins import (
    FORMS,
    TARGETS,
    classifier_of,
    close,
    in_peft,
    keys_of,
    logits_of,
    opened_in_peft,
    peft,
    random_options,
    randomise_theirs,
    randomised,
    torch,
    twins,
)

from minilora.lora import LoraConfig, adapters_of, add_adapter, set_scale
from minilora.lora.files import load_adapter, read_adapter, save_adapter
from minilora.lora.peft_options import LACKING, NEUTRAL, OPTIONS
from minilora.nn import Transformer

CASES = [(name, i) for name, (form, _) in FORMS.items() for i in range(len(TARGETS[form]))]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as embedding layers found:UserWarning"),
]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_saved_here_loads_in_peft(name, i, tmp_path, rng):
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    add_adapter(ours, LoraConfig(**random_options(form, i, np.random.default_rng(2000 * i + len(name)))))
    randomised(ours, rng)
    save_adapter(ours, tmp_path)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    expected = ours(ids).data
    close(opened_in_peft(theirs, tmp_path, ids), expected, 1e-10)

    again = Transformer(ours.cfg, dtype="float64")
    again.load_state_dict({path: p for path, p in ours.state_dict().items() if path in again.state_dict()})
    load_adapter(again.eval(), tmp_path)
    np.testing.assert_array_equal(again(ids).data, expected)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_saved_by_peft_loads_here(name, i, tmp_path, rng):
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    wrapped = in_peft(theirs, ours.cfg, random_options(form, i, np.random.default_rng(3000 * i + len(name))))
    randomise_theirs(wrapped, rng)
    wrapped.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path, "theirs")
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    expected = logits_of(wrapped, ids).detach().numpy()
    close(ours(ids).data, expected, 1e-10)

    save_adapter(ours, tmp_path / "again", "theirs")       # the same keys and shapes, but for PEFT's copy of the base's table
    keys, metadata = keys_of(tmp_path)
    assert keys_of(tmp_path / "again" / "theirs") == ({k: v for k, v in keys.items() if "base_layer" not in k}, metadata)
    written = json.loads((tmp_path / "again" / "theirs" / "adapter_config.json").read_text())
    read = json.loads((tmp_path / "adapter_config.json").read_text())
    for key in ("lora_dropout", "use_rslora", "fan_in_fan_out", "bias", "use_dora", "peft_type", "task_type", "inference_mode"):
        assert written[key] == read[key], key
    assert written.keys() <= read.keys()


@pytest.mark.parametrize(("name", "theirs_only", "targets"), [
    ("bert-sequence", "BertModel", ["query", "dense"]), ("gpt2", "GPT2Model", r"h\.\d\.attn\.c_attn"),
    ("llama", "LlamaModel", ["layers.0.mlp.up_proj", "embed_tokens"])])
def test_an_adapter_of_the_bare_model_loads(name, theirs_only, targets, tmp_path, rng):
    """Adapters for embeddings are trained without a head, and their keys lack the model's own name."""
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    bare = theirs.base_model
    assert type(bare).__name__ == theirs_only
    wrapped = peft.get_peft_model(bare, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=form == "gpt2"))
    randomise_theirs(wrapped, rng)
    wrapped.eval().save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    expected = wrapped(torch.from_numpy(ids)).last_hidden_state.detach().numpy()
    close(ours.hidden(ids).data, expected, 1e-10)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_separate_q_k_v_become_one_block_diagonal_c_attn(strength, tmp_path, rng):
    ours, theirs = twins("gpt2")
    add_adapter(ours, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "v_proj", "c_proj"],
                                 rank_pattern={"k_proj": 1, "layers.1.attn.v_proj": 4}, alpha_pattern={"v_proj": 7}))
    randomised(ours, rng)
    set_scale(ours, "default", strength)
    save_adapter(ours, tmp_path)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    close(opened_in_peft(theirs, tmp_path, ids), ours(ids).data, 1e-10)
    again, _ = twins("gpt2")
    load_adapter(again, tmp_path)
    close(again(ids).data, ours(ids).data, 1e-12)
    assert {path.rpartition(".")[2] for path in adapters_of(again)} == {"qkv_proj", "o_proj", "down_proj"}
    assert [adapters_of(again)[f"layers.{i}.attn.qkv_proj"].lora_A.shape[0] for i in range(2)] == [5, 7]


def test_an_adapter_on_qkv_proj_alone_keeps_its_rank(tmp_path, rng):
    ours, theirs = twins("gpt2")
    add_adapter(ours, LoraConfig(r=3, lora_alpha=5, target_modules=["qkv_proj"], rank_pattern={"layers.1.attn.qkv_proj": 2}))
    randomised(ours, rng)
    save_adapter(ours, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    close(logits_of(wrapped, ids).detach().numpy(), ours(ids).data, 1e-10)
    ranks = [len(p) for key, p in wrapped.named_parameters() if key.endswith("c_attn.lora_A.default.weight")]
    again, _ = twins("gpt2")
    load_adapter(again, tmp_path)
    close(again(ids).data, ours(ids).data, 1e-12)
    assert ranks == [adapters_of(again)[f"layers.{i}.attn.qkv_proj"].lora_A.shape[0] for i in range(2)] == [3, 2]


@pytest.mark.parametrize("name", ["llama", "bert-token", "gpt2"])
def test_an_adapter_on_the_packed_qkv(name, tmp_path, rng):
    """On Llama and BERT it becomes three; beside one on q_proj, both are stacked."""
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    add_adapter(ours, LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["qkv_proj", "q_proj"],
                                 rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 1}))
    randomised(ours, rng)
    save_adapter(ours, tmp_path)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    close(opened_in_peft(theirs, tmp_path, ids), ours(ids).data, 1e-10)


@pytest.mark.parametrize(("name", "saved"), [
    ("llama", ["lm_head"]), ("llama", ["lm_head", "o_proj"]), ("bert-sequence", ["pooler"]), ("gpt2", ["c_fc"]),
    ("gpt2-sequence", ["score", "c_attn"]), ("bert-sequence", None), ("llama", ["embed_tokens", "lm_head"]),
    ("bert-token", ["word_embeddings"]), ("gpt2-sequence", ["wte", "score"])])
def test_modules_saved_whole(name, saved, tmp_path, rng):
    """Also modules that are neither targets nor classifiers; Conv1D's weights lie the other way round in the files."""
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    targets = {"gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}.get(form, "all-linear")
    options = {"r": 2, "target_modules": targets, "modules_to_save": saved}
    wrapped = in_peft(theirs, ours.cfg, options)
    randomise_theirs(wrapped, rng)
    wrapped.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    expected = logits_of(wrapped, ids).detach().numpy()
    close(ours(ids).data, expected, 1e-10)
    save_adapter(ours, tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(twins(form, **fields)[1], tmp_path / "ours").eval()
    close(logits_of(other, ids).detach().numpy(), expected, 1e-10)
    assert keys_of(tmp_path / "ours") == keys_of(tmp_path / "theirs")


def test_a_named_adapter_lies_in_a_sub_directory(tmp_path, rng):
    ours, theirs = twins("llama")
    for name in ("default", "second"):
        add_adapter(ours, LoraConfig(r=2, target_modules=["q_proj"]), name)
        randomised(ours, rng, name)
        save_adapter(ours, tmp_path / "ours", name)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    wrapped.load_adapter(tmp_path / "ours" / "second", "second")
    wrapped.set_adapter("second")
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    close(logits_of(wrapped, ids).detach().numpy(), ours(ids).data, 1e-10)
    wrapped.save_pretrained(tmp_path / "theirs")
    assert sorted(p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*.safetensors")) == \
        sorted(p.relative_to(tmp_path / "theirs") for p in (tmp_path / "theirs").rglob("*.safetensors"))
    again, _ = twins("llama")
    for name in ("default", "second"):
        load_adapter(again, tmp_path / "theirs", name)
    np.testing.assert_array_equal(again(ids).data, ours(ids).data)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_files(dtype, tmp_path, rng):
    ours, theirs = twins("llama")
    wrapped = in_peft(theirs, ours.cfg, {"r": 3, "target_modules": ["q_proj", "down_proj"]})
    randomise_theirs(wrapped, rng)
    wrapped.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    modules = read_adapter(tmp_path)[1]
    for path, layer in wrapped.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            entry = modules[path.removeprefix("base_model.model.")]
            np.testing.assert_array_equal(entry["A"], layer.lora_A["default"].weight.detach().float().numpy())
            np.testing.assert_array_equal(entry["B"], layer.lora_B["default"].weight.detach().float().numpy())
            assert entry["scale"] == layer.scaling["default"]
    assert len(modules) == 4
    load_adapter(ours, tmp_path)
    assert adapters_of(ours)["layers.0.attn.q_proj"].lora_A.dtype == np.float64


def test_our_table_of_options_is_pefts(tmp_path):
    """Every key of PEFT's config is known here, with PEFT's default; a new PEFT that adds one fails here."""
    defaults = peft.LoraConfig().to_dict()
    table = OPTIONS | LACKING | NEUTRAL
    assert table.keys() == defaults.keys() - {"peft_type"}
    assert {k: v for k, v in table.items() if k != "peft_version"} == \
        {k: v for k, v in defaults.items() if k not in ("peft_type", "peft_version")}
    ours = {f.name for f in dataclasses.fields(LoraConfig)}
    assert ours & defaults.keys() == OPTIONS.keys() | {"use_dora", "bias", "lora_bias"}


@pytest.mark.parametrize(("options", "named"), [
    ({"use_dora": True, "bias": "all"}, "bias"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"trainable_token_indices": [1, 3]}, "trainable_token_indices")])
def test_what_we_lack_is_refused(options, named, tmp_path, rng):
    ours, theirs = twins("bert", "float32", n_labels=3)
    in_peft(theirs, ours.cfg, {"r": 2, "target_modules": ["query"], **options}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        load_adapter(ours, tmp_path)


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", False])
def test_starts_that_leave_the_base_alone_load(init, tmp_path, rng):
    ours, theirs = twins("llama", "float32")
    wrapped = in_peft(theirs, ours.cfg, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": init})
    wrapped.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    close(ours(ids).data, logits_of(wrapped, ids).detach().numpy(), 1e-5)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model:UserWarning")
def test_converted_pissa_loads(tmp_path, rng):
    """PEFT can turn PiSSA into plain LoRA of twice the rank, for the base as it was."""
    ours, theirs = twins("llama", "float32")
    wrapped = in_peft(theirs, ours.cfg, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"})
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    randomise_theirs(wrapped, rng)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    expected = logits_of(wrapped, ids).detach().numpy()
    wrapped.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    load_adapter(ours, tmp_path / "end")
    close(ours(ids).data, expected, 1e-4)


def test_a_resized_vocabulary_is_refused(tmp_path, rng):
    """PEFT saves the table along when the vocabulary has grown; it loads only onto a base with that table."""
    ours, theirs = twins("llama")
    wrapped = in_peft(theirs, ours.cfg, {"r": 2, "target_modules": ["q_proj"]})
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(ours, tmp_path)
    ours.embed.weight.data[3, 4] += 1e-3
    with pytest.raises(ValueError, match="own base"):
        load_adapter(ours, tmp_path, "second")


def test_saved_classifier_is_the_trained_one(tmp_path, rng):
    ours, theirs = twins("bert", n_labels=3)
    wrapped = in_peft(theirs, ours.cfg, {"r": 2, "target_modules": ["query"]})
    randomise_theirs(wrapped, rng)
    wrapped.save_pretrained(tmp_path)
    entry = read_adapter(tmp_path)[1]["classifier"]
    np.testing.assert_array_equal(entry["weight"], classifier_of(wrapped).weight.detach().numpy())
    np.testing.assert_array_equal(entry["bias"], classifier_of(wrapped).bias.detach().numpy())
