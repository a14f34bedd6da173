"""From a lesson's source to its notebooks, one way only: an edited notebook is not read back.

    notebooks/NN_name.ipynb               solutions blanked, run, what a student opens
    notebooks/solutions/NN_name.ipynb     the same with solutions, not run: also what nbgrader generates assignments from
    notebooks/LANG/NN_name.ipynb          the text in another language, with the outputs of the English one

Written so that the same source gives the same bytes: ids by position, no times, no versions, text and PNG outputs only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .exercise import Exercise
from .source import Cell, answer_of, blanked, in_language, lessons, outdated, read

__all__ = ["build", "execute", "faults", "notebook_of"]

Notebook = dict[str, Any]
LARGEST = 200_000                      # bytes of one output
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)")
_PRIVATE = re.compile(r"(?<![\w.])(?:/(?:home|Users|root|tmp|work|usr|opt|var)/|[A-Z]:\\)|\bat 0x[0-9a-f]{6,}")


def build(folder: Path, registry: Mapping[str, Exercise], numbers: list[str] | None = None, *, lang: str = "en",
          quick: bool = False, check: bool = False) -> Iterator[str]:
    """Build the notebooks of some lessons (default all) in a notebooks folder; yields a line for each that is done.

    quick: run every cell in its short form (MINILORA_QUICK=1) and write nothing. check: run nothing and write nothing, compare
    the notebooks there with the sources. Raises ValueError if a notebook is behind its source, a translation behind its text,
    a cell writes to stderr, or an `exact` cell prints something else than before; RuntimeError if a cell raises.
    """
    for path in lessons(folder, numbers):
        cells = read(path)
        if check:
            _compare(folder, path, cells, registry)
            yield f"{path.stem}: as the source has it"
            continue
        target = folder / (lang if lang != "en" else "") / f"{path.stem}.ipynb"
        notebook = notebook_of(in_language(cells, lang), registry, depth=int(lang != "en"))
        if lang != "en":
            _refuse_outdated(path, cells)
            _take_outputs(notebook, _load(folder / f"{path.stem}.ipynb"), path.stem)
        else:
            execute(notebook, folder, quick=quick)
            _refuse_faults(path.stem, notebook)
        if quick:
            if target.exists():
                _same_exact(path.stem, notebook, _load(target))
            yield f"{path.stem}: ran"
            continue
        _write(target, notebook)
        if lang == "en":
            _write(folder / "solutions" / target.name, notebook_of(in_language(cells), registry, solved=True, depth=1))
        yield f"{path.stem}: {target}"


def notebook_of(cells: list[Cell], registry: Mapping[str, Exercise], *, solved: bool = False, depth: int = 0) -> Notebook:
    """The notebook of some cells, not run. depth: how many folders below notebooks/ it will lie, for its links.

    Raises ValueError for an exercise without checker, check cell or solution region.
    """
    answers = {name: answer_of(cell.source, name) for cell in cells if (name := cell.attributes.get("check"))}
    built: list[dict[str, Any]] = []
    for index, cell in enumerate(cells):
        metadata: dict[str, Any] = {}
        source = cell.source
        if cell.kind == "markdown":
            source = _LINK.sub(lambda link: f"]({'../' * depth}{link[1]})", source)
        name = cell.attributes.get("exercise") or cell.attributes.get("check")
        if name and name not in registry:
            raise ValueError(f"line {cell.line}: no exercise is called {name!r}; expected it in minilora/course/lesson_NN.py")
        if name and not answers.get(name):
            raise ValueError(f'line {cell.line}: expected a cell check="{name}" with check.{name}(answer)')
        graded = {"grade": False, "grade_id": name, "locked": False, "schema_version": 3, "solution": False, "task": False}
        if cell.attributes.get("exercise"):
            try:
                source = source if solved else blanked(source)
            except ValueError as error:
                raise ValueError(f"line {cell.line}, exercise {name!r}: {error}") from None
            metadata = {"minilora": {"exercise": name, "answer": answers[name]}, "nbgrader": {**graded, "solution": True}}
        elif name:
            points = registry[name].difficulty
            metadata = {"nbgrader": {**graded, "grade": True, "grade_id": f"check_{name}", "locked": True, "points": points}}
        if tags := [*cell.attributes.get("tags", []), *(["exact"] if cell.attributes.get("exact") else [])]:
            metadata["tags"] = tags
        if cell.attributes.get("slide"):
            metadata["slideshow"] = {"slide_type": "slide"}
        built.append({"cell_type": cell.kind, "id": f"c{index:03d}", "metadata": metadata, "source": source}
                     | ({"execution_count": None, "outputs": []} if cell.kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": built, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4,
            "nbformat_minor": 5}


def execute(notebook: Notebook, folder: Path, *, quick: bool = False) -> None:
    """Run a notebook's cells in a fresh kernel with `folder` as working directory; the outputs go into it.

    Raises ImportError without nbclient and nbformat, RuntimeError that names the cell if one raises.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'minilora[notebooks-dev]'") from None
    node = nbformat.from_dict(notebook)
    with _environment(MINILORA_QUICK="1" if quick else "0", NBGRADER_EXECUTION=None, MINILORA_CHECK=None, MPLBACKEND=None):
        try:
            NotebookClient(node, timeout=900, kernel_name="python3", record_timing=False, extra_arguments=["--log-level=40"],
                           resources={"metadata": {"path": str(folder)}}).execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            ran = [cell for cell in node.cells if cell.cell_type == "code" and cell.execution_count]
            said = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
            which = f"cell {ran[-1].id}, which begins {ran[-1].source.splitlines()[0]!r}," if ran else "the kernel"
            arrow = re.search(r"(?m)^-+> \d+ (.*)", re.sub(r"\x1b\[[\d;]*m", "", getattr(error, "traceback", "")))
            where = f", in {arrow[1].strip()!r}" if arrow else ""
            raise RuntimeError(f"{which} failed: {said.strip()}{where}") from None
    for cell, ran in zip(notebook["cells"], node.cells, strict=True):
        if cell["cell_type"] == "code":
            cell["execution_count"] = ran.execution_count
            cell["outputs"] = _cleaned(ran.outputs)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Environment variables for the kernel that is started inside; None takes one away."""
    before = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _cleaned(outputs: Any) -> list[dict[str, Any]]:
    """A cell's outputs with their text or their PNG and nothing else; a stream that came in pieces is one."""
    kept: list[dict[str, Any]] = []
    for output in json.loads(json.dumps(outputs)):
        if "data" in output:
            kind = "image/png" if "image/png" in output["data"] else "text/plain"
            output |= {"data": {kind: output["data"].get(kind, "")}, "metadata": {}}
        if kept and output["output_type"] == "stream" and kept[-1].get("name") == output["name"]:
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def faults(notebook: Notebook) -> list[str]:
    """What must not stand in a notebook that is shown: stderr, errors, widgets, large outputs, paths and addresses."""
    found = ["metadata.widgets: GitHub refuses to show it"] if "widgets" in notebook["metadata"] else []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(_text(output))
            if output.get("name") == "stderr":
                found.append(f"{cell['id']} writes to stderr: {' '.join(text.split())[:200]}")
            if output["output_type"] == "error":
                found.append(f"{cell['id']} raises {output['ename']}")
            if extra := set(output.get("data", {})) - {"text/plain", "image/png"}:
                found.append(f"{cell['id']} shows {', '.join(sorted(extra))}; expected text or PNG")
            if len(json.dumps(output)) > LARGEST:
                found.append(f"{cell['id']} has an output of {len(json.dumps(output)):,} bytes; at most {LARGEST:,}")
            if private := _PRIVATE.search(text):
                found.append(f"{cell['id']} prints what only this machine has: {text[private.start():private.start() + 60]!r}")
    return found


