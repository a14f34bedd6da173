"""From sources to notebooks, from students' files to marks; and what every committed notebook has to be."""

import csv
import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path

import lessons
import pytest
import tiny_lessons

from minilora.cli import main
from minilora.course import exercises
from minilora.course.build import build, faults, notebook_of
from minilora.course.grade import grade
from minilora.course.runner import evaluate
from minilora.course.sheets import otter_files, teachers_sheet
from minilora.course.source import blanked, in_language, outdated, parse, read
from minilora.course.source import lessons as sources_in

REGISTRY = tiny_lessons.exercises()
ROOT = lessons.NOTEBOOKS.parent
needs_kernel = pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in ("nbclient", "nbformat", "ipykernel")),
                                  reason="nbclient, nbformat or ipykernel is not installed")


@pytest.fixture(autouse=True)
def processes_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(Path(__file__).parent), str(ROOT))))
    for name in ("MINILORA_CHECK", "NBGRADER_EXECUTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A notebooks folder with one lesson in it."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "03_tiny.py").write_text(tiny_lessons.SOURCE, encoding="utf-8")
    return tmp_path


def notebook(folder: Path, name: str = "03_tiny") -> dict:
    return json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))


def unrun(solved: bool = False, lang: str = "en") -> dict:
    return notebook_of(in_language(parse(tiny_lessons.SOURCE), lang), REGISTRY, solved=solved)


def without_running(monkeypatch):
    monkeypatch.setattr("minilora.course.build.execute", lambda *_, **__: None)


# ---------------------------------------------------------------------------------------------------------- the sources
def test_cells():
    cells = parse(tiny_lessons.SOURCE)
    assert [cell.kind for cell in cells[:5]] == ["markdown", "markdown", "markdown", "code", "markdown"]
    assert cells[0].source.startswith("# 03 · A tiny lesson\n\nSee [the sheet]") and cells[0].line == 3
    assert cells[1].attributes["lang"] == "zh" and cells[2].attributes == {"teacher": True}
    assert cells[5].attributes == {"exercise": "tiny_double"} and cells[5].source.startswith("def tiny_double(x):")


