# %% [markdown]
# # 10 · LoRA as it is often mis-explained
#
# **The question: can you tell by running?**
#
# Many texts explain LoRA, and many of them are wrong. This lesson takes twelve sentences about LoRA. Ten are
# quoted from widely read texts, two are ours. Each one becomes a few lines that run. Then five tests tell a LoRA from what
# only looks like one. It is about reading, not about languages or authors: we quote claims, not people.
#
# | You will do | You will learn | You need |
# |---|---|---|
# | judge twelve claims, then run each | which common sentences are wrong, and what is right | lessons 03 (LoRA), 04 (rank) |
# | repair four listings | why a falling loss proves nothing | 60 minutes, one core |
# | write an audit of a training run | five tests for anybody's LoRA | no download |
#
# The right statement, in one line: *W is frozen and never decomposed; a new product s·B·A is added, thin by construction,
# zero at the start; only A and B get gradients; after training s·B·A may be added into W once.*

# %% [markdown] lang="zh" of="f49a12ca"
# # 10 · 常被讲错的 LoRA
#
# **问题：跑一下，你能辨别真假吗？**
#
# 讲解 LoRA 的文章很多，讲错的也很多。本课挑出关于 LoRA 的十二句话：十句引自广为流传的文章，两句是我们自己写的。
# 每一句都变成几行可以运行的代码。然后用五项检验，把真正的 LoRA 和只是看起来像的东西分开。这一课讲的是如何阅读，
# 不针对任何语言或作者：我们引用说法，不点名。
#
# | 你要做的 | 你会学到 | 你需要 |
# |---|---|---|
# | 判断十二个说法，再逐一运行 | 哪些常见的话是错的，怎样说才对 | 第 03 课（LoRA）、第 04 课（秩） |
# | 修好四段代码清单 | 为什么损失下降什么也证明不了 | 60 分钟，一个 CPU 核 |
# | 为一次训练写一份审计 | 对任何人的 LoRA 都适用的五项检验 | 不需要下载 |
#
# 正确的说法，用一句话讲：*W 被冻结，从不被分解；另外加上一个新的乘积 s·B·A，它的构造决定了它是细长的，起点为零；
# 只有 A 和 B 得到梯度；训练之后，可以把 s·B·A 一次性加进 W。*

# %% [markdown] teacher=true
# **For the teacher: 60 minutes with the class, or 25 as the end of a lecture.** Poll first, talk later: hand out the twelve
# claims (the table below prints on one page), five minutes, every student writes T, F or D. Count hands for claims 1, 7 and
# 12 and write the counts on the board. Then run the cards; after each, one student says the *right* sentence. Board plan:
# left, the one-line statement with W, B and A drawn as boxes to scale; right, a table with five columns (no-op, few
# numbers, base kept, low rank, learns) that you fill before you show the figure. **The poll question:** "A recipe's loss
# falls below LoRA's. Is it a LoRA?" Most hands go up; the figure shows three such recipes, and none is one. Expect:
# "decomposes" is believed by most; "avoids forgetting" by nearly all; claim 12 is believed by those who have used a merging
# tool. Expect in 10.1-10.4: the product *replaces* W instead of being added; both factors zero; a forgotten s. **Rubric for
# 10.7, six points:** the claim is quoted with its place, no person is named (1); it is restated so that it could be false
# (1); the experiment could have come out the other way (1); it runs in ten lines with the library, seeded (1); there is an
# assert, and a control that must pass it (1); the verdict says for which case it was shown, and uses "depends" where it
# should (1). A claim that turns out to be *true* earns full points.

# %% [markdown]
# ## 0. Your verdicts first
#
# | | The claim, in Chinese | in English |
# |---|---|---|
# | 1 | 「将预训练模型的参数矩阵分解为低秩矩阵的乘积形式」 | LoRA decomposes the pretrained matrix into low-rank factors. |
# | 2 | 「$W^Q=A^Q\times\sqrt{d_K}$」「$A^Q$ 只包含少量参数」 | W is A times √d; A has only a few numbers. |
# | 3 | 「W = A + B，B 冻结，只更新低秩矩阵 A」 | W = A + B; B is frozen, only the low-rank A is updated. |
# | 4 | 「文本分类：只更新分类器部分」 | For text classification, only the classifier is updated. |
# | 5 | A 随机，B 为零，所以训练开始时模型不变。 | A starts random, B at zero: the model is unchanged. (ours) |
# | 6 | 「α 表示学习率」 | α is the learning rate. |
# | 7 | 「避免了灾难性遗忘」 | LoRA avoids catastrophic forgetting. |
# | 8 | 「有助于减少模型大小」「大幅减少计算复杂度」 | LoRA makes the model smaller, and cuts the arithmetic by far. |
# | 9 | 合并以后，推理没有任何额外开销。 | Once merged, it costs nothing at inference. (ours) |
# | 10 | 「7B ~10M, 13B ~20M, 70B ~100M；99.86%」 | Whatever the size, LoRA leaves out 99.86 % of the parameters. |
# | 11 | 「批次可以设置更大，因为显存占用低」 | The batch can be larger, because LoRA needs little memory. |
# | 12 | 「w1*LoRA_1 + w2*LoRA_2」 | Two adapters can be combined as w1·LoRA₁ + w2·LoRA₂. |

# %% [markdown] lang="zh" of="43abc143"
# ## 0. 先写下你的判断
#
# | | 说法 |
# |---|---|
# | 1 | 「将预训练模型的参数矩阵分解为低秩矩阵的乘积形式」 |
# | 2 | 「$W^Q=A^Q\times\sqrt{d_K}$」「$A^Q$ 只包含少量参数」 |
# | 3 | 「W = A + B，B 冻结，只更新低秩矩阵 A」 |
# | 4 | 「文本分类：只更新分类器部分」 |
# | 5 | A 随机，B 为零，所以训练开始时模型不变。（我们写的） |
# | 6 | 「α 表示学习率」 |
# | 7 | 「避免了灾难性遗忘」 |
# | 8 | 「有助于减少模型大小」「大幅减少计算复杂度」 |
# | 9 | 合并以后，推理没有任何额外开销。（我们写的） |
# | 10 | 「7B ~10M, 13B ~20M, 70B ~100M；99.86%」 |
# | 11 | 「批次可以设置更大，因为显存占用低」 |
# | 12 | 「w1*LoRA_1 + w2*LoRA_2」 |

