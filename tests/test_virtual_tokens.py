"""Prompt tuning and prefix tuning: what they compute, their gradients, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file
from small_models import IDS, B, T, V, build
from test_methods import trained

import minilora as ml
import minilora.nn.blocks as blocks
from minilora.autograd import gradcheck
from minilora.backend import to_host
from minilora.lora import adapters_of

P = 3
CONFIGS = {"prompt": ml.PromptTuningConfig, "prefix": ml.PrefixTuningConfig}
methods = pytest.mark.parametrize("name", CONFIGS)
causal = pytest.mark.parametrize("form", ["gpt2", "llama"])
LEFT = np.array([[1] * T, [0] + [1] * (T - 1), [0, 0] + [1] * (T - 2)])


def tuned_of(name, form="gpt2", dtype="float64", **fields):
    """(the plain model, the same with random virtual tokens)."""
    model = build(form, dtype, **({"n_kv_heads": 1} if form == "llama" else {}) | fields)
    tuned = ml.VirtualTokens(model)
    ml.add_adapter(tuned, CONFIGS[name](num_virtual_tokens=P))
    prompt = adapters_of(tuned)["embed"].prompt
    prompt.data[...] = ml.to_device(np.random.default_rng(2).standard_normal(prompt.shape).astype(dtype))
    return model, tuned


def run(model, **options):
    return to_host(model(IDS, **options).data)


@pytest.mark.parametrize("form", ["gpt2", "llama", "bert"])
def test_a_prompt_is_new_words_in_front(device, form):
    """The oracle: a plain model whose table has the virtual tokens as further rows, run on their ids and the real ones."""
    model, tuned = tuned_of("prompt", form, **{"head": "none"} if form == "bert" else {})
    wide = build(form, vocab_size=V + P, **({"n_kv_heads": 1} if form == "llama" else {}),
                 **{"head": "none"} if form == "bert" else {})
    state = model.state_dict()
    state["embed.weight"] = np.concatenate([state["embed.weight"], to_host(adapters_of(tuned)["embed"].prompt)])
    if form == "llama":
        state["head.weight"] = np.concatenate([state["head.weight"], np.zeros((P, 8))])
    wide.load_state_dict(state)
    ids = np.concatenate([np.broadcast_to(np.arange(V, V + P), (B, P)), IDS], axis=1)
    mask = np.concatenate([np.ones((B, P)), LEFT[:, ::-1]], axis=1)
    for given, own in (({}, {}), ({"attention_mask": mask}, {"attention_mask": LEFT[:, ::-1]})):
        expected = to_host(wide(ids, **given).data)[:, P:]
        expected = expected if form == "bert" else expected[..., :V]
        assert_allclose(run(tuned, **own), expected, rtol=1e-12, atol=1e-13)


@causal
def test_a_prefix_is_keys_and_values_in_front(form, monkeypatch):
    """The oracle: attention written out, in a model of one layer."""
    _, tuned = tuned_of("prefix", form, n_layers=1)
    seen, layer, plain = {}, tuned.layers[0].attn, blocks.attention

    def spied(q, k, v, **options):
        seen.update(q=to_host(q), k=to_host(k), v=to_host(v), o=to_host(plain(q, k, v, **options)))
        return plain(q, k, v, **options)

    monkeypatch.setattr(blocks, "attention", spied)
    run(tuned)
    heads = layer.widths[1] // layer.head_dim
    flat = to_host(adapters_of(tuned)["embed"].prompt).reshape(P, 2, heads, layer.head_dim)
    for what, j in (("k", 0), ("v", 1)):
        assert seen[what].shape == (B, heads, P + T, layer.head_dim)
        for row in range(B):
            assert_array_equal(seen[what][row, :, :P], flat[:, j].transpose(1, 0, 2))
    k, v = (np.repeat(seen[w], seen["q"].shape[1] // heads, axis=1) for w in "kv")
    for i in range(T):                                     # every query sees the whole prefix, and its past
        scores = np.einsum("bhd,bhsd->bhs", seen["q"][:, :, i], k[:, :, : P + i + 1]) / layer.head_dim**0.5
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        assert_allclose(seen["o"][:, :, i], np.einsum("bhs,bhsd->bhd", weights, v[:, :, : P + i + 1]), rtol=1e-10, atol=1e-12)


@methods
@causal
def test_gradients_and_counts(device, name, form):
    _, tuned = tuned_of(name, form)
    mask = LEFT[:, ::-1].copy()
    assert gradcheck(lambda *_: tuned(IDS, attention_mask=mask), trained(tuned), directions=2, eps=1e-6)
    parameter, = trained(tuned)
    assert abs(to_host(parameter.grad)).min() > 0
    width = 8 if name == "prompt" else 2 * 2 * (8 if form == "gpt2" else 4)
    assert ml.count_parameters(tuned)["trainable"] == P * width == parameter.size


@methods
def test_training_moves_only_the_virtual_tokens(name):
    model, tuned = tuned_of(name, dtype="float32")
    state = model.state_dict()
    batch = IDS, (IDS + 1) % V
    history = ml.train(tuned, lambda i: batch, ml.TrainConfig(steps=60, lr=1e-1, schedule="constant", progress=False))
    assert history.loss[-1] < history.loss[0] - (0.012 if name == "prompt" else 0.2)       # all that a prompt can do here
    assert all(value.tobytes() == state[path].tobytes() for path, value in model.state_dict().items())
    assert adapters_of(tuned)["embed"].prompt.dtype == np.float32


@methods
@causal
def test_generation_with_the_cache_is_generation_without(name, form):
    _, tuned = tuned_of(name, form, max_len=16)
    ids = IDS
    for _ in range(5):
        ids = np.concatenate([ids, to_host(tuned(ids).data)[:, -1:].argmax(-1)], axis=1)
    assert_array_equal(ml.generate(tuned, IDS, 5), ids)


@methods
def test_generation_with_padding_on_the_left(name):
    """Each row gives what it gives alone. Rotary positions could not keep the distance to the virtual tokens: refused."""
    _, tuned = tuned_of(name, "gpt2", max_len=16)
    alone = [ml.generate(tuned, row[None, keep != 0], 5)[0, -5:] for row, keep in zip(IDS, LEFT)]
    assert_array_equal(ml.generate(tuned, IDS, 5, attention_mask=LEFT)[:, -5:], alone)
    _, tuned = tuned_of(name, "llama", max_len=16)
    with pytest.raises(ValueError, match="padding on the left with rotary"):
        ml.generate(tuned, IDS, 5, attention_mask=LEFT)
    right = LEFT[:, ::-1]
    for row, keep, y in zip(IDS, right, run(tuned, attention_mask=right)):
        alone = to_host(tuned(row[None, keep != 0]).data)[0]
        assert_allclose(y[keep != 0], alone, rtol=1e-10, atol=1e-12)


@methods
def test_off_it_is_the_base_and_merging_is_refused(name):
    model, tuned = tuned_of(name)
    base, state = run(model), model.state_dict()
    with_tokens = run(tuned)
    assert abs(with_tokens - base).max() > 1e-3
    assert_array_equal(run(model), base)                   # the model it was made of stays plain
    with ml.disable_adapter(tuned):
        assert_array_equal(run(tuned), base)
    for refused in ml.merge_adapter, ml.merge_and_unload:
        with pytest.raises(ValueError, match="cannot be merged"):
            refused(tuned)
    assert_array_equal(run(tuned), with_tokens)
    ml.set_adapter(tuned, None)
    assert_array_equal(run(tuned), base)
    ml.delete_adapter(tuned, "default")
    assert_array_equal(run(tuned), base)
    assert all(value.tobytes() == state[path].tobytes() for path, value in model.state_dict().items())


@methods
def test_beside_a_lora(name):
    _, tuned = tuned_of(name)
    before = run(tuned)
    ml.add_adapter(tuned, ml.LoraConfig(r=2, target_modules=["qkv_proj"], init_lora_weights=False), "lora")
    ml.set_adapter(tuned, ["default", "lora"])
    both = run(tuned)
    assert abs(both - before).max() > 1e-3
    ml.set_adapter(tuned, "default")
    assert_array_equal(run(tuned), before)


@methods
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model, tuned = tuned_of(name)
    ml.save_adapter(tuned, tmp_path)
    again = ml.VirtualTokens(model)
    ml.load_adapter(again, tmp_path)
    assert_array_equal(run(again), run(tuned))
    with pytest.raises(ValueError, match="VirtualTokens"):
        ml.load_adapter(model, tmp_path)
    tensors, text = load_file(tmp_path / "adapter_model.safetensors"), (tmp_path / "adapter_config.json").read_text()
    value = tensors["prompt_embeddings"]
    for wrong in ({}, {"other": value}, {"prompt_embeddings": value[:-1]}, {"prompt_embeddings": value[:, :-1].copy()},
                  {"prompt_embeddings": value * np.nan}, tensors | {"more": value}):
        save_file(wrong, tmp_path / "adapter_model.safetensors")
        fresh = ml.VirtualTokens(model)
        with pytest.raises(ValueError):
            ml.load_adapter(fresh, tmp_path)
        assert not fresh.adapter_configs
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(text) | {"num_virtual_tokens": P + 1}))
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        ml.load_adapter(ml.VirtualTokens(model), tmp_path)


def test_a_prompt_may_start_as_words():
    model = build()
    tuned = ml.VirtualTokens(model)
    ml.add_adapter(tuned, ml.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"))
    rows = to_host(adapters_of(tuned)["embed"].prompt)
    assert all((row == to_host(model.embed.weight)).all(axis=1).any() for row in rows)


def test_what_cannot_work_is_refused():
    model, prefix = build(), ml.PrefixTuningConfig(num_virtual_tokens=P)
    with pytest.raises(ValueError, match="VirtualTokens"):
        ml.add_adapter(model, prefix)
    bert = ml.VirtualTokens(build("bert", n_labels=2))
    with pytest.raises(ValueError, match="not causal"):
        ml.add_adapter(bert, prefix)
    assert not bert.adapter_configs
    ml.add_adapter(bert, ml.PromptTuningConfig(num_virtual_tokens=P))
    assert run(bert).shape == (B, 2)
    with pytest.raises(ValueError, match="classifier"):
        ml.save_adapter(bert, "nowhere")
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_virtual_tokens"):
            ml.PromptTuningConfig(num_virtual_tokens=wrong)
    with pytest.raises(ValueError, match="less than max_len = 8"):
        ml.add_adapter(ml.VirtualTokens(model), ml.PromptTuningConfig(num_virtual_tokens=8))
    with pytest.raises(ValueError, match="cannot adapt layers"):
        ml.add_adapter(ml.VirtualTokens(model), ml.PromptTuningConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="TEXT"):
        ml.PromptTuningConfig(prompt_tuning_init="TEXT")
    with pytest.raises(ValueError, match="init_weights"):
        ml.PrefixTuningConfig(init_weights="one")


@methods
def test_what_does_not_fit_a_pass_is_refused(name):
    _, tuned = tuned_of(name)
    with pytest.raises(ValueError, match="sequence of 9 tokens"):
        tuned(np.zeros((1, 6), int))
    with pytest.raises(IndexError):
        tuned(IDS - 5)
    with pytest.raises(ValueError, match="mixed batch"):
        tuned(IDS, adapter_names=["default", "__base__", "default"])
    ml.set_scale(tuned, "default", 0.5)
    with pytest.raises(ValueError, match="strength"):
        tuned(IDS)
    ml.set_scale(tuned, "default", 1.0)
    ml.add_adapter(tuned, CONFIGS[name](num_virtual_tokens=2), "second")
    ml.set_adapter(tuned, ["default", "second"])
    with pytest.raises(ValueError, match="2 adapters of virtual tokens"):
        tuned(IDS)
