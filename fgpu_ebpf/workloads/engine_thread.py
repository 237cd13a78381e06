"""The engine thread, which sends requests to one engine, with a queue of containers and the times of the requests.

The agent has one engine thread for each engine socket. An engine that hangs blocks only its own thread, until the
deadline of the request. The next request follows after a pause. Answers are passed to a callback.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fgpu_ebpf.snapshot import EngineView
from fgpu_ebpf.workloads.engine_answers import AnswerError, EngineError
from fgpu_ebpf.workloads.workload import Names, Subject

log = logging.getLogger("fgpu.engines")
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0  # the time without requests after a failure
FIRST_AGAIN_SECONDS, LONGEST_AGAIN_SECONDS = 0.05, 30.0  # time between requests for a container that is not known yet
SPREAD_SECONDS = 20.0  # the time in which known containers are requested again; less than the time between two rescans
IDLE_SECONDS = 1.0  # if no request is due within this time, the connection is closed


class Api(Protocol):
    """A client of an engine."""

    name: str
    path: str
    can_rename: bool  # whether a container may get another name while the container exists

    def serves(self, subject: Subject) -> bool:
        """Return whether the engine can have this container or pod."""

    def ask(self, subject: Subject) -> Names | None:
        """Return the names of a container or pod, or None if the engine does not have the subject.

        The method blocks for a few seconds at most, and raises EngineError or AnswerError.
        """

    def close(self) -> None:
        """Close the connection to the engine. The next request opens another connection."""


@dataclass(slots=True)
class _Want:
    due: float
    is_asked: bool = False
    tries: int = 0
    error: str = ""
    is_known: bool = False  # the engine has reported the subject; only the name may have changed


class EngineThread:
    """The queue and the thread of one engine. The thread calls `answered` with each answer."""

    def __init__(self, api: Api, answered: Callable[[Subject, Names], None]) -> None:
        self.api = api
        self._answered = answered
        self._wants: dict[Subject, _Want] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._pause = 0.0
        self._resume_at = 0.0
        self.is_there = False
        self.error = ""
        self._counts = {"found": 0, "unknown": 0, "failed": 0}

    def want(self, subject: Subject) -> None:
        """Request a container or pod until the engine reports the subject. The first call starts the thread."""
        with self._changed:
            self._wants.setdefault(subject, _Want(time.monotonic()))
            if not self.is_there and not self.error:
                self._resume_at = 0.0  # a container exists, so its engine should have a socket now
            self._go_on()

    def want_again(self, subjects: Sequence[Subject]) -> None:
        """Request known subjects once more, because their names may have changed. Other subjects have precedence."""
        with self._changed:
            for number, subject in enumerate(subjects):
                due = time.monotonic() + SPREAD_SECONDS * number / len(subjects)
                self._wants.setdefault(subject, _Want(due, is_asked=True, is_known=True))
            if subjects:
                self._go_on()

    def _go_on(self) -> None:
        if self._thread is None and not self._ended:
            thread = threading.Thread(target=self._run, name=f"engine {self.api.name}", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError as error:  # the host is short of processes
                self._note(str(error))
        self._changed.notify()

    def keep(self) -> None:
        """Start the thread if an earlier attempt has failed. The agent calls this method about once a second."""
        with self._changed:
            if self._wants and self._thread is None:
                self._go_on()

    def ask_now(self, subject: Subject) -> None:
        """Request a queued subject immediately.

        The caller calls this method when the engine should have the subject.
        """
        with self._changed:
            if subject in self._wants:
                self._wants[subject].due = time.monotonic()
                self._changed.notify()

    def forget(self, subject: Subject) -> None:
        """Remove a subject from the queue."""
        with self._changed:
            self._wants.pop(subject, None)

    def stop(self) -> None:
        """Stop the thread after the current request, without waiting for the end of the thread."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def view(self) -> EngineView:
        """Return the state of the engine."""
        with self._changed:
            unknown = [want for want in self._wants.values() if not want.is_known]
            waiting = sum(want.tries == 0 or bool(self.error) for want in unknown)
            # After the last container is gone, no request can show whether a failed engine answers again.
            fault, is_there = (self.error, self.is_there) if self._wants else ("", self.is_there and not self.error)
            return EngineView(self.api.name, self.api.path, is_there, fault, waiting, **self._counts)

    def state_of(self, subject: Subject) -> str:
        """Return why the engine has reported nothing about a subject."""
        with self._changed:
            want = self._wants.get(subject)
            error = self.error or (want.error if want else "")
        if error:
            return f"{self.api.name} fails: {error}"
        if not self.is_there:
            return f"{self.api.path} does not exist, or was not checked yet"
        if want and not want.is_asked:
            return f"{self.api.name} has not been queried yet"
        return f"{self.api.name} has no such container"

    # -- in the thread

    def _run(self) -> None:
        while (subject := self._next()) is not None:
            try:
                self._ask(subject)
                if not self._is_due_soon():
                    self.api.close()
            except Exception as error:  # an error of this program must not end the thread
                log.exception("%s: unexpected error while querying %s", self.api.name, subject.id)
                self._failed(subject, repr(error)[:200])

    def _next(self) -> Subject | None:
        """Wait until a subject is due, and return the subject, or None if the thread must end.

        The newest subject without a request has precedence. Without this rule, a new container would wait for requests
        about containers that have ended while the engine did not run.
        """
        with self._changed:
            while not self._ended:
                now, new = time.monotonic(), next((s for s, w in reversed(self._wants.items()) if not w.is_asked), None)
                soonest = new or min(self._wants, key=lambda subject: self._wants[subject].due, default=None)
                at = max(self._wants[soonest].due, self._resume_at) if soonest else None
                if soonest and at is not None and at <= now:
                    return soonest
                self._changed.wait(None if at is None else at - now)
        return None

    def _is_due_soon(self) -> bool:
        """Return whether a request is due within IDLE_SECONDS."""
        with self._changed:
            return any(want.due < time.monotonic() + IDLE_SECONDS for want in self._wants.values())

    def _ask(self, subject: Subject) -> None:
        try:
            self.is_there = _is_roots(self.api.path)
            if not self.is_there:
                self._pause_after("")
                return
            self._begin(subject)
            names = self.api.ask(subject)
        except EngineError as error:
            self._failed(subject, str(error))
        except AnswerError as error:
            self._failed(subject, f"the engine's answer {error}", pause=False)
        else:
            self._pause, self.error = 0.0, ""
            self._settle(subject, names)

    def _begin(self, subject: Subject) -> None:
        with self._changed:
            if want := self._wants.get(subject):
                want.is_asked = True

    def _settle(self, subject: Subject, names: Names | None) -> None:
        with self._changed:
            self._counts["unknown" if names is None else "found"] += 1
            want = self._wants.get(subject)
            if names is None and want and not want.is_known:
                self._later(subject)
                return
            self._wants.pop(subject, None)
        if names is None:
            return
        self._answered(subject, names)

    def _failed(self, subject: Subject, text: str, pause: bool = True) -> None:
        self._note(text)
        with self._changed:
            self._counts["failed"] += 1
            if not pause:
                self._later(subject, text)
            elif subject in self._wants:
                self._wants[subject].due = time.monotonic()  # later than all other subjects that are due
        if pause:
            self._pause_after(text)

    def _note(self, error: str) -> None:
        """Store an error, and log an error that differs from the last error."""
        if error != self.error:
            log.warning("%s at %s: %s", self.api.name, self.api.path, error)
        self.error = error

    def _later(self, subject: Subject, error: str = "") -> None:
        want = self._wants.get(subject)
        if want:
            want.error = error
            want.due = time.monotonic() + min(FIRST_AGAIN_SECONDS * 2**want.tries, LONGEST_AGAIN_SECONDS)
            want.tries = min(want.tries + 1, 16)

    def _pause_after(self, error: str) -> None:
        """Send no request for twice the time of the last pause, at most LONGEST_PAUSE_SECONDS."""
        self.error = error
        self._pause = min(max(self._pause * 2, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._resume_at = time.monotonic() + self._pause


def _is_roots(path: str) -> bool:
    """Return whether the socket exists. Raise EngineError if another user owns the socket and could forge answers."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    if found.st_uid not in (0, os.geteuid()):
        raise EngineError(f"{path} belongs to uid {found.st_uid}, not to root")
    return True
