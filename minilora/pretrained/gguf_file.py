"""GGUF, llama.cpp's format: one file with the config, the tokenizer and the quantised weights of a model.

The `gguf` library turns quantised blocks into numbers. The header is read here: in the library that takes ten seconds for a
vocabulary of 49,152, here a fifth of one, and no length in it is believed before it is known to lie within the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..nn import TransformerConfig
from ..nn.names import GGUF, LLAMA
from .hf_config import from_hf
from .hub import need
from .safetensors_file import finite

NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class Header:
    """Reads little-endian numbers and strings one after the other; ValueError where the file ends too early."""

    def __init__(self, data: Any) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError(f"it ends after {len(self.data)} bytes, where {self.at + n} are announced")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A value of a kind: a number, a string, or a list of either."""
        if kind in NUMBERS:
            return np.frombuffer(self.take(np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind])[0].item()
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"it has a value of unknown kind {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in NUMBERS:
            return np.frombuffer(self.take(count * np.dtype(NUMBERS[item]).itemsize), NUMBERS[item]).tolist()
        if item != STRING:
            raise ValueError(f"it has an array of unknown kind {item}")
        if count * 8 > len(self.data) - self.at:           # each string has eight bytes of length at least
            raise ValueError(f"it announces {count} strings, more than it has room for")
        return [self.string() for _ in range(count)]


