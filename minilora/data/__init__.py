"""What to train on: bytes that Python brings along, and tasks whose answer is known. Plain NumPy arrays on the host."""

from .corpora import (
    VOCAB_SIZE,
    Corpus,
    Document,
    decode,
    encode,
    eval_batches,
    load_corpus,
    reference_entropies,
    sample_batch,
)
from .padding import left_padded
from .planted import PlantedLinear, planted_update

__all__ = ["VOCAB_SIZE", "Corpus", "Document", "PlantedLinear", "decode", "encode", "eval_batches", "left_padded",
           "load_corpus", "planted_update", "reference_entropies", "sample_batch"]
