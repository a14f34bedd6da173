"""Grade a pile of students' notebooks (or .py files) without a grading system: a table, a CSV, and the commonest hints.

Each answer runs in a process of its own with a time limit, and only its own cells run (course/runner.py): deleted, copied and
split cells, endless loops and sys.exit() cost one line. A process is no sandbox: grade where you would run the students' code.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backend.parallel import cores
from . import exercises
from .exercise import Exercise
from .runner import plain
from .source import answer_of

__all__ = ["GradeReport", "Row", "grade"]

VERDICTS = {"✓": "right", "○": "open", "✗": "wrong"}


@dataclass(frozen=True)
class Row:
    """One answer: the file, the exercise, right | open | wrong | broken, and the hint."""

    name: str
    exercise: str
    verdict: str
    hint: str


@dataclass(frozen=True)
class GradeReport:
    """All rows, in the order of the files."""

    rows: list[Row]

    def commonest(self) -> dict[str, tuple[int, str]]:
        """{exercise: (how often, the hint that the most wrong answers got)}."""
        found: dict[str, Counter[str]] = {}
        for row in self.rows:
            if row.verdict == "wrong":
                found.setdefault(row.exercise, Counter())[row.hint] += 1
        return {name: (counts.most_common(1)[0][1], counts.most_common(1)[0][0]) for name, counts in found.items()}

    def table(self) -> str:
        """The rows, then how many are right in each exercise and its commonest hint."""
        names = list(dict.fromkeys(row.exercise for row in self.rows if row.exercise))
        wide = max([len(row.name) for row in self.rows] + [4])
        lines = [f"{row.name:<{wide}}  {row.exercise:<24}{row.verdict:<8}{row.hint}".rstrip() for row in self.rows]
        often = self.commonest()
        for name in names:
            mine = [row for row in self.rows if row.exercise == name]
            count = Counter(row.verdict for row in mine)
            lines.append(f"{name}: {count['right']} of {len(mine)} right, {count['open']} open"
                         + (f"; {often[name][0]} times: {often[name][1]}" if name in often else ""))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: {"rows": [...], "commonest": {exercise: [count, hint]}}."""
        return {"rows": [vars(row) for row in self.rows], "commonest": self.commonest()}

    def write_csv(self, path: Path) -> None:
        """name, exercise, verdict, hint: a header and a line for each row. Cells that a spreadsheet would run are quoted."""
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("name", "exercise", "verdict", "hint"))
            for row in self.rows:
                writer.writerow([f"'{value}" if value.startswith(tuple("=+-@\t\r")) else value for value in vars(row).values()])


@dataclass
class _Answers:
    """A file's code cells, and for each exercise the name of its answer and the cells that may give it."""

    sources: list[str]
    answers: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[int]] = field(default_factory=dict)


def grade(files: Sequence[Path], registry_of: Callable[[], Mapping[str, Exercise]] = exercises, *, seconds: float = 20.0,
          seed: int = 0, workers: int | None = None) -> GradeReport:
    """The verdict on every exercise of the lessons that each file belongs to.

    registry_of: where the exercises come from, a function at the top of a module: each answer's process imports it again.
    A file that cannot be read is one row with the verdict "broken". Raises nothing for what a student wrote.
    """
    registry = registry_of()
    job = {"registry": f"{registry_of.__module__}:{registry_of.__qualname__}", "seed": seed}

    def of_file(path: Path) -> list[Row]:
        try:
            found = _find(path, registry)
        except (OSError, ValueError, SyntaxError, TypeError, AttributeError, KeyError, RecursionError) as error:
            return [Row(str(path), "", "broken", " ".join(str(error).split())[:200] or type(error).__name__)]
        chosen = {registry[name].lesson for name in found.answers}
        if not chosen:
            return [Row(str(path), "", "broken", "no exercise of the course found in it")]
        return [_row(path, exercise, found, job, seconds) for exercise in registry.values() if exercise.lesson in chosen]

    with ThreadPoolExecutor(workers or cores()) as pool:
        return GradeReport([row for rows in pool.map(of_file, files) for row in rows])


