"""An exercise: what is asked, how an answer is judged, and the wrong answers that are known.

An answer is a function (or a plain value, read as a function of nothing). It is called with copies of seeded cases and compared
with an oracle that is finite differences, a closed form or a law, so that reading this source does not give the answer away.
Shapes are compared before values, because allclose broadcasts. A wrong answer gets one hint: from the exercise's own catalogue
if one of its mistakes gives the same numbers in every case, otherwise from the numbers alone (course/diagnose.py): what they
say in every case that is wrong, for with r = s = 2 a missing r looks like a missing s.
"""

from __future__ import annotations

import copy
import dis
import functools
import os
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..autograd import Tensor
from .diagnose import agree, diagnose

Case = dict[str, Any]
Law = Callable[[Callable[..., Any], np.random.Generator], str | None]

RIGHT, OPEN, WRONG = "✓", "○", "✗"


def one_call(rng: np.random.Generator) -> Sequence[Case]:
    """The cases of an answer that is a value, or a function of nothing."""
    return [{}]


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

    def _ipython_display_(self) -> None:
        """nbgrader reads the value of a cell as points; so while it runs, the verdict is printed, and is no value."""
        if "NBGRADER_EXECUTION" not in os.environ:
            raise NotImplementedError                      # shown as usual
        print(repr(self))


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson.

    name: students call check.NAME(answer).                 id: lesson and number, "03.1".
    cases(rng): the keyword arguments of each call; non-square, with sizes of 1 among them. Default: one call without arguments.
    expected(**case): the right outputs, by another way than the answer's formula. None: the laws alone judge, and the cases, if
        given, only tell which mistake was made.
    outputs: the outputs' names, in order; empty for a single unnamed value.
    laws: each (answer, rng) -> None, or the hint for an answer that breaks it. They run after the cases. The answer they get is
        a function (of nothing for a value), or the class that the student wrote.
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
    cases: Callable[[np.random.Generator], Sequence[Case]] = one_call
    outputs: tuple[str, ...] = ()
    laws: tuple[Law, ...] = ()
    scalars: Callable[[Case], dict[str, float]] | None = None
    rtol: float = 1e-7

    @property
    def lesson(self) -> int:
        """The number of the lesson, 1 to 10."""
        return int(self.id.split(".")[0])

    def judge(self, answer: Any, seed: int = 0) -> Verdict:
        """The verdict on an answer: a function, a class, or a plain value.

        Never raises for a bad answer: an exception inside it is a wrong answer whose hint names the exception, and only
        KeyboardInterrupt passes. seed: which cases; another seed gives other numbers under the same law.
        """
        if _empty(answer) or _blank(answer):
            return Verdict(self.name, OPEN, "not attempted yet")
        unused = self.expected is None and self.cases is one_call
        cases = [] if unused else list(self.cases(np.random.default_rng(seed)))
        with _quiet():
            try:
                hint = self._hint(answer, cases, seed)
            except _Silent:
                return Verdict(self.name, OPEN, "it ran, and returned nothing yet: is its return missing?")
            except NotImplementedError:
                return Verdict(self.name, OPEN, "not attempted yet")
        if hint:
            return Verdict(self.name, WRONG, hint)
        return Verdict(self.name, RIGHT, f"{len(cases)} cases" if self.expected and len(cases) > 1 else "right")

    def _hint(self, answer: Any, cases: list[Case], seed: int) -> str | None:
        """None for a right answer, else its hint. Raises NotImplementedError if nothing was answered."""
        if not callable(answer) and any(cases):
            return f"expected a function, got {type(answer).__name__}; give the function itself, without calling it"
        answers = []
        for case in cases:
            given = copy.deepcopy(case)
            try:
                answers.append(_kept(answer(**given) if callable(answer) else answer))
            except NotImplementedError:
                raise
            except (Exception, SystemExit) as error:                      # whatever a student's code raises is their answer
                return _raised(error)
            if _empty(answers[-1]):
                raise _Silent if answers[-1] is None and not _bodiless(answer) else NotImplementedError
            for name, before in case.items():
                if not _untouched(before, given[name]):
                    return f"it changed its input {name} in place; return a new one"
        if self.expected is not None:
            found = [self._differs(case, got) for case, got in zip(cases, answers, strict=True)]
            wrong = [lines for lines in found if lines]
            if wrong:
                common = [line for line in wrong[0] if all(line in lines for lines in wrong)]
                return self._known(cases, answers) or (common or wrong[0][-1:])[0]
        for law in self.laws:
            watched = _Watched(answer)
            try:
                hint = law(answer if isinstance(answer, type) else watched, np.random.default_rng(seed))
            except NotImplementedError:
                raise
            except (Exception, SystemExit) as error:
                hint = _raised(error)
            if hint is not None:
                if watched.gave_nothing:
                    raise NotImplementedError
                return (None if self.expected else self._known(cases, answers)) or hint
        return None

    def _differs(self, case: Case, got: Any) -> list[str]:
        """Nothing if an answer agrees with the oracle, else what its numbers alone say."""
        assert self.expected is not None
        expected = self.expected(**copy.deepcopy(case))
        numbers = {name: float(value) for name, value in case.items()
                   if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)}
        return diagnose(got, expected, self.outputs, self.scalars(case) if self.scalars else numbers, self.rtol)

    def _known(self, cases: list[Case], answers: list[Any]) -> str | None:
        """The hint of the first mistake that gives these answers in every case."""
        for mistake in self.mistakes if cases else ():
            function = mistake.answer
            try:
                if all(agree(got, function(**copy.deepcopy(case)) if callable(function) else function, self.rtol)
                       for case, got in zip(cases, answers, strict=True)):
                    return mistake.hint
            except Exception:                                             # this mistake cannot be made in these cases
                continue
        return None


