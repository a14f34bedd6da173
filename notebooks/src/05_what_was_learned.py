# %% [markdown]
# # 05 · What was learned
#
# **The question of this lesson: what does ΔW contain that W did not?**
#
# The LoRA paper asks this in its section 7. We repeat its measurements on a small model, and we add what the paper leaves
# out: what chance would give.
#
# **You'll do**
# - compare the directions of adapters of two ranks and two seeds
# - rebuild the paper's Table 7
# - set LoRA beside full fine-tuning, and look at what was forgotten
#
# **You'll learn**
# - the subspace similarity φ, and what chance gives for it
# - amplification, and intruder dimensions
# - why a result needs a control
#
# **You need** lesson 03 (ΔW = s·B@A) and lesson 04 (singular values, best rank-q approximation). All norms are Frobenius norms.
#
# Before each experiment there is a *guess*: replace `None` by your number, then run the next cell.

# %% [markdown] lang="zh" of="80aed72d"
# # 05 · 学到了什么
#
# **本课的问题：ΔW 里有什么是 W 里没有的？**
#
# LoRA 论文在第 7 节提出了这个问题。我们在一个小模型上重做它的测量，并补上论文没有给出的东西：在随机情形下会得到什么。
#
# **你要做的**
# - 比较两种秩、两个随机种子的适配器的方向
# - 重建论文的表 7
# - 把 LoRA 与全量微调放在一起比较，看看忘掉了什么
#
# **你会学到**
# - 子空间相似度 φ，以及它在随机情形下的值
# - 放大，以及入侵维度（intruder dimensions）
# - 为什么一个结果需要对照
#
# **你需要** 第 03 课（ΔW = s·B@A）和第 04 课（奇异值、最佳秩 q 近似）。所有的范数都是 Frobenius 范数。
#
# 每个实验之前都有一次*猜测*：把 `None` 换成你猜的数，然后运行下一个单元。

# %% [markdown] teacher=true
# **For the teacher.** 60 minutes: 5 questions, 15 section 1, 10 section 2, 15 section 3, 15 section 4. Board: two planes in
# space and the angle between them; beside it the formula of φ and the line max(i, j)/k. Write the paper's numbers (0.32,
# 0.02, 21.67, factor 21.5) before Table 7. Poll before section 1: "Two random matrices of rank 64 in 64 dimensions. How
# similar are their directions: 0, 1/2 or 1?" Expect 0. Poll before section 4: "LoRA changes few numbers. Does it always
# forget less?" Expect yes. Expect two confusions: directions of A and directions of ΔW (the paper uses A; we use ΔW, which
# does not depend on how it is split), and "intruder" read as "bad". The last figure says how good the evidence for "bad" is
# here: shrinking the whole update does as well.

# %%
import tempfile
from pathlib import Path

import numpy as np

import minilora as ml
from minilora import check, plots
from minilora.course import lab
from minilora.lora.layer import dense
from minilora.plots import lesson_05 as figures
from minilora.rank import (
    alignment,
    amplification,
    compare,
    directions,
    gram_svd,
    intruder_count,
    random_baseline,
    reduce_intruders,
    similarity_grid,
    top_projection,
    updates,
)
from minilora.studies.spectrum import dense_updates, two_tasks
from minilora.studies.text import ALL_LINEAR, Q_V, copy_of, task_on, tuned
from minilora.training import mean_loss

# %%
base = lab.base()
python, prose = lab.valid("python"), lab.valid("prose")
layers = dict(base.named_modules())


def weight(path):
    """The frozen W of a layer, by its path: (d, k)."""
    return dense(layers[path]).data


print(f"the base: loss {mean_loss(base, python):.3f} on Python, {mean_loss(base, prose):.3f} on the prose it was trained on")

# %% [markdown]
# ## 1. Do two adapters learn the same directions?
#
# Write an update as its SVD, ΔW = U S V. (V is what lesson 04 called Vᵀ, and NumPy `Vh`.) It reads its input along the rows of
# V (r, k), and writes its output along the columns of U (d, r), the strongest first. Take V₁ⁱ, the first i rows of V of one
# update, and V₂ʲ, the first j rows of another. The paper's similarity is
#
# φ(i, j) = ‖V₁ⁱ (V₂ʲ)ᵀ‖² / min(i, j).
#
# The i rows span a subspace, and so do the j rows. φ is 1 if the smaller subspace lies in the larger one, and 0 if they are
# orthogonal. U, S and V come from the thin factors A and B, as in lesson 04.
#
# First without any training. Two random matrices of 64 columns: how large is φ(8, 64)? And φ(4, 16)?