def _text(output: Mapping[str, Any]) -> list[str]:
    text = output.get("text", output.get("data", {}).get("text/plain", ""))
    return [text] if isinstance(text, str) else text


def _refuse_faults(name: str, notebook: Notebook) -> None:
    if found := faults(notebook):
        raise ValueError(f"{name}: {'; '.join(found[:3])}")


def _refuse_outdated(path: Path, cells: list[Cell]) -> None:
    if old := outdated(cells):
        cell, expected = old[0]
        raise ValueError(f"{path.name}, line {cell.line}: the text was changed after its translation ({len(old)} such cells); "
                         f'bring it up to date and write of="{expected}"')


def _load(path: Path) -> Notebook:
    if not path.exists():
        raise ValueError(f"{path} is not there: minilora course build {path.name[:2]}")
    found = json.loads(path.read_text(encoding="utf-8"))
    for cell in found["cells"]:
        cell["source"] = "".join(cell["source"])
    return found


def _write(path: Path, notebook: Notebook) -> None:
    """As Jupyter writes it (text as lists of lines), under a temporary name first."""
    def lines(text: Any) -> Any:
        return text.splitlines(keepends=True) if isinstance(text, str) else text
    cells = []
    for cell in notebook["cells"]:
        outputs = [output | ({"text": lines(output["text"])} if "text" in output else {}) for output in cell.get("outputs", [])]
        cells.append(cell | {"source": lines(cell["source"])} | ({"outputs": outputs} if "outputs" in cell else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    text = json.dumps(notebook | {"cells": cells}, indent=1, ensure_ascii=False, sort_keys=True)
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)


def _inputs(notebook: Notebook) -> list[Any]:
    return [[cell["cell_type"], cell.get("id"), cell["metadata"], cell["source"]] for cell in notebook["cells"]]


def _compare(folder: Path, path: Path, cells: list[Cell], registry: Mapping[str, Exercise]) -> None:
    """Raise ValueError if a notebook has other cells than its source gives: English, solutions, each translation."""
    _refuse_outdated(path, cells)
    name = f"{path.stem}.ipynb"
    expected = {folder / name: notebook_of(in_language(cells), registry),
                folder / "solutions" / name: notebook_of(in_language(cells), registry, solved=True, depth=1)}
    for lang in sorted({str(cell.attributes["lang"]) for cell in cells if "lang" in cell.attributes}):
        expected[folder / lang / name] = notebook_of(in_language(cells, lang), registry, depth=1)
    for target, fresh in expected.items():
        mine, theirs = _inputs(_load(target)), _inputs(fresh)
        if mine != theirs:
            where = next((i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), min(len(mine), len(theirs)))
            raise ValueError(f"{target} is not what {path.name} gives (first difference in cell {where}): "
                             f"edit the source, then minilora course build {path.name[:2]}")


def _take_outputs(notebook: Notebook, other: Notebook, name: str) -> None:
    """Give the code cells of a translation the outputs of the English notebook."""
    pairs = [[cell for cell in each["cells"] if cell["cell_type"] == "code"] for each in (notebook, other)]
    if [cell["source"] for cell in pairs[0]] != [cell["source"] for cell in pairs[1]]:
        raise ValueError(f"{name}.ipynb is not what its source gives: minilora course build {name[:2]}, then its translations")
    for mine, theirs in zip(*pairs, strict=True):
        mine["outputs"], mine["execution_count"] = theirs["outputs"], theirs["execution_count"]


def _same_exact(name: str, ran: Notebook, committed: Notebook) -> None:
    """Raise ValueError if a cell tagged exact printed another text than stands in the committed notebook."""
    before = {cell["source"]: cell["outputs"] for cell in committed["cells"] if cell["cell_type"] == "code"}
    for cell in ran["cells"]:
        if "exact" in cell["metadata"].get("tags", []) and cell["source"] in before:
            got, kept = ("".join("".join(_text(output)) for output in outputs)
                         for outputs in (cell["outputs"], before[cell["source"]]))
            if got != kept:
                raise ValueError(f"{name}, {cell['id']}: printed {got[:80]!r}, the notebook says {kept[:80]!r}; "
                                 "expected the same text on every machine from a cell marked exact")
