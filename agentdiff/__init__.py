"""Keep programs made of several agents out of concurrency trouble: named locks, and events that chain agents."""

from ._lanes import Delivery, Subscription
from ._places import Slot
from .coordinator import Coordinator, Counts, Snapshot
from .deadlock import HolderInfo, LimitInfo, LockInfo, WaiterInfo
from .default import configure, coordinate, default_coordinator, emit, limit, lock, when
from .dependencies import AgentInfo
from .errors import (
    CascadeError,
    ClosedError,
    CoordinationError,
    CoordinationTimeoutError,
    DeadlockError,
    DependencyFailedError,
    LoopClosedError,
    NotHeldError,
    QueueFullError,
    StaleWriteError,
    StoreError,
)
from .events import Event, Run
from .joins import JoinInfo, all_of, any_of
from .locks import Lock, LockGroup
from .state import State, Versioned
from .waiting import Expected

__all__ = [
    "AgentInfo",
    "CascadeError",
    "ClosedError",
    "CoordinationError",
    "CoordinationTimeoutError",
    "Coordinator",
    "Counts",
    "DeadlockError",
    "Delivery",
    "DependencyFailedError",
    "Event",
    "Expected",
    "HolderInfo",
    "JoinInfo",
    "LimitInfo",
    "Lock",
    "LockGroup",
    "LockInfo",
    "LoopClosedError",
    "NotHeldError",
    "QueueFullError",
    "Run",
    "Slot",
    "Snapshot",
    "StaleWriteError",
    "State",
    "StoreError",
    "Subscription",
    "Versioned",
    "WaiterInfo",
    "all_of",
    "any_of",
    "configure",
    "coordinate",
    "default_coordinator",
    "emit",
    "limit",
    "lock",
    "when",
]
__version__ = "0.1.0"
