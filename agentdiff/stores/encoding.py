"""Any Python object as JSON text of bounded length, in bounded time, without its secrets (S4).

What is small, as most events are, is written as it is met. The rest is first made plain, piece by piece, until the
budget of `max_payload` is used up; only then JSON is made. So neither a long string nor a huge list keeps the
interpreter busy, and nothing of either is copied but what is kept.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from math import isfinite
from typing import Any, Callable, Optional

MASK = "***"
MAX_PAYLOAD = 64 * 1024
LEAST_PAYLOAD = 256

_DEEPEST = 100
_LONGEST_INT = 4096  # bits; to write one down takes time that grows with the square of its length
_LONGEST_KEY = 256
_FEWEST = 16
_FEW = 32
_SHORT = 4096
_SMALL = 1 << 63
_LEVELS = 4
_HEADS = 1000
_PLAIN = frozenset({type(None), bool})


class Masked:
    """Stands for an argument whose parameter is to be masked."""


def clean(text: Any) -> Optional[str]:
    """A name or an id as any store can take it: None, or text that can be encoded."""
    if text is None:
        return None
    if not isinstance(text, str):
        text = _repr(text, _LONGEST_KEY)
    if text.isascii():
        return str.__str__(text)
    return str.encode(text, "utf-8", "backslashreplace").decode("utf-8")


class Encoder:
    """Makes JSON text of events' data.

    Args:
        redact: keys, fields and parameters whose values are masked, at any depth; upper and lower case are the same.
        max_payload: how many bytes of UTF-8 the text of one event may have.
    """

    def __init__(self, redact: Iterable[str] = (), max_payload: int = MAX_PAYLOAD) -> None:
        self.redact: frozenset[str] = check_redact(redact)
        self.max_payload: int = check_max_payload(max_payload)
        self._writers = _make_writers(self.redact, self.max_payload)

    def __call__(self, data: Any, parameters: Iterable[tuple[str, ...]] = ()) -> str:
        """The text. Never raises.

        Args:
            data: anything.
            parameters: where `data` are an agent's arguments: the names of its parameters, by position; the last one
                stands for all further ones.
        """
        try:
            if parameters and self.redact:
                data = self._mask_arguments(data, parameters)
            return self._quickly(data) or self._carefully(data)
        except BaseException as error:  # users' code may raise anything; this is not its thread
            return _as_json(f"<{_type_name(data)} could not be stored: {_type_name(error)}>")

    def _quickly(self, data: Any) -> Optional[str]:
        """The text of what is small and of JSON's own kinds, or None."""
        try:
            text = self._writers[type(data)](data)
            size = len(text) if text.isascii() else len(text.encode())
        except Exception:
            return None
        return text if size <= self.max_payload else None

    def _carefully(self, data: Any) -> str:
        """The text of anything, with as much of it as there is room for."""
        budget = self.max_payload
        for _ in range(4):
            text = _as_json(_Plain(self.redact, budget).of(data, 0))
            size = len(text) if text.isascii() else len(text.encode())
            if size <= self.max_payload:
                return text
            budget = max(_FEWEST, int(budget * self.max_payload / size * 0.9))
        return _as_json(f"<{_type_name(data)}, too long to be stored>")

    def _mask_arguments(self, data: Any, parameters: Iterable[tuple[str, ...]]) -> Any:
        if type(data) is not dict or type(data.get("args")) is not tuple:
            return data
        args = list(data["args"])
        for names in parameters:
            for place in range(len(args) if names else 0):
                if names[min(place, len(names) - 1)].lower() in self.redact:
                    args[place] = Masked
        return {**data, "args": args}


def check_redact(redact: Any) -> frozenset[str]:
    """Refuse what can't be the names of secrets."""
    if isinstance(redact, (str, bytes)) or not isinstance(redact, (tuple, list, Set)):
        raise TypeError(f"redact must be a tuple of names, not {redact!r}")
    for name in redact:
        if not isinstance(name, str) or not name:
            raise TypeError(f"redact must be a tuple of names; {name!r} is none")
    return frozenset(name.lower() for name in redact)


