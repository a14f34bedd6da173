"""A lesson's source: notebooks/src/NN_name.py in percent format, the only place where a lesson is written.

    # %% [markdown]                                 text, each line behind "# "
    # %% [markdown] teacher=true                    text for TEACH.md only
    # %% [markdown] slide=true                      text that fits a slide (Jupyter's slideshow metadata)
    # %% [markdown] lang="zh" of="1a2b3c4d"         a translation of the text cell before it, which has this hash
    # %%                                            code
    # %% exact=true                                 code whose printed text is the same on every machine, quick or not
    # %% exercise="lora_grad"                       code with a region between # BEGIN SOLUTION and # END SOLUTION
    # %% check="lora_grad"                          code: check.lora_grad(lora_grad)

What stands before the first cell is a comment. Jupytext reads these files as well.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = ["Cell", "answer_of", "blanked", "in_language", "lessons", "outdated", "parse", "read", "text_hash"]

KEYS = ("exercise", "check", "exact", "teacher", "slide", "lang", "of", "tags")
_ATTRIBUTE = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\[[^\]]*\]|\S+)')


@dataclass(frozen=True)
class Cell:
    """One cell: "markdown" or "code", its text, the attributes of its header, and the line it starts on."""

    kind: str
    source: str
    attributes: dict[str, Any] = field(default_factory=dict)
    line: int = 0


def lessons(folder: Path, numbers: list[str] | None = None) -> list[Path]:
    """The sources in a notebooks folder, in order; only those of some numbers ("03", "3") if given.

    Raises ValueError if a number has none.
    """
    found = sorted((folder / "src").glob("[0-9][0-9]_*.py"))
    if not numbers:
        return found
    chosen = {f"{int(number):02d}" if number.isdigit() else number for number in numbers}
    missing = chosen - {path.name[:2] for path in found}
    if missing:
        raise ValueError(f"no lesson {', '.join(sorted(missing))} in {folder / 'src'}; "
                         f"there are: {', '.join(path.name[:2] for path in found) or 'none'}")
    return [path for path in found if path.name[:2] in chosen]


def read(path: Path) -> list[Cell]:
    """The cells of a source file. Raises ValueError, naming the line, for an unknown attribute."""
    return parse(path.read_text(encoding="utf-8"), path.name)


def parse(text: str, name: str = "source") -> list[Cell]:
    """The cells of a text in percent format."""
    cells: list[Cell] = []
    lines: list[str] = []
    header: tuple[str, int] | None = None
    for number, line in enumerate([*text.splitlines(), "# %%"], start=1):
        if line != "# %%" and not line.startswith("# %% "):
            lines.append(line)
            continue
        if header is not None:
            cells.append(_cell(*header, lines, name))
        header, lines = (line[4:], number), []
    return cells


def _cell(header: str, number: int, lines: list[str], name: str) -> Cell:
    attributes = {}
    for key, value in _ATTRIBUTE.findall(header):
        if key not in KEYS:
            raise ValueError(f"{name}, line {number}: unknown attribute {key!r}; expected one of {', '.join(KEYS)}")
        try:
            attributes[key] = json.loads(value)
        except ValueError:
            raise ValueError(f"{name}, line {number}: {key}={value} is no JSON value; write {key}=\"...\" or true") from None
    if "[markdown]" not in header:
        return Cell("code", "\n".join(lines).strip("\n"), attributes, number)
    bare = [i for i, line in enumerate(lines, start=number + 1) if line.strip() and not line.startswith("#")]
    if bare:
        raise ValueError(f"{name}, line {bare[0]}: a line of text without '# ' before it; start code with a line '# %%'")
    return Cell("markdown", "\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines).strip("\n"),
                attributes, number)


def text_hash(text: str) -> str:
    """The first eight hexadecimal digits of a text's SHA-256: what `of` of its translation says."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def outdated(cells: list[Cell]) -> list[tuple[Cell, str]]:
    """The translations whose `of` is not the hash of the text before them, each with the hash that is."""
    found, last = [], None
    for cell in cells:
        if "lang" not in cell.attributes:
            last = cell
        elif last is None or last.kind != "markdown":
            raise ValueError(f"line {cell.line}: a translation stands behind the text cell that it translates")
        elif cell.attributes.get("of") != text_hash(last.source):
            found.append((cell, text_hash(last.source)))
    return found


def in_language(cells: list[Cell], lang: str = "en") -> list[Cell]:
    """What a reader of a language sees: text in it where it is translated, else in English; nothing for teachers."""
    chosen: list[Cell] = []
    for cell in cells:
        if "lang" not in cell.attributes:
            chosen.append(cell)
        elif cell.attributes["lang"] == lang:
            chosen[-1] = replace(cell, attributes=chosen[-1].attributes | cell.attributes)
    return [cell for cell in chosen if not cell.attributes.get("teacher")]


def blanked(source: str) -> str:
    """An exercise's cell with `...` in place of each solution; nothing in its place behind `answer = ...`.

    Raises ValueError if no region is marked, or one is not closed.
    """
    lines: list[str] = []
    inside = found = False
    for line in source.splitlines():
        if "BEGIN SOLUTION" in line:
            inside = found = True
            before = next((each for each in reversed(lines) if each.strip()), "")
            if not before.rstrip().endswith("= ..."):
                lines.append(line[:len(line) - len(line.lstrip())] + "...")
        elif "END SOLUTION" in line:
            if not inside:
                raise ValueError("# END SOLUTION without # BEGIN SOLUTION")
            inside = False
        elif not inside:
            lines.append(line)
    if inside or not found:
        raise ValueError("expected a region between # BEGIN SOLUTION and # END SOLUTION, got "
                         + ("one that is not closed" if inside else "none"))
    return "\n".join(lines)


def answer_of(source: str, name: str) -> str | None:
    """What check.NAME(...) is called on in a cell: the answer's name, or None if there is no such call."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    calls = [node for node in ast.walk(tree)
             if isinstance(node, ast.Call) and ast.unparse(node.func) == f"check.{name}" and node.args]
    return ast.unparse(calls[-1].args[0]) if calls else None
