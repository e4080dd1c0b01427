"""What the README and the docs show is true: their Python prints what they say, their commands and links exist."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks in a language, each with the number of lines before it."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)), m.group(2)) for m in BLOCK.finditer(text) if m.group(1) == language]


def commands(page: Path) -> list[list[str]]:
    """Every command of its bash blocks, in words."""
    lines = [line for _, block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


OF_FRAMEWORKS = ROOT / "docs" / "frameworks.md"  # tests/frameworks run its blocks where their framework is
WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page != OF_FRAMEWORKS]


def as_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=as_id)
def test_what_a_page_shows_runs_and_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    """A page's python blocks, in one process in order; its text blocks are what they print."""
    source = ""
    for before, block in blocks(page, "python"):
        source += "\n" * (before - source.count("\n")) + block  # so that a traceback names the page's line
    script = tmp_path / f"{page.stem}.py"
    script.write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,  # it may write files
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == "".join(block for _, block in blocks(page, "text"))


def test_the_readme_shows_code_that_runs_before_line_30() -> None:
    """It is under 120 lines, and its first block stands whole before line 30."""
    readme = ROOT / "README.md"
    before, block = blocks(readme, "python")[0]
    assert before + block.count("\n") < 30
    assert readme.read_text(encoding="utf-8").count("\n") < 120


def test_the_readme_has_two_set_up_commands() -> None:
    """One installs and runs the main job, one installs and passes the tests; the CI runs both as they stand."""
    lines = [line for _, block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert [line.rpartition("/")[2] for line in lines] == ["main_job.py", "python -m pytest"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r"readme_command '(.+)'", script)
    assert [[line for line in lines if re.search(pattern, line)] for pattern in patterns] == [[line] for line in lines]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=as_id)
def test_a_page_s_commands_exist(page: Path) -> None:
    """Their programs are installed, or made by the command before; their files are there."""
    made = set()
    for words in commands(page):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        program = words[0]
        if words[1:3] == ["-m", "venv"]:
            made.add(words[3])
        if program.startswith(tuple(f"{venv}/bin/" for venv in made)):
            program = Path(program).name
            assert program in {"python", "pip", "ruff", "mypy", "mkdocs"}
        else:
            assert shutil.which(program) or (ROOT / program).exists(), program
        for word in words[1:]:
            if re.fullmatch(r"[\w.]+(/[\w.]+)+", word) and not word.startswith(tuple(made)):
                assert (ROOT / word).exists(), word


def anchors(page: Path) -> set[str]:
    """What a link to a page can name behind `#`."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=as_id)
def test_a_page_s_links_lead_somewhere(page: Path) -> None:
    """Links to files of this repository, and to what stands in them."""
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^):]+))?\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


@pytest.mark.parametrize("module", ["agentdiff", "agentdiff.stores", "agentdiff.testing", "agentdiff.monitor"])
def test_every_public_name_has_an_entry_in_the_reference(module: str) -> None:
    """Under this name or another; what it says there is its docstring."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    entries = re.findall(r"^::: (\S+)\.(\w+)$", pages, re.M)
    shown = [getattr(importlib.import_module(where), name) for where, name in entries]
    public = importlib.import_module(module)
    assert [name for name in public.__all__ if getattr(public, name) not in shown] == []


def proven_in(path: Path) -> set[str]:
    """The promises that tests of a file are named after."""
    return set(re.findall(r"def test_([A-Z]\d+)_", path.read_text(encoding="utf-8")))


def test_every_promise_of_the_page_has_its_proof() -> None:
    """`pytest -k L3_` finds tests in each of the files named beside L3, and no test proves what is not promised."""
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*([A-Z]\d+)\*\* \|.*\| (`[^|]+`) \|$", page, re.M)
    proofs = {number: re.findall(r"`([\w/]+)`", files) for number, files in rows}
    assert len(proofs) == len(re.findall(r"^\| \*\*", page, re.M))
    wrong = [
        (number, file)
        for number, files in proofs.items()
        for file in files
        if number not in proven_in(ROOT / "tests" / f"{file}.py")
    ]
    assert wrong == []
    assert set().union(*map(proven_in, (ROOT / "tests").rglob("test_*.py"))) <= set(proofs)
