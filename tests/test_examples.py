"""Each example runs as it stands, offline, and shows what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(path: Path) -> str:
    """What it prints; it must end well, and print no error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path: Path) -> None:
    """Under 60 lines, and its first lines say what it shows."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 60
    assert text.startswith('"""')


def test_the_main_job_shows_the_three_troubles_before_and_after() -> None:
    """Plain threads lose some of each; with agentdiff all 20 arrive."""
    rows = re.findall(r"^(.+?) +(\d+) +(\d+)$", run(ROOT / "examples" / "main_job.py"), re.M)
    assert [what for what, _, _ in rows] == ["updates kept", "API calls answered", "reports written"]
    for what, before, after in rows:
        assert int(before) < 20, what
        assert int(after) == 20, what


def test_a_limit_shows_its_calls_refused_before_and_none_after() -> None:
    """Plain threads are refused, and with agentdiff all 36 are answered (R2)."""
    out = run(ROOT / "examples" / "rate_limit.py")
    rows = {what: (before, after) for what, before, after in re.findall(r"^(.+?) +([\d.]+) +([\d.]+)$", out, re.M)}
    assert list(rows) == ["answered", "refused (429)", "seconds"]
    assert int(rows["answered"][0]) + int(rows["refused (429)"][0]) == 36
    assert int(rows["refused (429)"][0]) > 0
    assert (rows["answered"][1], rows["refused (429)"][1]) == ("36", "0")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("lost_updates.py", r"before: (\d+) of 80 updates kept", r"after:  80 of 80 updates kept"),
        (
            "api_concurrency.py",
            r"before: (\d+) of 24 calls refused, \d+ at once",
            r"after:  0 of 24 calls refused, 1 at once",
        ),
        (
            "chain.py",
            r"before: (\d+) of 5 stages ran",
            r"after:  5 of 5 stages ran: first, second, third, fourth, fifth",
        ),
    ],
)
def test_an_example_shows_one_trouble_before_and_after(name: str, before: str, after: str) -> None:
    """The trouble is there without agentdiff, and gone with it."""
    lines = run(ROOT / "examples" / name).splitlines()
    assert len(lines) == 2
    found = re.fullmatch(before, lines[0])
    assert found, lines[0]
    total = int(re.findall(r" of (\d+) ", lines[0])[0])
    count = int(found.group(1))
    assert count > 0 if "refused" in before else count < total
    assert re.fullmatch(after, lines[1]), lines[1]


def test_every_example_is_checked() -> None:
    """A new example needs a line above."""
    checked = ["api_concurrency.py", "chain.py", "lost_updates.py", "main_job.py", "rate_limit.py"]
    assert [path.name for path in EXAMPLES] == checked
