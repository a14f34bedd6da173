"""Checkpoints against transformers: theirs load here with the same outputs, ours load there with the same outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from parity_twins import close, torch, transformers

import minilora as ml
from minilora.pretrained.safetensors_file import from_bf16, to_bf16

DECODER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
           "intermediate_size": 40, "max_position_embeddings": 32, "vocab_size": 37,
           "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40, "vocab_size": 37,
           "max_position_embeddings": 34, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {"dim": 24, "n_layers": 2, "n_heads": 6, "hidden_dim": 40, "vocab_size": 37, "max_position_embeddings": 32,
          "dropout": 0.0}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32, "vocab_size": 37, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}

# name -> (class, config's class, options)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"tie_word_embeddings": False, "n_inner": 20}),
    "gpt2-base": ("GPT2Model", "GPT2Config", GPT2 | {"activation_function": "gelu"}),
    "gpt2-sequence": ("GPT2ForSequenceClassification", "GPT2Config", GPT2 | {"num_labels": 3}),
    "bert": ("BertModel", "BertConfig", ENCODER),
    "bert-sequence": ("BertForSequenceClassification", "BertConfig", ENCODER | {"num_labels": 3}),
    "bert-token": ("BertForTokenClassification", "BertConfig", ENCODER | {"num_labels": 5, "hidden_act": "gelu_new"}),
    "roberta": ("RobertaModel", "RobertaConfig", ENCODER | {"layer_norm_eps": 1e-3}),
    "roberta-sequence": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER | {"num_labels": 4}),
    "roberta-token": ("RobertaForTokenClassification", "RobertaConfig", ENCODER | {"num_labels": 4}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTIL | {"sinusoidal_pos_embds": True}),
    "distilbert-sequence": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL | {"num_labels": 3}),
    "distilbert-token": ("DistilBertForTokenClassification", "DistilBertConfig", DISTIL | {"num_labels": 3}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"attention_bias": True}),
    "llama-mlp-bias": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"mlp_bias": True, "tie_word_embeddings": True}),
    "llama-head-dim": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"head_dim": 8, "rms_norm_eps": 1e-3}),
    "llama3-rope": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"head_dim": 8, "rope_parameters": LLAMA3}),
    "llama-linear-rope": ("LlamaForCausalLM", "LlamaConfig", DECODER | {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}),
    "llama-base": ("LlamaModel", "LlamaConfig", DECODER),
    "llama-sequence": ("LlamaForSequenceClassification", "LlamaConfig", DECODER | {"num_labels": 3, "pad_token_id": 0}),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER | {"tie_word_embeddings": True}),
}


def random_model(name, seed=0):
    cls, config, options = MODELS[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and key.endswith("weight") else 0.0
            p.copy_(centre + 0.2 * torch.randn(p.shape, generator=generator))
    return model


def outputs(theirs, ids, mask):
    with torch.no_grad():
        found = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).numpy()


def batch(rng, pad=1):
    """ids (3, 20) and a mask with padding on the right."""
    ids, mask = rng.integers(3, 37, (3, 20)), np.ones((3, 20), np.int64)
    for row, length in enumerate((20, 13, 1)):
        mask[row, length:] = 0
    return np.where(mask == 1, ids, pad), mask


def same(ours, theirs, rng):
    pad = theirs.config.pad_token_id or 0
    ids, mask = batch(rng, pad)
    with ml.no_grad():
        mine = ours(ids, attention_mask=mask).data
    expected = outputs(theirs, ids, mask)
    counted = mask[..., None] if mine.ndim == 3 else 1
    close(mine * counted, expected * counted, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_theirs_load_here_and_ours_load_there(name, tmp_path, rng):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = ml.load_pretrained(tmp_path / "theirs")
    assert tokenizer is None and not ours.training
    assert ours.cfg.head == {"sequence": "sequence", "token": "token"}.get(name.partition("-")[2],
                                                                           "lm" if "LM" in MODELS[name][0] else "none")
    same(ours, theirs, rng)

    for p in dict(ours.named_parameters()).values():       # other numbers, so that nothing of the first folder can be left
        p.data[...] += rng.standard_normal(p.shape).astype(np.float32) * 0.1
    ml.save_pretrained(ours, None, tmp_path / "ours")
    again, report = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    again.config.pad_token_id = theirs.config.pad_token_id             # the tokenizer would have said it
    same(ours, again.eval(), rng)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "ours")) is type(theirs.config)
    twice, _ = ml.load_pretrained(tmp_path / "ours")
    assert twice.cfg == ours.cfg
    for path, values in ours.state_dict().items():
        np.testing.assert_array_equal(twice.state_dict()[path], values)


def test_roberta_counts_positions_of_real_tokens(tmp_path, rng):
    """Padding on the left, and the padding id in the midst of a text, move RoBERTa's positions."""
    theirs = random_model("roberta")
    theirs.save_pretrained(tmp_path)
    ours, _ = ml.load_pretrained(tmp_path)
    ids, mask = batch(rng)
    ids, mask = ids[:2, ::-1].copy(), mask[:2, ::-1].copy()
    ids[0, 5] = 1
    with ml.no_grad():
        mine = ours(ids, attention_mask=mask).data
    close(mine * mask[..., None], outputs(theirs, ids, mask) * mask[..., None], 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_both_ways(dtype, tmp_path, rng):
    theirs = random_model("qwen2").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = ml.load_pretrained(tmp_path / "theirs")
    embed = theirs.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(ours.embed.weight.data, embed)
    same(ours, theirs.float(), rng)
    ours.embed.weight.data[...] += rng.standard_normal(embed.shape).astype(np.float32)
    ml.save_pretrained(ours, None, tmp_path / "ours", dtype=dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype is getattr(torch, dtype)
    rounded = torch.from_numpy(ours.embed.weight.data.copy()).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(again.model.embed_tokens.weight.detach().float().numpy(), rounded)


def test_bfloat16_rounds_as_torch_does():
    """Every pattern of the upper half with ties, just below and just above, negative and subnormal ones too."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    expected = torch.from_numpy(numbers.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(numbers)), expected)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_sharded_checkpoints(name, tmp_path, rng):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    same(ml.load_pretrained(tmp_path)[0], theirs, rng)


def test_masked_language_models_and_pretraining_heads_give_hidden_states(tmp_path, rng):
    for cls, config, options in (("BertForMaskedLM", "BertConfig", ENCODER), ("BertForPreTraining", "BertConfig", ENCODER),
                                 ("RobertaForMaskedLM", "RobertaConfig", ENCODER),
                                 ("DistilBertForMaskedLM", "DistilBertConfig", DISTIL)):
        theirs = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
        theirs.save_pretrained(tmp_path / cls)
        ours, _ = ml.load_pretrained(tmp_path / cls)
        assert ours.cfg.head == "none" and ours.cfg.pooler == ("tanh" if cls == "BertForPreTraining" else "none")
        same(ours, theirs.base_model, rng)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama", "bert-token"])
def test_a_new_classifier_on_a_pretrained_model(name, tmp_path, rng):
    """The body is the checkpoint's, the classifier is drawn from the seed."""
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "base")
    ours, _ = ml.load_pretrained(tmp_path / "base", n_labels=7, seed=3)
    assert ours.cfg.head == "sequence" and ours(batch(rng)[0]).shape == (3, 7)
    assert abs(ours.classifier.weight.data).max() > 0
    other, _ = ml.load_pretrained(tmp_path / "base", n_labels=7, seed=4)
    assert not np.array_equal(ours.classifier.weight.data, other.classifier.weight.data)
    ids, mask = batch(rng)
    with ml.no_grad(), torch.no_grad():
        mine = ours.hidden(ids, attention_mask=mask).data * mask[..., None]
        expected = theirs.base_model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
    close(mine, expected.numpy() * mask[..., None], 1e-4)
    if name.startswith("bert"):                            # the layer before the classifier is the pretrained one
        assert ours.cfg.pooler == "tanh"
        if name == "bert":
            np.testing.assert_array_equal(ours.pooler.weight.data, theirs.pooler.dense.weight.detach().numpy())
    ml.save_pretrained(ours, None, tmp_path / "tuned")
    kind = json.loads((tmp_path / "tuned" / "config.json").read_text())["architectures"][0]
    again = getattr(transformers, kind).from_pretrained(tmp_path / "tuned").eval()
    again.config.pad_token_id = 0
    ids = rng.integers(3, 37, (3, 20))
    with ml.no_grad():
        close(ours(ids).data, outputs(again, ids, np.ones_like(ids)), 1e-4)


def test_adapters_on_loaded_models_load_in_peft(tmp_path, rng):
    import peft
    for name, targets in (("bert", ["query", "value"]), ("roberta-sequence", ["query", "dense"]), ("distilbert", ["q_lin"]),
                          ("qwen2", ["q_proj", "down_proj"]), ("llama-head-dim", ["q_proj", "o_proj"])):
        theirs = random_model(name)
        theirs.save_pretrained(tmp_path / name)
        ours, _ = ml.load_pretrained(tmp_path / name)
        ml.add_adapter(ours, ml.LoraConfig(r=3, lora_alpha=6, target_modules=targets))
        for _, p in ours.named_parameters(trainable=True):
            p.data[...] = rng.standard_normal(p.shape) * 0.3
        ml.save_adapter(ours, tmp_path / f"{name}-adapter")
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / f"{name}-adapter").eval()
        ids, mask = batch(rng, theirs.config.pad_token_id or 0)
        with ml.no_grad():
            mine = ours(ids, attention_mask=mask).data
        counted = mask[..., None] if mine.ndim == 3 else 1
        close(mine * counted, outputs(wrapped, ids, mask) * counted, 1e-4, name)