# %% [markdown] lang="zh" of="620f5f3f"
# ## 1. 两个适配器会学到相同的方向吗？
#
# 把一个更新量写成它的 SVD：ΔW = U S V。（这里的 V 在第 04 课写作 Vᵀ，在 NumPy 里叫 `Vh`。）它沿着 V (r, k) 的各行读取输入，
# 沿着 U (d, r) 的各列写出输出，最强的排在最前面。取 V₁ⁱ，即一个更新量的 V 的前 i 行；再取 V₂ʲ，即另一个更新量的 V 的前 j 行。
# 论文中的相似度是
#
# φ(i, j) = ‖V₁ⁱ (V₂ʲ)ᵀ‖² / min(i, j).
#
# 这 i 行张成一个子空间，那 j 行也张成一个子空间。如果较小的子空间包含在较大的子空间里，φ 等于 1；如果两者正交，φ 等于 0。
# U、S 和 V 由细长因子 A 和 B 得到，做法与第 04 课相同。
#
# 先不做任何训练。两个 64 列的随机矩阵：φ(8, 64) 有多大？φ(4, 16) 呢？

# %%
check.guess("05.noise_8_64", None)
check.guess("05.noise_4_16", None)

# %% exact=true
rng = np.random.default_rng(0)
first, second = (directions(rng.standard_normal((64, 64))) for _ in range(2))
noise = similarity_grid(first, second)
check.compare("05.noise_8_64", round(float(noise[7, 63]), 6))
pairs = [[directions(rng.standard_normal((16, 64))) for _ in "ab"] for _ in range(400)]
check.compare("05.noise_4_16", round(float(np.mean([similarity_grid(*pair)[3, 15] for pair in pairs])), 2))
assert abs(noise[7, 63] - 1) < 1e-9                                    # 64 directions fill R^64: everything lies in them
assert random_baseline(4, 16, 64) == 16 / 64

# %% [markdown]
# *Two random updates overlap by max(i, j)/k.* The paper compares ranks 8 and 64 in 12,288 dimensions, where chance is 0.005.
# In 64 dimensions the same comparison would show 1 for pure noise. So here we compare ranks 4 and 16, and draw chance into
# every picture.
#
# There is a second trap. Our library draws A row by row from the seed. Take two adapters of rank 4 and 16 with the **same**
# seed. The paper takes the directions from A. How large is φ(4, 16) of the two A before the first step?

# %% [markdown] lang="zh" of="dc7cbca7"
# *两个随机更新量的重叠是 max(i, j)/k*。论文在 12,288 维中比较秩 8 和秩 64，那里的随机水平是 0.005。在 64 维中做同样的比较，
# 纯噪声也会得到 1。所以我们在这里比较秩 4 和秩 16，并且在每张图里都画出随机水平。
#
# 还有第二个陷阱。我们的库用随机种子逐行生成 A。取秩为 4 和 16 的两个适配器，用**同一个**种子。论文的方向取自 A。在第一步之前，
# 这两个 A 的 φ(4, 16) 有多大？

# %%
check.guess("05.same_seed", None)

# %% exact=true
started = {}
for r in (4, 16):
    model = lab.base()
    ml.add_adapter(model, ml.LoraConfig(r=r, target_modules=Q_V), seed=0)
    started[r] = updates(model)["layers.0.attn.q_proj"].A
start = similarity_grid(directions(started[4]), directions(started[16]))
check.compare("05.same_seed", round(float(start[3, 15]), 6))
assert abs(start[3, 15] - 1) < 1e-5

# %% [markdown]
# *Nothing was learned, and φ is 1.* Compare adapters of different seeds, or you measure the dice. Now train: ranks 4 and 16,
# two seeds, on q and v as in the paper. All four train side by side in one sweep.

# %% [markdown] lang="zh" of="3f72523c"
# *什么都没学到，φ 却等于 1*。要比较种子不同的适配器，否则你测量的只是掷骰子。现在开始训练：秩 4 和秩 16，两个种子，
# 与论文一样放在 q 和 v 上。四个适配器在一次扫描（sweep）中并排训练。

# %%
configs = [ml.LoraConfig(r=r, lora_alpha=32, target_modules=Q_V) for r in (4, 16)]
result = ml.sweep(base, task_on(lab.SETTING), configs, seeds=[0, 1], train=lab.SETTING.schedule(1e-2), evaluate=python)
learned = {}
for k, row in enumerate(result.rows):
    result.install(base, k, "cell")
    learned[row["rank"], row["seed"]] = updates(base, "cell")
    ml.delete_adapter(base, "cell")
    print(f"r = {row['rank']:2}, seed {row['seed']}: loss on Python {row['eval_loss']:.3f}")

# %%
check.guess("05.q_seeds", None)             # do two seeds share their first direction? φ(1, 1) of q, mean of two layers
check.guess("05.v_seeds", None)             # and of v

# %%
compared = {path: {"r = 4 in r = 16": compare(learned[4, 0][path], learned[16, 1][path]),
                   "two seeds, r = 16": compare(learned[16, 0][path], learned[16, 1][path])} for path in learned[4, 0]}
alike = {kind: float(np.mean([data["two seeds, r = 16"]["phi"][0][0] for path, data in compared.items() if kind in path]))
         for kind in ("q_proj", "v_proj")}
check.compare("05.q_seeds", alike["q_proj"])
check.compare("05.v_seeds", alike["v_proj"])
one_in_16 = float(np.mean([data["r = 4 in r = 16"]["phi"][0][15] for path, data in compared.items() if "q_proj" in path]))
same_seed = float(similarity_grid(learned[4, 0]["layers.0.attn.q_proj"].directions("A"),
                                  learned[16, 0]["layers.0.attn.q_proj"].directions("A"))[3, 15])
