# %% [markdown]
# # 02 · A Transformer from the ops
#
# **The question of this lesson: what does the model know, and since when?**
#
# You have a box of operations whose gradients are right. Now they become a language model: 120,576 numbers that read
# bytes and predict the next one. You train it, here, in about a minute.
#
# **You'll do**
# - write attention and its causal mask,
# - predict the loss before the first update, with pencil and paper,
# - watch the loss pass what *counting* can do.
#
# **You'll learn**
# - which operations a Transformer is made of, and in which order,
# - what "causal" means, exactly,
# - how to read a loss in nats: which number means "knows nothing", which one "knows pairs of letters".
#
# **You need** lesson 01 (or: softmax, matrix products), and 30 to 90 minutes with the exercises.

# %% [markdown] teacher=true
# **Teacher.** 45 minutes without the exercises: 15 for section 1, 10 for section 2, 15 for section 3 (the training runs
# while you explain the three lines), 5 for section 4. Start the cell of section 3 early if the machine is slow. Board:
# the stream of width D as a straight line, attention and MLP as two loops that read from it and add to it; beside it
# the triangle of the causal mask. Poll, before section 2: *a new model has random weights; its loss on English text is
# about (a) 0.5, (b) 5.5, (c) 50, (d) nobody can know.* Many say (d). Second poll, in section 2: *all embeddings times
# 10: does the first loss rise, fall, or stay?* Expect in 02.1 the missing scale, in 02.2 the mask after the softmax
# (ask what a row then adds up to), in 02.3 the head counted twice, in 02.4 "ln V" for every c. The end of section 4 is
# the bridge to LoRA: this base is what lessons 03 to 07 adapt.

# %%
import inspect

import numpy as np

import minilora as ml
from minilora import autograd, check, nn
from minilora.course import lab
from minilora.data import decode, encode, eval_batches, load_corpus, reference_entropies
from minilora.plots import lesson_02 as figures

# %% [markdown]
# ## 1. From operations to a model
#
# Text comes as bytes: 256 kinds, no tokenizer. `ids` (B, T) are B windows of T bytes. The model gives `logits` (B, T, 256):
# at each position one score for every possible next byte.
#
# A layer has two parts, attention and an MLP. Each reads from the stream x (B, T, D) and **adds** to it. This is the
# library's own code.

# %%
print(inspect.getsource(nn.blocks.PreNormLayer.forward))
print(inspect.getsource(nn.blocks.MLP.forward))
print(inspect.getsource(nn.blocks.Attention.forward))

# %% [markdown]
# Read `Attention.forward` from top to bottom: one product gives q, k and v; each is cut into H heads of width hd = D/H; every
# query is compared with every key; the output is a mean of values; one more product mixes the heads. (Skip the lines with
# `rotate`, `cache` and `dropout`: they do nothing here. In the MLP, `feed_forward` is a faster way to compute the last line.)
#
# The shapes of one pass, with D = 64 and H = 4:

# %% exact=true
model = ml.Transformer(lab.SETTING.config, seed=0)
prose = load_corpus("prose")
ids = prose.valid[:64].astype(np.int64)[None]                      # (1, 64)
attn = model.layers[0].attn

x = model.embed(ids) + model.pos_embed(np.arange(64)[None])
qkv = attn.qkv_proj(x)
heads = attn.heads(autograd.split(qkv, attn.widths)[0])
logits = model(ids)
for name, tensor in {"stream x": x, "q, k, v": qkv, "q in heads": heads, "logits": logits}.items():
    print(f"{name:11s} {tensor.shape}")
assert logits.shape == (1, 64, 256)

# %% [markdown]
# ### Exercise 02.1 · ●●○ · 15 min
#
# Write attention for one head in NumPy, without a mask, for T queries and S keys:
#
# $$O = \mathrm{softmax}\Big(\frac{Q K^\top}{\sqrt{hd}}\Big)\, V.$$
#
# Softmax is over the keys. There may be leading axes (heads, batch): `np.swapaxes` helps.
#
# <details><summary>Hint 1</summary>One score for each pair of a query and a key: shape (T, S).</details>
# <details><summary>Hint 2</summary>
# Divide the scores so that their size does not grow with hd; then softmax over the keys.</details>
# <details><summary>Hint 3</summary>
# The output of a query is the mean of the values, weighted with its row of the softmax.</details>

