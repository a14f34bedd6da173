"""What a lecturer gets out of the registry: the teacher's sheet (notebooks/TEACH.md), and test files for otter-grader."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from .exercise import Exercise
from .source import answer_of, lessons, read

__all__ = ["otter_files", "teachers_sheet"]

OTTER = '''from otter.test_files import test_case
OK_FORMAT = False
name, points = "{name}", {points}
@test_case(points={points}, hidden=False)
def test_{name}({names}):
    from minilora.course import exercises
    verdict = exercises()["{name}"].judge({answer}, seed={seed})
    assert verdict, repr(verdict)
'''


def teachers_sheet(folder: Path, registry: Mapping[str, Exercise]) -> str:
    """The text of TEACH.md: for each lesson what its source says to teachers, its exercises, the wrong answers to expect."""
    parts = ["# Teacher's sheet", "Made by `minilora course teach` from the lessons' sources and the checker's catalogue of "
             "wrong answers: edit those. The solutions are in [solutions/](solutions/)."]
    for path in lessons(folder):
        cells = read(path)
        mine = [exercise for exercise in registry.values() if exercise.lesson == int(path.name[:2])]
        title = next((cell.source.splitlines()[0].lstrip("# ") for cell in cells if cell.source.startswith("# ")), path.stem)
        parts.append(f"## [{title}]({path.stem}.ipynb)")
        parts += [cell.source for cell in cells if cell.attributes.get("teacher")]
        if not mine:
            continue
        rows = [f"| {each.id} | `{each.name}` | {each.title} | {'●' * each.difficulty}{'○' * (3 - each.difficulty)} "
                f"| {each.minutes} |" for each in mine]
        parts.append("\n".join(["| | exercise | asks | difficulty | minutes |", "|---|---|---|---|---|", *rows,
                                f"| | | all | | {sum(each.minutes for each in mine)} |"]))
        for each in mine:
            expected = "\n".join(f"- {hint}" for hint in dict.fromkeys(mistake.hint for mistake in each.mistakes))
            parts.append(f"Wrong answers to expect in {each.id} (what the checker says):\n\n{expected}")
    return "\n\n".join(parts) + "\n"


def otter_files(out: Path, folder: Path, registry: Mapping[str, Exercise], seed: int = 0) -> list[Path]:
    """Write one exception-based test file for each exercise whose lesson has a source; returns the paths.

    The student's answer reaches the test as the global of its name. Another seed gives other cases under the same law.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in lessons(folder):
        for cell in read(path):
            name = cell.attributes.get("check")
            if name is not None:
                answer = answer_of(cell.source, name) or name
                globals_used = sorted({node.id for node in ast.walk(ast.parse(answer)) if isinstance(node, ast.Name)})
                text = OTTER.format(name=name, points=registry[name].difficulty, answer=answer, seed=seed,
                                    names=", ".join(globals_used))
                written.append(out / f"{name}.py")
                written[-1].write_text(text, encoding="utf-8")
    if not written:
        raise ValueError(f"no exercise in the sources of {folder / 'src'}: give the notebooks folder with --notebooks")
    return written
