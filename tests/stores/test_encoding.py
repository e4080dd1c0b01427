"""Whatever the data is, what is stored is JSON, short, and without secrets (S4)."""

from __future__ import annotations

import array
import collections
import dataclasses
import enum
import json
import tracemalloc
import types
from typing import Any, Callable, ClassVar

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdiff import Coordinator
from agentdiff.stores.encoding import Encoder, clean
from agentdiff.stores.memory import MemoryStore


def stored(data: Any, redact: tuple[str, ...] = (), size: int = 64 * 1024, **more: Any) -> Any:
    text = Encoder(redact, size)(data, **more)
    assert len(text.encode()) <= size
    return json.loads(text, parse_constant=pytest.fail)


class Raises:
    def __repr__(self) -> str:
        raise SystemExit(3)


class Liar:
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError


class Text(str):
    def __str__(self) -> str:
        raise RuntimeError


class Number(int):
    def __int__(self) -> int:
        raise RuntimeError


class Fraction(float):
    def __float__(self) -> float:
        raise RuntimeError


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Login:
    user: str
    password: str
    hidden: str = dataclasses.field(default="hidden", repr=False)


@attrs.frozen
class Session:
    login: Login
    token: str
    quiet: str = attrs.field(default="quiet", repr=False)


Pair = collections.namedtuple("Pair", "name password")


class Field:
    repr = True


class Model:
    """What pydantic's models look like from outside."""

    model_fields: ClassVar[dict[str, Any]] = {"user": Field, "password": Field}

    def __init__(self) -> None:
        self.user = "me"
        self.password = "secret"
        self.__pydantic_extra__ = {"token": "secret", "more": 1}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.5, 0.5),
        ("text ✓ \x00", "text ✓ \x00"),
        ({"a": {"b": [1, (2, 3)]}}, {"a": {"b": [1, [2, 3]]}}),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (b"ab\xff", "b'ab\\xff'"),
        ({1}, [1]),
        (frozenset(), []),
        (collections.deque([1, 2]), [1, 2]),
        (array.array("i", [1, 2]), [1, 2]),
        (range(3), "range(0, 3)"),
        (Text("sub"), "sub"),
        (Number(4), 4),
        (Fraction(0.5), 0.5),
        ({"a": float("nan")}, {"a": "nan"}),
        ({"a": 1 << 70}, {"a": 1 << 70}),
        ({1 << 100_000: 1}, {"<int of 100001 bits>": 1}),
        (Colour.RED, "<Colour.RED: 1>"),
        (Level.HIGH, 3),
        ({1: "a", "1": "b", None: 0, (1, 2): 1, b"x": 2}, {"1": "a", "1 (1)": "b", "None": 0, "(1, 2)": 1, "b'x'": 2}),
        (Raises(), "<Raises whose repr raises SystemExit>"),
        ({Raises(): 1}, {"<Raises whose repr raises SystemExit>": 1}),
        (Liar(), "<Liar that raises RuntimeError>"),
        (ValueError("x"), "ValueError('x')"),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (Login("u", "p"), {"user": "u", "password": "p"}),
        (Session(Login("u", "p"), "t"), {"login": {"user": "u", "password": "p"}, "token": "t"}),
        (Pair(1, 2), {"name": 1, "password": 2}),
        (Login, f"<class '{__name__}.Login'>"),
        (1 << 100_000, "<int of 100001 bits>"),
        ("\ud800", "\ud800"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_S4_any_object_is_stored_as_the_docs_say(data: Any, expected: Any) -> None:
    """What JSON can say, as that; the rest by field, or by repr."""
    assert stored(data) == expected


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)


@given(json_like)
def test_S4_what_json_can_say_is_stored_as_it_is(data: Any) -> None:
    """Every character, number and nesting; alone, and beside an object of another kind."""
    assert stored(data) == data
    assert stored([data, b"x"]) == [data, "b'x'"]


