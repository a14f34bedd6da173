# %% [markdown]
# # 04 · How much rank? Do I need rank 8 or 64?
#
# The rank r is LoRA's one number. Everybody asks for the right one. This lesson measures it three times: where the answer is
# known exactly, where it is hidden, and on real text, where it is open.
#
# **You'll do**
# - train sixteen ranks at once on a layer whose best possible loss you know
# - cut an update to a lower rank without ever forming it
# - train ranks 1 to 32 on text, on few matrices and on many, beside the frozen base and full fine-tuning
#
# **You'll learn**
# - what an elbow (a sharp bend) in a rank curve means, and that our text has none
# - to tell the rank that an update *may* have from the rank that it *uses*
# - in which order to spend: the learning rate first, then more matrices, then more rank
#
# **You need** lesson 03 and the SVD, M = U S Vᵀ: M maps each input direction (a column of V) to an output direction (a column
# of U), and stretches it by a singular value, σ₁ ≥ σ₂ ≥ …. The best approximation of rank q keeps the first q of them, and its
# squared error is the sum of the other σ² (Eckart and Young, 1936). All norms here are Frobenius norms: ‖M‖² = Σ σ².

# %% [markdown] teacher=true
# **For the teacher (30 minutes in the 90-minute lecture; 80 minutes with the exercises).**
#
# *Board:* two empty axes, "loss" over "rank r, logarithmic". Ask for the shape of the curve before section 1 and again before
# section 3; leave both drawings on the board beside the figures.
# *Poll, before section 3:* "The same 16,384 numbers: rank 32 on q and v, or rank 8 on every matrix?" Hands for each. Most
# choose by a rule they have read ("attention is enough"). The right panel of the figure decides it, with a margin larger than
# the spread.
# *Minutes:* section 1: 7, section 2: 8 (only the definition of effective rank and one cut), section 3: 10, section 4: 5.
# *Start section 3's cell before you explain section 2*: it is the long one.
# *Expect:* "more rank overfits" (here it does not, it just gains less and less); "the effective rank of the trained update is
# the rank I should have chosen" (section 3's table: it grows with r, whatever r is); and in exercise 04.1 a dense SVD, which
# gives the right numbers and is sent back.
# *Say once:* two seeds are few. The bars on the figure are the honest part of it.

# %%
import inspect
from dataclasses import replace

import numpy as np

import minilora as ml
from minilora import check
from minilora.course import lab
from minilora.lora import adapters_of, factored_svd, truncate
from minilora.plots import lesson_04 as figures
from minilora.studies.planted import planted_linear, planted_transformer
from minilora.studies.text import full_cell, task_on

# %% [markdown]
# ## 1. Where the answer is known
#
# *One layer.* A hidden update ΔW\* has 24 singular values, each 16 % smaller than the one before. The inputs favour no
# direction (they are exactly white: XᵀX = n·I), so the loss of our update is ‖sBA − ΔW\*‖². No update of rank r can get below
# the sum of σᵢ² over i > r. Does training A and B get there?
#
# *A Transformer.* A teacher is the base plus a hidden update of **rank 4** on q and v. Students with LoRA of rank 1 to 8
# learn to give the teacher's answers. Their error is the KL divergence between teacher and student: 0 if both give the same
# probabilities. **Guess:** how many times smaller is the error at r = 4 than at r = 3?

# %%
check.guess("04.drop", None)

# %%
linear = planted_linear(steps=600 if lab.FULL else 100, seed=0)
teacher = planted_transformer(steps=300 if lab.FULL else 40, seeds=[0], ranks=[1, 2, 3, 4, 6, 8])
kl = {row["rank"]: row["kl"][0] for row in teacher["rows"]}
print(f"one layer, ranks 1 to 16: at most {max(linear['largest_excess'], 0.0):.4%} above the best loss possible")
print("a Transformer: " + ", ".join(f"r = {r}: {value:.1e}" for r, value in kl.items()))
check.compare("04.drop", kl[3] / kl[4])
if lab.FULL:
    assert linear["largest_excess"] < 0.01
    assert kl[3] > 10 * kl[4] and kl[2] / kl[3] < 5 and kl[4] / kl[6] < 5              # the elbow is at 4 and nowhere else
