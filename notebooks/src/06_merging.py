# %% [markdown]
# # 06 · Merging and composing
#
# **Can adapters be added like numbers?**
#
# An adapter is a matrix, and matrices can be added. This lesson shows what that gives, what it does not give, and where the
# digits of the computer get in the way.
#
# **You'll do:** add two adapters exactly and at a fixed rank; see what the sum does to both tasks; serve both in one batch;
# merge, unmerge, and merge into half precision.
#
# **You'll learn:** sums hold for ΔW and not for A and B; a sum of updates is not a sum of skills; when 16 bits swallow an
# update.
#
# **You need:** lesson 03 (ΔW = s·B@A) and lesson 04 (best rank-q approximation).

# %% [markdown] teacher=true
# 60 minutes: 15 section 1, 20 section 2, 10 section 3, 15 section 4. Board: (B₁+B₂)(A₁+A₂) multiplied out, the two cross
# terms in red; beside it [B₁ B₂] over [A₁; A₂]. Later the number line of bf16 between 1 and 1 + 2⁻⁷, with the tie in the
# middle. Poll before section 2: "Two adapters whose updates are orthogonal. Does their sum keep both skills?" Expect yes; the
# figure says no, and that is the discussion of this lesson: orthogonal as matrices is not independent as functions, since
# layers and softmax are not linear. Poll before section 4: "Merge an update of 0.1 % of W into bf16. How many entries
# change?" Expect "subtract it again" as the way to unmerge, and −1 as an index into a list of adapters (it takes the last
# one, silently).

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import minilora as ml
from minilora import check
from minilora.course import lab
from minilora.data import eval_batches, load_corpus
from minilora.lora import adapters_of
from minilora.lora.peft_format import from_bf16
from minilora.methods.four_bit import FourBit
from minilora.plots import lesson_06 as figures
from minilora.pretrained.safetensors_file import to_bf16
from minilora.rank import interference, updates
from minilora.rank.update import set_factors
from minilora.training import mean_loss

folder = tempfile.TemporaryDirectory()
place = Path(folder.name)

# %% [markdown]
# ## 1. Sums of products, sums of factors
#
# One base, two adapters of rank 8. The first learns Python. The second learns to SHOUT: the same English prose, in capital
# letters. Each is trained alone and saved in PEFT's files.

# %%
def shouted(text):
    """Bytes in capital letters: (n,) -> (n,)."""
    return np.frombuffer(text.tobytes().upper(), np.uint8)


prose = load_corpus("prose")
shout = replace(prose, name="shout", train=shouted(prose.train), valid=shouted(prose.valid))
tests = {"Python": lab.valid("python"),
         "SHOUT": eval_batches(shout.valid, 64, lab.SETTING.pretraining.tokens, limit=lab.SETTING.windows)}
config = ml.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")


def losses(model):
    """The losses on both tasks."""
    return [mean_loss(model, windows) for windows in tests.values()]


table = {"none": losses(lab.base())}
for seed, (task, corpus) in enumerate({"Python": load_corpus("python"), "SHOUT": shout}.items()):
    model = lab.base()
    ml.add_adapter(model, config, seed=seed)
    ml.train(model, lab.batches(corpus, seed), lab.SETTING.schedule(3e-3))
    ml.save_adapter(model, place / task)
    table[task] = losses(model)
for name, values in table.items():
    print(f"{name:8} loss on Python {values[0]:.3f}, on SHOUT {values[1]:.3f}")
if lab.FULL:
    assert table["Python"][0] < table["none"][0] - 0.1 and table["SHOUT"][1] < table["none"][1] - 0.3

# %% [markdown]
# We want half of each: ΔW = ½ ΔW₁ + ½ ΔW₂. Some tools average the factors: A = (A₁ + A₂)/2, B = (B₁ + B₂)/2. Multiply that
# out: it is ¼(B₁A₁ + B₂A₂ + **B₁A₂ + B₂A₁**), and the last two mean nothing. Guess the relative error of three ways: averaged
# factors; factors side by side (`how="cat"`, rank 16); the best rank 8 of the sum (`how="svd"`).

# %%
check.guess("06.averaged", None)
check.guess("06.cat", None)
check.guess("06.svd", None)

