"""Files that people have, as examples that are checked: labelled texts, tagged sentences, and texts to learn by heart.

A file is read whole, and every example keeps the number of its line, so that whatever is wrong with it, here or later, is
said in one line that names file and line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAG = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class Labelled:
    """A text with its label, for classification."""

    text: str
    label: str
    line: int


@dataclass(frozen=True)
class Tagged:
    """The words of a sentence with their tags (O, B-KIND, I-KIND), for token classification. line: of its first word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Passage:
    """A text to learn: all of it, or with a prompt only what follows the prompt."""

    text: str
    line: int
    prompt: str | None = None


def read_labelled(path: str | Path, text_column: str = "text", label_column: str = "label") -> list[Labelled]:
    """Labelled texts of a .csv (a comma, quoted as spreadsheets do), .tsv (a tab, no quoting) or .jsonl file.

    The first two begin with a line of column names; a line of the third is an object with these keys. Labels become text,
    without the blanks around them.

    Raises FileNotFoundError, and ValueError, naming file and line, for another kind of file, text that is not UTF-8, a column
    that is not there, a row of another length, a text or label that is empty, and a file without examples.
    """
    path = Path(path)
    if kind(path) not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: got a file of kind {path.suffix or 'unknown'}, expected .csv, .tsv or .jsonl: rename or "
                         "convert it")
    if text_column == label_column:
        raise ValueError(f"text and label are both in column {text_column!r}, expected two columns: name the other one")
    rows = _objects(path) if kind(path) == ".jsonl" else _table(path, text_column, label_column)
    found = [Labelled(_cell(row, text_column, path, line), _cell(row, label_column, path, line).strip(), line)
             for line, row in rows]
    return _some(found, path, "examples")


def read_tagged(path: str | Path) -> list[Tagged]:
    """Sentences of a CoNLL-style file: a word and its tag (the last column) on each line, a blank line ends a sentence.

    The columns stand apart by tabs, or else by blanks. Lines that begin with -DOCSTART- are left out. Tags are O, B-KIND and
    I-KIND; an I that continues nothing begins an entity, as seqeval's default mode reads it.

    Raises FileNotFoundError, and ValueError, naming file and line, for text that is not UTF-8, a line without a word or a
    tag, a tag of another form, and a file without sentences.
    """
    path, found = Path(path), list[Tagged]()
    words, tags, start = list[str](), list[str](), 0
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                found.append(Tagged(tuple(words), tuple(tags), start))
            words, tags = [], []
            continue
        columns = line.rstrip("\r").split("\t") if "\t" in line else line.split()
        word, tag = columns[0].strip(), columns[-1].strip()
        if len(columns) < 2 or not word or not tag:
            raise ValueError(f"{path}, line {number}: got {line.strip()!r}, expected a word and its tag, with a tab or a blank "
                             "between them")
        if not TAG.fullmatch(tag):
            raise ValueError(f"{path}, line {number}: got the tag {tag!r}, expected O, B-KIND or I-KIND in the last column")
        start = start if words else number
        words.append(word)
        tags.append(tag)
    return _some(found, path, "sentences")


def read_passages(path: str | Path) -> list[Passage]:
    """Texts to learn: a plain text file (any kind but .jsonl) as one passage, or the lines of a .jsonl file.

    A line is {"text": …}, learned whole, or {"prompt": …, "completion": …}, of which the completion is learned.

    Raises FileNotFoundError, and ValueError, naming file and line, for text that is not UTF-8, a line that is neither, a text
    or completion that is empty, and a file without text.
    """
    path = Path(path)
    if kind(path) != ".jsonl":
        text = read_text(path)
        return _some([Passage(text, 1)] if text.strip() else [], path, "text")
    found = []
    for line, row in _objects(path):
        if "text" in row:
            found.append(Passage(_cell(row, "text", path, line), line))
        elif {"prompt", "completion"} <= row.keys():
            found.append(Passage(_cell(row, "completion", path, line), line, _cell(row, "prompt", path, line)))
        else:
            raise ValueError(f"{path}, line {line}: got the keys {', '.join(sorted(map(str, row))) or 'none'}, expected "
                             '"text", or "prompt" and "completion"')
    return _some(found, path, "texts")


