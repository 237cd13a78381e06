"""Each answer of the parker, and each failure, leads to a ledger that agrees with the driver."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.agent import blocked_calls, host_config, parkable, parker_client, parking, waking
from fgpu_ebpf.agent.parkable import Parkable
from fgpu_ebpf.agent.parked_tenant import ParkedTenant, Phase
from fgpu_ebpf.agent.parking import Parking
from fgpu_ebpf.driver import device_indexes
from fgpu_ebpf.driver.nvml import DriverError
from fgpu_ebpf.ledger.parked import Parked
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.parker import protocol
from fgpu_ebpf.policy.rules import Park
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.tenancy.event_log import EventLog

HELD, CGROUP, GENERATION = 64 << 20, 7, 1001
NO_DRIVER = "the driver cannot be used: cuInit returned CUDA_ERROR_UNKNOWN"
Line = dict[str, Any]


class FakeParker:
    """A parker and a driver. `state` is the driver's state of all processes. `says` replaces the next answers."""

    def __init__(self, folder: Path) -> None:
        self.state = "running"
        self.says: list[list[Line]] = []
        self.asked: list[str] = []
        self.sizes: list[int] = []
        self.broken = False  # as if the driver could not be used
        self.breaks = False  # the driver cannot be used after the next answer about the state
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / parker_client.SOCKET))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, sock.makefile("rw") as file:
                if not (line := file.readline()):  # there was no room, so no request
                    continue
                request = json.loads(line)
                self.asked.append(request["op"])
                self.sizes.append(request["bytes"])
                lines = self.says.pop(0) if self.says and request["op"] != "state" else self._answer(request)
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def _answer(self, request: Line) -> list[Line]:
        if self.broken:
            return [{"result": protocol.UNCHANGED.get(request["op"], ""), "error": NO_DRIVER, "changed": False}]
        if request["op"] == "state":
            self.broken = self.breaks
            return [{"states": {str(process["pid"]): self.state for process in request["processes"]}}]
        self.state = {"park": "checkpointed", "wake": "running"}[request["op"]]
        return [{"at": self.state, "seconds": 1.5}, {"result": {"park": "parked", "wake": "running"}[request["op"]]}]

    def close(self) -> None:
        self._listener.close()


class FakeLedger:
    """One tenant with one process, in a group that may be full."""

    def __init__(self, pid: int) -> None:
        self.pid, self.has_entry, self.parked_bytes, self.is_full = pid, False, 0, False
        self.held, self.generation = HELD, GENERATION
        self.flags = abi.Seen.SHIM | abi.SEEN_CALLED
        self.times: Any = None
        self.parked = SimpleNamespace(
            entries=self._entries, begin=self._begin, park=self._park, wake=self._wake, end=self._end, unmoved=set()
        )

    def processes(self) -> dict[int, Process]:
        zero = (0,) * abi.DEVICES
        bytes_ = (self.held - self.parked_bytes, *zero[1:])
        flags = self.flags | (abi.PARKED if self.has_entry else 0)
        return {self.pid: Process(self.generation, (CGROUP,), flags, 0, True, bytes_, zero, zero, zero, (1, *zero[1:]))}

    def process(self, pid: int) -> Process | None:
        return self.processes().get(pid)

    def usage(self, cgroup: int) -> list[Any]:
        return [SimpleNamespace(used=HELD - self.parked_bytes, parked=self.parked_bytes, limit=1 << 30)]

    def _entries(self) -> dict[tuple[int, int], Parked]:
        bytes_ = (self.parked_bytes, *(0,) * (abi.DEVICES - 1))
        return {(self.pid, GENERATION): Parked(0, CGROUP, bytes_)} if self.has_entry else {}

    def _begin(self, _: object) -> int:
        self.has_entry = True
        return 0

    def _park(self, _: object) -> int:
        assert self.has_entry
        self.parked_bytes = HELD
        return 0

    def _wake(self, life: tuple[int, int], force: bool = False) -> int:
        if life[0] != self.pid:
            return errno.ESRCH
        if self.is_full and not force:
            return errno.ENOSPC
        self.parked_bytes = 0
        return 0

    def _end(self, life: tuple[int, int]) -> int:
        if life[0] != self.pid:
            return errno.ESRCH
        assert not self.parked_bytes
        self.has_entry = False
        return 0


