# %% [markdown]
# # 03 · LoRA: what exactly is trained, and what is not?
#
# Fine-tuning changes every number of a model. LoRA changes none of them: it adds a few numbers beside them.
# In this lesson you see, number by number, what moves and what stays.
#
# **You'll do**
# - put LoRA on the small GPT of lesson 02, and look at its first thirty updates
# - write its forward pass and its gradients, each in two or three lines
# - fine-tune the model from English prose to Python source, beside full fine-tuning, and check every byte of the base
#
# **You'll learn**
# - which numbers train, how many there are, and why one of the two factors must start at zero
# - what the scale α/r does, and why it is not a learning rate
# - that a frozen weight is not a frozen function: LoRA forgets too, sometimes more than full fine-tuning
#
# **You need** lesson 01 (cotangents: ȳ = ∂L/∂y) and lesson 02 (the model). Matrix products with NumPy's `@`.
#
# Before each experiment there is a *guess*: replace `None` by your number, then run the next cell.

# %% [markdown] lang="zh" of="43a5e4b6"
# # 03 · LoRA：到底训练了什么，没有训练什么？
#
# 微调会改动模型里的每一个数。LoRA 一个也不改：它只在旁边添上少量的数。这一课让你一个数一个数地看清，哪些在动，哪些不动。
#
# **你要做的**
# - 给第 02 课的小 GPT 加上 LoRA，观察最初三十步更新
# - 写出它的前向传播和梯度，各两三行
# - 把模型从英文文本微调到 Python 源代码，与全量微调并排比较，并核对基座模型的每一个字节
#
# **你会学到的**
# - 哪些数参与训练，一共有多少个，以及两个因子中为什么必须有一个从零开始
# - 缩放系数 α/r 起什么作用，以及它为什么不是学习率
# - 冻结的权重不等于冻结的函数：LoRA 也会遗忘，有时比全量微调忘得更多
#
# **需要的基础**：第 01 课（余切向量：ȳ = ∂L/∂y）和第 02 课（模型）。会用 NumPy 的 `@` 做矩阵乘法。
#
# 每个实验之前都有一次**猜测**：把 `None` 换成你的数，再运行下一个单元格。

# %% [markdown] teacher=true
# **For the teacher (35 minutes in the 90-minute lecture; 75 minutes with the exercises).**
#
# *Board:* write `W' = W + s·B·A` in the middle and leave it there. Under each letter its shape: W (d, k), B (d, r), A (r, k).
# Frame W in one colour (frozen), A and B in another (trained). Write "B = 0" under B only after the poll.
# *Poll, before section 2:* "In the very first update, which of the three matrices moves?" (W / A / B / A and B.)
# Most rooms say "A and B". The answer is B alone. Let two people argue from dA = s·Bᵀ·G before you run the cell.
# *Minutes:* section 1: 8, section 2: 10, section 3: 5, section 4: 8, section 5: 4.
# *Expect:* "LoRA decomposes W" (no: nothing is decomposed, the figure in section 1 settles it); "α is a learning rate"
# (section 3); "frozen, so nothing is forgotten" (section 5); and forgetting s in the gradient, the most frequent wrong
# answer of exercise 03.4.
# *If time is short:* run sections 1, 2 and 4, and tell section 5 in one sentence with its last line of output.

# %%
import hashlib
import inspect
import tempfile
from pathlib import Path

import numpy as np

import minilora as ml
from minilora import check
from minilora.course import lab
from minilora.data import load_corpus, planted_update
from minilora.lora import LoRA, adapters_of
from minilora.plots import lesson_03 as figures
from minilora.studies.spectrum import two_tasks

# %% [markdown]
# ## 1. One equation, two colours
#
# A linear layer computes `y = x Wᵀ`. Each row of x is one example with k inputs, each row of y has its d outputs, so the
# weight W has the shape (d, k). LoRA keeps W and adds a product of two thin matrices:
#
# $$W' = W + s \cdot B A, \qquad s = \alpha / r$$
#
# | | shape | at the start | trains? |
# |---|---|---|---|
# | W | (d, k) | as pretrained | no |
# | A | (r, k) | small random numbers | yes |
# | B | (d, r) | **zero** | yes |
# | s | a number, α/r | chosen | no |
#
# r is the *rank*. B A has the shape of W, but never more than rank r. Nothing is decomposed: W stays as it is, and B A is new.
#
# In the library this equation is one method. (`base_scale` is s.)

