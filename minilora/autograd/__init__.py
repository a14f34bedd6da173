"""Tensor, the ops with their gradients, and gradcheck. Read tensor.py first, then arithmetic.py, then the fused ops."""

from .functions import (
    attention,
    concatenate,
    cross_entropy,
    dropout,
    embedding,
    exp,
    feed_forward,
    gelu,
    gelu_tanh,
    layer_norm,
    linear,
    linear_cross_entropy,
    log,
    log_softmax,
    lora_linear,
    matmul,
    rms_norm,
    rotary,
    silu,
    softmax,
    split,
    sqrt,
    stack,
    swiglu,
    tanh,
    where,
)
from .gradcheck import GradcheckError, gradcheck
from .segments import in_shards, recomputed
from .tensor import Op, Tensor, no_grad, tensor

__all__ = ["GradcheckError", "Op", "Tensor", "attention", "concatenate", "cross_entropy", "dropout", "embedding", "exp",
           "feed_forward", "gelu", "gelu_tanh", "gradcheck", "in_shards", "layer_norm", "linear", "linear_cross_entropy",
           "log", "log_softmax", "lora_linear", "matmul", "no_grad", "recomputed", "rms_norm", "rotary", "silu", "softmax",
           "split", "sqrt", "stack", "swiglu", "tanh", "tensor", "where"]