lab.show(figures.known_ranks(linear, teacher))

# %% [markdown]
# **LoRA finds the best update of its rank, and an elbow stands where the needed rank ends.** On the left the spectrum falls
# smoothly, so there is no elbow: every further rank buys a little. On the right rank 3 cannot be the teacher, and rank 4 can.
#
# ## 2. Which rank does an update use?
#
# A trained ΔW = s·B A has rank r. But its r singular values are not equal: how many directions does it *really* use? There are
# two common answers. With the shares p = σ/Σσ:
#
# $$\text{effective rank} = e^{-\sum p \ln p}, \qquad \text{stable rank} = \frac{\sum \sigma^2}{\sigma_1^2}.$$
#
# Both give r for r equal values, and 1 for a single one. For σ = (1, 0.5, 0.1, 0.01) they give 2.3705 and 1.2601: the effective
# rank counts small values more.
#
# The singular values come from the thin factors. ΔW is never formed. QR writes a thin matrix as Q·R: orthonormal columns in Q,
# and a small square R. Read the last four lines (`xp` is NumPy, or CuPy on a GPU):

# %%
print(inspect.getsource(factored_svd))

# %%
example = [1.0, 0.5, 0.1, 0.01]
print(f"effective rank {ml.rank.effective_rank(example):.4f}, stable rank {ml.rank.stable_rank(example):.4f}")
assert round(ml.rank.effective_rank(example), 4) == 2.3705 and round(ml.rank.stable_rank(example), 4) == 1.2601

rng = np.random.default_rng(0)
d, r = 40_000, 16
B, A = rng.standard_normal((d, r)), rng.standard_normal((r, d))
with lab.Clock() as clock:
    thin_B, thin_A = truncate(B, A, 4)
print(f"an update of {d:,} × {d:,}, cut from rank {r} to {thin_B.shape[1]} in {clock.seconds:.2f} s;")
print(f"formed, it would take {8 * d * d / 1e9:.1f} GB, its factors take {(B.nbytes + A.nbytes) / 1e6:.1f} MB")
assert thin_B.shape == (d, 4) and thin_A.shape == (4, d)

# %% [markdown]
# ### Exercise 04.1 · ●●● · 15 min
#
# Write `truncate` yourself: factors of rank q whose product is the best approximation of B A. How you split the product is your
# choice. Nothing as large as ΔW may be formed.
#
# <details><summary>Hint 1</summary>QR: B = Q_b R_b and Aᵀ = Q_a R_a. Then BA = Q_b (R_b R_aᵀ) Q_aᵀ, and the middle is
# r × r.</details>
# <details><summary>Hint 2</summary>SVD of the middle, u S vᵀ: then Q_b u and vᵀ Q_aᵀ are the singular vectors of BA.</details>
# <details><summary>Hint 3</summary>Keep the first q columns, values and rows; give S to one of the two factors.</details>

# %% exercise="cut_update"
def cut_update(B, A, q):
    """B (d, r), A (r, k), q <= r -> B' (d, q), A' (q, k), with B'A' the best approximation of BA of rank q."""
    # BEGIN SOLUTION
    Q_b, R_b = np.linalg.qr(B)
    Q_a, R_a = np.linalg.qr(A.T)
    u, S, vh = np.linalg.svd(R_b @ R_a.T)
    return (Q_b @ u)[:, :q] * S[:q], (vh @ Q_a.T)[:q]
    # END SOLUTION


# %% check="cut_update"
check.cut_update(cut_update)

# %% [markdown]
# ### Exercise 04.2 · ●○○ · 5 min
#
# Before you cut, predict: from the singular values alone, what is ‖ΔW − ΔW_q‖ / ‖ΔW‖ in the Frobenius norm?
#
# <details><summary>Hint 1</summary>What is lost are the singular values after the q-th.</details>
# <details><summary>Hint 2</summary>‖M‖² is the sum of all σ². Lost part over all, then the root.</details>

