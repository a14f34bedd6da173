"""Tokenizers, chat templates and GGUF files, on small ones made here."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_tokenizers import TEMPLATE, tokenizers, word_piece

import minilora as ml
from minilora.nn.names import GGUF, file_names
from minilora.pretrained import Tokenizer
from minilora.pretrained.gguf_file import GgufFile
from minilora.pretrained.gguf_tokenizer import gguf_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("jinja2")

WORDS = ["the", "cat", "sat", "un", "##likely", "##s", "!"]


def bert(vocab_size=11):
    return ml.Transformer(ml.TransformerConfig.bert(vocab_size=vocab_size, d_model=8, n_layers=1, n_heads=2, max_len=16,
                                                    head="none", pooler="tanh"))


def test_text_there_and_back():
    tokenizer = Tokenizer(word_piece(WORDS), {"pad_token": "[PAD]", "eos_token": "[SEP]"})
    assert tokenizer.encode("The cats sat!") == [1, 4, 5, 9, 6, 10, 2]
    assert tokenizer.encode("the", add_special_tokens=False) == [4]
    assert tokenizer.decode([1, 4, 5, 9, 2], skip_special_tokens=True) == "the cats"
    assert tokenizer.decode(np.array([4, 5])) == "the cat" and tokenizer.decode([]) == ""
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.token_id("mask_token")) == (0, 2, None)
    assert len(tokenizer) == 11
    for ids in ([11], [-1]):
        with pytest.raises(ValueError, match="expected 0 to 10"):
            tokenizer.decode(ids)


def test_words_and_their_tokens():
    """Each token knows its word, also those of unknown words; special tokens belong to none."""
    tokenizer = Tokenizer(word_piece(WORDS))
    ids, words = tokenizer.encode_words(["Unlikely", "cats", "!", "x"])
    assert ids == [1, 7, 8, 5, 9, 10, 3, 2] and words == [None, 0, 0, 1, 1, 2, 3, None]
    assert tokenizer.encode_words(["cats!"], add_special_tokens=False) == ([5, 9, 10], [0, 0, 0])
    with pytest.raises(ValueError, match="word 1 is ' '"):
        tokenizer.encode_words(["the", " "])


@pytest.mark.parametrize("trim", [True, False])
def test_words_of_byte_level_tokens(trim):
    """There a blank belongs to the token after it, whether the offsets count it or not."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate([*alphabet, "Ġc"])}, [("Ġ", "c")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    ids, words = tokenizer.encode_words(["ab", "ca", "é"])
    assert tokenizer.decode(ids) == "ab ca é" and words == [0, 0, 1, 1, 2, 2, 2]


def test_padding_and_truncation_of_the_file_do_not_count():
    backend = word_piece(WORDS)
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    assert Tokenizer(backend).encode("the cat sat") == [1, 4, 5, 6, 2]


def test_chat():
    tokenizer = Tokenizer(word_piece(WORDS), {"eos_token": "[SEP]"}, TEMPLATE)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages) == "<user>hi[SEP]\n<assistant>"
    assert tokenizer.chat(messages, add_generation_prompt=False) == "<user>hi[SEP]\n"
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(word_piece(WORDS)).chat(messages)
    for template in ("{{ raise_exception('no system') }}", "{% if %}", "{{ messages.__class__.__mro__[1].__subclasses__() }}",
                     "{{ messages.append(1) }}", "{{ range(10**9) | list }}", "{{ messages[0].role + 3 }}"):
        with pytest.raises(ValueError, match="the chat template refuses"):
            Tokenizer(word_piece(WORDS), {}, template).chat(messages)


def test_a_folder_with_a_tokenizer(tmp_path):
    ml.save_pretrained(bert(), Tokenizer(word_piece(WORDS), {"eos_token": "[SEP]", "pad_token": "[PAD]"}, TEMPLATE), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2
    _, tokenizer = ml.load_pretrained(tmp_path)
    assert tokenizer.encode("the cat") == [1, 4, 5, 2] and tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    templates = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    options = {"eos_token": {"content": "[CLS]"}, "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": "!"}))
    _, tokenizer = ml.load_pretrained(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.token_id("mask_token")) == (1, 0, 10)
    assert tokenizer.chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert ml.load_pretrained(tmp_path)[1].chat_template == "j"


def test_tokenizers_that_do_not_fit(tmp_path):
    ml.save_pretrained(bert(10), Tokenizer(word_piece(WORDS)), tmp_path)
    with pytest.raises(ValueError, match="has 11 ids, expected at most the model's vocabulary of 10"):
        ml.load_pretrained(tmp_path)
    for text in ("{}", "no", (tmp_path / "tokenizer.json").read_text()[:-9]):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="is not a tokenizer"):
            ml.load_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=r"has vocab\.txt but no tokenizer\.json"):
        ml.load_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- GGUF

VOCAB = ["<end>", "<start>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġc", "12"]
METADATA = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": VOCAB,
            "tokenizer.ggml.token_type": [3, 3] + [1] * (len(VOCAB) - 2), "tokenizer.ggml.merges": ["a b", "Ġ c", "1 2"],
            "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 1}
