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

# %% [markdown] lang="zh" of="1a5a9fa4"
# # 04 · 需要多大的秩？选 8 还是 64？
#
# LoRA 特有的那个数就是秩 r，人人都在问取多少才对。这一课把它测量三次：一次答案精确已知，一次答案被藏了起来，
# 一次是在真实文本上，答案是开放的。
#
# **你要做的**
# - 在已知最优损失的一层上，同时训练十六个秩
# - 把一个更新量截断到更低的秩，而从不形成它本身
# - 在文本上训练秩 1 到 32，加在少数矩阵上和加在许多矩阵上，与冻结的基座模型和全量微调对照
#
# **你会学到的**
# - 秩的曲线上，肘点（曲线急转的地方）意味着什么，以及我们的文本没有肘点
# - 区分更新量**可以**有的秩和它**用到**的秩
# - 按什么次序花预算：先是学习率，再是更多的矩阵，然后才是更大的秩
#
# **需要的基础**：第 03 课，以及奇异值分解（SVD）M = U S Vᵀ：M 把每个输入方向（V 的一列）映到一个输出方向（U 的一列），
# 并以一个奇异值拉伸它，σ₁ ≥ σ₂ ≥ …。秩为 q 的最优近似保留前 q 个奇异值，其误差的平方是其余 σ² 之和（Eckart 和 Young，1936）。
# 这里所有的范数都是 Frobenius 范数：‖M‖² = Σ σ²。

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

# %% [markdown] lang="zh" of="a31b998b"
# ## 1. 答案已知之处
#
# **一层。** 一个隐藏的更新量 ΔW\* 有 24 个奇异值，每个比前一个小 16 %。输入不偏向任何方向（它们是严格白化的：XᵀX = n·I），
# 所以我们的更新量的损失是 ‖sBA − ΔW\*‖²。秩为 r 的更新量，损失都不可能低于 i > r 的各 σᵢ² 之和。训练 A 和 B 能达到那里吗？
#
# **一个 Transformer。** 教师是基座模型加上 q 和 v 上一个**秩为 4** 的隐藏更新量。学生带有秩 1 到 8 的 LoRA，
# 学习给出教师的回答。它们的误差是教师与学生之间的 KL 散度：两者给出的概率相同时为 0。**猜测**：r = 3 时的误差是 r = 4
# 时的多少倍？

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

# %% [markdown] lang="zh" of="0f53473e"
# **LoRA 找到该秩下的最优更新量；所需的秩到哪里为止，肘点就在哪里。** 左图中，谱平滑下降，所以没有肘点：秩每增加一，都换来一点。
# 右图中，秩 3 不可能成为教师，秩 4 可以。
#
# ## 2. 更新量用到多大的秩？
#
# 训练好的 ΔW = s·B A 的秩为 r。但它的 r 个奇异值并不相等：它**真正**用到多少个方向？常见的答案有两个，有效秩（effective rank）
# 和稳定秩（stable rank）。设占比为 p = σ/Σσ：
#
# $$\text{有效秩} = e^{-\sum p \ln p}, \qquad \text{稳定秩} = \frac{\sum \sigma^2}{\sigma_1^2}.$$
#
# r 个值相等时，两者都等于 r；只有一个值时，两者都等于 1。对于 σ = (1, 0.5, 0.1, 0.01)，它们分别是 2.3705 和 1.2601：
# 有效秩更看重小的值。
#
# 奇异值由细长的因子算出。ΔW 从不形成。QR 把一个细长矩阵写成 Q·R：Q 的各列标准正交，R 是一个小方阵。
# 请读最后四行（`xp` 是 NumPy，在 GPU 上是 CuPy）：

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

# %% [markdown] lang="zh" of="4d5986da"
# ### 练习 04.1 · ●●● · 15 分钟
#
# 自己写 `truncate`：给出秩为 q 的因子，它们的乘积是 B A 的最优近似。乘积怎样拆分，由你决定。不许形成任何与 ΔW 一样大的东西。
#
# <details><summary>提示 1</summary>QR：B = Q_b R_b，Aᵀ = Q_a R_a。于是 BA = Q_b (R_b R_aᵀ) Q_aᵀ，中间是 r × r 的。</details>
# <details><summary>提示 2</summary>对中间做 SVD，得 u S vᵀ：那么 Q_b u 和 vᵀ Q_aᵀ 就是 BA 的奇异向量。</details>
# <details><summary>提示 3</summary>保留前 q 列、前 q 个值和前 q 行；把 S 交给两个因子之一。</details>

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

# %% [markdown] lang="zh" of="61b84c45"
# ### 练习 04.2 · ●○○ · 5 分钟
#
# 截断之前先预测：只凭奇异值，Frobenius 范数下的 ‖ΔW − ΔW_q‖ / ‖ΔW‖ 是多少？
#
# <details><summary>提示 1</summary>失去的是第 q 个之后的奇异值。</details>
# <details><summary>提示 2</summary>‖M‖² 是所有 σ² 之和。失去的部分除以全部，再开方。</details>

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

# %% [markdown] lang="zh" of="ce3c351e"
# ### 练习 04.3 · ●●○ · 8 分钟
#
# 写出本节的两个度量，有效秩和稳定秩。注意 σ = 0：0 ln 0 按 0 计。
#
# <details><summary>提示 1</summary>p = σ/Σσ 是总和为 1 的占比。它们的熵是 −Σ p ln p。</details>
# <details><summary>提示 2</summary>占比为零的项没有贡献：取 ln 之前先去掉零。</details>
# <details><summary>提示 3</summary>有效秩 = exp(熵)；稳定秩 = Σσ² / σ₁²。</details>

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

