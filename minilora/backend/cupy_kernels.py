"""The primitives on CuPy, fast: each formula is one launch of a kernel of cupy_sources.py, and no product copies an operand
that cuBLAS can read as it lies.

A launch costs the CPU about as much as moving ten million numbers costs the GPU, so what counts here is how few there are.
What each primitive means stands in generic.py, and the tests hold the two equal, on a machine without a GPU too: the device
is reached only through a driver, and the tests bring one of their own. Other dtypes than float32 and float64 take the generic
way.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from .cupy_sources import HEADS, TOGETHER
from .generic import LOWEST, TINY, Array, Kernels

NOTHING = 0         # an array that is not there, as an argument of a kernel


class Driver(Protocol):
    """What is needed of a device: to take an array, to launch a kernel, and to have cuBLAS multiply."""

    def put(self, host: Any) -> Array:
        """A host array on the device."""

    def launch(self, name: str, dtype: Any, blocks: int, threads: int, *arguments: Any) -> None:
        """Run the kernel `name` for this dtype; arguments are arrays, ints and floats. Does not wait for it."""

    def multiply(self, dtype: Any, sizes: tuple[int, ...], a: tuple[Any, ...], b: tuple[Any, ...], out: tuple[Any, ...],
                 tf32: bool) -> None:
        """cuBLAS's gemmStridedBatched, in its own terms. sizes: m, n, k, count. a, b: (array, transposed, ld, stride)."""