# %% [markdown] lang="zh" of="4032bd36"
# ## 1. 一个公式，两种颜色
#
# 线性层计算 `y = x Wᵀ`。x 的每一行是一个样本，有 k 个输入；y 的每一行是它的 d 个输出，所以权重 W 的形状是 (d, k)。
# LoRA 保留 W，再加上两个细长矩阵的乘积：
#
# $$W' = W + s \cdot B A, \qquad s = \alpha / r$$
#
# | | 形状 | 开始时 | 训练吗？ |
# |---|---|---|---|
# | W | (d, k) | 预训练得到的值 | 否 |
# | A | (r, k) | 小随机数 | 是 |
# | B | (d, r) | **零** | 是 |
# | s | 一个数，α/r | 人为选定 | 否 |
#
# r 叫做**秩**。B A 的形状与 W 相同，但秩不会超过 r。没有任何东西被分解：W 保持原样，B A 是新加的。
#
# 在这个库里，这个公式就是一个方法。（`base_scale` 就是 s。）

# %%
print(inspect.getsource(LoRA.adapted_weight))

# %% [markdown]
# How thin is thin? Here are the three matrices, to scale: a layer of our small model, and a layer of a model with seven
# billion parameters. **Guess** first: which share of a 4096 × 4096 layer does LoRA train with r = 8, in percent?

# %% [markdown] lang="zh" of="59e689f1"
# “细”是多细？下面按比例画出这三个矩阵，各取一层：一层来自我们的小模型，一层来自七十亿参数的模型。
# 先**猜测**：对于 4096 × 4096 的一层，r = 8 的 LoRA 训练的参数占百分之几？

# %%
check.guess("03.share", None)

# %%
figure = figures.lora_to_scale([
    {"name": "up_proj of our model", "d_out": 256, "d_in": 64, "rank": 8},
    {"name": "q_proj of a 7B model", "d_out": 4096, "d_in": 4096, "rank": 8},
])
check.compare("03.share", 100 * 8 * (4096 + 4096) / 4096**2)
lab.show(figure)

# %% [markdown]
# The larger the layer, the thinner the factors: the share falls like 1/d. Now on a real model. `"all-linear"` puts an adapter
# on every linear layer; q, k and v are one packed matrix here, as in GPT-2.

# %% [markdown] lang="zh" of="0a0cd3bd"
# 层越大，因子就越细：所占的比例按 1/d 下降。现在换到真实的模型上。`"all-linear"` 给每个线性层都加上一个适配器；
# 这里 q、k、v 打包成一个矩阵，与 GPT-2 相同。

# %% exact=true
model = lab.base()
base_size = ml.count_parameters(model)["total"]
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))
total = 0
for path, adapter in adapters_of(model).items():
    (r, d_in), (d_out, _) = adapter.lora_A.shape, adapter.lora_B.shape
    total += adapter.lora_A.size + adapter.lora_B.size
    print(f"{path:24s} W ({d_out:3d}, {d_in:3d})   A ({r}, {d_in:3d})   B ({d_out:3d}, {r})   {r * (d_out + d_in):5,} numbers")
print(f"the model {base_size:,}, the adapter {total:,}")
assert total == ml.count_parameters(model)["trainable"] == 16_384 and base_size == 120_576

# %% [markdown]
# **Everything that trains is in this table.** Embeddings, norms, biases and all eight weights W are frozen.
#
# ### Exercise 03.1 · ●●○ · 8 min
#
# Write the layer's forward pass **without ever forming a matrix as large as W**. (A 4096 × 4096 matrix for one token would
# cost more than the token.)
#
# <details><summary>Hint 1</summary>Rows are examples: the plain layer is <code>x @ W.T</code>.</details>
# <details><summary>Hint 2</summary>The branch is s·x Aᵀ Bᵀ. Which of the two products is small?</details>
# <details><summary>Hint 3</summary>Put the brackets so that the first product has shape (n, r).</details>

# %% [markdown] lang="zh" of="6e85da1a"
# **参与训练的数全在这张表里。** 嵌入层、归一化层、偏置和全部八个权重 W 都是冻结的。
#
# ### 练习 03.1 · ●●○ · 8 分钟
#
# 写出这一层的前向传播，**始终不要形成与 W 一样大的矩阵**。（为一个词元形成一个 4096 × 4096 的矩阵，
# 代价会超过处理这个词元本身。）
#
# <details><summary>提示 1</summary>每一行是一个样本：普通的层就是 <code>x @ W.T</code>。</details>
# <details><summary>提示 2</summary>分支是 s·x Aᵀ Bᵀ。两个乘积中，哪一个是小的？</details>
# <details><summary>提示 3</summary>这样加括号：让第一个乘积的形状是 (n, r)。</details>

# %% exercise="lora_forward"
def lora_forward(x, W, A, B, s):
    """x (n, k), W (d, k), A (r, k), B (d, r), s a number -> y (n, d)."""
    # BEGIN SOLUTION
    return x @ W.T + s * (x @ A.T) @ B.T
    # END SOLUTION


# %% check="lora_forward"
check.lora_forward(lora_forward)

