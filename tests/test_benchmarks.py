"""The benchmark runs; how fast is for people to read."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import ROOT

BENCH = ROOT / "tests" / "benchmarks" / "bench.py"


@pytest.mark.parametrize("names", [("lock_free", "emit_unheard"), ("memory",)], ids="+".join)
def test_the_benchmark_prints_a_ratio_for_each_contestant(names: tuple[str, ...]) -> None:
    """Each entry has its floor, which is 1, and ours beside it."""
    only = [word for name in names for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick", *only], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    for name in names:
        floor, ours = done.stdout.split(f"\n{name}: ")[1].splitlines()[1:3]
        assert floor.endswith(" 1.00 x")
        assert ours.endswith(" x")
