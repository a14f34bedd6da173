"""The parts of a Transformer layer: attention, MLP, and the two ways to put norms around them.

A part is chosen once, when the model is built (see `build_layer`), so no forward pass asks what kind of model it is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..autograd import Tensor, attention, feed_forward, gelu, gelu_tanh, rotary, split, swiglu
from ..backend import Array, array_module, device_of, to_device
from .config import TransformerConfig
from .layers import Dropout, LayerNorm, Linear, Module, PackedLinear, RMSNorm

ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh}
NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


@dataclass
class Run:
    """What one forward pass tells every layer: which keys are real, and where in the sequence this input begins."""

    key_mask: Array | None = None            # (B, S), 0 at padding
    start: int = 0                           # positions already in the cache
    cache: list[KVCache] | None = None       # one entry a layer
    read: Any = None                         # (B,), for the last layer: the position of each row that the answer needs

    def of(self, rows: slice) -> Run:
        """The same for some rows of the batch."""
        key_mask, read = (None if a is None else a[rows] for a in (self.key_mask, self.read))
        return Run(key_mask, self.start, self.cache, read)

    def wanted(self, x: Tensor) -> Tensor:                         # (B, T, ...) -> (B, 1, ...), or x itself
        """The positions of x that are wanted of this layer."""
        return x if self.read is None else x[np.arange(len(x))[:, None], self.read[:, None]]


class KVCache:
    """The keys and values of one layer that were computed before, so that generating a token does not compute them again."""

    def __init__(self, max_len: int) -> None:
        self.max_len, self.start = max_len, 0
        self.keys: Array = None              # (B, KV, max_len, hd), allocated at first use
        self.values: Array = None

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store (B, KV, T, hd) at positions start … and return all keys and values up to there.

        Raises RuntimeError if gradients are recorded: they would end here without a word.
        """
        if k.requires_grad or v.requires_grad:
            raise RuntimeError("a key-value cache passes no gradients: call the model inside no_grad(), or without cache=")
        B, KV, T, hd = k.shape
        if self.keys is None:
            xp = array_module(k.data)
            self.keys = xp.empty((B, KV, self.max_len, hd), dtype=k.dtype)
            self.values = xp.empty((B, KV, self.max_len, hd), dtype=k.dtype)
        self.keys[:, :, start : start + T] = k.data
        self.values[:, :, start : start + T] = v.data
        self.start = start + T
        return Tensor(self.keys[:, :, : start + T]), Tensor(self.values[:, :, : start + T])


class Rope:
    """Rotary positions: the tables cos and sin of position · ω_i, ω_i = θ^(-2i/hd), up to the longest sequence so far."""

    def __init__(self, cfg: TransformerConfig, dtype: str) -> None:
        self.frequencies, self.max_len, self.dtype = rope_frequencies(cfg), cfg.max_len, dtype
        self.tables: dict[str, tuple[Array, Array]] = {}               # by device

    def __call__(self, x: Tensor, start: int) -> Tensor:           # (B, H, T, hd)
        device, stop = device_of(x.data).name, start + x.shape[2]
        if device not in self.tables or len(self.tables[device][0]) < stop:
            angles = np.outer(np.arange(min(max(2 * stop, 1024), self.max_len)), self.frequencies)         # (positions, hd/2)
            self.tables[device] = (to_device(np.cos(angles).astype(self.dtype), device),
                                   to_device(np.sin(angles).astype(self.dtype), device))
        cos, sin = self.tables[device]
        return rotary(x, cos[start:stop], sin[start:stop])


def rope_frequencies(cfg: TransformerConfig) -> np.ndarray:        # -> (hd/2,)
    """ω_i = θ^(-2i/hd). "linear" scaling divides all by the factor; "llama3" only the slow ones, as in Llama 3.1.

    There a wave that turns n times over the old context keeps its ω for n > high_freq_factor, has ω/factor for
    n < low_freq_factor, and between them goes from one to the other linearly in n.
    """
    half, scaling = cfg.head_dim // 2, cfg.rope_scaling
    w = cfg.rope_theta ** (-np.arange(half) / half)
    if scaling is None:
        return w
    if scaling["rope_type"] == "linear":
        return w / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * w / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return w * (kept + (1 - kept) / scaling["factor"])


def unrotated(x: Tensor, start: int) -> Tensor:
    """The place of Rope in a model with learned positions."""
    return x


