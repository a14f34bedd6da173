# %% [markdown]
# # 01 · Backpropagation by hand
#
# **The question of this lesson: how do you know that a gradient is right?**
#
# A wrong gradient does not crash. The model still learns, only worse, and nobody notices. So every gradient
# needs a test, and the test needs a test too.
#
# **You'll do**
# - write the backward of two operations by hand,
# - measure slopes with finite differences, and see where that method breaks,
# - find two wrong operations among five.
#
# **You'll learn**
# - what a cotangent is, and why it has to be random in a test,
# - why such tests run in float64,
# - what a test that passed has *not* shown.
#
# **You need** the chain rule, NumPy's broadcasting, and half an hour to 90 minutes with the exercises.

# %% [markdown] teacher=true
# **Teacher.** 45 minutes without the exercises: 10 for section 1, 10 for section 2, 15 for section 3, 10 for section 4.
# Board: one box per operation, values flow to the right above the arrows, cotangents flow to the left below them; write
# x̄ = Jᵀ ȳ once and never the word "magic". Poll, before section 3: *a softmax whose backward returns only zeros is
# checked with dy = 1, 1, …, 1: (a) it fails clearly, (b) it fails by a little, (c) it passes.* Most say (a). Let them argue
# in pairs, then run the cell. In section 2 most guess that a smaller ε is always better. Expect in exercise 01.1 the
# missing sum over broadcast axes, in 01.2 the diagonal alone, in 01.3 the accusation of relu (its kink), in 01.4 a test
# with ones. Exercise 01.4 is the one to discuss at the board: who tests the test?

# %%
import inspect

import numpy as np

import minilora as ml
from minilora import autograd, check
from minilora.autograd.tensor import pullback, unbroadcast
from minilora.course import lab
from minilora.course.lesson_01 import SUSPECTS, difference_errors, slopes, softmax
from minilora.plots import lesson_01 as figures

# %% [markdown]
# ## 1. One operation, forward and backward
#
# An operation takes arrays and gives an array. Somewhere behind it stands the loss L, one number. Write
# **ȳ = ∂L/∂y**: how much L changes when y changes. It is called the *cotangent* of y, and it has the shape of y.
#
# Backward of an operation is one job: it is given ȳ and returns x̄. It does not need to know L.
#
# Here are two operations of the library, whole. Each forward keeps what its backward will need. (In the docstrings ā is the
# cotangent of a. `self.needs[0]` says whether anybody asks for the first input's cotangent.)

# %%
print(inspect.getsource(autograd.Op.registry["Tanh"]))
print(inspect.getsource(autograd.Op.registry["Multiply"]))

# %% [markdown]
# Now by hand, with numbers, for z = tanh(x) · y at x = 0.5, y = 2. Let L = 3 z, so that z̄ = 3.

# %%
x, y, dz = 0.5, 2.0, 3.0
t = np.tanh(x)                              # forward, first operation
z = t * y                                   # forward, second operation
dt, dy = dz * y, dz * t                     # backward of the second
dx = dt * (1 - t * t)                       # backward of the first

a, b = ml.tensor(np.array(x), requires_grad=True), ml.tensor(np.array(y), requires_grad=True)
(autograd.tanh(a) * b).backward(np.array(dz))

print(f"by hand     dx = {dx:.6f}   dy = {dy:.6f}")
print(f"the library dx = {a.grad:.6f}   dy = {b.grad:.6f}")
assert a.grad == dx and b.grad == dy

# %% [markdown]
# The library walks from the last operation to the first. This is the whole walk; you need not read it all. Look for the one
# line that *adds* (`.add(held, gradient)`): a tensor that was used twice gets two cotangents, and they are added.

# %%
print(inspect.getsource(pullback))

# %%
a = ml.tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
(a * a).sum().backward()                    # a is used twice: a + a, not a
print(a.grad)
assert np.array_equal(a.grad, 2 * a.data)

# %% [markdown]
# One more rule. When shapes differ, NumPy *copies* the smaller array along the missing axes (broadcasting). A copy
# forward is a **sum** backward: each copy moves the loss, and the effects add up. The library does it in one place.

# %%
print(inspect.getsource(unbroadcast))

