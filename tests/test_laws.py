"""Laws of LoRA's training that hold exactly or on average, whatever the data: LoRA Without Regret, rsLoRA."""

import numpy as np
import pytest

import minilora as ml
from minilora.autograd import lora_linear, tensor
from minilora.lora import adapters_of
from minilora.training import AdamW

CFG = ml.TransformerConfig.llama(vocab_size=17, d_model=12, n_layers=2, n_heads=2, max_len=8)


def losses_of(alpha, scale_A, rates, epsilons, steps=50):
    """Training with A's start, the rates and the epsilons of (A, B) as given; float64."""
    model = ml.Transformer(CFG, seed=0, dtype="float64")
    ml.add_adapter(model, ml.LoraConfig(r=3, lora_alpha=alpha, target_modules="all-linear"), seed=1)
    As, Bs = zip(*[(adapter.lora_A, adapter.lora_B) for adapter in adapters_of(model, "default").values()])
    for A in As:
        A.data *= scale_A
    optimizer = AdamW([{"params": params, "lr": lr, "eps": eps} for params, lr, eps in zip((As, Bs), rates, epsilons)],
                      lr=1e-3, weight_decay=0.0)
    ids, found = np.random.default_rng(2).integers(0, 17, (4, 8)), []
    for _ in range(steps):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return np.array(found)


@pytest.mark.parametrize("p, q", [(3.0, 0.5), (0.1, 7.0)])
def test_adam_does_not_see_how_alpha_the_start_and_the_rates_share_a_factor(p, q):
    """α → α/(pq), A → pA, lr_A → p lr_A, lr_B → q lr_B, ε_A → ε/p, ε_B → ε/q changes nothing (LoRA Without Regret)."""
    eps, lr = 1e-8, 1e-2
    plain = losses_of(6.0, 1.0, (lr, lr), (eps, eps))
    assert plain[-1] < plain[0] - 0.1                                        # it does learn
    same = losses_of(6.0 / (p * q), p, (p * lr, q * lr), (eps / p, eps / q))
    np.testing.assert_allclose(same, plain, rtol=0, atol=1e-10)
    for other in (losses_of(6.0, p, (p * lr, q * lr), (eps / p, eps / q)), losses_of(6.0 / (p * q), p, (lr, lr), (eps, eps))):
        assert abs(other - plain).max() > 1e-3                               # a part of it alone is another training


def first_updates(r, scale, seeds, G):
    """s·B₁A₀ after one step of Adam (a step of size 1 by sign) from B = 0, for each seed; the loss is ⟨G, ΔW⟩."""
    (d, k), found = G.shape, []
    for seed in range(seeds):
        A = tensor(np.random.default_rng([seed, r]).uniform(-1, 1, (r, k)) / k**0.5, True)
        B = tensor(np.zeros((d, r)), True)
        optimizer = AdamW([B], lr=1.0, eps=1e-30, weight_decay=0.0)
        (lora_linear(tensor(np.eye(k)), tensor(np.zeros((d, k))), None, A, B, scale) * tensor(G.T)).sum().backward()
        optimizer.step()
        found.append(scale * B.data @ A.data)
    return np.array(found)                                                   # (seeds, d, k)


def test_the_expected_first_update_is_the_same_at_every_rank():
    """E[(α/r) B₁A₀] does not depend on r (LoRA Without Regret): its r terms are drawn alike, and s divides by r."""
    G, seeds = np.random.default_rng(0).standard_normal((6, 8)), 1500

    def distance(first, second):
        """Of the two means over seeds, in units of what chance leaves between equal expectations."""
        noise = sum(updates.var(axis=0).sum() / len(updates) for updates in (first, second)) ** 0.5
        return np.linalg.norm(first.mean(axis=0) - second.mean(axis=0)) / noise

    found = {r: first_updates(r, 32.0 / r, seeds, G) for r in (1, 4, 16)}
    assert distance(found[1], found[16]) < 1.3 and distance(found[4], found[16]) < 1.3
    assert distance(first_updates(4, 32.0 / 4**0.5, seeds, G), found[16]) > 10             # with α/√r it is another


def test_rslora_answers_of_one_size_at_every_rank():
    """‖ΔW x‖ on new inputs after one step of Adam: with s = α/√r the same at every rank, with s = α/r smaller at high ones."""
    rng = np.random.default_rng(0)
    k, d, x_new = 256, 8, rng.standard_normal((200, 256))
    size = {"r": [], "sqrt": []}
    for name, power in (("r", 1.0), ("sqrt", 0.5)):
        for r in (4, 16, 64, 256):
            values = []
            for seed in range(12):
                dy, x = np.random.default_rng(seed).standard_normal((2, k))
                update, = first_updates(r, 32.0 / r**power, 1, np.outer(dy[:d], x))
                values.append(np.linalg.norm(x_new @ update.T))
            size[name].append(np.mean(values))
    assert max(size["sqrt"]) < 1.6 * min(size["sqrt"])
    assert size["r"][0] > 4.0 * size["r"][-1] and size["r"] == sorted(size["r"], reverse=True)
