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

# %%
print(inspect.getsource(LoRA.adapted_weight))

# %% [markdown]
# How thin is thin? Here are the three matrices, to scale: a layer of our small model, and a layer of a model with seven
# billion parameters. **Guess** first: which share of a 4096 × 4096 layer does LoRA train with r = 8, in percent?

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

# %%
check.guess("03.grad_A", None)

# %% [markdown]
# We compare the answers of the model before the first update with the base's, bit by bit. Then 30 updates, with
# the gradients and the distances from the start written down after each.

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

# %% [markdown] slide=true
# > **LoRA on one slide**
# >
# > W' = W + (α/r)·B A,   W (d, k) frozen,   A (r, k) random,   B (d, r) zero
# > trained: r(d + k) of d·k numbers; it pays while r < dk/(d + k)
# > ∂B = s G Aᵀ,   ∂A = s Bᵀ G   → the first update moves B alone
# > α twice as large: first update ×4 (SGD), ×2 (Adam): no learning rate
# > save A and B only; merge when done: one product again, no cost
# > frozen numbers ≠ frozen function: LoRA forgets too
