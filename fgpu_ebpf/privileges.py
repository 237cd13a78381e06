"""What agent and gatekeeper may do once they have started: what their work takes, and nothing else.

Owns: the two lists of capabilities, and the giving up of all others. Never: gives up what is listed, or takes anything.
On failure: OSError; nothing is given up by halves that anybody would notice: whoever starts as root had it all before.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import struct
from collections.abc import Set

_LIBC = ctypes.CDLL(None, use_errno=True)
_SET_NO_NEW_PRIVS, _CAPBSET_READ, _CAPBSET_DROP, _CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 38, 23, 24, 47, 4
_VERSION_3 = 0x20080522


class Capability(enum.IntEnum):
    """As linux/capability.h numbers them."""

    CHOWN = 0  # the group of the control socket
    DAC_READ_SEARCH = 2  # files and folders of tenants, whoever owns them
    KILL = 5  # processes that take memory where no probe is, under onBypass: kill
    SYS_PTRACE = 19  # what a process of any user has mapped, its root and its namespaces
    SYS_ADMIN = 21  # BPF's maps by id, uprobes, what map_files leads to; BPF and PERFMON are part of it
    SYS_NICE = 23  # to come first on the processor: the agent while it runs, the gatekeeper before it gives it up


GATEKEEPER = frozenset({Capability.DAC_READ_SEARCH, Capability.SYS_PTRACE, Capability.SYS_ADMIN})
AGENT = GATEKEEPER | {Capability.CHOWN, Capability.KILL, Capability.SYS_NICE}


def keep_only(kept: Set[Capability]) -> None:
    """Gives up all other capabilities, for good: this thread, those that it starts, and what they execute.

    What it did not have it does not get. Raises OSError.
    """
    _call("prctl(NO_NEW_PRIVS)", _LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for number in range(64):
        if _LIBC.prctl(_CAPBSET_READ, number, 0, 0, 0) != 1 or number in kept:
            continue
        with contextlib.suppress(PermissionError):  # without SETPCAP: then what is executed gets no more than it has
            _call("prctl(CAPBSET_DROP)", _LIBC.prctl(_CAPBSET_DROP, number, 0, 0, 0))
    _call("prctl(CAP_AMBIENT)", _LIBC.prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0))
    permitted = _permitted() & sum(1 << capability for capability in kept)
    words = (part for half in (permitted & 0xFFFFFFFF, permitted >> 32) for part in (half, half, 0))
    _call("capset", _LIBC.capset(struct.pack("Ii", _VERSION_3, 0), struct.pack("6I", *words)))


def _permitted() -> int:
    header, data = struct.pack("Ii", _VERSION_3, 0), ctypes.create_string_buffer(24)
    _call("capget", _LIBC.capget(header, data))
    words: tuple[int, ...] = struct.unpack("6I", data.raw)
    return words[1] | words[4] << 32


def _call(name: str, result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