@pytest.mark.parametrize(("text", "says"), [
    ('# %% exersise="a"\nx', "line 1: unknown attribute 'exersise'"),
    ("# %%\nx\n# %% exact=yes\ny", "line 3: exact=yes is no JSON"),
    ("# %% [markdown]\n# text\ncode()", "line 3: a line of text without"),
])
def test_a_wrong_header_is_named(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse(text)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jupytext") is None, reason="jupytext is not installed")
@pytest.mark.parametrize("path", [None, *lessons.SOURCES], ids=lambda path: path.stem if path else "tiny")
def test_jupytext_reads_the_same_cells(path):
    import jupytext
    text = path.read_text(encoding="utf-8") if path else tiny_lessons.SOURCE
    theirs = [(cell.cell_type, cell.source.strip("\n")) for cell in jupytext.reads(text, fmt="py:percent").cells]
    mine = [(cell.kind, cell.source) for cell in parse(text)]
    assert theirs[-len(mine):] == mine                       # what stands before the first cell is a cell for jupytext


@pytest.mark.parametrize(("text", "left"), [
    ("def f(x):\n    # BEGIN SOLUTION\n    return x\n    # END SOLUTION", "def f(x):\n    ..."),
    ("a = ...\n# BEGIN SOLUTION\na = 4\n# END SOLUTION", "a = ..."),
    ("### BEGIN SOLUTION\na = 4\n### END SOLUTION\nb = 2", "...\nb = 2"),
    ("class A:\n    def f(self):\n        # BEGIN SOLUTION\n        return 1\n        # END SOLUTION\n    def g(self):\n"
     "        # BEGIN SOLUTION\n        return 2\n        # END SOLUTION",
     "class A:\n    def f(self):\n        ...\n    def g(self):\n        ..."),
])
def test_blanking(text, left):
    assert blanked(text) == left


@pytest.mark.parametrize("text", ["a = 1", "# BEGIN SOLUTION\na = 1", "a = 1\n# END SOLUTION"])
def test_blanking_needs_whole_regions(text):
    with pytest.raises(ValueError, match="SOLUTION"):
        blanked(text)


def test_a_translation_goes_stale():
    assert outdated(parse(tiny_lessons.SOURCE)) == []
    cells = parse(tiny_lessons.SOURCE.replace("A tiny lesson", "A small lesson"))
    (cell, expected), = outdated(cells)
    assert cell.attributes["of"] != expected
    assert outdated(parse(tiny_lessons.SOURCE.replace(cell.attributes["of"], expected).replace("A tiny", "A small"))) == []


def test_choosing_lessons(folder):
    assert [path.stem for path in sources_in(folder, ["3"])] == ["03_tiny"] == [path.stem for path in sources_in(folder)]
    with pytest.raises(ValueError, match="no lesson 04"):
        sources_in(folder, ["03", "04"])


# -------------------------------------------------------------------------------------------------------- the notebooks
def test_cells_of_a_notebook():
    cells = unrun()["cells"]
    assert [cell["id"] for cell in cells] == [f"c{i:03d}" for i in range(len(cells))]
    assert not any("board" in cell["source"] or "BEGIN SOLUTION" in cell["source"] for cell in cells)
    by_id = {cell["metadata"]["nbgrader"]["grade_id"]: cell["metadata"] for cell in cells if "nbgrader" in cell["metadata"]}
    assert by_id["tiny_double"] == {
        "minilora": {"exercise": "tiny_double", "answer": "tiny_double"},
        "nbgrader": {"grade": False, "grade_id": "tiny_double", "locked": False, "schema_version": 3, "solution": True,
                     "task": False}}
    assert by_id["check_tiny_double"] == {
        "nbgrader": {"grade": True, "grade_id": "check_tiny_double", "locked": True, "points": 2, "schema_version": 3,
                     "solution": False, "task": False}}
    assert by_id["tiny_count"]["minilora"]["answer"] == "count"
    assert cells[-2]["metadata"] == {"tags": ["exact"]} and cells[-1]["metadata"] == {"slideshow": {"slide_type": "slide"}}
    assert next(cell["source"] for cell in cells if "def tiny_double" in cell["source"]).endswith("    ...")
    solved = unrun(solved=True)["cells"]
    assert any("BEGIN SOLUTION" in cell["source"] for cell in solved)
    assert [cell["metadata"] for cell in solved] == [cell["metadata"] for cell in cells]


def test_an_exercise_needs_a_checker_and_a_check():
    with pytest.raises(ValueError, match="no exercise is called 'tiny_double'"):
        notebook_of(parse(tiny_lessons.SOURCE), {})
    with pytest.raises(ValueError, match=r'expected a cell check="tiny_double"'):
        notebook_of(parse(tiny_lessons.SOURCE.replace("check.tiny_double(tiny_double)", "print()")), REGISTRY)
    with pytest.raises(ValueError, match="exercise 'tiny_double': expected a region"):
        notebook_of(parse(re.sub(r"    # (BEGIN|END) SOLUTION\n", "", tiny_lessons.SOURCE)), REGISTRY)


@pytest.mark.skipif(importlib.util.find_spec("nbformat") is None, reason="nbformat is not installed")
@pytest.mark.parametrize("solved", [False, True])
def test_nbformat_accepts_it(solved):
    import nbformat
    nbformat.validate(nbformat.from_dict(unrun(solved)))


def test_links_reach_from_a_folder_below():
    first = notebook_of(in_language(parse(tiny_lessons.SOURCE)), REGISTRY, depth=1)["cells"][0]["source"]
    assert "[the sheet](../TEACH.md), [elsewhere](https://example.org) and [below](#end)" in first


@needs_kernel
def test_build_runs_and_writes(folder, capsys):
    lines = list(build(folder, REGISTRY))
    assert lines == [f"03_tiny: {folder / '03_tiny.ipynb'}"]
    built = notebook(folder)
    assert faults(built) == []
    outputs = [cell["outputs"] for cell in built["cells"] if cell["cell_type"] == "code"]
    assert "○ tiny_double: not attempted yet" in json.dumps(outputs, ensure_ascii=False)
    assert outputs[-1] == [{"name": "stdout", "output_type": "stream", "text": ["one\n", "two\n"]}]
    text = (folder / "03_tiny.ipynb").read_bytes()
    assert b"execution\"" not in text and b"iopub" not in text and str(folder).encode() not in text
    assert not any(cell["outputs"] for cell in notebook(folder / "solutions")["cells"] if cell["cell_type"] == "code")
    list(build(folder, REGISTRY))
    assert (folder / "03_tiny.ipynb").read_bytes() == text                               # the same source, the same bytes

    with pytest.raises(ValueError, match=r"zh.03_tiny\.ipynb is not there"):
        list(build(folder, REGISTRY, check=True))
    list(build(folder, REGISTRY, lang="zh"))
    translated = notebook(folder / "zh")
    assert translated["cells"][0]["source"] == ["# 03 · 一课"]
    assert [cell["outputs"] for cell in translated["cells"] if cell["cell_type"] == "code"] == outputs
    assert list(build(folder, REGISTRY, check=True)) == ["03_tiny: as the source has it"]

    path = folder / "src" / "03_tiny.py"
    path.write_text(tiny_lessons.SOURCE.replace('print("two")', 'print("three")'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not what 03_tiny.py gives \(first difference in cell 7\)"):
        list(build(folder, REGISTRY, check=True))
    path.write_text(tiny_lessons.SOURCE, encoding="utf-8")
    assert list(build(folder, REGISTRY, quick=True)) == ["03_tiny: ran"]
    assert (folder / "03_tiny.ipynb").read_bytes() == text


@needs_kernel
@pytest.mark.parametrize(("line", "error", "says"), [
    ("import warnings; warnings.warn('old')", ValueError, "writes to stderr: .*old"),
    ("a = '-> 3'\na = 1\na / 0", RuntimeError,
     "cell c009, which begins \"a = '-> 3'\", failed: ZeroDivisionError: division by zero, in 'a / 0'"),
])
def test_build_refuses_what_should_not_be_shown(folder, line, error, says):
    (folder / "src" / "03_tiny.py").write_text(tiny_lessons.SOURCE + f"\n# %%\n{line}\n", encoding="utf-8")
    with pytest.raises(error, match=says):
        list(build(folder, REGISTRY))
    assert not (folder / "03_tiny.ipynb").exists()


@pytest.mark.parametrize(("output", "says"), [
    ({"output_type": "stream", "name": "stderr", "text": "careful"}, "writes to stderr: careful"),
    ({"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}, "raises ValueError"),
    ({"output_type": "stream", "name": "stdout", "text": ["in\n", "/home/ann/x.npz"]}, "only this machine has: '/home/ann/x"),
    ({"output_type": "stream", "name": "stdout", "text": "C:\\Users\\ann"}, "only this machine"),
    ({"output_type": "execute_result", "data": {"text/plain": "<object object at 0x7f12ab34cd>"}}, "only this machine"),
    ({"output_type": "display_data", "data": {"text/html": "<b>bold</b>"}}, "shows text/html"),
    ({"output_type": "stream", "name": "stdout", "text": "x" * 200_001}, "an output of 200,0"),
])
def test_faults(output, says):
    shown = unrun()
    assert faults(shown) == []
    shown["cells"][2]["outputs"] = [output]
    assert len(faults(shown)) == 1 and says in faults(shown)[0]
    shown["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "layers/q_proj 1/2 and/or a/b /s"}]
    assert faults(shown) == []
    shown["metadata"]["widgets"] = {}
    assert "widgets" in faults(shown)[0]


@needs_kernel
def test_an_exact_cell_that_changed_is_seen(folder):
    source = folder / "src" / "03_tiny.py"
    line = "import os\nprint(os.environ['MINILORA_QUICK'])"
    source.write_text(tiny_lessons.SOURCE.replace('print("two")', line), encoding="utf-8")
    list(build(folder, REGISTRY))
    with pytest.raises(ValueError, match=r"c007: printed 'one.*1.*the notebook says 'one.*0"):
        list(build(folder, REGISTRY, quick=True))


def test_a_stale_translation_is_not_built(folder, monkeypatch):
    without_running(monkeypatch)
    path = folder / "src" / "03_tiny.py"
    list(build(folder, REGISTRY))
    path.write_text(tiny_lessons.SOURCE.replace("A tiny", "A small"), encoding="utf-8")
    for options in ({"lang": "zh"}, {"check": True}):
        with pytest.raises(ValueError, match=r'03_tiny.py, line 8: the text was changed after its translation .*write of="'):
            list(build(folder, REGISTRY, **options))


# ------------------------------------------------------------------------------------------------------------ the marks
RIGHT = "import numpy as np\ndef tiny_double(x):\n    return np.multiply(x, twice)"


def student(folder: Path, *cells: str | tuple[str, str], name: str = "student.ipynb") -> Path:
    """A notebook of code cells; (exercise, source) has the metadata of the built one."""
    answers = {"tiny_double": "tiny_double", "tiny_count": "count"}
    written = []
    for cell in cells:
        name_of, text = (None, cell) if isinstance(cell, str) else cell
        metadata = {"minilora": {"exercise": name_of, "answer": answers[name_of]}} if name_of else {}
        written.append({"cell_type": "code", "source": text, "outputs": [], "metadata": metadata})
    whole = {"cells": written, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / name).write_text(json.dumps(whole), encoding="utf-8")
    return folder / name


def marks(*files: Path, seconds: float = 300.0) -> list[tuple[str, str]]:
    return [(row.verdict, row.hint) for row in grade(files, tiny_lessons.exercises, seconds=seconds).rows]


def test_grading_the_solutions_and_the_stubs(folder, monkeypatch):
    without_running(monkeypatch)
    list(build(folder, REGISTRY))
    assert marks(folder / "solutions" / "03_tiny.ipynb") == [("right", ""), ("right", "")]
    assert [verdict for verdict, _ in marks(folder / "03_tiny.ipynb")] == ["open", "open"]


@pytest.mark.slow
@pytest.mark.parametrize(("cells", "verdict", "hint"), [
    ([RIGHT], "wrong", "it raised NameError"), (["twice = 2.0", RIGHT], "right", ""),                   # found by its name
    (["twice = 2.0", ("tiny_double", RIGHT), "def tiny_double(x): ..."], "right", ""),                   # a copy that is empty
    (["twice = 2.0", ("tiny_double", "def tiny_double(x):\n    ..."), RIGHT], "right", ""),              # answered in a copy
    (["twice = 2.0", ("tiny_double", "def tiny_double(x):\n    return x"), RIGHT], "right", ""),          # the last one counts
    (["twice = 2.0", ("tiny_double", RIGHT), "def tiny_double(x):\n    return x"], "wrong", "that is x"),
    (["def helper(x):\n    return x + x", ("tiny_double", "def tiny_double(x):\n    return helper(x)")], "right", ""),   # split
    (["def broken(:", "1 / 0", "while True: pass", "%matplotlib inline", ("tiny_double", "def tiny_double(x): return x + x")],
     "right", ""),
    ([("tiny_double", "def tiny_double(x): return x * x")], "wrong", "a square is not a double"),
    ([("tiny_double", "%time\nimport sys\ndef tiny_double(x):\n    sys.exit()")], "wrong", "it raised SystemExit"),
    ([("tiny_double", "import sys\nsys.exit()")], "wrong", "its cell raised SystemExit"),
    ([("tiny_double", "import os\nos._exit(0)")], "wrong", "its process ended (exit code 0) before there was a verdict"),
    ([("tiny_double", "def tiny_double(x)\n    return x")], "wrong", "its cell raised SyntaxError"),
    ([("tiny_double", "input()\ndef tiny_double(x): return x + x")], "wrong", "its cell raised EOFError"),
    ([("tiny_double", "print('✓ tiny_double: right')\ndef tiny_double(x): return x")], "wrong", "that is x"),
    ([("tiny_count", "count = 42")], "open", "not found in the file"),
])
def test_grading_survives(folder, cells, verdict, hint):
    found = marks(student(folder, *cells))
    assert found[0][0] == verdict and found[0][1].startswith(hint), found
    assert found[1][0] == ("right" if "count" in str(cells[0]) else "open")


@pytest.mark.slow
def test_an_endless_loop_is_ended(folder):
    path = student(folder, ("tiny_double", "def tiny_double(x):\n    while True: pass"))
    assert marks(path, seconds=6)[0] == ("wrong", "not done after 6 s: an endless loop?")


def test_plain_files_are_graded(folder):
    plain = folder / "plain.py"
    plain.write_text("import numpy as np\nraise_at_top = 1 / 0\ndef tiny_double(x):\n    return 2 * x\n", encoding="utf-8")
    percent = folder / "percent.py"
    percent.write_text(tiny_lessons.SOURCE + "\n# %% my=own header\n", encoding="utf-8")
    assert marks(plain) == [("right", ""), ("open", "not found in the file")] and marks(percent) == [("right", "")] * 2


@pytest.mark.parametrize("text", [
    "", "no json", "[]", "{}", '{"cells": 3}', '{"cells": [{}]}', '{"cells": [3]}', '{"cells": []}', "[" * 100_000,
    '{"cells": [{"cell_type": "code"}]}', '{"cells": [{"cell_type": "code", "source": 3}]}',
    '{"cells": [{"cell_type": "code", "source": [1], "metadata": 3}]}'])
def test_a_broken_notebook_is_one_line(folder, text):
    path = folder / "broken.ipynb"
    path.write_text(text)
    row, = grade([path], tiny_lessons.exercises).rows
    assert row.verdict == "broken" and row.hint and "\n" not in row.hint


def test_missing_and_binary_files_are_broken(folder):
    (folder / "binary.ipynb").write_bytes(b"\x80\xff")
    (folder / "wrong.py").write_text("def f(:")
    found = marks(folder / "none.ipynb", folder / "binary.ipynb", folder / "wrong.py", folder)
    assert [mark for mark, _ in found] == ["broken"] * 4


def test_table_and_csv(folder):
    square = ("tiny_double", "def tiny_double(x): return x * x")
    files = [student(folder, square, name=f"=student{i}.ipynb") for i in range(2)]
    files.append(student(folder, ("tiny_double", "def tiny_double(x): return x"), name="c.ipynb"))
    report = grade(files, tiny_lessons.exercises, seconds=300.0)
    assert report.commonest() == {"tiny_double": (2, "a square is not a double")}
    assert "tiny_double: 0 of 3 right, 0 open; 2 times: a square is not a double" in report.table()
    report.write_csv(folder / "marks.csv")
    with (folder / "marks.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["name", "exercise", "verdict", "hint"] and len(rows) == 7
    assert rows[1][1:] == ["tiny_double", "wrong", "a square is not a double"]
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["verdict"] == "wrong"


def test_an_answer_may_use_its_own_source():
    sources = ["import inspect", "def f():\n    return 1", "def g():\n    return inspect.getsource(f)"]
    assert evaluate(sources, 2, "g()") == "def f():\n    return 1"


# ------------------------------------------------------------------------------------------- otter, the sheet, the verb
def test_otter_files_run_as_plain_functions(folder, monkeypatch):
    written = otter_files(folder / "tests", folder, REGISTRY)
    assert [path.name for path in written] == ["tiny_double.py", "tiny_count.py"]
    module = types.ModuleType("otter.test_files")
    module.test_case = lambda **_: lambda function: function
    monkeypatch.setitem(sys.modules, "otter", types.ModuleType("otter"))
    monkeypatch.setitem(sys.modules, "otter.test_files", module)
    monkeypatch.setattr("minilora.course.exercises", tiny_lessons.exercises)
    answers = ((lambda x: x + x, lambda x: x, "that is x"), (42, 41, "one more"))
    for path, (right, wrong, hint) in zip(written, answers, strict=True):
        space: dict = {}
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) == 8
        exec(text, space)
        assert space["name"] == path.stem and space["OK_FORMAT"] is False
        space[f"test_{path.stem}"](right)
        for answer, says in ((wrong, hint), (..., "not attempted")):
            with pytest.raises(AssertionError, match=says):
                space[f"test_{path.stem}"](answer)


def test_the_teachers_sheet(folder):
    sheet = teachers_sheet(folder, REGISTRY)
    assert "## [03 · A tiny lesson](03_tiny.ipynb)" in sheet and "on the board" in sheet
    assert "| 03.1 | `tiny_double` | Double | ●●○ | 5 |" in sheet and "- a square is not a double" in sheet
    assert "| | | all | | 6 |" in sheet


def test_the_verb(folder, capsys, monkeypatch):
    without_running(monkeypatch)
    where = ["--notebooks", str(folder)]
    monkeypatch.setattr("minilora.course.command.exercises", tiny_lessons.exercises)
    assert main(["course", "build", "03", *where]) == 0 and main(["course", "build", "--lang", "zh", *where]) == 0
    assert main(["course", "build", "--check", *where]) == 0 and main(["course", "teach", *where]) == 0
    assert main(["course", "otter", str(folder / "tests"), *where]) == 0
    assert "as the source has it" in capsys.readouterr().out and (folder / "TEACH.md").exists()
    for bad in (["build", "04", *where], ["build", "--notebooks", str(folder / "src")], ["grade", "x.ipynb", "--seconds", "0"]):
        assert main(["course", *bad]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["course", "grade", str(folder / "none.ipynb"), "--json", "--csv", str(folder / "marks.csv")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["verdict"] == "broken"
    for what in ("build", "grade", "otter", "teach"):
        with pytest.raises(SystemExit):
            main(["course", what, "--help"])
        assert f"example: minilora course {what}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ what is committed here
NOTEBOOKS = sorted(lessons.NOTEBOOKS.rglob("*.ipynb"))
each_source = pytest.mark.parametrize("path", lessons.SOURCES, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(lessons.NOTEBOOKS).as_posix())


@each_source
def test_notebooks_are_what_their_sources_give(path):
    list(build(lessons.NOTEBOOKS, exercises(), [path.name[:2]], check=True))


@each_source
def test_a_translated_lesson_is_translated_whole(path):
    """Each text cell has as many translations as the first; what only teachers read needs none."""
    cells = [cell for cell in read(path) if cell.kind == "markdown" and not cell.attributes.get("teacher")]
    own = [i for i, cell in enumerate(cells) if "lang" not in cell.attributes]
    languages = [[cell.attributes["lang"] for cell in cells[i + 1 : j]] for i, j in zip(own, [*own[1:], len(cells)])]
    missing = [cells[i].line for i, those in zip(own, languages) if those != languages[0]]
    assert missing == [] and languages[0] in ([], ["zh"]), f"{path.name}, lines {missing}: text without its translation"


def test_every_notebook_has_a_source():
    stems = {path.stem for path in lessons.SOURCES}
    assert [path for path in NOTEBOOKS if path.stem not in stems] == []


def test_every_exercise_has_a_source_and_its_number():
    found = lessons.places()
    assert set(found) == set(exercises())
    for name, (path, _, _) in found.items():
        assert exercises()[name].lesson == int(path.name[:2])


@each_source
def test_a_lesson_has_its_parts(path):
    cells = read(path)
    shown = in_language(cells)
    code = [cell for cell in shown if cell.kind == "code"]
    assert len([cell for cell in code if not {"exercise", "check"} & cell.attributes.keys()]) <= 25
    assert sum(bool(cell.attributes.get("teacher")) for cell in cells) == 1
    mine = [cell.attributes["exercise"] for cell in code if "exercise" in cell.attributes]
    assert 3 <= len(mine) <= 7
    text = "\n".join(cell.source for cell in shown if cell.kind == "markdown")
    assert shown[0].source.startswith("# ") and "What you should be able to say now" in text
    for name in mine:
        exercise = exercises()[name]
        dots = "●" * exercise.difficulty + "○" * (3 - exercise.difficulty)
        assert f"### Exercise {exercise.id} · {dots} · {exercise.minutes} min" in text, name
    for cell in code:
        compile(cell.source, path.name, "exec")


@pytest.mark.skipif(not lessons.SOURCES, reason="no lesson yet")
def test_the_committed_teachers_sheet_is_fresh():
    assert (lessons.NOTEBOOKS / "TEACH.md").read_text(encoding="utf-8") == teachers_sheet(lessons.NOTEBOOKS, exercises()), (
        "run: minilora course teach")


@each_notebook
def test_a_committed_notebook_shows_nothing_it_should_not(path):
    assert faults(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, *lessons.NOTEBOOKS.glob("*.md")],
                         ids=lambda path: path.relative_to(lessons.NOTEBOOKS).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


@each_notebook
def test_a_committed_notebook_was_run_in_order(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    expected = [None] * len(cells) if path.parent.name == "solutions" else list(range(1, len(cells) + 1))
    assert counts == expected
