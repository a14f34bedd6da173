"""The checker that students call: check.NAME(answer) judges an exercise, in a second, beside the cell.

    ✓ lora_grad: 5 cases          right
    ○ lora_grad: not attempted yet
    ✗ lora_grad: dA: a factor s is missing

A verdict is true only if the answer is right. In strict mode a verdict that is not ✓ raises AssertionError: when
MINILORA_CHECK=strict, or while nbgrader runs the notebook (it sets NBGRADER_EXECUTION).

Around the exercises: guess and compare (a prediction before its experiment), hint, progress; and for every LoRA, not only the
course's: is_lora (five tests) and audit (which arrays changed).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from .course import Exercise, Verdict, exercises
from .course.five_tests import Audit, LoraReport, audit, is_lora

__all__ = ["Audit", "LoraReport", "audit", "compare", "guess", "hint", "is_lora", "progress", "strict"]

_guesses: dict[str, Any] = {}              # of this process: a notebook's kernel
_hints_given: dict[str, int] = {}
_verdicts: dict[str, Verdict] = {}


def __getattr__(name: str) -> Callable[..., Verdict]:
    """check.NAME: the judge of the exercise of that name."""
    if name.startswith("_") or name not in exercises():
        raise AttributeError(f"no exercise is called {name!r}; there are: {', '.join(exercises())}")
    exercise = exercises()[name]

    def judge(answer: Any, seed: int = 0) -> Verdict:
        verdict = _verdicts[name] = exercise.judge(answer, seed)
        if not verdict and strict():
            raise AssertionError(repr(verdict))
        return verdict

    return judge


def __dir__() -> list[str]:
    return [*__all__, *exercises()]


def strict() -> bool:
    """Whether a verdict that is not ✓ raises."""
    return os.environ.get("MINILORA_CHECK") == "strict" or "NBGRADER_EXECUTION" in os.environ


def guess(key: str, value: Any = None) -> None:
    """Store a prediction until compare(key, ...) shows it beside what was measured. None: none made."""
    _guesses[key] = value


def compare(key: str, measured: Any, unit: str = "") -> None:
    """Print the prediction stored under key beside what was measured: 04.loss: you said 2.0, measured 1.79."""
    said, found = _guesses.get(key), f"measured {_shown(measured)}{' ' + unit if unit else ''}"
    none_made = said is None or said is ...
    print(f"{key}: {found} (no guess made)" if none_made else f"{key}: you said {_shown(said)}, {found}")


def hint(exercise: str) -> None:
    """Print the next hint of an exercise, given by its name or its id ("03.1")."""
    found = _find(exercise)
    given = _hints_given.get(found.name, 0)
    if given >= len(found.hints):
        print(f"{found.name}: no more hints; the answer stands in notebooks/solutions/")
        return
    _hints_given[found.name] = given + 1
    print(f"{found.name}, hint {given + 1} of {len(found.hints)}: {found.hints[given]}")


def progress(lesson: int | str | None = None) -> None:
    """Print the ✓ ○ ✗ of this session, one line an exercise; of one lesson only if its number is given (3 or "03")."""
    listed = [each for each in exercises().values() if lesson is None or each.lesson == int(lesson)]
    if not listed:
        raise ValueError(f"lesson {lesson} has no exercises; expected one of "
                         f"{', '.join(map(str, sorted({each.lesson for each in exercises().values()})))}")
    for each in listed:
        verdict = _verdicts.get(each.name)
        print(f"{'○' if verdict is None else verdict.mark} {each.id}  {each.name}: {each.title}")
    print(f"{sum(bool(_verdicts.get(each.name)) for each in listed)} of {len(listed)} right")


def _find(exercise: str) -> Exercise:
    """The exercise of a name or an id."""
    for each in exercises().values():
        if exercise in (each.name, each.id):
            return each
    raise ValueError(f"no exercise is called {exercise!r}; expected a name or an id such as "
                     f"{', '.join(f'{each.name} ({each.id})' for each in list(exercises().values())[:3])}")


def _shown(value: Any) -> str:
    """A value for a line of text: four digits of a float."""
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value.item()
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(_shown, value))
    return str(value)