def test_S4_an_odd_object_is_stored_beside_ordinary_ones() -> None:
    """Wherever it lies; a method's `self` is the most common one."""
    found = stored({"args": (Raises(), "bees", [b"x"]), "kwargs": {}, "a": {1: float("inf")}, "b": {"c": Text("sub")}})
    assert found == {
        "args": ["<Raises whose repr raises SystemExit>", "bees", ["b'x'"]],
        "kwargs": {},
        "a": {"1": "inf"},
        "b": {"c": "sub"},
    }


def three_times(wrap: Callable[[Any], Any]) -> Any:
    return wrap(wrap(wrap("x" * 4000)))


@pytest.mark.parametrize(
    "data",
    [
        "x" * 10_000_000,
        {"a": "x" * 10_000_000},
        list(range(1_000_000)),
        {str(number): number for number in range(1_000_000)},
        three_times(lambda inner: [inner] * 32),
        three_times(lambda inner: {str(number): inner for number in range(32)}),
    ],
    ids=["text", "text in a dict", "list", "dict", "lists of lists", "dicts of dicts"],
)
def test_S4_little_is_made_of_what_is_too_long(data: Any) -> None:
    """It is cut before its text is made: with all of it, that of lists of lists would have 130 MB."""
    encode = Encoder()
    tracemalloc.start()
    try:
        assert "cut: " in encode(data)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_S4_keys_leave_nothing_behind_however_many_there_are() -> None:
    """Only of some of them it is remembered how they are written."""
    encode = Encoder()
    tracemalloc.start()
    try:
        for number in range(10_000):
            encode({f"{number:0200}": number})
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


def test_S4_what_contains_itself_ends_there() -> None:
    """A ring is no reason to go round."""
    ring: list[Any] = [1]
    ring.append({"again": ring})
    assert stored(ring) == [1, {"again": "<list that contains itself>"}]
    twice = {1}
    assert stored({1: twice, 2: twice}) == {"1": [1], "2": [1]}  # that is no ring


@pytest.mark.parametrize("levels", [101, 5000])
def test_S4_levels_are_stored_down_to_the_hundredth(levels: int) -> None:
    """Deeper ones are told of."""
    deep: Any = "bottom"
    for _ in range(levels):
        deep = {"in": deep}
    found = stored(deep)
    for _ in range(100):
        found = found["in"]
    assert found == "<dict, nested too deep>"


@pytest.mark.parametrize(
    "data",
    [
        "x" * 100_000_000,
        b"x" * 100_000_000,
        bytearray(100_000_000),
        list(range(1_000_000)),
        dict.fromkeys(range(1_000_000)),
        {"x" * 1_000_000: 1},
        {"a": "x" * 1_000_000},
        {f"key{number}": "\x00" * 4000 for number in range(20)},
        {("x",) * 1_000_000: 1},
        "\x00" * 100_000,
        "é" * 100_000,
        "\ud800" * 100_000,
        [["x" * 50_000] * 50] * 50,
        [Raises()] * 100_000,
        collections.deque(range(1_000_000)),
        set(range(1_000_000)),
        [10**300] * 10_000,
        ["\x00" * 60_000, "\x00" * 60_000],
    ],
    ids=lambda v: type(v).__name__,
)
def test_S4_what_is_too_long_is_cut_and_marked(data: Any) -> None:
    """It stays JSON, within `max_payload`, and says that something is missing."""
    text = Encoder()(data)
    assert len(text.encode()) <= 64 * 1024
    json.loads(text)
    assert "cut: " in text or "<tuple of" in text


def test_S4_a_cut_says_how_much_is_missing() -> None:
    """The beginning is there, and the number of what isn't."""
    assert stored("x" * 1000, size=256).startswith("xxx")
    assert stored({"x" * 300: 1}) == {"x" * 256 + "... cut: 44 more": 1}
    assert stored({"a": "x" * 1000, "b": 1}, size=256)["..."] == "... cut: 1 more"
    found = stored(list(range(1000)), size=256)
    assert found[:3] == [0, 1, 2]
    assert found[-1] == f"... cut: {1000 - len(found) + 1} more"


