# %% [markdown]
# # 09 · Cost
#
# **What does LoRA save, and what not?**
#
# *You will do:* count the arithmetic of one step before you time it. Write the ledger of a 7B model's memory. Count the
# products that a token costs with an adapter beside, and merged.
#
# *You will learn:* that LoRA saves at most a third of a step's arithmetic, and that small products can eat even that.
# That memory is saved where the weights are, and not where the activations are. That a merged adapter costs exactly
# nothing.
#
# *You need:* lesson 03 (A, B, s, the gradients of a layer). Arithmetic with large numbers. No GPU; with one, the last
# section runs too.

# %% [markdown] teacher=true
# **For the teacher.** 50 minutes: section 1 takes 20, section 2 takes 15, section 3 takes 8, section 4 takes 7 (or
# nothing).
#
# *Board plan.* Left: the three products of a layer (y, dx, dW) as boxes n × d × k; cross out dW: this is all that LoRA
# saves. Beside it the thin boxes of A and B. Right: one column of bytes a number: 2 (frozen), 16 (trains). Below: what
# grows with the batch.
#
# *The poll* (before the timing): "LoRA trains 1 % of the numbers. How long is a step, if full fine-tuning takes 1?"
# Collect answers from 0.01 to 1.2. The law says: never below 2/3.
#
# *What to expect.* In 09.1 many forget that the branch has a backward pass, or that x needs a gradient through W. In
# 09.3 the base is forgotten, as in several public courses. Timings differ from machine to machine and from run to run:
# on a shared machine the thin way may come out slower than full fine-tuning or faster. Let the class compare; the
# counts do not move. Nothing in this notebook asserts a timing.

# %%
import time
import tracemalloc

import numpy as np

import minilora as ml
from minilora import check
from minilora.autograd.linear import LoRALinear
from minilora.backend.parallel import one_worker
from minilora.bench.products import product_seconds, timed_ops, wait
from minilora.course import lab
from minilora.plots import lesson_09 as figures
from minilora.training import AdamW

# %% [markdown]
# ## 1. Arithmetic: never below two thirds
#
# One layer, n tokens, W (out, in). Full fine-tuning does three large products: y = x Wᵀ forward, and backward the
# gradients of x and of W. LoRA needs no gradient of W. The two others stay: the frozen W is still multiplied, twice.
# That is the 2/3.
#
# How the branch is computed is a choice. A bar means a gradient: ȳ (n, out) is the loss's gradient with respect to y.
#
# | | *thin*: the branch beside the base product | *formed*: W' = W + s·B A is made once |
# |---|---|---|
# | forward | U = x Aᵀ, y = x Wᵀ + s·U Bᵀ | y = x W'ᵀ |
# | backward, to x | Z = s·ȳ B, x̄ = ȳ W + Z A | x̄ = ȳ W' |
# | backward, to A and B | Ā = Zᵀ x, B̄ = s·ȳᵀ U | Z = s·ȳ B, Ā = Zᵀ x; U = x Aᵀ, B̄ = s·ȳᵀ U |
#
# U and Z are thin, n × r. The library has both ways in autograd/linear.py.

# %% [markdown]
# ### Exercise 09.1 · ●○○ · 8 min
#
# Count the multiply-adds of one step, forward and backward, on a layer W (out, in) with n tokens. x needs its gradient
# too. Return three integers: full fine-tuning; LoRA thin; LoRA formed (the product B A counts too). Products of matrices
# only: adding and scaling do not count.
#
# <details><summary>Hint 1</summary>A product of (a, b) by (b, c) takes a·b·c multiply-adds.</details>
# <details><summary>Hint 2</summary>Thin: A and B each stand in three small products. Formed: B A once, and two thin
# rounds.</details>

# %% exercise="step_cost"
def step_cost(n, out, inn, r):
    """Multiply-adds of a step on n tokens: full fine-tuning, LoRA thin, LoRA formed. Three integers."""
    # BEGIN SOLUTION
    large, thin_round = n * out * inn, n * r * (out + inn)
    return 3 * large, 2 * large + 3 * thin_round, 2 * large + r * out * inn + 2 * thin_round
    # END SOLUTION

# %% check="step_cost"
check.step_cost(step_cost)

# %% [markdown]
# Is that what the library really does? We need not believe it: `timed_ops` notes every product that runs, with its
# shape. So we do one step in each of the three ways and add up.

