"""The functions that users call on Tensors: each makes one Op of this folder and applies it (or composes two).

Plain arrays and Python numbers are welcome as constants. Shapes stand beside each result.
"""

from __future__ import annotations

from typing import Any

from ..backend import Array, device_of, to_device, to_host
from . import activations, arithmetic, fused, shaping
from . import attention as _attention
from . import linear as _linear
from .tensor import Tensor


def exp(a: Any) -> Tensor:
    """e^a."""
    return arithmetic.Exp()(a)


def log(a: Any) -> Tensor:
    """The natural logarithm of a."""
    return arithmetic.Log()(a)


def tanh(a: Any) -> Tensor:
    """tanh a."""
    return arithmetic.Tanh()(a)


def sqrt(a: Any) -> Tensor:
    """√a."""
    return arithmetic.Sqrt()(a)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the array `condition` is True (or not 0), b elsewhere."""
    condition = condition.data if isinstance(condition, Tensor) else condition
    if not hasattr(condition, "dtype"):
        raise TypeError(f"where needs an array of booleans as its condition, got {type(condition).__name__}")
    return arithmetic.Where()(condition != 0, a, b)


def concatenate(tensors: list[Any], axis: int = 0) -> Tensor:
    """Tensors joined along an axis."""
    return shaping.Concatenate(axis)(*tensors)


def stack(tensors: list[Any], axis: int = 0) -> Tensor:
    """Tensors of one shape joined along a new axis."""
    return shaping.Stack(axis)(*tensors)


def split(a: Any, sizes: list[int]) -> tuple[Tensor, ...]:
    """Views of consecutive parts along the last axis: (..., Σ sizes) -> (..., size_0), (..., size_1), …"""
    if sum(sizes) != a.shape[-1]:
        raise ValueError(f"sizes {sizes} add up to {sum(sizes)}, expected the last axis, {a.shape[-1]}")
    return shaping.Split(sizes)(a)


def embedding(ids: Any, W: Any) -> Tensor:
    """Rows of a table: ids (...) integers, W (V, D) -> (..., D). Raises IndexError for an id outside 0..V-1."""
    return shaping.Embedding(check_ids(ids, W.shape[0], W))(W)


def check_ids(ids: Any, V: int, like: Any) -> Array:
    """Token ids on the device of `like`, checked on the host first: a GPU would wrap a wrong id silently."""
    host = to_host(ids)
    if host.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, got {host.dtype}: use ids.astype('int64')")
    if host.size and (host.min() < 0 or host.max() >= V):
        bad = int(host.min() if host.min() < 0 else host.max())
        raise IndexError(f"id {bad} is out of range: expected 0..{V - 1}; does the tokenizer belong to this model?")
    return to_device(host, device_of(like.data if isinstance(like, Tensor) else like).name)


def dropout(x: Any, p: float, rng: Any) -> Tensor:
    """x with each element zeroed with probability p and the others divided by 1-p; the mask is drawn on the host."""
    mask = dropout_mask(x.shape, p, rng, x.dtype)
    return shaping.Dropout(to_device(mask, device_of(x.data if isinstance(x, Tensor) else x).name))(x)


def dropout_mask(shape: tuple[int, ...], p: float, rng: Any, dtype: Any) -> Any:
    """A host array of 0 (probability p) and 1/(1-p)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability {p}, expected 0 <= p < 1")
    return (rng.random(shape, dtype="float32") >= p).astype(dtype) * (1.0 / (1.0 - float(p)))


def matmul(a: Any, b: Any) -> Tensor:
    """a @ b for arrays of at least two axes: (..., n, k), (..., k, m) -> (..., n, m), leading axes broadcast."""
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul needs at least two axes on both sides, got shapes {a.shape} and {b.shape}: reshape first")
    return _linear.MatMul()(a, b)


def linear(x: Any, W: Any, b: Any = None) -> Tensor:
    """y = x Wᵀ + b: x (..., in), W (out, in), b (out,) or None -> (..., out)."""
    return _linear.Linear()(x, W, b)


def feed_forward(x: Any, W1: Any, b1: Any, W2: Any, b2: Any, activation: str) -> Tensor:
    """act(x W1ᵀ + b1) W2ᵀ + b2: x (..., D), W1 (F, D), W2 (D, F), biases or None; activation "gelu", "gelu_tanh" or "silu"."""
    if activation not in ("gelu", "gelu_tanh", "silu"):
        raise ValueError(f"activation {activation!r}: expected 'gelu', 'gelu_tanh' or 'silu'")
    return _linear.FeedForward(activation)(x, W1, b1, W2, b2)


def lora_linear(x: Any, W: Any, b: Any, A: Any, B: Any, scale: float = 1.0, formed: bool | None = None) -> Tensor:
    """y = x Wᵀ + b + scale · x Aᵀ Bᵀ: A (r, in), B (out, r). formed: compute W + scale·BA first (None: if it costs less)."""
    return _linear.LoRALinear([float(scale)], [slice(0, W.shape[0])], [None], formed)(x, W, b, A, B)


def softmax(x: Any) -> Tensor:
    """Softmax over the last axis."""
    return fused.Softmax()(x)


def log_softmax(x: Any) -> Tensor:
    """Log of the softmax over the last axis."""
    return fused.LogSoftmax()(x)