class _Silent(NotImplementedError):
    """A function that has a body, and gave None."""


class _Watched:
    """An answer as a function for a law, which remembers whether its calls gave anything."""

    def __init__(self, answer: Any) -> None:
        if callable(answer):
            functools.update_wrapper(self, answer)
        self._answer, self._calls, self._empty = answer, 0, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._calls += 1
        result = self._answer(*arguments, **named) if callable(self._answer) else self._answer
        self._empty += _empty(result)
        return result

    @property
    def gave_nothing(self) -> bool:
        """Whether it was called, and gave ... or None every time."""
        return 0 < self._calls == self._empty


def _empty(answer: Any) -> bool:
    """Whether nothing was answered yet: ..., None, or only such things."""
    several = list(answer.values()) if isinstance(answer, dict) else answer if isinstance(answer, tuple | list) else []
    return answer is None or answer is ... or (len(several) > 0 and all(map(_empty, several)))


def _blank(answer: Any) -> bool:
    """Whether an answer is a class of which some method has no body but `...`."""
    return isinstance(answer, type) and any(_bodiless(method) for method in vars(answer).values()
                                            if isinstance(method, types.FunctionType))


def _bodiless(answer: Any) -> bool:
    """Whether an answer is no Python function, or one whose body is empty: a docstring, `...`, pass, return None."""
    if not isinstance(answer, types.FunctionType):
        return True
    steps = [step for step in dis.get_instructions(answer) if step.opname not in ("RESUME", "NOP", "COPY_FREE_VARS")]
    return (all(step.opname in ("LOAD_CONST", "RETURN_CONST", "RETURN_VALUE") for step in steps)
            and all(step.argval is None for step in steps if step.opname.endswith("CONST")))


def _kept(result: Any) -> Any:
    """A copy of what an answer gave, which its next call can not write into."""
    try:
        return copy.deepcopy(result)
    except Exception:                                                     # a generator, a module: no answer to anything
        return result


def _untouched(before: Any, given: Any) -> bool:
    """Whether an input is what it was before the call; what cannot be compared is taken as unchanged."""
    if isinstance(before, np.ndarray):
        return (isinstance(given, np.ndarray) and before.shape == given.shape and before.dtype == given.dtype
                and (before.dtype.hasobject or before.tobytes() == given.tobytes()))
    if isinstance(before, tuple | list):
        return len(before) == len(given) and all(map(_untouched, before, given))
    if isinstance(before, dict):
        return before.keys() == given.keys() and all(_untouched(value, given[key]) for key, value in before.items())
    if isinstance(before, Tensor):
        return _untouched(before.data, given.data)
    plain = isinstance(before, bool | int | float | complex | str | set | bytearray)
    return type(before) is type(given) and (before == given or before != before) if plain else True    # NaN is not itself


def _raised(error: BaseException) -> str:
    """One line about an exception inside an answer."""
    text = " ".join(str(error).split())
    return f"it raised {type(error).__name__}{': ' if text else ''}{text[:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings while answers are judged: an overflow in a wrong answer is not news."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