other_seed = float(similarity_grid(learned[4, 0]["layers.0.attn.q_proj"].directions("A"),
                                   learned[16, 1]["layers.0.attn.q_proj"].directions("A"))[3, 15])
print(f"q: the first direction of r = 4 in the 16 of r = 16: {one_in_16:.2f}, by chance {16 / 64:.2f}")
print(f"φ(4, 16) of A, layer 0, q: {same_seed:.2f} with one seed, {other_seed:.2f} with two")
if lab.FULL:
    assert alike["q_proj"] > alike["v_proj"] + 0.2                     # as in the paper's Figure 4
    assert one_in_16 > 16 / 64 + 0.1                                   # as in its Figure 3
    assert same_seed > other_seed + 0.2                                # the dice are still seen after training
    assert all(compared[f"layers.0.attn.{kind}_proj"]["two seeds, r = 16"]["phi"][15][15] < 0.5 for kind in "qv")
lab.show(figures.shared_directions(
    {kind: compared[f"layers.0.attn.{kind}_proj"] for kind in "qv"},
    {"r = 4 in r = 16": ("r = 4", "r = 16"), "two seeds, r = 16": ("seed 0", "seed 1")}))

# %% [markdown]
# *Two seeds agree on a few directions of q, and on fewer of v.* That is the paper's Figure 4, at a size that trains in
# seconds. But look at the last column: the more directions, the nearer the curves come to the dashed line. More than half of
# what rank 16 holds differs from seed to seed (φ(16, 16) is below 0.5). And with one seed for both ranks the overlap is
# larger, for a reason that has nothing to do with the text.

# %% [markdown] lang="zh" of="0c100c2e"
# *对于 q，两个种子在少数几个方向上一致；对于 v，一致的方向更少*。这就是论文的图 4，只不过规模小到几秒钟就能训练完。
# 但是请看最后一列：方向取得越多，曲线就越接近虚线。秩 16 所包含的内容，有一半以上随种子而变（φ(16, 16) 低于 0.5）。
# 而两种秩用同一个种子时，重叠更大，原因与文本毫无关系。

# %% [markdown]
# ### Exercise 05.1 · ●●○ · 15 min
#
# Write φ and what chance gives for it. A1 is (r1, k) and A2 is (r2, k). The directions of A are its right singular vectors,
# the strongest first. Return `(phi, chance)`: φ(i, j) of the two, and its exact mean for random directions (a formula, no
# simulation). Do not use `minilora.rank`.
#
# <details><summary>Hint 1</summary>The directions of A are the rows of Vh in its SVD, strongest first: take i of one and j of
# the other.</details>
# <details><summary>Hint 2</summary>All i·j cosines at once are one product of two thin matrices. φ needs their
# squares.</details>
# <details><summary>Hint 3</summary>One random unit vector and one fixed one have a mean squared cosine of 1/k. How many pairs
# are summed?</details>

# %% [markdown] lang="zh" of="a840f082"
# ### 练习 05.1 · ●●○ · 15 分钟
#
# 用代码写出 φ 以及它的随机水平。A1 是 (r1, k)，A2 是 (r2, k)。A 的方向就是它的右奇异向量，最强的排在最前面。
# 返回 `(phi, chance)`：两者的 φ(i, j)，以及方向随机时 φ(i, j) 的精确均值（用公式，不用模拟）。不要使用 `minilora.rank`。
#
# <details><summary>提示 1</summary>A 的方向是它的 SVD 中 Vh 的各行，最强的在前：一个取 i 行，另一个取 j 行。</details>
# <details><summary>提示 2</summary>全部 i·j 个余弦，用两个细长矩阵的一次乘积就能同时得到。φ 需要的是它们的平方。</details>
# <details><summary>提示 3</summary>一个随机单位向量与一个固定单位向量，余弦平方的均值是 1/k。一共对多少对求和？</details>

# %% exercise="similarity"
def similarity(A1, A2, i, j):
    """(r1, k), (r2, k), i ≤ r1, j ≤ r2 -> (phi, chance), two numbers."""
    # BEGIN SOLUTION
    V1, V2 = (np.linalg.svd(A, full_matrices=False)[2] for A in (A1, A2))
    phi = np.sum((V1[:i] @ V2[:j].T) ** 2) / min(i, j)
    return float(phi), max(i, j) / A1.shape[1]
    # END SOLUTION

# %% check="similarity"
check.similarity(similarity)

# %% [markdown]
# ## 2. Does ΔW repeat W, or does it strengthen what W neglects?
#
# This is the paper's Table 7. Let U (d, r) and V (r, k) be the directions of ΔW. UᵀWVᵀ is an r × r matrix: what W does from
# ΔW's input directions to ΔW's output directions. Its norm says how much W already does there. The *amplification factor* is
# ‖ΔW‖ / ‖UᵀWVᵀ‖.
#
# The paper (GPT-3, layer 48, q, r = 4) has ‖UᵀWVᵀ‖ = 0.32 in the directions of ΔW, 21.67 in W's own top directions and 0.02 in
# random ones. The factor is 21.5. At r = 64 it is 1.9.
#
# Guess: does our factor rise or fall from r = 4 to r = 16? By how many times?

