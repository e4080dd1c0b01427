"""The timeline's page (agentdiff/monitor/timeline.py), also in a real browser where one is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from scenes import Scene, crowd, story

from agentdiff.monitor import timeline

NASTY = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
MORE = ["<!--<script>", "]]>", "\u2028\u2029", "\x00\x07\x1b[31m", "\ud800", "'\"`${1}\\", "{{data}}", "&lt;b&gt;"]
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def nasty() -> Scene:
    """Text that wants out, in every place where text can be."""
    scene = Scene()
    for text in [NASTY, *MORE]:
        started = scene.start(text, 0, text, {text: text}, lock=text, run_id=text)
        scene.end(started, 1, "failed", error=text, error_type=text, lock_wait=0.5)
        scene.emit(text, 2, {text: [text]}, sender=text, run_id=text, parent_id=started.id)
        scene.emit("handler_failed", 2, {"handler": text, "error": text}, sender=text)
    return scene


def data_in(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found.group(1))


def test_the_page_stands_alone_and_forbids_the_network() -> None:
    """No address in it, and a policy that allows its own script and style by their hashes only."""
    page = timeline(story().events)
    assert "http:" not in page
    assert "https:" not in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.group(1).split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert set(rules) == {"script-src", "style-src"}
    assert all(re.fullmatch(r"'sha256-[\w+/=]+'", rule) for rule in rules.values())


def test_text_of_events_cannot_become_markup() -> None:
    """The data are one JSON text without `<`, `>` and `&`; they come out as they went in."""
    page = timeline(nasty().events, title=NASTY)
    assert "hacked" in page
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"<(img|!--)", page)
    page.encode("utf-8")
    assert data_in(page)["lanes"][0][0] == NASTY


def test_ten_thousand_events_are_under_five_megabytes() -> None:
    """Also where each holds a lot of text, in any alphabet."""
    assert len(timeline(crowd(5000).events).encode()) < 5e6
    scene = Scene()
    for number in range(10_000):
        scene.emit("слово", number, "€" * 2000)
    assert len(timeline(scene.events).encode()) < 5.5e6


def test_an_empty_store_gives_a_page() -> None:
    """It says so."""
    assert data_in(timeline([]))["calls"] == []


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


def opened(browser: Browser, path: Path, events: Any, **more: Any) -> None:
    page = path / "run.html"
    page.write_text(timeline(events, **more), encoding="utf-8")
    browser.open(page)
    assert browser.complaints == []
    assert browser.requests == [page.as_uri()]


def span(browser: Browser) -> float:
    """How many seconds the picture shows."""
    browser.drawn()
    found = browser.run("(({from, to}) => to - from)(document.getElementById('plot').dataset)")
    assert isinstance(found, float)
    return found


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_opens_in_a_browser(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    """No complaint, no request, no sideways scrolling, and something is drawn, in both schemes and sizes."""
    browser.look(width, 800, dark=dark)
    opened(browser, tmp_path, story().events)
    assert browser.run("document.documentElement.scrollWidth") <= width
    colors = """(() => { const c = document.getElementById('canvas'), seen = new Set();
        const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);
        for (const p of d) seen.add(p); return seen.size; })()"""
    assert browser.run(colors) > 20
    assert "ValueError: no sources" in browser.run("document.getElementById('story').textContent")


@in_a_browser
def test_the_picture_can_be_walked(browser: Browser, tmp_path: Path) -> None:
    """Wheel, keys and buttons zoom and pan; failures are found; hover and click tell the event."""
    browser.look(1280, 800)
    opened(browser, tmp_path, story().events)
    all_of_it = span(browser)
    where = browser.run("(({left, top}) => [left, top])(document.getElementById('canvas').getBoundingClientRect())")
    x, y = where[0] + 600, where[1] + 100
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
    assert span(browser) < all_of_it
    browser.run("document.getElementById('fit').click()")
    assert span(browser) == pytest.approx(all_of_it)
    browser.run("document.getElementById('in').click()")
    zoomed = span(browser)
    assert zoomed < all_of_it
    browser.run("document.getElementById('plot').focus()")
    start = "+document.getElementById('plot').dataset.from"
    before = browser.run(start)
    browser.key("ArrowRight")
    browser.drawn()
    assert browser.run(start) > before
    assert span(browser) == pytest.approx(zoomed)
    before = browser.run(start)
    browser.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    browser.mouse("mouseMoved", x - 50, y, button="left", buttons=1)
    browser.mouse("mouseReleased", x - 50, y, button="left", clickCount=1)
    assert browser.run(start) > before
    browser.key("0")
    assert span(browser) == pytest.approx(all_of_it)
    browser.key("f")
    told = browser.run("document.getElementById('panel').textContent")
    assert "ValueError: no sources" in told
    assert "waited forcritic(bees), researcher(bees)" in told
    for _ in range(4):
        browser.key("+")
    shown = browser.run("(({from, to}) => [+from, +to])(document.getElementById('plot').dataset)")
    assert shown[0] < 1.4 < shown[1] < 2.6  # around what is selected
    browser.key("0")
    browser.key("Escape")
    assert browser.run("document.getElementById('panel').hidden")
    browser.mouse("mouseMoved", where[0] + 1000, where[1] + 28 + 20)
    assert browser.run("document.getElementById('tip').textContent").startswith("writer(On bees)completed")
    browser.run("document.getElementById('find').value = 'ants'")
    browser.run("document.getElementById('find').dispatchEvent(new Event('input'))")
    assert browser.run("document.getElementById('found').textContent") == "1 found"
    assert browser.complaints == []


@in_a_browser
def test_injected_markup_is_inert(browser: Browser, tmp_path: Path) -> None:
    """It is shown as text wherever it stands; nothing runs, nothing is fetched."""
    opened(browser, tmp_path, nasty().events, title=NASTY)
    browser.run("document.getElementById('plot').focus()")
    for _ in range(4 * (1 + len(MORE))):
        browser.key("n")
        assert browser.run("document.querySelectorAll('img, script:not([id]) ~ script').length") == 0
    assert NASTY in browser.run("document.getElementById('story').textContent")
    assert browser.run("document.title") == NASTY
    assert browser.complaints == []
    assert len(browser.requests) == 1


@in_a_browser
def test_ten_thousand_events_open(browser: Browser, tmp_path: Path) -> None:
    """And can be zoomed; how fast is measured elsewhere."""
    opened(browser, tmp_path, crowd(5000).events)
    before = span(browser)
    browser.run("document.getElementById('in').click()")
    assert span(browser) < before
    assert browser.complaints == []
