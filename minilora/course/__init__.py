"""The course: ten lessons' exercises, and the building and grading of their notebooks.

    exercise.py     what an exercise is and how an answer is judged
    diagnose.py     what the numbers of a wrong answer say by themselves
    lesson_NN.py    the exercises of each lesson: cases, oracles, known mistakes; never the answer
    five_tests.py   is_lora and audit: for every recipe, not only the course's
    lab.py          the small base and task that the lessons share
    source.py       a lesson's text and code as it is written, in one file
    build.py        from there to the notebooks, one way only
    grade.py        a pile of students' files -> a table (runner.py runs one answer)
    sheets.py       the teacher's sheet, and test files for otter-grader
    command.py      `minilora course`

Students call minilora.check; the notebooks' sources are in notebooks/src/.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from .exercise import Case, Exercise, Mistake, Verdict

__all__ = ["Case", "Exercise", "Mistake", "Verdict", "exercises"]


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises by their names, in the order of the lessons. Raises ValueError if two share a name or an id."""
    found: dict[str, Exercise] = {}
    for module in sorted(module.name for module in iter_modules(__path__) if module.name.startswith("lesson_")):
        for exercise in import_module(f"{__name__}.{module}").EXERCISES:
            if exercise.name in found or any(exercise.id == other.id for other in found.values()):
                raise ValueError(f"two exercises are called {exercise.name} or {exercise.id}: names and ids are unique")
            found[exercise.name] = exercise
    return found
