"""An exercise: what is asked, how an answer is judged, and the wrong answers that are known.

An answer is a function (or a plain value, read as a function of nothing). It is called with copies of seeded cases and compared
with an oracle that is finite differences, a closed form or a law, so that reading this source does not give the answer away.
Shapes are compared before values, because allclose broadcasts. A wrong answer gets one hint: from the exercise's own catalogue
if one of its mistakes gives the same numbers in every case, otherwise from the numbers alone (course/diagnose.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .diagnose import agree, diagnose

Case = dict[str, Any]
Law = Callable[[Callable[..., Any], np.random.Generator], str | None]

RIGHT, OPEN, WRONG = "✓", "○", "✗"


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that is known: the function (or value) itself, and the one line that puts its author right."""

    hint: str
    answer: Any


@dataclass(frozen=True)
class Verdict:
    """What became of an answer: true only if it is right. Shown as one line: ✓ lora_grad: 5 cases."""

    name: str
    mark: str                     # ✓ right, ○ not attempted, ✗ wrong
    text: str

    def __bool__(self) -> bool:
        return self.mark == RIGHT

    def __repr__(self) -> str:
        return f"{self.mark} {self.name}: {self.text}"


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson.

    name: students call check.NAME(answer).                 id: lesson and number, "03.1".
    cases(rng): the keyword arguments of each call; non-square, with sizes of 1 among them. () -> one call without arguments.
    expected(**case): the right outputs, by another way than the answer's formula. None: the laws alone judge.
    outputs: the outputs' names, in order; empty for a single unnamed value.
    laws: each (answer, rng) -> None, or the hint for an answer that breaks it. They run after the cases.
    scalars(case): numbers whose missing factor a hint may name, as {"s": 2.0}; the case's own numbers if not given.
    mistakes: the catalogue. hints: at most three, each giving away more (check.hint).
    difficulty 1 to 3; minutes: what it takes a student. rtol is relative to the largest entry of an output.
    """

    id: str
    name: str
    title: str
    difficulty: int
    minutes: int
    hints: tuple[str, ...]
    mistakes: tuple[Mistake, ...]
    expected: Callable[..., Any] | None = None
    cases: Callable[[np.random.Generator], Sequence[Case]] = field(default=lambda rng: [{}])
    outputs: tuple[str, ...] = ()
    laws: tuple[Law, ...] = ()
    scalars: Callable[[Case], dict[str, float]] | None = None
    rtol: float = 1e-7

    @property
    def lesson(self) -> int:
        """The number of the lesson, 1 to 10."""
        return int(self.id.split(".")[0])

    def judge(self, answer: Any, seed: int = 0) -> Verdict:
        """The verdict on an answer: a function, or a plain value.

        Never raises for a bad answer: an exception inside it is a wrong answer whose hint names the exception.
        seed: which cases; another seed gives other numbers under the same law.
        """
        if _empty(answer):
            return Verdict(self.name, OPEN, "not attempted yet")
        function = answer if callable(answer) else lambda: answer
        cases = list(self.cases(np.random.default_rng(seed))) if self.expected else []
        answers = []
        for case in cases:
            given = copy.deepcopy(case)
            try:
                answers.append(function(**given))
            except NotImplementedError:
                return Verdict(self.name, OPEN, "not attempted yet")
            except Exception as error:                                    # whatever a student's code raises is their answer
                return self._wrong(f"it raised {type(error).__name__}: {error}")
            if _empty(answers[-1]):
                return Verdict(self.name, OPEN, "not attempted yet")
            for name, before in case.items():
                if isinstance(before, np.ndarray) and not np.array_equal(before, given[name], equal_nan=True):
                    return self._wrong(f"it changed its input {name} in place; return a new array")
        for case, got in zip(cases, answers, strict=True):
            assert self.expected is not None
            hint = self._differs(case, got, self.expected(**copy.deepcopy(case)))
            if hint is not None:
                return self._wrong(self._known(cases, answers) or hint)
        for law in self.laws:
            try:
                hint = law(function, np.random.default_rng(seed))
            except NotImplementedError:
                return Verdict(self.name, OPEN, "not attempted yet")
            except Exception as error:
                hint = f"it raised {type(error).__name__}: {error}"
            if hint is not None:
                return self._wrong(hint)
        return Verdict(self.name, RIGHT, "right" if len(cases) < 2 else f"{len(cases)} cases")

    def _wrong(self, hint: str) -> Verdict:
        return Verdict(self.name, WRONG, hint)

    def _differs(self, case: Case, got: Any, expected: Any) -> str | None:
        """None if an answer agrees with the oracle, else what its numbers alone say."""
        numbers = {name: float(value) for name, value in case.items()
                   if isinstance(value, int | float) and not isinstance(value, bool)}
        return diagnose(got, expected, self.outputs, self.scalars(case) if self.scalars else numbers, self.rtol)

    def _known(self, cases: list[Case], answers: list[Any]) -> str | None:
        """The hint of the first mistake that gives these answers in every case."""
        for mistake in self.mistakes:
            function = mistake.answer if callable(mistake.answer) else lambda value=mistake.answer: value
            try:
                if all(agree(got, function(**copy.deepcopy(case)), self.rtol)
                       for case, got in zip(cases, answers, strict=True)):
                    return mistake.hint
            except Exception:                                             # this mistake cannot be made in these cases
                continue
        return None


def _empty(answer: Any) -> bool:
    """Whether nothing was answered yet: ..., None, or only such things."""
    several = isinstance(answer, tuple | list) and len(answer) > 0
    return answer is None or answer is ... or (several and all(map(_empty, answer)))