# %% [markdown]
# ### Exercise 03.2 · ●○○ · 5 min
#
# How many numbers does LoRA train on a list of weights? Test yourself with the table above: 16,384.
#
# <details><summary>Hint 1</summary>Write down the shapes of A and of B for one weight (d, k).</details>
# <details><summary>Hint 2</summary>A is (r, k), B is (d, r). Add the two, then add up all weights.</details>

# %% [markdown] lang="zh" of="cc90cd64"
# ### 练习 03.2 · ●○○ · 5 分钟
#
# 给定一组权重，LoRA 训练多少个数？用上面的表自测：16,384。
#
# <details><summary>提示 1</summary>对一个权重 (d, k)，写下 A 和 B 的形状。</details>
# <details><summary>提示 2</summary>A 是 (r, k)，B 是 (d, r)。两者相加，再对所有权重求和。</details>

# %% exercise="lora_count"
def lora_count(shapes, r):
    """shapes: a list of (d, k), one a weight; r the rank -> a whole number."""
    # BEGIN SOLUTION
    return sum(r * (d + k) for d, k in shapes)
    # END SOLUTION


# %% check="lora_count"
check.lora_count(lora_count)

# %% [markdown]
# ### Exercise 03.3 · ●○○ · 7 min
#
# Thin is not always small. What is the **smallest rank at which LoRA has more numbers than W itself**?
#
# <details><summary>Hint 1</summary>LoRA is larger when r(d + k) > d·k.</details>
# <details><summary>Hint 2</summary>Solve for r. The answer is the next whole number above; what if the division is
# exact?</details>

# %% [markdown] lang="zh" of="afd48aba"
# ### 练习 03.3 · ●○○ · 7 分钟
#
# 细不一定就小。**使 LoRA 的数比 W 本身还多的最小的秩**是多少？
#
# <details><summary>提示 1</summary>当 r(d + k) > d·k 时，LoRA 更大。</details>
# <details><summary>提示 2</summary>解出 r。答案是比它大的下一个整数；如果恰好除尽呢？</details>

# %% exercise="first_wasteful_rank"
def first_wasteful_rank(d, k):
    """The shape (d, k) of W -> the smallest rank r with r(d + k) > d·k."""
    # BEGIN SOLUTION
    return d * k // (d + k) + 1
    # END SOLUTION


# %% check="first_wasteful_rank"
check.first_wasteful_rank(first_wasteful_rank)

# %% [markdown]
# It happens in print. A widely read tutorial puts LoRA of rank 16 on everything, the new classifier with two labels included.
# That layer is 768 → 2, a matrix of rank 2 at most. minilora refuses.

# %% [markdown] lang="zh" of="838ce8df"
# 这样的事白纸黑字确实有过。一篇读者众多的教程把秩为 16 的 LoRA 加到所有层上，连新加的、只有两个标签的分类器也不例外。
# 那一层是 768 → 2，这个矩阵的秩最多是 2。minilora 会拒绝。

# %% exact=true
head, lora = 2 * 768 + 2, 16 * (2 + 768)                           # W and its bias; A and B
print(f"the classifier itself has {head:,} numbers, LoRA of rank 16 on it {lora:,}: {lora / head:.0f} times as many")
classifier = ml.Transformer(ml.TransformerConfig.gpt2(vocab_size=16, d_model=768, n_layers=1, n_heads=4, max_len=4, n_labels=2))
try:
    ml.add_adapter(classifier, ml.LoraConfig(r=16, target_modules=["classifier"]))
except ValueError as error:
    print(error)
assert lora == 12_320 and head == 1_538

# %% [markdown]
# A new classifier knows nothing yet: train it whole. (That is what minilora does with a classifier, and PEFT too.)
#
# ## 2. The first updates: who moves?
#
# First the rule for a linear layer, y = x Wᵀ. One output is y[n, i] = Σⱼ x[n, j] W[i, j]. So W[i, j] meets the input x[n, j] of
# every example n, and the examples add up: ∂L/∂W[i, j] = Σₙ ȳ[n, i] x[n, j]. As matrices, with x̄ by the same argument:
#
# $$\bar W = \bar y^\top x, \qquad \bar x = \bar y\, W .$$
#
# Now LoRA. Let G = ȳᵀx be the gradient of W', which full fine-tuning would use. W' contains s·B A, and the chain rule gives
#
# $$\frac{\partial L}{\partial B} = s\, G A^\top, \qquad \frac{\partial L}{\partial A} = s\, B^\top G .$$
#
# At the start B = 0. **Guess:** what is ‖∂L/∂A‖ in the first update?

