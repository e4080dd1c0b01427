"""Settings of the default coordinator from the environment (F3)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Callable, Optional
from urllib.parse import urlencode, urlsplit

from .coordinator import Coordinator

PREFIX = "AGENTDIFF_COORDINATION_"
BACKENDS = ("none", "file", "redis")
DATA_DIR = os.path.join("~", ".agentdiff", "coordination")
REDIS_URL = "redis://localhost:6379"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def _whole_from(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        number = int(text)
        if number < least:
            raise ValueError
        return number

    return whole


def _seconds(text: str) -> Any:
    if text.strip().lower() == "none":
        return None
    number = float(text)
    if not number >= 0:
        raise ValueError
    return number


def _one_of(*allowed: str) -> Callable[[str], str]:
    def one(text: str) -> str:
        for known in allowed:
            if text.strip().lower() == known.lower():
                return known
        raise ValueError

    return one


def _yes(text: str) -> bool:
    return _one_of(*_TRUE, *_FALSE)(text) in _TRUE


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _redis_url(text: str) -> str:
    if not text.strip().startswith(("redis://", "rediss://", "unix://")):
        raise ValueError
    _ = urlsplit(text.strip()).port  # raises where it is no number
    return text.strip()


_FROM_1 = (_whole_from(1), "a whole number of at least 1")
_TIME = (_seconds, "seconds, such as 30 or 0.5, or none")
_VARIABLES: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "WORKERS": ("workers", *_FROM_1),
    "LOCK_TIMEOUT": ("lock_timeout", *_TIME),
    "MAX_PENDING": ("max_pending", *_FROM_1),
    "MAX_DEPTH": ("max_depth", *_FROM_1),
    "MAX_JOINS": ("max_joins", *_FROM_1),
    "SLOW_AFTER": ("slow_after", *_TIME),
    "EXIT_TIMEOUT": ("exit_timeout", *_TIME),
    "FLUSH_TIMEOUT": ("flush_timeout", *_TIME),
    "REDACT": ("redact", _names, "names, with commas between them"),
    "MAX_PAYLOAD": ("max_payload", _whole_from(256), "a whole number of at least 256"),
    "LOG_LEVEL": ("log_level", _one_of(*_LEVELS), " or ".join(_LEVELS)),
    "PERSISTENCE_BACKEND": ("backend", _one_of(*BACKENDS), " or ".join(BACKENDS)),
    "DISABLE_PERSISTENCE": ("disabled", _yes, " or ".join((*_TRUE, *_FALSE))),
    "DATA_DIR": ("data_dir", str, "a folder"),
    "REDIS_URL": ("redis_url", _redis_url, "a URL that begins with redis:// or rediss:// or unix://"),
    "REDIS_PASSWORD": ("redis_password", str, "any text"),
    "REDIS_DB": ("redis_db", _whole_from(0), "a whole number of at least 0"),
    "REDIS_PREFIX": ("redis_prefix", str, "any text"),
}
_OF_STORES = ("backend", "disabled", "data_dir", "redis_url", "redis_password", "redis_db", "redis_prefix")


def from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the environment says, by the name of the setting.

    Raises:
        ValueError: a variable whose value makes no sense; it says which, what it is, and what is allowed.
    """
    found: dict[str, Any] = {}
    for suffix, (setting, parse, allowed) in _VARIABLES.items():
        text = environment.get(PREFIX + suffix)
        if text is None or not text.strip():
            continue
        try:
            found[setting] = parse(text)
        except ValueError:
            shown = f"{text.partition('@')[0].rpartition(':')[0]}:...@..." if "@" in text else text  # no password
            raise ValueError(f"{PREFIX}{suffix} is {shown!r}; allowed: {allowed}") from None
    return found


def store_url(
    backend: str = "none",
    *,
    disabled: bool = False,
    data_dir: str = DATA_DIR,
    redis_url: str = REDIS_URL,
    redis_password: Optional[str] = None,
    redis_db: Optional[int] = None,
    redis_prefix: Optional[str] = None,
) -> Optional[str]:
    """The URL of the store that these settings mean; None: no store.

    `file` is SQLite, in the file `events.db` of the data directory.
    """
    if disabled or backend == "none":
        return None
    if backend == "file":
        return f"sqlite:///{os.path.abspath(os.path.join(os.path.expanduser(data_dir), 'events.db'))}"
    parts = {"password": redis_password, "db": redis_db, "prefix": redis_prefix}
    query = urlencode({name: value for name, value in parts.items() if value is not None})
    return f"{redis_url}{'&' if '?' in redis_url else '?'}{query}" if query else redis_url


def make_coordinator(**settings: Any) -> Coordinator:
    """A coordinator as the environment wants it, except for `settings`, which say otherwise.

    Sets the level of the logger `agentdiff` only if told to.
    """
    found = from_environment()
    level = found.pop("log_level", None)
    of_store = {name: found.pop(name) for name in _OF_STORES if name in found}
    if "store" not in settings:
        settings["store"] = store_url(**of_store)
    coordinator = Coordinator(**{**found, **settings})
    if level is not None:
        logging.getLogger("agentdiff").setLevel(level)
    return coordinator
