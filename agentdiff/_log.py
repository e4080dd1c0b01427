"""The one logger, and what every record of it carries."""

from __future__ import annotations

import logging
from typing import Any, Optional

logger: logging.Logger = logging.getLogger("agentdiff")


def about(*, event: Optional[str] = None, agent: Optional[str] = None, run: Optional[str] = None) -> dict[str, Any]:
    """The fields of a log record, for `extra=`; None where there is none.

    Their names can't be anybody else's: logging raises where an application's own records have one already.
    """
    return {"agentdiff_event": event, "agentdiff_agent": agent, "agentdiff_run": run}
