"""The events of `fgpu events`, across restarts of the agent.

This module runs in the process of the command. Each agent numbers its events from 1. The next request may be answered
by another agent. The log of another agent has another id. All events in that log that are later than the last known
event are new.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgpu_ebpf import control_client

Event = dict[str, Any]


class EventFeed:
    """The feed of events later than `after_seconds` (since the epoch). The feed returns each event once."""

    def __init__(self, run_dir: Path, after_seconds: float = 0.0) -> None:
        self._run_dir = run_dir
        self._after_seconds = after_seconds
        self._number = 0  # the number of the last event of this agent
        self._log: str | None = None  # the id of this agent's log
        self._forgotten = 0  # the events that the last answer no longer contains
        self._is_lost = False  # the last request failed

    def begin(self) -> list[Event]:
        """Return the new events, at first all events later than `after_seconds`.

        Raise ConnectionError or RequestError on failure.
        """
        answer = control_client.call(self._run_dir, {"verb": "events", "since": self._number})
        log, self._log = self._log, answer.get("log")  # an agent of an earlier version reports no id
        if self._number and (self._log != log or answer["last"] < self._number):  # a new agent has answered
            self._number = 0
            return self.begin()
        self._forgotten = answer.get("forgotten", 0)
        found: list[Event] = answer["events"]
        if self._number == 0:  # only for a new agent, because the clock may be set back while an agent runs
            found = [event for event in found if event["time_seconds"] > self._after_seconds]
        self._number = answer["last"]
        if found:
            self._after_seconds = found[-1]["time_seconds"]
        return found

    def more(self, report: Callable[[str], object]) -> list[Event]:
        """Return the events since the last call, or an empty list if no agent answers.

        `report` gets the reason of the first failed call in a row, and the number of events that were lost.
        """
        try:
            found = self.begin()
        except (ConnectionError, control_client.RequestError) as error:
            if not self._is_lost:
                report(f"{error}; waiting for the agent")
            self._is_lost = True
            self._number = self._number if self._log else 0  # an id shows whether the same agent answers again
            return []
        self._is_lost = False
        if self._forgotten:
            report(f"{self._forgotten} events are missing here: the agent no longer keeps them")
        return found