class CupyKernels(Kernels):
    """Overrides for CuPy. tf32: round the factors of float32 products to TF32's 10 bits, several times as fast."""

    def __init__(self, xp: Any, driver: Driver, tf32: bool = False) -> None:
        super().__init__(xp)
        self.driver = driver
        self.reads_slices = True
        self.tf32: bool | None = tf32

    # Products

    def matmul(self, a: Array, b: Array, ta: bool = False, tb: bool = False) -> Array:
        """a @ b on the last two axes, either one transposed first: one call of cuBLAS, which reads transposes and slices."""
        lead = a.shape[:-2]
        if not fits(a, b) or lead != b.shape[:-2] or 0 in (*a.shape, *b.shape):
            return super().matmul(a, b, ta, tb)
        n, k = a.shape[-2:][::-1] if ta else a.shape[-2:]
        k_b, m = b.shape[-2:][::-1] if tb else b.shape[-2:]
        if k != k_b:
            raise ValueError(f"a product of shapes {a.shape} and {b.shape} (ta={ta}, tb={tb}): {k} and {k_b} should be equal")
        y = self.xp.empty((*lead, n, m), dtype=a.dtype)
        a, by_columns_a, ld_a, stride_a = self._as_cublas_reads(a)
        b, by_columns_b, ld_b, stride_b = self._as_cublas_reads(b)
        # cuBLAS takes matrices by columns, and there our arrays by rows are their transposes: so it computes yᵀ = bᵀ aᵀ.
        self.driver.multiply(y.dtype, (m, n, k, math.prod(lead)), (b, tb != by_columns_b, ld_b, stride_b),
                             (a, ta != by_columns_a, ld_a, stride_a), (y, m, n * m), bool(self.tf32))
        return y

    def _as_cublas_reads(self, a: Array) -> tuple[Array, bool, int, int]:
        """a, copied if need be; whether it lies by columns; the step from line to line, and from matrix to matrix."""
        layout = strided(a)
        if layout is None:
            a = self.xp.ascontiguousarray(a)
            layout = strided(a)
            assert layout is not None
        return a, *layout

    # Softmax and cross-entropy

    def softmax(self, x: Array) -> Array:                          # (..., V) -> (..., V)
        if not fits(x) or x.size == 0:
            return super().softmax(x)
        y = self.xp.empty(x.shape, dtype=x.dtype)
        self._rows("softmax", x, self._whole(x), y)
        return y

    def logsumexp(self, x: Array) -> Array:                        # (..., V) -> (...)
        if not fits(x) or x.size == 0:
            return super().logsumexp(x)
        lse = self.xp.empty(x.shape[:-1], dtype=x.dtype)
        self._rows("logsumexp", x, self._whole(x), lse)
        return lse

    def cross_entropy(self, logits: Array, targets: Array, smoothing: float) -> tuple[Array, Array]:
        if not fits(logits) or logits.size == 0:
            return super().cross_entropy(logits, targets, smoothing)
        losses, lse = (self.xp.empty(len(logits), dtype=logits.dtype) for _ in range(2))
        self._rows("cross_entropy", logits, self._whole(logits), self._int64(targets), losses, lse, smoothing=smoothing)
        return losses, lse

    def cross_entropy_grad(self, logits: Array, lse: Array, targets: Array, weights: Array, smoothing: float) -> Array:
        if not fits(logits, lse, weights) or logits.size == 0:
            return super().cross_entropy_grad(logits, lse, targets, weights, smoothing)
        dx = self.xp.empty(logits.shape, dtype=logits.dtype)
        self._rows("cross_entropy_grad", logits, *map(self._whole, (logits, lse)), self._int64(targets), self._whole(weights),
                   dx, smoothing=smoothing)
        return dx

    # Norms

    def layer_norm(self, x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
        if not fits(x, w, b) or x.size == 0:
            return super().layer_norm(x, w, b, eps)
        y, c = (self.xp.empty(x.shape, dtype=x.dtype) for _ in range(2))
        rho = self.xp.empty((*x.shape[:-1], 1), dtype=x.dtype)
        self._rows("layer_norm", x, *map(self._whole, (x, w, b)), y, c, rho, eps=eps)
        return y, c, rho

    def layer_norm_grad(self, dy: Array, c: Array, rho: Array, w: Array) -> Array:
        if not fits(dy, c, rho, w) or dy.size == 0:
            return super().layer_norm_grad(dy, c, rho, w)
        dx = self.xp.empty(dy.shape, dtype=dy.dtype)
        self._rows("layer_norm_grad", dy, *map(self._whole, (dy, c, rho, w)), dx)
        return dx

    def rms_norm(self, x: Array, w: Array, eps: float) -> tuple[Array, Array]:
        if not fits(x, w) or x.size == 0:
            return super().rms_norm(x, w, eps)
        y, rho = self.xp.empty(x.shape, dtype=x.dtype), self.xp.empty((*x.shape[:-1], 1), dtype=x.dtype)
        self._rows("rms_norm", x, *map(self._whole, (x, w)), y, rho, eps=eps)
        return y, rho

    def rms_norm_grad(self, dy: Array, x: Array, rho: Array, w: Array) -> Array:
        if not fits(dy, x, rho, w) or dy.size == 0:
            return super().rms_norm_grad(dy, x, rho, w)
        dx = self.xp.empty(dy.shape, dtype=dy.dtype)
        self._rows("rms_norm_grad", dy, *map(self._whole, (dy, x, rho, w)), dx)
        return dx

    # Activations

    def gelu(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        return self._activation("gelu", x, slope) if fits(x) else super().gelu(x, slope)

    def gelu_tanh(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        return self._activation("gelu_tanh", x, slope) if fits(x) else super().gelu_tanh(x, slope)

    def silu(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        return self._activation("silu", x, slope) if fits(x) else super().silu(x, slope)

    def _activation(self, name: str, x: Array, slope: bool, bias: Array | None = None) -> tuple[Array, Array | None]:
        y = self.xp.empty(x.shape, dtype=x.dtype)
        s = self.xp.empty(x.shape, dtype=x.dtype) if slope else None
        self._elements(name, x, x.size, self._whole(x), NOTHING if bias is None else self._whole(bias), *(x.shape[-1:] or (1,)),
                       y, NOTHING if s is None else s)
        return y, s

    def feed_forward(self, x: Array, W1: Array, b1: Array | None, W2: Array, b2: Array | None, activation: str, slope: bool,
                     hidden: bool) -> tuple[Array, Array | None, Array | None]:
        if not fits(x, W1, W2, *(b for b in (b1, b2) if b is not None)):
            return super().feed_forward(x, W1, b1, W2, b2, activation, slope, hidden)
        h, s = self._activation(activation, self.matmul(x, W1, tb=True), slope, b1)
        return self.linear(h, W2, b2), s, h if hidden else None

    def swiglu(self, g: Array, u: Array, slopes: bool) -> tuple[Array, Array | None, Array | None]:
        if not fits(g, u) or g.shape != u.shape:
            return super().swiglu(g, u, slopes)
        y = self.xp.empty(g.shape, dtype=g.dtype)
        by_g, by_u = (self.xp.empty(g.shape, dtype=g.dtype) if slopes else None for _ in range(2))
        self._elements("swiglu", g, g.size, self._whole(g), self._whole(u), y,
                       *(NOTHING if s is None else s for s in (by_g, by_u)))
        return y, by_g, by_u

    # Positions and attention

    def rotary(self, x: Array, cos: Array, sin: Array) -> Array:   # (B, H, T, hd), (T, hd/2) twice -> (B, H, T, hd)
        if not fits(x, cos, sin) or x.ndim != 4:
            return super().rotary(x, cos, sin)
        y = self.xp.empty(x.shape, dtype=x.dtype)
        strides = [step // x.itemsize for step in x.strides]       # x may lie in any way: no copy for the heads
        self._elements("rotary", x, x.size // 2, x, self._whole(cos), self._whole(sin), y, *x.shape[1:3], x.shape[3] // 2,
                       *strides)
        return y

    def attention(self, q: Array, k: Array, v: Array, causal: bool, key_mask: Array | None, scale: float,
                  ) -> tuple[Array, Array]:
        if not fits(q, k, v) or 0 in (*q.shape, *k.shape):
            return super().attention(q, k, v, causal, key_mask, scale)
        B, H, T, hd = q.shape
        KV, S = k.shape[1:3]
        q, k, v = self._whole_heads(q, k, v)
        p = self.matmul(q.reshape(B, KV, -1, hd), k, tb=True)      # (B, KV, H/KV·T, S): the scores, then in place p
        lse = self.xp.empty((B, H, T), dtype=q.dtype)
        self.driver.launch("attention_softmax", q.dtype, B * H * T, threads_for(S), p, lse, self._keys(key_mask), H, T, S,
                           int(causal), scale, -math.inf, LOWEST, TINY)
        return self.matmul(p, v).reshape(B, H, T, hd), lse

    def attention_grad(self, do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, causal: bool,
                       key_mask: Array | None, scale: float) -> tuple[Array, Array, Array]:
        if not fits(do, q, k, v, o, lse) or 0 in (*q.shape, *k.shape):
            return super().attention_grad(do, q, k, v, o, lse, causal, key_mask, scale)
        B, H, T, hd = q.shape
        KV, S = k.shape[1:3]
        (do, q, k, v), o, lse = self._whole_heads(do, q, k, v), self._whole(o), self._whole(lse)
        do_g, q_g = do.reshape(B, KV, -1, hd), q.reshape(B, KV, -1, hd)
        p, ds = self.matmul(q_g, k, tb=True), self.matmul(do_g, v, tb=True)        # the scores and p̄, then in place p and s̄
        self.driver.launch("attention_softmax_grad", q.dtype, B * H * T, threads_for(S), p, ds, lse, do, o,
                           self._keys(key_mask), H, T, S, hd, int(causal), scale, -math.inf)
        dq, dk, dv = self.matmul(ds, k).reshape(B, H, T, hd), self.matmul(ds, q_g, ta=True), self.matmul(p, do_g, ta=True)
        return self._copied_heads([dq, dk, dv], side_by_side=True)

    def _whole_heads(self, *arrays: Array) -> list[Array]:
        """Arrays (B, H, T, hd), each as it is if it lies by rows, else copied: in one launch."""
        apart = [a for a in arrays if not a.flags.c_contiguous]
        copies = iter(self._copied_heads(apart, side_by_side=False))
        return [a if a.flags.c_contiguous else next(copies) for a in arrays]

    def _copied_heads(self, arrays: list[Array], side_by_side: bool) -> tuple[Array, ...]:
        """Copies of up to HEADS arrays (B, H, T, hd) in one launch. side_by_side: the heads of a token lie side by side, as
        (B, T, H, hd), so that joining them into (B, T, H·hd) again, as the gradients of q, k and v are, costs nothing."""
        if not arrays:
            return ()
        copies, arguments = [], []
        for x in arrays:
            B, H, T, hd = x.shape
            y = self.xp.empty((B, T, H, hd) if side_by_side else x.shape, dtype=x.dtype)
            y = y.transpose(0, 2, 1, 3) if side_by_side else y
            arguments += [x, y, x.size, H, T, *(step // x.itemsize for step in (*x.strides, *y.strides[:3]))]
            copies.append(y)
        arguments += [NOTHING] * (12 * (HEADS - len(arrays)))
        blocks = min(-(-max(x.size for x in arrays) // 256), 1 << 14) * len(arrays)
        self.driver.launch("heads", arrays[0].dtype, blocks, 256, *arguments, len(arrays), arrays[0].shape[3])
        return tuple(copies)

    def _keys(self, key_mask: Array | None) -> Any:
        """The mask as one byte a key."""
        return NOTHING if key_mask is None else self._whole(key_mask != 0)

    # Tables and optimisers

    def embedding_grad(self, ids: Array, dy: Array, V: int) -> Array:
        if not fits(dy):
            return super().embedding_grad(ids, dy, V)
        dW = self.xp.zeros((V, dy.shape[-1]), dtype=dy.dtype)
        self._elements("embedding_grad", dy, dy.size, self._int64(ids), self._whole(dy), dW, dy.shape[-1])
        return dW

    def adamw_all(self, due: list[tuple[Array, Array, Array, Array, int]], lr: Any, betas: tuple[float, float], eps: float,
                  weight_decay: float) -> None:
        """Parameters of one dtype that have made as many steps go together, TOGETHER to a launch."""
        alike: dict[Any, list[Any]] = {}
        for p, g, m, v, step in due:
            one_dtype = fits(p, g, m, v) and (isinstance(lr, float) or fits(p, lr))
            if not one_dtype or not all(a.flags.c_contiguous for a in (p, m, v)):      # these are written in place
                super().adamw_all([(p, g, m, v, step)], lr, betas, eps, weight_decay)
            elif p.size:
                alike.setdefault((p.dtype.char, step), []).append((p, g, m, v))
        for (_, step), ones in alike.items():
            for start in range(0, len(ones), TOGETHER):
                self._adamw(ones[start : start + TOGETHER], step, lr, betas, eps, weight_decay)

    def _adamw(self, ones: list[Any], step: int, lr: Any, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        (beta1, beta2), several = betas, not isinstance(lr, float)
        arguments: list[Any] = []
        for p, g, m, v in ones:
            arguments += [p, self._whole(g), m, v, p.size, p.size // len(lr) if several else 1]
        arguments += [NOTHING] * (6 * (TOGETHER - len(ones)))
        blocks = min(-(-max(p.size for p, *_ in ones) // 256), 1 << 12) * len(ones)
        self.driver.launch("adamw", ones[0][0].dtype, blocks, 256, *arguments, len(ones),
                           self._whole(lr) if several else NOTHING, 0.0 if several else lr, beta1, beta2, eps,
                           float(weight_decay), 1.0 / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5)

    # Launching

    def _rows(self, name: str, x: Array, *arguments: Any, **number: float) -> None:
        """One block for each row of x; the kernel's last arguments are the length of a row, and a number if there is one."""
        V = x.shape[-1]
        self.driver.launch(name, x.dtype, x.size // V, threads_for(V), *arguments, V, *map(float, number.values()))

    def _elements(self, name: str, x: Array, n: int, *arguments: Any) -> None:
        """Threads for n elements; the kernel's last argument is n."""
        if n:
            self.driver.launch(name, x.dtype, min(-(-n // 256), 1 << 16), 256, *arguments, n)

    def _whole(self, x: Array) -> Array:
        return self.xp.ascontiguousarray(x)

    def _int64(self, ids: Array) -> Array:
        return self._whole(ids if ids.dtype.char == "l" else ids.astype("int64"))


def fits(*arrays: Array) -> bool:
    """Whether the kernels take these: all float32, or all float64."""
    return {a.dtype.char for a in arrays} in ({"f"}, {"d"})


def threads_for(length: int) -> int:
    """Threads for a row: whole warps, four elements a thread if it is long, at most 512."""
    threads = 32
    while threads < 512 and threads * 4 < length:
        threads *= 2
    return threads


def strided(a: Array) -> tuple[bool, int, int] | None:
    """How matrices (..., n, m) lie, if cuBLAS can read them so: by columns?, step between lines, step between matrices.

    Steps count elements. None if neither rows nor columns are contiguous, or if the matrices do not follow at one step.
    """
    *lead, n, m = a.shape
    *steps, row, column = [step // a.itemsize for step in a.strides]
    stride, size = 0, 1
    for length, step in zip(lead[::-1], steps[::-1]):              # the leading axes, from the last on, must run on
        if length > 1:
            if step < 0 or (size > 1 and step != stride * size):
                return None
            stride = step if size == 1 else stride
            size *= length
    if (column == 1 or m == 1) and (n == 1 or row >= m):
        return False, row if n > 1 else m, stride
    if (row == 1 or n == 1) and (m == 1 or column >= n):
        return True, column if m > 1 else n, stride
    return None