QUANTISED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def llama(**fields):
    sizes = {"vocab_size": len(VOCAB), "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "max_len": 32}
    model, rng = ml.Transformer(ml.TransformerConfig.llama(**sizes | fields)).eval(), np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data[...] = rng.standard_normal(p.shape) * 0.3
    return model


def write_gguf(path, model, kind="F32", architecture="llama", metadata=METADATA, leave_out=(), **more):
    """The model as llama.cpp's converter writes it: rows of q and k interleaved, matrices in the given type."""
    cfg, writer = model.cfg, gguf.GGUFWriter(path, architecture)
    for key, value in {"block_count": cfg.n_layers, "context_length": cfg.max_len, "embedding_length": cfg.d_model,
                       "feed_forward_length": cfg.d_ff, "attention.head_count": cfg.n_heads,
                       "attention.head_count_kv": cfg.n_kv_heads}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", cfg.norm_eps)
    writer.add_float32("llama.rope.freq_base", cfg.rope_theta)
    for key, value in (metadata | more).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](key, value)
    names = file_names(cfg, GGUF)
    for name, array in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module.endswith(("q_proj", "k_proj")):
            heads = cfg.n_heads if module.endswith("q_proj") else cfg.n_kv_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if f"{names[module]}.{leaf}" not in leave_out:
            type_ = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
            blocks = gguf.quants.quantize(np.ascontiguousarray(array), type_)
            writer.add_tensor(f"{names[module]}.{leaf}", blocks, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", QUANTISED)
def test_gguf_types(kind, tmp_path, rng):
    """Every matrix is what the library makes of the quantised one; F32 gives the model exactly."""
    model = llama()
    write_gguf(tmp_path / "m.gguf", model, kind)
    loaded, tokenizer = ml.load_pretrained(tmp_path / "m.gguf")
    type_ = gguf.GGMLQuantizationType[kind]
    for path, values in model.state_dict().items():
        expected = gguf.quants.dequantize(gguf.quants.quantize(values, type_), type_) if values.ndim == 2 else values
        np.testing.assert_array_equal(loaded.state_dict()[path], expected, err_msg=path)
    if kind == "F32":
        ids = rng.integers(0, len(VOCAB), (2, 7))
        np.testing.assert_array_equal(loaded(ids).data, model(ids).data)
    assert tokenizer.decode(tokenizer.encode("ab cab, é")) == "ab cab, é" and tokenizer.eos_token_id == 0


def test_gguf_forms(tmp_path, rng):
    """A folder with one file, tied and biased models, linear scaling of positions."""
    ids = rng.integers(0, len(VOCAB), (2, 7))
    for i, (fields, more) in enumerate((({"tie_embeddings": True}, {}), ({"qkv_bias": True, "o_bias": True}, {}), (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}))):
        (tmp_path / str(i)).mkdir()
        model = llama(**fields)
        write_gguf(tmp_path / str(i) / "m.gguf", model, **more)
        np.testing.assert_array_equal(ml.load_pretrained(tmp_path / str(i))[0](ids).data, model(ids).data)


WRONG_GGUF = {
    "architecture": ({"architecture": "qwen3moe"}, "general.architecture is 'qwen3moe', expected 'llama'"),
    "experts": ({"llama.expert_count": 8}, "no mixture of experts"),
    "rotation": ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8, expected 16"),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "rope scaling of kind 'yarn'"),
    "missing": ({"leave_out": ("blk.1.ffn_up.weight",)}, "lacks model.layers.1.mlp.up_proj.weight"),
    "layers": ({"llama.block_count": 3}, "lacks model.layers.2"),
    "tokens": ({"tokenizer.ggml.tokens": VOCAB[:-1]}, "tokens, expected the 261 of the embedding table"),
    "kinds": ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
    "merges": ({"tokenizer.ggml.merges": ["a b", "x y"]}, "merges has .*, expected pairs of tokens"),
    "pieces": ({"tokenizer.ggml.pre": "poro"}, "tokenizer.ggml.pre is 'poro'"),
    "tokenizer": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "eos": ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999"),
}


@pytest.mark.parametrize("case", WRONG_GGUF)
def test_gguf_files_that_do_not_fit(case, tmp_path):
    options, message = WRONG_GGUF[case]
    write_gguf(tmp_path / "m.gguf", llama(), **options)
    with pytest.raises(ValueError, match=message) as error:
        ml.load_pretrained(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)


def test_damaged_gguf_files(tmp_path, rng):
    """Cut anywhere, or with wrong lengths in the header: one clear error, never another one."""
    path = tmp_path / "m.gguf"
    write_gguf(path, llama(), "Q4_0")
    whole = path.read_bytes()
    header = whole.index(b"token_embd") + 2000
    lies = [b"", b"GGUF", whole[:-40], b"GGML" + whole[4:], whole[:4] + b"\x09" + whole[5:],
            whole[:8] + b"\xff" * 8 + whole[16:], whole[:16] + b"\xff" * 8 + whole[24:],
            *(whole[:n] for n in rng.integers(0, len(whole) - 40, 20))]
    for content in lies:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole GGUF file"):
            GgufFile(path)
    for at in rng.integers(0, header, 300):                # a changed byte gives a model, or one line
        path.write_bytes(whole[:at] + bytes([int(rng.integers(256))]) + whole[at + 1 :])
        try:
            ml.load_pretrained(path)
        except ValueError as error:
            assert "\n" not in str(error)
    unknown = bytearray(whole)
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    unknown[at] = 16                                       # IQ2_XXS
    path.write_bytes(unknown)
    with pytest.raises(ValueError, match=r"token_embd\.weight has type IQ2_XXS, where one of F32"):
        GgufFile(path)


def test_sentence_piece_vocabularies():
    """Llama 2's kind: the pair that makes the word with the highest score goes first; unknown letters fall to bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 8, "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    tokenizer = gguf_tokenizer(metadata, "m.gguf", len(words))
    pieces = [words[i] for i in tokenizer.encode("abc ab é")]
    assert pieces == ["<s>", "▁a", "bc", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc ab é"), skip_special_tokens=True) == "abc ab é"
    for wrong in ({"tokenizer.ggml.scores": scores[:5]}, {"tokenizer.ggml.scores": None}):
        with pytest.raises(ValueError, match="scores is missing or short"):
            gguf_tokenizer(metadata | wrong, "m.gguf", len(words))
