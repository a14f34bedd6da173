"""Whatever stops a write, a full disk or an interrupt at any step, what was there stays or is gone: nothing is half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import minilora as ml
from minilora import plots
from minilora.backend.files import whole_files
from minilora.cli import main
from minilora.pretrained import reference
from minilora.studies.common import write_json
from minilora.training.checkpoint import load_checkpoint, save_checkpoint

resource = pytest.importorskip("resource")


def content(folder):
    """Path -> bytes; of safetensors the header as JSON, since the library writes its metadata in any order."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    sizes = {name: 8 + int.from_bytes(data[:8], "little") for name, data in files.items() if name.endswith(".safetensors")}
    return files | {name: (json.loads(files[name][8:n]), files[name][n:]) for name, n in sizes.items()}


def gpt2(seed, width=32):
    cfg = ml.TransformerConfig.gpt2(vocab_size=50, d_model=width, n_layers=1, n_heads=2, max_len=8, model_type="gpt2")
    return ml.Transformer(cfg, seed=seed)


def adapted(seed):
    model = gpt2(0)
    ml.add_adapter(model, ml.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False), seed=seed)
    return model


def figure(seed):
    values = np.random.default_rng(seed).random(50)
    made, ax = plt.subplots()
    ax.plot(values)
    return made


# name -> (folder, seed) -> writes there what depends on the seed
WRITERS = {
    "adapter": lambda folder, seed: ml.save_adapter(adapted(seed), folder),
    "model": lambda folder, seed: ml.save_pretrained(gpt2(seed), None, folder),
    "checkpoint": lambda folder, seed: save_checkpoint(folder, {"a": np.full(5000, float(seed))}, {"seed": seed}),
    "report": lambda folder, seed: write_json(folder / "report.json", {"values": [seed] * 5000}),
    "figure": lambda folder, seed: plots.save(figure(seed), folder / "figure"),
    "cases": lambda folder, seed: reference.write(folder, seed=seed, force=True),
    "resized": lambda folder, seed: ml.resize(source(folder, seed), folder, rank=6, force=True),
    "merged": lambda folder, seed: ml.merge_checkpoint(based(folder), source(folder, seed), folder, force=True),
}
CHANGING = {"adapter": ["adapter_model.safetensors"], "model": ["model.safetensors"], "checkpoint": ["checkpoint.safetensors"],
            "report": ["report.json"], "figure": ["figure.png", "figure.svg"], "cases": ["linear-float64.safetensors"],
            "resized": ["adapter_model.safetensors"], "merged": ["model.safetensors"]}
writers = pytest.mark.parametrize("name", WRITERS)


def source(folder, seed):
    path = folder.parent / f"source-{seed}"
    if not path.exists():
        ml.save_adapter(adapted(seed), path)
    return path


def based(folder):
    path = folder.parent / "base"
    if not path.exists():
        ml.save_pretrained(gpt2(0), None, path)
    return path


@pytest.fixture
def full_disk():
    """with full_disk(): no file may grow beyond so many bytes; the write that tries fails, as it does on a full disk."""
    @contextmanager
    def limited(n):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return limited


@writers
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_what_was_there(name, there, tmp_path, full_disk):
    write, folder = WRITERS[name], tmp_path / "out"
    for seed in (1, 2):                                        # what the writers read
        write(tmp_path / "scratch", seed)
    shutil.rmtree(tmp_path / "scratch")
    if there:
        write(folder, 1)
    before = content(tmp_path)
    for limit in (0, 3000):
        with full_disk(limit), pytest.raises(OSError, match=r"cannot write .* to .*: give a .* with room for it") as caught:
            write(folder, 2)
        assert "\n" not in str(caught.value)
        assert content(tmp_path) == before and folder.exists() == there
    write(folder, 2)                                           # nothing is in the way of the next try
    again = content(folder)
    shutil.rmtree(folder)
    write(folder, 2)
    assert content(folder) == again and all(before.get(f"out/{key}") != again[key] for key in CHANGING[name] if there)
    plt.close("all")


@pytest.mark.slow
@writers
def test_an_interrupt_at_any_rename_leaves_no_mixture(name, tmp_path, monkeypatch):
    """The old files, the new ones, or a folder without its mark, which nobody takes for whole."""
    write, folder, real = WRITERS[name], tmp_path / "out", os.replace
    write(folder, 1)
    old = content(folder)
    write(tmp_path / "new", 2)
    new = content(tmp_path / "new")
    seen = set()
    for stop in range(len(new) + 1):
        shutil.rmtree(folder)
        write(folder, 1)
        old, left = content(folder), [stop]

        def replace(*paths, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            real(*paths)

        monkeypatch.setattr(os, "replace", replace)
        with suppress(KeyboardInterrupt):
            write(folder, 2)
        monkeypatch.setattr(os, "replace", real)
        now = content(folder)
        assert not list(tmp_path.rglob(".*"))
        marked = {"adapter_config.json", "config.json"} & old.keys()
        kind = "new" if now == new else "old" if now == old else "mixed"
        seen.add(kind)
        assert all(now[key] in (old[key], new[key]) for key in now)
        assert kind != "mixed" or not marked & now.keys() or name in ("figure", "cases")
        if name not in ("figure", "cases") and len(new) == 1:
            assert kind != "mixed"
    assert "new" in seen
    plt.close("all")


def test_the_disk_is_full_by_its_own_error(tmp_path):
    """ENOSPC, which a limit on files does not give."""
    (tmp_path / "old.json").write_text("old")
    message = r"cannot write a report to .*No space left on device.*with room for it"
    with pytest.raises(OSError, match=message), whole_files(tmp_path, "a report") as folder:
        (folder / "old.json").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert content(tmp_path) == {"old.json": b"old"}


def test_errors_about_what_is_read_stay_what_they_are(tmp_path):
    for missing in (tmp_path / "missing", Path("/missing")):
        with pytest.raises(FileNotFoundError) as caught, whole_files(tmp_path / "out", "a report"):
            missing.read_text()
        assert caught.value.filename == str(missing)
    with pytest.raises(ZeroDivisionError), whole_files(tmp_path / "out", "a report"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot write a report to .*: give a folder"), whole_files(folder, "a report"):
            raise AssertionError("work was done")
    assert content(tmp_path) == {"file": b"kept"}
    ml.save_adapter(adapted(1), tmp_path / "adapter")
    assert main(["resize", str(tmp_path / "adapter"), "--rank", "2", "-o", str(tmp_path / "file" / "below")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_marks_come_last_and_the_stale_go_first(tmp_path):
    for name in ("config.json", "old.bin", "kept.txt"):
        (tmp_path / name).write_text("old")
    with whole_files(tmp_path, "a model", marks=["config.json"], stale=["old.bin", "never.bin"]) as folder:
        (folder / "config.json").write_text("new")
        (folder / "weights").mkdir()
        (folder / "weights" / "a").write_text("new")
        assert (tmp_path / "old.bin").exists() and (tmp_path / "config.json").read_text() == "old"
    assert content(tmp_path) == {"config.json": b"new", "kept.txt": b"old", "weights/a": b"new"}


def test_a_checkpoint_that_cannot_be_written_is_read_as_the_last_one(tmp_path, full_disk):
    save_checkpoint(tmp_path, {"a": np.arange(3.0)}, {"step": 1})
    with full_disk(500), pytest.raises(OSError, match="cannot write a checkpoint"):
        save_checkpoint(tmp_path, {"a": np.zeros(3000)}, {"step": 2})
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1] == {"step": 1}
