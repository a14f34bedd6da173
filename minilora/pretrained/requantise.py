"""What merging into 4 bits would leave of an update: it is measured, and then not done.

A code moves only where ΔW exceeds half the gap to the next one. Updates of fine-tuning are about a hundredth of W, the gaps
between codes about a tenth, so rounding W + ΔW again gives nearly the old codes, and the fine-tune is gone.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from ..autograd import Tensor, no_grad
from ..backend import to_device, to_host
from ..lora import adapters_of, merge_and_unload
from ..lora.files import load_adapter
from ..lora.layer import changes, dense, strengthened
from ..methods.block_layers import Rows
from ..methods.blocks import BlockWeight
from ..methods.four_bit import FourBit
from ..methods.ggml_blocks import GgmlBlocks
from ..nn import Transformer
from .adapters import EditReport, relative
from .hub import need
from .load import load_pretrained
from .save import save_pretrained

COLUMNS = {"format": "format", "norm": "‖ΔW‖", "relative": "/ ‖W‖", "codes": "codes", "kept": "kept", "error": "error"}


def requantised(model: Transformer, name: str = "default") -> EditReport:
    """What would be left of an adapter, merged into the base's 4 bits. Nothing is changed.

    For each module on a quantised weight W, with ΔW = W' - W and Q the base's own format: norm = ‖ΔW‖_F, relative = ‖ΔW‖/‖W‖,
    codes = the share of codes that change, kept = ⟨Q(W') - W, ΔW⟩ / ‖ΔW‖² (1 is all, 0 nothing), and error =
    ‖Q(W') - W'‖ / ‖ΔW‖; the summary has the same of all together. Any method that changes a weight.

    Raises KeyError for an unknown adapter, ValueError if none of its modules is on a quantised weight.
    """
    modules, rows, sums = dict(model.named_modules()), dict[str, dict[str, Any]](), list[np.ndarray]()
    for path, adapter in adapters_of(model, name).items():
        weight: Any = getattr(modules[path], "weight", None)
        if not isinstance(weight, (BlockWeight, Rows)) or not changes(adapter, "adapted_weight"):
            continue
        with no_grad():
            W: Any = dense(modules[path])                  # type: ignore[arg-type]
            new = strengthened(adapter, Tensor(W.data)).data
        blocks, start, found = weight.blocks if isinstance(weight, Rows) else [weight], 0, np.zeros(6)
        for block in blocks:
            cut = slice(start, start := start + block.shape[0])
            again = _rounded(block, new[cut])
            now, then, rounded = (to_host(a).astype(np.float64) for a in (W.data[cut], new[cut], again.dense()))
            delta, differing = then - now, to_host(again.codes) ^ to_host(block.codes)
            found += [(delta**2).sum(), (now**2).sum(), ((rounded - now) * delta).sum(), ((rounded - then) ** 2).sum(),
                      np.count_nonzero(differing & 15) + np.count_nonzero(differing >> 4), now.size]
        rows[path] = {"format": format_of(blocks[0])} | _numbers(found)
        sums.append(found)
    if not rows:
        raise ValueError(f"adapter {name!r} changes no quantised weight, expected a base in 4 bits: quantise(model), or "
                         "load_pretrained(..., quantised=True)")
    return EditReport(dict(sorted(rows.items())), {"modules": len(rows)} | _numbers(np.sum(sums, axis=0)), [], COLUMNS)


def format_of(weight: Any) -> str:
    """The name of a quantised weight's format."""
    return weight.kind if isinstance(weight, GgmlBlocks) else weight.quant_type


def _rounded(old: Any, W: Any) -> Any:
    """W in the format of an old weight."""
    if isinstance(old, FourBit):
        return FourBit(W, old.quant_type, old.outer is not None)
    raw = need("gguf.quants").quantize(to_host(W).astype(np.float32), need("gguf.constants").GGMLQuantizationType[old.kind])
    return GgmlBlocks(to_device(raw), old.kind, old.compute_dtype)


def _numbers(found: np.ndarray) -> dict[str, Any]:
    update, size, along, off, codes, count = found.tolist()
    return {"norm": math.sqrt(update), "relative": relative(math.sqrt(update), math.sqrt(size)), "codes": codes / count,
            "kept": relative(along, update), "error": relative(math.sqrt(off), math.sqrt(update))}


def merge_gguf(base: str | os.PathLike[str], directory: str | os.PathLike[str], out: str | os.PathLike[str], *,
               dequantise: bool = False) -> EditReport:
    """Merge an adapter into a GGUF file's model: refused into its 4 bits, saying what would be left; dense if asked for.

    dequantise: write the merged weights in float32, as a folder in Hugging Face layout, to `out`; the report says what the 4
    bits would have kept. Raises ValueError without it, and as load_pretrained and load_adapter do.
    """
    model, tokenizer = load_pretrained(base, quantised=True)
    load_adapter(model, directory)
    report = requantised(model)
    kind, kept, codes = next(iter(report.modules.values()))["format"], report.summary["kept"], report.summary["codes"]
    if not dequantise:
        raise ValueError(f"{base} is in {kind}: rounded to it again, {100 * (kept or 0.0):.2g} % of the update would be left "
                         f"and {100 * codes:.2g} % of the codes change; expected a dense base: write the merge in float32 "
                         "(--dequantise), or keep the adapter apart")
    model, _ = load_pretrained(base)
    load_adapter(model, directory)
    save_pretrained(merge_and_unload(model), tokenizer, out)
    report.notes.append(f"written in float32, where nothing is lost; codes, kept and error are what {kind} would have done")
    return report
