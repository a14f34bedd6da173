"""The Transformer as a whole: gradients, masks, the key-value cache, generation, packed weights, state, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import fake_device
import numpy as np
import pytest
from composed import softmax

from minilora.autograd import Op, Tensor, cross_entropy, gradcheck, no_grad, tanh, tensor
from minilora.backend import get_device, to_device, to_host
from minilora.data import left_padded
from minilora.lora import LoraConfig, add_adapter
from minilora.nn import Transformer, TransformerConfig, generate, stream
from minilora.nn.generate import choose

V, D, L, P = 13, 12, 2, 10                                     # vocabulary, d_model, layers, max_len
SIZES = {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": 3, "max_len": P}
FORMS = {
    "gpt2": TransformerConfig.gpt2(**SIZES),
    "bert-sequence": TransformerConfig.bert(**SIZES, n_labels=4),
    "bert-token": TransformerConfig.bert(**SIZES, n_labels=4, head="token"),
    "llama": TransformerConfig.llama(**SIZES | {"d_model": 16, "n_heads": 4}, n_kv_heads=2, d_ff=20),
    "llama-sequence": TransformerConfig.llama(**SIZES | {"n_heads": 2}, d_ff=7, n_labels=3),
    "mixed": TransformerConfig(**SIZES, n_kv_heads=1, norm="rmsnorm", norm_first=False, position="rope", mlp="gelu", bias=True,
                               qkv_bias=False, n_token_types=3),
}
GENERATIVE = {"gpt2": 7, "llama": 0, "mixed": 0}               # with seeds that make greedy generation say several words
IDS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 12, 0, 8]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])      # row 1 ends in two paddings
TYPES = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])


def build(form: str, dtype: str = "float64", seed: int = 0, **changes: Any) -> Transformer:
    """A model whose weights are large enough that every part of it matters: no zero biases, no gains of one."""
    cfg = copy.copy(FORMS[form])
    for name, value in changes.items():
        setattr(cfg, name, value)
    model = Transformer(cfg, seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    model.load_state_dict({k: v + rng.normal(0, 0.3, v.shape) for k, v in model.state_dict().items()})
    return model


def inputs_of(form: str) -> dict[str, Any]:
    return {"attention_mask": MASK, **({"token_type_ids": TYPES} if FORMS[form].n_token_types else {})}


def logits_of(model: Transformer, ids: Any, **inputs: Any) -> np.ndarray:
    with no_grad():
        return to_host(model(ids, **inputs))


def loss_of(model: Transformer, form: str) -> Tensor:
    logits = model(IDS, **inputs_of(form))
    targets = np.zeros(logits.shape[:-1], int)
    return cross_entropy(logits, targets)


# Gradients

@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_whole_model(device, form):
    model = build(form)
    parameters = [p for _, p in model.named_parameters()]
    assert gradcheck(lambda *_: model(IDS, **inputs_of(form)), parameters, directions=1 if device != "cpu" else 3)


def test_a_mistake_deep_in_the_model_is_found(device, monkeypatch):
    right = Op.registry["RMSNorm"].backward
    monkeypatch.setattr(Op.registry["RMSNorm"], "backward",
                        lambda self, dy: (right(self, dy)[0] * 1.001, *right(self, dy)[1:]))
    model = build("llama")
    with pytest.raises(AssertionError, match="wrong gradient for input"):
        gradcheck(lambda *_: model(IDS), [p for _, p in model.named_parameters()], directions=1)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_gradient_unless_frozen(device, form):
    model = build(form)
    loss_of(model, form).backward()
    assert all(p.grad is not None for _, p in model.named_parameters())
    model.zero_grad()
    model.freeze()
    assert not loss_of(model, form).requires_grad
    chosen = {"layers.0.attn.k_proj.weight", "layers.1.mlp.up_proj.weight"}
    for path, p in model.named_parameters():
        p.requires_grad = path in chosen
    loss_of(model, form).backward()
    assert {path for path, p in model.named_parameters() if p.grad is not None} == chosen
    assert {path for path, _ in model.named_parameters(trainable=True)} == chosen
    assert len(list(model.named_parameters(trainable=False))) == len(list(model.named_parameters())) - 2
    model.unfreeze()
    assert not list(model.named_parameters(trainable=False))


# Masks

@pytest.mark.parametrize("form", GENERATIVE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_later_token_changes_no_earlier_logit(device, form, dtype):
    model = build(form, dtype)
    before = logits_of(model, IDS)
    for t in range(IDS.shape[1]):
        changed = IDS.copy()
        changed[:, t] = (changed[:, t] + 1) % V
        after = logits_of(model, changed)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])               # to the last bit
        assert (after[:, t:] != before[:, t:]).any(axis=(1, 2)).all()


def test_without_the_causal_mask_every_token_matters(device):
    model = build("bert-token")
    changed = IDS.copy()
    changed[:, -1] = (changed[:, -1] + 1) % V
    assert (logits_of(model, changed)[:, 0] != logits_of(model, IDS)[:, 0]).any(axis=-1).all()


@pytest.mark.parametrize("form", FORMS)
def test_padding_never_influences_real_positions(device, form):
    model = build(form)
    inputs = inputs_of(form)
    before = logits_of(model, IDS, **inputs)
    other = np.where(MASK == 1, IDS, 7)
    after = logits_of(model, other, **inputs)
    shown = MASK.astype(bool) if before.ndim == 3 else slice(None)
    np.testing.assert_array_equal(after[shown], before[shown])
    assert not np.array_equal(logits_of(model, other, **inputs | {"attention_mask": None})[1],
                              logits_of(model, IDS, **inputs | {"attention_mask": None})[1])
    alone = {k: v[1:, :4] for k, v in inputs.items()}                            # row 1 without its padding
    short = logits_of(model, IDS[1:, :4], **alone)[0]
    np.testing.assert_allclose(before[1, :4] if before.ndim == 3 else before[1], short, rtol=0, atol=1e-12)
    for equal in (MASK.astype(bool), MASK.astype("float32"), 5 * MASK):          # 0 hides, anything else shows
        np.testing.assert_array_equal(logits_of(model, IDS, **inputs | {"attention_mask": equal}), before)
    np.testing.assert_allclose(logits_of(model, IDS, **inputs | {"attention_mask": np.ones_like(MASK)}),
                               logits_of(model, IDS, **inputs | {"attention_mask": None}), rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", ["bert-sequence", "llama-sequence"])
def test_tokens_at_padding_get_no_gradient(device, form):
    model = build(form)
    ids = np.where(MASK == 1, np.minimum(IDS, 10), 12)         # token 12 stands at padding only
    model(ids, attention_mask=MASK).sum().backward()
    g = to_host(model.embed.weight.grad)
    assert not g[12].any() and g[ids[0, 0]].any()


@pytest.mark.parametrize("form", GENERATIVE)
def test_padding_on_the_left_moves_no_logit_of_a_real_token(device, form):
    """Rotary positions see distances only; learned ones are told where a row begins."""
    model = build(form)
    plain = logits_of(model, IDS)
    ids = np.concatenate([np.full((2, 3), 7), IDS], axis=1)
    mask = np.concatenate([np.zeros((2, 3), int), np.ones_like(IDS)], axis=1)
    places = {} if model.pos_embed is None else {"position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)}
    padded = logits_of(model, ids, attention_mask=mask, **places)
    np.testing.assert_allclose(padded[:, 3:], plain, rtol=0, atol=1e-12)


def test_a_row_of_padding_alone_stays_finite(device):
    model = build("bert-token", "float32")
    mask = np.array([[1] * 6, [0] * 6])
    logits = model(IDS, attention_mask=mask)
    logits.sum().backward()
    assert np.isfinite(to_host(logits)).all()
    assert all(np.isfinite(to_host(p.grad)).all() for _, p in model.named_parameters())


def test_the_sequence_head_reads_the_last_real_token(device):
    model = build("llama-sequence")
    for mask, last in ((None, [5, 5]), (MASK, [5, 3]), (MASK[:, ::-1], [5, 5])):
        x = model.hidden(IDS, attention_mask=mask)
        expected = to_host(x)[np.arange(2), last] @ to_host(model.classifier.weight.data).T
        np.testing.assert_allclose(logits_of(model, IDS, attention_mask=mask), expected, rtol=1e-12)


@pytest.mark.parametrize("form", ["bert-sequence", "llama-sequence", "gpt2-sequence"])
@pytest.mark.parametrize("mask", [None, MASK, MASK[:, ::-1], np.array([[1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1]])], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_classifier_of_one_position_is_that_of_all_positions(device, form, mask, recompute):
    """The last layer works for one position of a row only. Logits and gradients are those of the states of all positions."""
    def step(whole):
        model = build(form) if form in FORMS else build("gpt2", n_labels=3, head="sequence")
        add_adapter(model, LoraConfig(r=2, target_modules=["qkv_proj", "q_proj", "o_proj", "up_proj"], init_lora_weights=False))
        model.recompute = recompute
        given = None if mask is None else np.ascontiguousarray(mask)
        if not whole:
            y = model(IDS, attention_mask=given)
        else:
            x = model.hidden(IDS, attention_mask=given)
            last = [5 if given is None else np.flatnonzero(row)[-1] for row in (IDS if given is None else given)]
            x = x[np.arange(2), [0, 0] if model.pooler is not None else last]
            y = model.classifier(x if model.pooler is None else tanh(model.pooler(x)))
        (y * y).sum().backward()
        return to_host(y), {path: to_host(p.grad) for path, p in model.named_parameters(trainable=True)}

    (y, gradients), (expected, by_path) = step(False), step(True)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    assert gradients.keys() == by_path.keys() and all(np.abs(g).max() > 0 for g in gradients.values())
    for path, g in gradients.items():
        np.testing.assert_allclose(g, by_path[path], rtol=1e-10, atol=1e-12)


def test_the_first_position_of_a_causal_classifier_sees_nothing_that_comes_after(device):
    model = build("gpt2", n_labels=3, head="sequence", pooler="tanh")
    later = np.concatenate([IDS[:, :1], np.full_like(IDS[:, 1:], 5)], axis=1)
    np.testing.assert_allclose(logits_of(model, later), logits_of(model, IDS), rtol=1e-12)


@pytest.mark.parametrize("form", ["bert-sequence", "llama-sequence"])
def test_last_does_not_move_what_a_classifier_reads(device, form):
    model = build(form)
    expected = logits_of(model, IDS, attention_mask=MASK)
    np.testing.assert_array_equal(logits_of(model, IDS, attention_mask=MASK, last=True), expected)


@pytest.mark.parametrize("mask", [np.array(1), np.ones((2, 0)), np.ones((2, 6, 0)), np.ones((2, 5))], ids=np.shape)
def test_a_classifier_names_the_mask_that_does_not_fit(mask):
    with pytest.raises(ValueError, match=r"attention_mask of shape .* expected \(2, 6\)"):
        build("llama-sequence")(IDS, attention_mask=mask)


@pytest.mark.parametrize("form", ["bert-sequence", "llama-sequence"])
def test_the_last_layer_works_for_the_position_that_is_read(device, form):
    model, seen = build(form), []
    mlp = model.layers[-1].mlp
    model.layers[-1].mlp = lambda x: seen.append(x.shape) or mlp(x)
    model(IDS)
    assert seen == [(2, 1, D)]


@pytest.mark.parametrize("form", GENERATIVE)
def test_the_logits_of_the_last_position_alone(device, form):
    model = build(form)
    for mask in None, MASK[:, ::-1]:
        whole = logits_of(model, IDS, attention_mask=mask)
        np.testing.assert_allclose(logits_of(model, IDS, attention_mask=mask, last=True), whole[:, -1:], rtol=1e-12)


def test_token_types_matter_and_are_zero_if_left_out(device):
    model = build("bert-token")
    plain = logits_of(model, IDS)
    np.testing.assert_array_equal(logits_of(model, IDS, token_type_ids=np.zeros_like(IDS)), plain)
    assert (logits_of(model, IDS, token_type_ids=TYPES) != plain).any()


# The key-value cache and generation

@pytest.mark.parametrize("form", GENERATIVE)
@pytest.mark.parametrize("cuts", [(6,), (1, 1, 1, 1, 1, 1), (3, 1, 2), (1, 5)])
def test_logits_with_the_cache_are_the_logits_without(device, form, cuts):
    model, mask = build(form), np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]])
    for key_mask in (None, mask):
        whole = logits_of(model, IDS, attention_mask=key_mask)
        cache, at, parts = model.new_cache(), 0, []
        for n in cuts:
            seen = None if key_mask is None else key_mask[:, : at + n]
            parts.append(logits_of(model, IDS[:, at : at + n], cache=cache, attention_mask=seen))
            at += n
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-12)


def test_the_cache_refuses_to_swallow_gradients(device):
    model = build("gpt2")
    with pytest.raises(RuntimeError, match=r"cache passes no gradients.*no_grad"):
        model(IDS, cache=model.new_cache())


def greedy(model: Transformer, ids: np.ndarray, new: int) -> np.ndarray:
    """Generation by the definition: all logits again for every token."""
    for _ in range(new):
        ids = np.concatenate([ids, logits_of(model, ids)[:, -1].argmax(-1)[:, None]], axis=1)
    return ids


@pytest.mark.parametrize("form", GENERATIVE)
def test_greedy_generation_is_the_recomputed_one(device, form):
    model = build(form, seed=GENERATIVE[form])
    got = generate(model, IDS[:, :3], 7)
    np.testing.assert_array_equal(got, greedy(model, IDS[:, :3], 7))
    assert got.dtype == np.int64 and got.shape == (2, P)
    assert len(np.unique(got[:, 3:])) > 2                      # not one token over and over: the comparison means something
    np.testing.assert_array_equal(generate(model, IDS[1:, :3], 7), got[1:])      # rows do not depend on each other
    np.testing.assert_array_equal(generate(model, IDS, 0), IDS)
    np.testing.assert_array_equal(np.stack(list(stream(model, IDS[:, :3], 7)), axis=1), got[:, 3:])


@pytest.mark.parametrize("form", GENERATIVE)
def test_prompts_of_different_lengths_give_each_row_what_it_gives_alone(device, form):
    model, prompts = build(form, seed=GENERATIVE[form]), [[3, 1, 4, 1], [5], [9, 2], [6, 5, 3, 5]]
    ids, mask = left_padded(prompts, pad_token_id=7)
    got = generate(model, ids, 6, attention_mask=mask)
    assert len(np.unique(got[:, 4:])) > 2
    for row, prompt in zip(got, prompts, strict=True):
        np.testing.assert_array_equal(row[4 - len(prompt) :], generate(model, [prompt], 6)[0])


def test_left_padding_is_the_prompts_with_nothing_lost():
    ids, mask = left_padded([[3, 1, 4], [5]], pad_token_id=7)
    np.testing.assert_array_equal(ids, [[3, 1, 4], [7, 7, 5]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}, {"top_k": 1, "top_p": 0.5}])
def test_sampling_from_one_token_is_greedy(options):
    model = build("llama")
    sampled = generate(model, IDS[:, :3], 7, **{"temperature": 0.7, "seed": 3} | options)
    np.testing.assert_array_equal(sampled, greedy(model, IDS[:, :3], 7))


def test_the_seed_decides(device):
    model = build("gpt2")
    one, two, three = (generate(model, IDS[:, :2], 8, temperature=3.0, seed=s) for s in (5, 5, 6))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three)
    np.testing.assert_array_equal(generate(model, IDS[:, :2], 8, temperature=3.0, seed=np.random.default_rng(5)), one)


def test_a_row_that_is_finished_is_filled_and_the_last_one_ends_it(device):
    model, options = build("llama"), {"temperature": 2.0, "seed": 3}   # a seed with rows that end, and some that do not
    prompts = np.concatenate([IDS, IDS[:, ::-1]])[:, :2]
    free, kinds = generate(model, prompts, 8, **options), set()
    for eos in (*np.unique(free[:, 2:]).tolist(), 99):
        got = generate(model, prompts, 8, eos_token_id=eos, **options)
        ends = [next((i for i in range(2, P) if row[i] == eos), P) for row in free]      # where each row first says it
        assert got.shape == (4, min(P, max(ends) + 1))
        for row, whole, end in zip(got, free, ends):
            np.testing.assert_array_equal(row[:end], whole[: min(end, row.size)])
            assert (row[end:] == eos).all()
            kinds.add("filled" if (whole[end:] != eos).any() else "nothing to fill")
        kinds.add("all ended" if max(ends) < P - 1 else "ran to the end")
    assert kinds == {"filled", "nothing to fill", "all ended", "ran to the end"}


def assert_frequencies(tokens: np.ndarray, p: np.ndarray) -> None:
    """Pearson's χ² stays within five standard deviations of its mean; nothing of probability 0 was drawn."""
    counts = np.bincount(tokens, minlength=p.size)
    assert not counts[p == 0].any()
    expected = (p * tokens.size)[p > 0]
    freedom = expected.size - 1
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 <= freedom + 5 * np.sqrt(2 * freedom)


