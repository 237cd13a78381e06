"""The capabilities that the agent and the gatekeeper keep after their start, and that the parker needs.

Agent and gatekeeper drop all other capabilities.

This module runs in the main thread of each process, before the process starts other threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import struct
from collections.abc import Set

from fgpu_ebpf.linux.libc import LIBC, check

_SET_NO_NEW_PRIVS, _CAPBSET_READ, _CAPBSET_DROP, _CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 38, 23, 24, 47, 4
_VERSION_3 = 0x20080522


class Capability(enum.IntEnum):
    """Capabilities with their numbers in linux/capability.h."""

    CHOWN = 0  # set the group of the control socket
    DAC_OVERRIDE = 1  # access a process of any user through its folder in /proc, as the driver does
    DAC_READ_SEARCH = 2  # read files and folders of tenants that any user may own
    KILL = 5  # kill processes that allocate memory without a probe, under onBypass: kill
    SYS_PTRACE = 19  # read the mappings, the root and the namespaces of a process of any user
    SYS_ADMIN = 21  # open BPF maps by id, attach uprobes, open map_files links; includes BPF and PERFMON
    SYS_NICE = 23  # raise the priority: the agent while it runs, the gatekeeper before it drops the capability


GATEKEEPER = frozenset({Capability.DAC_READ_SEARCH, Capability.SYS_PTRACE, Capability.SYS_ADMIN})
AGENT = GATEKEEPER | {Capability.CHOWN, Capability.KILL, Capability.SYS_NICE}
PARKER = GATEKEEPER | {Capability.DAC_OVERRIDE}


def keep_only(kept: Set[Capability]) -> None:
    """Drop all capabilities except `kept`, in this thread, in threads started later and in programs executed later.

    None of these threads and programs can get a dropped capability again.

    A capability in `kept` that the thread does not have is not added. Raise OSError on failure.
    """
    check("prctl(NO_NEW_PRIVS)", LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for number in range(64):
        if LIBC.prctl(_CAPBSET_READ, number, 0, 0, 0) != 1 or number in kept:
            continue
        with contextlib.suppress(PermissionError):  # no SETPCAP; a program still gets no more than this thread has
            check("prctl(CAPBSET_DROP)", LIBC.prctl(_CAPBSET_DROP, number, 0, 0, 0))
    check("prctl(CAP_AMBIENT)", LIBC.prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0))
    permitted = _permitted() & sum(1 << capability for capability in kept)
    words = (part for half in (permitted & 0xFFFFFFFF, permitted >> 32) for part in (half, half, 0))
    check("capset", LIBC.capset(struct.pack("Ii", _VERSION_3, 0), struct.pack("6I", *words)))


def lacking(needed: Set[Capability]) -> list[Capability]:
    """Return which of these capabilities this thread does not have."""
    permitted = _permitted()
    return sorted(capability for capability in needed if not permitted >> capability & 1)


def _permitted() -> int:
    header, data = struct.pack("Ii", _VERSION_3, 0), ctypes.create_string_buffer(24)
    check("capget", LIBC.capget(header, data))
    words: tuple[int, ...] = struct.unpack("6I", data.raw)
    return words[1] | words[4] << 32
