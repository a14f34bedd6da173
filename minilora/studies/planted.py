"""Two tasks whose right rank is known: what a rank-vs-quality curve looks like when there is a right answer.

Both are parts of the study rank-quality. All ranks train side by side along a leading axis K.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import Tensor, log_softmax, no_grad
from ..autograd.linear import LoRALinear
from ..backend import to_device, to_host
from ..data import PlantedLinear, planted_update
from ..lora import LoraConfig
from ..lora.lora import initial_factors
from ..nn import Parameter, Transformer, TransformerConfig
from ..training import AdamW, TrainConfig, schedule, sweep

PLANTED_RANK = 4


def planted_linear(steps: int, seed: int, d_out: int = 32, d_in: int = 24, ranks: int = 16) -> dict[str, Any]:
    """LoRA of rank 1 … `ranks` on one linear layer, against the Eckart-Young optimum.

    The inputs are exactly white, so the loss of an update is ‖s·B@A - ΔW*‖_F², and no update of rank r can be better than
    Σ_{i>r} σ_i². The hidden spectrum is σ_i = 2^(-i/4), 24 values, longer than the largest rank. AdamW, float64.
    """
    rng = np.random.default_rng(seed)
    task = PlantedLinear.create(d_out, d_in, [2.0 ** (-i / 4) for i in range(d_in)], rng, dtype="float64")
    A, B = np.zeros((ranks, ranks, d_in)), np.zeros((ranks, d_out, ranks))     # K adapters; rows beyond a rank stay zero
    for k in range(ranks):
        A[k, : k + 1], B[k, :, : k + 1] = initial_factors(True, d_out, d_in, k + 1, rng)
    lora_A, lora_B, W = Parameter(to_device(A)), Parameter(to_device(B)), to_device(task.W)
    optimizer = AdamW([lora_A, lora_B], lr=0.03, betas=(0.9, 0.99), weight_decay=0.0)
    losses = None
    for step in range(steps):
        x, y = task.batch(rng, d_in)                                           # (n, in), (n, out), fresh each step
        x_all = to_device(np.broadcast_to(x, (ranks, *x.shape)).copy())        # (K, n, in)
        error = LoRALinear([1.0], [slice(0, d_out)], [None])(x_all, W, None, lora_A, lora_B) - to_device(y)
        losses = (error * error).sum(axis=(1, 2)) * (1.0 / len(x))             # (K,)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step(schedule("cosine", step, steps, 0))
    final = to_host(losses)
    rows = [{"rank": k + 1, "loss": float(final[k]), "optimum": task.optimum(k + 1),
             "excess": float(final[k]) / task.optimum(k + 1) - 1.0} for k in range(ranks)]
    return {"steps": steps, "spectrum": [float(s) for s in task.spectrum], "rows": rows,
            "largest_excess": max(row["excess"] for row in rows)}


def planted_transformer(steps: int, seeds: list[int], ranks: list[int], d_model: int = 32, vocab: int = 64,
                        tokens: int = 12, batch: int = 24) -> dict[str, Any]:
    """LoRA on q and v of a small Transformer whose teacher differs by updates of rank 4 there: KL(teacher ‖ student).

    The teacher is the base plus, on q and v of every layer, an update with four equal singular values. A student of rank 4
    can be the teacher, one of rank 3 cannot. Data: uniformly random tokens; the loss is the KL divergence itself.
    """
    cfg = TransformerConfig.gpt2(vocab_size=vocab, d_model=d_model, n_layers=2, n_heads=2, max_len=tokens, tie_embeddings=False)
    base, teacher = _planted_pair(cfg, np.random.default_rng([PLANTED_RANK, seeds[0]]))

    def teach(ids: np.ndarray) -> np.ndarray:                                  # (B, T) -> log p of the teacher (B, T, V)
        with no_grad():
            return to_host(log_softmax(teacher(ids)).data)

    def task(step: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(0, vocab, (batch, tokens))
        return ids, teach(ids)

    test = np.random.default_rng(seeds).integers(0, vocab, (128, tokens))
    train = TrainConfig(steps=steps, schedule="cosine", betas=(0.9, 0.99))
    configs = [LoraConfig(r=r, lora_alpha=r, target_modules=["q_proj", "v_proj"]) for r in ranks]
    result = sweep(base, task, configs, seeds=seeds, lrs=[0.01], train=train, evaluate=[(test, teach(test))],
                   loss=kl_divergence)
    rows = [{"rank": r, "kl": [row["eval_loss"] for row in result.rows if row["rank"] == r]} for r in ranks]
    with no_grad():
        start = kl_divergence(base(test), teach(test), 1).item()
    return {"steps": steps, "planted_rank": PLANTED_RANK, "base": start, "rows": rows}


def kl_divergence(logits: Tensor, log_p: Any, groups: int) -> Tensor:
    """Mean over positions of KL(p ‖ softmax(logits)) in nats, for K groups of rows: (K·B, T, V) -> (K,)."""
    log_q = log_softmax(logits).reshape(groups, -1, logits.shape[-1])
    log_p = np.asarray(log_p, dtype=logits.dtype).reshape(log_q.shape)
    terms = (to_device(log_p) - log_q) * to_device(np.exp(log_p))
    return terms.sum(axis=(1, 2)) * (1.0 / log_q.shape[1])


def _planted_pair(cfg: TransformerConfig, rng: np.random.Generator) -> tuple[Transformer, Transformer]:
    """A base whose weights are large enough for attention to matter, and its teacher."""
    base, teacher = Transformer(cfg), Transformer(cfg)
    for path, p in base.named_parameters():
        if p.ndim == 2:
            std = 1.0 if "embed" in path else p.shape[1] ** -0.5
            p.data[...] = to_device((rng.standard_normal(p.shape) * std).astype(str(p.dtype)))
    teacher.load_state_dict(base.state_dict())
    for layer in teacher.layers:
        for block in (layer.attn.q_proj, layer.attn.v_proj):
            d_out, d_in = block.weight.shape
            block.weight.data[...] += to_device(planted_update(d_out, d_in, [2.0] * PLANTED_RANK, rng))
    return base, teacher
