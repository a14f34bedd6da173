"""How much code a reader of the core has to read: the lines that hold code, file by file.

A line counts when some token of code stands on it; blank lines, comments and docstrings do not. The core is backend,
autograd, nn, lora and rank, without the kernels of one device (the fast NumPy ones with their threads and memory, those
of CuPy) and the tables of names (nn/names.py, lora/peft_options.py, and the `__init__.py` files, which only list what is
public). Each kernel's readable twin, backend/generic.py, is counted.

    python tests/measure_core.py
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "minilora"
CORE = ("backend", "autograd", "nn", "lora", "rank")
NOT_COUNTED = ("backend/cupy_*.py", "backend/numpy_*.py", "backend/parallel.py", "backend/memory.py", "nn/names.py",
               "lora/peft_options.py", "*/__init__.py")
BUDGET = 2_500      # lines of code in the core, about: it may be over by a third
LONGEST = 400       # lines, of any kind, in one file

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """The number of lines of `source` on which code stands. A string that is a statement by itself is a docstring."""
    constants = [node.value for node in ast.walk(ast.parse(source))
                 if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    docstrings = {(value.lineno, value.end_lineno) for value in constants if isinstance(value.value, str)}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and (token.start[0], token.end[0]) in docstrings
        if token.type not in _NO_CODE and not is_docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def all_lines(source: str) -> int:
    """The number of lines of `source`, whatever stands on them."""
    return len(source.splitlines())


def core_files() -> list[Path]:
    """The files of the core that are counted, from the bottom of the house up."""
    return [path for folder in CORE for path in sorted((PACKAGE / folder).rglob("*.py"))
            if not any(path.relative_to(PACKAGE).match(pattern) for pattern in NOT_COUNTED)]


def measure() -> dict[str, tuple[int, int]]:
    """{file: (lines of code, all lines)} for the core."""
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in core_files()}
    return {name: (code_lines(source), all_lines(source)) for name, source in sources.items()}


def main() -> None:
    """Print the table, the sum against its budget, and the longest file against its limit."""
    rows = measure()
    print(f"{'file':<40}{'code':>8}{'all':>8}")
    for folder in CORE:
        inside = {name: row for name, row in rows.items() if name.startswith(folder + "/")}
        for name, (code, every) in inside.items():
            print(f"{name:<40}{code:>8}{every:>8}")
        print(f"{folder + '/ together':<40}{sum(code for code, _ in inside.values()):>8}"
              f"{sum(every for _, every in inside.values()):>8}\n")
    total = sum(code for code, _ in rows.values())
    longest = max(rows, key=lambda name: rows[name][1])
    print(f"core: {total:,} lines of code, budget {BUDGET:,}: {BUDGET - total:,} left")
    print(f"longest file: {longest}, {rows[longest][1]} lines, limit {LONGEST}")


if __name__ == "__main__":
    main()