class Attention(Module):
    """Multi-head self-attention with grouped key and value heads."""

    def __init__(self, cfg: TransformerConfig, qkv: PackedLinear, o: Linear, rotate: Any, index: int) -> None:
        self.q_proj, self.k_proj, self.v_proj = qkv.blocks.values()
        self.qkv_proj = qkv
        self.o_proj = o
        self.head_dim, self.causal, self.rotate, self.index = cfg.head_dim, cfg.causal, rotate, index
        self.widths = list(qkv.sizes.values())

    def forward(self, x: Tensor, run: Run) -> Tensor:              # (B, T, D) -> (B, T, D), or (B, 1, D)
        q, k, v = (self.heads(part) for part in split(self.qkv_proj(x), self.widths))
        q, k = self.rotate(q, run.start), self.rotate(k, run.start)
        if run.cache is not None:
            k, v = run.cache[self.index].extend(k, v, run.start)
        if run.read is not None:                                   # one query, which sees all keys: after it comes only padding
            q = run.wanted(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        o = attention(q, k, v, causal=self.causal, key_mask=run.key_mask)          # (B, H, T, hd)
        return self.o_proj(o.transpose(0, 2, 1, 3).reshape(len(x), q.shape[2], -1))

    def heads(self, x: Tensor) -> Tensor:                          # (B, T, H·hd) -> (B, H, T, hd), a view
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)


class MLP(Module):
    """down(act(up x)), D -> d_ff -> D. Without adapters on it, it is one op."""

    def __init__(self, up: Linear, down: Linear, activation: str) -> None:
        self.up_proj, self.down_proj, self.activation = up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_proj, self.down_proj
        if up.plain and down.plain:
            return feed_forward(x, up.weight, up.bias, down.weight, down.bias, self.activation)
        return down(ACTIVATIONS[self.activation](up(x)))


class GatedMLP(Module):
    """down(silu(gate x) ⊙ up x), D -> d_ff -> D."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(Module):
    """Attention and MLP, each added to the stream that runs through the model."""

    def __init__(self, attn: Attention, attn_norm: Module, mlp: Module, mlp_norm: Module, dropout: Dropout) -> None:
        self.attn_norm, self.attn = attn_norm, attn
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.dropout = dropout


class PreNormLayer(Layer):
    """x + attn(norm x), then x + mlp(norm x): GPT-2, Llama."""

    def forward(self, x: Tensor, run: Run) -> Tensor:              # (B, T, D) -> (B, T, D), or (B, 1, D)
        x = run.wanted(x) + self.dropout(self.attn(self.attn_norm(x), run))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class PostNormLayer(Layer):
    """norm(x + attn x), then norm(x + mlp x): BERT."""

    def forward(self, x: Tensor, run: Run) -> Tensor:              # (B, T, D) -> (B, T, D), or (B, 1, D)
        x = self.attn_norm(run.wanted(x) + self.dropout(self.attn(x, run)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Init:
    """Draws initial weights on the host: N(0, 0.02²), as GPT-2 and BERT do, and zero biases."""

    def __init__(self, rng: np.random.Generator, dtype: str, blank: bool = False) -> None:
        self.rng, self.dtype, self.blank = rng, dtype, blank

    def normal(self, *shape: int, std: float = 0.02) -> Array:
        if self.blank:                       # all 0, which costs neither time nor memory until it is written
            return self.zeros(*shape)
        return to_device((self.rng.standard_normal(shape) * std).astype(self.dtype))

    def zeros(self, *shape: int) -> Array:
        return to_device(np.zeros(shape, self.dtype))

    def linear(self, d_in: int, d_out: int, bias: bool, std: float = 0.02) -> Linear:
        return Linear(self.normal(d_out, d_in, std=std), self.zeros(d_out) if bias else None)


def build_layer(cfg: TransformerConfig, init: Init, rotate: Any, index: int) -> Layer:
    """One layer with the parts that the config names. Products that end in the stream start smaller, by 1/√(2L) (GPT-2)."""
    D, F, end = cfg.d_model, cfg.d_ff, 0.02 * (2 * cfg.n_layers) ** -0.5
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    qkv = PackedLinear(init.normal(q + 2 * kv, D), init.zeros(q + 2 * kv) if cfg.qkv_bias else None, sizes)
    attn = Attention(cfg, qkv, init.linear(q, D, cfg.o_bias, end), rotate, index)
    if cfg.mlp == "swiglu":
        mlp: Module = GatedMLP(init.linear(D, F, cfg.bias), init.linear(D, F, cfg.bias), init.linear(F, D, cfg.bias, end))
    else:
        mlp = MLP(init.linear(D, F, cfg.bias), init.linear(F, D, cfg.bias, end), cfg.mlp)
    norms = [NORMS[cfg.norm](D, cfg.norm_eps, init.dtype) for _ in range(2)]
    kind = PreNormLayer if cfg.norm_first else PostNormLayer
    return kind(attn, norms[0], mlp, norms[1], Dropout(cfg.dropout, init.rng))