# %% [markdown] lang="zh" of="d79a8711"
# 新的分类器还什么都不会：应当整个训练它。（minilora 对分类器就是这样做的，PEFT 也一样。）
#
# ## 2. 最初几步更新：谁在动？
#
# 先看线性层 y = x Wᵀ 的规则。一个输出是 y[n, i] = Σⱼ x[n, j] W[i, j]。所以 W[i, j] 会遇到每个样本 n 的输入 x[n, j]，
# 各样本的贡献相加：∂L/∂W[i, j] = Σₙ ȳ[n, i] x[n, j]。写成矩阵，x̄ 同理可得：
#
# $$\bar W = \bar y^\top x, \qquad \bar x = \bar y\, W .$$
#
# 再看 LoRA。设 G = ȳᵀx 是 W' 的梯度，全量微调用的就是它。W' 中含有 s·B A，由链式法则得
#
# $$\frac{\partial L}{\partial B} = s\, G A^\top, \qquad \frac{\partial L}{\partial A} = s\, B^\top G .$$
#
# 开始时 B = 0。**猜测**：第一步更新中，‖∂L/∂A‖ 是多少？

# %%
check.guess("03.grad_A", None)

# %% [markdown]
# We compare the answers of the model before the first update with the base's, bit by bit. Then 30 updates, with
# the gradients and the distances from the start written down after each.

# %% [markdown] lang="zh" of="d79e1ef4"
# 第一步更新之前，我们先把模型的输出与基座模型的输出逐位比较。然后做 30 步更新，每步之后记下梯度的大小和离起点的距离。

# %%
python = load_corpus("python")
ids, targets = lab.batches(python)(0)
with ml.no_grad():
    same = np.array_equal(ml.to_host(model(ids)), ml.to_host(lab.base()(ids)))
print("the model with its new adapter answers as the base does, bit for bit:", same)
assert same

adapters = adapters_of(model).values()
factors = {"A": [a.lora_A for a in adapters], "B": [a.lora_B for a in adapters]}
start = {name: [p.data.copy() for p in group] for name, group in factors.items()}
norms = {f"{what}_{name}": [] for what in ("grad", "moved") for name in factors}


def write_down(step, model, history):
    for name, group in factors.items():
        norms[f"grad_{name}"].append(float(np.sqrt(sum((p.grad**2).sum() for p in group))))
        norms[f"moved_{name}"].append(float(np.sqrt(sum(((p.data - a) ** 2).sum() for p, a in zip(group, start[name])))))


thirty = ml.TrainConfig(steps=30, lr=3e-3, schedule="constant", progress=False)
ml.train(model, lab.batches(python), thirty, callback=write_down)
check.compare("03.grad_A", norms["grad_A"][0])
assert norms["grad_A"][0] == 0.0 and norms["moved_A"][0] == 0.0                    # exactly, not nearly
assert norms["grad_B"][0] > 0.0 and norms["moved_B"][0] > 0.0 and norms["grad_A"][1] > 0.0
lab.show(figures.first_steps(norms))

# %% [markdown]
# **The first update moves B alone.** From the second on B is not zero, so A gets a gradient and moves too.
#
# Why this start and not another? We try four starts on one layer, in float64. Its task: learn a hidden update of rank 4.
# A good start must do two things: change nothing (‖ΔW‖ = 0), and be able to learn (some gradient is not zero).

# %% [markdown] lang="zh" of="ec7b72a4"
# **第一步更新只动 B。** 从第二步起 B 不再为零，于是 A 有了梯度，也动起来。
#
# 为什么这样初始化，而不用别的方式？我们在一层上试四种初始化，用 float64。它的任务是学会一个秩为 4 的隐藏更新量。
# 好的初始化必须做到两点：什么也不改变（‖ΔW‖ = 0），并且能够学习（有梯度不为零）。

# %%
rng = np.random.default_rng(0)
n, d, k, r, s = 256, 64, 48, 4, 2.0
x, W = rng.standard_normal((n, k)), rng.standard_normal((d, k)) / k**0.5
y = x @ (W + planted_update(d, k, [1.0] * 4, rng)).T                   # the hidden update: four singular values of 1
small = {"A": rng.uniform(-1, 1, (r, k)) / k**0.5, "B": rng.uniform(-1, 1, (d, r)) / r**0.5}
starts = {"A random, B zero (LoRA)": (1, 0), "A zero, B random": (0, 1), "both random": (1, 1), "both zero": (0, 0)}
found = {}
print("start                        ‖ΔW‖/‖W‖    ‖grad A‖    ‖grad B‖")
for name, (a, b) in starts.items():
    A, B = ml.tensor(a * small["A"], requires_grad=True), ml.tensor(b * small["B"], requires_grad=True)
    error = ml.lora_linear(x, W, None, A, B, s) - y
    ((error * error).sum() * (1 / n)).backward()
    found[name] = [float(np.linalg.norm(m)) for m in (s * B.data @ A.data / np.linalg.norm(W), A.grad, B.grad)]
    print(f"{name:26s} {found[name][0]:11.3f} {found[name][1]:11.3f} {found[name][2]:11.3f}")