# %% [markdown]
# ### Exercise 01.1 · ●○○ · 10 min
#
# Write the backward of z = tanh(x) · y in NumPy. The shapes of x and y may differ: z has the shape that broadcasting
# gives, and so has dz. Return dx in the shape of x and dy in the shape of y.
#
# You may use the library's `unbroadcast(gradient, shape)`, or write the sums yourself.
#
# <details><summary>Hint 1</summary>
# Write z element by element for equal shapes first. dx is dz times the slope of z along x.</details>
# <details><summary>Hint 2</summary>The slope of tanh can be written with tanh itself.</details>
# <details><summary>Hint 3</summary>
# Copying forward means adding backward: sum over the axes along which an input was copied.</details>

# %% exercise="tanh_times_grad"
def tanh_times_grad(dz, x, y):
    """Gradients of z = tanh(x) y: dz (broadcast shape), x (...), y (...) -> dx like x, dy like y."""
    # BEGIN SOLUTION
    from minilora.autograd.tensor import unbroadcast

    t = np.tanh(x)
    return unbroadcast(dz * y * (1 - t * t), x.shape), unbroadcast(dz * t, y.shape)
    # END SOLUTION

# %% check="tanh_times_grad"
check.tanh_times_grad(tanh_times_grad)

# %% [markdown]
# ## 2. Measure the slope
#
# The definition of a slope needs no rule of differentiation. Move one element by ε to both sides and look at the loss:
#
# $$\frac{\partial L}{\partial x_i} \approx \frac{L(x + \varepsilon e_i) - L(x - \varepsilon e_i)}{2\varepsilon}.$$
#
# A second way, the *complex step*, moves x_i by iε and reads the imaginary part, Im L(x + iε e_i) / ε. Nothing is
# subtracted there.
#
# We measure L = Σ c ⊙ softmax(tanh x) in 24 numbers x, with fixed weights c. Its gradient is known, so each measured slope has
# a relative error. Which ε is best? Guess the exponent k of ε = 10⁻ᵏ for float64, and for float32. Put your numbers in place of
# `None`.

# %%
check.guess("01.k64", None)
check.guess("01.k32", None)

# %%
exponents = np.arange(0, 21)
steps = 10.0 ** -exponents
errors = difference_errors(steps)                                  # of a right gradient, in three ways: (21, 24) each
worst = {kind: values.max(axis=1) for kind, values in errors.items()}

check.compare("01.k64", int(exponents[worst["float64"].argmin()]))
check.compare("01.k32", int(exponents[worst["float32"].argmin()]))
lab.show(figures.epsilon_valley({"steps": steps, "errors": worst, "library_eps": 1e-5}))

# %% [markdown]
# Two errors fight. With a large ε the function bends between the two points: the error falls with ε². With a small ε
# two almost equal numbers are subtracted, and their rounding is divided by ε: the error grows. The complex step has
# only the first of the two, so it may use ε = 10⁻²⁰.
#
# Now the surprise. **The gradient that is measured here is right.** What does float32 say about it?

# %%
at = int(np.flatnonzero(exponents == 5)[0])                        # ε = 1e-5
for kind in ("float32", "float64", "complex"):
    print(f"{kind:8s} ε = 1e-5   largest error {worst[kind][at]:.1e}   median {np.median(errors[kind][at]):.1e}")
print(f"float32 at its best ε: {worst['float32'].min():.1e}      float64 at its best: {worst['float64'].min():.1e}")

assert worst["float64"][at] < 1e-7                                 # float64: clearly right
assert worst["float32"][at] > 1e-2                                 # float32 at the same ε: "wrong"
assert worst["float32"].min() > 100 * worst["float64"].min()       # and no ε saves it
assert worst["complex"][-1] < 1e-11                                # the complex step at 1e-20

# %% [markdown]
# In float32 a right gradient looks wrong, and a gradient that is a little wrong looks no worse. So
# gradients are checked in float64.
#
# `ml.gradcheck(f, inputs)` makes such a check of a function on tensors. It measures with ε = 10⁻⁵, compares every element, and
# raises `GradcheckError` if one is wrong. It refuses anything but float64.

# %%
try:
    ml.gradcheck(ml.softmax, [np.ones((2, 3), np.float32)])
    raise AssertionError("float32 was accepted")
except (TypeError, ValueError) as error:
    print(error)

# %% [markdown]
# ## 3. Why the cotangent has to be random
#
# L is one number, an operation's output is an array. So a test needs weights: L = Σ c ⊙ f(x). Then c is the cotangent of f(x).
# Many tests take c = 1, 1, …, that is, `f(x).sum()`.
#
# Here is a softmax whose backward is as wrong as can be. It always returns zero.

