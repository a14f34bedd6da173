"""The checker is attacked: it accepts every solution, and no wrong answer that we could think of."""

import functools

import lessons
import numpy as np
import pytest

from minilora import check
from minilora.course import Case, Exercise, Mistake, exercises
from minilora.course.diagnose import agree, diagnose
from minilora.course.exercise import one_call

NAMES = list(exercises())
SOLVED = [name for name in NAMES if name in lessons.places()]


# ------------------------------------------------------------------------------------------------ every exercise there is
@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)], ids=["3 seeds", "20 seeds"])
@pytest.mark.parametrize("name", SOLVED)
def test_the_solution_passes(name, seeds):
    solution = lessons.answer(name)
    for seed in seeds:
        verdict = exercises()[name].judge(solution, seed)
        assert verdict, f"seed {seed}: {verdict!r}"


@pytest.mark.parametrize("name", SOLVED)
def test_what_a_student_finds_is_open(name):
    assert exercises()[name].judge(lessons.answer(name, solved=False)).mark == "○"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "number"), [(name, i) for name in NAMES for i in range(len(exercises()[name].mistakes))])
def test_each_mistake_fails_with_its_own_hint(name, number, seed):
    mistake = exercises()[name].mistakes[number]
    verdict = exercises()[name].judge(mistake.answer, seed)
    assert verdict.mark == "✗" and verdict.text == mistake.hint, verdict


def zero(value):
    return np.zeros_like(value) if isinstance(value, np.ndarray) else type(value)(0)


def constant(value):
    if isinstance(value, np.ndarray):
        return np.full_like(value, 0.5 if value.dtype.kind == "f" else 1)
    return True if isinstance(value, bool) else type(value)(3)


def transposed(value):
    return value.T if isinstance(value, np.ndarray) else value


def float32(value):
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return value.astype(np.float32)
    return np.float32(value) if isinstance(value, float) else value


def spoiled(how, value, seen):
    """A solution's output with every number in it spoiled; seen: whether that changed any."""
    if isinstance(value, tuple | list):
        return type(value)(spoiled(how, each, seen) for each in value)
    if isinstance(value, dict):
        return {key: spoiled(how, each, seen) for key, each in value.items()}
    if not isinstance(value, np.ndarray | np.generic | bool | int | float) or np.asarray(value).dtype.kind not in "biufc":
        return value
    new = how(value)
    old, got = np.asarray(value), np.asarray(new)
    seen.append(old.dtype != got.dtype or old.shape != got.shape or old.tobytes() != got.tobytes())
    return new


@pytest.mark.parametrize("how", [zero, constant, transposed, float32])
@pytest.mark.parametrize("name", SOLVED)
def test_spoiled_solutions_fail(name, how):
    solution, seen = lessons.answer(name), []
    if isinstance(solution, type):
        pytest.skip("the answer is a class: its laws and mistakes judge it")
    if callable(solution):
        @functools.wraps(solution)
        def answer(*arguments, **named):
            return spoiled(how, solution(*arguments, **named), seen)
    else:
        answer = spoiled(how, solution, seen)
    verdict = exercises()[name].judge(answer)
    if not any(seen):
        pytest.skip("no number of this answer can be spoiled so")
    assert verdict.mark == "✗", verdict


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_is_complete(name):
    exercise = exercises()[name]
    assert name.isidentifier() and name not in check.__all__ and not name.startswith("_")
    assert 1 <= exercise.lesson <= 10
    assert exercise.difficulty in (1, 2, 3) and exercise.minutes > 0 and 1 <= len(exercise.hints) <= 3
    assert 3 <= len(exercise.mistakes) <= 15
    assert all("\n" not in m.hint and len(m.hint) <= 160 for m in exercise.mistakes)
    assert exercise.expected or exercise.laws


# ------------------------------------------------------------------------------------------------- what the numbers say
B = np.arange(1.0, 13.0).reshape(3, 4) ** 1.3


