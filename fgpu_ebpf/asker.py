"""One engine and the thread that asks it: whom about next, and when again.

Owns: the thread, its queue and the pauses after failures. Never: lets anybody wait; whoever wants an answer is called
with it. On failure: a hanging engine holds this thread for its deadline, and is asked again after a pause.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fgpu_ebpf.answers import AnswerError, EngineError
from fgpu_ebpf.identity import Names, Subject
from fgpu_ebpf.snapshot import EngineView

log = logging.getLogger("fgpu.engines")
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0  # after a failure of the engine
FIRST_AGAIN_SECONDS, LONGEST_AGAIN_SECONDS = 0.05, 30.0  # where it does not know the container (yet)


class Api(Protocol):
    """How an engine is asked."""

    name: str
    path: str

    def serves(self, subject: Subject) -> bool:
        """It may know of it."""

    def ask(self, subject: Subject) -> Names | None:
        """What it says; None: it knows of none. Raises EngineError, AnswerError; takes seconds at most."""


@dataclass(slots=True)
class _Want:
    due: float
    tries: int = 0
    fault: str = ""


class Asker:
    """`answered` is called in the thread, with each answer."""

    def __init__(self, api: Api, answered: Callable[[Subject, Names], None]) -> None:
        self.api = api
        self._answered = answered
        self._wants: dict[Subject, _Want] = {}
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._pause = 0.0
        self._resume_at = 0.0
        self.is_there = False
        self.fault = ""
        self._counts = {"found": 0, "unknown": 0, "failed": 0}

    def want(self, subject: Subject) -> None:
        """Ask about it, as often as it takes. The thread begins with the first."""
        with self._news:
            self._wants.setdefault(subject, _Want(time.monotonic()))
            if self._thread is None and not self._ended:
                self._thread = threading.Thread(target=self._run, name=f"engine {self.api.name}", daemon=True)
                self._thread.start()
            self._news.notify()

    def hurry(self, subject: Subject) -> None:
        """It is known by now: ask at once, if anybody still wants to know."""
        with self._news:
            if subject in self._wants:
                self._wants[subject].due = time.monotonic()
                self._news.notify()

    def forget(self, subject: Subject) -> None:
        """Nobody wants to know any more."""
        with self._news:
            self._wants.pop(subject, None)

    def stop(self) -> None:
        """The thread ends when what it asks has been answered or has failed."""
        with self._news:
            self._ended = True
            self._news.notify()

    def view(self) -> EngineView:
        """How it stands."""
        with self._news:
            waiting = sum(want.tries == 0 or bool(self.fault) for want in self._wants.values())
            return EngineView(self.api.name, self.api.path, self.is_there, self.fault, waiting, **self._counts)

    def state_of(self, subject: Subject) -> str:
        """Why it has said nothing of this one."""
        with self._news:
            want = self._wants.get(subject)
            fault = self.fault or (want.fault if want else "")
        if fault:
            return f"{self.api.name} fails: {fault}"
        if not self.is_there:
            return f"{self.api.path} is not there"
        return f"{self.api.name} knows of no such container"

    # -- in the thread

    def _run(self) -> None:
        while (subject := self._next()) is not None:
            try:
                self._ask(subject)
            except Exception as error:  # an engine's answer, and our mistake: it must not end the thread
                log.exception("%s: a mistake about %s", self.api.name, subject.id)
                self._failed(subject, repr(error)[:200])

    def _next(self) -> Subject | None:
        """Waits for the next that is due; None: it is over."""
        with self._news:
            while not self._ended:
                soonest = min(self._wants.items(), key=lambda item: item[1].due, default=None)
                now = time.monotonic()
                at = max(soonest[1].due, self._resume_at) if soonest else None
                if soonest and at is not None and at <= now:
                    return soonest[0]
                self._news.wait(None if at is None else at - now)
        return None

    def _ask(self, subject: Subject) -> None:
        try:
            self.is_there = _is_roots(self.api.path)
            if not self.is_there:
                self._hold_back("")
                return
            names = self.api.ask(subject)
        except EngineError as error:
            self._failed(subject, str(error))
        except AnswerError as error:
            self._failed(subject, f"its answer {error}", pause=False)
        else:
            self._pause, self.fault = 0.0, ""
            self._settle(subject, names)

    def _settle(self, subject: Subject, names: Names | None) -> None:
        with self._news:
            self._counts["unknown" if names is None else "found"] += 1
            if names is None:
                self._later(subject)
                return
            self._wants.pop(subject, None)
        self._answered(subject, names)

    def _failed(self, subject: Subject, fault: str, pause: bool = True) -> None:
        if fault != self.fault:
            log.warning("%s at %s: %s", self.api.name, self.api.path, fault)
        with self._news:
            self._counts["failed"] += 1
            if not pause:
                self.fault = fault
                self._later(subject, fault)
            elif subject in self._wants:
                self._wants[subject].due = time.monotonic()  # the others first
        if pause:
            self._hold_back(fault)

    def _later(self, subject: Subject, fault: str = "") -> None:
        want = self._wants.get(subject)
        if want:
            want.fault = fault
            want.due = time.monotonic() + min(FIRST_AGAIN_SECONDS * 2**want.tries, LONGEST_AGAIN_SECONDS)
            want.tries = min(want.tries + 1, 16)

    def _hold_back(self, fault: str) -> None:
        """Nothing is asked for a while, longer every time."""
        self.fault = fault
        self._pause = min(max(self._pause * 2, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._resume_at = time.monotonic() + self._pause


def _is_roots(path: str) -> bool:
    """The socket is there, and root's: another's could say of any container what it likes. Raises EngineError."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    if found.st_uid not in (0, os.geteuid()):
        raise EngineError(f"{path} belongs to uid {found.st_uid}, not to root")
    return True