# %%
class ZeroSoftmax(autograd.Op.registry["Softmax"]):
    """Softmax over the last axis with a backward that is wrong."""

    def backward(self, dy):
        return np.zeros_like(dy)


x = np.random.default_rng(0).standard_normal((3, 5))

# %% [markdown]
# We measure the slopes of `softmax(x).sum()` at these 15 numbers. How large is the largest one? Guess.

# %%
check.guess("01.ones", None)

# %%
def largest_slope(weights):
    """The largest slope of Σ weights ⊙ softmax(x), measured by the complex step."""
    return float(f"{np.abs(slopes(softmax, x, weights)).max():.1e}")


ones, random = np.ones(x.shape), np.random.default_rng(1).standard_normal(x.shape)
check.compare("01.ones", largest_slope(ones))
print(f"with random weights: {largest_slope(random)}")
assert largest_slope(ones) < 1e-12 and largest_slope(random) > 0.05

# %% [markdown]
# The outputs of a softmax add up to 1, whatever x is. Their sum has no slope at all, and so zero is the *right* answer
# to the wrong question. The test with ones passes; the test with a random cotangent does not.

# %% exact=true
assert ml.gradcheck(lambda x: ZeroSoftmax()(x).sum(-1), [x])       # summed: every cotangent of a row is the same
print("summed first: the wrong softmax passes")
try:
    ml.gradcheck(lambda x: ZeroSoftmax()(x), [x])
    raise AssertionError("the wrong softmax passed")
except ml.GradcheckError:
    print("random cotangent: the wrong softmax is caught")

# %% [markdown]
# ### Exercise 01.2 · ●●○ · 15 min
#
# Write the right one. `y` is the softmax of some x over `axis`; only y is kept, x is gone. `dy` is the cotangent of y.
# Return the cotangent of x. The Jacobian of one row has n² entries: you need not form it.
#
# <details><summary>Hint 1</summary>Start with one row: ∂y_i/∂x_j is y_i (1 - y_i) for i = j, and -y_i y_j otherwise.</details>
# <details><summary>Hint 2</summary>dx_j = Σ_i dy_i ∂y_i/∂x_j. Take y_j out of the sum.</details>
# <details><summary>Hint 3</summary>
# What is left is one number for each row; <code>keepdims=True</code> lets it broadcast back.</details>
# <details><summary>Plug it into the library</summary>
#
# ```python
# class MySoftmax(autograd.Op):
#     def forward(self, x):
#         e = np.exp(x - x.max(-1, keepdims=True))
#         return self.keep(e / e.sum(-1, keepdims=True))
#
#     def backward(self, dy):
#         return softmax_grad(dy, self.kept, -1)
#
# ml.gradcheck(lambda x: MySoftmax()(x), [x])
# ```
# </details>

# %% exercise="softmax_grad"
def softmax_grad(dy, y, axis):
    """Backward of y = softmax(x) over axis: dy and y of one shape (...), axis an integer -> dx (...)."""
    # BEGIN SOLUTION
    return y * (dy - (dy * y).sum(axis=axis, keepdims=True))
    # END SOLUTION

# %% check="softmax_grad"
check.softmax_grad(softmax_grad)

# %% [markdown]
# ## 4. What a test that passed has not shown
#
# Five small operations, each with a backward of its own. We check them all, with a random cotangent and in float64.

# %% exact=true
x = np.random.default_rng(2).standard_normal((3, 4))
other = np.random.default_rng(3).standard_normal((3, 4))
assert ml.gradcheck(lambda a, b: SUSPECTS["subtract"](a, b), [x, other])
assert ml.gradcheck(lambda a: SUSPECTS["gather"](a, np.array([0, 2])), [x])
assert all(ml.gradcheck(SUSPECTS[name], [x]) for name in ("relu", "mean", "log_sum_exp"))
print("all five pass:", ", ".join(SUSPECTS))

