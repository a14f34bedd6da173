"""One answer of a notebook, brought to life outside the notebook: its imports, its functions, and the exercise's own cell.

Nothing else of the notebook runs, so a cell that is broken, deleted or slow does not stand in the way. As a program
(python -m minilora.course.runner) it judges one answer for course/grade.py: JSON in on stdin, JSON out to a file.
"""

from __future__ import annotations

import ast
import json
import linecache
import sys
from pathlib import Path
from typing import Any

from . import exercises

__all__ = ["evaluate"]

MEMORY = 8 * 2**30                     # bytes of address space that an answer may take, where the system can say so


def evaluate(sources: list[str], index: int, answer: str) -> Any:
    """The value of the expression `answer` after cell `index`, given what all cells import, define and set to a plain value.

    Raises what the cell itself raises; what only another cell raises is passed over.
    """
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        try:
            body = ast.parse(plain(source)).body
        except SyntaxError:
            continue
        for statement in body:
            if _harmless(statement):
                try:
                    _run(ast.Module([statement], []), source, number, space)
                except Exception:                                         # another cell's fault, or a name that comes later
                    continue
    _run(ast.parse(plain(sources[index])), sources[index], index, space)
    return eval(answer, space)


def plain(source: str) -> str:
    """A cell without IPython's own lines (%magic, !command)."""
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


def _harmless(statement: ast.stmt) -> bool:
    """Whether a statement of another cell may run: an import, a definition, a name for a plain value."""
    if isinstance(statement, ast.Assign):
        try:
            ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError):
            return False
        return True
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _run(tree: ast.Module, source: str, number: int, space: dict[str, Any]) -> None:
    name = f"<cell {number}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)      # for inspect.getsource
    exec(compile(tree, name, "exec"), space)


def main() -> None:
    """Judge what stdin describes: {sources, index, answer, exercise, seed, result}."""
    job = json.loads(sys.stdin.read())
    exercise = exercises()[job["exercise"]]
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass
    try:
        verdict = exercise.judge(evaluate(job["sources"], job["index"], job["answer"]), job["seed"])
        found = {"mark": verdict.mark, "text": verdict.text}
    except (Exception, SystemExit) as error:
        found = {"mark": "✗", "text": f"its cell raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