def test_sampled_frequencies_are_the_softmax():
    logits = np.array([1.0, -0.5, 2.0, 0.0, 2.5])
    many = np.tile(logits, (20_000, 1))
    for temperature in (0.5, 1.0, 2.0):
        p = to_host(softmax(tensor(logits / temperature)))
        assert_frequencies(choose(many, temperature, None, None, np.random.default_rng(0)), p)
        with pytest.raises(AssertionError):                    # the bound can tell another temperature
            assert_frequencies(choose(many, temperature * 1.2, None, None, np.random.default_rng(0)), p)
    p = np.exp(logits) / np.exp(logits).sum()                  # descending: 2.5, 2, 1, 0, -0.5 at 4, 2, 0, 3, 1
    for top_k, top_p, allowed in ((2, None, [4, 2]), (4, None, [4, 2, 0, 3]), (99, None, [4, 2, 0, 3, 1]),
                                  (None, 1.0, [4, 2, 0, 3, 1]), (None, p[4] - 1e-9, [4]), (None, p[4] + 1e-9, [4, 2]),
                                  (None, 1 - p[1] - 1e-9, [4, 2, 0, 3]), (3, 0.99, [4, 2, 0]), (2, 0.6, [4])):
        kept = np.zeros(5)
        kept[allowed] = p[allowed] / p[allowed].sum()
        assert_frequencies(choose(many, 1.0, top_k, top_p, np.random.default_rng(1)), kept)