# %%
pair = [place / "Python", place / "SHOUT"]
made = {how: ml.compose(pair, place / how, [0.5, 0.5], how).to_dict()["summary"] for how in ("cat", "svd")}
ml.compose(pair, place / "quarter", [0.25, 0.25])
both = lab.base()
ml.load_adapter(both, pair[0], "Python")
ml.load_adapter(both, pair[1], "SHOUT")
first, second = updates(both, "Python"), updates(both, "SHOUT")

averaged = lab.base()
ml.add_adapter(averaged, config)
for path, adapter in adapters_of(averaged).items():
    set_factors(adapter, (first[path].A + second[path].A) / 2, (first[path].B + second[path].B) / 2)


def dense(update):
    """ΔW (d, k) in float64."""
    return update.scale * update.B.astype(float) @ update.A.astype(float)


wanted = {path: 0.5 * dense(first[path]) + 0.5 * dense(second[path]) for path in first}
size = sum(np.sum(total**2) for total in wanted.values()) ** 0.5
error = sum(np.sum((dense(update) - wanted[path]) ** 2) for path, update in updates(averaged).items()) ** 0.5 / size
check.compare("06.averaged", error)
check.compare("06.cat", made["cat"]["measured_error"])
check.compare("06.svd", made["svd"]["measured_error"])
print(f"√weighted factors, added: {made['cat']['linear_error']:.2f}")
assert made["cat"]["measured_error"] < 1e-6
assert abs(made["svd"]["measured_error"] - made["svd"]["predicted_error"]) < 1e-4       # Eckart and Young knew it before
assert error > 0.5

# %% [markdown]
# *Add products, not factors.* Side by side is exact, and costs rank. The best rank 8 has an error that the singular values
# tell in advance. Averaged factors are wrong by more than half. PEFT's `combination_type="linear"` adds √weighted factors:
# the last line of the output.

# %% [markdown]
# ### Exercise 06.1 · ●○○ · 8 min
#
# Write the exact sum. s1 and s2 are the scales of the two adapters, w1 and w2 their weights in the sum, all numbers. Return
# factors `(B, A)` of one adapter of rank r1 + r2 with scale 1, so that B@A = w1·s1·B1@A1 + w2·s2·B2@A2. A holds the rows of
# A1, then those of A2, unchanged.
#
# <details><summary>Hint 1</summary>A sum of two products is one product of longer factors: side by side for B, one above the
# other for A.</details>
# <details><summary>Hint 2</summary>Leave A1 and A2 as they are; each block of B takes its own weight and its own
# scale.</details>

# %% exercise="add_adapters"
def add_adapters(B1, A1, s1, B2, A2, s2, w1, w2):
    """(d, r1), (r1, k), (d, r2), (r2, k) -> B (d, r1 + r2), A (r1 + r2, k)."""
    # BEGIN SOLUTION
    return np.hstack([w1 * s1 * B1, w2 * s2 * B2]), np.vstack([A1, A2])
    # END SOLUTION

# %% check="add_adapters"
check.add_adapters(add_adapters)

# %% [markdown]
# ### Exercise 06.2 · ●●○ · 15 min
#
# Now at a fixed rank q. Return `(best, error)`: the best rank-q approximation (d, k) of w1·s1·B1@A1 + w2·s2·B2@A2, and its
# relative error in the Frobenius norm, computed from the singular values alone.
#
# <details><summary>Hint 1</summary>Form the sum (dense is fine here), take its SVD, keep q triplets.
# <code>np.linalg.svd</code> gives V transposed.</details>
# <details><summary>Hint 2</summary>Eckart and Young: the squared error is the sum of the squares of the σ that are cut
# off.</details>
# <details><summary>Hint 3</summary>Relative: divide by the norm of the whole sum, √Σσ².</details>

# %% exercise="sum_at_rank"
def sum_at_rank(B1, A1, s1, B2, A2, s2, w1, w2, q):
    """(d, r1), (r1, k), (d, r2), (r2, k) -> best (d, k), error (a number)."""
    # BEGIN SOLUTION
    U, S, Vh = np.linalg.svd(w1 * s1 * B1 @ A1 + w2 * s2 * B2 @ A2, full_matrices=False)
    return (U[:, :q] * S[:q]) @ Vh[:q], float(np.sqrt(np.sum(S[q:] ** 2) / np.sum(S**2)))
    # END SOLUTION

