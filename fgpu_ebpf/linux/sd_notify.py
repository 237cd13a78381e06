"""sd_notify(3): report to the service manager that the service is ready, reloading, alive or stopping.

This module runs in the main threads of the agent and the gatekeeper. Sending never blocks. Errors are ignored, because
a manager that receives no message restarts the service. Child processes do not inherit the socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping


def tell(*assignments: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send these assignments in one datagram. Return False if there is no manager, or if sending failed."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    path = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto("\n".join(assignments).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, path)
        return True
    return False


def ready(status: str = "") -> bool:
    """Report that the service is ready, at its start or after reloading()."""
    return tell("READY=1", *([f"STATUS={status}"] if status else []))


def reloading() -> bool:
    """Report that the service reads its settings again. The caller must call ready() afterwards."""
    return tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> bool:
    """Report that the service is shutting down."""
    return tell("STOPPING=1")


class Watchdog:
    """Pings of the watchdog, twice in the interval that the manager requests. Without a request, no ping is sent."""

    def __init__(self, environment: Mapping[str, str] = os.environ, now: Callable[[], float] = time.monotonic) -> None:
        self._environment, self._now = environment, now
        self._seconds = _asked_microseconds(environment) / 2e6
        self._due = now()

    def ping(self) -> bool:
        """Send a ping if a ping is due, and return whether a ping was sent.

        The main loop calls this method in each round.
        """
        if not self._seconds or self._now() < self._due:
            return False
        self._due = self._now() + self._seconds
        return tell("WATCHDOG=1", environment=self._environment)


def _asked_microseconds(environment: Mapping[str, str]) -> int:
    """Return the interval in microseconds, or 0 if this process has no watchdog."""
    try:
        is_own = int(environment.get("WATCHDOG_PID", os.getpid())) == os.getpid()
        return max(0, int(environment.get("WATCHDOG_USEC", 0))) if is_own else 0
    except ValueError:
        return 0