def test_generation_leaves_the_model_as_it_was(device):
    model = build("gpt2", dropout=0.5)
    model.train()
    before = model.state_dict()
    np.testing.assert_array_equal(generate(model, IDS[:, :3], 3), generate(model, IDS[:, :3], 3))        # no dropout in it
    assert all(m.training for _, m in model.named_modules())
    assert not any(m.training for _, m in model.eval().named_modules())
    generate(model, IDS[:, :3], 2)
    assert not model.training
    for path, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize(("arguments", "options", "message"), [
    ((IDS, 5), {}, r"plus 5 new tokens: expected .* max_len = 10"),
    ((IDS, -1), {}, "-1 new tokens"),
    ((IDS[0], 1), {}, r"shape \(6,\)"),
    ((IDS, 1), {"temperature": -0.1}, "temperature >= 0"),
    ((IDS, 1), {"temperature": 1.0, "top_k": 0}, "top_k >= 1"),
    ((IDS, 1), {"temperature": 1.0, "top_p": 0.0}, "0 < top_p <= 1"),
    ((IDS, 1), {"temperature": 1.0, "top_p": 1.1}, "0 < top_p <= 1"),
    ((IDS, 1), {"attention_mask": MASK}, "pad on the left"),
    ((IDS, 1), {"attention_mask": np.array([[1, 0, 1, 1, 1, 1]] * 2)}, "pad on the left"),
    ((IDS, 1), {"attention_mask": np.zeros_like(IDS)}, "pad on the left"),
    ((IDS, 1), {"attention_mask": MASK[:1]}, r"shape \(1, 6\): expected \(2, 6\)"),
    ((IDS, 1), {"adapter_names": ["a", "__base__"]}, "no adapter named 'a'"),
])
def test_what_generation_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build("gpt2"), *arguments, **options)


