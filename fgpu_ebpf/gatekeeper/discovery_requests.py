"""Requests to the agent to examine processes whose cgroup is undecided, or that map a file without probes.

This module runs in the gatekeeper's main thread. A request names one process of each tenant. Between two heartbeats,
requests are sent for at most MOST_TENANTS tenants of a workload. The gatekeeper does not wait for an answer: the agent
writes its decisions and the probed files to the kernel's maps. If the agent does not receive a request, the request is
sent again later.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from pathlib import Path
from time import monotonic_ns

from fgpu_ebpf.gatekeeper.connections import Connection

TELL_NS = 50_000_000  # for this time after a request about a tenant, no further request about that tenant is sent
DEAF_NS = 10_000_000  # for this time after a message that the agent did not receive, no message is sent
MOST_TENANTS = 64  # of one bound owner, between two heartbeats


class DiscoveryRequests:
    """The requests of one gatekeeper. The agent listens at discover.sock in the run folder."""

    def __init__(self, run: Path) -> None:
        self._path = str(run / "discover.sock")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._new: dict[int, Connection] = {}  # by tenant: to be sent at the end of this iteration
        self._told: dict[int, int] = {}  # by tenant: no request about the tenant is sent before this time
        self._tenants: Counter[int] = Counter()  # by owner: number of tenants with a request since the last heartbeat
        self._deaf_ns = 0

    def __bool__(self) -> bool:
        """Return True if forget() would remove a record."""
        return bool(self._told)

    def add(self, connection: Connection) -> None:
        """Queue a request about this process.

        Do nothing if the connection or its tenant had a request recently, if requests about MOST_TENANTS tenants of the
        workload were made since the last heartbeat, or if the agent did not receive a message within DEAF_NS.
        """
        tenant, owner = connection.managed_state.tenant, connection.tenant
        if connection.told or tenant in self._new or max(self._deaf_ns, self._told.get(tenant, 0)) > monotonic_ns():
            return
        if self._tenants[owner] < MOST_TENANTS:
            self._tenants[owner] += 1
            self._new[tenant] = connection

    def send(self) -> bool:
        """Send all queued requests in one message, and return False if the agent did not receive the message.

        All requests are in one message, because the agent's socket queues only ten messages, and hundreds of tenants
        may start at the same time.
        """
        new, self._new = self._new, {}
        if not new:
            return True
        now_ns = monotonic_ns()
        first, *others = (connection.pid for connection in new.values())
        try:
            self._socket.sendto(json.dumps({"tgid": first, "others": others}).encode(), self._path)
        except OSError:  # the agent does not run, or has not read the earlier messages yet
            self._deaf_ns = now_ns + DEAF_NS
            return False
        for connection in new.values():
            connection.told = True
        self._told |= dict.fromkeys(new, now_ns + TELL_NS)
        return True

    def forget(self) -> None:
        """Allow requests about all tenants again. The caller calls this method at every heartbeat."""
        self._told.clear()
        self._tenants.clear()