# %% [markdown] lang="zh" of="9c96331b"
# ## 2. ΔW 是重复 W，还是加强 W 所忽略的？
#
# 这是论文的表 7。设 U (d, r) 和 V (r, k) 是 ΔW 的方向。UᵀWVᵀ 是一个 r × r 矩阵：从 ΔW 的输入方向到 ΔW 的输出方向，W 做了什么。
# 它的范数说明 W 在那里已经做了多少。*放大因子*是 ‖ΔW‖ / ‖UᵀWVᵀ‖。
#
# 在论文中（GPT-3，第 48 层，q，r = 4），‖UᵀWVᵀ‖ 在 ΔW 的方向上是 0.32，在 W 自己最强的方向上是 21.67，在随机方向上是 0.02。
# 放大因子是 21.5。r = 64 时是 1.9。
#
# 猜一猜：从 r = 4 到 r = 16，我们的放大因子是升还是降？相差几倍？

# %%
check.guess("05.amplification", None)       # factor at r = 4 over factor at r = 16

# %%
rows = []
for kind in ("q_proj", "v_proj"):
    for r in (4, 16):
        cells = []
        for (rank, _), found in learned.items():
            cells += [amplification(found[path], weight(path)) | {
                "norm": float(np.linalg.norm(found[path].svd[1])),
                "projection_top": top_projection(gram_svd(weight(path))[1], r)}
                for path in found if rank == r and path.endswith(kind)]
        rows.append({"module": kind, "rank": r} | {key: [cell[key] for cell in cells] for key in cells[0]})
print("module   r    in ΔW's directions   in random ones   in W's top ones   factor")
mean = {(row["module"], row["rank"]): {key: float(np.mean(row[key])) for key in cells[0]} for row in rows}
for (kind, r), row in mean.items():
    print(f"{kind:8}{r:3}{row['projection']:17.2f}{row['projection_random']:19.2f}{row['projection_top']:18.2f}"
          f"{row['amplification']:12.1f}")
falls = float(np.mean([mean[kind, 4]["amplification"] / mean[kind, 16]["amplification"] for kind in ("q_proj", "v_proj")]))
check.compare("05.amplification", falls)
if lab.FULL:
    assert all(row["projection"] < 0.6 * row["projection_top"] for row in mean.values())            # never W's own top ones
    assert all(mean[kind, 4]["amplification"] > 2 * mean[kind, 16]["amplification"] for kind in ("q_proj", "v_proj"))
    assert mean["q_proj", 4]["projection"] > 1.3 * mean["q_proj", 4]["projection_random"]           # q: more than chance
    assert mean["v_proj", 4]["projection"] < 1.3 * mean["v_proj", 4]["projection_random"]           # v: chance
lab.show(plots.amplification({"rows": rows}))

# %% [markdown]
# *ΔW does not repeat W: its directions are not W's strongest ones.* That agrees with the paper. But be careful with the factor.
# For random directions ‖UᵀWVᵀ‖ is about ‖W‖·r/√(dk). So the factor of a **random** update, at the same ‖ΔW‖, falls by 4 from
# r = 4 to r = 16. The paper's own fall from r = 4 to 64, 21.5 to 1.9, is 11 times where chance gives 16. The number that says
# something is ‖UᵀWVᵀ‖ beside its chance value. For q it is larger, so ΔW strengthens directions that W knows a little. For v
# at r = 4 it is chance.

# %% [markdown] lang="zh" of="88b24f77"
# *ΔW 不重复 W：它的方向不是 W 最强的方向*。这与论文一致。但是要小心放大因子。对于随机方向，‖UᵀWVᵀ‖ 约为 ‖W‖·r/√(dk)。
# 所以当 ‖ΔW‖ 相同时，从 r = 4 到 r = 16，**随机**更新量的放大因子会降到四分之一。论文自己的放大因子，
# 从 r = 4 到 64 由 21.5 降到 1.9，相差 11 倍，而随机情形下相差 16 倍。真正说明问题的数，是 ‖UᵀWVᵀ‖ 与它的随机水平的对比。
# 对于 q，它大于随机水平，所以 ΔW 加强了 W 略知一二的方向。对于 r = 4 的 v，它就是随机水平。

# %% [markdown]
# ### Exercise 05.2 · ●●○ · 12 min
#
# Compute one row of Table 7 for W (d, k), B (d, r), A (r, k) and the scale s. Return `(projection, factor)`: ‖UᵀWVᵀ‖ with the r
# directions U (d, r) and V (r, k) of ΔW = s·B@A, and ‖ΔW‖ / ‖UᵀWVᵀ‖. B and A have full rank r. You may form ΔW here.
#
# <details><summary>Hint 1</summary>The directions of ΔW are those of its SVD; only r of them mean anything.</details>
# <details><summary>Hint 2</summary>UᵀWVᵀ is an r×r matrix: what W does from ΔW's input directions to ΔW's output
# directions.</details>
# <details><summary>Hint 3</summary>‖·‖ is the Frobenius norm, and the factor compares ‖ΔW‖ (with its scale s) with that
# projection.</details>