assert found["both zero"] == [0.0, 0.0, 0.0] and found["both random"][0] > 0.1
assert found["A random, B zero (LoRA)"][:2] == [0.0, 0.0] and found["A random, B zero (LoRA)"][2] > 0
assert found["A zero, B random"][::2] == [0.0, 0.0] and found["A zero, B random"][1] > 0

# %% [markdown]
# **Exactly one factor is zero.** Both random: the model is damaged before it starts. Both zero: both gradients are zero, for
# ever. Either factor may be the zero one; LoRA takes B.
#
# ### Exercise 03.4 · ●●○ · 12 min
#
# Write the two gradients of the branch y = s·x Aᵀ Bᵀ. You get ȳ = ∂L/∂y (called `dy`), as in lesson 01.
# Return `(dA, dB)`. Finite differences judge.
#
# <details><summary>Hint 1</summary>Call u = x Aᵀ, of shape (n, r). Then the branch is y = s u Bᵀ: a linear layer on a linear
# layer.</details>
# <details><summary>Hint 2</summary>The rule of section 2: for y = u Bᵀ the gradients are dB = dyᵀ u and du = dy B. Where does s
# go?</details>
# <details><summary>Hint 3</summary>u = x Aᵀ is the same rule once more: dA = duᵀ x. Check the shapes: (r, k) and
# (d, r).</details>

# %% [markdown] lang="zh" of="f3db719f"
# **恰好一个因子为零。** 两个都随机：模型还没开始训练就被破坏了。两个都为零：两个梯度都是零，永远如此。哪个因子为零都可以；
# LoRA 选了 B。
#
# ### 练习 03.4 · ●●○ · 12 分钟
#
# 写出分支 y = s·x Aᵀ Bᵀ 的两个梯度。给定的是 ȳ = ∂L/∂y（记作 `dy`），与第 01 课一样。返回 `(dA, dB)`。由有限差分来评判。
#
# <details><summary>提示 1</summary>令 u = x Aᵀ，形状为 (n, r)。那么分支就是 y = s u Bᵀ：一个线性层上面又一个线性层。</details>
# <details><summary>提示 2</summary>第 2 节的规则：对于 y = u Bᵀ，梯度是 dB = dyᵀ u 和 du = dy B。s 放在哪里？</details>
# <details><summary>提示 3</summary>对 u = x Aᵀ 再用一次同样的规则：dA = duᵀ x。检查形状：(r, k) 和 (d, r)。</details>

# %% exercise="lora_grad"
def lora_grad(x, dy, A, B, s):
    """x (n, k), dy (n, d), A (r, k), B (d, r), s a number -> dA (r, k), dB (d, r)."""
    # BEGIN SOLUTION
    du = s * dy @ B                        # (n, r)
    return du.T @ x, s * dy.T @ (x @ A.T)
    # END SOLUTION


# %% check="lora_grad"
check.lora_grad(lora_grad)

# %% [markdown]
# ## 3. The scale: is α a learning rate?
#
# s = α/r multiplies the product B A. Twice the α, twice the step? We double α and make one update, with two optimisers.
# SGD subtracts lr times the gradient. Adam first divides each number of the gradient by its own usual size.
# **Guess** two numbers: how many times larger is ΔW = s B A afterwards, under SGD and under Adam?

# %% [markdown] lang="zh" of="e72a191c"
# ## 3. 缩放系数：α 是学习率吗？
#
# s = α/r 乘在乘积 B A 上。α 加倍，步长就加倍吗？我们把 α 加倍，用两种优化器各做一步更新。SGD 减去 lr 乘以梯度。
# Adam 先把梯度的每个数除以它自己通常的大小。**猜测**两个数：更新之后，ΔW = s B A 会大到原来的几倍？SGD 下是多少，Adam
# 下是多少？

# %%
check.guess("03.sgd", None)
check.guess("03.adam", None)

# %%
optimizers = {"sgd": lambda params: ml.training.SGD(params, lr=0.01),
              "adam": lambda params: ml.training.AdamW(params, lr=0.01, weight_decay=0.0)}     # without decay it is Adam
growth = {}
for name, optimizer in optimizers.items():
    sizes = []
    for s in (2.0, 4.0):                                           # α/r, and twice that
        A, B = ml.tensor(small["A"].copy(), requires_grad=True), ml.tensor(0 * small["B"], requires_grad=True)
        error = ml.lora_linear(x, W, None, A, B, s) - y
        ((error * error).sum() * (1 / n)).backward()
        optimizer([A, B]).step()
        sizes.append(np.linalg.norm(s * B.data @ A.data))
    growth[name] = float(sizes[1] / sizes[0])