# %% check="sum_at_rank"
check.sum_at_rank(sum_at_rank)

# %% [markdown]
# ## 2. Is a sum of updates a sum of skills?
#
# First look at the updates. The cosine of ΔW₁ and ΔW₂, as long vectors, is 1 if they agree, 0 if they are orthogonal. Guess
# it. Then guess the loss on Python with the **whole** sum ΔW₁ + ΔW₂: near the Python adapter's, or worse?

# %%
check.guess("06.cosine", None)
check.guess("06.sum_python", None)

# %%
cosines = [interference(first[path], second[path])["cosine"] for path in first]
check.compare("06.cosine", float(np.mean(cosines)))
ml.set_adapter(both, ["Python", "SHOUT"])               # two active adapters: their updates add up
table["sum"] = losses(both)
for name, how in (("half of\neach", "cat"), ("half, best\nrank 8", "svd"), ("a quarter\nof each", "quarter")):
    model = lab.base()
    ml.load_adapter(model, place / how)
    table[name] = losses(model)
table["averaged\nfactors"] = losses(averaged)
check.compare("06.sum_python", table["sum"][0])
print(f"the Python adapter alone {table['Python'][0]:.3f}, the frozen base {table['none'][0]:.3f}")
if lab.FULL:
    assert max(map(abs, cosines)) < 0.15                               # nearly orthogonal, and yet:
    assert table["sum"][0] > table["none"][0] + 0.2                    # worse on Python than no adapter at all
    assert abs(table["half, best\nrank 8"][0] - table["half of\neach"][0]) < 0.1
lab.show(figures.composed(table, list(tests), table["none"]))

# %% [markdown]
# *The sum is exact, and on Python it is worse than no adapter at all.* The updates are nearly orthogonal, and that does not
# help: each changes the inputs of all later layers, and the model is not linear. (This is one pair of adapters. Two other
# pairs of seeds gave the same.) Half of each does less harm, and less good. Averaged factors look harmless here, but compare
# them with a quarter of each: that is what they are, with two cross terms added. So: the arithmetic can be trusted, its
# effect must be measured.

# %% [markdown]
# There is a way that loses nothing. Keep both adapters, and let every row of the batch choose. The base's product is computed
# once for all rows; only the thin branches differ.

# %%
ids = np.concatenate([windows[0][0][:2] for windows in tests.values()])                # two rows of Python, two of SHOUT
ml.set_adapter(both, ["Python", "SHOUT"])
with ml.no_grad():
    mixed = both(ids, adapter_names=["Python", "Python", "SHOUT", "__base__"]).data
    alone = []
    for row, name in zip(ids, ["Python", "Python", "SHOUT", None]):
        ml.set_adapter(both, name)
        alone.append(both(row[None]).data[0])
