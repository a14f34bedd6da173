"""The course: ten lessons' exercises, and the building and grading of their notebooks.

    exercise.py     what an exercise is and how an answer is judged
    diagnose.py     what the numbers of a wrong answer say by themselves
    lesson_NN.py    the exercises of each lesson: cases, oracles, known mistakes; never the answer
    lab.py          the small base and task that the lessons share

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