# %% [markdown] lang="zh" of="bde466cf"
# ## 3. 在真实文本上，答案是开放的
#
# 第 02 课的小 GPT 再次从英文文本转到 Python 源代码。一次**扫描**（sweep）在一个冻结的基座模型上并排训练许多适配器，
# 每一个都与单独训练时一样。所有的秩都用 α = 32，因此 s = 32/r；也都用同一个学习率，第 4 节会检验它。
#
# 花预算有两种方式：秩 1 到 32，加在**所有**线性层上；或者秩 4 到 32，只加在 **q 和 v** 上。
# 两者的秩分别为 r 和 4r 时，训练的参数一样多。**猜测**：同为 16,384 个参数（所有层上 r = 8，q 和 v 上 r = 32），谁赢，
# 赢多少奈特？（正数：所有线性层赢。）

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

# %% [markdown] lang="zh" of="a1fb3f8c"
# **没有肘点；许多细的适配器胜过少数粗的。** 从 r = 1 到 8，损失的下降至少是从 8 到 32 的两倍。
# 同样多的参数，放在所有矩阵上比放在两个矩阵上更有用。处处用秩 4，胜过在 q 和 v 上用秩 32，而参数只有一半。
#
# 现在看误差条。从 r = 8 到 r = 32，均值的改善还不如两个种子之间的差别大。只有两个种子，这里谁也分不清 16 和 32。
# r = 16 取一个种子，r = 32 取另一个，次序就可能颠倒。
#
# 训练好的更新量**用到**多大的秩？如果 r = 32 用到的不足 32：**用 32 训练，再截断到 4**。**猜测**截断后的适配器的损失，减去用 4
# 训练的适配器的损失。

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

# %% [markdown] lang="zh" of="e717c54b"
# **两种不同的秩。** 从 r = 8 起，“先用大秩训练，再截断”与“直接用 r 训练”最后的损失相同，差别在波动之内。
# 更低时，最好就用你想要的秩来训练：这样，它那几个方向会学会承担全部工作。
#
# 而有效秩**不是**任务需要的秩。给的秩越大，它也越大。r = 32 时它远大于 8，可是截断到 8 的代价比换一个种子还小。
# 一个方向可以很大，对损失却不重要。
#
# ### 练习 04.4 · ●●○ · 10 分钟
#
# 你必须交付一个秩。一条公平的规则：**平均损失比最优的平均损失最多高出 `tolerance` 的最小的秩**，容差取种子之间差别的大小。
# 请针对一次扫描的各行写出它。
#
# <details><summary>提示 1</summary>先求每个秩的平均损失：一个字典，秩 → 均值。</details>
# <details><summary>提示 2</summary>哪些均值不超过最优均值加上容差？</details>
# <details><summary>提示 3</summary>这些秩中最小的一个。</details>

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

# %% [markdown] lang="zh" of="1c221ffc"
# 然后用两句话回答一位同事：对这个任务，你会交付哪个**范围**的秩？什么会让你改变它？（不检查。
# 好的回答会提到波动，并把更多的数据或更难的任务作为增大秩的理由。）
#
# ## 4. 在秩之前：学习率
#
# 结果不好时，常见的建议是“增大 r”。这里是三个秩、四个学习率、一个种子。比较两种错误。第一种：学习率合适，但用 r = 1 而不是
# r = 32。第二种：r = 32，但学习率是合适值的四倍。**猜测**：第二种付出的奈特数是第一种的多少倍？

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

# %% [markdown] lang="zh" of="6ff22686"
# **学习率第一。** 学习率 0.01 对秩 1 和秩 32 都合适（s = α/r 正是为此而设），所以在一个秩上搜索一次，对所有的秩都够用。
# 高到四倍，每个秩最后都比冻结的基座模型还差。
#
# 出了玩具模型，也是这样吗？“LoRA Learns Less and Forgets Less”（arXiv:2405.09673）对大模型说的也是这样：LoRA 对学习率敏感，
# 而且适配哪些矩阵比秩更重要。具体数值因模型而异。`minilora study rank-quality` 会替你画出这张图。
#
# ## 现在你应当能说出
#
# - 肘点标出所需的秩到哪里为止；平滑的谱没有肘点，我们的文本也没有。
# - 按这个次序花预算：学习率，更多的矩阵，更大的秩；只比较超出种子波动的差别。
# - 更新量用到的秩，只凭 A 和 B 就能测出；给的秩越大，它就越大。

# %% [markdown] slide=true
# ## The slide
#
# **How much rank? On one slide**
# - best loss at rank r = Σ σᵢ² over i > r (Eckart-Young): LoRA reaches it
# - planted rank 4: an elbow at 4. Text: no elbow, each doubling gains less
# - the same numbers on all matrices beat q, v alone
# - learning rate first, then more matrices, then rank
# - effective rank e^H(σ/Σσ) from thin factors: QR, QR, a small SVD; never form ΔW
# - two seeds at least, bars on the figure, base and full fine-tuning as lines

# %% [markdown] lang="zh" of="0fdef991"
# ## 幻灯片
#
# **需要多大的秩？一页幻灯片**
# - 秩为 r 时的最优损失 = i > r 的 Σ σᵢ²（Eckart-Young）：LoRA 能达到
# - 埋入的秩为 4：肘点在 4。文本：没有肘点，每次加倍的收益越来越小
# - 同样多的参数，放在所有矩阵上胜过只放在 q、v 上
# - 先学习率，再更多的矩阵，然后才是秩
# - 有效秩 e^H(σ/Σσ) 由细长的因子求得：QR、QR、一个小的 SVD；从不形成 ΔW
# - 至少两个种子，图上有误差条，基座模型和全量微调画成线