difference = float(np.abs(mixed - np.stack(alone)).max())
print(f"largest difference of a logit, mixed batch against one at a time: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# ### Exercise 06.3 · ●●○ · 15 min
#
# Write it for one linear layer. Row n of x (n, k) uses adapter `which[n]` of the lists Bs, As, scales; −1 means the base
# alone. Return y (n, d). Compute x @ W.T once, and form no W + ΔW.
#
# <details><summary>Hint 1</summary>x @ W.T is the same product for all rows. Only the thin branch differs.</details>
# <details><summary>Hint 2</summary>For each adapter take its rows (which == i), and add s·(x Aᵀ)Bᵀ to these rows
# only.</details>
# <details><summary>Hint 3</summary>−1 means no adapter. What does Python make of As[-1]?</details>

# %% exercise="mixed_batch"
def mixed_batch(x, W, Bs, As, scales, which):
    """(n, k), (d, k), lists of (d, r), (r, k) and numbers, (n,) integers -> (n, d)."""
    # BEGIN SOLUTION
    y = x @ W.T
    for i, (B, A, s) in enumerate(zip(Bs, As, scales)):
        mine = which == i
        y[mine] += s * (x[mine] @ A.T) @ B.T
    return y
    # END SOLUTION

# %% check="mixed_batch"
check.mixed_batch(mixed_batch)

# %% [markdown]
# ## 3. Merge, and unmerge
#
# A merged adapter costs nothing at inference. To serve another one, unmerge first. Many tools subtract the update again.
# Guess how many entries of W are not what they were, after 20 times merge and subtract in float32. And after
# `ml.merge_adapter`, `ml.unmerge_adapter`?

# %%
check.guess("06.drift", None)               # share of the entries, 0 to 1
check.guess("06.unmerge", None)

# %%
model = lab.base()
ml.load_adapter(model, pair[0])
path = "layers.0.mlp.up_proj"
W = dict(model.named_modules())[path].weight.data
update = dense(updates(model)[path]).astype(np.float32)
live = W.copy()
for _ in range(20):
    live += update
    live -= update
check.compare("06.drift", float(np.mean(live != W)))
before = {name: value.copy() for name, value in model.state_dict().items()}
for _ in range(20):
    ml.merge_adapter(model)
    ml.merge_adapter(model)                                            # merging twice is merging once
    ml.unmerge_adapter(model)
check.compare("06.unmerge", float(np.mean(before[f"{path}.weight"] != W)))
assert np.mean(live != W) > 0.1
assert all(value.tobytes() == before[name].tobytes() for name, value in model.state_dict().items())

# %% [markdown]
# *Keep W, do not compute it back.* (W + x) − x is not W in floating point. The library keeps a copy of the adapted weights
# while they are merged: memory instead of drift.

# %% [markdown]
# ### Exercise 06.4 · ●●○ · 12 min
#
# One weight W (d, k) serves several adapters, one after the other. `updates` is a list of (B, A, s). For each: merge it, note
# the merged weight, unmerge. Return `(merged, last)`: all merged weights as one array (n, d, k), and the weight at the end,
# which must be W bit for bit.
#
# <details><summary>Hint 1</summary>(W + x) − x is not always W in floating point.</details>
# <details><summary>Hint 2</summary>What would you have to keep to get W back without any arithmetic?</details>

# %% exercise="serve"
def serve(W, updates):
    """(d, k), list of (B (d, r), A (r, k), s) -> merged (n, d, k), last (d, k)."""
    # BEGIN SOLUTION
    kept, live, merged = W.copy(), W.copy(), []
    for B, A, s in updates:
        live += s * B @ A
        merged.append(live.copy())
        live[...] = kept
    return np.stack(merged), live
    # END SOLUTION

# %% check="serve"
check.serve(serve)

# %% [markdown]
# ## 4. Into half precision
#
# Checkpoints are stored in 16 bits, QLoRA's bases in 4. Round W to the format, add ΔW, round again: what is left of ΔW? bf16
# keeps 8 significant bits, so a change below 1/512 of an entry never moves it, and one above 1/256 always does. Guess: of an
# update of size ‖ΔW‖ = 0.001 ‖W‖, which share of the entries changes in bf16? In fp16?

# %%
check.guess("06.bf16_changed", None)
check.guess("06.fp16_changed", None)

# %%
formats = {"fp32": lambda x: x, "fp16": lambda x: x.astype(np.float16).astype(np.float32),
           "bf16": lambda x: from_bf16(to_bf16(x)), "NF4, 4 bits": lambda x: FourBit(x, double_quant=False).dense()}
relative = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]
W = before[f"{path}.weight"]
share, changed = {name: [] for name in formats}, {}
for size in relative:
    small = update * np.float32(size * np.linalg.norm(W) / np.linalg.norm(update))
    for name, rounded in formats.items():
        moved = rounded(rounded(W) + small) - rounded(W)
        share[name].append(float(np.sum(moved * small) / np.sum(small**2)))
        changed[name, size] = float(np.mean(moved != 0))
check.compare("06.bf16_changed", changed["bf16", 1e-3])
check.compare("06.fp16_changed", changed["fp16", 1e-3])
print(f"of an update of 1 % of W, NF4 keeps {share['NF4, 4 bits'][relative.index(1e-2)]:.1%}")
if lab.FULL:
    assert changed["bf16", 1e-3] < 0.4 < 0.6 < changed["fp16", 1e-3]
    assert share["NF4, 4 bits"][relative.index(1e-2)] < 0.1 and min(share["fp32"]) > 0.999