@pytest.mark.parametrize("form", ["bert-token", "llama-sequence"])
def test_generation_needs_a_causal_language_model(form):
    with pytest.raises(ValueError, match="causal model with a language-modelling head"):
        generate(build(form), IDS, 1)


# Parameters: names, counts, packing, state

def count(model: Transformer) -> int:
    return sum(p.size for _, p in model.named_parameters())


def closed_form(form: str, *, V: int, D: int, L: int, F: int, P: int = 0, kv: int = 0, labels: int = 0,
                tied: bool = False) -> int:
    if form == "llama":                                        # no biases; q and o, k and v, three MLP matrices, two norms
        return V * D * (1 if tied else 2) + L * (2 * D * D + 2 * D * kv + 3 * D * F + 2 * D) + D
    layer = 4 * D * D + 4 * D + 2 * D * F + F + D + 4 * D      # attention, MLP, two norms
    if form == "gpt2":
        return V * D + P * D + L * layer + 2 * D
    return V * D + P * D + 2 * D + 2 * D + L * layer + D * D + D + labels * D + labels   # types, norm; pooler, classifier


def test_parameter_counts_in_closed_form():
    assert count(build("gpt2")) == closed_form("gpt2", V=V, D=D, L=L, F=4 * D, P=P)
    assert count(build("bert-sequence")) == closed_form("bert", V=V, D=D, L=L, F=4 * D, P=P, labels=4)
    assert count(build("bert-token")) == closed_form("bert", V=V, D=D, L=L, F=4 * D, P=P, labels=4) - D * D - D
    assert count(build("llama")) == closed_form("llama", V=V, D=16, L=L, F=20, kv=8)
    assert count(build("llama", tie_embeddings=True)) == closed_form("llama", V=V, D=16, L=L, F=20, kv=8, tied=True)
    # The forms are those of the published models: GPT-2 small, BERT base (no classifier), Llama 2 7B, SmolLM2 135M.
    assert closed_form("gpt2", V=50257, D=768, L=12, F=3072, P=1024) == 124_439_808
    assert closed_form("bert", V=30522, D=768, L=12, F=3072, P=512) == 109_482_240
    assert closed_form("llama", V=32000, D=4096, L=32, F=11008, kv=4096) == 6_738_415_616
    assert closed_form("llama", V=49152, D=576, L=30, F=1536, kv=192, tied=True) == 134_515_008