# %% exercise="attention"
def attention(q, k, v):
    """Attention of one head: q (..., T, hd), k and v (..., S, hd) -> (..., T, hd)."""
    # BEGIN SOLUTION
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights @ v
    # END SOLUTION

# %% check="attention"
check.attention(attention)

# %% [markdown]
# ### No looking ahead
#
# The model is trained to predict byte t+1 from the bytes up to t, at all 64 positions at once. This is fair only if no
# position can see what comes later. It is called *causal*.
#
# We change **one** of the 64 bytes, at position 40 (we count from 0). At how many positions do the logits change?

# %%
check.guess("02.changed", None)

# %% exact=true
def positions_changed(model, at):
    """At how many positions the logits change when the byte at position `at` is another one."""
    other = ids.copy()
    other[0, at] = (other[0, at] + 1) % 256
    with ml.no_grad():
        before, after = model(ids).data, model(other).data
    return (before != after).any(axis=-1)[0]                       # (64,) truth values; != : not a single bit


changed = positions_changed(model, 40)
check.compare("02.changed", int(changed.sum()))
assert not changed[:40].any() and changed[40:].all()

both_ways = ml.Transformer(ml.TransformerConfig(vocab_size=256, d_model=64, n_layers=2, n_heads=4, max_len=64, causal=False))
print(f"without the mask: {positions_changed(both_ways, 40).sum()} of 64")
assert positions_changed(both_ways, 40).all()

# %% [markdown]
# Before position 40 not one bit changes. That is a test that you can run on any model: *change the future, look at the past.*
#
# ### Exercise 02.2 · ●●○ · 15 min
#
# Write the masked softmax. `scores` (..., T, T) has a row for each query and a column for each key. Query i may use
# keys 0 to i. The weights of hidden keys are exactly 0, and each row adds up to 1, whatever the scores are: some are as
# large as 20,000.
#
# <details><summary>Hint 1</summary>A lower triangle with its diagonal; <code>np.tri</code> makes one.</details>
# <details><summary>Hint 2</summary>Which score gives a weight of exactly 0, whatever the others are?</details>
# <details><summary>Hint 3</summary><code>np.where(visible, scores, …)</code>, then softmax over the last axis.</details>

# %% exercise="causal_softmax"
def causal_softmax(scores):
    """Attention weights of a causal model: scores (..., T, T) -> (..., T, T)."""
    # BEGIN SOLUTION
    visible = np.tri(scores.shape[-1], dtype=bool)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
    # END SOLUTION

# %% check="causal_softmax"
check.causal_softmax(causal_softmax)

# %% [markdown]
# ### Exercise 02.3 · ●○○ · 10 min
#
# How many numbers is the model made of? Give the formula in V (vocabulary), D (width), L (layers) and T (longest text).
# The MLP is 4 D wide. All linear layers have biases, except the head: it has none, and its matrix *is* the table of bytes.
# GPT-2 small (V = 50,257, D = 768, L = 12, T = 1024) has 124,439,808.
#
# <details><summary>Hint 1</summary>Matrices of a layer: q, k, v and o are D × D; up is 4D × D, and down goes back.</details>
# <details><summary>Hint 2</summary>
# Each matrix of a layer has a bias. A norm has a weight and a bias, each D. A layer has two norms.</details>
# <details><summary>Hint 3</summary>Outside the layers: the table of bytes, the table of positions, one last norm.</details>

# %% exercise="parameter_count"
def parameter_count(V, D, L, T):
    """The number of parameters of a GPT-2-shaped model with a tied head: four integers -> an integer."""
    # BEGIN SOLUTION
    layer = 12 * D * D + 13 * D                                    # 4 + 8 matrices; biases 4 + 4 + 1, two norms of 2
    return V * D + T * D + L * layer + 2 * D
    # END SOLUTION

# %% check="parameter_count"
check.parameter_count(parameter_count)

