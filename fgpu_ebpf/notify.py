"""What the service manager is told: ready, reloading, alive, ending.

Owns: sd_notify(3)'s datagram, and when the watchdog is due. Never: waits for a manager that does not read, or hands its
socket to a child. On failure: nothing is said; a manager that hears nothing restarts the service, as it should.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping


def tell(*assignments: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Sends these assignments in one datagram; False: nobody asked for it, or nobody took it."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    place = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto("\n".join(assignments).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, place)
        return True
    return False


def ready(status: str = "") -> bool:
    """Everything is in force; again after reloading()."""
    return tell("READY=1", *([f"STATUS={status}"] if status else []))


def reloading() -> bool:
    """Settings are read anew; ready() ends it."""
    return tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> bool:
    """The end was asked for, and is under way."""
    return tell("STOPPING=1")


class Watchdog:
    """Pings a manager that wants to hear of us twice as often as it asks; free where none does."""

    def __init__(self, environment: Mapping[str, str] = os.environ, now: Callable[[], float] = time.monotonic) -> None:
        self._environment, self._now = environment, now
        self._seconds = _asked_microseconds(environment) / 2e6
        self._due = now()

    def ping(self) -> bool:
        """To be called whenever the main loop turns; True: it was due, and sent."""
        if not self._seconds or self._now() < self._due:
            return False
        self._due = self._now() + self._seconds
        return tell("WATCHDOG=1", environment=self._environment)


def _asked_microseconds(environment: Mapping[str, str]) -> int:
    """0: no watchdog, or one for another process."""
    try:
        meant = int(environment.get("WATCHDOG_PID", os.getpid())) == os.getpid()
        return max(0, int(environment.get("WATCHDOG_USEC", 0))) if meant else 0
    except ValueError:
        return 0