def test_names_are_the_documented_ones():
    names = [path for path, _ in build("gpt2").named_parameters()]
    layer = [f"{part}.{leaf}" for part in ("attn_norm", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp_norm",
                                           "mlp.up_proj", "mlp.down_proj") for leaf in ("weight", "bias")]
    assert sorted(names) == sorted(["embed.weight", "pos_embed.weight", "final_norm.weight", "final_norm.bias",
                                    *(f"layers.{i}.{name}" for i in range(L) for name in layer)])
    model = build("llama")
    assert {"", "embed", "layers.1.mlp.gate_proj", "layers.0.attn.qkv_proj", "layers.0.attn.q_proj", "final_norm",
            "head"} <= set(dict(model.named_modules()))
    assert {"embed_norm", "type_embed", "pooler", "classifier"} <= set(dict(build("bert-sequence").named_modules()))
    assert model.get_module("layers.1.attn.k_proj") is model.layers[1].attn.k_proj
    with pytest.raises(KeyError, match=r"no module 'layers\.7"):
        model.get_module("layers.7.attn.k_proj")


def test_tied_embeddings_are_one_parameter_listed_once(device):
    model = build("gpt2")
    assert model.head.weight is model.embed.weight
    names = [path for path, _ in model.named_parameters()]
    assert names.count("embed.weight") == 1 and "head.weight" not in names
    assert len({id(p) for _, p in model.named_parameters()}) == len(names)
    loss_of(model, "gpt2").backward()                          # its gradient has both parts: no row is left without
    assert (to_host(model.embed.weight.grad) != 0).any(axis=1).all()
    free = build("gpt2", tie_embeddings=False)
    assert free.head.weight is not free.embed.weight and "head.weight" in dict(free.named_parameters())


