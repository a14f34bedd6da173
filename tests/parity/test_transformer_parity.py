"""The three forms of the Transformer against transformers, and every fused op against torch.nn.functional."""

from __future__ import annotations

import numpy as np
import pytest
from parity_twins import close, torch, transformers, twins

from minilora.autograd import attention, cross_entropy, embedding, gelu, gelu_tanh, layer_norm, rms_norm, silu, tensor
from minilora.nn import TransformerConfig, generate
from minilora.nn.names import export_state, file_names, import_state

F = torch.nn.functional

# (form, fields): every head that both sides have, grouped keys, tied and untied tables, another rope base.
MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_embeddings": False}),
    "gpt2-sequence": ("gpt2", {"n_labels": 3}),
    "bert-sequence": ("bert", {"n_labels": 3}),
    "bert-token": ("bert", {"n_labels": 5, "head": "token"}),
    "llama": ("llama", {"rope_theta": 500.0}),
    "llama-tied": ("llama", {"tie_embeddings": True, "n_kv_heads": 6}),
    "llama-one-kv": ("llama", {"n_kv_heads": 1}),
    "llama-sequence": ("llama", {"n_labels": 3}),
    "llama-one-layer": ("llama", {"n_layers": 1, "d_ff": 1}),
}


def batch(cfg, rng, B=3, T=11, side="right"):
    """ids (B, T), a mask with padding on one side, and token types; id 0 stands at padding and nowhere else."""
    ids = rng.integers(1, cfg.vocab_size, (B, T))
    mask = np.ones((B, T), dtype=np.int64)
    for row, length in enumerate(rng.permutation([T, T - 4, 1])[:B]):
        mask[row, slice(length, None) if side == "right" else slice(0, T - length)] = 0
    return np.where(mask == 1, ids, 0), mask, rng.integers(0, 2, (B, T))


def run_both(ours, theirs, ids, mask=None, types=None):
    """Our logits (a Tensor) and theirs (a torch tensor, with its graph)."""
    extra = {} if types is None or ours.cfg.model_type != "bert" else {"token_type_ids": types}
    mine = ours(ids, attention_mask=mask, **extra)
    as_torch = {key: torch.from_numpy(value) for key, value in {"attention_mask": mask, **extra}.items() if value is not None}
    return mine, theirs(torch.from_numpy(ids), **as_torch).logits


def real(cfg, mask, shape):
    """1 where a logit counts: at positions that are not padding."""
    counted = np.ones(shape[:1]) if cfg.head == "sequence" else mask
    return np.broadcast_to(counted.reshape(*counted.shape, *[1] * (len(shape) - counted.ndim)), shape)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_all_gradients_float64(name, rng):
    form, fields = MODELS[name]
    ours, theirs = twins(form, **fields)
    ids, mask, types = batch(ours.cfg, rng)
    mine, other = run_both(ours, theirs, ids, mask, types)
    counted = real(ours.cfg, mask, mine.shape)
    close(mine.data * counted, other.detach().numpy() * counted, 1e-10, "logits")

    cotangent = rng.standard_normal(mine.shape) * counted
    mine.backward(cotangent)
    other.backward(torch.from_numpy(cotangent))
    gradients = export_state(ours.cfg, {path: p.grad for path, p in ours.named_parameters()})
    expected = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for key in expected:
        if key.endswith("attention.self.key.bias"):        # softmax does not see it: the exact gradient is 0
            assert abs(gradients[key]).max() < 1e-10
        else:
            close(gradients[key], expected[key], 1e-9, key)


@pytest.mark.parametrize("name", MODELS)
def test_logits_float32(name, rng):
    form, fields = MODELS[name]
    ours, theirs = twins(form, "float32", **fields)
    ids, mask, types = batch(ours.cfg, rng)
    mine, other = run_both(ours, theirs, ids, mask, types)
    counted = real(ours.cfg, mask, mine.shape)
    assert mine.dtype == np.float32
    close(mine.data * counted, other.detach().numpy() * counted, 1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "none"])
def test_padding_on_the_left_or_none(name, side, rng):
    form, fields = MODELS[name]
    ours, theirs = twins(form, **fields)
    ids, mask, _ = batch(ours.cfg, rng, side="left")
    if side == "none":
        ids, mask = rng.integers(1, ours.cfg.vocab_size, ids.shape), None
    mine, other = run_both(ours, theirs, ids, mask)
    counted = real(ours.cfg, np.ones(ids.shape) if mask is None else mask, mine.shape)
    close(mine.data * counted, other.detach().numpy() * counted, 1e-10)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (4, 2)])
