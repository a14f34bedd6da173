"""The GPU kernels in CUDA C: one source for float and double, where T stands for the one that is compiled.

Row kernels: one block of threads for each row of any length V. Thread i takes the elements i, i + blockDim, …; what all of
them need (a sum, a maximum) goes through `block_sum` and `block_larger`, so every thread of a block must call these.
Element kernels: each thread takes the elements i, i + all threads, …. What each computes stands in generic.py too.

Integers come as long long, numbers as double, and an array that is not there as 0. No kernel allocates, waits or prints.
"""

from __future__ import annotations

COMMON = r"""
// A thread's share of the elements 0..n-1: of a row, and of a whole array.
#define FOR_ROW(j, n) for (long long j = threadIdx.x; j < (n); j += blockDim.x)
#define FOR_ALL(i, n) for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (n); \
                           i += (long long)gridDim.x * blockDim.x)

// The larger of two numbers; NaN if either is NaN, as NumPy has it (fmax would drop it).
__device__ T larger(T a, T b) { return a > b || a != a ? a : b; }

// Sums and maxima over the 32 threads of a warp, then over the warps of the block. Every thread gets the result.
__device__ T warp_sum(T x) {
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

__device__ T warp_larger(T x) {
    for (int d = 16; d > 0; d /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

__device__ T block_sum(T x) {
    __shared__ T parts[32];
    x = warp_sum(x);
    if (blockDim.x == 32) return x;
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    __syncthreads();                                     // whoever still reads the parts of the sum before has done so
    if (lane == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < warps ? parts[lane] : T(0));
}

__device__ T block_larger(T x) {
    __shared__ T parts[32];
    x = warp_larger(x);
    if (blockDim.x == 32) return x;
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    __syncthreads();
    if (lane == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_larger(parts[lane < warps ? lane : 0]);
}
"""

