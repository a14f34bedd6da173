"""The tokenizer that a GGUF file describes: its vocabulary with merges (byte-level BPE) or with scores (SentencePiece)."""

from __future__ import annotations

from typing import Any

from .hub import need
from .tokenizer import Tokenizer, checked

GPT2_SPLIT = None                            # what ByteLevel does by itself
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
SPLITS: dict[str, tuple[bool, str | None]] = {             # tokenizer.ggml.pre -> (digits one by one, regex of the pieces)
    "default": (False, GPT2_SPLIT), "gpt-2": (False, GPT2_SPLIT), "smollm": (True, GPT2_SPLIT), "starcoder": (True, GPT2_SPLIT),
    "llama-bpe": (False, LLAMA3_SPLIT), "llama3": (False, LLAMA3_SPLIT),
    "qwen2": (False, LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")),
}
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4                   # kinds of token in tokenizer.ggml.token_type
TOKENS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
          "unk_token": "unknown_token_id"}


def gguf_tokenizer(metadata: dict[str, Any], where: Any, vocab_size: int) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. Raises ValueError for one that is damaged or of a kind that we do not have."""
    library: Any = need("tokenizers")
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    words, kinds, kind = get("tokens"), get("token_type"), get("model")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len(words) != vocab_size:
        count = len(words) if isinstance(words, list) else None
        raise ValueError(f"{where}: tokenizer.ggml.tokens has {count} tokens, expected the {vocab_size} of the embedding table")
    if kinds is not None and len(kinds) != len(words):
        raise ValueError(f"{where}: tokenizer.ggml.token_type has {len(kinds)} entries, expected {len(words)}, one a token")
    vocab = {word: i for i, word in enumerate(words)}
    try:
        if kind == "gpt2":
            backend = _byte_level(library, vocab, get("merges"), get("pre", "default"), where)
        elif kind == "llama":
            options = get("unknown_token_id", 0), get("add_space_prefix", True)
            backend = _sentence_piece(library, vocab, words, get("scores"), *options, where)
        else:
            raise ValueError(f"{where}: tokenizer.ggml.model is {kind!r}, expected 'gpt2' or 'llama': take its safetensors")
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{where}: its tokenizer is damaged ({error}): download it again") from None
    by_kind = {k: [words[i] for i, found in enumerate(kinds or ()) if found == k] for k in (CONTROL, USER_DEFINED)}
    backend.add_special_tokens([library.AddedToken(word, special=True, normalized=False) for word in by_kind[CONTROL]])
    backend.add_tokens([library.AddedToken(word, normalized=False) for word in by_kind[USER_DEFINED]])
    tokens: dict[str, str] = {}
    for name, key in TOKENS.items():
        i = get(key)
        if i is not None and not (isinstance(i, int) and 0 <= i < len(words)):
            raise ValueError(f"{where}: tokenizer.ggml.{key} is {i!r}, expected an id below {len(words)}")
        tokens |= {} if i is None else {name: words[i]}
    if get("add_bos_token", kind == "llama") and "bos_token" in tokens:
        text = tokens["bos_token"]
        backend.post_processor = library.processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text}:1 $B:1", special_tokens=[(text, vocab[text])])
    template = metadata.get("tokenizer.chat_template")
    return checked(Tokenizer(backend, tokens, template if isinstance(template, str) else None), vocab_size, where)


def _byte_level(library: Any, vocab: dict[str, int], merges: Any, pre: str, where: Any) -> Any:
    """GPT-2's kind: bytes written as letters, joined in the order of the merges, inside of pieces that a regex cuts."""
    if pre not in SPLITS:
        raise ValueError(f"{where}: tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(SPLITS)}: take its safetensors")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges or ()]
    odd = next((pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys()), None)
    if odd is not None or not pairs:
        raise ValueError(f"{where}: tokenizer.ggml.merges has {odd!r}, expected pairs of tokens of the vocabulary: download it "
                         "again")
    backend = library.Tokenizer(library.models.BPE(vocab=vocab, merges=pairs, fuse_unk=False))
    digits, split = SPLITS[pre]
    parts = [library.pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if split is not None:
        parts.append(library.pre_tokenizers.Split(library.Regex(split), behavior="isolated"))
    parts.append(library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = library.pre_tokenizers.Sequence(parts)
    backend.decoder = library.decoders.ByteLevel()
    return backend


def _sentence_piece(library: Any, vocab: dict[str, int], words: list[str], scores: Any, unknown: int, space_prefix: bool,
                    where: Any) -> Any:
    """Llama 2's kind: two neighbours become the word that they form, the word with the highest score first."""
    if not isinstance(scores, list) or len(scores) != len(words) or not 0 <= unknown < len(words):
        raise ValueError(f"{where}: tokenizer.ggml.scores is missing or short, expected a number for each of {len(words)} "
                         "tokens: download it again")
    found = [(-scores[i], i, cut) for i, word in enumerate(words) for cut in range(1, len(word))
             if word[:cut] in vocab and word[cut:] in vocab]
    pairs = [(words[i][:cut], words[i][cut:]) for _, i, cut in sorted(found)]
    backend = library.Tokenizer(library.models.BPE(vocab=vocab, merges=pairs, unk_token=words[unknown], fuse_unk=True,
                                                   byte_fallback=True))
    blank, prefix = "▁", [library.normalizers.Prepend("▁")] if space_prefix else []
    backend.normalizer = library.normalizers.Sequence([*prefix, library.normalizers.Replace(" ", blank)])
    last = [library.decoders.Strip(content=" ", left=1)] if space_prefix else []
    backend.decoder = library.decoders.Sequence([library.decoders.Replace(blank, " "), library.decoders.ByteFallback(),
                                                 library.decoders.Fuse(), *last])
    return backend