@pytest.mark.parametrize(("got", "says"), [
    (B.T, "dA: transposed; expected shape (3, 4), got shape (4, 3)"), (B[:2], "dA: expected shape (3, 4), got shape (2, 4)"),
    (3.0, "dA: expected shape (3, 4), got one number"), (B.astype(np.float32), "computed in float32"),
    (B.astype(np.float16), "computed in float16"), (B + 0j, "expected real numbers, got complex ones"),
    (np.where(B > 9, np.nan, B), "dA: contains NaN"), (np.where(B > 9, np.inf, B), "dA: contains infinity"),
    (0 * B, "dA: all zero"), (-B, "dA: the sign is wrong"), (B / 2, "dA: a factor s is missing"),
    (B * 2, "a factor 1/s is missing"),
    (B / 4, "dA: a factor s² is missing"), (-B / 2, "dA: the sign is wrong and a factor s is missing"),
    (B * 10, "dA: right up to a constant factor; yours is 10 times too large"), (B / 5, "yours is 5 times too small"),
    (np.full_like(B, 7.0), "dA: every entry is 7"), (B * np.array([[1], [1], [2]]), "dA: only row 2 is wrong"),
    (B + np.eye(3, 4), "dA: 3 of 12 entries are wrong, the first at [0, 0]"),
    (B.tolist(), "dA: expected shape (3, 4), got list; make it an array with np.array"),
    (None, "dA: nothing returned for it yet"),
    ("text", "dA: expected shape (3, 4), got str"), (B.astype(object), "got ndarray"), (iter(B), "got "), (True, "got bool"),
])
def test_one_output(got, says):
    lines = diagnose((got,), (B,), ("dA",), {"s": 2.0, "one": 1.0, "none": 0.0}, 1e-7)
    assert says in lines[0] and not agree(got, B, 1e-7)


def test_square_arrays_and_stacks_are_known_as_transposed():
    square = np.arange(9.0).reshape(3, 3)
    assert diagnose(square.T, square, (), {}, 1e-7) == ["the answer: transposed"]
    stack = np.arange(24.0).reshape(2, 3, 4)
    assert "transposed; " in diagnose(np.swapaxes(stack, 1, 2), stack, (), {}, 1e-7)[0]


@pytest.mark.parametrize(("got", "expected"), [
    (np.bool_(True), True), (np.str_("W"), "W"), (28.0, 28), (np.int64(28), 28), (np.array(2.5), 2.5), ([B, B], (B, B)),
    (frozenset("ab"), {"a", "b"}), ({"b": 1.0, "a": B}, {"a": B, "b": 1}), (np.array([True, False]), np.array([True, False])),
    (np.array(["A", "B"]), np.array(["A", "B"])), (np.asfortranarray(B), B),
    (np.array([-np.inf, 1.0]), np.array([-np.inf, 1.0])),
    (B * (1 + 1e-9), B), ((), ()),
])
def test_the_same_answer_in_another_dress_agrees(got, expected):
    assert agree(got, expected, 1e-7) and diagnose(got, expected, (), {}, 1e-7) == []


@pytest.mark.parametrize(("got", "expected"), [
    (1, True), (True, 1), (np.array([1, 0]), np.array([True, False])), (np.array([True]), np.array([True, False])), ("w", "W"),
    (27.9999, 28), ([B], (B, B)),
    ({"a": B}, {"a": B, "b": 1}), ({"a": B, "c": 1}, {"a": B, "b": 1}), (["a"], {"a"}), (B[None], B),
    (np.nan, np.nan), (2.5 + 1e-5j, 2.5), (np.float32(2.5), 2.5), (np.ones((1,)), 1.0), (B.reshape(-1), B),
    (np.array([np.inf, 1.0]), np.array([-np.inf, 1.0])),
    (None, 3), (..., "text"), (lambda: 3, 3), (np.array(["A"]), np.array([1.0])), (np.array([1.0]), np.array(["A"])),
])
def test_another_answer_does_not(got, expected):
    assert not agree(got, expected, 1e-7)
    lines = diagnose(got, expected, (), {}, 1e-7)
    assert lines and all(line.startswith("the answer: ") and "\n" not in line for line in lines)


def test_outputs_are_counted_and_ordered():
    assert diagnose(B, (B, B), ("dA", "dB"), {}, 1e-7) == ["expected 2 outputs (dA, dB), got one ndarray"]
    assert diagnose((B,), (B, B), ("dA", "dB"), {}, 1e-7) == ["expected 2 outputs (dA, dB), got 1 outputs"]
    assert diagnose((2 * B, B[0], B), (B, 2 * B, B[0]), ("a", "b", "c"), {}, 1e-7) == [
        "the outputs are in the wrong order; return a, b, c"]
    assert diagnose((B, B + 1), (B, B), ("dA", "dB"), {}, 1e-7)[0].startswith("dB: ")