def test_S4_secrets_are_masked_at_any_depth() -> None:
    """By key, whatever its case, in dicts, attrs classes, dataclasses, models, named tuples, and headers in bytes."""
    data = {
        "PassWord": "secret",
        "list": [{"deep": ({"token": {"a": "secret"}},)}],
        "login": Login("me", "secret"),
        "session": Session(Login("me", "secret"), "secret"),
        "pair": Pair("me", "secret"),
        "model": Model(),
        "headers": types.MappingProxyType({b"Token": b"secret"}),
        "passwords": "not exactly that key",
    }
    found = stored(data, ("Password", "token"))
    assert "secret" not in json.dumps(found)
    assert found["login"] == {"user": "me", "password": "***"}
    assert found["session"] == {"login": {"user": "me", "password": "***"}, "token": "***"}
    assert found["model"] == {"user": "me", "password": "***", "token": "***", "more": 1}
    assert found["passwords"] == "not exactly that key"


def test_S4_an_agent_s_arguments_are_masked_by_their_parameters() -> None:
    """Positional and by keyword; a method's, and `*args`; handlers get what was really given."""
    store, got = MemoryStore(), []
    with Coordinator(store=store, redact=("password", "secrets")) as coord:

        @coord.coordinate("login")
        def login(user: str, password: str, *, retry: bool = False) -> None:
            """Takes a password."""

        class Client:
            @coord.coordinate("send")
            def send(self, Password: str, *secrets: str) -> None:
                """Takes several."""

        coord.on("login_started", got.append)
        login("me", "hush", retry=True)
        login("me", password="hush")
        Client().send("hush", "hush", "hush")
    assert [event.data["args"] for event in store.read(name="login_started")] == [["me", "***"], ["me"]]
    assert [event.data["kwargs"] for event in store.read(name="login_started")] == [
        {"retry": True},
        {"password": "***"},
    ]
    (sent,) = store.read(name="send_started")
    assert sent.data["args"][1:] == ["***"] * 3
    assert got[0]["args"] == ("me", "hush")


def test_S4_free_text_is_not_masked() -> None:
    """The docs say so: nobody can know what a text means."""
    assert stored({"error": "password=hush"}, ("password",)) == {"error": "password=hush"}


def test_S4_names_that_no_store_could_take_are_made_into_some() -> None:
    """Half of a surrogate pair can't be encoded; a sender may be anything."""
    assert clean(None) is None
    assert clean("plain") == "plain"
    assert clean("é✓") == "é✓"
    assert clean("a\ud800") == "a\\ud800"
    assert clean(7) == "7"
    assert type(clean(Text("sub"))) is str


def test_S4_what_can_t_be_stored_at_all_says_so() -> None:
    """Even if everything in it raises."""

    class Worst(dict):  # type: ignore[type-arg]
        def __len__(self) -> int:
            raise KeyboardInterrupt

    class Moody:
        hashed = False

        def __hash__(self) -> int:
            if self.hashed:
                raise SystemExit
            self.hashed = True
            return 1

    assert stored(Worst()) == "<Worst that raises KeyboardInterrupt>"
    assert stored({Moody(): 1}) == "<dict could not be stored: SystemExit>"


def test_S4_data_of_every_kind_goes_through_a_coordinator() -> None:
    """None raises, none is lost."""
    store = MemoryStore()
    with Coordinator(store=store) as coord:
        for data in (Raises(), Liar(), {1, 2}, b"x", "\ud800", object()):
            coord.emit("x\ud800", data, sender="\udfff")
        coord.flush(10)
        assert coord.snapshot().counts.events_dropped == 0
    assert len(list(store.read())) == 6
