"""A driver and processes that keep a record of all calls, and fail at a chosen one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fgpu_ebpf.parker.cuda import ILLEGAL_STATE, DriverError, State
from fgpu_ebpf.parker.job import Job
from fgpu_ebpf.parker.protocol import Named, Request, RequestError

MOVES = {
    "lock": (State.RUNNING, State.LOCKED),
    "checkpoint": (State.LOCKED, State.CHECKPOINTED),
    "restore": (State.CHECKPOINTED, State.LOCKED),
    "unlock": (State.LOCKED, State.RUNNING),
}
UNKNOWN_ERROR = 999


class Driver:
    """The state machine of each process. `at(n, name, pid)` is called before the n-th call that changes a state."""

    def __init__(self, pids: tuple[int, ...], state: State = State.RUNNING) -> None:
        self.states = dict.fromkeys(pids, state)
        self.calls: list[tuple[str, int]] = []
        self.timeouts: list[int] = []
        self.at: Callable[[int, str, int], None] = lambda *_: None
        self.on_call: Callable[[], None] = lambda: None

    def state(self, pid: int) -> State:
        return self.states.get(pid, State.UNKNOWN)

    def lock(self, pid: int, milliseconds: int) -> None:
        self.timeouts.append(milliseconds)
        self._move("lock", pid)

    def checkpoint(self, pid: int) -> None:
        self._move("checkpoint", pid)

    def restore(self, pid: int) -> None:
        self._move("restore", pid)

    def unlock(self, pid: int) -> None:
        self._move("unlock", pid)

    def _move(self, name: str, pid: int) -> None:
        self.calls.append((name, pid))
        self.on_call()
        self.at(len(self.calls) - 1, name, pid)
        before, after = MOVES[name]
        if self.state(pid) != before:
            raise DriverError(f"{name} of {pid}: illegal state", ILLEGAL_STATE)
        self.states[pid] = after


class Target:
    """A process that lives as long as the driver knows it."""

    def __init__(self, driver: Driver, pid: int) -> None:
        self._driver, self.pid = driver, pid
        self.obstacle, self.quiet = "", True

    def is_there(self) -> bool:
        return self.pid in self._driver.states

    def check(self) -> None:
        if not self.is_there():
            raise RequestError(f"process {self.pid} has ended")

    def check_runs(self) -> None:
        self.check()
        if self.obstacle:
            raise RequestError(self.obstacle)

    def is_quiet(self, until: float, now: Callable[[], float], sleep: Callable[[float], None]) -> bool:
        return self.quiet


class Bench:
    """A job for some processes, with its driver, the replies that it makes, and a clock."""

    def __init__(self, pids: tuple[int, ...] = (7, 8, 9), state: State = State.RUNNING) -> None:
        self.driver = Driver(pids, state)
        self.targets = [Target(self.driver, pid) for pid in pids]
        self.said: list[Mapping[str, Any]] = []
        self.seconds = 0.0
        self.room_checks = 0
        self.full_at = -1  # the number of the check of room that fails

    def check_room(self) -> None:
        self.room_checks += 1
        if self.room_checks - 1 == self.full_at:
            raise RequestError("no room")

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def job(self, lock_ms: int = 5000, deadline_ms: int = 30000) -> Job:
        request = Request("park", tuple(Named(target.pid, 1) for target in self.targets), 1, lock_ms, deadline_ms)
        return Job(
            request, self.driver, self.targets, self.check_room, self.said.append, lambda: self.seconds, self.sleep
        )
