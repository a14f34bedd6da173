"""Several adapters on one base, mixed in one batch: each row is its adapter alone; and how a text finds its adapter."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import minilora as ml
from minilora.lora import adapters_of
from minilora.pretrained import Tokenizer
from minilora.tasks import Router, embed_texts, keywords

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[END]", *(f"{kind}{i}" for kind in ("sum", "verse") for i in range(8))]
SIZES = {"vocab_size": len(WORDS), "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 20, "max_len": 16}
FORMS = {
    "gpt2": ("gpt2", {}), "llama": ("llama", {"n_kv_heads": 1}), "gpt2-sequence": ("gpt2", {"n_labels": 3}),
    "bert-sequence": ("bert", {"n_labels": 3}), "bert-token": ("bert", {"n_labels": 3, "head": "token"}),
    "bert": ("bert", {"head": "none"}),
}
TARGETS = {"gpt2": ["qkv_proj", "down_proj", "embed", "pos_embed"], "llama": ["q_proj", "v_proj", "gate_proj", "embed", "head"],
           "bert": ["query", "value", "output.dense", "word_embeddings"]}
TEXTS = ["sum0 sum1 sum2", "verse1", "sum3 verse2 verse3 verse4 sum1 sum0", "verse0 verse1", "sum5 sum6"]
NAMES = ["small", "__base__", "large", "large", "small"]


def words():
    """A tokenizer with a token for each word."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, {"pad_token": "[PAD]", "eos_token": "[END]"})


def base(form, seed=0):
    kind, fields = FORMS[form]
    cfg = getattr(ml.TransformerConfig, kind)(**SIZES | {"model_type": kind} | fields)
    model = ml.Transformer(cfg, seed=seed, dtype="float64")
    rng = np.random.default_rng(seed)
    model.load_state_dict({k: v + rng.normal(0, 0.3, v.shape) for k, v in model.state_dict().items()})
    return model.eval()


def with_adapters(form):
    """A base with two adapters of different ranks and targets; one saves its table whole, both their classifiers."""
    model, rng = base(form), np.random.default_rng(1)
    ml.add_adapter(model, ml.LoraConfig(r=1, target_modules="all-linear", modules_to_save=["embed"]), "small")
    ml.add_adapter(model, ml.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS[form.partition("-")[0]]), "large")
    for name in ("small", "large"):
        for adapter in adapters_of(model, name).values():
            for _, p in adapter.named_parameters():
                p.data[...] += ml.to_device(rng.normal(0, 0.3, p.shape))
    return model


def alone(model, name, ids):
    """The output for one text with one adapter active, or none."""
    ml.set_adapter(model, None if name == "__base__" else name)
    with ml.no_grad():
        return ml.to_host(model(ids))[0]


@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("form", FORMS)
def test_each_text_gets_what_its_adapter_alone_gives(device, form):
    model, tokenizer = with_adapters(form), words()
    expected = [alone(model, name, [tokenizer.encode(text)]) for text, name in zip(TEXTS, NAMES)]
    plain = [alone(model, "__base__", [tokenizer.encode(text)]) for text in TEXTS]
    model.train()
    for batch_size in (1, 2, 32):
        got = Router(model, tokenizer).logits(TEXTS, NAMES, batch_size=batch_size)
        for mine, theirs, without, name in zip(got, expected, plain, NAMES, strict=True):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
            assert name == "__base__" or abs(mine - without).max() > 1e-3
    assert model.training


@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_each_row_writes_what_its_adapter_alone_writes(device, form):
    model, tokenizer = with_adapters(form), words()
    prompts = [tokenizer.encode(text) for text in TEXTS]
    ids, mask = ml.left_padded(prompts)
    got = ml.generate(model, ids, 8, attention_mask=mask, adapter_names=NAMES)
    texts = Router(model, tokenizer).generate(TEXTS, NAMES, max_new_tokens=8, batch_size=2)
    said = set()
    for row, prompt, name, text in zip(got, prompts, NAMES, texts, strict=True):
        ml.set_adapter(model, None if name == "__base__" else name)
        expected = ml.generate(model, [prompt], 8)[0]
        np.testing.assert_array_equal(row[ids.shape[1] - len(prompt) :], expected)
        new = expected[len(prompt) :].tolist()
        said.add(tuple(new))
        new = new[: new.index(1)] if 1 in new else new         # [END]
        written = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
        assert tokenizer.decode(prompt) + text == written
    assert len(said) > 2


