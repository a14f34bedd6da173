"""Text from a language model: whole characters as they come, the chat template, the end of text, and what is refused."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np
import pytest

import minilora as ml
from minilora.cli import main
from minilora.pretrained import Tokenizer
from minilora.pretrained.text import pieces, prompt_ids

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
VOCAB = ["<end>", "<user>", *ALPHABET]
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def bytewise(template=None):
    """A tokenizer with a token for each byte, and two special ones."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(VOCAB)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(VOCAB[:2])
    return Tokenizer(backend, {"eos_token": "<end>"}, template)


def llama(**fields):
    sizes = {"vocab_size": len(VOCAB), "d_model": 16, "n_layers": 2, "n_heads": 2, "max_len": 24, "model_type": "llama"}
    return ml.Transformer(ml.TransformerConfig.llama(**sizes | fields)).eval()


@pytest.fixture
def saved(tmp_path):
    """The folder of a small language model with a chat template."""
    ml.save_pretrained(llama(), bytewise(TEMPLATE), tmp_path / "model")
    return tmp_path / "model"


def test_no_half_of_a_character_is_handed_out():
    tokenizer, text = bytewise(), "aé東😀, b"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert list(pieces(tokenizer, tokenizer.encode("x"), iter(ids))) == list(text)
    cut = list(pieces(tokenizer, [], iter(tokenizer.encode("a😀")[:-1])))
    assert cut == ["a"]                                        # the last character was never whole
    broken = tokenizer.encode("é")[:1] + tokenizer.encode("b")
    assert "".join(pieces(tokenizer, [], iter(broken))) == "\N{REPLACEMENT CHARACTER}b"


def test_special_tokens_are_not_shown():
    tokenizer = bytewise()
    assert list(pieces(tokenizer, [1], iter([*tokenizer.encode("hi"), 0]))) == ["h", "i"]


def test_the_pieces_are_what_generate_gives():
    model, tokenizer = llama(), bytewise()
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 200, "top_p": 0.99, "seed": 4}
    ids = tokenizer.encode("abc")
    expected = ml.generate(model, [ids], eos_token_id=0, **options)[0]
    got = "".join(ml.stream_text(model, tokenizer, "abc", **options))
    assert got == tokenizer.decode(expected[3:], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}") and got


def test_the_chat_template_is_used_where_there_is_one():
    model, plain, chatty = llama(), bytewise(), bytewise(TEMPLATE)
    hi = plain.encode("hi")
    assert prompt_ids(model, plain, "hi") == prompt_ids(model, chatty, "hi", chat=False) == hi
    assert prompt_ids(model, chatty, "hi") == prompt_ids(model, chatty, "hi", chat=True) == [1, *hi, *plain.encode(":")]
    with pytest.raises(ValueError, match="no chat template"):
        prompt_ids(model, plain, "hi", chat=True)


def test_the_end_of_text_stops_it(monkeypatch):
    model, tokenizer = llama(), bytewise()
    words = iter([*tokenizer.encode("ok"), 0, *tokenizer.encode("never")])
    monkeypatch.setattr(import_module("minilora.nn.generate"), "choose", lambda logits, *_: np.array([next(words)]))
    assert "".join(ml.stream_text(model, tokenizer, "a")) == "ok"
    assert next(words) == tokenizer.encode("n")[0]


def test_an_adapter_by_name():
    model, tokenizer = llama(), bytewise()
    base = "".join(ml.stream_text(model, tokenizer, "abc"))
    ml.add_adapter(model, ml.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "other")
    for path, p in model.named_parameters(trainable=True):
        p.data[...] *= 20 if "lora_B" in path else 1
    active = "".join(ml.stream_text(model, tokenizer, "abc"))
    assert active != base
    assert "".join(ml.stream_text(model, tokenizer, "abc", adapter_name="other")) == active
    assert "".join(ml.stream_text(model, tokenizer, "abc", adapter_name="__base__")) == base