def check_max_payload(size: Any) -> int:
    """Refuse what can't be a size."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"max_payload must be a whole number of bytes, not {size!r}")
    if size < LEAST_PAYLOAD:
        raise ValueError(f"max_payload must be at least {LEAST_PAYLOAD} bytes, not {size}")
    return size


# -- small objects ----------------------------------------------------------------------------------------------

_Writers = dict[type, Callable[[Any], str]]


class _UnusualError(Exception):
    """The whole has to be made plain, since it is too long, or a key is unusual or secret."""


class _Heads(dict[str, str]):
    """Keys as they stand in JSON, with a colon."""

    def __init__(self, redact: frozenset[str]) -> None:
        self._redact = redact

    def __missing__(self, key: Any) -> str:
        if type(key) is not str or len(key) > _LONGEST_KEY or key.lower() in self._redact:
            raise _UnusualError
        head = f"{_quoted(key)}:"
        if len(self) < _HEADS:
            self[key] = head
        return head


def _of_text(text: str) -> str:
    if len(text) > _SHORT:
        raise _UnusualError
    return _quoted(text)


def _of_number(number: float) -> str:
    if not -_SMALL < number < _SMALL:  # nan neither
        raise _UnusualError
    return repr(number)


def _of_container(items: Any) -> str:
    raise _UnusualError  # it is too deep


_quoted = json.encoder.encode_basestring
_of_word = {None: "null", True: "true", False: "false"}.__getitem__


def _make_writers(redact: frozenset[str], longest: int) -> _Writers:
    """Functions that write an object of a type as JSON, as it is when it is met: others may change it meanwhile."""
    heads = _Heads(redact)

    def of_other(value: Any) -> str:
        return _as_json(_Plain(redact, longest).of(value, 0))

    def with_containers(writers: _Writers) -> _Writers:
        write = writers.get

        def of_dict(items: dict[Any, Any]) -> str:
            if len(items) > _FEW:
                raise _UnusualError
            pieces = []
            for key, value in items.copy().items():
                kind = type(value)
                if kind is str and len(value) <= _SHORT:  # these two are frequent, and a call takes its time
                    pieces.append(heads[key] + _quoted(value))
                elif kind is float and -_SMALL < value < _SMALL:
                    pieces.append(f"{heads[key]}{value!r}")
                else:
                    pieces.append(heads[key] + write(kind, of_other)(value))
            text = ",".join(pieces)
            if len(text) > longest:
                raise _UnusualError
            return f"{{{text}}}"

        def of_list(items: Any) -> str:
            if len(items) > _FEW:
                raise _UnusualError
            text = ",".join([write(type(value), of_other)(value) for value in items[:_FEW]])
            if len(text) > longest:
                raise _UnusualError
            return f"[{text}]"

        return {**writers, dict: of_dict, list: of_list, tuple: of_list}

    writers: _Writers = {str: _of_text, int: _of_number, float: _of_number, bool: _of_word, type(None): _of_word}
    writers.update(dict.fromkeys((dict, list, tuple), _of_container))
    for _ in range(_LEVELS):
        writers = with_containers(writers)
    return writers


# -- all others ----------------------------------------------------------------------------------------------


def _as_json(plain: Any) -> str:
    text = _to_json(plain)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            return _to_ascii_json(plain)
    return text


_to_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode
_to_ascii_json = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


class _Plain:
    """One object on its way to what JSON can say."""

    __slots__ = ("_left", "_path", "_redact")

    def __init__(self, redact: frozenset[str], budget: int) -> None:
        self._redact = redact
        self._left = budget  # characters of JSON, about
        self._path: list[int] = []  # the containers that this one is in

    def of(self, value: Any, depth: int) -> Any:  # noqa: PLR0911  (a table, written as code)
        kind = type(value)
        if kind is str:
            return self._text(value)
        if kind in _PLAIN:
            self._left -= 5
            return value
        if kind is int or kind is float:
            return self._number(value)
        if value is Masked:
            return self._text(MASK)
        if depth >= _DEEPEST:
            return self._text(f"<{_type_name(value)}, nested too deep>")
        try:
            me = id(value)
            if me in self._path:
                return self._text(f"<{_type_name(value)} that contains itself>")
            self._path.append(me)
            try:
                return self._other(value, kind, depth + 1)
            finally:
                self._path.pop()
        except BaseException as error:  # a property, an iterator, a metaclass of somebody's
            return self._text(f"<{_type_name(value)} that raises {_type_name(error)}>")

    def _other(self, value: Any, kind: Any, depth: int) -> Any:  # noqa: PLR0911
        if isinstance(value, dict):
            return self._pairs(dict.items(value), len(value), depth)
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return self._pairs(zip(kind._fields, value), tuple.__len__(value), depth)
        if isinstance(value, (list, tuple)):
            base: Any = list if isinstance(value, list) else tuple
            return self._items(base.__getitem__(value, slice(self._room())), base.__len__(value), depth)
        if isinstance(value, (set, frozenset, deque)) or _is_array(value):
            return self._items(_first(value, self._room()), len(value), depth)
        if isinstance(value, str):
            return self._text(str.__str__(value))
        if isinstance(value, int):
            return self._number(int.__int__(value))
        if isinstance(value, float):
            return self._number(float.__float__(value))
        if isinstance(value, (bytes, bytearray)):
            return self._bytes(value)
        fields = _fields_of(value, kind)
        if fields is not None:
            return self._pairs(fields, len(fields), depth)
        if isinstance(value, Mapping):
            return self._pairs(value.items(), len(value), depth)
        return self._text(_repr(value, max(self._left, _FEWEST)))

    def _room(self) -> int:
        return max(self._left // 2, 0) + 1

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], size: int, depth: int) -> Any:
        self._left -= 2
        redact = self._redact
        found: dict[str, Any] = {}
        for key, value in _first(pairs, self._room()):  # copied in one step: others may change it meanwhile
            if self._left <= 0:
                break
            name = key if type(key) is str and len(key) <= _LONGEST_KEY else _key(key)
            if name in found:
                name = f"{name} ({len(found)})"
            self._left -= len(name) + 4
            if redact and (name.lower() in redact or _is_secret(key, redact)):
                found[name] = self._text(MASK)
                continue
            kind = type(value)
            if kind is str and len(value) <= self._left:  # the same as `of` does, without a call
                self._left -= len(value) + 2
                found[name] = value
            elif kind in _PLAIN:
                self._left -= 5
                found[name] = value
            else:
                found[name] = self.of(value, depth)
        if len(found) < size:
            found["..."] = self._cut(size - len(found))
        return found

    def _items(self, items: Iterable[Any], size: int, depth: int) -> Any:
        self._left -= 2
        found = []
        for item in items:
            if self._left <= 0:
                break
            self._left -= 1
            found.append(self.of(item, depth))
        if len(found) < size:
            found.append(self._cut(size - len(found)))
        return found

    def _cut(self, missing: int) -> str:
        return f"... cut: {missing} more"

    def _text(self, text: str) -> str:
        room = max(self._left, _FEWEST)
        self._left -= len(text) + 2
        return text if len(text) <= room else f"{text[:room]}... cut: {len(text) - room} more"

    def _number(self, number: Any) -> Any:
        if type(number) is int:
            if number.bit_length() > _LONGEST_INT:
                return self._text(f"<int of {number.bit_length()} bits>")
        elif not isfinite(number):  # JSON has no word for it
            return self._text(repr(number))
        self._left -= 8 if -9_999_999 < number < 9_999_999 else len(repr(number))
        return number

    def _bytes(self, value: Any) -> str:
        room = max(self._left, _FEWEST)
        text = repr(value[:room])
        self._left -= len(text) + 2
        return text if len(value) <= room else f"{text}... cut: {len(value) - room} more"


def _first(items: Iterable[Any], number: int) -> list[Any]:
    return list(islice(items, number))


def _key(key: Any) -> str:
    text = str.__str__(key) if isinstance(key, str) else _repr(key, _LONGEST_KEY)
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}... cut: {len(text) - _LONGEST_KEY} more"


def _is_secret(key: Any, redact: frozenset[str]) -> bool:
    return isinstance(key, bytes) and len(key) <= _LONGEST_KEY and key.decode("latin-1").lower() in redact


def _is_array(value: Any) -> bool:
    array = sys.modules.get("array")
    return array is not None and isinstance(value, array.array)


def _fields_of(value: Any, kind: Any) -> Optional[list[tuple[str, Any]]]:
    """The fields of an attrs class, a dataclass or a pydantic model; without those that its `repr` leaves out."""
    if hasattr(kind, "__attrs_attrs__"):
        names = [field.name for field in kind.__attrs_attrs__ if field.repr]
    elif hasattr(kind, "__dataclass_fields__"):
        from dataclasses import fields

        names = [field.name for field in fields(value) if field.repr]
    else:
        declared = getattr(kind, "model_fields", None) or getattr(kind, "__fields__", None)
        if not isinstance(declared, dict):
            return None
        own = object.__getattribute__(value, "__dict__")
        found = [(name, own[name]) for name, field in declared.items() if name in own and getattr(field, "repr", True)]
        more = getattr(value, "__pydantic_extra__", None)
        return [*found, *more.items()] if isinstance(more, dict) else found
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _repr(value: Any, room: int) -> str:
    if isinstance(value, int) and int.bit_length(value) > _LONGEST_INT:
        return f"<int of {int.bit_length(value)} bits>"
    if isinstance(value, (bytes, bytearray)):
        return repr(value[:room])
    if isinstance(value, (tuple, frozenset)) and len(value) > room:  # a key of a dict
        return f"<{_type_name(value)} of {len(value)}>"
    try:
        return repr(value)
    except BaseException as error:
        return f"<{_type_name(value)} whose repr raises {_type_name(error)}>"


def _type_name(value: Any) -> str:
    name = type.__dict__["__name__"].__get__(type(value))
    return str(name)[:_LONGEST_KEY]