ROWS = r"""
// top = max x, and the sum of exp(x - top), of a row
__device__ T exponentials(const T* x, long long V, T* top) {
    T m = x[0], total = 0;
    FOR_ROW(j, V) m = larger(m, x[j]);
    *top = m = block_larger(m);
    FOR_ROW(j, V) total += exp(x[j] - m);
    return block_sum(total);
}

// y = exp(x - max x) / sum exp(x - max x)
extern "C" __global__ void softmax(const T* x, T* y, long long V) {
    x += blockIdx.x * V, y += blockIdx.x * V;
    T top, total = exponentials(x, V, &top);
    FOR_ROW(j, V) y[j] = exp(x[j] - top) / total;
}

// lse = log sum exp x
extern "C" __global__ void logsumexp(const T* x, T* lse, long long V) {
    T top, total = exponentials(x + blockIdx.x * V, V, &top);
    if (threadIdx.x == 0) lse[blockIdx.x] = log(total) + top;
}

__device__ long long inside(long long target, long long V) { return target >= 0 && target < V ? target : 0; }

// loss = lse - (1 - e) x_t - e/V sum x,  with e the label smoothing
extern "C" __global__ void cross_entropy(const T* x, const long long* targets, T* losses, T* lses, long long V, double e) {
    x += blockIdx.x * V;
    T top, total = exponentials(x, V, &top), sum = 0;
    if (e != 0) {                                        // the same for all threads
        FOR_ROW(j, V) sum += x[j];
        sum = block_sum(sum);
    }
    if (threadIdx.x != 0) return;
    T lse = log(total) + top, loss = lse - T(1 - e) * x[inside(targets[blockIdx.x], V)];
    losses[blockIdx.x] = e != 0 ? loss - T(e) / V * sum : loss;
    lses[blockIdx.x] = lse;
}

// dx = weight (p - q),  p = exp(x - lse),  q = (1 - e) onehot(t) + e/V
extern "C" __global__ void cross_entropy_grad(const T* x, const T* lse, const long long* targets, const T* weights, T* dx,
                                              long long V, double e) {
    x += blockIdx.x * V, dx += blockIdx.x * V;
    long long target = inside(targets[blockIdx.x], V);
    T shift = lse[blockIdx.x], weight = weights[blockIdx.x];
    FOR_ROW(j, V) dx[j] = (exp(x[j] - shift) - T(e) / V - (j == target ? T(1 - e) : T(0))) * weight;
}

// c = x - mean x,  rho = 1/sqrt(mean c^2 + eps),  y = c rho w + b
extern "C" __global__ void layer_norm(const T* x, const T* w, const T* b, T* y, T* c, T* rhos, long long D, double eps) {
    x += blockIdx.x * D, y += blockIdx.x * D, c += blockIdx.x * D;
    T sum = 0, squares = 0, share = T(1) / D;
    FOR_ROW(j, D) sum += x[j];
    T mean = block_sum(sum) * share;
    FOR_ROW(j, D) {
        T d = x[j] - mean;
        c[j] = d;
        squares += d * d;
    }
    T rho = 1 / sqrt(block_sum(squares) * share + T(eps));
    FOR_ROW(j, D) y[j] = c[j] * rho * w[j] + b[j];
    if (threadIdx.x == 0) rhos[blockIdx.x] = rho;
}

// dx = rho (g - mean g - n mean(g n)),  g = dy w,  n = c rho
extern "C" __global__ void layer_norm_grad(const T* dy, const T* c, const T* rhos, const T* w, T* dx, long long D) {
    dy += blockIdx.x * D, c += blockIdx.x * D, dx += blockIdx.x * D;
    T sum = 0, along = 0, rho = rhos[blockIdx.x], share = T(1) / D;
    FOR_ROW(j, D) {
        T g = dy[j] * w[j];
        sum += g;
        along += g * (c[j] * rho);
    }
    sum = block_sum(sum) * share;
    along = block_sum(along) * share;
    FOR_ROW(j, D) dx[j] = (dy[j] * w[j] - sum - c[j] * rho * along) * rho;
}

// rho = 1/sqrt(mean x^2 + eps),  y = x rho w
extern "C" __global__ void rms_norm(const T* x, const T* w, T* y, T* rhos, long long D, double eps) {
    x += blockIdx.x * D, y += blockIdx.x * D;
    T squares = 0;
    FOR_ROW(j, D) squares += x[j] * x[j];
    T rho = 1 / sqrt(block_sum(squares) * T(1) / D + T(eps));
    FOR_ROW(j, D) y[j] = x[j] * rho * w[j];
    if (threadIdx.x == 0) rhos[blockIdx.x] = rho;
}

// dx = rho (g - n mean(g n)),  g = dy w,  n = x rho
extern "C" __global__ void rms_norm_grad(const T* dy, const T* x, const T* rhos, const T* w, T* dx, long long D) {
    dy += blockIdx.x * D, x += blockIdx.x * D, dx += blockIdx.x * D;
    T along = 0, rho = rhos[blockIdx.x];
    FOR_ROW(j, D) along += dy[j] * w[j] * (x[j] * rho);
    along = block_sum(along) * T(1) / D;
    FOR_ROW(j, D) dx[j] = (dy[j] * w[j] - x[j] * rho * along) * rho;
}
"""

ATTENTION = r"""
// A score with its mask: s scale, and -inf added where query t of N may not see key j of S (causal: j > t + S - N).
struct Mask {
    const unsigned char* keys;                           // (B, S), 0 hides a key; or 0
    long long last;                                      // the last key that this query may see
    T scale, hidden;                                     // hidden = -inf
    __device__ T operator()(T s, long long j) const {
        return j > last || (keys != 0 && keys[j] == 0) ? s * scale + hidden : s * scale;
    }
};

__device__ Mask mask_of_row(const unsigned char* keys, long long H, long long N, long long S, long long causal, double scale,
                            double hidden) {
    long long t = blockIdx.x % N, batch = blockIdx.x / (N * H);
    return {keys == 0 ? keys : keys + batch * S, causal ? t + S - N : S, T(scale), T(hidden)};
}

// In place on the products s = q k^T (B, H, N, S):  p = exp(z - top)/total,  z = masked s,  top = max(max z, lowest),
// total = sum exp(z - top) + tiny,  lse = log total + top.  A row that sees no key gets p = 0.
extern "C" __global__ void attention_softmax(T* s, T* lse, const unsigned char* keys, long long H, long long N, long long S,
                                             long long causal, double scale, double hidden, double lowest, double tiny) {
    Mask z = mask_of_row(keys, H, N, S, causal, scale, hidden);
    s += blockIdx.x * S;
    T top = T(lowest), total = 0;
    FOR_ROW(j, S) top = larger(top, z(s[j], j));
    top = block_larger(top);
    FOR_ROW(j, S) total += exp(z(s[j], j) - top);
    total = block_sum(total) + T(tiny);
    FOR_ROW(j, S) s[j] = exp(z(s[j], j) - top) / total;
    if (threadIdx.x == 0) lse[blockIdx.x] = log(total) + top;
}

// In place on s = q k^T and dp = do v^T:  s <- p = exp(z - lse),  dp <- ds = p (dp - <do, o>) scale.
extern "C" __global__ void attention_softmax_grad(T* s, T* dp, const T* lse, const T* dout, const T* out,
                                                  const unsigned char* keys, long long H, long long N, long long S,
                                                  long long width, long long causal, double scale, double hidden) {
    Mask z = mask_of_row(keys, H, N, S, causal, scale, hidden);
    s += blockIdx.x * S, dp += blockIdx.x * S, dout += blockIdx.x * width, out += blockIdx.x * width;
    T along = 0, shift = lse[blockIdx.x];
    FOR_ROW(j, width) along += dout[j] * out[j];
    along = block_sum(along);
    FOR_ROW(j, S) {
        T p = exp(z(s[j], j) - shift);
        s[j] = p;
        dp[j] = p * (dp[j] - along) * T(scale);
    }
}
"""

