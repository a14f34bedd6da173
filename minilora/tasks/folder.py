"""The folder of a fine-tuning: the state of a run that is not finished, and then the adapter with its card and numbers.

While a run goes on, OUT/checkpoint holds run.json (what run it is, and the metrics before it) and the training's checkpoint.
When it is finished all files get their place at once, and the checkpoint goes.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..lora.files import save_adapter
from ..pretrained.hub import SHORT
from ..pretrained.tensors import new_folder
from .presets import task_named
from .report import FinetuneReport

CHECKPOINT, RUN, FACTS, REPORT, CARD = "checkpoint", "run.json", "minilora.json", "report.json", "README.md"


def usable(folder: Path, force: bool, base: Path) -> Path:
    """The folder, if a run on this base may begin or go on in it; nothing is made yet.

    Raises ValueError for a file, one that cannot be written, the base's own, whose weights would be replaced, or one that holds
    something else than an unfinished run (without force).
    """
    if base.exists() and folder.resolve() == (base.parent if base.is_file() else base).resolve():
        raise ValueError(f"the output {folder} holds the base {base}: give another folder, or the base would be replaced")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} is a file, expected a folder: give another name")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {there}, expected a folder for the output {folder}: give another one")
    old = sorted(folder.iterdir()) if folder.is_dir() else []
    if old and not force and not (folder / CHECKPOINT / RUN).exists():
        raise ValueError(f"the output {folder} is not empty (it has {old[0].name}): give a new folder, or force to replace "
                         "what is there (--force)")
    return folder


def begin(folder: Path, facts: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """The metrics before training, if the folder holds the unfinished run with these facts; None if a new one begins.

    Raises ValueError if it holds another unfinished run; with force that one is removed.
    """
    path = folder / CHECKPOINT / RUN
    if not path.exists():
        return None
    try:
        saved = read_object(path)
        before, old, own = dict(saved["before"]), _flat(saved["facts"]), _flat(json.loads(json.dumps(facts)))
    except (ValueError, LookupError, TypeError, AttributeError):
        what = f"{path} is damaged, expected the state of an unfinished run"
    else:
        different = next((key for key in own if old.get(key) != own[key]), None)
        if different is None:
            return before
        what = (f"{folder} holds an unfinished run with another {different}: got {old.get(different)!r}, this run has "
                f"{own[different]!r}: repeat the call of that run to finish it")
    if not force:
        raise ValueError(f"{what}: give another folder, or force to begin anew (--force)")
    shutil.rmtree(folder / CHECKPOINT)
    return None


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with each of the settings by its own name."""
    return {**facts["settings"], **{name: value for name, value in facts.items() if name != "settings"}}


def remember(folder: Path, facts: dict[str, Any], before: dict[str, Any]) -> None:
    """Write down which run this is. Raises OSError, in one line, if the folder cannot be written."""
    path = folder / CHECKPOINT / RUN
    part = path.with_name(f".{RUN}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"facts": facts, "before": before}, indent=1), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): make room, or give another folder") from None
    finally:
        with suppress(OSError):                            # it has its own name by now
            part.unlink()
            path.parent.rmdir()                            # not if a run is in it


def finish(folder: Path, report: FinetuneReport) -> None:
    """Write the adapter, minilora.json, report.json and README.md, all or nothing, and remove the checkpoint.

    Raises OSError, in one line, if they cannot be written; the checkpoint stays, so the same call needs only to write again.
    """
    facts = report.facts
    base, labels = base_name(facts["base"]), facts["labels"]
    known = {"base": base if Path(facts["base"]).exists() else facts["base"], "task": facts["task"],
             "head": task_named(facts["task"]).head, "max_length": facts["max_length"], "chat": facts["chat"],
             "quantise": facts["settings"]["quantise"],
             "id2label": None if labels is None else {str(i): name for i, name in enumerate(labels)}}
    try:
        with new_folder(folder, force=True) as part:
            save_adapter(report.model, part, base_model=base)
            for name, text in ((FACTS, json.dumps(known, indent=2, ensure_ascii=False)),
                               (REPORT, json.dumps(report.to_dict(), indent=1)), (CARD, report.card(base))):
                (part / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror or error}): make room and repeat the call, which goes on "
                      "from the checkpoint there") from None
    shutil.rmtree(folder / CHECKPOINT)


def base_name(source: str) -> str:
    """What PEFT calls the base: the hub's id of a short name, the whole path of a folder."""
    if Path(source).exists():
        return str(Path(source).absolute())
    return SHORT[source][2] if source in SHORT else source


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a run left. Raises FileNotFoundError without the file, ValueError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fine-tune again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object: fine-tune again")
    return found