# ------------------------------------------------------------------------------------------------ how an answer is judged
def scaled(**more) -> Exercise:
    """y = s x, where a tenth of it, s twice, and a row of it are known mistakes."""
    def cases(rng: np.random.Generator) -> list[Case]:
        return [{"x": rng.standard_normal((3, 4)), "s": 2.0, "r": 2}, {"x": rng.standard_normal((1, 5)).T, "s": 2.0, "r": 3}]
    mistakes = (Mistake("not a tenth", lambda x, s, r: s * x / 10), Mistake("s twice", lambda x, s, r: s * s * x),
                Mistake("a row is no answer", lambda x, s, r: x[1] * s))
    given = {"id": "03.9", "name": "scaled", "title": "Scale", "difficulty": 1, "minutes": 1, "hints": ("one", "two"),
             "cases": cases, "expected": lambda x, s, r: np.multiply(x, s), "mistakes": mistakes}
    return Exercise(**(given | more))


def says(answer, **more) -> str:
    return repr(scaled(**more).judge(answer))


def test_verdicts():
    assert says(lambda x, s, r: s * x) == "✓ scaled: 2 cases" and bool(scaled().judge(lambda x, s, r: s * x))
    assert says(lambda x, s, r: s * x / 10) == "✗ scaled: not a tenth" and not scaled().judge(lambda x, s, r: s * x / 10)
    for nothing in (..., None, [...], lambda x, s, r: ..., lambda x, s, r: None, lambda x, s, r: (None, ...),
                    lambda x, s, r: {"y": ...}):
        assert says(nothing) == "○ scaled: not attempted yet"

    def to_do(x, s, r):
        raise NotImplementedError
    assert says(to_do) == "○ scaled: not attempted yet"

    def forgets(x, s, r):
        x = s * x
    assert says(forgets) == "○ scaled: it ran, and returned nothing yet: is its return missing?"


def test_a_hint_must_be_true_of_every_wrong_case():
    assert says(lambda x, s, r: x) == "✗ scaled: the answer: a factor s is missing"          # in the first case s = r
    assert says(lambda x, s, r: s * x * r) == "✗ scaled: the answer: a factor 1/r is missing"
    assert "not a tenth" not in says(lambda x, s, r: s * x / 10 + (len(x) > 4))               # the catalogue's in one case only
    assert "constant factor" in says(lambda x, s, r: s * x * (7 if len(x) == 3 else 9))


def test_whatever_an_answer_does_is_one_line():
    def leaves(x, s, r):
        raise SystemExit

    def recurses(x, s, r):
        return recurses(x, s, r)

    def gives(x, s, r):
        yield s * x

    class Odd:
        def __eq__(self, other):
            raise RuntimeError("no comparing")
        __hash__ = None

    for answer, text in (
            (leaves, "it raised SystemExit"), (recurses, "it raised RecursionError"), (gives, "use return, not yield"),
            (lambda x, s, r: 1 / 0, "it raised ZeroDivisionError: division by zero"), (lambda x, s, r: Odd(), "got Odd"),
            (lambda x, s: x, "it raised TypeError"), (3.0, "expected a function, got float"),
            (lambda x, s, r: np.array([1, None]), "got ndarray"), (lambda x, s, r: x / 0, "infinity"),
            (lambda x, s, r: (s * x).tolist(), "make it an array"), (Odd(), "expected a function, got Odd")):
        verdict = says(answer)
        assert verdict.startswith("✗ scaled: ") and text in verdict and "\n" not in verdict, verdict


def test_keyboard_interrupt_passes():
    def interrupted(x, s, r):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        scaled().judge(interrupted)


def test_an_answer_that_prints_is_judged_all_the_same(capsys):
    assert scaled().judge(lambda x, s, r: (print("✓"), s * x)[1])


@pytest.mark.parametrize("given", [np.ones(3), [np.ones(3)], {"W": np.ones(3)}, [1.0, 2.0]])
def test_inputs_may_not_be_written(given):
    def writes(W):
        held = W["W"] if isinstance(W, dict) else W[0] if isinstance(W, list) and not isinstance(W[0], float) else W
        held[0] = 5.0
        return 1.0

    exercise = scaled(cases=lambda rng: [{"W": given}], expected=lambda W: 1.0, mistakes=())
    assert repr(exercise.judge(writes)) == "✗ scaled: it changed its input W in place; return a new one"
    assert exercise.judge(lambda W: 1.0)


def test_an_answer_may_write_into_what_it_gave_before():
    store = np.zeros((3, 4))

    def same_array(x, s):
        np.multiply(x, s, out=store)
        return store

    def cases(rng):
        return [{"x": rng.standard_normal((3, 4)), "s": s} for s in (2.0, 3.0)]
    assert scaled(cases=cases, expected=lambda x, s: s * x, mistakes=()).judge(same_array)       # copied after each call


def test_inputs_that_are_not_contiguous_reach_the_answer_whole():
    wide = np.arange(24.0).reshape(4, 6)
    exercise = scaled(cases=lambda rng: [{"x": wide[::2, ::3]}, {"x": wide.T}], expected=lambda x: 2 * x, mistakes=())
    assert exercise.judge(lambda x: x + x)


