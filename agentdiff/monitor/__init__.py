"""Look at what the agents did and are doing: the command line, and what it is made of, for tools of your own.

Everything here reads events, from a store or from anywhere else; nothing in the core imports it.
"""

from __future__ import annotations

from .history import Call, History
from .stats import stats
from .timeline import timeline
from .trace import trace

__all__ = ["Call", "History", "stats", "timeline", "trace"]
