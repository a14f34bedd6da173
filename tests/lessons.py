"""The lessons' sources, for the tests: their exercises, and the solutions, run as `minilora course grade` runs answers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from minilora.course.runner import evaluate
from minilora.course.source import Cell, answer_of, blanked, in_language, lessons, read
from minilora.lora import METHODS

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = lessons(NOTEBOOKS)


@cache
def code_cells(path: Path) -> list[Cell]:
    return [cell for cell in in_language(read(path)) if cell.kind == "code"]


@cache
def places() -> dict[str, tuple[Path, int, str]]:
    """{exercise: (its source, the number of its code cell, the answer's name)}."""
    found = {}
    for path in SOURCES:
        cells = code_cells(path)
        for index, cell in enumerate(cells):
            if name := cell.attributes.get("exercise"):
                answers = [answer_of(each.source, name) for each in cells if each.attributes.get("check") == name]
                assert name not in found and len(answers) == 1 and answers[0], f"{path.name}: {name} has {len(answers)} checks"
                found[name] = (path, index, answers[0])
    return found


def answer(name: str, solved: bool = True) -> Any:
    """The solution of an exercise, or what a student finds in its place."""
    path, index, expression = places()[name]
    sources = [cell.source for cell in code_cells(path)]
    if not solved:
        sources = [blanked(cell.source) if cell.attributes.get("exercise") else cell.source for cell in code_cells(path)]
    before = dict(METHODS)
    try:
        return evaluate(sources, index, expression)
    finally:                                               # lesson 07 registers a method of its own
        METHODS.clear()
        METHODS.update(before)