check.compare("03.sgd", growth["sgd"])
check.compare("03.adam", growth["adam"])
assert abs(growth["sgd"] - 4) < 1e-9 and abs(growth["adam"] - 2) < 1e-4

# %% [markdown]
# **It depends on the optimiser, so α is not a learning rate.** And s still multiplies B A when the trained model is used. A
# learning rate is gone after training. In practice: choose α once, keep it, and search the learning rate.
#
# ### Exercise 03.5 · ●●○ · 8 min
#
# α becomes c times as large. By which factor does ΔW grow after the first update? One line for each optimiser. (c may be 0.5.)
#
# <details><summary>Hint 1</summary>After the first update only B has moved: ΔW = s·B₁·A₀.</details>
# <details><summary>Hint 2</summary>B₁ = −lr·dB, and dB carries one more factor s.</details>
# <details><summary>Hint 3</summary>Adam's first update is ± lr for each number, whatever the gradient's size.</details>

# %% [markdown] lang="zh" of="f740f73a"
# **这取决于优化器，所以 α 不是学习率。** 而且使用训练好的模型时，s 仍然乘在 B A 上；学习率在训练结束后就不存在了。
# 实践中：α 选定一次，不再改动，只搜索学习率。
#
# ### 练习 03.5 · ●●○ · 8 分钟
#
# α 变为 c 倍。第一步更新之后，ΔW 变为几倍？每种优化器写一行。（c 可以是 0.5。）
#
# <details><summary>提示 1</summary>第一步更新之后，只有 B 动过：ΔW = s·B₁·A₀。</details>
# <details><summary>提示 2</summary>B₁ = −lr·dB，而 dB 里还有一个因子 s。</details>
# <details><summary>提示 3</summary>Adam 的第一步更新，对每个数都是 ± lr，与梯度的大小无关。</details>

# %% exercise="update_growth"
def update_growth(c, optimizer):
    """c: what α is multiplied by; optimizer: "sgd" or "adam" -> the factor by which the first ΔW grows."""
    # BEGIN SOLUTION
    return c**2 if optimizer == "sgd" else c
    # END SOLUTION


# %% check="update_growth"
check.update_growth(update_growth)

# %% [markdown]
# ## 4. Fine-tune: what changed, and what must be saved?
#
# The base has read English prose. Now it learns Python source. Four runs read the same batches: LoRA with r = 1 and r = 8, full
# fine-tuning at the rate 0.003, and full fine-tuning at a third of that.
#
# **Guess:** full fine-tuning (0.003) lowers the loss on Python by some amount. How much of that does LoRA with r = 8 reach, in
# percent?

# %% [markdown] lang="zh" of="d0f722cd"
# ## 4. 微调：改变了什么，必须保存什么？
#
# 基座模型读过英文文本（prose）。现在让它学 Python 源代码。四次训练读取同样的小批量：r = 1 和 r = 8 的 LoRA，学习率为 0.003
# 的全量微调，以及学习率为其三分之一的全量微调。
#
# **猜测**：全量微调（0.003）使 Python 上的损失下降一定的量。r = 8 的 LoRA 能达到其中的百分之几？

# %%
check.guess("03.reach", None)


def digest(model):
    """A fingerprint of all bytes of the base weights, adapters left out."""
    arrays = [ml.to_host(p) for path, p in model.named_parameters() if "lora_" not in path]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def losses(model):
    """On held-out Python, and on held-out prose."""
    return {"loss": ml.training.mean_loss(model, lab.valid()), "source_loss": ml.training.mean_loss(model, lab.valid("prose"))}


# %%
base = losses(lab.base())
models, runs, trained = {}, {}, {}
for name, r, lr in (("LoRA r = 1", 1, 1e-2), ("LoRA r = 8", 8, 1e-2), ("full", 0, 3e-3), ("full, rate/3", 0, 1e-3)):
    model = models[name] = lab.base()
    if r:
        ml.add_adapter(model, ml.LoraConfig(r=r, lora_alpha=32, target_modules="all-linear"))
    else:
        model.unfreeze()
    history = ml.train(model, lab.batches(python), lab.SETTING.schedule(lr))
    runs[name], trained[name] = losses(model) | {"curve": history.loss}, ml.count_parameters(model)["trainable"]

learned = {name: base["loss"] - run["loss"] for name, run in runs.items()}
forgotten = {name: run["source_loss"] - base["source_loss"] for name, run in runs.items()}
price = {name: forgotten[name] / learned[name] for name in runs}