# %% exercise="cut_error"
def cut_error(S, q):
    """S (r,), falling singular values; q: how many are kept -> the relative error of the cut."""
    # BEGIN SOLUTION
    return np.sqrt((S[q:] ** 2).sum() / (S**2).sum())
    # END SOLUTION


# %% check="cut_error"
check.cut_error(cut_error)

# %% [markdown]
# ### Exercise 04.3 · ●●○ · 8 min
#
# Write the two measures of this section, effective rank and stable rank. Take care of σ = 0: 0 ln 0 counts as 0.
#
# <details><summary>Hint 1</summary>p = σ/Σσ are shares that add up to 1. Their entropy is −Σ p ln p.</details>
# <details><summary>Hint 2</summary>A zero share adds nothing: leave zeros out before ln.</details>
# <details><summary>Hint 3</summary>effective = exp(entropy); stable = Σσ² / σ₁².</details>

# %% exercise="soft_ranks"
def soft_ranks(S):
    """S (r,), singular values, some may be zero -> (effective rank, stable rank)."""
    # BEGIN SOLUTION
    p = S[S > 0] / S.sum()
    return np.exp(-(p * np.log(p)).sum()), (S**2).sum() / S.max() ** 2
    # END SOLUTION


# %% check="soft_ranks"
check.soft_ranks(soft_ranks)

# %% [markdown]
# ## 3. On real text, where the answer is open
#
# The small GPT of lesson 02 goes from English prose to Python source again. A *sweep* trains many adapters side by side on one
# frozen base, each as it would train alone. We keep α = 32 for all ranks, so s = 32/r, and one learning rate, which
# section 4 tests.
#
# Two ways to spend: rank 1 to 32 on **all** linear layers, or rank 4 to 32 on **q and v** only. At ranks r and 4r they train
# the same number of numbers. **Guess:** at 16,384 numbers (r = 8 on all, r = 32 on q and v), who wins, and by how many nats?
# (Positive: all linear layers win.)

# %%
check.guess("04.spread", None)

# %%
setting = replace(lab.SETTING, steps=100 if lab.FULL else 12)
base, rate, seeds = lab.base(), 1e-2, [0, 1]
ranks = {"all linear": [1, 2, 4, 8, 16, 32], "q, v": [4, 8, 16, 32]} if lab.FULL else {"all linear": [1, 2, 4], "q, v": [4, 8]}
targets = {"all linear": "all-linear", "q, v": ["q_proj", "v_proj"]}


def run(where, ranks, seeds, lrs):
    configs = [ml.LoraConfig(r=r, lora_alpha=32, target_modules=targets[where]) for r in ranks]
    return ml.sweep(base, task_on(setting), configs, seeds=seeds, lrs=lrs, train=setting.schedule(rate), evaluate=lab.valid())


sweeps = {where: run(where, chosen, seeds, [rate]) for where, chosen in ranks.items()}
rows = []
print(f"{'':12s}   r  trained   loss, mean of 2 seeds   between seeds")
for where, result in sweeps.items():
    for r in ranks[where]:
        group = [row for row in result.rows if row["rank"] == r]
        losses = [row["eval_loss"] for row in group]
        rows.append({"targets": where, "rank": r, "trainable": group[0]["parameters"], "losses": losses,
                     "loss_mean": float(np.mean(losses)), "loss_sd": float(np.std(losses, ddof=1))})
        print(f"{where:12s} {r:3d} {group[0]['parameters']:8,d} {np.mean(losses):12.3f} {np.ptp(losses):22.3f}")
full = [full_cell(setting.to_dict(), seed, 3e-3)["loss"] for seed in seeds]
start = ml.training.mean_loss(base, lab.valid())
print(f"full fine-tuning {ml.count_parameters(base)['total']:,} {np.mean(full):.3f},  frozen base {start:.3f}")

