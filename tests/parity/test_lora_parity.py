"""LoRA against PEFT on the three forms: which modules, what scale, the same logits, gradients, merges and training."""

from __future__ import annotations

import numpy as np
import pytest
from parity_twins import FORMS, TARGETS, close, copy_adapter, in_peft, logits_of, random_options, torch, twins

from minilora.autograd import cross_entropy
from minilora.backend import to_host
from minilora.lora import LoraConfig, add_adapter, merge_adapter, merge_and_unload, set_adapter, unmerge_adapter
from minilora.nn.names import export_state
from minilora.training import AdamW

CASES = [(name, i) for name, (form, _) in FORMS.items() for i in range(len(TARGETS[form]))]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.parametrize(("name", "i"), CASES)
def test_forward_gradients_and_merge(name, i, rng):
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    base = ours.state_dict()
    options = random_options(form, i, np.random.default_rng(1000 * i + len(name)))
    add_adapter(ours, LoraConfig(**options))
    wrapped = in_peft(theirs, ours.cfg, options)
    tensors = copy_adapter(ours, wrapped, rng=rng)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))

    mine, other = ours(ids), logits_of(wrapped, ids)
    close(mine.data, other.detach().numpy(), 1e-10, "logits")
    cotangent = rng.standard_normal(mine.shape)
    mine.backward(cotangent)
    other.backward(torch.from_numpy(cotangent))
    assert sum(p.size for _, p in ours.named_parameters(trainable=True)) == sum(a.size for a, _ in tensors)
    for a, b in tensors:
        expected = b.grad.numpy()
        if abs(expected).max() < 1e-12:                    # the key's bias-like directions, or types that are all 0
            assert abs(a.grad).max() < 1e-12
        else:
            close(a.grad, expected, 1e-9, "gradient")
    assert all(p.grad is None for _, p in ours.named_parameters(trainable=False))

    merge_adapter(ours)
    close(ours(ids).data, mine.data, 1e-10, "logits after merging")
    unmerge_adapter(ours)
    for path, value in base.items():                       # bit for bit
        np.testing.assert_array_equal(ours.state_dict()[path], value)
    plain = merge_and_unload(ours)
    close(plain(ids).data, mine.data, 1e-10, "logits of the merged model")
    tied = ours.cfg.tie_embeddings and ours.cfg.head == "lm"
    if not (tied and ours.embed.adaptation):               # PEFT would merge a tied table into the head too
        expected = {key: p.detach().numpy() for key, p in wrapped.merge_and_unload().named_parameters()}
        merged = export_state(plain.cfg, plain.state_dict())
        assert merged.keys() == expected.keys()
        for key in expected:
            close(merged[key], expected[key], 1e-12, key)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-sequence"])
def test_two_adapters_add_up_or_share_a_batch(name, rng):
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    first = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[form][2]}
    second = {"r": 2, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"}
    add_adapter(ours, LoraConfig(**first), "first")
    add_adapter(ours, LoraConfig(**second), "second")
    wrapped = in_peft(theirs, ours.cfg, first, "first")
    wrapped = in_peft(wrapped, ours.cfg, second, "second")
    for adapter in ("first", "second"):
        copy_adapter(ours, wrapped, adapter, rng)
    ids = rng.integers(1, ours.cfg.vocab_size, (3, 5))
    set_adapter(ours, ["first", "second"])
    if ours.cfg.head == "lm":                              # PEFT cannot add up two trained classifiers
        wrapped.base_model.set_adapter(["first", "second"])
        close(ours(ids).data, logits_of(wrapped, ids).detach().numpy(), 1e-10)
    rows = ["second", "__base__", "first"]                 # a mixed batch
    wrapped.eval()
    mixed = logits_of(wrapped, ids, adapter_names=rows).detach().numpy()
    close(ours(ids, adapter_names=rows).data, mixed, 1e-10)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_20_steps(name, dtype, rng):
    """The same 20 steps of AdamW from the same start: the same losses, and the same adapter at the end."""
    form, fields = FORMS[name]
    ours, theirs = twins(form, dtype, **fields)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    add_adapter(ours, LoraConfig(**options))
    wrapped = in_peft(theirs, ours.cfg, options)
    tensors = copy_adapter(ours, wrapped)                  # B = 0, the classifier the base's own
    mine = AdamW([p for _, p in ours.named_parameters(trainable=True)], lr=3e-3, weight_decay=0.05)
    other = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.05)
    losses = []
    for _ in range(20):
        ids = rng.integers(1, ours.cfg.vocab_size, (4, 8))
        labels = rng.integers(0, 3, {"lm": (4, 8), "token": (4, 8), "sequence": (4,)}[ours.cfg.head])
        mine.zero_grad()
        other.zero_grad()
        loss = cross_entropy(ours(ids), labels)
        logits = logits_of(wrapped, ids)
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.from_numpy(labels).reshape(-1))
        loss.backward()
        expected.backward()
        mine.step()
        other.step()
        losses.append((float(to_host(loss)), float(expected.detach())))
    for step, (a, b) in enumerate(losses):
        assert a == pytest.approx(b, rel=1e-5 if dtype == "float32" else 1e-9), f"step {step}"
    if dtype == "float64":
        for a, b in tensors:
            close(a.data, b.detach().numpy(), 1e-6)