# %% [markdown] lang="zh" of="5967c676"
# ### 练习 05.2 · ●●○ · 12 分钟
#
# 给定 W (d, k)、B (d, r)、A (r, k) 和缩放系数 s，计算表 7 的一行。返回 `(projection, factor)`：前者是 ‖UᵀWVᵀ‖，
# 其中 U (d, r) 和 V (r, k) 是 ΔW = s·B@A 的 r 个方向；后者是 ‖ΔW‖ / ‖UᵀWVᵀ‖。B 和 A 都满秩，秩为 r。这里可以把 ΔW 算出来。
#
# <details><summary>提示 1</summary>ΔW 的方向就是它的 SVD 的方向；只有其中 r 个有意义。</details>
# <details><summary>提示 2</summary>UᵀWVᵀ 是一个 r×r 矩阵：从 ΔW 的输入方向到 ΔW 的输出方向，W 做了什么。</details>
# <details><summary>提示 3</summary>‖·‖ 是 Frobenius 范数；放大因子比较的是 ‖ΔW‖（含缩放系数 s）与这个投影。</details>

# %% exercise="amplify"
def amplify(W, B, A, s):
    """(d, k), (d, r), (r, k), a number -> (projection, factor), two numbers."""
    # BEGIN SOLUTION
    r = A.shape[0]
    U, S, Vh = np.linalg.svd(s * B @ A, full_matrices=False)
    projection = float(np.linalg.norm(U[:, :r].T @ W @ Vh[:r].T))
    return projection, float(np.linalg.norm(S[:r])) / projection
    # END SOLUTION

# %% check="amplify"
check.amplify(amplify)

# %% [markdown]
# ## 3. Is LoRA a compressed full fine-tune?
#
# Many texts say: full fine-tuning makes a ΔW of low rank, and LoRA finds it with fewer numbers. We can look. Train every
# weight (two learning rates), and LoRA on all linear layers (ranks 4 and 16).
#
# An **intruder** is one of the first ten output directions (columns of U) of W + ΔW that resembles none of W's: its |cos|
# with each of them, the absolute scalar product of two unit vectors, is below 0.5. Guess: out of 80 (8 matrices), how many
# does LoRA with r = 4 have, and how many full fine-tuning at the lower rate?

# %% [markdown] lang="zh" of="2f90831b"
# ## 3. LoRA 是压缩的全量微调吗？
#
# 很多文章说：全量微调得到的 ΔW 是低秩的，LoRA 用更少的参数找到了它。我们可以看一看。先训练所有权重（两种学习率），
# 再把 LoRA 放在所有线性层上训练（秩 4 和秩 16）。
#
# **入侵维度**（intruder）是指：在 W + ΔW 的前十个输出方向（U 的列）中，与 W 的任何输出方向都不像的那些方向，
# 也就是它与 W 的每一个输出方向的 |cos|（两个单位向量的内积的绝对值）都低于 0.5。猜一猜：在总共 80 个方向（8 个矩阵）里，
# r = 4 的 LoRA 有多少个入侵维度？学习率较低的全量微调又有多少个？

# %%
check.guess("05.lora_intruders", None)
check.guess("05.full_intruders", None)

# %%
configs = [ml.LoraConfig(r=r, lora_alpha=32, target_modules=ALL_LINEAR) for r in (4, 16)]
wide = ml.sweep(base, task_on(lab.SETTING), configs, train=lab.SETTING.schedule(1e-2), evaluate=python)
full = {lr: tuned(lab.SETTING, 0, lr)[0] for lr in (1e-3, 3e-3)}
name = {lr: f"full, rate {lr:g}" for lr in full}
changes, losses = {}, {}
for k, row in enumerate(wide.rows):
    wide.install(base, k, "cell")
    changes[f"LoRA, r = {row['rank']}"] = updates(base, "cell")
    losses[f"LoRA, r = {row['rank']}"] = mean_loss(base, python), mean_loss(base, prose)
    ml.delete_adapter(base, "cell")
for lr, model in full.items():
    changes[name[lr]], losses[name[lr]] = dense_updates(base, model), (mean_loss(model, python), mean_loss(model, prose))

reports = {kind: {"modules": {path: {"intruder_cosines": alignment(update, weight(path))["cosines"],
                                     "shape": list(update.shape)} for path, update in found.items()}}
           for kind, found in changes.items()}
count = {kind: sum(intruder_count(row["intruder_cosines"]) for row in report["modules"].values())
         for kind, report in reports.items()}
rank = {kind: float(np.mean([ml.rank.effective_rank(update.svd[1]) for update in found.values()]))
        for kind, found in changes.items()}
print("                   Python    prose   effective rank   intruders of 80")
for kind in changes:
    print(f"{kind:18}{losses[kind][0]:7.3f}{losses[kind][1]:9.3f}{rank[kind]:17.1f}{count[kind]:18}")