# %% exact=true
def ways(n, out, inn, r=8):
    """The three ways to do one step on a layer: name -> a function that does it, forward and backward."""
    rng = np.random.default_rng(0)

    def draw(*size, grad=False):
        return ml.tensor(ml.to_device(rng.standard_normal(size, dtype=np.float32)), requires_grad=grad)

    x, A, B, W, frozen = (draw(*size, grad=grad) for size, grad in
                          (((n, inn), True), ((r, inn), True), ((out, r), True), ((out, inn), True), ((out, inn), False)))
    dy = draw(n, out).data

    def run(y):
        for leaf in (x, A, B, W):
            leaf.grad = None                               # else a second step would add to the first
        y.backward(dy)

    def lora(formed):
        return LoRALinear([2.0], [slice(0, out)], [None], formed)(x, frozen, None, A, B)

    return {"full": lambda: run(ml.linear(x, W)), "thin": lambda: run(lora(False)), "formed": lambda: run(lora(True))}


def products_of(step):
    """The matrix products that a step does, each with its shape."""
    noted = []
    with timed_ops({}, noted):
        step()
    return noted


n, out, inn, r = 96, 40, 24, 3
counted = {name: sum(p.flops for p in products_of(step)) // 2 for name, step in ways(n, out, inn, r).items()}
print({name: f"{count:,}" for name, count in counted.items()})
assert counted["full"] == 3 * n * out * inn
assert counted["thin"] == 2 * n * out * inn + 3 * n * r * (out + inn)
assert counted["formed"] == 2 * n * out * inn + r * out * inn + 2 * n * r * (out + inn)

# %% [markdown]
# To the last multiply-add. The large products alone are 2/3 of full fine-tuning, so no order and no library can go
# below it.
#
# ### Exercise 09.2 · ●●○ · 8 min
#
# From how many tokens on does *forming* W + s·B A take fewer multiply-adds than the thin order? Return the smallest
# whole n for a layer W (out, in). (The rank does not matter. Why?)
#
# <details><summary>Hint 1</summary>Set the two counts equal and take away what stands on both sides.</details>
# <details><summary>Hint 2</summary>Fewer is strict: at a tie nothing is saved.</details>

# %% exercise="break_even"
def break_even(out, inn):
    """The smallest number of tokens with which the formed way is cheaper, by multiply-adds: an integer."""
    # BEGIN SOLUTION
    return out * inn // (out + inn) + 1
    # END SOLUTION

# %% check="break_even"
check.break_even(break_even)

# %% [markdown]
# r falls out, because each term of both branches has it once. The library uses this rule with a margin: W + s·B A has
# to be written and kept too, so it is formed when that takes less than half as much (`_forming_pays` in
# autograd/linear.py).
#
# Now the clock. Three shapes, rank 8. Each way is timed in turn, again and again, so that a busy machine hits all of
# them alike; the median counts. *floor* is what the products alone take on this machine, each shape measured by itself:
# the rest is Python, additions and memory.
#
# **Guess.** 2,048 tokens through a layer 768 × 768: how long does LoRA in the thin order take, if full fine-tuning
# takes 1?

# %%
check.guess("09.thin", None)

# %%
def medians(steps, rounds):
    """Median seconds of each step, taken in turn."""
    taken = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            wait()                                         # a GPU is asked, and goes on by itself
            if turn:                                       # the first turn warms up
                taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def compare_ways(shapes, rounds, r=8):
    """Counted and measured times of LoRA, relative to full fine-tuning, for every shape (n, out, in)."""
    rows = []
    print(f"{'n, out, in':>20}{'':8}{'counted':>9}{'measured':>10}{'floor':>8}{'ms':>9}")
    for n, out, inn in shapes:
        steps = ways(n, out, inn, r)
        products = {name: products_of(step) for name, step in steps.items()}
        floor = {name: sum(product_seconds(p, 1, repeats=1) for p in found) for name, found in products.items()}
        flops, seconds = {name: sum(p.flops for p in found) for name, found in products.items()}, medians(steps, rounds)
        for name in steps:
            row = {"shape": f"{n:,} tokens\n{out} × {inn}", "way": name, "counted": flops[name] / flops["full"],
                   "measured": seconds[name] / seconds["full"]}
            print(f"{f'{n}, {out}, {inn}':>20}{name:>8}{row['counted']:9.2f}{row['measured']:10.2f}"
                  f"{floor[name] / floor['full']:8.2f}{1e3 * seconds[name]:9.2f}")
            rows += [row] if name != "full" else []
    return rows


shapes = [(512, 128, 128), (1024, 1024, 256), (2048, 768, 768)]
times = compare_ways(shapes, rounds=15 if lab.FULL else 2)
check.compare("09.thin", next(row["measured"] for row in times[::-1] if row["way"] == "thin"))
assert all(2 / 3 < row["counted"] < 1 for row in times)    # the counts are a law; the times are only looked at

# %% [markdown]
# What was counted is below 1 everywhere. What was measured need not be: a thin product (n × 8) keeps a processor much
# less busy than a large one, and there are more of them. That is why the library forms W + s·B A by itself when it
# saves enough. "LoRA trains 2 to 3 times faster" cannot come from the arithmetic. (It can come from memory: a larger
# batch that fits, or an optimiser state that need not be moved.)
#
# ## 2. Memory: where the weights are
#
# A number that trains takes 16 bytes: itself, its gradient, Adam's two averages, and in bf16 training a float32 copy. A
# frozen number takes 2. This is what LoRA saves, and it is a lot. But activations take what they take.
#
# **Guess.** Llama-2-7B, sequences of 2,048 tokens, LoRA with r = 8 on all linear layers. How many times less memory
# than full fine-tuning does it take at batch 1, and how many times less at batch 64?

# %%
check.guess("09.batch_1", None)
check.guess("09.batch_64", None)

# %%
adapter = ml.LoraConfig(r=8, target_modules="all-linear")
memory = []
for batch in (1, 4, 16, 64):
    whole, lora = (ml.params("llama-2-7b", config, batch=batch, tokens=2048) for config in (None, adapter))
    memory.append({"batch": batch, "full": whole.memory["bf16"], "LoRA": lora.memory["bf16"]})
    if batch == 1:
        print(lora.table(), "\n")
ratios = {row["batch"]: sum(row["full"].values()) / sum(row["LoRA"].values()) for row in memory}
print("full fine-tuning / LoRA, in bf16:", ", ".join(f"batch {batch}: {ratio:.2f}" for batch, ratio in ratios.items()))
check.compare("09.batch_1", ratios[1])
check.compare("09.batch_64", ratios[64])
assert 4.5 < ratios[1] < 5.5 and 1.0 < ratios[64] < 1.3
share = sum(memory[0]["LoRA"][part] for part in ("gradients", "optimizer")) / sum(memory[0]["LoRA"].values())
print(f"of LoRA's memory at batch 1, the adapter's gradients and Adam are {share:.1%}")
assert share < 0.02

# %% [markdown]
# "Only the adapter is stored in memory" is false: at batch 1 nearly all of LoRA's memory is the frozen model and its
# activations. What helps next is to make these smaller: 4-bit weights (QLoRA) and recomputing activations. Both work
# without LoRA's help.
#
# ### Exercise 09.3 · ●●○ · 10 min
#
# Write the ledger. A model has `base` numbers, its adapter `adapter` numbers. How many bytes do weights, gradients and
# optimiser take together in bf16 training with AdamW, without activations: for full fine-tuning, and for LoRA? Full:
# bf16 weights and gradients, a float32 copy of the weights, Adam's two averages in float32. LoRA: a frozen bf16 base;
# the adapter, its gradient and Adam in float32. The check compares with `minilora params` on GPT-2, Llama-2-7B and 13B,
# to the byte.
#
# <details><summary>Hint 1</summary>float32 takes 4 bytes, bf16 takes 2.</details>
# <details><summary>Hint 2</summary>A frozen number has no gradient and no Adam, but it is there.</details>

# %% exercise="training_bytes"
def training_bytes(base, adapter):
    """Bytes of weights, gradients and optimiser in bf16 training: full fine-tuning, LoRA. Two integers."""
    # BEGIN SOLUTION
    return (2 + 2 + 4 + 8) * base, 2 * base + (4 + 4 + 8) * adapter
    # END SOLUTION

# %% check="training_bytes"
check.training_bytes(training_bytes)

# %% [markdown]
# An estimate of activations is easy to get wrong. So let us hold it against a real run: what Python's `tracemalloc`
# finds alive between forward and backward on the small model of these lessons, in float32.
#
# **Guess.** At batch 16, full fine-tuning keeps 100 bytes of activations. How many does LoRA on all linear layers keep?

# %%
check.guess("09.kept", None)

# %%
def kept(config, batch):
    """Bytes alive between forward and backward, as measured and as `params` says."""
    model, rng = lab.base(), np.random.default_rng(0)
    if config is None:
        model.unfreeze()
    else:
        ml.add_adapter(model, config)
    ids, targets = rng.integers(0, 256, (2, batch, 64))
    optimizer = AdamW([p for _, p in model.named_parameters(trainable=True)], lr=1e-3)
    model.loss(ids, targets).backward()                    # once before, so that nothing is allocated for the first time
    optimizer.step()
    optimizer.zero_grad()
    tracemalloc.start()
    loss = model.loss(ids, targets)
    found = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert np.isfinite(loss.item())
    return found, ml.params(model.cfg, config, batch=batch, tokens=64).memory["float32"]["activations"]


with one_worker():                                         # threads that share a batch need room of their own
    measured = {(name, batch): kept(config, batch) for batch in (4, 16) for name, config in (("full", None), ("LoRA", adapter))}
for (name, batch), (found, estimate) in measured.items():
    print(f"batch {batch:2}, {name}: kept {found / 1e6:6.2f} MB, estimated {estimate / 1e6:6.2f} MB")
    assert abs(found / estimate - 1) < 0.05
check.compare("09.kept", 100 * measured["LoRA", 16][0] / measured["full", 16][0])
assert 0.7 < measured["LoRA", 16][0] / measured["full", 16][0] < 1.3

# %% [markdown]
# LoRA keeps nearly all of it: A's gradient needs the input of its layer, and the nonlinear parts need theirs.
#
# ## 3. In use: nothing at all, if merged
#
# ### Exercise 09.4 · ●○○ · 5 min
#
# One token goes through a layer W (out, in). How many multiply-adds does it take: with the base alone, with the branch
# kept beside it (rank r), and with the adapter merged? Three integers.
#
# <details><summary>Hint 1</summary>With the branch there are three products: W x, A x, and B times that.</details>
# <details><summary>Hint 2</summary>A merged weight has the shape of W.</details>

# %% exercise="token_cost"
def token_cost(out, inn, r):
    """Multiply-adds of one token through one layer: base, branch kept, merged. Three integers."""
    # BEGIN SOLUTION
    return out * inn, out * inn + r * (out + inn), out * inn
    # END SOLUTION

# %% check="token_cost"
check.token_cost(token_cost)

# %% [markdown]
# On the whole small model, counted by the library as it runs one token. It has four linear layers in each of its two
# blocks (q, k and v are one), and a head.
#
# **Guess.** How many products does a token take with the adapter as a branch, and how many with the adapter merged?

# %%
check.guess("09.branch", None)
check.guess("09.merged", None)

# %% exact=true
model, token = lab.base(), np.array([[65]])
ml.add_adapter(model, adapter)


def one_token():
    """The forward pass of one token."""
    with ml.no_grad():
        model(token)


counts = {}
with ml.disable_adapter(model):
    counts["base"] = products_of(one_token)
counts["branch"] = products_of(one_token)
ml.merge_adapter(model)
counts["merged"] = products_of(one_token)
for name, found in counts.items():
    print(f"{name:7} {len(found):3} products, {sum(p.flops for p in found) // 2:8,} multiply-adds")
check.compare("09.branch", len(counts["branch"]))
check.compare("09.merged", len(counts["merged"]))
assert [len(found) for found in counts.values()] == [9, 9 + 2 * 8, 9]
assert counts["merged"] == counts["base"]                  # the very same products

# %% [markdown]
# A merged adapter is free: the products are the same ones, shape for shape. A branch costs few multiply-adds (14 %
# here, 0.3 % in the 7B) but almost three times as many products, and for a single token it is their number that costs
# time. Keep the branch only if you must: when rows of one batch use different adapters.
#
# What is always saved is the file.

# %%
print(f"Llama-2-7B in half precision: {whole.file_size(2) / 1e9:.1f} GB")
print(f"its adapter in float32: {lora.file_size(4) / 1e6:.0f} MB, {whole.file_size(2) / lora.file_size(4):.0f} times less")
assert whole.file_size(2) > 150 * lora.file_size(4)
lab.show(figures.cost({"times": times, "memory": memory, "model": "Llama-2-7B in bf16, 2,048 tokens a sequence"}))

# %% [markdown]
# ## 4. The same on a GPU
#
# The same code runs on a GPU, by CuPy. Without one the next cell says so and does nothing. Three shapes: the largest
# one from above, one as in a 7B model, and the same with only 64 tokens. Guess before you run it: at which of them does
# the thin order lose most?

# %%
try:
    ml.set_device("gpu")
except (ImportError, RuntimeError) as reason:
    print(f"Skipped, because there is no GPU here. ({reason})")
else:
    try:
        compare_ways([(2048, 768, 768), (8192, 4096, 4096), (64, 4096, 4096)], rounds=30, r=16)
    finally:
        ml.set_device("cpu")

# %% [markdown]
# ## What you should be able to say now
#
# * LoRA saves one of three large products: a step's arithmetic never falls below 2/3, and thin products can eat the
#   saving.
# * It saves the gradients and the optimiser of the frozen weights: 5 times less memory at batch 1, hardly any at batch
#   64.
# * In use a merged adapter costs nothing; a branch costs two more products a layer. The file is what is always small.

# %% [markdown] slide=true
# ## The slide
#
# * Step: full 3ndk, LoRA 2ndk + 3nr(d + k). Never below 2/3.
# * Form W + sBA once when n > dk/(d + k).
# * Bytes a number: trains 16, frozen 2. Activations stay.
# * 7B, 2,048 tokens: 5.0 times less memory at batch 1, 1.1 times at batch 64.
# * A token: base 1 product a layer, branch 3, merged 1.
# * "2 to 3 times faster": not from arithmetic. "Only the adapter is in memory": no.