# %% [markdown]
# ## 2. Before the first update
#
# The weights are random and small. The text is English prose. What is the loss, in nats (natural logarithm) per byte?

# %%
check.guess("02.first", None)

# %%
held_out = eval_batches(prose.valid, 64, 64, limit=192)            # 192 windows, spread over text that training never sees
first = ml.training.mean_loss(model, held_out)
check.compare("02.first", round(first, 2))
print(f"ln 256 = {np.log(256):.3f}")
assert 0 < np.log(256) - first < 0.25

# %% [markdown]
# A model that knows nothing gives 1/256 to every byte, and its loss is ln 256 = 5.545. If a new model shows 7 or 50,
# something is wrong *before* training. This one number finds many bugs.
#
# Ours is a little lower than ln 256. Why? The head is the table of bytes itself. So the score of a byte is a scalar
# product with its own row, and the byte that was just read meets itself. We make the effect large: all embeddings times
# 10. (They start with random numbers of size 0.02.) Does the first loss rise or fall, and to what?

# %%
check.guess("02.tenfold", None)

# %%
large = ml.Transformer(lab.SETTING.config, seed=0)
large.embed.weight.data[...] *= 10
tenfold = ml.training.mean_loss(large, held_out)
check.compare("02.tenfold", round(tenfold, 2))

with ml.no_grad():
    logits = large(ids).data
own = float(np.take_along_axis(logits, ids[..., None], axis=-1).mean())
print(f"score of the byte that was just read: {own:.1f} (predicted 64 · 0.2 = 12.8)      of all others: {logits.mean():.1f}")
assert tenfold > first + 2 and abs(own - 12.8) < 1.3

# %% [markdown]
# The stream holds that byte's row, normalised: its length is √D = 8. The row has D entries of size 0.2, so its own length is
# 0.2 · 8. The product is 0.2 · 64 = 12.8. The model is almost sure that every byte comes twice, and pays for it.
#
# ### Exercise 02.4 · ●○○ · 10 min
#
# Predict that loss. The byte just read has logit c, the V - 1 others have logit 0. The next byte is the same one again
# in a share p of the cases, and one of the others in the rest. Give the mean loss.
#
# <details><summary>Hint 1</summary>The loss of one prediction is ln Σ exp(logits) minus the logit of the target.</details>
# <details><summary>Hint 2</summary>One logit is c, and V - 1 logits are 0.</details>
# <details><summary>Hint 3</summary>The logit of the target is c in a share p of the cases, and 0 in the others.</details>

# %% exercise="first_loss"
def first_loss(V, c, p):
    """Mean loss in nats: V integer, c a logit, p a share between 0 and 1 -> a number."""
    # BEGIN SOLUTION
    return np.log(V - 1 + np.exp(c)) - p * c
    # END SOLUTION

# %% check="first_loss"
check.first_loss(first_loss)

# %% [markdown]
# ## 3. Training: one line after the other
#
# Three models without a network give three numbers, by counting in the training text and measuring on the held-out text:
# - **uniform**: all bytes alike,
# - **unigram**: how often each byte occurs,
# - **bigram**: which byte follows which.
#
# When the loss is below the bigram line, the model knows something that no table of pairs can know. After how many updates is
# that?

# %%
check.guess("02.bigram", None)

# %%
lines = reference_entropies(prose)
steps = lab.SETTING.pretraining.steps
prompts = np.repeat(encode("The ")[None], 2, axis=0)               # two texts that begin alike


def writes(model):
    """What the model writes after "The ": drawn from its probabilities, made a little sharper."""
    return [decode(row) for row in ml.generate(model, prompts, 60, temperature=0.8, seed=0)]


samples = {0: writes(model)}


