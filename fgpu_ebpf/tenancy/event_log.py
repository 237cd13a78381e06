"""The event log of `fgpu events`: refusals, bypasses, kills, overruns, XIDs, reloads, manual limits and other events.

The log is written and read in the agent's main loop, and keeps the last MOST events. Events of the same kind are logged
at most once a second, except for `set` and `unset`. The next event of the kind has the number of omitted events.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from fgpu_ebpf.policy.units import memory_text

log = logging.getLogger("fgpu.events")
MOST = 1000
MOST_KINDS, FEW_KINDS = 4096, 128
AGAIN_SECONDS, REMEMBERED_SECONDS = 1.0, 60.0
BY_HAND = {"set", "unset"}


@dataclass(frozen=True, slots=True)
class Event:
    """One event. Fields that do not apply are empty or 0.

    `number` starts at 1 and has no gaps. `time_seconds` is a Unix time. `more` is the number of events of the
    same kind and tenant that were omitted before this event, within REMEMBERED_SECONDS.
    """

    number: int
    time_seconds: float
    what: str
    tenant: str = ""
    pid: int = 0
    gpu: int | None = None
    operation: str = ""
    reason: str = ""
    bytes: int = 0
    text: str = ""
    more: int = 0


_Kind = tuple[str, str, str, str, int | None]  # see EventLog.add()


class EventLog:
    """The last MOST events."""

    def __init__(self) -> None:
        self._last: deque[bytes] = deque(maxlen=MOST)  # as JSON, which is one object in the heap instead of ten
        self._id = os.urandom(8).hex()  # the next agent numbers its events from 1 too
        self._number = 0
        self._told: dict[_Kind, tuple[float, int]] = {}  # by kind: last time, omitted events
        self._room = FEW_KINDS  # old entries are removed when _told has this many entries

    def add(self, what: str, **more: Any) -> None:
        """Add and log an event, unless an event of the same kind was added less than AGAIN_SECONDS ago.

        Events are of the same kind if `what`, tenant, reason, operation, text and device are equal.

        Args:
            what: the kind of event.
            more: fields of Event.
        """
        event = Event(self._number + 1, time.time(), what, **more)
        kind = (what, event.tenant, event.reason, event.operation + event.text, event.gpu)
        now = time.monotonic()
        last, untold = self._told.get(kind, (-REMEMBERED_SECONDS, 0))
        if now - last >= REMEMBERED_SECONDS:
            untold = 0
        if now - last < AGAIN_SECONDS and what not in BY_HAND:
            self._told[kind] = (last, untold + 1)
            return
        if len(self._told) >= self._room:
            self._forget(now)
        self._told[kind] = (now, 0)
        self._number += 1
        event = replace(event, more=untold)
        fields = asdict(event)
        self._last.append(json.dumps(fields).encode())
        log.info("%s", line_of(fields), extra={name: value for name, value in fields.items() if value})

    def _forget(self, now: float) -> None:
        """Remove kinds without a recent event, so that removed tenants use no memory."""
        kept = {kind: told for kind, told in self._told.items() if now - told[0] < _remembered(told[1])}
        self._told = kept if len(kept) < MOST_KINDS else {}
        self._room = min(MOST_KINDS, max(FEW_KINDS, 2 * len(self._told)))

    def since(self, number: int) -> dict[str, Any]:
        """Return the events after `number`, and the count of these events that are no longer kept.

        The answer also has the number of the last event, and the log's id, which no other agent's log has.
        """
        first = self._number + 1 - len(self._last)
        seen = min(max(0, number + 1 - first), len(self._last))
        found = [json.loads(kept) for kept in islice(self._last, seen, None)]
        forgotten = max(0, first - number - 1)
        return {"events": found, "last": self._number, "forgotten": forgotten, "log": self._id}


def _remembered(untold: int) -> float:
    return REMEMBERED_SECONDS if untold else AGAIN_SECONDS


def line_of(event: dict[str, Any]) -> str:
    """Return an event as one line of text, without the time of the event."""
    words = [event["what"], event["tenant"]]
    words += [f"pid {event['pid']}"] if event["pid"] else []
    words += [f"gpu {event['gpu']}"] if event["gpu"] is not None else []
    words += [event["operation"], memory_text(event["bytes"]) if event["bytes"] else ""]
    words += [f"({event['reason']})"] if event["reason"] else []
    words += [event["text"], f"and {event['more']} more before" if event["more"] else ""]
    return " ".join(word for word in words if word)
