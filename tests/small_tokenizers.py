"""Small tokenizers and a chat template, for tests of text. Importing this skips the test where tokenizers is missing."""

from __future__ import annotations

import pytest

tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


def word_piece(words):
    """BERT's kind: the special tokens, then these words, and [CLS] text [SEP] around every text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    around = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    backend.add_special_tokens(SPECIAL)
    return backend
