"""One job: the order of the driver's calls, and the recovery after a failure.

All processes of a job are locked under one deadline, and all processes are unlocked at the first failure. All processes
are restored before any process is unlocked, so that no process of a tenant runs while another process is parked. The
job runs in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fgpu_ebpf.parker.cuda import ILLEGAL_STATE, NOT_READY, Checkpoints, DriverError, State
from fgpu_ebpf.parker.protocol import Outcome, Request, RequestError, Say

RETRY_SECONDS = 0.1
QUIET_SECONDS = 0.2  # the least time for _wait_for_threads()
_ENTIRE = frozenset({"running", "unknown", "gone"})  # states of processes that no job has locked
PATIENCE_SECONDS = 10.0  # how long restore_all() waits for a call that an ended job has begun


class Target(Protocol):
    """A process of a job (processes.Process)."""

    pid: int

    def is_there(self) -> bool:
        """Return whether the process is alive."""

    def check(self) -> None:
        """Check that the process is alive. Raise RequestError on failure."""

    def check_runs(self) -> None:
        """Check that the process is not stopped, traced or frozen. Raise RequestError on failure."""

    def is_quiet(self, until: float, now: Callable[[], float], sleep: Callable[[float], None]) -> bool:
        """Wait until no thread is in an earlier call. Return False if such a call cannot be excluded by `until`."""


class Job:
    """The processes of a request, and the driver.

    `check_room` raises RequestError if the host has no room for the copy. `now` and `sleep` use seconds.
    """

    def __init__(
        self,
        request: Request,
        driver: Checkpoints,
        targets: Sequence[Target],
        check_room: Callable[[], None],
        say: Say,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._request, self._driver, self._targets, self._check_room = request, driver, targets, check_room
        self._say, self._now, self._sleep = say, now, sleep
        self._begun = now()

    def states(self) -> dict[str, str]:
        """Return the state of each process by its pid."""
        return {str(target.pid): self._state_name(target) for target in self._targets}

    def _state_name(self, target: Target) -> str:
        if not target.is_there():
            return "gone"
        try:
            return self._driver.state(target.pid).name.lower()
        except DriverError:
            return "unknown"

    # -- park

    def park(self) -> Outcome:
        """Lock and checkpoint all processes. After a failure, all processes run again."""
        try:
            for target in self._targets:
                target.check_runs()
            states = [self._driver.state(target.pid) for target in self._targets]
            if all(state == State.CHECKPOINTED for state in states):
                return Outcome("parked")
            for target, state in zip(self._targets, states, strict=True):
                if state == State.FAILED:
                    return Outcome("lost", f"the driver has failed to restore process {target.pid}")
                if state != State.RUNNING:
                    raise RequestError(f"the state of process {target.pid} is {state.name.lower()}, not running")
            self._check_room()
        except (RequestError, DriverError) as error:
            return Outcome("running", str(error), _ENTIRE.issuperset(self.states().values()))
        try:
            self._lock_all()
            self._wait_for_threads()
            self._say({"at": "locked"})
            self._check_room()
            began = self._now()
            self._checkpoint_all()
            self._say({"at": "checkpointed", "seconds": round(self._now() - began, 3)})
        except (RequestError, DriverError) as error:
            return self._restore_all(str(error), 0)
        return Outcome("parked")

    def _lock_all(self) -> None:
        until = self._begun + self._request.lock_ms / 1000
        for target in self._targets:
            target.check()
            left_ms = int((until - self._now()) * 1000)
            try:
                if left_ms <= 0:
                    raise DriverError("", NOT_READY)
                self._driver.lock(target.pid, left_ms)
            except DriverError as error:
                if error.code != NOT_READY:
                    raise
                seconds = self._request.lock_ms / 1000
                raise RequestError(f"process {target.pid} was not idle within {seconds:g} s") from error

    def _wait_for_threads(self) -> None:
        until = max(self._begun + self._request.lock_ms / 1000, self._now() + QUIET_SECONDS)
        for target in self._targets:
            if not target.is_quiet(until, self._now, self._sleep):
                raise RequestError(f"a thread of process {target.pid} may still be in a call of the driver")

    def _checkpoint_all(self) -> None:
        for target in self._targets:
            if self._now() - self._begun > self._request.deadline_ms / 1000:
                seconds = self._request.deadline_ms / 1000
                raise RequestError(f"not all processes were checkpointed within {seconds:g} s")
            target.check()
            self._driver.checkpoint(target.pid)

    # -- wake

    def wake(self) -> Outcome:
        """Restore all parked processes, and then unlock these processes. After a failure all processes stay parked."""
        try:
            for target in self._there():
                target.check_runs()
        except RequestError as error:
            return Outcome("parked", str(error))
        return self._restore_all("", 0)

    def recover(self, why: str) -> Outcome:
        """Let all processes run again after a job that has ended halfway. `why`: the reason of that end."""
        try:
            states = ", ".join(f"{pid} {state}" for pid, state in self.states().items())
            return self._restore_all(f"{why} (processes: {states})", PATIENCE_SECONDS)
        except (RequestError, DriverError) as error:
            return Outcome("lost", f"{why}; {error}")

    def _there(self) -> list[Target]:
        return [target for target in self._targets if target.is_there()]

    def _restore_all(self, why: str, patience: float) -> Outcome:
        """Restore and unlock all processes that are alive. `why` is the error of the outcome.

        `patience`: for how many seconds a call is repeated while another call is in progress for its process.
        """
        until = self._now() + patience
        began = self._now()
        if not self._there():
            return Outcome("lost", _both(why, "all processes have ended"))
        try:
            for target in self._there():
                self._settle(target, State.CHECKPOINTED, self._driver.restore, until)
        except DriverError as error:
            return self._put_back(_both(why, str(error)))
        if not why:
            self._say({"at": "restored", "seconds": round(self._now() - began, 3)})
        try:
            for target in self._there():
                self._settle(target, State.LOCKED, self._driver.unlock, until)
        except DriverError as error:
            return Outcome("lost", _both(why, str(error)))
        if not self._there():
            return Outcome("lost", _both(why, "all processes have ended"))
        return Outcome("running", why)

    def _settle(self, target: Target, state: State, call: Callable[[int], None], until: float) -> None:
        """Make a call for a process that is in this state. A process that exits meanwhile needs no call."""
        while True:
            try:
                found = self._driver.state(target.pid)
                if found == State.FAILED:
                    raise DriverError(f"the driver has lost process {target.pid}", 0)
                if found == state:
                    call(target.pid)
            except DriverError as error:
                if not target.is_there():
                    return
                if error.code != ILLEGAL_STATE or self._now() >= until:
                    raise
                self._sleep(RETRY_SECONDS)
            else:
                return

    def _put_back(self, why: str) -> Outcome:
        """Park the processes that have been restored, because another process cannot be restored."""
        try:
            for target in self._there():
                state = self._driver.state(target.pid)
                if state == State.LOCKED:
                    self._driver.checkpoint(target.pid)
                elif state != State.CHECKPOINTED:
                    return Outcome("lost", _both(why, f"the state of process {target.pid} is {state.name.lower()}"))
        except DriverError as error:
            return Outcome("lost", _both(why, str(error)))
        return Outcome("parked", why)


def _both(why: str, error: str) -> str:
    return f"{why}; {error}" if why else error
