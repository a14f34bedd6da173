"""A lesson of two exercises, small enough to build and grade in a test."""

from __future__ import annotations

from minilora.course import Exercise, Mistake
from minilora.course.source import parse, text_hash

_TEXT = '''"""What stands here is a comment."""

# %% [markdown]
# # 03 · A tiny lesson
#
# See [the sheet](TEACH.md), [elsewhere](https://example.org) and [below](#end).

# %% [markdown] lang="zh" of="{hash}"
# # 03 · 一课

# %% [markdown] teacher=true
# Draw W' = W + s·B·A on the board.

# %%
import numpy as np
import tiny_lessons

from minilora import check

check.exercises = tiny_lessons.exercises
twice = 2.0

# %% [markdown]
# ### Exercise 03.1 · ●●○ · 5 min

# %% exercise="tiny_double"
def tiny_double(x):
    """Twice x: (n,) -> (n,)."""
    # BEGIN SOLUTION
    return np.multiply(x, twice)
    # END SOLUTION

# %% check="tiny_double"
check.tiny_double(tiny_double)

# %% exercise="tiny_count"
count = ...
# BEGIN SOLUTION
count = 7 * 6
# END SOLUTION

# %% check="tiny_count"
check.tiny_count(count)

# %% exact=true
print("one")
print("two")

# %% [markdown] slide=true
# The end
'''
SOURCE = _TEXT.replace("{hash}", text_hash(parse(_TEXT)[0].source))


def exercises() -> dict[str, Exercise]:
    """tiny_double, a function, and tiny_count, a value."""
    double = Exercise(
        id="03.1", name="tiny_double", title="Double", difficulty=2, minutes=5, hints=("add x to itself",),
        cases=lambda rng: [{"x": rng.standard_normal(n)} for n in (3, 1)], expected=lambda x: x + x,
        mistakes=(Mistake("a square is not a double", lambda x: x * x), Mistake("that is x", lambda x: x),
                  Mistake("three times is too much", lambda x: 3 * x)))
    count = Exercise(id="03.2", name="tiny_count", title="Count", difficulty=1, minutes=1, hints=("six times seven",),
                     expected=lambda: 42, mistakes=(Mistake("one more", 41), Mistake("one less", 43), Mistake("half", 84)))
    return {"tiny_double": double, "tiny_count": count}