# %%
import inspect

import numpy as np

import minilora as ml
from minilora import check
from minilora.autograd import tanh
from minilora.course import lab, listings
from minilora.plots import lesson_10 as figures

norm = np.linalg.norm


def draws(seed=0):
    """Normal numbers of a shape, from one seed: draw((3, 4), 0.1) has entries of standard deviation 0.1."""
    rng = np.random.default_rng(seed)
    return lambda shape, size=1.0: size * rng.standard_normal(shape)


# %% [markdown]
# Write "true", "false" or "depends" in place of each `None`, and run the cell. Later cells compare.

# %% [markdown] lang="zh" of="56781ef5"
# 把每个 `None` 换成 "true"（对）、"false"（错）或 "depends"（看情况），然后运行这个单元。后面的单元会与之比较。

# %%
check.guess("10.claim 1: decomposes W", None)
check.guess("10.claim 2: W = A·√d", None)
check.guess("10.claim 3: W = A + B", None)
check.guess("10.claim 4: only the classifier", None)
check.guess("10.claim 5: B starts at zero", None)
check.guess("10.claim 6: α is a learning rate", None)
check.guess("10.claim 7: avoids forgetting", None)
check.guess("10.claim 8: smaller, less arithmetic", None)
check.guess("10.claim 9: merged costs nothing", None)
check.guess("10.claim 10: always 99.86 %", None)
check.guess("10.claim 11: larger batches", None)
check.guess("10.claim 12: w1·LoRA₁ + w2·LoRA₂", None)

# %% [markdown]
# ## 1. What happens to W
#
# ### Claim 1. LoRA decomposes W
#
# If W were replaced by a product of two thin matrices, the best such product would be its truncated SVD. How much of the
# answer is then lost? And how much does LoRA change at its start?

# %% [markdown] lang="zh" of="1fe49d34"
# ## 1. W 发生了什么
#
# ### 说法 1：LoRA 分解 W
#
# 假如用两个细长矩阵的乘积代替 W，那么最好的乘积就是 W 的截断 SVD。这样会损失掉多少输出？而 LoRA 在起点又改变了多少？

# %%
d = k = 128
r, s, draw = 8, 2.0, draws()
W, head, x = draw((d, k), k**-0.5), draw((10, d), d**-0.5), draw((512, k))
U, S, Vt = np.linalg.svd(W)
decomposed = (U[:, :r] * S[:r]) @ Vt[:r]                       # the best product of rank 8 there is
A, B = draw((r, k), k**-0.5), np.zeros((d, r))


def answers(weight):
    return np.tanh(x @ weight.T) @ head.T


lost = norm(answers(decomposed) - answers(W)) / norm(answers(W))
unchanged = np.array_equal(answers(W + s * (B @ A)), answers(W))
print(f"W decomposed to rank {r}: the answers are {lost:.0%} wrong (by Eckart-Young W itself is "
      f"{ml.rank.eckart_young_errors(S, relative=True)[r]:.0%} off)")
print("LoRA at its start: the answers are the same, bit for bit:", unchanged)
assert lost > 0.5 and unchanged
check.compare("10.claim 1: decomposes W", "false")

# %% [markdown]
# **Right:** nothing is decomposed. W stays whole; the *update* is a product. A random matrix stands for a trained one here.
# Lesson 08 measures all 36 matrices of a real model: their best rank-8 parts are 87 to 95 % off, those of noise 96 to 98 %.
#
# ### Claims 2 and 3. W = A·√d; W = A + B with a low-rank A
#
# Both listings train "only A". Here they are, as they run.

# %% [markdown] lang="zh" of="30de144d"
# **正解**：什么都没有被分解。W 保持完整，写成乘积的是*更新量*。这里用一个随机矩阵代替训练好的矩阵。
# 第 08 课测量了一个真实模型的全部 36 个矩阵：它们的最佳秩 8 近似的误差为 87% 到 95%，噪声矩阵的则为 96% 到 98%。
#
# ### 说法 2 和 3：W = A·√d；W = A + B，其中 A 低秩
#
# 这两段清单都“只训练 A”。下面是实际运行的代码。

# %%
print(inspect.getsource(listings.scaled_copy), inspect.getsource(listings.split), sep="\n")
d = k = 64                                                     # √64 = 8, so scaling by it is exact
draw = draws()
W, x = draw((d, k), k**-0.5), draw((256, k))
y = x @ (W + draw((d, k), 0.1)).T
whole = listings.Listing({"W": W.copy()}, {}, lambda trained, frozen: trained["W"])       # full fine-tuning
scaled = listings.scaled_copy(W, 4, np.random.default_rng(0))
listings.train_listing(whole, x, y, 20, lr=0.064, optimiser=ml.training.SGD)
listings.train_listing(scaled, x, y, 20, lr=0.001, optimiser=ml.training.SGD)
same = np.array_equal(scaled.trained["A"] * 8, whole.trained["W"])
print(f"W = A·√d: {scaled.trained['A'].size} of {W.size} numbers train; after 20 steps of SGD it equals full fine-tuning at 64 "
      f"times the learning rate, bit for bit: {same}")

summands = listings.split(W, 4, np.random.default_rng(0))
ranks = [int(np.linalg.matrix_rank(summands.trained["A"]))]
listings.train_listing(summands, x, y, 1, lr=0.01)
ranks.append(int(np.linalg.matrix_rank(summands.trained["A"])))
print(f"W = A + B: A has rank {ranks[0]}, and rank {ranks[1]} after ONE step; {summands.trained['A'].size} numbers train, "
      f"LoRA of rank 4 has {4 * (d + k)}")