ELEMENTS = r"""
// The activations take x + bias, for rows of x of this width, where there is a bias.
__device__ T biased(const T* x, const T* bias, long long width, long long i) {
    return bias != 0 ? x[i] + bias[i % width] : x[i];
}

// y = x F(x),  F(x) = (1 + erf(x/sqrt 2))/2;   y' = F(x) + x exp(-x^2/2)/sqrt(2 pi)
extern "C" __global__ void gelu(const T* x, const T* bias, long long width, T* y, T* slope, long long n) {
    FOR_ALL(i, n) {
        T a = biased(x, bias, width, i), F = T(0.5) * (1 + erf(a * T(0.70710678118654752)));
        y[i] = a * F;
        if (slope != 0) slope[i] = F + a * exp(T(-0.5) * a * a) * T(0.39894228040143268);
    }
}

// y = x (1 + t)/2,  t = tanh(k (x + 0.044715 x^3)),  k = sqrt(2/pi);   y' = (1 + t)/2 + x (1 - t^2) k (1 + 0.134145 x^2)/2
extern "C" __global__ void gelu_tanh(const T* x, const T* bias, long long width, T* y, T* slope, long long n) {
    const T k = T(0.79788456080286536);
    FOR_ALL(i, n) {
        T a = biased(x, bias, width, i), square = a * a, t = tanh(k * a * (1 + T(0.044715) * square));
        y[i] = T(0.5) * a * (1 + t);
        if (slope != 0) slope[i] = T(0.5) * (1 + t) + T(0.5) * a * (1 - t * t) * (k * (1 + T(0.134145) * square));
    }
}

__device__ T sigmoid(T x) { return T(0.5) * (1 + tanh(T(0.5) * x)); }

// y = x s(x),  s = 1/(1 + e^-x);   y' = s + y (1 - s)
extern "C" __global__ void silu(const T* x, const T* bias, long long width, T* y, T* slope, long long n) {
    FOR_ALL(i, n) {
        T a = biased(x, bias, width, i), s = sigmoid(a), product = a * s;
        y[i] = product;
        if (slope != 0) slope[i] = s + product * (1 - s);
    }
}

// y = silu(g) u,  towards g: u silu'(g),  towards u: silu(g)
extern "C" __global__ void swiglu(const T* g, const T* u, T* y, T* by_g, T* by_u, long long n) {
    FOR_ALL(i, n) {
        T s = sigmoid(g[i]), h = g[i] * s;
        y[i] = h * u[i];
        if (by_g != 0) {
            by_g[i] = u[i] * (s + h * (1 - s));
            by_u[i] = h;
        }
    }
}

// y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,  for x (B, H, N, 2 half) with any strides; y lies by rows
extern "C" __global__ void rotary(const T* x, const T* cosines, const T* sines, T* y, long long H, long long N, long long half,
                                  long long sb, long long sh, long long st, long long sd, long long n) {
    FOR_ALL(i, n) {                                      // i: one of the B H N half pairs
        long long d = i % half, row = i / half, t = row % N, h = row / N % H, b = row / (N * H);
        const T* from = x + b * sb + h * sh + t * st;
        T x1 = from[d * sd], x2 = from[(d + half) * sd], c = cosines[t * half + d], s = sines[t * half + d];
        y[row * 2 * half + d] = x1 * c - x2 * s;
        y[row * 2 * half + half + d] = x2 * c + x1 * s;
    }
}

// dW[id] += dy, for rows dy (n / D, D) and dW of zeros. Rows with one id are added in any order.
extern "C" __global__ void embedding_grad(const long long* ids, const T* dy, T* dW, long long D, long long n) {
    FOR_ALL(i, n) atomicAdd(dW + ids[i / D] * D + i % D, dy[i]);
}
"""