check.compare("05.lora_intruders", count["LoRA, r = 4"])
check.compare("05.full_intruders", count[name[1e-3]])
if lab.FULL:
    assert min(count["LoRA, r = 4"], count["LoRA, r = 16"]) > 10 > 3 >= count[name[1e-3]]
    assert count[name[1e-3]] < count[name[3e-3]]                       # they grow with the rate
    assert rank[name[1e-3]] > 30                                       # full fine-tuning's ΔW is not of low rank

# %% [markdown]
# If LoRA were compressed full fine-tuning, then cutting full fine-tuning's ΔW to rank 4 would do at least as well as LoRA of
# rank 4: the cut is the best approximation there is (lesson 04). `ml.extract` makes an adapter from the difference of two
# models.

# %% [markdown] lang="zh" of="9f10b826"
# 如果 LoRA 是压缩的全量微调，那么把全量微调的 ΔW 截断到秩 4，效果至少应当与秩 4 的 LoRA 一样好，
# 因为这样的截断就是最佳近似（第 04 课）。`ml.extract` 用两个模型之差生成一个适配器。

# %%
check.guess("05.cut", None)                 # loss on Python of full fine-tuning's ΔW (rate 0.003), cut to rank 4

# %%
ranks = [1, 4, 16, 64]
cut = {kind: [] for kind in name.values()}
with tempfile.TemporaryDirectory() as folder:
    place = Path(folder)
    ml.save_pretrained(base, None, place / "base")
    for lr, model in full.items():
        ml.save_pretrained(model, None, place / f"full-{lr:g}")
        for r in ranks:
            ml.extract(place / "base", place / f"full-{lr:g}", place / f"cut-{lr:g}-{r}", rank=r)
            thin = copy_of(base)
            ml.load_adapter(thin, place / f"cut-{lr:g}-{r}")
            cut[name[lr]].append(mean_loss(thin, python))
lora = {r: losses[f"LoRA, r = {r}"][0] for r in (4, 16)}
check.compare("05.cut", cut[name[3e-3]][1])
print(f"LoRA trained at rank 4: {lora[4]:.3f}")
if lab.FULL:
    assert all(lora[4] < values[1] - 0.02 for values in cut.values())  # thin from the start beats cut afterwards
path = "layers.1.mlp.up_proj"
lab.show(figures.beside_full({"spectra": {kind: found[path].svd[1].tolist() for kind, found in changes.items()},
                                "reports": reports, "cut": {"ranks": ranks, "full": cut, "lora": lora,
                                                            "base": mean_loss(base, python)}}))

# %% [markdown]
# *LoRA is not a compressed full fine-tune.* Full fine-tuning changes many directions a little. LoRA has few, so it makes them
# strong, and they become new singular vectors. Both reach a good loss by different updates. (The cut curves keep the linear
# layers only. Full fine-tuning also trained embeddings, norms and biases.)

# %% [markdown] lang="zh" of="aa8b059c"
# *LoRA 不是压缩的全量微调*。全量微调把很多方向都改变一点点。LoRA 的方向少，于是把它们变得很强，它们就成了新的奇异向量。
# 两者用不同的更新量都达到了不错的损失。（截断曲线只保留了线性层。全量微调还训练了嵌入、归一化层和偏置。）

# %% [markdown]
# ### Exercise 05.3 · ●●○ · 15 min
#
# Count the intruders. For each of the first `top` left singular vectors of W + s·B@A, find the largest |cos| with any left
# singular vector of W. (W has min(d, k) of them: `np.linalg.svd(W, full_matrices=False)`.) Return `(cosines, count)`: these
# `top` numbers as an array, and how many are below epsilon.
#
# <details><summary>Hint 1</summary>Two SVDs: of W and of W + ΔW. The left singular vectors are the columns of U.</details>
# <details><summary>Hint 2</summary>For each of the first `top` vectors of W + ΔW, the largest |cos| with any vector of
# W.</details>

# %% [markdown] lang="zh" of="deb30a7b"
# ### 练习 05.3 · ●●○ · 15 分钟
#
# 数一数入侵维度。对 W + s·B@A 的前 `top` 个左奇异向量，逐个求出它与 W 的所有左奇异向量的 |cos| 的最大值。
# （W 有 min(d, k) 个左奇异向量：`np.linalg.svd(W, full_matrices=False)`。）返回 `(cosines, count)`：由这 `top` 个数组成的数组，
# 以及其中低于 epsilon 的个数。
#
# <details><summary>提示 1</summary>两次 SVD：W 的和 W + ΔW 的。左奇异向量是 U 的各列。</details>
# <details><summary>提示 2</summary>对 W + ΔW 的前 `top` 个向量中的每一个，求它与 W 的任意向量的 |cos| 的最大值。</details>

# %% exercise="intruders"
def intruders(W, B, A, s, epsilon, top):
    """(d, k), (d, r), (r, k), numbers -> (cosines (top,), count)."""
    # BEGIN SOLUTION
    before = np.linalg.svd(W, full_matrices=False)[0]
    after = np.linalg.svd(W + s * B @ A, full_matrices=False)[0]
    cosines = np.abs(after[:, :top].T @ before).max(axis=1)
    return cosines, int((cosines < epsilon).sum())
    # END SOLUTION