def watch(step, model, history):
    """Called after each update."""
    if step in (steps // 2, steps):
        samples[step] = writes(model)
        print(f"after {step} updates: {samples[step][0]!r}")


with lab.Clock() as clock:
    model, history = lab.pretrain(evaluate=held_out, eval_every=20, callback=watch)
print(f"{steps} updates, {history.tokens:,} bytes read, {clock.seconds:.0f} s")

# %%
evaluations = [(0, first), *history.eval]
crossed = {name: next(step for step, loss in evaluations if loss < line) for name, line in lines.items()
           if min(loss for _, loss in evaluations) < line}
if "bigram" in crossed:
    check.compare("02.bigram", crossed["bigram"])
final = evaluations[-1][1]
print("   ".join(f"{name} {line:.3f}" for name, line in lines.items()), f"  the model at the end {final:.3f}")
if lab.FULL:
    assert crossed["uniform"] <= crossed["unigram"] < crossed["bigram"] < steps
    assert final < lines["bigram"] - 0.3
lab.show(figures.learning_curve({"loss": history.loss, "eval": evaluations, "lines": lines, "crossed": crossed,
                               "samples": samples}))

# %% [markdown]
# A diamond marks the first measurement below each line. The letters come first, and quickly. The pairs take longer. Then
# the curve keeps falling: everything below the orange line uses more than one byte of the past.
#
# Why is the held-out loss *below* the training loss? Not because of the model. The split is by whole documents, and the
# held-out ones are easier. The next cell shows one reason. So compare a loss only with lines from the same text.
#
# The text at the end looks like English from far away: lengths of words, endings, spaces. It says nothing. So much
# can be had with 120,576 numbers and a minute.

# %%
for name, text in {"training": prose.train, "held out": prose.valid}.items():
    print(f"{name:8s} text: {np.mean(text[1:] == text[:-1]):.0%} of the bytes repeat the byte before (spaces, dashes)")

# %% [markdown]
# ## 4. What does it use?
#
# At the first position of a window the model sees one byte. At position 64 it sees 64. We average the held-out loss for each
# position apart. How many nats does the *second* visible byte bring?

# %%
check.guess("02.second", None)

# %%
def by_position(model):
    """The held-out loss of the byte after 1, 2 … 64 visible bytes: (64,)."""
    total, count = np.zeros(64), 0
    with ml.no_grad():
        for ids, targets in eval_batches(prose.valid, 64, 64):     # all of the held-out text
            chosen = np.take_along_axis(ml.log_softmax(model(ids)).data, targets[..., None], axis=-1)[..., 0]
            total, count = total - chosen.sum(axis=0), count + len(ids)
    return total / count


position_loss = by_position(model)
check.compare("02.second", round(float(position_loss[0] - position_loss[1]), 2))
if lab.FULL:
    assert abs(position_loss[0] - lines["bigram"]) < 0.2           # one byte in view: no better than the table of pairs
    assert position_loss[0] - position_loss[1] > 0.2
    assert position_loss[16:].mean() < position_loss[1]
lab.show(figures.loss_by_position({"loss": position_loss, "lines": lines}))

# %% [markdown]
# With one byte in view the model is about as good as a table of pairs, and it can hardly be better: the table *is* the
# answer to that question. The second byte brings most, the next few a little, and beyond about eight the curve is nearly
# flat, and noisy. This small model uses short contexts.
#
# The model is kept: lessons 03 to 07 begin with exactly these numbers.

# %%
base = lab.base()
assert all(np.array_equal(p.data, dict(model.named_parameters())[name].data) for name, p in base.named_parameters())
print(f"{ml.count_parameters(base)['total']:,} numbers, held-out loss {ml.training.mean_loss(base, held_out):.3f} on prose")
print(f"on Python source, which it has never seen: {ml.training.mean_loss(base, lab.valid('python')):.3f}")

# %% [markdown]
# ## What you should be able to say now
#
# - A layer is attention plus MLP, each added to the stream; causal means: the future changes no bit of the past.
# - The first loss is ln V. If it is not, find out why before you train.
# - A loss means something beside a line: uniform, unigram, bigram.

# %% [markdown] slide=true
# ## The slide
#
# **What does the model know, and since when?**
# - x + attn(norm x), then x + mlp(norm x); logits from the table of bytes
# - scores of hidden keys are −∞, before the softmax
# - first loss ln 256 = 5.545: knows nothing
# - then it crosses: unigram, later bigram; below that it uses context
# - one byte in view: a table of pairs, no more