class Quiet:
    """A search for calls that finds none, unless the test says so."""

    last: Quiet

    def __init__(self, pids: object, quiet: object, cgroup: object, found: Callable[[int], None]) -> None:
        self.found, self.is_stopped = found, False
        Quiet.last = self

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.is_stopped = True


class ShortageError(OSError):
    """An error of one step of the main loop, which then continues."""


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, has_worked: bool = False) -> None:
    """Make the next call of a function raise an error, before or after the function's work."""
    function = getattr(owner, name)

    def fail(*arguments: object) -> NoReturn:
        monkeypatch.setattr(owner, name, function)
        if has_worked:
            function(*arguments)
        raise ShortageError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(owner, name, fail)


class Host:
    """The agent's part, with a parker and a ledger of the test."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder, self.parker, self.ledger, self.history = folder, FakeParker(folder), FakeLedger(pid), EventLog()
        workload = SimpleNamespace(cgroup=CGROUP, path="/alice")
        self.tenant: Any = SimpleNamespace(name="alice", cgroup=CGROUP, path="/alice", workload=workload, park=Park())
        self.tenant.shares = {}
        self.enforcer: Any = SimpleNamespace(
            has_inside=lambda path: False,
            get=lambda cgroup: self.tenant if cgroup == CGROUP else None,
            name_of=lambda _: "alice",
            leaving={},
            moves=SimpleNamespace(catch_up=lambda pids: self.moved.update(pids)),
            release_left=self._release_left,
        )
        self.checks: dict[str, Any] = {}
        self.moved: set[int] = set()
        self.free_bytes: int | None = HELD
        self.start()

    def start(self) -> None:
        """Start an agent, as after the end of an earlier one."""
        nvml: Any = SimpleNamespace(
            driver_version="580.1", in_mig_mode=lambda _: False, free_bytes=lambda _: self.free_bytes
        )
        ledger: Any = self.ledger
        parkable = Parkable(True, Path("/sys/fs/cgroup"), ledger, nvml, self.enforcer, dict)
        self.parking = Parking(self.folder, parkable, self.history, self.checks)
        self.selector = selectors.DefaultSelector()
        self.parking.begin(self.selector)

    def _release_left(self) -> None:
        assert not self.ledger.has_entry, "levels of parked processes do not change"
        self.enforcer.leaving.clear()

    def until(self, state: str, seconds: float = 10.0) -> None:
        """Run the main loop until the tenant has this state."""
        deadline = time.monotonic() + seconds
        while self.state() != state:
            assert time.monotonic() < deadline, self.state()
            for step in (*(key.data for key, _ in self.selector.select(0.01)), self.parking.look):
                with contextlib.suppress(ShortageError):
                    step()

    def state(self) -> str:
        view = self.parking.view(CGROUP)
        return view.state if view else "running"

    def what(self) -> list[str]:
        return [event["what"] for event in self.history.since(0)["events"]]

    def books(self) -> tuple[bool, int]:
        return self.ledger.has_entry, self.ledger.parked_bytes


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(blocked_calls, "before_parking", lambda _: ("", {}))
    monkeypatch.setattr(blocked_calls, "BlockedCalls", Quiet)
    monkeypatch.setattr(parking, "AGAIN_SECONDS", 0.01)
    with subprocess.Popen(["sleep", "1000"]) as process:
        made = Host(tmp_path, process.pid)
        yield made
        process.kill()
    made.parker.close()


def parked(host: Host) -> None:
    host.parking.park(host.tenant)
    host.until("parked")


def test_a_tenant_is_parked_and_woken(host: Host) -> None:
    errand = host.parking.park(host.tenant)
    host.until("parked")
    assert (errand.is_done, errand.error, errand.seconds) == (True, "", 1.5)
    assert host.books() == (True, HELD)
    errand = host.parking.wake(CGROUP, "alice")
    host.until("running")
    assert (errand.is_done, errand.error, host.books()) == (True, "", (False, 0))
    assert host.what() == ["parked", "woken"]
    view = host.parking.view(CGROUP)
    assert view
    assert (view.parks, view.wakes, view.park_seconds, view.wake_seconds) == (1, 1, 1.5, 1.5)
    assert Quiet.last.is_stopped


def test_a_program_with_the_shim_of_an_earlier_version_is_not_parked(host: Host) -> None:
    host.ledger.flags = abi.Seen.SHIM
    with pytest.raises(parking.ParkingError, match="has the shim of an earlier version"):
        host.parking.park(host.tenant)
    assert host.parker.asked == []


@pytest.mark.parametrize(("phase", "fits"), [(Phase.PARKED, False), (Phase.WAITING, True)])
def test_a_tenant_that_waits_for_room_does_not_count_as_parked(
    host: Host, monkeypatch: pytest.MonkeyPatch, phase: Phase, fits: bool
) -> None:
    """Otherwise no tenant could be parked for it."""
    monkeypatch.setattr(parking, "MOST_TENANTS", 1)
    host.parking._tenants[99] = ParkedTenant(99, "bob", "/bob", {}, phase)
    with contextlib.nullcontext() if fits else pytest.raises(parking.ParkingError, match="1 tenants are parked"):
        host.parking.park(host.tenant)


def test_a_call_wakes_the_tenant(host: Host) -> None:
    parked(host)
    Quiet.last.found(host.ledger.pid)
    host.until("running")
    assert host.books() == (False, 0)


def test_a_park_that_fails_leaves_the_tenant_running(host: Host) -> None:
    host.parker.says = [[{"result": "running", "error": "process 1 was not idle within 5 s"}]]
    errand = host.parking.park(host.tenant)
    host.until("running")
    assert (errand.is_done, errand.error) == (True, "process 1 was not idle within 5 s")
    assert (host.books(), host.what()) == ((False, 0), ["park failed"])


def test_a_refused_park_is_not_believed_while_another_job_parks_the_process(host: Host) -> None:
    """The driver has the process checkpointed at the end: it must be known, so that it is woken."""
    host.parker.says = [[{"result": "running", "error": "process 1 has a job already"}]]
    host.parker.state = "checkpointed"
    host.parking.park(host.tenant)
    host.until("parked")
    assert host.books() == (True, HELD)


def test_a_restore_that_fails_is_repeated_and_the_charge_is_released_meanwhile(host: Host) -> None:
    parked(host)
    host.parker.says = [[{"result": "parked", "error": "out of memory"}]]
    errand = host.parking.wake(CGROUP, "alice")
    host.until("waiting")
    assert (errand.waits, host.books()) == ("out of memory", (True, HELD))
    assert "alice is waiting: out of memory" in host.checks["parking"].found
    host.until("running")
    assert (errand.is_done, errand.error) == (True, "")
    assert "parking" not in host.checks


def test_a_full_group_that_a_tenant_leaves_does_not_keep_it_from_waking_up(host: Host) -> None:
    parked(host)
    host.ledger.is_full = True
    host.enforcer.leaving[CGROUP] = False
    host.until("running")
    assert host.books() == (False, 0)


def test_a_wake_up_waits_for_room(host: Host) -> None:
    parked(host)
    host.ledger.is_full = True
    host.parking.wake(CGROUP, "alice")
    host.until("waiting")
    assert (host.books(), host.parker.asked) == ((True, HELD), ["park"])
    host.ledger.is_full = False
    host.until("running")
    assert "wake waits" in host.what()


@pytest.mark.parametrize("free", [HELD - 1, None])
def test_no_restore_is_tried_without_room_on_the_device(host: Host, free: int | None) -> None:
    parked(host)
    host.free_bytes = free
    errand = host.parking.wake(CGROUP, "alice")
    host.until("waiting")
    assert errand.waits.startswith("gpu 0 has ")
    for host.free_bytes in (free, HELD - 2):
        host.parking.look()
    assert (host.books(), host.parker.asked) == ((True, HELD), ["park"])
    host.free_bytes = HELD
    host.until("running")
    assert host.what() == ["parked", "wake waits", "woken"]


@pytest.mark.parametrize("phase", [Phase.PARKING, Phase.WAKING, Phase.UNKNOWN])
def test_two_wake_ups_do_not_count_on_the_same_room(host: Host, phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    parked(host)
    other = ParkedTenant(CGROUP + 1, "bob", "/bob", {(1, 1): 1}, phase, next_at=math.inf)
    host.parking._tenants[other.cgroup] = other
    of_bob = dataclasses.replace(host.ledger.processes()[host.ledger.pid], bytes=(1, *(0,) * (abi.DEVICES - 1)))
    monkeypatch.setattr(host.ledger, "process", lambda pid: of_bob if pid == 1 else host.ledger.processes().get(pid))
    host.parking.wake(CGROUP, "alice")
    assert host.state() == "waiting"
    host.parking._tenants.pop(other.cgroup)
    host.until("running")


def test_room_that_is_made_for_a_tenant_is_left_free_by_other_wake_ups(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked(host)
    other = ParkedTenant(CGROUP + 1, "bob", "/bob", {(1, 1): 1}, Phase.WAITING, next_at=math.inf, has_claim=True)
    host.parking._tenants[other.cgroup] = other
    of_alice = host.ledger.parked.entries
    of_bob = {(1, 1): Parked(0, other.cgroup, (1, *(0,) * (abi.DEVICES - 1)))}
    monkeypatch.setattr(host.ledger.parked, "entries", lambda: of_alice() | of_bob)
    monkeypatch.setattr(host.parking, "_forget_ended", lambda *_: None)
    host.parking.wake(CGROUP, "alice")
    assert host.state() == "waiting"
    other.enter(Phase.WAITING)
    other.has_claim = False
    host.until("running")


def test_a_tenant_for_which_room_was_made_is_woken_when_another_one_is_parked(host: Host) -> None:
    """The other one has been called meanwhile: it wakes up later."""
    asked = []

    def make_room(waiting: ParkedTenant, needs: Any) -> tuple[bool, str]:
        asked.append((waiting.name, dict(needs)))
        return waiting.name == "bob", "alice is being parked"

    host.parking.make_room = make_room
    host.free_bytes = 0
    bob = ParkedTenant(CGROUP + 1, "bob", "/bob", {(1, 1): 1}, Phase.WAITING, next_at=math.inf, has_claim=True)
    host.parking._tenants[bob.cgroup] = bob
    entries = host.ledger.parked.entries
    host.ledger.parked.entries = lambda: {(1, 1): Parked(0, bob.cgroup, (HELD, *(0,) * (abi.DEVICES - 1)))} | entries()
    host.parking._forget_ended = lambda *_: None  # type: ignore[method-assign]
    host.parking.park(host.tenant)
    host.until("parking")
    host.parking.wake(CGROUP, "alice")
    host.until("waiting")
    assert asked[:2] == [("bob", {0: HELD}), ("alice", {0: 2 * HELD})]
    assert (bob.why, bob.has_claim) == ("gpu 0 has 0B free, and 64MiB are needed; alice is being parked", True)
    view = host.parking.view(CGROUP)
    assert view
    assert view.why == "gpu 0 has 0B free, and 128MiB are needed; alice is being parked"
    assert [e["text"] for e in host.history.since(0)["events"] if e["what"] == "wake waits"][-1] == view.why


@pytest.mark.parametrize(
    ("state", "wanted"), [("running", "running"), ("checkpointed", "parked"), ("locked", "running")]
)
def test_after_a_parker_that_ended_the_driver_is_asked(host: Host, state: str, wanted: str) -> None:
    host.parker.says, host.parker.state = [[{"at": "locked"}]], state
    host.parking.park(host.tenant)
    host.until("unknown")
    host.until(wanted)
    assert host.books() == ((True, HELD) if wanted == "parked" else (False, 0))


@pytest.mark.parametrize(("state", "wanted"), [("running", "running"), ("checkpointed", "parked"), ("gone", "running")])
def test_an_agent_that_starts_asks_the_driver(host: Host, state: str, wanted: str) -> None:
    parked(host)
    host.parker.state = state
    host.start()
    host.until(wanted)
    assert host.books() == ((True, HELD) if wanted == "parked" else (False, 0))


def test_a_state_that_is_unknown_changes_nothing(host: Host) -> None:
    parked(host)
    host.parker.state = "unknown"
    host.start()
    host.until("unknown")
    for _ in range(5):
        host.parking.look()
        for key, _ in host.selector.select(0.05):
            key.data()
    assert (host.state(), host.books()) == ("unknown", (True, HELD))


@pytest.mark.parametrize("call", ["pidfd_open", "open"])
def test_a_parked_tenant_is_not_forgotten_in_a_shortage_of_files(
    host: Host, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    parked(host)

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        host.parking.look()
    assert (host.state(), host.books()) == ("parked", (True, HELD))
    host.parking.wake(CGROUP, "alice")
    host.until("running")
    assert host.books() == (False, 0)


@pytest.mark.parametrize("verb", ["park", "end"])
def test_after_an_error_in_a_step_that_follows_a_success_the_driver_is_asked(
    host: Host, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    failing_once(monkeypatch, host.ledger.parked, verb)
    park = host.parking.park(host.tenant)
    host.until("parked")
    assert (park.is_done, park.error, host.books()) == (True, "", (True, HELD))
    wake = host.parking.wake(CGROUP, "alice")
    host.until("running")
    assert (wake.is_done, wake.error, host.books()) == (True, "", (False, 0))
    assert host.parker.asked == (["park", "state", "wake"] if verb == "park" else ["park", "wake", "state"])


def test_an_error_between_two_entries_leaves_no_entry(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "CHECK_SECONDS", 0.5)
    failing_once(monkeypatch, host.ledger.parked, "begin", has_worked=True)
    errand = host.parking.park(host.tenant)
    host.until("running")
    assert (errand.is_done, errand.error, host.books()) == (True, "interrupted", (False, 0))


def test_requests_of_users_are_finished_before_other_work_is_done_for_the_processes(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.parker.broken = True
    failing_once(monkeypatch, host.enforcer.moves, "catch_up")
    errand = host.parking.park(host.tenant)
    host.until("running")
    assert (errand.is_done, errand.error) == (True, NO_DRIVER)


def test_an_error_in_a_function_from_a_thread_does_not_delay_the_others(host: Host) -> None:
    parked(host)
    tenant, called = host.parking._tenants[CGROUP], list[int]()

    def fail() -> NoReturn:
        raise ShortageError(errno.EMFILE, "too many open files")

    host.parking._put(tenant, fail)
    host.parking._put(tenant, lambda: called.append(1))
    for _ in range(2):
        for key, _ in host.selector.select(0.01):
            with contextlib.suppress(ShortageError):
                key.data()
    assert called == [1]


def test_a_process_whose_entry_was_removed_is_forgotten(host: Host) -> None:
    parked(host)
    host.ledger.has_entry, host.ledger.parked_bytes = False, 0
    host.until("running")
    assert host.parker.asked == ["park"]


def test_a_tenant_continues_to_run_if_the_parker_cannot_use_the_driver(host: Host) -> None:
    """The shim delays calls of the program while the ledger has an entry."""
    host.parker.broken = True
    errand = host.parking.park(host.tenant)
    host.until("running")
    assert (errand.is_done, errand.error) == (True, NO_DRIVER)
    assert (host.books(), host.what(), host.parker.asked) == ((False, 0), ["park failed"], ["park"])


def test_a_parked_tenant_is_woken_as_soon_as_the_parker_can_use_the_driver_again(host: Host) -> None:
    parked(host)
    host.parker.broken = True
    errand = host.parking.wake(CGROUP, "alice")
    host.until("waiting")
    assert (errand.waits, host.books(), host.parker.asked) == (NO_DRIVER, (True, HELD), ["park", "wake"])
    assert f"alice is waiting: {NO_DRIVER}" in host.checks["parking"].found
    host.parker.broken = False
    host.until("running")
    assert (errand.error, host.books()) == ("", (False, 0))


def test_memory_that_the_device_still_holds_stays_charged_if_the_parker_cannot_use_the_driver(host: Host) -> None:
    """A parking has ended halfway, so the process is locked, and its wake-up is refused without a call."""
    host.parker.says, host.parker.state, host.parker.breaks = [[{"at": "locked"}]], "locked", True
    errand = host.parking.park(host.tenant)
    host.until("waiting")
    assert (host.books(), errand.is_done) == ((True, 0), False)
    host.parker.broken = False
    host.until("running")
    assert host.books() == (False, 0)


def test_requests_for_the_state_that_a_running_job_refuses_do_not_delay_the_next_request(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked(host)
    monkeypatch.setattr(
        host.parker, "_answer", lambda _: [{"result": "", "error": "process 1 has a job already"}]
    )  # fmt: skip
    host.start()
    tenant, asked = host.parking._tenants[CGROUP], len(host.parker.asked)
    while len(host.parker.asked) < asked + 4:
        host.parking.look()
        for key, _ in host.selector.select(0.01):
            key.data()
    assert (tenant.failures, host.state(), host.books()) == (0, "unknown", (True, HELD))


def test_the_pause_between_requests_for_the_state_grows_while_the_parker_cannot_use_the_driver(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked(host)
    host.parker.broken = True
    monkeypatch.setattr(parking, "AGAIN_SECONDS", 0.0)
    host.start()
    tenant = host.parking._tenants[CGROUP]
    while tenant.failures < 8:
        host.parking.look()
        for key, _ in host.selector.select(0.01):
            key.data()
    assert (host.state(), tenant.why, host.books()) == ("unknown", NO_DRIVER, (True, HELD))
    assert [tenant.pause(1.0), ParkedTenant(1, "a", "/a", {}, Phase.UNKNOWN, failures=2).pause(1.0)] == [64.0, 4.0]
    host.parker.broken = False
    host.until("parked")


def test_a_lost_tenant_is_charged_again_and_gets_the_errors_of_the_driver(host: Host) -> None:
    parked(host)
    host.parker.says, host.parker.state = [[{"result": "lost", "error": "restore failed"}]], "failed"
    errand = host.parking.wake(CGROUP, "alice")
    host.until("running")
    assert f"the driver has lost pid {host.ledger.pid}" in errand.error
    assert (host.books(), "parking lost" in host.what()) == ((False, 0), True)


def test_without_a_parker_nothing_changes(host: Host) -> None:
    (host.folder / parker_client.SOCKET).unlink()
    errand = host.parking.park(host.tenant)
    host.until("running")
    assert "the parker does not run" in errand.error
    assert host.books() == (False, 0)


def test_a_tenant_with_a_share_of_a_concurrent_device_is_not_parked(host: Host) -> None:
    host.ledger.times = SimpleNamespace(concurrent=lambda: frozenset({0}))
    assert not host.parking.parkable.obstacle(host.tenant, host.ledger.processes())
    host.tenant.shares = {0: Share()}
    assert "gpu 0 is concurrent" in host.parking.parkable.obstacle(host.tenant, host.ledger.processes())


def test_a_call_in_the_driver_is_a_reason(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_calls, "before_parking", lambda _: ("thread 5 of pid 4 is in a call of the driver", {}))
    errand = host.parking.park(host.tenant)
    host.until("running")
    assert errand.error.endswith("thread 5 of pid 4 is in a call of the driver")


def test_a_wake_up_during_the_parking_follows_it(host: Host) -> None:
    park = host.parking.park(host.tenant)
    host.until("parking")
    wake = host.parking.wake(CGROUP, "alice")
    host.until("running")
    assert (park.error, wake.error, wake.is_done) == ("", "", True)


def test_a_tenant_wakes_up_before_its_levels_change(host: Host) -> None:
    parked(host)
    host.enforcer.leaving[CGROUP] = False
    host.until("running")
    assert (host.books(), host.enforcer.leaving) == ((False, 0), {})
    host.moved.clear()
    parked(host)
    host.ledger.parked.unmoved.add(host.ledger.pid)
    host.until("running")
    assert host.moved == {host.ledger.pid}


def test_a_process_that_never_used_the_driver_does_not_keep_the_others_from_corrections(host: Host) -> None:
    """The parker refuses to park it. The driver knows the state of the other process."""
    with subprocess.Popen(["sleep", "20"]) as other:
        host.parker.says = [[{"result": "running", "error": "the driver does not know process 1"}]]
        host.parking.park(host.tenant)
        parked = host.parking._tenants[CGROUP]
        parked.members[other.pid, 1] = procfs.started(other.pid) or 0
        host.ledger.parked.entries = lambda: {life: Parked(0, CGROUP, (0,)) for life in list(parked.members)}
        host.parking._settle(parked, {str(host.ledger.pid): "running", str(other.pid): "unknown"})
        assert host.state() == "running"
        other.kill()


def test_processes_beside_a_lost_one_are_woken(host: Host) -> None:
    parked(host)
    tenant = host.parking._tenants[CGROUP]
    with subprocess.Popen(["sleep", "20"]) as other:
        tenant.members[other.pid, 1] = procfs.started(other.pid) or 0
        host.parking._settle(tenant, {str(host.ledger.pid): "checkpointed", str(other.pid): "failed"})
        assert list(tenant.members) == [(host.ledger.pid, GENERATION)]
        host.until("running")
        other.kill()
    assert host.parker.asked[-1] == "wake"
    assert (host.books(), host.what()) == ((False, 0), ["parked", "parking lost", "woken"])


def test_more_processes_than_a_request_can_name_are_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parkable.MOST_PROCESSES == protocol.MOST_PROCESSES
    monkeypatch.setattr(parkable, "MOST_PROCESSES", 0)
    with pytest.raises(parking.ParkingError, match="more than 0 processes"):
        host.parking.park(host.tenant)
    assert not host.ledger.has_entry


@pytest.mark.parametrize(("most", "is_parked"), [(HELD - 1, False), (HELD, True)])
def test_a_tenant_is_parked_with_the_memory_that_its_policy_permits_on_the_host(
    host: Host, most: int, is_parked: bool
) -> None:
    host.tenant.park = Park(most_bytes=most)
    if is_parked:
        parked(host)
    else:
        with pytest.raises(parking.ParkingError, match=r"more than memory\.park\.hostMemory"):
            host.parking.park(host.tenant)
    assert host.books() == (is_parked, HELD if is_parked else 0)


@pytest.mark.parametrize(
    ("change", "most", "why"),
    [
        ({"held": 2 * HELD}, 0, ""),
        ({"held": 2 * HELD}, HELD, "more than memory.park.hostMemory permits"),
        ({"held": 0}, 0, "have changed"),
        ({"generation": GENERATION + 1}, 0, "have changed"),
        ({"flags": abi.Seen.SHIM | abi.SEEN_CALLED | abi.Seen.IMPORT}, 0, "has opened memory"),
    ],
)
def test_the_reasons_and_the_size_are_those_after_the_check_of_the_calls(
    host: Host, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], most: int, why: str
) -> None:
    def check(_: object) -> tuple[str, blocked_calls.Places]:
        for name, value in change.items():
            setattr(host.ledger, name, value)
        return "", {}

    monkeypatch.setattr(blocked_calls, "before_parking", check)
    host.tenant.park = Park(most_bytes=most)
    errand = host.parking.park(host.tenant)
    host.until("running" if why else "parked")
    assert why in errand.error
    assert host.parker.sizes == ([] if why else [2 * HELD])
    assert errand.bytes == HELD * (1 if why else 2)


def test_a_tenant_that_has_lost_its_limit_during_the_check_of_its_calls_is_not_parked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: object) -> tuple[str, blocked_calls.Places]:
        host.enforcer.get = lambda _: None
        return "", {}

    monkeypatch.setattr(blocked_calls, "before_parking", check)
    errand = host.parking.park(host.tenant)
    host.until("running")
    assert (errand.error.endswith("have changed meanwhile"), host.parker.asked) == (True, [])


def test_a_look_that_blocks_leaves_one_thread(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    monkeypatch.setattr(blocked_calls, "before_parking", lambda _: (end.wait(30), ("", {}))[1])
    monkeypatch.setattr(parking, "CHECK_SECONDS", 0.0)
    before = threading.active_count()
    for _ in range(5):
        errand = host.parking.park(host.tenant)
        host.until("running")
    assert "an earlier check of the tenant's memory has not ended" in errand.error
    assert threading.active_count() == before + 1
    end.set()


def test_a_tenant_without_a_limit_is_woken(host: Host) -> None:
    parked(host)
    host.enforcer.get = lambda _: None
    host.until("running")
    assert host.books() == (False, 0)


def no_driver(*_: object) -> NoReturn:
    raise DriverError("no NVIDIA driver responds")


@pytest.mark.parametrize(
    ("path", "moved"),
    [
        ("/lab/alice", []),
        ("/lab/alice/worker", []),
        ("/../alice", []),
        ("/lab/bob", ["lab"]),
        ("/lab/gone", ["lab"]),
    ],
)
def test_without_an_agent_a_woken_process_keeps_its_levels_unless_its_cgroup_has_changed(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, moved: list[str]
) -> None:
    for folder in ("lab/alice/worker", "lab/bob"):
        (tmp_path / folder).mkdir(parents=True)
    cgroups = {name: (tmp_path / name).stat().st_ino for name in ("lab", "lab/alice")}
    levels, moves = (cgroups["lab/alice"], cgroups["lab"]), list[Any]()
    parked(host)
    ledger: Any = host.ledger
    process = ledger.processes
    monkeypatch.setattr(
        ledger, "processes", lambda: {p: dataclasses.replace(of, levels=levels) for p, of in process().items()}
    )
    ledger.tenants = lambda: dict.fromkeys(levels, 1)
    ledger.context_bytes = lambda _: 0
    ledger.new_epoch = lambda: None
    ledger.move = lambda *arguments: moves.append(arguments)
    monkeypatch.setattr(procfs, "cgroup_path", lambda _: path)
    monkeypatch.setattr(host_config, "read", lambda: (None, []))
    monkeypatch.setattr(device_indexes, "pinned", lambda _: {})
    monkeypatch.setattr(waking, "Nvml", no_driver)
    assert waking._wake(host.folder, tmp_path, ledger, tmp_path) == ""
    assert host.books() == (False, 0)
    assert moves == ([(ledger.pid, GENERATION, tuple(cgroups[name] for name in moved))] if moved else [])
