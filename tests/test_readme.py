"""The README is true: its example prints what its comments say, its files exist, its commands are those that CI runs."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest

from minilora.studies import STUDIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    """The code block that follows a comment."""
    return re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", README, re.DOTALL).group(1)


def committed(study: str) -> dict:
    """The numbers of a study, if they are committed: as git has them, since a reader's own run leaves its files there too."""
    name = f"figures/{study.replace('-', '_')}.json"
    found = subprocess.run(["git", "show", f":./{name}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode == 0:
        return json.loads(found.stdout)
    return json.loads((ROOT / name).read_text()) if (ROOT / name).exists() else {}


def test_the_example_prints_what_its_comments_say():
    code = block("tested: example")
    assert len(code.strip().splitlines()) <= 24
    expected = [line.split("#", 1)[1].strip() for line in code.splitlines() if "print(" in line]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().splitlines() == expected


def test_ci_runs_the_test_command_word_for_word():
    line = block("tested: tests").strip()
    assert "\n" not in line
    assert [text.strip() for text in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()].count(line) == 1


def test_every_path_of_the_table_exists():
    paths = re.findall(r"`((?:autograd|backend|lora|nn|rank|training)/\w+\.py)`", README)
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / "minilora" / path).is_file(), path


@pytest.mark.parametrize("name, path", re.findall(r"`(\w+/\w+\.py)`, `(?:\w+\.)?(\w+)`", README))
def test_every_name_of_the_table_is_in_its_file(name, path):
    assert re.search(rf"(def|class) {path}\b", (ROOT / "minilora" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in STUDIES if "verdict" in committed(name)])
def test_the_studies_hold_what_the_table_says(name):
    """The row of a study: a link to its figure, and how many of its claims hold in the committed numbers."""
    verdict, figure = committed(name)["verdict"], f"figures/{name.replace('-', '_')}.png"
    row = next(line for line in README.splitlines() if line.startswith(f"| [`{name}`]({figure})"))
    assert row.rstrip(" |").endswith(f"{sum(claim['agrees'] for claim in verdict)} of {len(verdict)}")


def test_links_and_folders_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for folder in re.findall(r"^  (\w+)/ ", README, re.MULTILINE):
        assert (ROOT / "minilora" / folder).is_dir(), folder


def test_the_table_of_real_models_is_the_committed_one():
    sentiment, entities, style = (committed(name) for name in ("sentiment", "entities", "style"))
    metrics = [*[(row, "accuracy") for row in sentiment["rows"]], (entities["rows"][0], "f1")]
    lines = [line for line in README.splitlines() if line.startswith(("| MiniLM, ", "| SmolLM2, "))]
    for line, (row, key) in zip(lines, metrics, strict=False):
        numbers = [row["before"], row["minilora"]["metrics"][key], row["torch"]["metrics"][key]]
        assert " | ".join(f"{number:.3f}" for number in numbers) + f" | {row['agreement']:.0%}".replace("%", " %") in line
    assert f"| {style['before']['loss']:.3f} | {style['after']['loss']:.3f} |" in lines[3] and len(lines) == 4
    assert f"{round(10 * style['after']['in_form'])} of {len(style['samples'])}" in README


def test_the_results_are_those_of_the_committed_json():
    text = committed("rank-quality")["text"]
    rows = re.findall(r"^\| LoRA on ([^|]+?) \| (\d+) \| ([\d,]+) \|[^|]*\| ([\d.]+) ± ([\d.]+)", README, re.MULTILINE)
    assert len(rows) == len(text["rows"])
    for (targets, rank, trainable, mean, sd), row in zip(rows, text["rows"], strict=True):
        assert (targets, int(rank), int(trainable.replace(",", ""))) == (row["targets"], row["rank"], row["trainable"])
        assert mean == f"{row['loss_mean']:.3f}" and sd == f"{row['loss_sd']:.3f}"
    assert f"{text['base']['loss']:.3f}" in README and f"{text['full']['loss_mean']:.3f}" in README


def numbers(text: str) -> list[str]:
    return re.findall(r"[0-9]+(?:[.,][0-9]+)*(?:e-[0-9]+)?", text)


def links(text: str) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", text))


def in_order(some: list[str], more: list[str]) -> bool:
    rest = iter(more)
    return all(each in rest for each in some)


def test_the_chinese_readme_has_commands_code_and_links_of_this_one_only():
    fenced = re.compile(r"^```\w*\n.*?^```$", re.DOTALL | re.MULTILINE)
    blocks = fenced.findall(CHINESE)
    assert sum(text.startswith("```bash") for text in blocks) >= 3
    assert [text for text in [*blocks, *re.findall(r"`[^`\n]+`", fenced.sub("", CHINESE))] if text not in README] == []
    assert links(CHINESE) - links(README) == {"README.md"} and "README.zh-CN.md" in links(README)


def test_the_chinese_readme_has_numbers_of_this_one_only():
    """The numbers of a table's row stand in this order in one row here, which has its links; any other number stands here."""
    rows = [row for row in README.splitlines() if row.startswith("|")]
    for line in CHINESE.splitlines():
        if line.startswith("|"):
            assert any(links(line) <= links(row) and in_order(numbers(line), numbers(row)) for row in rows), line
        else:
            assert set(numbers(line)) <= set(numbers(README)), line
