"""What to train on: bytes that Python brings along, tasks whose answer is known, and files of labelled or plain text."""

from .buckets import Buckets, split
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
from .packaged import movie_reviews, packaged_file
from .padding import left_padded
from .planted import PlantedLinear, planted_update
from .readers import Labelled, Passage, Tagged, label_names, read_labelled, read_passages, read_tagged, read_text, sha256

__all__ = ["VOCAB_SIZE", "Buckets", "Corpus", "Document", "Labelled", "Passage", "PlantedLinear", "Tagged", "decode",
           "encode", "eval_batches", "label_names", "left_padded", "load_corpus", "movie_reviews", "packaged_file",
           "planted_update", "read_labelled", "read_passages", "read_tagged", "read_text", "reference_entropies",
           "sample_batch", "sha256", "split"]