class GgufFile:
    """A model's file: `metadata`, and its tensors under the names and with the rows that a Llama has in Hugging Face's files.

    Raises ValueError for a file that is not whole, of another architecture, or with a kind of tensor that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quants: Any = need("gguf.quants")
        self.sizes: Any = need("gguf.constants").GGML_QUANT_SIZES
        with open(path, "rb") as file:
            try:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                tensors = self._read(Header(self.map))
            except (ValueError, struct.error) as error:
                raise ValueError(f"{path} is not a whole GGUF file that minilora can read ({error}): copy or download it "
                                 "again, or take another") from None
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: general.architecture is {architecture!r}, expected 'llama': take its safetensors")
        self.tensors = {llama_name(name): tensor for name, tensor in tensors.items()}
        self.shapes = {name: shape for name, (shape, _, _) in self.tensors.items()}

    def _read(self, header: Header) -> dict[str, tuple[tuple[int, ...], Any, int]]:
        """Read the header: fills `metadata`; returns name -> (shape, type, first byte)."""
        if (magic := header.take(4)) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, where 'GGUF' is expected")
        if (version := header.number("I")) not in (2, 3):
            raise ValueError(f"it has version {version}, where 2 or 3 is expected")
        n_tensors, n_values = header.number("Q"), header.number("Q")
        if n_tensors * 24 + n_values * 12 > len(self.map):
            raise ValueError(f"it announces {n_tensors} tensors and {n_values} values, more than it has room for")
        self.metadata = {}
        for _ in range(n_values):
            key = header.string()
            self.metadata[key] = header.value(header.number("I"))
        found = {}
        for _ in range(n_tensors):
            name, dims = header.string(), header.number("I")
            if not 1 <= dims <= 4:
                raise ValueError(f"{name} has {dims} dimensions")
            shape = tuple(header.number("Q") for _ in range(dims))[::-1]
            found[name] = (shape, *self._type(name, header.number("I"), shape), header.number("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start, tensors = -(-header.at // alignment) * alignment, {}
        for name, (shape, kind, n_bytes, offset) in found.items():
            if start + offset + n_bytes > len(self.map):
                raise ValueError(f"{name} ends at byte {start + offset + n_bytes}, and the file at {len(self.map)}")
            tensors[name] = (shape, kind, start + offset)
        return tensors

    def _type(self, name: str, number: int, shape: tuple[int, ...]) -> tuple[Any, int]:
        """(the library's type, bytes) of a tensor."""
        kind = next((kind for kind in self.sizes if kind.value == number), None)
        if kind is None or kind.name not in READABLE:
            raise ValueError(f"{name} has type {number if kind is None else kind.name}, where one of {', '.join(READABLE)} is "
                             "expected")
        block, size = self.sizes[kind]
        if shape[-1] % block or math.prod(shape) < 1:
            raise ValueError(f"{name} has shape {shape}, whose rows are not of whole blocks of {block}")
        return kind, math.prod(shape) // block * size

    def config(self, **options: Any) -> TransformerConfig:
        """Our config of the file's metadata. options: as of from_hf, which checks the values."""
        get = {key.removeprefix("llama."): value for key, value in self.metadata.items() if key.startswith("llama.")}.get
        embed = self.shapes.get("model.embed_tokens.weight", (0, 0))
        heads, width, kind = get("attention.head_count"), get("embedding_length"), get("rope.scaling.type", "none")
        if get("expert_count"):
            raise ValueError(f"{self.path}: expert_count is {get('expert_count')}, expected none: minilora has no mixture of "
                             "experts")
        by_default = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
        head_dim = get("attention.key_length", by_default)
        if get("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"{self.path}: rope.dimension_count is {get('rope.dimension_count')}, expected {head_dim}, since "
                             "minilora rotates whole heads: take another model")
        rope: dict[str, Any] = {"rope_theta": get("rope.freq_base", 10000.0)}
        rope |= {} if kind == "none" else {"rope_type": kind, "factor": get("rope.scaling.factor")}
        return from_hf({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": embed[0], "hidden_size": width,
            "num_hidden_layers": get("block_count"), "num_attention_heads": heads, "head_dim": head_dim,
            "num_key_value_heads": get("attention.head_count_kv"), "intermediate_size": get("feed_forward_length"),
            "max_position_embeddings": get("context_length"), "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "rope_parameters": rope, "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
            "tie_word_embeddings": "lm_head.weight" not in self.shapes}, self.path, **options)

    def blocks(self, key: str) -> tuple[np.ndarray, str]:  # -> (rows, bytes of a row) uint8, type
        """A matrix in the blocks of the file, the rows of q and k back in their places, and the name of its type."""
        (rows, _), kind, _ = self.tensors[key]
        return self._raw(key, 0, rows), kind.name

    def rows(self, key: str, start: int, stop: int, transposed: bool = False) -> np.ndarray:
        """Rows of a tensor as float32, those of q and k back in their places."""
        shape, kind, _ = self.tensors[key]
        with np.errstate(all="ignore"):                    # what is not finite is reported below
            values = self.quants.dequantize(self._raw(key, start, stop), kind)
        return finite(values.reshape(stop - start, *shape[1:]), f"{self.path}: {key}")

    def _raw(self, key: str, start: int, stop: int) -> np.ndarray:
        """The bytes of some rows; of a vector's numbers, those of some numbers."""
        shape, kind, offset = self.tensors[key]
        block, size = self.sizes[kind]
        width = shape[-1] // block * size
        raw = np.frombuffer(self.map, np.uint8, math.prod(shape[:-1]) * width, offset)
        if ".q_proj." in key or ".k_proj." in key:
            return raw.reshape(shape[0], -1)[self._order(key, shape[0])[start:stop]]
        if len(shape) > 1:
            return raw.reshape(shape[0], -1)[start:stop]
        return raw[start * width // shape[0] : stop * width // shape[0]]

    def _order(self, key: str, rows: int) -> np.ndarray:
        """Which stored row is row 0, 1, … of q or k.

        llama.cpp rotates neighbours (2i, 2i+1) where Hugging Face rotates (i, i + hd/2), so the file has row h·hd + j·hd/2 + i
        in place h·hd + 2i + j.
        """
        heads = self.metadata["llama.attention.head_count"]
        if ".k_proj." in key:
            heads = self.metadata.get("llama.attention.head_count_kv", heads)
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


def llama_name(name: str) -> str:
    """llama.cpp's name of a tensor -> the one in Hugging Face's files; an unknown one stays as it is.

    >>> llama_name("blk.7.ffn_up.weight")
    'model.layers.7.mlp.up_proj.weight'
    """
    module, _, leaf = name.rpartition(".")
    first, _, rest = module.partition(".")
    i, _, rest = rest.partition(".")
    ours = {theirs: ours for ours, theirs in GGUF.items()}
    if first == "blk" and i.isdecimal() and (path := ours.get(f"blk.{{i}}.{rest}")):
        return f"{LLAMA[path].format(i=int(i))}.{leaf}"
    return f"{LLAMA[ours[module]]}.{leaf}" if module in ours else name
