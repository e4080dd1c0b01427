"""Settings of the default coordinator from the environment (F3)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Callable

from .coordinator import Coordinator

PREFIX = "AGENTDIFF_COORDINATION_"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _seconds(text: str) -> Any:
    if text.strip().lower() == "none":
        return None
    number = float(text)
    if not number >= 0:
        raise ValueError
    return number


def _level(text: str) -> str:
    if text.strip().upper() not in _LEVELS:
        raise ValueError
    return text.strip().upper()


_VARIABLES: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "WORKERS": ("workers", _whole, "a whole number of at least 1"),
    "LOCK_TIMEOUT": ("lock_timeout", _seconds, "seconds, such as 30 or 0.5, or none"),
    "LOG_LEVEL": ("log_level", _level, " or ".join(_LEVELS)),
}


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
            raise ValueError(f"{PREFIX}{suffix} is {text!r}; allowed: {allowed}") from None
    return found


def make_coordinator() -> Coordinator:
    """A coordinator as the environment wants it; sets the level of the logger `agentdiff` only if told to."""
    settings = from_environment()
    level = settings.pop("log_level", None)
    if level is not None:
        logging.getLogger("agentdiff").setLevel(level)
    return Coordinator(**settings)