@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_short_and_full_sequences(form, shape, rng):
    ours, theirs = twins(form)
    mine, other = run_both(ours, theirs, rng.integers(0, ours.cfg.vocab_size, shape))
    close(mine.data, other.detach().numpy(), 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_names_there_and_back(name):
    """export_state gives exactly the tensors that transformers has, and import_state takes them back."""
    form, fields = MODELS[name]
    ours, theirs = twins(form, **fields)
    exported = export_state(ours.cfg, ours.state_dict())
    expected = {key: p.detach().numpy() for key, p in theirs.named_parameters()}
    assert exported.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(exported[key], expected[key])
    again = import_state(ours.cfg, exported)
    assert again.keys() == ours.state_dict().keys()
    modules = {key for key, _ in theirs.named_modules()}
    optional = {"lm_head", "score", "classifier", "bert.pooler.dense"}                # by the head that a model has
    assert set(file_names(ours.cfg).values()) - modules <= optional


def test_the_forms_have_the_defaults_of_transformers():
    gpt2, bert, llama = (getattr(TransformerConfig, form)(vocab_size=9, d_model=8, n_layers=1, n_heads=2)
                         for form in ("gpt2", "bert", "llama"))
    theirs = transformers.GPT2Config(), transformers.BertConfig(), transformers.LlamaConfig()
    assert [gpt2.norm_eps, bert.norm_eps, llama.norm_eps] == \
        [theirs[0].layer_norm_epsilon, theirs[1].layer_norm_eps, theirs[2].rms_norm_eps]
    assert [gpt2.tie_embeddings, llama.tie_embeddings] == [theirs[0].tie_word_embeddings, theirs[2].tie_word_embeddings]
    assert (gpt2.max_len, bert.max_len) == (theirs[0].n_positions, theirs[1].max_position_embeddings)
    assert (bert.n_token_types, llama.rope_theta) == (theirs[1].type_vocab_size, theirs[2].rope_parameters["rope_theta"])
    assert (llama.bias, llama.qkv_bias) == (theirs[2].mlp_bias, theirs[2].attention_bias)
    assert [theirs[0].activation_function, theirs[1].hidden_act, theirs[2].hidden_act] == ["gelu_new", "gelu", "silu"]
    assert [gpt2.mlp, bert.mlp, llama.mlp] == ["gelu_tanh", "gelu", "swiglu"]


def test_greedy_generation(rng):
    """Cached generation picks the tokens that transformers picks, for prompts of one length and padded on the left."""
    for form in ("gpt2", "llama"):
        ours, theirs = twins(form)
        ids = rng.integers(1, ours.cfg.vocab_size, (2, 4))
        for mask in (np.ones_like(ids), np.array([[1, 1, 1, 1], [0, 0, 1, 1]])):
            expected = theirs.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=12,
                                       do_sample=False, eos_token_id=None)
            np.testing.assert_array_equal(generate(ours, ids, 12, attention_mask=mask), expected.numpy())


# ------------------------------------------------------------------------------------------------------------ op by op


def both(arrays, ours, theirs, rng, tolerance=1e-11):
    """Compare values and the gradients of all inputs, under one random cotangent."""
    mine = [tensor(a, requires_grad=True) for a in arrays]
    other = [torch.from_numpy(a.copy()).requires_grad_() for a in arrays]
    y, expected = ours(*mine), theirs(*other)
    close(y.data, expected.detach().numpy(), tolerance)
    cotangent = rng.standard_normal(y.shape)
    y.backward(cotangent)
    expected.backward(torch.from_numpy(np.asarray(cotangent)))
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        close(a.grad, b.grad.numpy(), tolerance, f"gradient of input {i}")


@pytest.mark.parametrize(("ours", "theirs"), [
    (gelu, F.gelu), (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")), (silu, F.silu)], ids=["gelu", "gelu_tanh", "silu"])
def test_activations(ours, theirs, rng):
    both([rng.standard_normal((5, 3)) * 4], ours, theirs, rng)


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 1), (1, 6)])
def test_norms(shape, rng):
    x, w, b = rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])
    if shape[-1] > 1:                                      # of one number the layer norm is its bias, whatever the number
        both([x, w, b], lambda *a: layer_norm(*a, 1e-3), lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-3), rng)
    both([x, w], lambda *a: rms_norm(*a, 1e-3), lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-3), rng)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("H", "KV"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(causal, H, KV, masked, rng):
    B, T, hd = 2, 5, 8
    q, k, v = (rng.standard_normal((B, heads, T, hd)) for heads in (H, KV, KV))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]) if masked else None
    allowed = np.ones((B, 1, T, T), dtype=bool)
    if masked:
        allowed &= mask[:, None, None, :] == 1
    if causal:
        allowed &= np.tril(np.ones((T, T), dtype=bool))
    both([q, k, v], lambda q, k, v: attention(q, k, v, causal=causal, key_mask=mask),
         lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.from_numpy(allowed), enable_gqa=True), rng)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_cross_entropy(smoothing, ignored, rng):
    logits, targets = rng.standard_normal((3, 4, 6)) * 5, rng.integers(0, 6, (3, 4))
    targets[0, 1:] = ignored
    both([logits], lambda x: cross_entropy(x, targets, ignore_index=ignored, label_smoothing=smoothing),
         lambda x: F.cross_entropy(x.reshape(-1, 6), torch.from_numpy(targets).reshape(-1), ignore_index=ignored,
                                   label_smoothing=smoothing), rng)


def test_embedding(rng):
    ids = np.array([[0, 3, 3], [3, 1, 0]])
    both([rng.standard_normal((5, 2))], lambda W: embedding(ids, W), lambda W: F.embedding(torch.from_numpy(ids), W), rng)
