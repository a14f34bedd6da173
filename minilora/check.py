"""The checker that students call: check.NAME(answer) judges an exercise, in a second, beside the cell.

    ✓ lora_grad: 5 cases          right
    ○ lora_grad: not attempted yet
    ✗ lora_grad: dA: a factor s is missing

A verdict is true only if the answer is right. In strict mode a verdict that is not ✓ raises AssertionError: when
MINILORA_CHECK=strict, or while nbgrader runs the notebook (it sets NBGRADER_EXECUTION).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .course import Verdict, exercises


def __getattr__(name: str) -> Callable[..., Verdict]:
    """check.NAME: the judge of the exercise of that name."""
    if name.startswith("_") or name not in exercises():
        raise AttributeError(f"no exercise is called {name!r}; there are: {', '.join(exercises())}")
    exercise = exercises()[name]

    def judge(answer: Any, seed: int = 0) -> Verdict:
        verdict = exercise.judge(answer, seed)
        if not verdict and strict():
            raise AssertionError(repr(verdict))
        return verdict

    return judge


def strict() -> bool:
    """Whether a verdict that is not ✓ raises."""
    return os.environ.get("MINILORA_CHECK") == "strict" or "NBGRADER_EXECUTION" in os.environ
