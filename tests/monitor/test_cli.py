"""The command `agentdiff` (agentdiff/monitor/cli.py, tail.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scenes import Scene, story
from support import ROOT

from agentdiff import Coordinator
from agentdiff.monitor import cli
from agentdiff.monitor.tail import as_line, as_tree, follow, last_events
from agentdiff.stores import open_store

COMMAND = [sys.executable, "-W", "error", "-m", "agentdiff"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with a run in it, and something outside."""
    found = f"sqlite:///{tmp_path / 'events.db'}"
    with Coordinator(store=found) as coord:

        @coord.coordinate("agent", lock_name="x")
        def agent(n: int, *, how: str = "") -> int:
            coord.emit("halfway", n)
            return 1 // n

        with coord.run("r1"):
            agent(1, how="fast")
        with pytest.raises(ZeroDivisionError):
            agent(0)
    return found


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    return (code, *capsys.readouterr())


def test_tail_prints_a_line_for_each_event(capsys: Any, url: str) -> None:
    """Time, name, what it says, run; the last so many; only those asked for."""
    code, out, err = run(capsys, "tail", url)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 6
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}  agent_started  1 how=fast  \[r1\]", lines[0])
    assert re.search(r"agent_complete  -> 1 \(.*s, .* of it waiting for x\)  \[r1\]", lines[2])
    assert "agent_failed  ZeroDivisionError: integer division or modulo by zero (" in lines[5]
    assert run(capsys, "tail", url, "-n", "2")[1].splitlines() == lines[-2:]
    assert run(capsys, "tail", url, "-n", "0")[1].splitlines() == lines
    assert run(capsys, "tail", url, "--run", "r1")[1].splitlines() == lines[:3]
    assert run(capsys, "tail", url, "--name", "*way")[1].splitlines() == [lines[1], lines[4]]


def test_tail_json_is_an_object_a_line(capsys: Any, url: str) -> None:
    """With every field of the event."""
    lines = run(capsys, "tail", url, "--json")[1].splitlines()
    assert [json.loads(line)["name"] for line in lines][:2] == ["agent_started", "halfway"]
    assert set(json.loads(lines[0])) == {"name", "data", "sender", "id", "time", "run_id", "parent_id"}


def test_tail_tree_puts_each_event_beneath_its_cause(capsys: Any, url: str) -> None:
    """What nobody caused stands at the left."""
    lines = run(capsys, "tail", url, "--tree")[1].splitlines()
    assert [re.sub(r"\S+\.\d{3}  (\w+).*", r"\1", line) for line in lines] == [
        "agent_started",
        "├─ halfway",
        "└─ agent_complete",
        "agent_started",
        "├─ halfway",
        "└─ agent_failed",
    ]


def test_a_tree_survives_rings_depth_and_lost_causes() -> None:
    """Each event stands there once, whatever its parent claims to be."""
    scene = Scene()
    scene.emit("itself", 0, parent_id="e1")
    scene.emit("one", 0, parent_id="e3")
    scene.emit("other", 0, parent_id="e2")
    scene.emit("lost", 0, parent_id="gone")
    last = scene.emit("deep", 0)
    for _ in range(50):
        last = scene.emit("deep", 0, parent_id=last.id)
    lines = list(as_tree(scene.events))
    assert len(lines) == len(scene.events)
    assert max(map(len, lines)) < 110
    assert "(+26) " in "".join(lines)


def test_no_event_can_move_the_terminal_s_cursor() -> None:
    """Control characters come as escapes, wherever they stand."""
    scene = Scene()
    event = scene.emit("a\x1b[2J\n", 0, "b\x9b1m\u202e\r\ud800", run_id="\x07")
    assert as_line(event).isprintable()
    assert r"a\x1b[2J\n" in as_line(event)
    assert "b\\x9b1m\\u202e" in as_line(event)


def test_lines_of_strange_events(capsys: Any) -> None:
    """Failures of handlers, no data, data that is cut."""
    lines = [as_line(event)[14:] for event in story().events]
    assert "handler_failed  publish: ConnectionError: away  [r1]" in lines
    assert 'source_found  {"url": "x"}  [r1]' in lines
    scene = Scene()
    assert as_line(scene.emit("tick", 0)).endswith("  tick  ")
    assert as_line(scene.emit("a_complete", 0, {"agent": "a"}, sender="a")).endswith("  a_complete  ")
    assert as_line(scene.emit("a_complete", 0, {"agent": "a", "duration": 2}, sender="a")).endswith("(2 s)")


def test_following_gives_what_comes_after() -> None:
    """Each event once, in order, until nobody looks any more."""
    store = open_store("memory://")
    turns = iter(range(3))
    with Coordinator(store=store) as coord:
        coord.emit("tick", -1)
        coord.flush()

        def wait() -> bool:
            turn = next(turns, None)
            if turn is not None:
                coord.emit("tick", turn)
                coord.emit("other", turn)
                coord.flush()
            return turn is not None

        seen = last_events(store.read(), 1)[0].id
        found = [event.data for event in follow(store, seen, wait, name="tick", run=None)]
    assert found == [0, 1, 2]