# %% [markdown]
# Our adapter is not small: on this toy ‖ΔW‖ is 0.25 to 0.85 of ‖W‖, and one merge into bf16 is harmless. But suppose that it
# arrives in many small parts, merged one after the other. Each sum is rounded. Guess the loss on Python after 1,000 parts in
# bf16. (In float32: as the adapter's.)

# %%
check.guess("06.thousand", None)

# %%
model = lab.base()
ml.load_adapter(model, pair[0])
merged, plain = ml.merge_and_unload(model).state_dict(), lab.base().state_dict()
touched = [name for name in plain if not np.array_equal(plain[name], merged[name])]
sizes = [np.linalg.norm(merged[name] - plain[name]) / np.linalg.norm(plain[name]) for name in touched]
print(f"‖ΔW‖ / ‖W‖ in the {len(touched)} layers: {min(sizes):.2f} to {max(sizes):.2f}")
parts = [1, 10, 100, 1000]
little = {name: [] for name in ("fp32", "bf16")}
for name, values in little.items():
    for n in parts:
        state = {key: formats[name](value) for key, value in plain.items()}
        for key in touched:
            step = (merged[key] - plain[key]) / np.float32(n)
            for _ in range(n):
                state[key] = formats[name](state[key] + step)
        model = lab.base()
        model.load_state_dict(state)
        values.append(mean_loss(model, tests["Python"]))
check.compare("06.thousand", little["bf16"][-1])
print(f"frozen base {table['none'][0]:.3f}, adapter {table['Python'][0]:.3f}")
folder.cleanup()
if lab.FULL:
    assert max(sizes) < 1.0 and little["bf16"][0] - table["Python"][0] < 0.01
    assert max(little["fp32"]) - table["Python"][0] < 0.01
    assert little["bf16"][-1] > table["Python"][0] + 0.5 * (table["none"][0] - table["Python"][0])
lab.show(figures.half_precision({"relative": relative, "share": share, "parts": parts, "losses": little,
                                   "base": table["none"][0], "adapter": table["Python"][0]}))

# %% [markdown]
# *Merge once, in float32, and round at the end.* In bf16 most of the learning was lost, a thousandth at a time, without a
# warning. Into 4 bits an update of 1 % of W vanishes: keep a QLoRA adapter beside its base, or merge into the 16-bit weights.

# %% [markdown]
# ### Exercise 06.5 · ●○○ · 5 min
#
# An entry of W is 1.0. What is the smallest power of two that you can add so that the stored result is no longer 1.0? Give
# two numbers, for bf16 and for fp16 (round to nearest, ties to even). Think first; then try.
#
# <details><summary>Hint 1</summary>bf16 keeps 8 significant bits (7 behind the point), fp16 keeps 11 (10 behind
# it).</details>
# <details><summary>Hint 2</summary>Half a step is a tie, and a tie goes to the even neighbour. Which of the two is
# even?</details>

# %% exercise="smallest"
# (bf16, fp16)
smallest = ...
# BEGIN SOLUTION
smallest = (2.0**-7, 2.0**-10)
# END SOLUTION

# %% check="smallest"
check.smallest(smallest)

# %% [markdown]
# ## What you should be able to say now
#
# - Updates can be added exactly, factors cannot; the error of a sum at rank q is known before it is made.
# - A sum of updates is not a sum of skills; a batch in which each row has its own adapter loses nothing.
# - Unmerge by keeping W; merge once, in float32, and know how small an update your format swallows.

# %% [markdown] slide=true
# ## The slide
#
# **Merging and composing**
# - w₁ΔW₁ + w₂ΔW₂ = [w₁s₁B₁ w₂s₂B₂] [A₁; A₂]: exact, rank r₁ + r₂.
# - (B₁ + B₂)(A₁ + A₂) has two cross terms that mean nothing.
# - Nearly orthogonal updates, and still the sum ruined Python.
# - (W + ΔW) − ΔW ≠ W: keep W.
# - bf16 swallows what is below 1/512 of an entry; 4 bits swallow an update of 1 %.
# - Merge once, in float32, round last.