# %% [markdown]
# All pass, and **two of them are wrong**. A gradient check says something about the inputs that you gave it, and
# nothing about others.
#
# ### Exercise 01.3 · ●●○ · 15 min
#
# Find the two. `subtract(a, b)` is a - b, `gather(table, rows)` is table[rows], `relu` is max(x, 0), `mean` and
# `log_sum_exp` work on the last axis. All are in `SUSPECTS`, and `ml.gradcheck` is your tool, as in the cell above. Feed them
# unusual inputs. Be fair: an operation that is refused is not always guilty. The answer is a set of two names, as
# `{"relu", "mean"}`.
#
# <details><summary>Hint 1</summary>Which inputs make each of the five do something special?</details>
# <details><summary>Hint 2</summary>Try an index that occurs twice, sizes of 1, one tensor in both places, and zeros.</details>
# <details><summary>Hint 3</summary>
# Where a function has a kink it has no slope. Nothing that its backward says can agree there.</details>

# %% exercise="bug_hunt"
guilty = ...
# BEGIN SOLUTION
guilty = {"subtract", "gather"}
# END SOLUTION

# %% check="bug_hunt"
check.bug_hunt(guilty)

# %% [markdown]
# ### Exercise 01.4 · ●●○ · 20 min
#
# Now write the test yourself, without `gradcheck`. `f(x)` is a function on NumPy arrays, elementwise or not.
# `df(x, dy)` claims to be its backward. Say `True` if the claim is right, `False` if not.
#
# Your test will be tested: on gradients that are right (small ones, and ones of size 10⁶), and on gradients that are wrong:
# in sign, in one element, by 0.01 %. All arrays are float64.
#
# <details><summary>Hint 1</summary>
# Draw one random dy. The claim is df(x, dy); what you measure is the slope of Σ dy ⊙ f(x).</details>
# <details><summary>Hint 2</summary>
# For each element: a copy of x with ε added there, another with ε taken away; the slope is the difference over 2ε.</details>
# <details><summary>Hint 3</summary>
# <code>np.allclose(claimed, measured, rtol=1e-6, atol=…)</code>: make atol a small part of the largest slope.</details>

# %% exercise="gradient_test"
def gradient_test(f, df, x):
    """Whether df is the backward of f: f(x) -> y, df(x, dy) -> dx, x float64 (...) -> True or False."""
    # BEGIN SOLUTION
    dy = np.random.default_rng(0).standard_normal(f(x).shape)
    measured = np.zeros(x.shape)
    for where in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[where] = 1e-5
        measured[where] = (dy * (f(x + step) - f(x - step))).sum() / 2e-5
    return bool(np.allclose(df(x, dy), measured, rtol=1e-6, atol=1e-8 * np.abs(measured).max()))
    # END SOLUTION

# %% check="gradient_test"
check.gradient_test(gradient_test)

# %% [markdown]
# ## 5. A whole model
#
# Differences cost two forward passes for *each number*. Backward does about the arithmetic of two forward passes for *all*
# of them together. That is the reason why backpropagation exists, and why nobody trains with differences.

# %% exact=true
numbers = ml.count_parameters(ml.Transformer(lab.SETTING.config))["total"]
print(f"{numbers:,} numbers: {2 * numbers:,} forward passes to measure one gradient")
assert 2 * numbers > 200_000

# %% [markdown]
# A whole model is still checked, and cheaply: along a few random directions instead of along every axis. A backward that is
# wrong anywhere changes the slope along almost every direction.

# %% exact=true
config = ml.TransformerConfig.gpt2(vocab_size=11, d_model=8, n_layers=1, n_heads=2, max_len=6)
model = ml.Transformer(config, seed=1, dtype="float64")
ids = np.random.default_rng(4).integers(0, 11, (2, 6))
parameters = [p for _, p in model.named_parameters()]
assert ml.gradcheck(lambda *_: model.loss(ids[:, :-1], ids[:, 1:]), parameters, directions=2)
print(f"{len(parameters)} arrays of a Transformer, {sum(p.size for p in parameters)} numbers: all gradients are right")

# %% [markdown]
# ## What you should be able to say now
#
# - Backward turns the cotangent of an output into the cotangents of the inputs; a copy forward is a sum backward.
# - A gradient is checked with differences, in float64, against a *random* cotangent, on inputs that include the odd ones.
# - A test is worth what the wrong answers that it refuses are worth.

# %% [markdown] slide=true
# ## The slide
#
# **How do you know a gradient is right?**
# - backward: ȳ → x̄ = Jᵀ ȳ, one operation at a time, from last to first
# - used twice → add; copied by broadcasting → sum
# - measure: (L(x+ε) − L(x−ε)) / 2ε, float64, ε = 10⁻⁵
# - random cotangent: with ones, a softmax with backward 0 passes
# - repeated index, same tensor twice, size 1: test those too
