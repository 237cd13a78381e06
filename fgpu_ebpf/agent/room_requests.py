"""Requests for memory that fit in the limits when the device is full, and for which `overcommit: park` makes room.

The shim of a program reports the request, waits for a decision on the tenant's page, and repeats the report during the
wait. A request waits as long as tenants are being parked for the request or the state of a tenant will be known soon,
is repeated when the device has the bytes free, and fails if no tenant can be parked. A decision expires if the agent
ends. One tenant of a device is served at a time. Wake-ups do not use the bytes that are `promised` to this tenant
(`parked_tenant.coming_to`).

This module runs in the agent's main loop: at each report, and once in every round.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import abi
from fgpu_ebpf.agent.idle_parking import IdleParking
from fgpu_ebpf.agent.making_room import PARKS, RoomMaker
from fgpu_ebpf.agent.parked_tenant import Phase, coming_to
from fgpu_ebpf.agent.parking import Parking
from fgpu_ebpf.tenancy.event_log import EventLog

REPORT_SECONDS = 3.0  # a program that has not reported for this time no longer waits
TAKE_SECONDS = 1.0  # the time in which a program uses the room that was made
NOTICE_SECONDS = 0.05  # the time in which a waiting program finds a decision on its page
DECISION_SECONDS = 0.5  # from the first report of a request to the decision; later the request has failed
SPARE_BYTES = 32 << 20  # the driver may need more bytes than a request, or its free parts may be too small
WAIT_SECONDS = abi.ROOM_NS / 1e9


@dataclass(slots=True, eq=False)
class Request:
    """The requests of a tenant on one device. `reported_at`: the time of the last report of a program.

    `bytes`: the bytes of the largest request, or of the smallest request if no room can be made for the largest
    request. `least`: the bytes of the smallest request. `spare`: the additional bytes to make free if possible, because
    `bytes` alone were not enough. `began_at`: the time of the first report since there was room. `made_at`: the time at
    which room was reported to the requests; 0 if no room was reported. `is_promised`: tenants are or were being
    parked for the requests. `why`: the cause of the wait.
    """

    cgroup: int
    device: int
    bytes: int = 0
    least: int = 0
    spare: int = 0
    began_at: float = 0.0
    reported_at: float = 0.0
    made_at: float = 0.0
    is_promised: bool = False
    why: str = ""


class RoomRequests:
    """The requests that wait. On each device, the request that has waited longest is served first.

    Args:
        parking: the tenants that do not run.
        maker: parks tenants.
        history: the event log.
    """

    def __init__(self, parking: Parking, maker: RoomMaker, history: EventLog) -> None:
        self._parking, self._maker, self._history, self._parkable = parking, maker, history, parking.parkable
        self._ledger, self._enforcer = parking.parkable.ledger, parking.parkable.enforcer
        self._requests: dict[tuple[int, int], Request] = {}

    @classmethod
    def of_host(cls, run_dir: Path, parking: Parking, idle: IdleParking, history: EventLog) -> RoomRequests:
        """Create the requests of this host, and begin to make room for requests and for tenants that wake up."""
        maker = RoomMaker(run_dir, parking, idle)
        parking.make_room, parking.parkable.enforcer.makes_room = maker.make, True
        return cls(parking, maker, history)

    def ask(self, cgroup: int, device: int, bytes_: int, at: float) -> None:
        """Decide about a request that a program has reported at this time.

        The program may have reported the request before.
        """
        is_late = time.monotonic() > at + DECISION_SECONDS and (cgroup, device) not in self._requests
        if device >= abi.DEVICES or is_late:
            return
        request = self._requests.setdefault((cgroup, device), Request(cgroup, device))
        if not request.bytes or self._is_repeated(request, at):
            request.bytes = request.least = bytes_
            request.spare = SPARE_BYTES if request.made_at else 0
            request.began_at = at
        request.bytes, request.least = max(request.bytes, bytes_), min(request.least, bytes_)
        request.reported_at = at
        self._decide(request)

    def look(self) -> None:
        """Decide about all requests again. The agent calls this method in every round."""
        for request in list(self._requests.values()):
            self._decide(request)

    def _is_repeated(self, request: Request, at: float) -> bool:
        """Return whether a report is about a request that has failed again after there was room."""
        return bool(request.made_at) and at > request.made_at + NOTICE_SECONDS

    def _decide(self, request: Request) -> None:
        now = time.monotonic()
        self._publish()
        if not request.made_at or self._is_repeated(request, request.reported_at):
            self._serve(request, now)
        ended = request.made_at + TAKE_SECONDS if request.made_at else request.reported_at + REPORT_SECONDS
        if now > ended:
            self._forget(request)
        self._publish()

    def _publish(self) -> None:
        """Publish the tenants with requests, which must not be parked, and the room that is promised to requests."""
        self._maker.keep(frozenset(request.cgroup for request in self._requests.values()))
        self._parkable.promised.clear()
        self._parkable.promised.update({r.device: r.bytes + r.spare for r in self._requests.values() if r.is_promised})

    def _serve(self, request: Request, now: float) -> None:
        waits, why = self._wait(request)
        if why and not waits and request.bytes > request.least:  # a decision is for all requests of the tenant
            request.bytes = request.least
            waits, why = self._wait(request)
        if waits and self._is_too_late(request, now):
            waits, why = False, f"memory.park.deadline has passed: {why}"
        if waits:
            if not request.why:  # later reasons differ only in numbers
                self._note("memory waits", request, why)
            request.why, request.made_at = why, 0.0
            self._tell(request, WAIT_SECONDS)
        elif why or request.made_at:
            self._note("no room made", request, why or "the driver has no memory, although the device has free memory")
            self._tell(request, None)
            self._forget(request)
        else:
            request.made_at = now
            self._tell(request, 0.0)

    def _is_too_late(self, request: Request, now: float) -> bool:
        """Return whether a request has waited for as long as the tenant's policy permits."""
        tenant = self._enforcer.get(request.cgroup)
        return bool(tenant and 0 < tenant.park.deadline_ns / 1e9 <= now - request.began_at)

    def _wait(self, request: Request) -> tuple[bool, str]:
        """Return whether a request waits, and the cause of the wait or failure.

        The result is (False, "") if there is room.
        """
        device = request.device
        if why := self._refusal(request):
            return False, why
        away = {parked.cgroup: parked for parked in self._parking.tenants()}
        if own := away.get(request.cgroup):
            if own.phase is Phase.PARKED:
                return False, "the tenant is parked"
            # Programs of a parked tenant may run already, because the parker unlocks them before the agent reads the
            # result.
            own.shall_wake = own.shall_wake or "a request for memory"
            return True, "the tenant is being woken"
        first = next(r for r in self._requests.values() if r.device == device and r.cgroup not in away)
        name = self._enforcer.name_of(first.cgroup) if first is not request else self._maker.claimant([device])
        if name:
            return True, f"room is made for {name} first"
        coming = coming_to(None, away.values(), self._parkable)
        needed = request.bytes + coming[device]
        is_full = bool(lacking := self._maker.lacking({device: needed}))
        lacking = lacking or self._maker.lacking({device: needed + request.spare})
        if not lacking:
            return False, ""
        phase, why = self._maker.park_one(self._enforcer.name_of(request.cgroup), lacking)
        request.is_promised = request.is_promised or phase in PARKS
        waits = phase is not None
        return waits, why if waits or is_full else ""

    def _refusal(self, request: Request) -> str:
        """Return why no room is made for a request, or an empty text.

        The contents of a program's report are not trusted.
        """
        tenant, usage = self._enforcer.get(request.cgroup), self._ledger.usage(request.cgroup, [request.device])
        if not tenant or not usage or usage[0].limit == abi.NO_LIMIT:
            return "the tenant has no limit"
        enforced = (group for group in self._enforcer.around(tenant) if not group.observe)
        for level in (tenant, *enforced):
            for u in self._ledger.usage(level.cgroup, [request.device]) or ():
                if request.bytes > u.limit - u.used - u.parked:
                    return f"the limit of {level.name} has no room"
        return ""

    def _forget(self, request: Request) -> None:
        self._requests.pop((request.cgroup, request.device), None)

    def _tell(self, request: Request, seconds: float | None) -> None:
        self._ledger.parked.decide_on_room(request.cgroup, request.device, seconds)

    def _note(self, what: str, request: Request, why: str) -> None:
        name = self._enforcer.name_of(request.cgroup)
        self._history.add(what, tenant=name, gpu=request.device, bytes=request.bytes, text=why)