def assert_packed(model: Transformer) -> None:
    """q, k and v are views of the packed arrays, and the packed product follows what is written to any of them."""
    for layer in model.layers:
        packed, x = layer.attn.qkv_proj, np.random.default_rng(0).standard_normal((2, model.cfg.d_model))
        x = to_device(x.astype(packed.packed_weight.dtype), model_device(model))
        ends = np.cumsum(list(packed.sizes.values()))
        for name, block, rows in zip(packed.sizes, packed.blocks.values(), np.split(np.arange(ends[-1]), ends[:-1])):
            assert getattr(layer.attn, name) is block
            before = to_host(packed(Tensor(x)))
            block.weight.data[...] = block.weight.data + 1.0
            if block.bias is not None:
                block.bias.data[...] = block.bias.data - 3.0
            after = to_host(packed(Tensor(x)))
            moved = to_host(x).sum(axis=1, keepdims=True) - (3.0 if block.bias is not None else 0.0)
            np.testing.assert_allclose(after[:, rows], before[:, rows] + moved, rtol=0, atol=1e-5)
            others = np.setdiff1d(np.arange(before.shape[1]), rows)
            np.testing.assert_array_equal(after[:, others], before[:, others])
            np.testing.assert_allclose(to_host(block(Tensor(x))), after[:, rows], rtol=0, atol=1e-5)


def model_device(model: Transformer) -> str:
    return next(name for name in ("cpu", "fake", "gpu")
                if isinstance(model.embed.weight.data, get_device(name).array_type))


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_the_blocks_are_views_of_the_packed_weight(device, form):
    model = build(form)
    assert_packed(model)
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    assert_packed(model)
    packed = model.layers[0].attn.qkv_proj                     # and the other way round
    packed.packed_weight[...] = 0.25
    assert (to_host(model.layers[0].attn.k_proj.weight.data) == 0.25).all()


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_copies_are_independent_and_packed_themselves(device, form):
    model = build(form)
    before, logits = model.state_dict(), logits_of(model, IDS)
    others = [copy.deepcopy(model)] + ([pickle.loads(pickle.dumps(model))] if device == "cpu" else [])
    for other in others:
        np.testing.assert_array_equal(logits_of(other, IDS), logits)
        assert (other.head.weight is other.embed.weight) == model.cfg.tie_embeddings
        assert_packed(other)                                   # writes to the copy
        assert not np.array_equal(logits_of(other, IDS), logits)
        np.testing.assert_array_equal(logits_of(model, IDS), logits)
        for path, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize("form", ["gpt2", "llama", "bert-sequence"])
def test_moving_keeps_values_views_and_ties(device, form):
    model = build(form)
    logits = logits_of(model, IDS)
    for target in (device, "fake", "cpu", device):
        assert model.to(target) is model
        assert model_device(model) == target
        np.testing.assert_allclose(logits_of(model, IDS, **inputs_of(form) | {"attention_mask": None, "token_type_ids": None}),
                                   logits, rtol=0, atol=1e-12)
        if form == "gpt2":
            assert model.head.weight is model.embed.weight
        loss_of(model, form).backward()
        assert all(isinstance(p.grad, get_device(target).array_type) for _, p in model.named_parameters())
    assert_packed(model)


def test_to_the_device_where_it_is_keeps_the_arrays(device):
    model = build("gpt2")
    array, packed = model.embed.weight.data, model.layers[0].attn.qkv_proj.packed_weight
    model.to(device)
    assert model.embed.weight.data is array and model.layers[0].attn.qkv_proj.packed_weight is packed
    assert_packed(model)


def test_state_round_trip(device):
    for form in FORMS:
        model, other = build(form, seed=0), build(form, seed=1)
        arrays = {path: p.data for path, p in other.named_parameters()}
        state = model.state_dict()
        assert all(isinstance(v, np.ndarray) for v in state.values())
        other.load_state_dict(state)
        np.testing.assert_array_equal(logits_of(other, IDS, **inputs_of(form)), logits_of(model, IDS, **inputs_of(form)))
        assert all(p.data is arrays[path] for path, p in other.named_parameters())       # written in place
        state["embed.weight"] += 1.0                           # a copy: the model does not follow
        assert not np.array_equal(model.state_dict()["embed.weight"], state["embed.weight"])


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda s: s.pop("layers.0.attn.q_proj.weight"), KeyError, "missing layers.0.attn.q_proj.weight, unexpected none"),
    (lambda s: s.update(extra=np.zeros(1)), KeyError, "missing none, unexpected extra"),
    (lambda s: [s.pop(k) for k in list(s)[:5]], KeyError, "and 2 more"),
    (lambda s: s.update({"final_norm.bias": np.zeros(D + 1)}), ValueError, r"bias: got shape \(13,\), expected \(12,\)"),
    (lambda s: s.update({"final_norm.bias": np.array(["x"] * D)}), ValueError, "could not convert"),
])
def test_a_state_that_does_not_fit_changes_nothing(device, change, error, message):
    model = build("gpt2")
    before, state = model.state_dict(), build("gpt2", seed=1).state_dict()
    change(state)
    with pytest.raises(error, match=message):
        model.load_state_dict(state)
    for path, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[path])


