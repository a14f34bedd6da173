"""The rules of the house that a reader relies on: small files, a small core, documented names, doctests that run.

(The direction of imports between folders is checked by import-linter; its contract stands in pyproject.toml.)
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import measure_core
import pytest

PACKAGE = measure_core.PACKAGE
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]

# A library -> where it may be imported. An empty tuple: nowhere, for unpickling runs whatever the file says.
IMPORTED_ONLY_IN = {
    "cupy": ("backend/",), "cupyx": ("backend/",), "cupy_backends": ("backend/",),
    "matplotlib": ("plots/",),
    "pickle": (), "cloudpickle": (), "dill": (), "shelve": (), "marshal": (),
}
OPTIONAL = ("cupy", "torch", "transformers", "peft", "tokenizers", "huggingface_hub", "gguf", "jinja2", "sklearn",
            "seqeval", "dask", "distributed", "IPython")


def imported_libraries(source: str) -> set[str]:
    """The top-level names that `source` imports from outside its own package, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def examples(source: str) -> int:
    """The number of doctest examples in the docstrings of `source`."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return sum(len(doctest.DocTestParser().get_examples(text)) for text in docstrings)


WITH_EXAMPLES = [path for path in FILES if examples(path.read_text(encoding="utf-8"))]


def public_callables() -> dict[str, object]:
    """{name: object} for each function and class that `minilora.__all__` names."""
    minilora = importlib.import_module("minilora")
    return {name: getattr(minilora, name) for name in minilora.__all__
            if inspect.isroutine(getattr(minilora, name)) or inspect.isclass(getattr(minilora, name))}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_file_is_longer_than_its_limit(path: Path):
    lines = measure_core.all_lines(path.read_text(encoding="utf-8"))
    assert lines <= measure_core.LONGEST, f"{path.name} has {lines} lines; split it by idea"


def test_the_core_is_within_its_budget():
    total = sum(code for code, _ in measure_core.measure().values())
    assert 0 < total <= measure_core.BUDGET * 4 / 3, f"{total} lines of code; python tests/measure_core.py shows where they are"


@pytest.mark.parametrize("path", [PACKAGE / folder / "__init__.py" for folder in measure_core.CORE], ids=measure_core.CORE)
def test_an_init_file_only_lists_names(path: Path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        listed = isinstance(node, ast.Assign) and node.targets[0].id in ("__all__",)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, (ast.Import, ast.ImportFrom)) or listed or docstring, ast.unparse(node)


def test_code_lines_counts_code_only():
    source = '''"""Module docstring,
of two lines."""

# a comment
X = 1       # code with a comment


class A:
    """Docstring."""

    y: int = 2
    """A docstring of an attribute."""

    def f(self):
        "plain docstring"; z = 3
        text = """a string that is
        a value"""

        return (z,

                text)
'''
    assert measure_core.code_lines(source) == 9   # X, class, y, def, z, text over two lines, return over two lines
    assert measure_core.code_lines("") == 0 == measure_core.code_lines('"""Only a docstring."""\n')


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_opens_with_its_idea(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} has no module docstring"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_libraries_are_imported_only_in_their_place(path: Path):
    name = path.relative_to(PACKAGE).as_posix()
    for library in imported_libraries(path.read_text(encoding="utf-8")) & set(IMPORTED_ONLY_IN):
        allowed = IMPORTED_ONLY_IN[library]
        assert name.startswith(allowed), f"{name} imports {library}; allowed in: {allowed or 'no file'}"


def test_imported_libraries_sees_every_form():
    source = "import cupy.linalg as la\nfrom . import matplotlib\ndef f():\n    from pickle import loads\n"
    assert imported_libraries(source) == {"cupy", "pickle"}


def test_import_minilora_needs_no_optional_package():
    code = f"import sys, minilora; print(*sorted(set({OPTIONAL!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_public_names_are_documented_and_annotated():
    public = public_callables()
    assert public
    bare = []
    for name, thing in public.items():
        if not inspect.getdoc(thing):
            bare.append(f"{name}: no docstring")
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            bare += [f"{name}({parameter})" for parameter, value in signature.parameters.items()
                     if value.annotation is inspect.Parameter.empty]
            if signature.return_annotation is inspect.Signature.empty:
                bare.append(f"{name}: no return type")
    assert not bare, "; ".join(bare)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=[path.relative_to(PACKAGE).as_posix() for path in WITH_EXAMPLES])
def test_doctests(path: Path):
    source = path.read_text(encoding="utf-8")
    missing = sorted(name for name in imported_libraries(source) if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    failed, attempted = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0, f"{failed} of {attempted} examples failed"
    assert attempted == examples(source), "an example was not found: is its function wrapped by a decorator?"