def label_names(found: Iterable[str], given: Sequence[str] | None = None) -> list[str]:
    """The labels in the order of their numbers: as given, or sorted (whole numbers by size, tags with O first).

    Raises ValueError for fewer than two, or one given twice.
    """
    names = list(dict.fromkeys(found)) if given is None else list(map(str, given))
    if len(set(names)) != len(names):
        raise ValueError(f"labels {', '.join(names)}: expected each name once")
    if len(names) < 2:
        raise ValueError(f"got {len(names)} label ({', '.join(names)}), expected at least two different ones: there is nothing "
                         "to tell apart")
    if given is not None:
        return names
    numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in names)
    return sorted(names, key=int) if numbers else sorted(names, key=lambda name: (name != "O", name))


def kind(path: Path) -> str:
    """The ending of a file's name, ".csv" for A.CSV too."""
    return path.suffix.lower()


def read_text(path: str | Path) -> str:
    """The text of a file, without a byte-order mark. Raises FileNotFoundError, and ValueError if it is not UTF-8 text."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: expected a file with data")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: got the byte 0x{raw[error.start]:02x}, expected UTF-8 text: save the file as "
                         "UTF-8") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every line of a .jsonl file that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}), expected one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: got a {type(row).__name__}, expected an object of keys and values")
        yield number, row


def _table(path: Path, *columns: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column name -> cell) of every row below the first."""
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind(path) == ".tsv" else {"strict": True}
    text = read_text(path)
    names = list[str]()
    for line, row in _rows(path, text, form):
        if not "".join(row).strip() and len(row) < 2:
            continue                                       # a blank line
        if not names:
            names = [name.strip() for name in row]
            for column in columns:
                if names.count(column) != 1:
                    raise ValueError(f"{path}, line {line}: the columns are {', '.join(names)}, expected one called "
                                     f"{column!r}: say which one has the texts and which the labels (--text-column, "
                                     "--label-column)")
        elif len(row) != len(names):
            raise ValueError(f"{path}, line {line}: got {len(row)} fields, expected {len(names)} as in the first line: is "
                             "a field with the separator in it not quoted?")
        else:
            yield line, dict(zip(names, row))


def _rows(path: Path, text: str, form: dict[str, Any]) -> list[tuple[int, list[str]]]:
    """(the line it starts on, its cells) of every row. All at once: the limit below is that of the whole process."""
    reader, found, line = csv.reader(io.StringIO(text, newline=""), **form), list[tuple[int, list[str]]](), 1
    limit = csv.field_size_limit(max(len(text), 1))        # a text may be longer than the library's 131,072 characters
    try:
        for row in reader:
            found.append((line, row))
            line = reader.line_num + 1                     # a row may go over several lines
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}, expected rows with quotes that close") from None
    finally:
        csv.field_size_limit(limit)
    return found


def _cell(row: dict[str, Any], key: str, path: Path, line: int) -> str:
    """A value of a row as text."""
    if key not in row:
        raise ValueError(f"{path}, line {line}: got the keys {', '.join(sorted(map(str, row))) or 'none'}, expected {key!r}: "
                         "name the ones to use (--text-column, --label-column)")
    value = row[key]
    if not isinstance(value, (str, int)):                  # bool is an int
        raise ValueError(f"{path}, line {line}: {key} is {value!r}, expected text")
    if not str(value).strip():
        raise ValueError(f"{path}, line {line}: {key} is empty, expected text: fill it in, or leave the line out")
    if re.search("[\ud800-\udfff]", str(value)):
        raise ValueError(f"{path}, line {line}: {key} has half of a surrogate pair (\\ud800 to \\udfff), expected whole "
                         "characters: write the file again as UTF-8")
    return str(value)


def _some(found: list[Any], path: Path, what: str) -> list[Any]:
    if not found:
        raise ValueError(f"{path} is empty, expected {what}: is it the right file?")
    return found
