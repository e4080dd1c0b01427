"""The command `agentdiff`: demo, tail, stats, timeline."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, Optional

import attrs

from ..stores import Store, StoreError, open_store

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

_STORE = "a store's URL: sqlite:///events.db, redis://host:6379/0"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Do what the command line says.

    Returns:
        The exit code: 0; 1 if a store can't be read or a file not written; 2 if the arguments make no sense.
    """
    try:
        with suppress(AttributeError, ValueError):  # what stands in for stdout in tests has no such method
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        return _run(arguments)
    except BrokenPipeError:  # who read this has enough: `| head`
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the last flush goes there
        return 0
    except KeyboardInterrupt:
        return 130


def _run(arguments: Optional[Sequence[str]]) -> int:
    parser = _parser()
    try:
        given = parser.parse_args(arguments)
        given.command(given)
        sys.stdout.flush()
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    except _Refused as refused:
        print(f"agentdiff: {refused}", file=sys.stderr)
        return 2
    except (StoreError, ImportError) as error:
        print(f"agentdiff: {_one_line(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"agentdiff: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


class _Refused(Exception):
    """The arguments make no sense."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _parser() -> ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def number(text: str) -> int:
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"a whole number is needed, not {text!r}")
        return int(text)

    parser = Parser(prog="agentdiff", description="Look at what the agents did and are doing.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, call: Any, words: str, example: str = "") -> Any:
        found = commands.add_parser(
            name,
            help=words,
            description=words[0].upper() + words[1:] + ".",
            epilog=example and f"Example: {example}",
        )
        found.set_defaults(command=call)
        return found

    demo = add(
        "demo", _demo, "run the main job: the same work with plain threads, and with agentdiff", "agentdiff demo"
    )
    demo.add_argument("--store", metavar="STORE", help="write the events down there, to look at them afterwards")

    tail = add("tail", _tail, "print the last events of a store", "agentdiff tail sqlite:///events.db --follow")
    tail.add_argument("store", metavar="STORE", help=_STORE)
    how = tail.add_mutually_exclusive_group()
    how.add_argument("-f", "--follow", action="store_true", help="go on with those that come, until Ctrl-C")
    how.add_argument("-t", "--tree", action="store_true", help="each event beneath the one that caused it")
    tail.add_argument("-n", "--lines", metavar="N", type=number, default=100, help="how many; 0: all (default: 100)")
    tail.add_argument("--json", action="store_true", help="one JSON object a line")
    _add_which(tail, name=True)

    numbers = add("stats", _stats, "numbers about agents and locks", "agentdiff stats sqlite:///events.db")
    numbers.add_argument("store", metavar="STORE", help=_STORE)
    numbers.add_argument("--json", action="store_true", help="as JSON, times in seconds")
    _add_which(numbers)

    picture = add(
        "timeline",
        _timeline,
        "a picture of what happened, as a web page",
        "agentdiff timeline sqlite:///events.db -o run.html",
    )
    picture.add_argument("store", metavar="STORE", help=_STORE)
    picture.add_argument("-o", "--output", metavar="FILE", required=True, help="where to write it; -: standard output")
    picture.add_argument(
        "--format",
        choices=("html", "trace"),
        default="html",
        help="html: one page that needs no network (default); trace: JSON for Perfetto and chrome://tracing",
    )
    _add_which(picture)
    return parser


def _add_which(parser: ArgumentParser, name: bool = False) -> None:
    if name:
        parser.add_argument("--name", metavar="PATTERN", help="only events of this name; * and ? stand for others")
    parser.add_argument("--run", metavar="ID", help="only events of this run")


@contextmanager
def _opened(url: str, *, new: bool = False) -> Iterator[Store]:
    path = url[len("sqlite:///") :]
    if not new and url.lower().startswith("sqlite:///") and path and not os.path.exists(path):
        raise _Refused(f"there is no file {path!r}")  # else opening makes it
    try:
        store = open_store(url)
    except (TypeError, ValueError) as error:
        raise _Refused(_one_line(error)) from None
    with store:
        yield store


def _demo(given: Namespace) -> None:
    from .main_job import main as main_job

    if given.store is None:
        print(main_job())
        return
    with _opened(given.store, new=True) as store:
        print(main_job(store=store))
    print(f"\nThe events are in {given.store}. Look at them: agentdiff timeline {given.store} -o run.html")


def _which(given: Namespace) -> dict[str, Any]:
    name = getattr(given, "name", None)
    if name == "":
        raise _Refused("--name must not be empty")
    return {"name": name, "run": given.run}


def _tail(given: Namespace) -> None:
    from .tail import as_json, as_line, as_tree, follow, last_events

    if given.tree and given.json:
        raise _Refused("--tree and --json exclude each other")
    which = _which(given)
    line = as_json if given.json else as_line
    with _opened(given.store, new=given.follow) as store:
        events = last_events(store.read(**which), given.lines)
        for text in as_tree(events) if given.tree else map(line, events):
            print(text)
        if given.follow:
            sys.stdout.flush()
            for event in follow(store, events[-1].id if events else None, _wait_for_reader, **which):
                print(line(event), flush=True)


def _wait_for_reader() -> bool:
    """Wait for a moment; False if nobody reads our output any more."""
    from .tail import POLL

    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # no such call on this system, or output that is no file
        time.sleep(POLL)
        return True
    return not poll.poll(POLL * 1000)


def _stats(given: Namespace) -> None:
    from .stats import stats

    with _opened(given.store) as store:
        found = stats(store.read(**_which(given)))
    print(json.dumps(attrs.asdict(found), indent=2) if given.json else _safe(str(found)))


def _safe(text: str) -> str:
    from .tail import printable

    return "\n".join(map(printable, text.split("\n")))


def _timeline(given: Namespace) -> None:
    from .timeline import timeline
    from .trace import trace

    with _opened(given.store) as store:
        events = list(store.read(**_which(given)))
    if given.format == "trace":
        text = json.dumps(trace(events))
    else:
        text = timeline(events, title=f"Run {given.run}" if given.run is not None else "agentdiff timeline")
    if given.output == "-":
        sys.stdout.write(text)
        return
    with open(given.output, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"{len(events)} events are shown in {given.output}")
