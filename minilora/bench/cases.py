"""What is measured: a case is a model, a batch, the adapters, and how often. Both sides read their whole task from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..lora import LoRA, LoraConfig, adapters_of, add_adapter, delete_adapter
from ..lora.config import module_names
from ..nn import Transformer, TransformerConfig
from ..nn.names import export_state

LR = 1e-3
WEIGHT_DECAY = 0.01                                        # of AdamW, on both sides


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    kind: "step" (forward, backward, AdamW of one adapter), "sweep" (the same of an adapter for every rank and seed: one
    batched run of minilora, one adapter after another with PEFT), or "decode" (greedy generation with a key-value cache).
    tokens: T of a batch, or of the prompt; new_tokens: generated. targets: our module names ("all-linear" as well); none for
    a plain base; a decoding model has its adapter merged. rounds turns of `steps` timed steps each, where a step's time is the
    mean of `updates` (a sweep sets itself up anew each time). tf32: let products in float32 round their inputs to 10 bits, as
    both libraries may on a GPU.
    """

    kind: str
    config: TransformerConfig
    batch: int
    tokens: int
    targets: tuple[str, ...] | str
    ranks: tuple[int, ...] = (8,)
    seeds: tuple[int, ...] = (0,)
    new_tokens: int = 0
    rounds: int = 20
    steps: int = 5
    updates: int = 1
    device: str = "cpu"
    tf32: bool = False

    def cells(self) -> list[tuple[LoraConfig, int]]:
        """(config, seed) of every adapter, in the order of `ml.sweep`."""
        if not self.targets:
            return []
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        zero = self.kind != "decode"                       # a merged adapter has to change something
        configs = [LoraConfig(r=r, target_modules=targets, init_lora_weights=zero) for r in self.ranks]
        return list(product(configs, self.seeds))

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Random ids (B, T) and targets (B, T), or labels (B,) for a classifier: the same for both sides."""
        rng = np.random.default_rng(0)
        while True:
            yield self.draw(0, rng)

    def draw(self, step: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One batch, in the form of a task of `ml.sweep`."""
        ids = rng.integers(0, self.config.vocab_size, (self.batch, self.tokens + 1))
        if self.config.n_labels is not None:
            return ids[:, :-1], rng.integers(0, self.config.n_labels, self.batch)
        return ids[:, :-1], ids[:, 1:]

    def tokens_per_step(self) -> int:
        """Tokens trained on in a step, by all adapters, or generated."""
        return self.batch * (self.new_tokens or self.tokens * len(self.cells()))

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Case:
        """The inverse of `to_dict`, also after a way through JSON."""
        tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**fields | tuples | {"config": TransformerConfig(**fields["config"])})


COURSE = TransformerConfig.gpt2(vocab_size=256, d_model=128, n_layers=4, n_heads=4, max_len=64)
MINILM = TransformerConfig.bert(vocab_size=30522, d_model=384, n_layers=6, n_heads=12, d_ff=1536, n_labels=2)
GPT2 = TransformerConfig.gpt2(vocab_size=50257, d_model=768, n_layers=12, n_heads=12)
SMOLLM2 = TransformerConfig.llama(vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536,
                                  max_len=2048, norm_eps=1e-5, rope_theta=100000.0, tie_embeddings=True)
WIDE = TransformerConfig.gpt2(vocab_size=50257, d_model=2048, n_layers=12, n_heads=16)
Q_V, PACKED = ("q_proj", "v_proj"), ("qkv_proj",)
RANKS = (1, 2, 4, 8, 16, 32, 48, 64)

CASES = {
    "course": Case("step", COURSE, 32, 64, PACKED),
    "minilm": Case("step", MINILM, 16, 128, Q_V, rounds=10, steps=1),
    "gpt2": Case("step", GPT2, 4, 128, PACKED, rounds=7, steps=1),
    "smollm2": Case("step", SMOLLM2, 4, 128, Q_V, rounds=6, steps=1),
    "smollm2-all": Case("step", SMOLLM2, 4, 128, "all-linear", rounds=6, steps=1),
    "sweep": Case("sweep", COURSE, 16, 64, PACKED, RANKS, seeds=(0, 1), rounds=5, steps=1, updates=2),
    "decode": Case("decode", GPT2, 1, 16, (), new_tokens=128, rounds=3, steps=1),
    "decode-merged": Case("decode", GPT2, 1, 16, PACKED, new_tokens=128, rounds=3, steps=1),
    "gpu-d768": Case("step", GPT2, 16, 512, PACKED, device="gpu"),
    "gpu-d768-tf32": Case("step", GPT2, 16, 512, PACKED, device="gpu", tf32=True),
    "gpu-d2048": Case("step", WIDE, 8, 1024, PACKED, rounds=10, device="gpu"),
    "gpu-d2048-tf32": Case("step", WIDE, 8, 1024, PACKED, rounds=10, device="gpu", tf32=True),
    "gpu-sweep": Case("sweep", COURSE, 16, 64, PACKED, RANKS, seeds=(0, 1), rounds=10, updates=20, device="gpu"),
}
QUICK = ("course", "sweep", "gpu-d768", "gpu-sweep")       # small enough for a first look


def build(case: Case) -> Transformer:
    """minilora's model, without adapters."""
    return Transformer(case.config, seed=0)


def write_start(case: Case, folder: Path) -> None:
    """Write what the PyTorch side starts from: base.safetensors under transformers' names, and adapters.safetensors.

    An adapter's factors are called NUMBER/MODULE/lora_A and .../lora_B, the number counting the cells.
    """
    model = build(case)
    factors: dict[str, np.ndarray] = {}
    save_file(export_state(case.config, model.state_dict()), folder / "base.safetensors")
    for k, (config, seed) in enumerate(case.cells()):
        add_adapter(model, config, seed=seed)
        names = module_names(model)
        for path, adapter in adapters_of(model).items():
            if isinstance(adapter, LoRA):                  # a classifier that is trained starts as the base's
                factors |= {f"{k}/{names[path][-1]}/{name}": p.data for name, p in adapter.named_parameters()}
        delete_adapter(model, "default")
    save_file(factors, folder / "adapters.safetensors")