def cross_entropy(logits: Any, targets: Any, *, ignore_index: int = -100, label_smoothing: float = 0.0,
                  groups: int | None = None) -> Tensor:
    """Mean cross-entropy in nats: logits (..., V), targets (...) integers -> (). Does not shift.

    Rows whose target is `ignore_index` do not count. label_smoothing ε: the target is (1-ε) one-hot + ε/V. groups=K: the
    rows are K equal groups, each with its own mean -> (K,). Raises IndexError for a target outside 0..V-1, ValueError if
    the shapes do not fit or no target counts.
    """
    V = logits.shape[-1]
    op = _cross_entropy(fused.CrossEntropy, logits, V, targets, ignore_index, label_smoothing, groups)
    return op(logits.reshape(-1, V)).reshape((groups,) if groups else ())


def linear_cross_entropy(x: Any, W: Any, targets: Any, *, ignore_index: int = -100, label_smoothing: float = 0.0,
                         groups: int | None = None) -> Tensor:
    """cross_entropy(linear(x, W), targets) for a frozen W, without an array of all logits: x (..., D), W (V, D) -> ().

    Arguments and errors as for `cross_entropy`; ValueError if W requires a gradient.
    """
    op = _cross_entropy(fused.LinearCrossEntropy, x, W.shape[0], targets, ignore_index, label_smoothing, groups)
    return op(x.reshape(-1, x.shape[-1]), W).reshape((groups,) if groups else ())


def _cross_entropy(kind: Any, x: Any, V: int, targets: Any, ignore_index: int, label_smoothing: float,
                   groups: int | None) -> Any:
    """The op, after its targets were checked on the host; x has a row (..., any) for each target."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing}, expected 0 <= label_smoothing <= 1")
    host = to_host(targets)
    if host.shape != tuple(x.shape[:-1]):
        raise ValueError(f"targets of shape {host.shape}, expected the logits' without the last axis, {x.shape[:-1]}")
    if groups is not None and (groups < 1 or host.size % groups):
        raise ValueError(f"groups = {groups}, expected a number that divides the {host.size} targets")
    host = host.reshape(-1)
    counted = host != ignore_index
    check_ids(host[counted], V, x)
    counted = counted.reshape(groups or 1, -1)
    counts = counted.sum(axis=1, keepdims=True)
    if not counts.all():
        raise ValueError(f"no target counts: all are ignore_index ({ignore_index}); is there a label in every batch?")
    weights = counted / counts                                      # (K, N/K)
    device = device_of(x.data if isinstance(x, Tensor) else x).name
    return kind(to_device(host.astype("int64"), device), to_device(weights.astype(x.dtype), device), float(label_smoothing))


def layer_norm(x: Any, w: Any, b: Any, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis: x (..., D), w (D,), b (D,) -> (..., D)."""
    return fused.LayerNorm(float(eps))(x, w, b)


def rms_norm(x: Any, w: Any, eps: float = 1e-5) -> Tensor:
    """RMS norm over the last axis: x (..., D), w (D,) -> (..., D)."""
    return fused.RMSNorm(float(eps))(x, w)


def gelu(x: Any) -> Tensor:
    """The exact GELU, x Φ(x)."""
    return activations.GELU()(x)


def gelu_tanh(x: Any) -> Tensor:
    """GELU in GPT-2's tanh approximation."""
    return activations.GELUTanh()(x)


def silu(x: Any) -> Tensor:
    """x σ(x), also called swish."""
    return activations.SiLU()(x)


def swiglu(g: Any, u: Any) -> Tensor:
    """silu(g) ⊙ u for g and u of one shape. Raises ValueError for two shapes."""
    if g.shape != u.shape:
        raise ValueError(f"swiglu of shapes {g.shape} and {u.shape}, expected one shape")
    return activations.SwiGLU()(g, u)


def rotary(x: Any, cos: Any, sin: Any) -> Tensor:
    """Rotary positions: x (B, H, T, hd); cos and sin (T, hd/2) of position · ω. Raises ValueError if the shapes do not fit."""
    T, hd = x.shape[-2:]
    if hd % 2 or cos.shape != (T, hd // 2) or sin.shape != cos.shape:
        raise ValueError(f"rotary tables of shapes {cos.shape} and {sin.shape}, expected ({T}, {hd // 2}) for x {x.shape} with "
                         "an even last axis")
    return _attention.Rotary(cos, sin)(x)


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, key_mask: Any = None, scale: float | None = None) -> Tensor:
    """Scaled-dot-product attention: q (B, H, T, hd), k and v (B, KV, S, hd), H a multiple of KV -> (B, H, T, hd).

    causal: query i sees keys up to i + (S - T). key_mask (B, S): 0 hides a key. scale: 1/√hd if None. Raises ValueError if
    the shapes do not fit.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}; expected q (B, H, T, hd) and "
                         "k, v (B, KV, S, hd) with H a multiple of KV")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal attention with {q.shape[2]} queries but only {k.shape[2]} keys: the first queries see none")
    if key_mask is not None and key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_mask of shape {key_mask.shape}, expected {(k.shape[0], k.shape[2])}, one entry for each key")
    return _attention.Attention(causal, key_mask, q.shape[-1] ** -0.5 if scale is None else float(scale))(q, k, v)
