"""A checkpoint and an adapter to a merged checkpoint, W' = W + s·B@A, shard by shard, in the dtypes of the base.

A checkpoint in 16 bits cannot hold W + ΔW: what it stores is the nearest it has, and where ΔW is smaller than half a step
of W, nothing of it is left. So the merge measures what survived, from the very numbers it writes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.std import tqdm

from ..lora.peft_format import DTYPES
from .adapters import AdapterFolder, EditReport, relative
from .hub import located
from .requantise import merge_gguf
from .tensors import INDEX, Checkpoint, TensorFile, TensorWriter, encode, new_folder

ROWS = 1 << 22                                             # elements of a block of rows: what a merge holds beside one tensor
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")     # of the base alone
COLUMNS = {"dtype": "dtype", "shape": "shape", "norm": "‖ΔW‖", "kept": "kept", "error": "error"}
HEAD = "lm_head.weight"
BIASES = ("lora_bias", "bias")                             # options of an adapter that a merge knows


def merge_checkpoint(base: str | os.PathLike[str], directory: str | os.PathLike[str], out: str | os.PathLike[str], *,
                     untie: bool = False, force: bool = False, progress: bool = False,
                     dequantise: bool = False) -> EditReport:
    """Write to `out` the checkpoint `base` with the adapter of `directory` merged in; of any model, without its code.

    base: a folder with model.safetensors, or shards and their index; or a name, as for load_pretrained. Every tensor keeps its
    name, dtype and shard; the update is added in float64 (float32 for a base in 16 bits) and rounded once, to nearest even.
    Where the adapter's config says fan_in_fan_out, weights stored (in, out) get ΔWᵀ. lora_bias is added to the bias; trained
    biases (bias "lora_only" or "all") replace theirs, and so do modules saved whole, or are added where the base has none (a
    new classifier). Other files of the base are copied; weights in other formats are not, since they would be those of the
    base. untie: give a tied head its own tensor, so that an adapter on the table (or on the head) changes that one alone.
    force: replace a checkpoint in `out`. dequantise: for a base that is a GGUF file, whose 4 bits cannot hold the merge (see
    `merge_gguf`).

    The report has for each module norm = ‖ΔW‖_F, kept = ⟨W' - W, ΔW⟩ / ‖ΔW‖², the share of the update that survived
    rounding (1 is all, 0 nothing), and error = ‖W' - W - ΔW‖ / ‖ΔW‖; its summary has the same of all together.

    Raises FileNotFoundError and ValueError as read_adapter does, for damaged checkpoints, for a base that lacks a module or
    has another shape, for a tied table without untie, for sums that overflow, and for an `out` that cannot be used. Then
    nothing is left in `out`.
    """
    base = located(base)
    if base.suffix == ".gguf":
        with new_folder(out, [base, directory], force) as folder:
            return merge_gguf(base, directory, folder, dequantise=dequantise)
    if dequantise:
        raise ValueError(f"dequantise for {base}, expected a GGUF file: a checkpoint in Hugging Face layout is dense already")
    checkpoint, adapter = Checkpoint(base), AdapterFolder(directory, BIASES)
    plan = adapter_plan(checkpoint, adapter)
    notes = []
    table = tied_table(checkpoint, plan)
    if table is not None:
        if not untie:
            raise ValueError(f"the adapter changes {table if table in plan else HEAD}, and the base's head shares that table "
                             "(tie_word_embeddings): merged, both would change; untie to give the head a tensor of its own "
                             "(--untie)")
        notes.append(f"untied: {HEAD} is a tensor of its own, and config.json says tie_word_embeddings false")
    with new_folder(out, [base, directory], force) as folder:
        rows, added = _write(checkpoint, adapter, plan, table, folder, progress)
        notes += [f"{key} {shape} is new, the base has none: see that config.json fits (num_labels)" for key, shape in added]
        skipped = _copy_others(checkpoint.folder, folder, Path(out))
        if skipped:
            notes.append(f"not copied, since they hold the base's weights: {', '.join(skipped)}")
        if table is not None:
            config = checkpoint.config() | {"tie_word_embeddings": False}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _report(rows, notes)


def adapter_plan(checkpoint: Checkpoint, adapter: AdapterFolder) -> dict[str, tuple[str, str]]:
    """Tensor name in the base -> (module of the adapter, "delta" | "lora_bias" | "base_bias" | "weight" | "bias").

    A base saved without its head lacks the first part of every name (GPT-2's "transformer."), or has it where the adapter,
    trained on the bare model, does not.
    """
    trained = adapter.options["bias"] != "none"            # else a base's bias in the file is PEFT's copy of it
    biases = ("base_bias", "lora_bias") if trained else ("lora_bias",)         # the second, where a module has both

    def tensors(rename: Any) -> dict[str, tuple[str, str]]:
        plan: dict[str, tuple[str, str]] = {}
        for path, shape in adapter.shapes.items():
            plan |= {f"{rename(path)}.bias": (path, kind) for kind in biases if kind in shape}
            if "A" in shape:
                plan[f"{rename(path)}.weight"] = path, "delta"
            plan |= {f"{rename(path)}.{leaf}": (path, leaf) for leaf in ("weight", "bias") if leaf in shape}
        return plan

    inside = [path for path, shape in adapter.shapes.items() if "A" in shape or set(shape) == {"base_bias", "dtype"}]
    roots = {key.partition(".")[0] for key in checkpoint.files}
    renames = [lambda path: path, lambda path: path.partition(".")[2] if path in inside else path,
               *((lambda path, root=root: f"{root}.{path}" if path in inside else path) for root in sorted(roots))]
    plans = [tensors(rename) for rename in renames]
    missing = [sorted(key for key, (_, kind) in plan.items() if kind not in ("weight", "bias") and key not in checkpoint.files
                      and key != HEAD) for plan in plans]
    fits = [plan for plan, lacks in zip(plans, missing) if not lacks]
    if not fits:
        raise ValueError(f"{checkpoint.folder} has no tensor {missing[0][0]!r}, which the adapter changes"
                         f"{f', nor {len(missing[0]) - 1} others' if len(missing[0]) > 1 else ''}: expected the base that the "
                         "adapter was trained on (lora_bias needs layers with a bias)")
    for key, (path, kind) in fits[0].items():
        if key in checkpoint.files:
            _check(checkpoint, adapter, key, path, kind)
    return fits[0]


def _check(checkpoint: Checkpoint, adapter: AdapterFolder, key: str, path: str, kind: str) -> None:
    """Raise ValueError unless what is planned for a tensor has its shape, and its dtype is one that we can add to."""
    place, entry = checkpoint.place(key), adapter.shapes[path]
    if place.dtype not in DTYPES:
        raise ValueError(f"{key} of {checkpoint.folder} has dtype {place.dtype}, expected one of {', '.join(DTYPES)}: merge "
                         "into the full-precision base, not into a quantised one")
    if kind != "delta":
        if entry[kind].shape != place.shape:
            raise ValueError(f"{key}: got shape {entry[kind].shape} from the adapter, expected {place.shape}, the base's: "
                             "is it the base that the adapter was trained on?")
        return
    shape = (len(entry["B"]), entry["A"].shape[1])
    if place.shape != shape and not stored_flipped(adapter, path, place.shape):
        hint = ": the weight is stored (in, out), and the config lacks fan_in_fan_out" if place.shape == shape[::-1] else ""
        raise ValueError(f"{key}: got an update of shape {shape}, expected {place.shape}, the base's{hint}; is it the base "
                         "that the adapter was trained on?")
    if "base_weight" in entry:
        own = adapter[path]["base_weight"]
        if own.shape != place.shape or not np.array_equal(encode(key, own, place.dtype),
                                                          encode(key, checkpoint.array(key), place.dtype)):
            raise ValueError(f"{key}: the adapter brings its own base of shape {own.shape}, which is not this one of shape "
                             f"{place.shape}: merge into the base it was trained on, with the vocabulary resized as it was")


def stored_flipped(adapter: AdapterFolder, path: str, shape: tuple[int, ...]) -> bool:
    """Whether the base stores this weight as (in, out), as the adapter's config and the shape say. (Of GPT-2's layers the
    head is stored (out, in), whatever the config says.)"""
    entry = adapter.shapes[path]
    turned = entry["A"].shape[1], len(entry["B"])          # (in, out)
    return bool(adapter.options["fan_in_fan_out"]) and not entry["embedding"] and shape == turned


def tied_table(checkpoint: Checkpoint, plan: dict[str, Any]) -> str | None:
    """The table that a head shares, if the plan changes it or the head; else None."""
    tables = [key for key in checkpoint.files if key.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))]
    config = checkpoint.config()
    causal = any(name.endswith(("LMHeadModel", "ForCausalLM")) for name in config.get("architectures") or ())
    tied = config.get("tie_word_embeddings", causal and HEAD not in checkpoint.files)
    if len(tables) == 1 and tied and (causal or HEAD in checkpoint.files or HEAD in plan) and {tables[0], HEAD} & plan.keys():
        return tables[0]
    if HEAD in plan and HEAD not in checkpoint.files and plan[HEAD][1] == "delta":
        raise ValueError(f"{checkpoint.folder} has no tensor {HEAD!r}, which the adapter changes: expected the base that the "
                         "adapter was trained on")
    return None


def _write(checkpoint: Checkpoint, adapter: AdapterFolder, plan: dict[str, tuple[str, str]], table: str | None, folder: Path,
           progress: bool) -> tuple[dict[str, dict[str, Any]], list[tuple[str, tuple[int, ...]]]]:
    """All shards, the index if there is one, and what was found: rows of the report, and tensors that are new."""
    rows, added = dict[str, dict[str, Any]](), list[tuple[str, tuple[int, ...]]]()
    new = {key: None for key in plan if key not in checkpoint.files and key != HEAD}
    if HEAD not in checkpoint.files and (table is not None or HEAD in plan):
        new[HEAD] = None
    bar = tqdm(total=len(checkpoint.files) + len(new), desc="merge", delay=2, leave=False, disable=None if progress else True)
    weight_map = {key: file.path.name for key, file in checkpoint.files.items()}
    with bar:
        for name, file in checkpoint.shards.items():
            last = name == max(checkpoint.shards)
            keys = [*file.places, *(new if last else ())]
            with TensorWriter(folder / name, keys, file.metadata) as writer:
                for key in keys:
                    source = key if key in checkpoint.files else table if key == HEAD and table is not None else None
                    _one(checkpoint, adapter, plan, key, source, writer, rows)
                    if key in new:
                        weight_map[key] = name
                        if source is None:
                            added.append((key, tuple(writer.header[key]["shape"])))
                    bar.update()
    if (checkpoint.folder / INDEX).exists():
        index = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
        shards = [TensorFile(folder / name) for name in checkpoint.shards]
        total = sum(place.stop - place.start for shard in shards for place in shard.places.values())
        index |= {"metadata": (index.get("metadata") or {}) | {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return rows, added


def _one(checkpoint: Checkpoint, adapter: AdapterFolder, plan: dict[str, tuple[str, str]], key: str, source: str | None,
         writer: TensorWriter, rows: dict[str, dict[str, Any]]) -> None:
    """Write one tensor: as it is, replaced, or with its update."""
    path, kind = plan.get(key, ("", "as it is"))
    if kind == "as it is" and source is not None:
        place = checkpoint.place(source)
        writer.add_chunks(key, place.dtype, place.shape, checkpoint.files[source].chunks(source))
        return
    entry = adapter[path]
    if kind in ("weight", "bias", "base_bias"):            # saved whole
        dtype = checkpoint.place(source).dtype if source is not None else entry["dtype"]
        writer.add(key, entry[kind], dtype)
        return
    assert source is not None
    place, W = checkpoint.place(source), checkpoint.array(source)
    if kind == "lora_bias":
        writer.add(key, entry.get("base_bias", W) + entry["scale"] * entry["lora_bias"].astype(np.float64), place.dtype)
        return
    sums: dict[str, float] = {}
    flip = stored_flipped(adapter, path, W.shape)
    writer.add_chunks(key, place.dtype, place.shape, _merged(key, W, entry, place.dtype, flip, sums))
    size = sums["update"] ** 0.5
    rows[path] = {"dtype": place.dtype, "shape": list(W.shape), "norm": size, "kept": relative(sums["along"], sums["update"]),
                  "error": relative(sums["off"] ** 0.5, size)}


def _merged(key: str, W: np.ndarray, entry: dict[str, Any], dtype: str, flip: bool,
            sums: dict[str, float]) -> Iterable[bytes]:
    """The bytes of W + s·B@A (or of its transpose, where W lies so), in blocks of rows; adds up in `sums` what they lost."""
    wide: Any = np.float64 if dtype in ("F64", "F32") else np.float32
    left, right = (entry["A"].T, entry["B"].T) if flip else (entry["B"], entry["A"])
    left, right = left.astype(wide) * wide(entry["scale"]), right.astype(wide)
    step = max(1, ROWS // W.shape[1])
    sums.update(update=0.0, along=0.0, off=0.0)
    for start in range(0, len(W), step):
        old = W[start : start + step].astype(wide)
        update = left[start : start + step] @ right
        with np.errstate(over="ignore"):
            coded = encode(key, old + update, dtype)
        new = (coded.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else coded
        change = new.astype(wide)
        change -= old
        sums["update"] += float(np.vdot(update, update))
        sums["along"] += float(np.vdot(change, update))
        change -= update
        sums["off"] += float(np.vdot(change, change))
        yield coded.tobytes()


def _copy_others(source: Path, target: Path, out: Path) -> list[str]:
    """Copy what is no weight and not hidden; returns the names of the files left out."""
    skipped = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name == INDEX or path.resolve() == out.resolve():
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            skipped += [f"{path.name}/{name}" for name in _copy_others(path, target / path.name, out)]
            if not any((target / path.name).iterdir()):
                (target / path.name).rmdir()
        elif path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json"):
            skipped += [path.name] if not (target / path.name).exists() else []
        else:
            shutil.copyfile(path, target / path.name)      # follows links: the hub's cache is full of them
    return skipped


def _report(rows: dict[str, dict[str, Any]], notes: list[str]) -> EditReport:
    size = math.sqrt(sum(row["norm"] ** 2 for row in rows.values()))
    along = sum((row["kept"] or 0.0) * row["norm"] ** 2 for row in rows.values())
    off = math.sqrt(sum(((row["error"] or 0.0) * row["norm"]) ** 2 for row in rows.values()))
    total = {"modules": len(rows), "norm": size, "kept": relative(along, size**2), "error": relative(off, size)}
    return EditReport(dict(sorted(rows.items())), total, notes, COLUMNS)