def test_the_verb_prints_the_text(saved, tmp_path, capsys):
    arguments = ["generate", str(saved), "--prompt", "hi", "--max-new-tokens", "5", "--temperature", "1", "--top-k", "50",
                 "--top-p", "0.9", "--seed", "3"]
    model, tokenizer = ml.load_pretrained(saved)
    options = {"max_new_tokens": 5, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 3}
    for flags, chat in (([], None), (["--chat"], True), (["--no-chat"], False)):
        assert main([*arguments, *flags]) == 0
        assert capsys.readouterr().out == "".join(ml.stream_text(model, tokenizer, "hi", chat=chat, **options)) + "\n"
    ml.add_adapter(model, ml.LoraConfig(r=2, init_lora_weights=False))
    for path, p in model.named_parameters(trainable=True):
        p.data[...] *= 50 if "lora_B" in path else 1
    ml.save_adapter(model, tmp_path / "adapter")
    assert main([*arguments, "--adapter", str(tmp_path / "adapter")]) == 0
    adapted = capsys.readouterr().out
    assert adapted == "".join(ml.stream_text(model, tokenizer, "hi", **options)) + "\n"
    with ml.disable_adapter(model):
        assert adapted != "".join(ml.stream_text(model, tokenizer, "hi", **options)) + "\n"


def test_by_default_the_context_is_filled():
    model, tokenizer = llama(), bytewise()
    tokenizer.tokens.clear()                                   # nothing ends it
    ids = tokenizer.encode("ab")
    text = "".join(ml.stream_text(model, tokenizer, "ab"))
    assert text == tokenizer.decode(ml.generate(model, [ids], 22)[0, 2:]).rstrip("\N{REPLACEMENT CHARACTER}")


def refused(arguments, capsys):
    """The one line on standard error; nothing is printed."""
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_what_the_verb_refuses(saved, tmp_path, capsys):
    assert "the prompt is empty" in refused([saved, "--prompt", ""], capsys)
    assert "26 tokens" in refused([saved, "--prompt", "x" * 24], capsys)
    line = refused([saved, "--prompt", "x" * 20, "--max-new-tokens", "3"], capsys)
    assert "22 tokens and 3 new ones" in line and "at most 24" in line and "shorten the prompt" in line
    assert "-1 new tokens" in refused([saved, "--prompt", "x", "--max-new-tokens", "-1"], capsys)
    assert "temperature >= 0" in refused([saved, "--prompt", "x", "--temperature", "-1"], capsys)
    assert "missing" in refused([tmp_path / "missing", "--prompt", "x"], capsys)
    assert "missing" in refused([saved, "--prompt", "x", "--adapter", tmp_path / "missing"], capsys)

    other = llama(d_model=8)
    ml.add_adapter(other, ml.LoraConfig(r=2))
    ml.save_adapter(other, tmp_path / "adapter")
    assert "is it the base?" in refused([saved, "--prompt", "x", "--adapter", tmp_path / "adapter"], capsys)

    ml.save_pretrained(llama(), None, tmp_path / "mute")
    assert "has no tokenizer" in refused([tmp_path / "mute", "--prompt", "x"], capsys)
    ml.save_pretrained(llama(), bytewise(), tmp_path / "plain")
    assert "no chat template" in refused([tmp_path / "plain", "--prompt", "x", "--chat"], capsys)
    bert = ml.Transformer(ml.TransformerConfig.bert(vocab_size=len(VOCAB), d_model=8, n_layers=1, n_heads=2, head="none"))
    ml.save_pretrained(bert, bytewise(), tmp_path / "bert")
    assert "expected a causal language model" in refused([tmp_path / "bert", "--prompt", "x"], capsys)
    sequence = llama(n_labels=3)
    ml.save_pretrained(sequence, bytewise(), tmp_path / "classifier")
    assert "head='sequence'" in refused([tmp_path / "classifier", "--prompt", "x"], capsys)


@pytest.mark.parametrize("library", ["tokenizers", "jinja2"])
def test_a_missing_extra_is_one_line(library, saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    assert 'pip install "minilora[pretrained]"' in refused([saved, "--prompt", "x"], capsys)
