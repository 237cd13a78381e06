"""What the gatekeeper asks the agent: to look at processes of which it has not decided yet.

Owns: how often the agent is asked. Of a tenant's many processes it is told of one at a time, and of a workload's many
tenants of so many between two heartbeats. Never: waits for the agent, which answers in the kernel's maps. Cannot fail:
an agent that does not hear is asked later.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from pathlib import Path
from time import monotonic_ns

from fgpu_ebpf.callers import Caller

TELL_NS = 50_000_000  # for so long the agent is left to what it was told of a tenant
DEAF_NS = 10_000_000  # so long it is told nothing after it did not hear
MOST_TENANTS = 64  # of one owner of bounds, between two heartbeats


class Questions:
    """The agent listens in the run folder."""

    def __init__(self, run: Path) -> None:
        self._path = str(run / "discover.sock")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._new: dict[int, Caller] = {}  # by tenant: of which the agent is told at the end of this turn
        self._told: dict[int, int] = {}  # until when the agent is left to what it was told of a tenant
        self._tenants: Counter[int] = Counter()  # of an owner, of which the agent was told since the last heartbeat
        self._deaf_ns = 0

    def __bool__(self) -> bool:
        """Whether anything is kept that `forget` would forget."""
        return bool(self._told)

    def add(self, caller: Caller) -> None:
        """The agent is told of this process, unless it is busy with its tenant or its workload."""
        tenant, owner = caller.standing.tenant, caller.tenant
        if caller.told or tenant in self._new or max(self._deaf_ns, self._told.get(tenant, 0)) > monotonic_ns():
            return
        if self._tenants[owner] < MOST_TENANTS:
            self._tenants[owner] += 1
            self._new[tenant] = caller

    def send(self) -> bool:
        """Of all tenants of this turn in one message: the kernel keeps ten for it, and hundreds may come at once.

        False: the agent did not hear.
        """
        new, self._new = self._new, {}
        if not new:
            return True
        now_ns = monotonic_ns()
        first, *others = (caller.pid for caller in new.values())
        try:
            self._socket.sendto(json.dumps({"tgid": first, "others": others}).encode(), self._path)
        except OSError:  # it has not heard yet what it was told before
            self._deaf_ns = now_ns + DEAF_NS
            return False
        for caller in new.values():
            caller.told = True
        self._told |= dict.fromkeys(new, now_ns + TELL_NS)
        return True

    def forget(self) -> None:
        """A heartbeat: the agent may be told of everything again."""
        self._told.clear()
        self._tenants.clear()