# %%
mean = {(row["targets"], row["rank"]): row["loss_mean"] for row in rows}
top = ranks["q, v"][-1]
check.compare("04.spread", mean["q, v", top] - mean["all linear", top // 4])
if lab.FULL:
    assert all(mean["all linear", r] < mean["q, v", 4 * r] for r in (2, 4, 8))         # the same numbers, better spread
    assert mean["all linear", 4] < mean["q, v", 32]                                     # with half as many numbers
    assert mean["all linear", 1] > mean["all linear", 4] > mean["all linear", 16] > np.mean(full)
    assert mean["all linear", 8] - mean["all linear", 32] < (mean["all linear", 1] - mean["all linear", 8]) / 2
    runs = {row["rank"]: row["losses"] for row in rows if row["targets"] == "all linear"}
    between = max(np.ptp(runs[r]) for r in (8, 16, 32))                                 # from seed to seed
    assert mean["all linear", 8] - mean["all linear", 32] < between and min(runs[16]) < max(runs[32])
lab.show(figures.ranks_and_budgets({
    "rows": rows, "from": "English prose", "to": "Python", "seeds": len(seeds), "base": {"loss": start},
    "full": {"loss_mean": float(np.mean(full)), "loss_sd": float(np.std(full, ddof=1))}}))

# %% [markdown]
# **There is no elbow, and many thin adapters beat few thick ones.** From r = 1 to 8 the loss falls at least twice as much as
# from 8 to 32. The same numbers do more on all matrices than on two. Rank 4 everywhere beats rank 32 on q and v, with half the
# numbers.
#
# Now look at the bars. From r = 8 to r = 32 the mean gains less than one seed differs from the other. With two seeds nobody can
# tell 16 from 32 here. Take one seed for r = 16 and the other for r = 32, and the order can turn around.
#
# Which rank does a trained update *use*? And if r = 32 uses less than 32: **train at 32, cut to 4**. **Guess** the loss of the
# cut adapter, minus the loss of the adapter that was trained at 4.

# %%
check.guess("04.cut", None)

# %%
result, widest = sweeps["all linear"], ranks["all linear"][-1]
print("  r   effective rank   trained at r   trained at", widest, "and cut to r")
cut, effective = {}, {}
for r in ranks["all linear"]:
    cells = [row["cell"] for row in result.rows if row["rank"] == r]
    used, losses = [], []
    for cell, wide in zip(cells, (row["cell"] for row in result.rows if row["rank"] == widest)):
        result.install(base, cell, "own")
        used.append(ml.analyze(base, name="own").summary()["mean_effective_rank"])
        result.install(base, wide, "wide")
        for adapter in adapters_of(base, "wide").values():
            A, B = adapter.lora_A.data, adapter.lora_B.data
            thin_B, thin_A = truncate(B, A, r)
            A[:r], A[r:], B[:, :r], B[:, r:] = thin_A, 0, thin_B, 0
        losses.append(ml.training.mean_loss(base, lab.valid()))
        ml.delete_adapter(base, "own")
        ml.delete_adapter(base, "wide")
    cut[r], effective[r] = float(np.mean(losses)), float(np.mean(used))
    print(f"{r:3d} {effective[r]:13.1f} {mean['all linear', r]:15.3f} {cut[r]:16.3f}")
check.compare("04.cut", cut[4] - mean["all linear", 4])
assert abs(cut[widest] - mean["all linear", widest]) < 1e-4                             # nothing was cut there
if lab.FULL:
    assert all(abs(cut[r] - mean["all linear", r]) < 0.03 for r in (8, 16)) and cut[8] - cut[32] < between
    assert all(cut[r] > mean["all linear", r] + 0.01 for r in (1, 2, 4))                # thin from the start is better here
    assert effective[1] < effective[4] < effective[16] < effective[32] and effective[32] > 12

# %% [markdown]
# **Two different ranks.** From r = 8 on, "train wide, then cut" and "train at r" end at the same loss, within the spread.
# Below, it is better to train at the rank that you want: then its few directions learn to do all the work.
#
# And the effective rank is *not* the rank that the task needs. It grows with the rank that is given. At r = 32 it is far above
# 8, and yet a cut to 8 costs less than a change of seed. A direction can be large and unimportant for the loss.
#
# ### Exercise 04.4 · ●●○ · 10 min
#
# You must ship one rank. A fair rule: **the smallest rank whose mean loss is at most `tolerance` above the best mean**, with a
# tolerance of the size of the differences between seeds. Write it for the rows of a sweep.
#
# <details><summary>Hint 1</summary>First the mean loss of every rank: a dictionary rank → mean.</details>
# <details><summary>Hint 2</summary>Which means are at most the best mean plus the tolerance?</details>
# <details><summary>Hint 3</summary>Of those ranks, the smallest.</details>

# %% exercise="rank_to_ship"
def rank_to_ship(rows, tolerance):
    """rows: dicts with "rank", "seed" and "loss", in any order; tolerance in nats -> a rank."""
    # BEGIN SOLUTION
    mean = {row["rank"]: np.mean([other["loss"] for other in rows if other["rank"] == row["rank"]]) for row in rows}
    return min(r for r in mean if mean[r] <= min(mean.values()) + tolerance)
    # END SOLUTION


# %% check="rank_to_ship"
check.rank_to_ship(rank_to_ship)

# %% [markdown]
# Then answer in two sentences, for a colleague: which *range* of ranks would you ship for this task, and what would make you
# change it? (Not checked. Good answers name the spread, and more data or a harder task as reasons for more rank.)
#
# ## 4. Before the rank: the learning rate
#
# A common advice for a weak result is "increase r". Here are three ranks at four learning rates, for one seed. Compare two
# mistakes. The first: r = 1 instead of r = 32, at a good rate. The second: r = 32 at four times the good rate.
# **Guess:** the second costs how many times as many nats as the first?

# %%
check.guess("04.rate", None)

# %%
some = [1, 8, 32] if lab.FULL else [1, 4]
others = run("all linear", some, [0], [3e-3, 2e-2, 4e-2])
loss = {(row["rank"], row["lr"]): row["eval_loss"] for row in [*others.rows, *result.rows] if row["seed"] == 0}
rates = sorted({lr for _, lr in loss})
print("loss" + " " * 7 + "".join(f"  lr {lr:<7g}" for lr in rates) + "   best rate")
for r in some:
    print(f"r = {r:<4d}" + "".join(f"{loss[r, lr]:12.3f}" for lr in rates) + f"{min(rates, key=lambda lr: loss[r, lr]):12g}")
too_much = loss[some[-1], 4 * rate] - loss[some[-1], rate]
too_thin = loss[some[0], rate] - loss[some[-1], rate]
print(f"r = {some[0]} in place of {some[-1]} costs {too_thin:.3f} nats, four times the rate costs {too_much:.3f}")
check.compare("04.rate", too_much / too_thin)
if lab.FULL:
    assert too_much > 2 * too_thin > 0
    assert all(loss[r, 4e-2] > start for r in some)                                     # worse than not training at all
    assert all(loss[r, rate] < min(loss[r, lr] for lr in rates) + 0.02 for r in some)   # one rate is good for every rank

# %% [markdown]
# **The learning rate comes first.** The rate 0.01 is good for rank 1 and for rank 32 (s = α/r is meant for this), so one
# search at one rank serves all. Four times too high, and every rank ends worse than the frozen base.
#
# Is it the same outside the toy? "LoRA Learns Less and Forgets Less" (arXiv:2405.09673) says the same of large models: LoRA is
# sensitive to its rate, and which matrices are adapted matters more than the rank. The numbers differ from model to model.
# `minilora study rank-quality` draws this figure for you.
#
# ## What you should be able to say now
#
# - An elbow shows where the needed rank ends; a smooth spectrum has none, and our text has none.
# - Spend in this order: learning rate, more matrices, more rank; and compare only beyond the spread of seeds.
# - The rank that an update uses can be measured from A and B alone; it grows with the rank that it is given.

# %% [markdown] slide=true
# > **How much rank? On one slide**
# >
# > best loss at rank r = Σ σᵢ² over i > r (Eckart-Young): LoRA reaches it
# > planted rank 4: an elbow at 4. Text: no elbow, each doubling gains less
# > the same numbers on all matrices beat q, v alone
# > learning rate first, then more matrices, then rank
# > effective rank e^H(σ/Σσ) from thin factors: QR, QR, a small SVD; never form ΔW
# > two seeds at least, bars on the figure, base and full fine-tuning as lines