def test_the_seed_decides_the_initial_weights_on_every_device(device):
    one, two, three = (Transformer(FORMS["llama"], seed=s).state_dict() for s in (0, 0, 1))
    assert all(np.array_equal(one[k], two[k]) for k in one) and not np.array_equal(one["embed.weight"], three["embed.weight"])
    wide = Transformer(TransformerConfig.gpt2(vocab_size=200, d_model=64, n_layers=8, n_heads=4)).state_dict()
    # the deviation of 12,800 draws has a standard error of 0.6 %, that of the 16,384 below 0.55 %
    assert wide["embed.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert wide["layers.3.mlp.down_proj.weight"].std() == pytest.approx(0.02 / 4, rel=0.05)              # / √(2 L)
    assert not wide["layers.3.mlp.down_proj.bias"].any() and (wide["final_norm.weight"] == 1).all()


def test_dropout_works_in_training_only_and_from_the_seed(device):
    runs = []
    for _ in range(2):
        model = build("gpt2", dropout=0.3)
        plain = logits_of(model.eval(), IDS)
        model.train()
        runs.append([logits_of(model, IDS), logits_of(model, IDS)])
        assert (runs[-1][0] != plain).any() and (runs[-1][0] != runs[-1][1]).any()
        np.testing.assert_array_equal(logits_of(model.eval(), IDS), plain)
        assert len(list(model.named_generators())) == 1
    np.testing.assert_array_equal(runs[0], runs[1])


# float32, and no waiting for the device

@pytest.mark.parametrize("form", FORMS)
def test_no_float64_array_appears_in_a_float32_step(device, form, monkeypatch):
    """All results of ops and all gradients; the stand-in device also raises at any float64 inside them."""
    seen: list[tuple[str, Any]] = []
    call, pull = Op.__call__, Op.pull

    def recorded_call(self: Op, *inputs: Any) -> Any:
        result = call(self, *inputs)
        seen.extend((type(self).__name__, y.dtype) for y in (result if isinstance(result, tuple) else (result,)))
        return result

    def recorded_pull(self: Op, *args: Any) -> Any:
        for edge, gradient in pull(self, *args):
            seen.append((f"gradient of {type(self).__name__}", gradient.dtype))
            yield edge, gradient

    model = build(form, "float32", dropout=0.1)
    monkeypatch.setattr(Op, "__call__", recorded_call)
    monkeypatch.setattr(Op, "pull", recorded_pull)
    loss_of(model, form).backward()
    assert len(seen) > 40 and {d for _, d in seen} == {np.dtype("float32")}, [s for s in seen if s[1] != "float32"]
    assert {p.grad.dtype for _, p in model.named_parameters()} == {np.dtype("float32")}
    exact = build(form)
    np.testing.assert_allclose(logits_of(model.eval(), IDS, **inputs_of(form)), logits_of(exact, IDS, **inputs_of(form)),
                               rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_never_waits_for_the_device(form):
    model = build(form, "float32", dropout=0.1).to("fake")
    with fake_device.count() as counts:
        loss_of(model, form).backward()
    assert counts.syncs == 0 and counts.launches > 50


# What is refused

@pytest.mark.parametrize(("ids", "inputs", "error", "message"), [
    (IDS + 8, {}, IndexError, r"id 20 is out of range: expected 0\.\.12"),
    (IDS - 1, {}, IndexError, "id -1 is out of range"),
    (np.zeros((1, P + 1), int), {}, ValueError, "sequence of 11 tokens, expected at most max_len = 10"),
    (IDS.astype(float), {}, TypeError, "integers, got float64"),
    (IDS == 1, {}, TypeError, "integers, got bool"),
    (IDS[0], {}, ValueError, r"ids of shape \(6,\), expected \(B, T\)"),
    (np.array(3), {}, ValueError, r"ids of shape \(\), expected \(B, T\)"),
    (np.zeros((0, 3), int), {}, ValueError, "at least one token"),
    (np.zeros((2, 0), int), {}, ValueError, "at least one token"),
    (IDS, {"attention_mask": MASK[:, :5]}, ValueError, r"attention_mask of shape \(2, 5\), expected \(2, 6\)"),
    (IDS, {"attention_mask": MASK[0]}, ValueError, "attention_mask of shape"),
    (IDS, {"token_type_ids": TYPES[:, :5]}, ValueError, r"token_type_ids of shape \(2, 5\), expected \(2, 6\)"),
    (IDS, {"token_type_ids": TYPES + 1}, IndexError, "id 2 is out of range"),
    (IDS, {"position_ids": IDS[:1]}, ValueError, r"position_ids of shape \(1, 6\), expected \(2, 6\)"),
    (IDS, {"position_ids": IDS + 8}, IndexError, "id 20 is out of range"),
    (IDS, {"adapter_names": ["a"]}, ValueError, "1 adapter names for a batch of 2"),
    (IDS, {"adapter_names": ["a", "__base__"]}, ValueError, "no adapter named 'a'"),
])
def test_inputs_that_do_not_fit(device, ids, inputs, error, message):
    with pytest.raises(error, match=message):
        build("bert-sequence")(ids, **inputs)


def test_types_need_a_table_and_a_cache_its_room():
    model = build("gpt2")
    with pytest.raises(ValueError, match="a model with n_token_types > 0"):
        model(IDS, token_type_ids=TYPES)
    with pytest.raises(ValueError, match='a model with position "learned"'):
        build("llama")(IDS, position_ids=IDS)
    cache = model.new_cache()
    with no_grad():
        model(IDS, cache=cache)
        with pytest.raises(ValueError, match="sequence of 12 tokens"):
            model(IDS, cache=cache)
        with pytest.raises(ValueError, match=r"expected \(2, 9\)"):
            model(IDS[:, :3], cache=cache, attention_mask=MASK[:, :3])


@pytest.mark.parametrize(("fields", "message"), [
    ({"vocab_size": 0}, "vocab_size = 0: expected a whole number"),
    ({"d_model": 12.0}, "d_model = 12.0"),
    ({"n_layers": -1}, "n_layers = -1"),
    ({"n_heads": 5}, "d_model 12 is not a multiple of n_heads 5"),
    ({"n_kv_heads": 2}, "n_heads 3 is not a multiple of n_kv_heads 2"),
    ({"n_kv_heads": 0}, "n_kv_heads = 0"),
    ({"d_ff": 0}, "d_ff = 0"),
    ({"max_len": 0}, "max_len = 0"),
    ({"norm": "batchnorm"}, "norm = 'batchnorm': expected one of layernorm, rmsnorm"),
    ({"position": "alibi"}, "position = 'alibi'"),
    ({"mlp": "relu"}, "mlp = 'relu'"),
    ({"head": "mlm"}, "head = 'mlm'"),
    ({"head": "token"}, "head 'token' needs n_labels, got None"),
    ({"n_labels": 0}, "needs n_labels, got 0"),
    ({"dropout": 1.0}, "dropout = 1.0: expected 0 <= p < 1"),
    ({"position": "rope", "n_heads": 4}, "even head width, got head_dim = 3"),
])
def test_configs_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**SIZES | fields)


def test_a_config_is_complete_and_survives_a_round_trip():
    for cfg in FORMS.values():
        assert TransformerConfig(**cfg.to_dict()) == cfg
    with pytest.raises(TypeError):
        TransformerConfig(13, 12, 2, 3)                        # keyword-only
    cfg = TransformerConfig(**SIZES)
    assert (cfg.n_kv_heads, cfg.d_ff, cfg.head_dim, cfg.bias, cfg.qkv_bias, cfg.head) == (3, 48, 4, True, True, "lm")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-sequence", "bert-token"])
def test_loss_is_the_cross_entropy_of_the_logits(name, device, rng):
    """Whatever the head, frozen (then the logits are never whole), adapted or trained."""
    cfg = FORMS[name]
    model = Transformer(cfg, seed=0, dtype="float64")
    ids = rng.integers(0, cfg.vocab_size, (3, 4))
    shape, classes = (ids.shape, cfg.vocab_size) if cfg.n_labels is None else (
        (3,) if cfg.head == "sequence" else ids.shape, cfg.n_labels)
    targets, mask = rng.integers(0, classes, shape), np.ones((3, 4), np.int64)
    mask[1, 2:] = 0
    for prepare in (model.freeze, lambda: add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"])), model.unfreeze):
        prepare()
        want = cross_entropy(model(ids, attention_mask=mask), targets, label_smoothing=0.1)
        loss = model.loss(ids, targets, attention_mask=mask, label_smoothing=0.1)
        assert loss.item() == pytest.approx(want.item(), rel=1e-13)
        if loss.requires_grad:
            gradients = []
            for value in (want, loss):
                model.zero_grad()
                value.backward()
                gradients.append({n: to_host(p.grad) for n, p in model.named_parameters() if p.grad is not None})
            assert gradients[0].keys() == gradients[1].keys()
            for key in gradients[0]:
                np.testing.assert_allclose(gradients[1][key], gradients[0][key], rtol=1e-10, atol=1e-13)