# %% check="intruders"
check.intruders(intruders)

# %% [markdown]
# ## 4. What was forgotten?
#
# "LoRA learns less and forgets less." Read the table above again: the column *prose* is what was forgotten. And lesson 03
# ended on a case where the sentence is simply false: the new task uses inputs that the old task never uses. Do you remember?
# By how many per cent do the old answers change, in full fine-tuning and in LoRA?

# %% [markdown] lang="zh" of="b2069b21"
# ## 4. 忘掉了什么？
#
# “LoRA 学得更少，也忘得更少。”再看看上面的表：*prose* 一列就是忘掉的部分。而第 03 课的结尾有一个例子，这句话在其中根本不成立：
# 新任务使用的输入，旧任务从来不用。你还记得吗？在全量微调和 LoRA 中，旧的输出分别改变了百分之几？

# %%
check.guess("05.old_answers_full", None)
check.guess("05.old_answers_lora", None)

# %%
both = two_tasks(0, steps=300 if lab.FULL else 40)
check.compare("05.old_answers_full", 100 * both["full"], "%")
check.compare("05.old_answers_lora", 100 * both["lora"], "%")
assert both["full"] == 0.0
if lab.FULL:
    assert both["lora"] > 0.1

# %% [markdown]
# *Here full fine-tuning forgets exactly nothing, and LoRA forgets much.* The gradient of W is ȳᵀx: where the new inputs are
# zero it is zero. LoRA's A starts random in **all** columns, and B turns this into a change for the old inputs too. "Forgets
# less" is a tendency, not a law.
#
# A paper (arXiv:2410.21228) says that intruders are what forgets, and that softening them (σ times 0.7) brings the old text
# back at little cost. We try it. We also try the simplest thing, as a control: shrink the **whole** update by the same factor
# f. Which one gives back more prose?

# %% [markdown] lang="zh" of="9799044e"
# *在这里，全量微调一点也没有忘，LoRA 却忘了很多*。W 的梯度是 ȳᵀx：新输入为零的地方，梯度也为零。
# LoRA 的 A 在**所有**列上都随机开始，而 B 把它变成了对旧输入的改变。“忘得更少”是一种倾向，不是定律。
#
# 有一篇论文（arXiv:2410.21228）说，造成遗忘的是入侵维度，并且说，削弱它们（σ 乘以 0.7）就能以很小的代价找回旧文本。
# 我们来试一试。我们也试一件最简单的事作为对照：把**整个**更新量按同样的系数 f 缩小。哪一种找回的 prose 更多？

# %%
check.guess("05.softened", None)            # loss on prose with intruders times 0.7
check.guess("05.shrunk", None)              # loss on prose with the whole update times 0.7

# %%
factors = [1.0, 0.9, 0.7, 0.5, 0.0]
wide.install(base, 0, "cell")
lines = {"LoRA, r = 4: whole update times f": [], "LoRA, r = 4: intruders times f": []}
for factor in factors:
    ml.set_scale(base, "cell", factor)
    lines["LoRA, r = 4: whole update times f"].append((mean_loss(base, python), mean_loss(base, prose)))
    ml.set_scale(base, "cell", 1.0)
    reduce_intruders(base, factor, name="cell", correction="softer")
    lines["LoRA, r = 4: intruders times f"].append((mean_loss(base, python), mean_loss(base, prose)))
    if "softer" in base.adapter_configs:
        ml.delete_adapter(base, "softer")
    ml.set_adapter(base, "cell")
ml.delete_adapter(base, "cell")
shrunk, softened = lines.values()
at = factors.index(0.7)
check.compare("05.softened", softened[at][1])
check.compare("05.shrunk", shrunk[at][1])
print(f"on Python: {softened[at][0]:.3f} and {shrunk[at][0]:.3f}, as trained {shrunk[0][0]:.3f}")
if lab.FULL:
    assert softened[at][1] < softened[0][1] - 0.01                     # softening gives some prose back
    assert shrunk[at][1] < softened[at][1]                             # and so does shrinking everything, more of it
    assert shrunk[at][0] < softened[at][0] + 0.01                      # at no higher price
    assert softened[-1][0] > mean_loss(base, python)                   # without them: worse on Python than no adapter
lab.show(figures.learned_and_forgotten({"base": (mean_loss(base, python), mean_loss(base, prose)), "lines": lines,
                                          "factors": factors, "points": {kind: losses[kind] for kind in name.values()}}))

# %% [markdown]
# *Softening the intruders gives prose back. Shrinking everything gives back more, at no higher price.* And without its
# intruders (f = 0) the model is worse on Python than with no adapter: they carry what was learned. So in this small model, with
# one seed, intruders are a mark of LoRA, and we have no evidence that they cause the forgetting. Without the control we would
# have believed it.

# %% [markdown] lang="zh" of="346615be"
# *削弱入侵维度能找回一部分 prose。把整个更新量缩小，找回的更多，代价也没有更高*。而且，去掉入侵维度（f = 0）之后，
# 模型在 Python 上比没有适配器时还差：学到的东西正是由它们承载的。所以，在这个小模型里，在一个种子下，入侵维度是 LoRA 的标志，
# 而我们没有证据表明是它们造成了遗忘。假如没有对照，我们就会相信这种说法。