def test_laws():
    def doubles(answer, rng):
        return None if answer(3) == 6 else "twice, please"
    exercise = scaled(cases=one_call, expected=None, laws=(doubles,), mistakes=())
    assert exercise.judge(lambda n: 2 * n) and repr(exercise.judge(lambda n: n)) == "✗ scaled: twice, please"
    assert exercise.judge(lambda n: ...).mark == "○"
    assert exercise.judge(lambda n: 1 / 0).text.startswith("it raised ZeroDivisionError")

    class Stub:
        """To be written."""

        def forward(self):
            return 1

        def backward(self):
            ...

    class Done(Stub):
        def backward(self):
            return 2

    judged = scaled(cases=one_call, expected=None, mistakes=(),
                    laws=(lambda answer, rng: None if answer().backward() == 2 else "two",))
    assert judged.judge(Stub).mark == "○" and judged.judge(Done)


def test_cases_without_an_oracle_name_the_mistake():
    def law(answer, rng):
        return None if answer(np.ones(2), 2.0, 1)[0] == 2 else "the law says no"
    exercise = scaled(expected=None, laws=(law,))
    assert exercise.judge(lambda x, s, r: s * x) and exercise.judge(lambda x, s, r: s * s * x).text == "s twice"
    assert exercise.judge(lambda x, s, r: x * 7.0).text == "the law says no"


# ------------------------------------------------------------------------------------------------------ the module itself
@pytest.fixture
def registry(monkeypatch):
    found = {"scaled": scaled(), "other": scaled(id="04.1", name="other", title="Other")}
    monkeypatch.setattr(check, "exercises", lambda: found)
    for store in ("_guesses", "_hints_given", "_verdicts"):
        monkeypatch.setattr(check, store, {})
    for variable in ("MINILORA_CHECK", "NBGRADER_EXECUTION"):
        monkeypatch.delenv(variable, raising=False)
    return found


def test_check_by_name(registry):
    assert check.scaled(lambda x, s, r: s * x) and not check.scaled(lambda x, s, r: x) and "scaled" in dir(check)
    with pytest.raises(AttributeError, match="there are: scaled, other"):
        check.scald  # noqa: B018


def test_a_verdict_is_no_value_of_its_cell_while_nbgrader_runs(registry, monkeypatch, capsys):
    """nbgrader takes what a cell evaluates to as points, so there IPython is told that the verdict has been displayed."""
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    verdict = check.scaled(lambda x, s, r: s * x)
    with pytest.raises(NotImplementedError):                       # IPython then shows the repr
        verdict._ipython_display_()
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    verdict._ipython_display_()
    assert capsys.readouterr().out == f"{verdict!r}\n"


@pytest.mark.parametrize("variable", [("MINILORA_CHECK", "strict"), ("NBGRADER_EXECUTION", "autograde")])
def test_strict(registry, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    assert check.scaled(lambda x, s, r: s * x)
    for answer, mark in ((..., "○"), (lambda x, s, r: x, "✗")):
        with pytest.raises(AssertionError, match=mark):
            check.scaled(answer)


def test_guess_and_compare(registry, capsys):
    check.guess("03.loss", 2)
    check.compare("03.loss", 1.79012)
    check.guess("03.loss", None)
    check.compare("03.loss", np.float64(1.79012), unit="nats")
    check.compare("never", (1, 2.5))
    check.guess("which", "A")
    check.compare("which", "B")
    assert capsys.readouterr().out.splitlines() == [
        "03.loss: you said 2, measured 1.79", "03.loss: measured 1.79 nats (no guess made)",
        "never: measured 1, 2.5 (no guess made)", "which: you said A, measured B"]


def test_hints_come_one_by_one(registry, capsys):
    for name in ("scaled", "03.9", "scaled"):
        check.hint(name)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(";")[0] for line in lines] == ["one", "two", "no more hints"]
    with pytest.raises(ValueError, match=r"scaled \(03.9\)"):
        check.hint("03.8")


def test_progress(registry, capsys):
    check.scaled(lambda x, s, r: s * x)
    check.other(lambda x, s, r: x)
    capsys.readouterr()
    check.progress()
    assert capsys.readouterr().out.splitlines() == ["✓ 03.9  scaled: Scale", "✗ 04.1  other: Other", "1 of 2 right"]
    check.progress("04")
    assert capsys.readouterr().out.splitlines() == ["✗ 04.1  other: Other", "0 of 1 right"]
    with pytest.raises(ValueError, match="expected one of 3, 4"):
        check.progress(9)