TOGETHER, HEADS = 16, 4     # parameters that one launch of AdamW takes; arrays that one launch of `heads` copies


def together(text: str, most: int, parameters: str, names: str) -> str:
    """A kernel on up to `most` arrays of a kind at once. Their pointers and sizes are all arguments, so nothing is uploaded.

    Block b works on array b mod count: CHOOSE sets the variables `names` to those of its array.
    """
    cases = [", ".join(f"{name} = {name}{j}" for name in names.split()) for j in range(most)]
    choose = "".join(f"        case {j}: {case}; break;\n" for j, case in enumerate(cases))
    text = text.replace("PARAMETERS", ", ".join(parameters.replace("#", str(j)) for j in range(most)))
    return text.replace("CHOOSE", f"switch (blockIdx.x % count) {{\n{choose}    }}\n    long long blocks = gridDim.x / count;")


ADAMW = together(r"""
// m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - rate decay p - rate c1 m / (c2 sqrt v + eps),
// c1 = 1/(1 - b1^t),  c2 = 1/sqrt(1 - b2^t);  rate = rates[i / each], or `lr` if there are no rates.
extern "C" __global__ void adamw(PARAMETERS, long long count, const T* rates, double lr, double b1, double b2, double eps,
                                 double decay, double c1, double c2) {
    T *p = 0, *m = 0, *v = 0;
    const T* g = 0;
    long long n = 0, each = 1;
    CHOOSE
    for (long long i = blockIdx.x / count * blockDim.x + threadIdx.x; i < n; i += blocks * blockDim.x) {
        T rate = rates != 0 ? rates[i / each] : T(lr), a = m[i] * T(b1) + T(1 - b1) * g[i];
        T b = v[i] * T(b2) + T(1 - b2) * (g[i] * g[i]), old = p[i];
        if (decay != 0) old *= 1 - rate * T(decay);
        m[i] = a;
        v[i] = b;
        p[i] = old - a / (sqrt(b) * T(c2) + T(eps)) * (rate * T(c1));
    }
}
""", TOGETHER, "T* p#, const T* g#, T* m#, T* v#, long long n#, long long each#", "p g m v n each")

COPIES = together(r"""
// y = x for x (B, H, N, width) with any strides, s, and y whose last axis is contiguous, with strides t for the others.
extern "C" __global__ void heads(PARAMETERS, long long count, long long width) {
    const T* x = 0;
    T* y = 0;
    long long n = 0, H = 1, N = 1, sb = 0, sh = 0, sn = 0, sd = 0, tb = 0, th = 0, tn = 0;
    CHOOSE
    for (long long i = blockIdx.x / count * blockDim.x + threadIdx.x; i < n; i += blocks * blockDim.x) {
        long long d = i % width, row = i / width, t = row % N, h = row / N % H, b = row / (N * H);
        y[b * tb + h * th + t * tn + d] = x[b * sb + h * sh + t * sn + d * sd];
    }
}
""", HEADS, "const T* x#, T* y#, long long n#, long long H#, long long N#, long long sb#, long long sh#, long long sn#, "
            "long long sd#, long long tb#, long long th#, long long tn#", "x y n H N sb sh sn sd tb th tn")


def source(dtype: str) -> str:
    """The whole source for "float32" or "float64"."""
    T = {"float32": "float", "float64": "double"}[dtype]
    return "\n".join([f"typedef {T} T;", COMMON, ROWS, ATTENTION, ELEMENTS, ADAMW, COPIES])