def _find(path: Path, registry: Mapping[str, Exercise]) -> _Answers:
    """Read a file and look, without running it, where its answers are."""
    found = _Answers([])
    marked: list[tuple[str, int, str | None]] = []
    if path.suffix == ".ipynb":
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
            raise ValueError("no notebook: it has no list of cells")
        for cell in notebook["cells"]:
            if cell.get("cell_type") != "code":
                continue
            metadata = cell.get("metadata") or {}
            name = (metadata.get("minilora") or {}).get("exercise") or (metadata.get("nbgrader") or {}).get("grade_id")
            if isinstance(name, str) and name in registry:
                marked.append((name, len(found.sources), (metadata.get("minilora") or {}).get("answer")))
            found.sources.append("".join(cell["source"]))
    else:
        text = path.read_text(encoding="utf-8")
        found.sources = (re.split(r"(?m)^# %%.*$", text) if re.search(r"(?m)^# %%", text) else
                         [ast.get_source_segment(text, statement) or "" for statement in ast.parse(text).body])
    calls = {name: (answer, i) for i, source in enumerate(found.sources) for name in registry
             if f"check.{name}" in source and (answer := answer_of(plain(source), name))}
    defined = [_defined(source) for source in found.sources]
    for name in registry:
        cells = [(i, answer) for each, i, answer in marked if each == name]
        if cells or name in calls:
            found.answers[name] = calls[name][0] if name in calls else next((a for _, a in cells if a), name)
    for name in registry:
        if name not in found.answers and any(name in names for names in defined):
            found.answers[name] = name
    for name, answer in found.answers.items():
        shared = sum(other == answer for other in found.answers.values()) > 1
        places = [i for each, i, _ in marked if each == name]
        if not shared:
            places += [i for i, names in enumerate(defined) if answer in names]
        elif not places and name in calls:                                # the last definition before its check
            places += [i for i, names in enumerate(defined) if answer in names and i <= calls[name][1]][-1:]
        found.places[name] = sorted(set(places))
    return found


def _defined(source: str) -> set[str]:
    """The names that a cell defines or assigns at its top level."""
    try:
        body = ast.parse(plain(source)).body
    except (SyntaxError, ValueError):
        return set()
    names = {statement.name for statement in body if isinstance(statement, ast.FunctionDef | ast.ClassDef)}
    for statement in body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return names


def _row(path: Path, exercise: Exercise, found: _Answers, job: dict[str, Any], seconds: float) -> Row:
    """The verdict on the last answer to an exercise that is not empty."""
    row = Row(str(path), exercise.name, "open", "not found in the file")
    for index in reversed(found.places.get(exercise.name, [])):
        mark, text = _judged(job | {"sources": found.sources, "index": index, "answer": found.answers[exercise.name],
                                    "exercise": exercise.name}, seconds)
        row = Row(str(path), exercise.name, VERDICTS[mark], "" if mark == "✓" else text)
        if mark != "○":
            break
    return row


def _judged(job: dict[str, Any], seconds: float) -> tuple[str, str]:
    """(mark, text) of one answer, from a process of its own that is ended after some seconds."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MINILORA_CHECK", "NBGRADER_EXECUTION")}
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        result = Path(work) / "verdict.json"
        process = subprocess.Popen([sys.executable, "-m", "minilora.course.runner"], cwd=work, env=environment,
                                   text=True, encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.communicate(json.dumps(job | {"result": str(result)}), timeout=seconds)
        except subprocess.TimeoutExpired:
            return "✗", f"not done after {seconds:g} s: an endless loop?"
        except BrokenPipeError:
            pass
        finally:
            _end(process)
        try:
            found = json.loads(result.read_text(encoding="utf-8"))
            return found["mark"], found["text"]
        except (OSError, ValueError):
            return "✗", f"its process ended (exit code {process.returncode}) before there was a verdict"


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and what it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.communicate()