assert same and scaled.trained["A"].size == W.size and ranks == [4, 64]
check.compare("10.claim 2: W = A·√d", "false")
check.compare("10.claim 3: W = A + B", "false")

# %% [markdown]
# **Right:** rank is not kept by wishing. A matrix of W's shape gets a gradient of W's shape, and the first step fills it.
# Two *thin* factors keep the rank at r by construction. (W as thin principal factors plus a frozen rest is PiSSA, a real
# method.)
#
# ## 2. How it trains
#
# ### Claim 4. Only the classifier is updated
#
# A frozen layer, and labels that need one direction of the input which that layer ignores.

# %% [markdown] lang="zh" of="d6717066"
# **正解**：秩不是想保住就能保住的。形状与 W 相同的矩阵，得到的梯度形状也与 W 相同，第一步就把它填满了。
# 两个*细长*因子则从构造上保证秩不超过 r。（把 W 写成细长的主成分因子加上一个冻结的剩余部分，这是 PiSSA，一种真实的方法。）
#
# ## 2. 它怎样训练
#
# ### 说法 4：只更新分类器
#
# 一个冻结的层；标签取决于输入的某一个方向，而这一层恰好忽略了这个方向。

# %%
k, h, n, draw = 20, 64, 600, draws(1)
u = draw(k)
u /= norm(u)
frozen = draw((h, k), k**-0.5)
frozen -= np.outer(frozen @ u, u)                              # the layer does not see u
x, x_test = draw((n, k)), draw((n, k))
label, label_test = (x @ u > 0).astype(int), (x_test @ u > 0).astype(int)