print(f"{'':12s} trained numbers   Python    prose   base weights       forgotten / learned")
print(f"{'base':12s} {0:15,d} {base['loss']:8.3f} {base['source_loss']:8.3f}   {digest(lab.base())}")
for name, run in runs.items():
    print(f"{name:12s} {trained[name]:15,d} {run['loss']:8.3f} {run['source_loss']:8.3f}   {digest(models[name])} "
          f"{price[name]:12.2f}")
check.compare("03.reach", 100 * learned["LoRA r = 8"] / learned["full"])
assert digest(models["LoRA r = 1"]) == digest(models["LoRA r = 8"]) == digest(lab.base()) != digest(models["full"])
if lab.FULL:
    assert runs["full"]["loss"] < runs["LoRA r = 8"]["loss"] < runs["LoRA r = 1"]["loss"] < base["loss"] - 0.1
    assert min(forgotten.values()) > 0.05 and learned["LoRA r = 8"] > learned["full"] / 2              # all of them forget
    assert max(forgotten, key=forgotten.get) == "full" and learned["full, rate/3"] > learned["LoRA r = 8"]
    assert abs(forgotten["full, rate/3"] - forgotten["LoRA r = 8"]) < 0.05 < forgotten["full"] - forgotten["LoRA r = 1"]
    assert min(forgotten, key=forgotten.get) == max(price, key=price.get) == "LoRA r = 1"
lab.show(figures.learned_and_forgotten({"base": base, "runs": runs}))

# %% [markdown]
# **Not one byte of W changed under LoRA, and the model has learned.** (The column *base weights* is a fingerprint of all
# their bytes.) With a seventh of the numbers LoRA with r = 8 learned most of what full fine-tuning did. With r = 1, one
# fifty-ninth of the numbers, it learned a good part.
#
# So what must be saved? Only what the base does not have. A widely copied listing ends on
# `torch.save(model.state_dict(), 'lora_model.pth')`: that writes the whole model.

# %% [markdown] lang="zh" of="5f49ad31"
# **在 LoRA 下，W 没有一个字节改变，模型却学会了。** （*base weights* 一列是这些权重全部字节的指纹。）r = 8 的 LoRA
# 用七分之一的参数，学到了全量微调所学的大部分。r = 1 只用五十九分之一的参数，也学到了不小的一部分。
#
# 那么必须保存什么？只保存基座模型没有的东西。有一段流传很广的代码以 `torch.save(model.state_dict(), 'lora_model.pth')` 结尾：
# 那会写出整个模型。

# %%
model = models["LoRA r = 8"]
with tempfile.TemporaryDirectory() as folder:
    ml.save_adapter(model, folder)
    files = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
    copy = lab.base()
    ml.load_adapter(copy, folder)
print("files:", {name: f"{size:,} bytes" for name, size in files.items()})
print(f"the base's weights: {4 * base_size:,} bytes")

with ml.no_grad():
    few = ids[:1, :16]
    answers = ml.to_host(model(few))
    assert np.array_equal(ml.to_host(copy(few)), answers)                   # the file holds all that was learned
    ml.merge_adapter(model)                                                 # W ← W + s·B·A: one product a layer again
    merged = ml.to_host(model(few))
    ml.unmerge_adapter(model)
print(f"merged, the answers differ by {np.abs(merged - answers).max():.0e} (rounding)")
print("unmerged, the base weights are as before, bit for bit:", digest(model) == digest(lab.base()))
assert np.abs(merged - answers).max() < 1e-3 and digest(model) == digest(lab.base())
assert 4 * 16_384 < files["adapter_model.safetensors"] < 4 * 16_384 + 4_000

# %% [markdown]
# **The adapter is the difference, and only the difference.** The model does not get smaller: base plus adapter is larger than
# the base, and merged it is exactly as large.
#
# ## 5. "W is frozen, so nothing is forgotten"?
#
# The figure above says otherwise: on prose all runs got worse. A frozen *weight* is not a frozen *function*:
# W' = W + s B A is another function.
#
# "LoRA Learns Less and Forgets Less" is the title of a paper on large models (arXiv:2405.09673). In the figure this is so
# against full fine-tuning at the rate 0.003. At a third of that rate full fine-tuning forgets about as much as LoRA with r = 8,
# and has learned more. The last column of the table is the price: nats forgotten for one nat learned. It is highest for r = 1,
# which forgot least because it learned least. So compare forgetting at equal learning, and say at which rates.
#
# Is "forgets less" a law? Here is a task where LoRA forgets **more**. One linear layer knows an old task. Its old inputs use
# the first half of the features, the new ones the second half: they have nothing in common. It learns the new task, fully or
# with LoRA of rank 8. **Guess:** by how many per cent do its answers to the *old* inputs change?