# %% [markdown]
# ### Exercise 05.4 · ●●● · 25 min
#
# Write the softening. The SVD of the tuned weight is W + s·B@A = Σ σⱼ uⱼvⱼᵀ. An intruder is one of the first `top` uⱼ whose
# largest |cos| with W's left singular vectors is below epsilon. Multiply the σⱼ of the intruders by `factor`, and leave
# everything else. Return the new update (d, k): the new tuned weight minus W.
#
# <details><summary>Hint 1</summary>W + ΔW = Σ σⱼ uⱼvⱼᵀ. Find the intruders j among the first `top`, as in 05.3.</details>
# <details><summary>Hint 2</summary>Multiply their σⱼ by factor and leave all else as it is. What is then the update to
# W?</details>
# <details><summary>Hint 3</summary>The change is (factor − 1) Σ σⱼ uⱼvⱼᵀ over the intruders; add it to s·B@A.</details>

# %% [markdown] lang="zh" of="6fddab3d"
# ### 练习 05.4 · ●●● · 25 分钟
#
# 把削弱写成代码。微调后权重的 SVD 是 W + s·B@A = Σ σⱼ uⱼvⱼᵀ。入侵维度是前 `top` 个 uⱼ 中，
# 与 W 的左奇异向量的 |cos| 最大值低于 epsilon 的那些。把入侵维度的 σⱼ 乘以 `factor`，其余一概不变。返回新的更新量 (d, k)：
# 新的微调后权重减去 W。
#
# <details><summary>提示 1</summary>W + ΔW = Σ σⱼ uⱼvⱼᵀ。像 05.3 那样，在前 `top` 个里找出入侵维度 j。</details>
# <details><summary>提示 2</summary>把它们的 σⱼ 乘以 factor，其余都保持原样。这时 W 的更新量是什么？</details>
# <details><summary>提示 3</summary>改变量是 (factor − 1) Σ σⱼ uⱼvⱼᵀ，对入侵维度求和；再把它加到 s·B@A 上。</details>

# %% exercise="soften"
def soften(W, B, A, s, epsilon, top, factor):
    """(d, k), (d, r), (r, k), numbers -> the softened update (d, k)."""
    # BEGIN SOLUTION
    update = s * B @ A
    before = np.linalg.svd(W, full_matrices=False)[0]
    U, S, Vh = np.linalg.svd(W + update, full_matrices=False)
    found = np.flatnonzero(np.abs(U[:, :top].T @ before).max(axis=1) < epsilon)
    return update + (factor - 1) * (U[:, found] * S[found]) @ Vh[found]
    # END SOLUTION

# %% check="soften"
check.soften(soften)

# %% [markdown]
# ## What you should be able to say now
#
# - A similarity needs its baseline max(i, j)/k and different seeds; without them φ is 1 for noise.
# - ΔW leaves W's strong directions alone; LoRA's ΔW is few strong new directions, full fine-tuning's is many weak ones.
# - "Intruders cause forgetting" and "LoRA forgets less" need controls and have counter-examples.

# %% [markdown] lang="zh" of="1d80f30f"
# ## 现在你应该能说清楚
#
# - 相似度需要有它的基线 max(i, j)/k，还需要不同的种子；没有这些，噪声的 φ 也是 1。
# - ΔW 不动 W 的强方向；LoRA 的 ΔW 是少数几个强的新方向，全量微调的 ΔW 是许多弱的方向。
# - “入侵维度造成遗忘”和“LoRA 忘得更少”都需要对照，也都有反例。

# %% [markdown] slide=true
# ## The slide
#
# **What does ΔW contain that W did not?**
# - φ(i, j) = ‖V₁ⁱ(V₂ʲ)ᵀ‖² / min(i, j); chance gives max(i, j)/k
# - two seeds share a few directions of q, fewer of v
# - amplification ‖ΔW‖/‖UᵀWVᵀ‖ falls with r by arithmetic: compare with chance
# - full fine-tuning's ΔW: high effective rank, few intruders; LoRA's: the opposite
# - cutting full fine-tuning to rank 4 is worse than training at rank 4
# - a result without a control is a guess: shrink everything, and see

# %% [markdown] lang="zh" of="3a6a36b2"
# ## 幻灯片
#
# **ΔW 里有什么是 W 里没有的？**
# - φ(i, j) = ‖V₁ⁱ(V₂ʲ)ᵀ‖² / min(i, j)；随机水平是 max(i, j)/k
# - 两个种子在 q 上有少数几个共同方向，在 v 上更少
# - 放大因子 ‖ΔW‖/‖UᵀWVᵀ‖ 随 r 下降，这只是算术：要与随机水平比较
# - 全量微调的 ΔW：有效秩高，入侵维度少；LoRA 的正相反
# - 把全量微调截断到秩 4，不如直接用秩 4 训练
# - 没有对照的结果只是猜测：把整个更新量缩小，再看看