def accuracy(with_lora, steps=300 if lab.FULL else 60):
    draw = draws(2)
    head = ml.nn.Parameter(draw((2, h), 0.1))
    A, B = ml.nn.Parameter(draw((1, k), k**-0.5)), ml.nn.Parameter(np.zeros((h, 1)))
    optimiser = ml.training.AdamW([head, A, B] if with_lora else [head], lr=0.05, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        ml.cross_entropy(ml.linear(tanh(ml.lora_linear(x, frozen, None, A, B, 1.0)), head), label).backward()
        optimiser.step()
    hidden = tanh(ml.lora_linear(x_test, frozen, None, A, B, 1.0))
    return float((ml.linear(hidden, head).data.argmax(1) == label_test).mean())


only_head, with_lora = accuracy(False), accuracy(True)
print(f"head alone: {only_head:.0%};  head, and LoRA of rank 1 ({k + h} numbers) on the layer below: {with_lora:.0%}")
assert only_head < 0.6 and with_lora > 0.9
check.compare("10.claim 4: only the classifier", "false")

# %% [markdown]
# **Right:** a classifier on frozen features is a linear probe. It cannot see what the features do not hold. LoRA changes
# every layer that it sits on, a little.
#
# ### Claim 5. A random, B zero: unchanged at the start

# %% [markdown] lang="zh" of="2c81b791"
# **正解**：在冻结的特征上训练分类器，这叫线性探测（linear probe）。特征里没有的东西，它看不见。
# LoRA 则会稍稍改变它所在的每一层。
#
# ### 说法 5：A 随机，B 为零，起点不变

# %%
d = k = 128
r, s, draw = 8, 2.0, draws()
W, x = draw((d, k), k**-0.5), draw((256, k))
y = x @ (W + draw((d, 4), 0.02) @ draw((4, k))).T
A_random, B_random = draw((r, k), k**-0.5), draw((d, r), r**-0.5)
starts = {"A random, B zero": (A_random, 0 * B_random), "A zero, B random": (0 * A_random, B_random),
          "both random": (A_random, B_random), "both zero": (0 * A_random, 0 * B_random)}
found = {}
for name, (a, b) in starts.items():
    A, B = ml.nn.Parameter(a.copy()), ml.nn.Parameter(b.copy())
    ((ml.lora_linear(x, W, None, A, B, s) - y) ** 2).mean().backward()
    found[name] = (norm(s * b @ a) / norm(W), norm(B.grad), norm(A.grad))
    print("{:18}|ΔW| / |W| = {:.2f}    |grad B| = {:.4f}    |grad A| = {:.4f}".format(name, *found[name]))
assert found["A random, B zero"][0] == found["A random, B zero"][2] == 0 < found["A random, B zero"][1]
assert found["both random"][0] > 0.5 and found["both zero"] == (0, 0, 0)
check.compare("10.claim 5: B starts at zero", "true")

# %% [markdown]
# **Right, and it is the one rule of the start:** exactly one factor is zero. Both random breaks the model before the first
# step. Both zero never moves: each gradient is multiplied by the other factor.
#
# ### Claim 6. α is the learning rate
#
# One step from the same A and B = 0, at scales s = 1, 2, 4. If s were a learning rate, ΔW would grow 1, 2, 4 under every
# optimiser.

# %% [markdown] lang="zh" of="45e8c268"
# **正解，而且这是关于起点的唯一规则**：恰好有一个因子为零。两个都随机，第一步之前模型就已经被破坏；两个都为零，就永远不动，
# 因为每个因子的梯度都要乘以另一个因子。
#
# ### 说法 6：α 是学习率
#
# 从同样的 A 和 B = 0 出发走一步，缩放系数取 s = 1、2、4。如果 s 是学习率，那么不管用哪种优化器，ΔW 都应当按 1、2、4 倍增长。

# %%
def first_update(s, optimiser, **options):
    A, B = ml.nn.Parameter(A_random.copy()), ml.nn.Parameter(np.zeros((d, r)))
    step = optimiser([A, B], lr=1e-3, **options)
    ((ml.lora_linear(x, W, None, A, B, s) - y) ** 2).mean().backward()
    step.step()
    return norm(s * (B.data @ A.data))


growth, exact = {}, {"eps": 1e-30, "weight_decay": 0.0}
for name, optimiser, options in (("SGD", ml.training.SGD, {}), ("Adam", ml.training.AdamW, exact)):
    sizes = [first_update(s, optimiser, **options) for s in (1.0, 2.0, 4.0)]
    growth[name] = [size / sizes[0] for size in sizes]
    print(f"{name:5}|ΔW| after one step, s = 1, 2, 4: " + ", ".join(f"{g:.3f}" for g in growth[name]) + " times that of s = 1")
assert np.allclose(growth["SGD"], [1, 4, 16]) and np.allclose(growth["Adam"], [1, 2, 4])
check.compare("10.claim 6: α is a learning rate", "false")

# %% [markdown]
# **Right:** α/r is a scale on the branch. Under SGD it acts twice (once in the gradient, once in the output), under Adam
# once.
#
# ### Exercise 10.1 · ●●○ · 8 min
#
# The listing of claim 2 again (`scaled_copy`, printed above): `W = A·√d`. Write it so that it *is* a LoRA: three lines are
# enough. Return three things: `trained` and `frozen`, dicts of float64 arrays, and a function `weight(trained, frozen)`. It
# gives the weight (out, in), and uses `+ - * @ .T` and `.sum` only, since the check also calls it with Tensors, to train it.
# `s` is LoRA's whole scale, α/r. Draw random numbers from `rng`.
#
# <details><summary>Hint 1</summary>What must be in `frozen`? Look at the one-line statement at the top.</details>
# <details><summary>Hint 2</summary>Two thin factors: their product has W's shape. Which of them starts at zero?</details>

# %% [markdown] lang="zh" of="bdf3654a"
# **正解**：α/r 是支路上的缩放系数。在 SGD 下它起两次作用（一次在梯度里，一次在输出里），在 Adam 下只起一次作用。
#
# ### 练习 10.1 · ●●○ · 8 分钟
#
# 还是说法 2 的清单（上面打印过的 `scaled_copy`）：`W = A·√d`。请改写它，使它*真的*成为 LoRA，三行就够了。返回三样东西：
# `trained` 和 `frozen`，它们是由 float64 数组组成的字典；还有一个函数 `weight(trained, frozen)`。这个函数给出权重 (out, in)，
# 而且只用 `+ - * @ .T` 和 `.sum`，因为检查程序也会用 Tensor 调用它来训练。`s` 就是 LoRA 完整的缩放系数 α/r。
# 随机数从 `rng` 中取。
#
# <details><summary>提示 1</summary>`frozen` 里必须有什么？看看开头那句正确的说法。</details>
# <details><summary>提示 2</summary>两个细长因子：它们的乘积与 W 形状相同。哪一个从零开始？</details>

# %% exercise="repair_scaled"
def repair_scaled(W, r, s, rng):
    """W (out, in), rank r, scale s -> (trained, frozen, weight). The listing was: A = W / √d; the weight is A·√d."""
    # BEGIN SOLUTION
    out, inn = W.shape
    A = rng.uniform(-1, 1, (r, inn)) / inn**0.5
    return {"A": A, "B": np.zeros((out, r))}, {"W": W}, lambda t, f: f["W"] + s * (t["B"] @ t["A"])
    # END SOLUTION


# %% check="repair_scaled"
check.repair_scaled(repair_scaled)

# %% [markdown]
# ### Exercise 10.2 · ●●○ · 6 min
#
# The listing of claim 3: `W = A + B`, `B` frozen, `A` trained. Keep the two summands, so keep the line
# `frozen["B"] + ...`. But let `B` be all of W, and let the other summand stay of rank r whatever training does.
#
# <details><summary>Hint 1</summary>The other summand must be zero at the start, since B is already all of W.</details>
# <details><summary>Hint 2</summary>Train two thin factors, and multiply them inside `weight`, not before.</details>

# %% [markdown] lang="zh" of="f1aedb25"
# ### 练习 10.2 · ●●○ · 6 分钟
#
# 说法 3 的清单：`W = A + B`，冻结 `B`，训练 `A`。请保留两项相加的形式，也就是保留 `frozen["B"] + ...` 这一行。
# 但是要让 `B` 成为整个 W，并让另一项无论怎样训练，秩都不超过 r。
#
# <details><summary>提示 1</summary>另一项在起点必须为零，因为 B 已经是整个 W。</details>
# <details><summary>提示 2</summary>训练两个细长因子，并在 `weight` 里面相乘，不要提前乘好。</details>

# %% exercise="repair_split"
def repair_split(W, r, s, rng):
    """W (out, in), rank r, scale s -> (trained, frozen, weight). The listing was: A = best rank-r part of W, B = W - A."""
    # BEGIN SOLUTION
    out, inn = W.shape
    right = rng.uniform(-1, 1, (r, inn)) / inn**0.5
    return {"left": np.zeros((out, r)), "right": right}, {"B": W}, lambda t, f: f["B"] + s * (t["left"] @ t["right"])
    # END SOLUTION


# %% check="repair_split"
check.repair_split(repair_split)

# %% [markdown]
# ## 3. What it keeps and what it costs
#
# ### Claim 7. LoRA avoids catastrophic forgetting
#
# The old task is W itself: its loss is zero before. Case one: old and new inputs are the same kind. LoRA of rank r then
# learns the best rank-r part of the change (lesson 04), and the old answers move by just that part. Case two: the new
# inputs lie in other directions than the old ones.

# %% [markdown] lang="zh" of="20b09b43"
# ## 3. 它保住什么，又要付出什么
#
# ### 说法 7：LoRA 避免了灾难性遗忘
#
# 旧任务就是 W 本身：训练之前它的损失为零。情形一：新旧输入属于同一类。此时秩为 r 的 LoRA 学到所需改变的最佳秩 r 近似（第 04
# 课），旧的输出也恰好随这一部分而变。情形二：新输入所在的方向与旧输入不同。

# %%
draw, d = draws(), 64
change = ml.data.planted_update(d, d, [1.2, 1.0, 0.8, 0.6], np.random.default_rng(0))          # what the new task needs, rank 4
errors = ml.rank.eckart_young_errors(np.linalg.svd(change, compute_uv=False), relative=True) ** 2
for rank in (1, 2, 4):
    print(f"same inputs, r = {rank}: left to learn {errors[rank]:.2f}, forgotten {1 - errors[rank]:.2f} of the full change")

W, old, new = draw((d, d), d**-0.5), draw((512, d)), draw((512, d))
old[:, d // 2:] = 0
new[:, : d // 2] = 0                                           # old and new inputs share no direction
y = new @ (W + change).T
full = listings.Listing({"W": W.copy()}, {}, lambda trained, frozen: trained["W"])
adapter = listings.lora(W, 8, np.random.default_rng(0))
steps = 200 if lab.FULL else 20
losses = {"full fine-tuning": listings.train_listing(full, new, y, steps, lr=2.0, optimiser=ml.training.SGD),
          "LoRA, r = 8": listings.train_listing(adapter, new, y, steps, lr=5e-3)}
moved = {name: norm(old @ (listing.weight(listing.trained, listing.frozen) - W).T) / norm(old @ W.T)
         for name, listing in (("full fine-tuning", full), ("LoRA, r = 8", adapter))}
for name, share in moved.items():
    print(f"other inputs, {name}: the new task's loss falls from {losses[name][0]:.2f} to {losses[name][-1]:.0e}, "
          f"the old answers changed by {share:.1%}")
assert not lab.FULL or max(loss[-1] for loss in losses.values()) < 1e-6                         # both have learned it
assert np.all(np.diff(errors) < 0) and moved["full fine-tuning"] == 0 and moved["LoRA, r = 8"] > (0.05 if lab.FULL else 0.005)
check.compare("10.claim 7: avoids forgetting", "depends")

# %% [markdown]
# **Right:** frozen numbers are not a frozen function. LoRA often learns less, and then it forgets less. Here is the
# counter-example: both learn the new task. Full fine-tuning leaves the old answers exactly alone, since its gradient lies in
# the new inputs' directions. LoRA does not, because its A starts random and so looks in all directions.
#
# ### Claims 8 and 9. Smaller, less arithmetic; merged, it costs nothing

# %% [markdown] lang="zh" of="a1afb465"
# **正解**：冻结的参数不等于冻结的函数。LoRA 常常学得少一些，于是忘得也少一些。这里给出的是反例：两者都学会了新任务。
# 全量微调让旧的输出完全不变，因为它的梯度落在新输入的方向上。LoRA 却做不到，因为它的 A 随机开始，朝向所有的方向。
#
# ### 说法 8 和 9：更小，计算更少；合并以后没有额外开销

# %% exact=true
model = ml.Transformer(ml.TransformerConfig(vocab_size=256, d_model=64, n_layers=2, n_heads=4, max_len=64))
numbers = {"base": ml.count_parameters(model)["total"]}
ml.add_adapter(model, ml.LoraConfig(r=8, target_modules="all-linear"))
numbers["base and adapter"] = ml.count_parameters(model)["total"]
numbers["merged"] = ml.count_parameters(ml.merge_and_unload(model))["total"]
print("numbers to keep in memory:", numbers)
d = k = 768
r = 8
forward = {"base": d * k, "with the branch": d * k + r * (d + k), "merged": d * k}
print("multiplications for a token, one 768×768 layer:", forward)
full_step, lora_step = 3 * d * k, 2 * d * k + 3 * r * (d + k)
print(f"training, forward and backward: full {full_step}, LoRA {lora_step}")
assert numbers["base"] < numbers["base and adapter"] and numbers["merged"] == numbers["base"]
assert forward["merged"] == forward["base"] and 2 / 3 < lora_step / full_step < 1
gpt2 = ml.params("gpt2", ml.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
print(f"a file for each task, GPT-2: {4 * (gpt2.total - gpt2.trainable) / 1e6:.0f} MB for the model, "
      f"{gpt2.file_size() / 1e6:.2f} MB for the adapter")
check.compare("10.claim 8: smaller, less arithmetic", "false")
check.compare("10.claim 9: merged costs nothing", "true")

# %% [markdown]
# **Right:** the *file* of a task is small. The model that runs is larger by the adapter, or just as large once merged. In
# training, W is still multiplied twice: at best a third of the arithmetic falls away. "Two to three times faster" cannot
# follow.
#
# ### Claims 10 and 11. Always 99.86 %; larger batches
#
# `ml.params` counts a model that does not fit this machine, without making it.

# %% [markdown] lang="zh" of="64174b9a"
# **正解**：一个任务的*文件*很小。而运行的模型多出了适配器那一部分，合并之后则与原来一样大。在训练中，W 仍然要乘两次：
# 计算量最多减少三分之一。由此得不出“快两到三倍”。
#
# ### 说法 10 和 11：总是 99.86%；批量更大
#
# `ml.params` 能统计这台机器放不下的模型的参数量，而不必真的创建它。

# %%
sizes = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
choices = {"all linear": "all-linear", "q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"], "q, v": ["q_proj", "v_proj"]}
counted = {name: [ml.params(size, ml.LoraConfig(r=8, target_modules=targets)) for size in sizes]
           for name, targets in choices.items()}
for name, row in counted.items():
    print(f"{name:12}" + "".join(f"{p.trainable / 1e6:8.1f} M = {p.share:.3%}" for p in row))
assert all(row[0].share > row[1].share > row[2].share for row in counted.values())

print("\n7B in 16 bits, 2048 tokens a sequence:")
ratios = []
for batch in (1, 4, 16, 64):
    full, lora = (sum(ml.params("llama-2-7b", config, batch=batch, tokens=2048).memory["bf16"].values()) / 1e9
                  for config in (None, ml.LoraConfig(r=8, target_modules="all-linear")))
    ratios.append(full / lora)
    print(f"batch {batch:2}: full fine-tuning {full:4.0f} GB, LoRA {lora:4.0f} GB, {full / lora:.1f} times less")
assert ratios[0] > 4 and ratios[-1] < 1.5
check.compare("10.claim 10: always 99.86 %", "false")
check.compare("10.claim 11: larger batches", "depends")
lab.show(figures.shares({"models": ["7B", "13B", "70B"], "claimed": [0.0014] * 3,
                         "shares": {name: [p.share for p in row] for name, row in counted.items()}}))

# %% [markdown]
# **Right:** the share falls as the model grows, about like 1/d, and it depends on which matrices you choose. What LoRA
# saves (gradients, Adam's moments) does not grow with the batch; activations do, and LoRA keeps them. So at batch 1 much is
# saved, at batch 64 almost nothing. "Depends": recomputing activations changes the picture for both.
#
# ### Claim 12. w1·LoRA₁ + w2·LoRA₂

# %% [markdown] lang="zh" of="705c2a69"
# **正解**：模型越大，可训练参数所占的比例越小，大致与 1/d 成正比；这个比例还取决于你选了哪些矩阵。
# LoRA 省下的部分（梯度和 Adam 的矩估计）不随批量增长；激活值会随批量增长，而 LoRA 照样要保存它们。所以批量为 1 时省得很多，
# 批量为 64 时几乎什么也没省。说“看情况”，是因为重计算激活值会让两边的情形都改变。
#
# ### 说法 12：w1·LoRA₁ + w2·LoRA₂

# %%
d, r, draw = 256, 8, draws()
A1, A2, B1, B2 = draw((r, d)), draw((r, d)), draw((d, r)), draw((d, r))
wanted = 0.5 * B1 @ A1 + 0.5 * B2 @ A2
both = ml.rank.Update(A1, B1, 0.5) + ml.rank.Update(A2, B2, 0.5)             # factors side by side: rank 2r
root = 0.5**0.5
errors = {
    "average A, average B": norm((B1 + B2) / 2 @ (A1 + A2) / 2 - wanted) / norm(wanted),
    "√w on A and on B": norm(root * (B1 + B2) @ (root * (A1 + A2)) - wanted) / norm(wanted),
    "factors side by side, rank 2r": norm(both.scale * both.B @ both.A - wanted) / norm(wanted),
    "the best there is at rank r": float(ml.rank.eckart_young_errors(both.svd[1], relative=True)[r])}
for name, error in errors.items():
    print(f"{name:32}{error:.2g}")
assert errors["average A, average B"] > 0.6 and errors["√w on A and on B"] > 0.9
assert errors["factors side by side, rank 2r"] < 1e-12 < 0.5 < errors["the best there is at rank r"]
check.compare("10.claim 12: w1·LoRA₁ + w2·LoRA₂", "depends")

# %% [markdown]
# **Right:** updates ΔW may be added; factors may not. The product of sums has cross terms B₁A₂ that mean nothing.
# `ml.compose` puts the factors side by side, exactly. At the old rank r even the best answer loses more than half here.
#
# ## 4. Five tests
#
# Does a falling loss show that a recipe is a LoRA? Here are the paper's LoRA and six listings. How many of the six reach a
# *lower training loss* than LoRA? Then the five tests run on all of them: `check.is_lora(weight, trained, frozen, r=...)`.

# %% [markdown] lang="zh" of="049cfd2a"
# **正解**：更新量 ΔW 可以相加，因子不可以。和的乘积里有交叉项 B₁A₂，它们没有任何意义。`ml.compose` 把因子并排拼接，
# 结果是精确的。如果只用原来的秩 r，在这里就算是最好的答案也会损失一半以上。
#
# ## 4. 五项检验
#
# 损失下降，能说明一种做法是 LoRA 吗？这里有论文中的 LoRA 和六段清单。六段之中，有几段的*训练损失比 LoRA 更低*？
# 然后对它们全部运行五项检验：`check.is_lora(weight, trained, frozen, r=...)`。

# %%
check.guess("10.m wrong listings with a lower loss than LoRA", None)

draw, d, r = draws(), 48, 4
W, x, x_new = draw((d, d), d**-0.5), draw((300, d)), draw((300, d))
target = W + draw((d, r), 0.05) @ draw((r, d)) / r**0.5
y, y_new = x @ target.T + draw((300, d), 0.05), x_new @ target.T + draw((300, d), 0.05)
steps, rows = 300 if lab.FULL else 60, []
for name, make in listings.LISTINGS.items():
    listing = make(W, r, np.random.default_rng(1))
    report = check.is_lora(listing.weight, listing.trained, listing.frozen, r=r, base=W, data=(x, y), steps=steps)
    listings.train_listing(listing, x, y, steps, lr=3e-3)
    unseen = float(np.mean((x_new @ listing.weight(listing.trained, listing.frozen).T - y_new) ** 2))
    rows.append({"name": name, "ticks": report.ticks, "numbers": sum(array.size for array in listing.trained.values()),
                 "loss": report.loss[1:], "unseen": unseen})
lower = [row["name"] for row in rows[1:] if row["loss"][1] < rows[0]["loss"][1]]
assert all(rows[0]["ticks"].values()) and not any(all(row["ticks"].values()) for row in rows[1:])
if lab.FULL:
    assert len(lower) == 3 and all(row["unseen"] > rows[0]["unseen"] for row in rows[1:])
    check.compare("10.m wrong listings with a lower loss than LoRA", len(lower))
lab.show(figures.ticks({"rows": rows, "rank": r, "size": d}))

# %% [markdown]
# **Three of the six learn better than LoRA, on the data that they see.** They are full fine-tuning in disguise. On new data
# they are worse than LoRA here, because the true change has rank 4 and they also fit the noise. That too is no proof: with
# another change it would be the other way round. So the loss cannot tell, but the five tests do:
#
# 1. **no-op at the start**: the weight is W, bit for bit. (Two listings miss this by one rounding, so it is not enough alone.)
# 2. **few numbers**: at most r(in + out), and r more for a diagonal.
# 3. **base kept**: W is among the frozen arrays, and still has its bytes after training.
# 4. **low rank**: the change has rank at most r, after training too.
# 5. **learns**: the loss falls below half of the base's.
#
# ### Exercise 10.3 · ●●○ · 10 min
#
# "A summed over the rank": the listing keeps r whole matrices and sums them, and W occurs nowhere. Keep the idea of a sum
# over the rank, of *thin* terms: term i is s times the outer product of `b[i]` (out,) and `a[i]` (in,). So `trained` is
# `{"a": (r, in), "b": (r, out)}`. No loop is needed. And W?
#
# <details><summary>Hint 1</summary>The sum over i of the outer products of b[i] and a[i] is one matrix product.</details>
# <details><summary>Hint 2</summary>Check the shapes: (out, r) times (r, in).</details>

# %% [markdown] lang="zh" of="65e8f576"
# **六段之中有三段，在见过的数据上比 LoRA 学得更好。** 它们是伪装的全量微调。在这里，它们在新数据上不如 LoRA，
# 因为真正的改变秩为 4，而它们把噪声也拟合了进去。但这同样不是证明：换一种改变，结果就会反过来。所以损失辨别不了，
# 五项检验却可以：
#
# 1. **起点是空操作**（no-op at the start）：权重与 W 逐位相同。（有两段清单只差一次舍入，所以单凭这一项还不够。）
# 2. **参数少**（few numbers）：最多 r(in + out) 个；如果有对角矩阵，再多 r 个。
# 3. **基座保留**（base kept）：W 在被冻结的数组之中，训练后每个字节都没有变。
# 4. **低秩**（low rank）：改变量的秩最多为 r，训练之后也是如此。
# 5. **学得到**（learns）：损失降到基座损失的一半以下。
#
# ### 练习 10.3 · ●●○ · 10 分钟
#
# “A 按秩求和”：这段清单保存 r 个完整的矩阵，再把它们加起来，而 W 根本没有出现。请保留“按秩求和”这个想法，但是让每一项都*细长*：
# 第 i 项是 s 乘以 `b[i]` (out,) 与 `a[i]` (in,) 的外积。于是 `trained` 是 `{"a": (r, in), "b": (r, out)}`。不需要循环。
# 那么 W 呢？
#
# <details><summary>提示 1</summary>b[i] 与 a[i] 的外积对 i 求和，就是一次矩阵乘法。</details>
# <details><summary>提示 2</summary>检查形状：(out, r) 乘以 (r, in)。</details>

# %% exercise="repair_summed"
def repair_summed(W, r, s, rng):
    """W (out, in), rank r, scale s -> (trained, frozen, weight). The listing was: A (r, out, in); the weight is A.sum(0)."""
    # BEGIN SOLUTION
    out, inn = W.shape
    a = rng.uniform(-1, 1, (r, inn)) / inn**0.5
    return {"a": a, "b": np.zeros((r, out))}, {"W": W}, lambda t, f: f["W"] + s * (t["b"].T @ t["a"])
    # END SOLUTION


# %% check="repair_summed"
check.repair_summed(repair_summed)

# %% [markdown]
# ### Exercise 10.4 · ●●○ · 8 min
#
# `W + U·Λ·Vᵀ`, three random factors. Keep the three: `trained` is `{"U": (out, r), "Lambda": (r,), "V": (in, r)}`, and
# the update is s·U·Λ·Vᵀ, where Λ is the diagonal matrix with `Lambda` on its diagonal. Now make it a no-op at the start that
# can learn. (AdaLoRA has this form.)
#
# <details><summary>Hint 1</summary>One of the three zero is enough. Two zero are too many: why?</details>
# <details><summary>Hint 2</summary>Lambda has one axis: (U * Lambda) scales the columns of U.</details>

# %% [markdown] lang="zh" of="2e3cf386"
# ### 练习 10.4 · ●●○ · 8 分钟
#
# `W + U·Λ·Vᵀ`，三个随机的因子。请保留这三个因子：`trained` 是 `{"U": (out, r), "Lambda": (r,), "V": (in, r)}`，
# 更新量是 s·U·Λ·Vᵀ，其中 Λ 是以 `Lambda` 为对角元素的对角矩阵。现在让它在起点是空操作，而又能够学习。（AdaLoRA 就是这种形式。）
#
# <details><summary>提示 1</summary>三个之中有一个为零就够了。两个为零就太多了：为什么？</details>
# <details><summary>提示 2</summary>Lambda 只有一个轴：(U * Lambda) 缩放 U 的各列。</details>

# %% exercise="repair_factors"
def repair_factors(W, r, s, rng):
    """W (out, in), rank r, scale s -> (trained, frozen, weight). The listing was: U, Lambda and V all N(0, 1)."""
    # BEGIN SOLUTION
    out, inn = W.shape
    U, V = rng.standard_normal((out, r)) / out**0.5, rng.standard_normal((inn, r)) / inn**0.5
    return ({"U": U, "Lambda": np.zeros(r), "V": V}, {"W": W},
            lambda t, f: f["W"] + s * ((t["U"] * t["Lambda"]) @ t["V"].T))
    # END SOLUTION


# %% check="repair_factors"
check.repair_factors(repair_factors)

# %% [markdown]
# ### Exercise 10.5 · ●●○ · 8 min
#
# Somebody hands you a model before and after training, as dicts of arrays, and the names that *should* have trained. Say
# what went wrong: which arrays moved but should not have, and which should have moved but did not. Compare bit for bit: a
# base that moved by 10⁻¹² has moved. (`check.audit(before, after)` does the first half of this for a whole model.)
#
# <details><summary>Hint 1</summary>A base that moved a little passes `np.allclose`. A NaN is not equal to itself.</details>
# <details><summary>Hint 2</summary>`array.tobytes()` gives the bits.</details>

# %% [markdown] lang="zh" of="95a245d9"
# ### 练习 10.5 · ●●○ · 8 分钟
#
# 有人交给你一个模型训练前后的参数，都是由数组组成的字典，还有*本该*被训练的数组的名字。请说出哪里出了错：哪些数组不该动却动了，
# 哪些该动却没有动。要逐位比较：基座动了 10⁻¹²，也是动了。（`check.audit(before, after)` 对整个模型完成前一半工作。）
#
# <details><summary>提示 1</summary>基座只动了一点点时，`np.allclose` 会放行。NaN 不等于它自己。</details>
# <details><summary>提示 2</summary>`array.tobytes()` 给出所有的比特。</details>

# %% exercise="what_moved"
def what_moved(before, after, trained):
    """before, after: {name: array}, the same names; trained: a set of names -> (moved, still), two sorted lists of names.

    moved: not in trained, but changed. still: in trained, but unchanged.
    """
    # BEGIN SOLUTION
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    return sorted(changed - trained), sorted(trained - changed)
    # END SOLUTION


# %% check="what_moved"
check.what_moved(what_moved)

# %% [markdown]
# ### Exercise 10.6 · ●○○ · 8 min
#
# A text reports "97.3 % F1" for named entities, and prints the table `TABLE` below: precision, recall and support (the true
# tokens) of each label. O (no entity) is one of its nine labels, with 38,323 of the 46,435 tokens. Write the micro-averaged
# F1 of such a table: one F1 from the counts of all its rows, O too. Then call it with the text's own rows:
# `micro_f1(*np.array(list(TABLE.values())).T)`. It gives 0.981, without the row O 0.922. A program that always answers O gets
# 0.825. "97.3 %" is not among them.
#
# <details><summary>Hint 1</summary>Get the counts back: recall = hits / support, precision = hits / predicted.</details>
# <details><summary>Hint 2</summary>F1 = 2 · hits / (support + predicted), each summed over the labels.</details>

# %% [markdown] lang="zh" of="e6c02d64"
# ### 练习 10.6 · ●○○ · 8 分钟
#
# 有一篇文章报告命名实体识别达到“97.3% F1”，并列出下面的表 `TABLE`：每个标签的精确率、召回率和支持数（真实的词元数）。
# O（不是实体）是九个标签之一，占 46,435 个词元中的 38,323 个。请写出这样一张表的微平均 F1：
# 由所有行（包括 O）的计数得到一个 F1。然后用文章自己的各行来调用它：`micro_f1(*np.array(list(TABLE.values())).T)`。
# 结果是 0.981；去掉 O 那一行，是 0.922。一个永远回答 O 的程序能得到 0.825。其中没有“97.3%”。
#
# <details><summary>提示 1</summary>先把计数还原出来：召回率 = 命中数 / 支持数，精确率 = 命中数 / 预测数。</details>
# <details><summary>提示 2</summary>F1 = 2 · 命中数 / (支持数 + 预测数)，每一项都对所有标签求和。</details>

# %% exercise="micro_f1"
TABLE = {"B-LOC": (0.926, 0.906, 1668), "I-LOC": (0.900, 0.805, 257), "B-MISC": (0.875, 0.856, 702),
         "I-MISC": (0.838, 0.782, 216), "B-ORG": (0.914, 0.898, 1661), "I-ORG": (0.911, 0.894, 835),
         "B-PER": (0.964, 0.957, 1617), "I-PER": (0.983, 0.980, 1156), "O": (0.993, 0.995, 38323)}


def micro_f1(precision, recall, support):
    """precision, recall, support: (n,) arrays, one entry for each label -> the micro-averaged F1, a number."""
    # BEGIN SOLUTION
    hits = recall * support
    return 2 * hits.sum() / (support.sum() + (hits / precision).sum())
    # END SOLUTION


# %% check="micro_f1"
check.micro_f1(micro_f1)

# %% [markdown]
# ### Exercise 10.7 · ●●● · 30 min, open
#
# Find a sentence about LoRA on the web, in a language that you read. Quote it; name no person. Say what it claims, so that
# it could be false. Test it in at most ten lines with the library. Give a verdict: true, false, or on what it depends. It
# may well be true: then say for which case you have shown it.

# %% [markdown] lang="zh" of="ca26082d"
# ### 练习 10.7 · ●●● · 30 分钟，开放题
#
# 在网上找一句关于 LoRA 的话，用你能读的任何语言都可以。引用它，不要点名。说清楚它主张什么，而且要说得有可能被证伪。
# 用这个库写最多十行代码来检验它。给出结论：对、错，或者取决于什么。它完全可能是对的：那就说明你在哪种情形下证实了它。

# %% [markdown]
# ## What you should be able to say now
#
# 1. W is frozen and never decomposed. The update is a thin product, zero at the start, because one factor is zero.
# 2. A falling loss proves nothing. Five tests do: no-op, few numbers, base kept, low rank, learns.
# 3. "Forgets less", "larger batches" and "add two adapters" hold in some cases only, and I can say in which.

# %% [markdown] lang="zh" of="c8bb14af"
# ## 现在你应该能说清楚
#
# 1. W 被冻结，从不被分解。更新量是一个细长的乘积，起点为零，因为有一个因子为零。
# 2. 损失下降什么也证明不了。能证明的是五项检验：起点是空操作、参数少、基座保留、低秩、学得到。
# 3. “忘得更少”、“批量更大”、“两个适配器相加”都只在某些情形下成立，而我能说出是哪些。

# %% [markdown] slide=true
# ## The slide
#
# **LoRA, told from its look-alikes**
# - W' = W + s·B·A: W frozen and whole, A random, B zero
# - "decomposes W": the best rank-8 part of a full matrix is 90 % off
# - W = A·√d, W = A + B: full fine-tuning in disguise
# - α/r: ×4 under SGD, ×2 under Adam when doubled; not a learning rate
# - saves optimiser memory and files; not size, not 2-3 times the time
# - add updates ΔW, never factors
# - **test it: no-op · few numbers · base kept · low rank · learns**

# %% [markdown] lang="zh" of="7e991207"
# ## 幻灯片
#
# **分清 LoRA 与它的冒牌货**
# - W' = W + s·B·A：W 冻结而完整，A 随机，B 为零
# - “分解 W”：完整矩阵的最佳秩 8 近似，误差达 90%
# - W = A·√d，W = A + B：伪装的全量微调
# - α/r：加倍时，SGD 下 ×4，Adam 下 ×2；它不是学习率
# - 省优化器的内存，也省文件；不省模型大小，也省不出两三倍的时间
# - 相加的是更新量 ΔW，绝不是因子
# - **检验它：空操作 · 参数少 · 基座保留 · 低秩 · 学得到**