# %% [markdown] lang="zh" of="4d89592f"
# **适配器就是差异，而且只是差异。** 模型不会变小：基座模型加适配器比基座模型大，合并之后则恰好一样大。
#
# ## 5. “W 被冻结，所以什么都不会忘记”？
#
# 上面的图说的相反：在英文文本上，每次训练都变差了。冻结的**权重**不是冻结的**函数**：W' = W + s B A 是另一个函数。
#
# “LoRA Learns Less and Forgets Less” 是一篇关于大模型的论文的标题（arXiv:2405.09673）。在图中，与学习率为 0.003
# 的全量微调相比，确实如此。学习率为其三分之一时，全量微调忘掉的与 r = 8 的 LoRA 差不多，学到的却更多。
# 表的最后一列是代价：每学到一奈特，忘掉多少奈特。r = 1 的代价最高；它忘得最少，是因为它学得最少。
# 所以要在学得同样多时比较遗忘，并说明用的是什么学习率。
#
# “忘得更少”是一条定律吗？下面这个任务中，LoRA 忘得**更多**。一个线性层会一个旧任务。它的旧输入使用前一半特征，
# 新输入使用后一半：两者毫无共同之处。它学习新任务，用全量微调，或者用秩为 8 的 LoRA。**猜测**：
# 它对**旧**输入的回答会改变百分之几？

# %%
check.guess("03.old_full", None)
check.guess("03.old_lora", None)

# %%
changed = two_tasks(seed=0)
check.compare("03.old_full", 100 * changed["full"], "%")
check.compare("03.old_lora", 100 * changed["lora"], "%")
print(f"LoRA whose A starts at zero for the old features: {changed['blind']:.0%}")
print(f"part of the new task not yet learned: full {changed['full_left']:.4f}, LoRA {changed['lora_left']:.4f}")
assert changed["full"] == 0.0 == changed["blind"] and changed["lora"] > 0.05
assert max(changed["full_left"], changed["lora_left"], changed["blind_left"]) < 0.01

# %% [markdown]
# **Full fine-tuning changed the old answers by exactly zero, LoRA did not.** W's gradient is zero in the columns that the new
# inputs never use. LoRA's ΔW = s B A reaches them through A's random start, as soon as B moves. The last line but one is the
# proof: start A at zero in these columns, and the old answers stay. So "forgets less" is what was measured where tasks share
# their inputs. It is not a property of frozen weights.
#
# ## What you should be able to say now
#
# - LoRA trains A and B, r(d + k) numbers a weight, and nothing else; W keeps every byte, until you choose to merge.
# - B = 0 makes the start exact, and so the first update moves B alone; α/r scales the update and is not a learning rate.
# - A frozen weight is not a frozen function: measure what is forgotten, at equal learning.

# %% [markdown] lang="zh" of="145fb83c"
# **全量微调使旧回答的改变恰好为零，LoRA 则不然。** 在新输入从不使用的那些列上，W 的梯度为零。
# 而只要 B 一动，LoRA 的 ΔW = s B A 就会通过 A 的随机初始值影响到这些列。倒数第二行是证明：让 A 在这些列上从零开始，
# 旧的回答就保持不变。所以“忘得更少”是在各任务共用输入时测得的结果。它不是冻结权重的性质。
#
# ## 现在你应当能说出
#
# - LoRA 训练 A 和 B，每个权重 r(d + k) 个数，此外什么也不训练；W 的每个字节都不变，直到你决定合并。
# - B = 0 使起点与基座模型严格相同，所以第一步更新只动 B；α/r 缩放更新量，它不是学习率。
# - 冻结的权重不是冻结的函数：忘掉了多少，要在学得同样多时测量。

# %% [markdown] slide=true
# ## The slide
#
# **LoRA on one slide**
# - W' = W + (α/r)·B A,   W (d, k) frozen,   A (r, k) random,   B (d, r) zero
# - trained: r(d + k) of d·k numbers; it pays while r < dk/(d + k)
# - ∂B = s G Aᵀ,   ∂A = s Bᵀ G   → the first update moves B alone
# - α twice as large: first update ×4 (SGD), ×2 (Adam): no learning rate
# - save A and B only; merge when done: one product again, no cost
# - frozen numbers ≠ frozen function: LoRA forgets too

# %% [markdown] lang="zh" of="1a24f11d"
# ## 幻灯片
#
# **一页幻灯片讲 LoRA**
# - W' = W + (α/r)·B A，   W (d, k) 冻结，   A (r, k) 随机，   B (d, r) 为零
# - 训练的数：d·k 个中的 r(d + k) 个；r < dk/(d + k) 时才划算
# - ∂B = s G Aᵀ，   ∂A = s Bᵀ G   → 第一步更新只动 B
# - α 加倍：第一步更新 ×4（SGD），×2（Adam）：不是学习率
# - 只保存 A 和 B；训练完就合并：又只有一个乘积，没有额外开销
# - 冻结的数 ≠ 冻结的函数：LoRA 也会遗忘