def test_adapters_come_from_folders(tmp_path):
    model, tokenizer = with_adapters("llama"), words()
    expected = Router(model, tokenizer).logits(TEXTS, NAMES)
    ml.save_adapter(model, tmp_path / "adapters", "small")     # in a sub-directory of its name
    ml.delete_adapter(model, "small")
    ml.save_adapter(model, tmp_path, "large")
    router = Router(base("llama"), tokenizer, {"small": tmp_path / "adapters", "large": tmp_path / "large"})
    assert router.names == ["small", "large", "__base__"]
    for mine, theirs in zip(router.logits(TEXTS, NAMES), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(FileNotFoundError, match="missing"):
        Router(base("llama"), tokenizer, {"small": tmp_path / "missing"})


def test_a_rule_chooses():
    model, tokenizer = with_adapters("llama"), words()
    rule = keywords({"small": ["sum0", "sum5"], "large": ["verse2", "verse1"]})
    router = Router(model, tokenizer, rule=rule)
    assert router.route(TEXTS) == ["small", "large", "small", "large", "small"] and router.route([]) == []
    for mine, theirs in zip(router.logits(TEXTS), router.logits(TEXTS, router.route(TEXTS)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert Router(model, tokenizer, rule=lambda text: "large").generate(TEXTS[:2], max_new_tokens=3) == \
        router.generate(TEXTS[:2], ["large"] * 2, max_new_tokens=3)
    assert router.logits([]) == [] and router.generate([]) == []


def test_keywords_are_whole_words_in_any_case():
    rule = keywords({"sql": ["select", "c++"], "poem": ["rose"]}, default="poem")
    assert [rule(text) for text in ("SELECT a rose", "in C++, a rose", "unselected", "rose.")] == ["sql", "sql", "poem", "poem"]


@pytest.mark.parametrize("method", ["centroid", "logistic"])
def test_a_router_learns_from_examples(device, method):
    if method == "logistic":
        pytest.importorskip("sklearn")
    model, tokenizer, rng = with_adapters("llama"), words(), np.random.default_rng(0)
    direction = ml.to_device(rng.standard_normal(16))          # a base that knows what the words have in common
    model.embed.weight.data[2:10] += direction
    model.embed.weight.data[10:] -= direction

    def text(kind):
        return " ".join(f"{kind}{i}" for i in rng.integers(0, 8, rng.integers(2, 9)))

    kinds = ["sum", "verse"] * 20
    router = Router(model, tokenizer)
    router.fit([text(kind) for kind in kinds], ["small" if kind == "sum" else "large" for kind in kinds], method)
    held_out = ["sum", "verse"] * 20
    found = router.route([text(kind) for kind in held_out])
    right = np.mean([name == ("small" if kind == "sum" else "large") for name, kind in zip(found, held_out, strict=True)])
    assert right >= 0.95
    ml.set_adapter(model, "large")                             # what is active does not matter: the features are the base's
    assert router.route(["sum1 sum2 sum3", "verse4 verse5"]) == ["small", "large"]


def test_the_features_are_the_mean_of_the_bases_hidden_states(device):
    model, tokenizer = with_adapters("bert"), words()
    got = embed_texts(model, tokenizer, TEXTS, batch_size=2)
    for row, text in zip(got, TEXTS, strict=True):
        mean = alone(model, "__base__", [tokenizer.encode(text)]).mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-12, atol=1e-12)


def test_what_the_router_refuses(monkeypatch):
    model, tokenizer = with_adapters("llama"), words()
    router = Router(model, tokenizer)
    for wrong, message in (
            (lambda: router.logits(TEXTS), "has no rule"),
            (lambda: router.logits(TEXTS, NAMES[:2]), "a list of 2 for a list of 5"),
            (lambda: router.logits("text", "name"), "'name' for 'text'"),
            (lambda: router.logits(TEXTS, ["tiny"] * 5), "no adapter 'tiny'.*small, large, __base__"),
            (lambda: router.logits(["sum0", " ".join(["sum1"] * 17)], NAMES[:2]), "text 1 has 17 tokens, expected 1 to 16"),
            (lambda: router.logits(["sum0", ""], NAMES[:2]), "text 1 has 0 tokens"),
            (lambda: router.generate(["sum0 sum1"], ["small"], max_new_tokens=15), "expected 1 to 1, with room for 15"),
            (lambda: router.logits(TEXTS, NAMES, batch_size=0), "batch_size = 0"),
            (lambda: Router(model, tokenizer, rule=lambda text: "tiny").route(TEXTS), "no adapter 'tiny'"),
            (lambda: router.fit(TEXTS, ["small"] * 5), "examples of small alone"),
            (lambda: router.fit([], []), "examples of nothing"),
            (lambda: router.fit(TEXTS, NAMES, "forest"), "'forest', expected one of centroid, logistic")):
        with pytest.raises(ValueError, match=message):
            wrong()
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'pip install "minilora\[tasks\]"'):
        router.fit(TEXTS, NAMES, "logistic")