def test_tail_follow_shows_what_another_process_writes(tmp_path: Path) -> None:
    """Also into a store that wasn't there before; it ends when nobody reads."""
    url = f"sqlite:///{tmp_path / 'new.db'}"
    with subprocess.Popen(
        [*COMMAND, "tail", url, "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        with Coordinator(store=url) as coord:
            for word in ("first", "second"):
                coord.emit(word)
                assert word in tail.stdout.readline()
        tail.stdout.close()
        assert tail.wait(30) == 0
        assert tail.stderr.read() == ""


def test_ctrl_c_ends_following_quietly(monkeypatch: Any, capsys: Any, url: str) -> None:
    """With the exit code that shells expect."""

    def interrupt() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_wait_for_reader", interrupt)
    code, out, err = run(capsys, "tail", url, "-f", "-n", "1")
    assert (code, out.count("\n"), err) == (130, 1, "")


def test_following_goes_on_where_the_reader_can_not_be_watched(monkeypatch: Any, capsys: Any, url: str) -> None:
    """Output that is no file is taken to be read."""
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    assert cli._wait_for_reader() is True


def test_a_broken_pipe_ends_quietly(url: str) -> None:
    """`agentdiff tail ... | head -1` prints one line and no error."""
    done = subprocess.run(
        ["/bin/sh", "-c", f"{{ {' '.join(COMMAND)} tail '{url}'; echo code $? >&2; }} | true"],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env=ENVIRONMENT,
    )
    assert done.stderr == "code 0\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["tail"],
        ["tail", "sqlite:///gone.db"],
        ["tail", "nonsense"],
        ["tail", "memory://x"],
        ["tail", "memory://", "-n", "-1"],
        ["tail", "memory://", "-n", "x"],
        ["tail", "memory://", "--name", ""],
        ["tail", "memory://", "--tree", "--follow"],
        ["tail", "memory://", "--tree", "--json"],
        ["stats"],
        ["timeline", "memory://"],
        ["timeline", "memory://", "-o", "x", "--format", "png"],
        ["demo", "--loud"],
    ],
    ids=" ".join,
)
def test_bad_arguments_give_one_line_and_exit_code_2(capsys: Any, arguments: list[str]) -> None:
    """On standard error, and nothing else anywhere."""
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("agentdiff")


def test_what_can_not_be_read_or_written_gives_one_line_and_exit_code_1(capsys: Any, tmp_path: Path, url: str) -> None:
    """A file that is no store; a folder that isn't there."""
    (tmp_path / "no.db").write_text("this is no database, but long enough to be looked at as one" * 20)
    for arguments in (["stats", f"sqlite:///{tmp_path}/no.db"], ["timeline", url, "-o", str(tmp_path / "a" / "b")]):
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("command", ["", "demo", "tail", "stats", "timeline"])
def test_help_says_what_there_is(capsys: Any, command: str) -> None:
    """Every option is explained, and within 80 columns where the terminal has these."""
    code, out, err = run(capsys, *filter(None, [command, "--help"]))
    assert (code, err) == (0, "")
    assert out.startswith("usage: agentdiff")
    assert ("Example: agentdiff" in out) == bool(command)


def test_stats_in_words_and_as_json(capsys: Any, url: str) -> None:
    """The same numbers."""
    code, out, _ = run(capsys, "stats", url)
    assert code == 0
    assert "1 agent (agent) was called 2 times" in out
    assert "1 call failed: agent(0): ZeroDivisionError" in out
    found = json.loads(run(capsys, "stats", url, "--json", "--run", "r1")[1])
    assert (found["events"], found["agents"][0]["calls"], found["locks"][0]["name"]) == (3, 1, "x")


def test_timeline_writes_a_page_or_a_trace(capsys: Any, tmp_path: Path, url: str) -> None:
    """Into a file, or to standard output."""
    page = tmp_path / "run.html"
    assert run(capsys, "timeline", url, "-o", str(page), "--run", "r1") == (0, f"3 events are shown in {page}\n", "")
    assert "<title>Run r1</title>" in page.read_text(encoding="utf-8")
    out = run(capsys, "timeline", url, "-o", "-", "--format", "trace")[1]
    assert json.loads(out)["traceEvents"]
    assert run(capsys, "timeline", url, "-o", "-")[1].startswith("<!doctype html>")


def test_demo_runs_the_main_job_and_records_it(capsys: Any, tmp_path: Path) -> None:
    """All 20 arrive; with `--store` the events are there afterwards."""
    code, out, _ = run(capsys, "demo")
    assert code == 0
    assert re.search(r"^reports written +\d+ +20$", out, re.M)
    url = f"sqlite:///{tmp_path / 'demo.db'}"
    assert f"agentdiff timeline {url} -o run.html" in run(capsys, "demo", "--store", url)[1]
    assert "was called 20 times" in run(capsys, "stats", url)[1]


def test_the_package_can_be_run() -> None:
    """`python -m agentdiff` is the command."""
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "timeline" in done.stdout


def test_F2_the_core_imports_nothing_of_it() -> None:
    """Neither the monitor nor argparse."""
    script = "import sys, agentdiff; print([m for m in sys.modules if 'monitor' in m or m == 'argparse'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout == "[]\n"
