"""Limits: how many at once, how many requests and tokens in any window of time, and what has been used of that.

A limit is declared once, and the locks of its name obey it; see `_limited.py` for who comes in when.

What an entry has been granted is an open charge until its thread or task is awake and enters the block. Only from
then on its window runs: R2 is measured there, and a thread that is slow to wake must not make the window longer.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Optional

import attrs

from ._places import Place
from .errors import check_amount


def _check_count(limit: Limit, attribute: Any, number: Any) -> None:
    if number is None:
        return
    what = attribute.name
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{what} must be a whole number or None, not {type(number).__name__}: {number!r}")
    if number < 1:
        raise ValueError(f"{what} must be at least 1, not {number}: nobody would ever get in")


def _check_seconds(limit: Limit, attribute: Any, seconds: Any) -> None:
    check_amount(attribute.name, seconds)
    if not seconds and attribute.name == "per":
        raise ValueError("per must be more than 0 seconds")


@attrs.frozen
class Limit:
    """What a name allows (R1); None is no limit. `per` and `margin` are seconds."""

    concurrency: Optional[int] = attrs.field(default=None, validator=_check_count)
    requests: Optional[int] = attrs.field(default=None, validator=_check_count)
    tokens: Optional[int] = attrs.field(default=None, validator=_check_count)
    per: float = attrs.field(default=60.0, validator=_check_seconds)
    margin: float = attrs.field(default=0.1, validator=_check_seconds)

    def __attrs_post_init__(self) -> None:
        if self.concurrency is None and self.requests is None and self.tokens is None:
            raise ValueError("a limit needs at least one of concurrency, requests and tokens")

    def refusal(self, name: str, tokens: float) -> Optional[ValueError]:
        """What to say to a request that can never be granted (R5)."""
        if self.tokens is None or tokens <= self.tokens:
            return None
        return ValueError(
            f"{tokens:.15g} tokens can never be had from limit {name!r}: it allows {self.tokens} in {self.per:g} s"
        )


class Charge:
    """What one entry costs: a request, and tokens."""

    __slots__ = ("at", "counts", "tokens")

    def __init__(self, tokens: float) -> None:
        self.tokens: float = tokens
        self.at: float = 0.0  # when its block was entered, once it was
        self.counts: bool = True  # until its window is over


class Account:
    """What has been used within the window; exact, whatever the order of things."""

    __slots__ = ("entered", "limit", "open", "resume_at", "tokens")

    def __init__(self, limit: Limit) -> None:
        self.limit: Limit = limit
        self.entered: deque[Charge] = deque()  # in the order of their times
        self.open: dict[Charge, Place] = {}  # what has not been entered yet, and who is to enter it
        self.tokens: float = 0  # of all these
        self.resume_at: float = 0.0  # nobody enters before (R4)

    @property
    def used(self) -> int:
        """How many requests count at the moment."""
        return len(self.entered) + len(self.open)

    def charge(self, waiter: Place) -> Charge:
        """Grant an entry: it counts at once, and its window begins with `enter`."""
        charge = Charge(waiter.tokens)
        self.open[charge] = waiter
        self.tokens += charge.tokens
        return charge

    def enter(self, charge: Charge, now: float) -> None:
        """The block of the charge is entered now, unless it was before."""
        if self.open.pop(charge, None) is None:
            return
        charge.at = now
        if self.limit.requests is None and self.limit.tokens is None:
            self._forget(charge)
        else:
            self.entered.append(charge)

    def refund(self, charge: Charge) -> None:
        """It was granted, and is not wanted any more."""
        if self.open.pop(charge, None) is not None:
            self._forget(charge)

    def settle(self, charge: Charge, tokens: float) -> None:
        """It has used so many tokens in the end (R3)."""
        if charge.counts:
            self.tokens += tokens - charge.tokens
            charge.tokens = tokens

    def expire(self, now: float) -> None:
        """Forget what no window that ends from now on can hold."""
        window = self.limit.per + self.limit.margin
        entered = self.entered
        while entered and entered[0].at + window <= now:
            self._forget(entered.popleft())

    def _forget(self, charge: Charge) -> None:
        charge.counts = False
        self.tokens -= charge.tokens
        if not self.entered and not self.open:
            self.tokens = 0  # sums of fractions drift

    def due(self, now: float, tokens: float) -> Optional[float]:
        """From when on the limit allows another entry; None: not known before open charges have entered."""
        limit = self.limit
        when = max(now, self.resume_at)
        entered = self.entered
        window = limit.per + limit.margin
        if limit.requests is not None:
            excess = self.used + 1 - limit.requests
            if excess > len(entered):
                return None
            if excess > 0:
                when = max(when, entered[excess - 1].at + window)
        if limit.tokens is not None:
            excess_tokens = self.tokens + tokens - limit.tokens
            for charge in entered:
                if excess_tokens <= 0:
                    break
                excess_tokens -= charge.tokens
                if charge.tokens:
                    when = max(when, charge.at + window)
            if excess_tokens > 0 and self.open:
                return None
        return when

    def forget_open(self) -> None:
        """After a fork: what had not entered yet is the parent's."""
        while self.open:
            self._forget(self.open.popitem()[0])


def retry_after(error: BaseException, now: float) -> Optional[float]:
    """How many seconds the API wants to be left alone, by the headers of the error's response; None if they don't say.

    Both official clients, and whatever else is built on httpx or requests, keep it as `error.response.headers`.
    `now` is the date, in seconds since the epoch, since a header may name a date too.
    """
    try:
        get = error.response.headers.get  # type: ignore[attr-defined]
        said = {header: get(header) for header in ("retry-after-ms", "retry-after")}
    except Exception:  # it is the users' error, or none of an API
        return None
    found = (_seconds(said["retry-after-ms"], 0.001, None), _seconds(said["retry-after"], 1.0, now))
    return next((seconds for seconds in found if seconds is not None), None)


def _seconds(said: Any, scale: float, now: Optional[float]) -> Optional[float]:
    """What a header says; None if that makes no sense."""
    if isinstance(said, bytes):
        said = said.decode("ascii", "replace")
    if isinstance(said, bool) or not isinstance(said, (str, int, float)):
        return None
    try:
        seconds = float(said) * scale
    except (ValueError, OverflowError):
        seconds = -1.0 if now is None else _until(str(said), now)
    return seconds if 0 <= seconds < float("inf") else None


def _until(date: str, now: float) -> float:
    from email.utils import parsedate_to_datetime

    try:
        return max(parsedate_to_datetime(date).timestamp() - now, 0.0)
    except (TypeError, ValueError, IndexError, OverflowError):  # neither is it
        return -1.0
