"""fgpu's objects in the kernel, by bpf(2) alone: pinned objects, their ids, the entries of a map."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
from pathlib import Path

BPFFS = Path("/sys/fs/bpf")
_SYS_BPF, _LOOKUP, _GET_NEXT_KEY, _OBJ_GET, _MAP_BY_ID = 321, 1, 4, 7, 14
_PAGE_BYTES, _FIRST_DEVICE = 4096, 64  # of a usage page: its size, and the offset of the first device's limit
NEXT_ID = {"prog_id": 11, "map_id": 12, "link_id": 31}
_libc = ctypes.CDLL(None, use_errno=True)
Object = tuple[str, int]


def _bpf(command: int, attributes: bytes | ctypes.Array[ctypes.c_char]) -> int:
    return int(_libc.syscall(_SYS_BPF, command, attributes, 128))


def opened(path: Path) -> int:
    """Return a descriptor of the object that is pinned there. It is negative if nothing is pinned."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, struct.pack("QII", ctypes.addressof(name), 0, 0).ljust(128, b"\0"))


def objects_of(fdinfo: str) -> set[Object]:
    """Return the BPF objects that a text from /proc/PID/fdinfo names."""
    return {(kind, int(number)) for kind, number in re.findall(r"^((?:prog|map|link)_id):\s*(\d+)$", fdinfo, re.M)}


def pinned() -> set[Object]:
    """Return the BPF objects of fgpu that are pinned here."""
    found = set()
    for path in (p for p in (BPFFS / "fgpu").rglob("*") if p.is_file()):
        fd = opened(path)
        if fd >= 0:
            found |= objects_of(Path(f"/proc/self/fdinfo/{fd}").read_text())
            os.close(fd)
    return found


def held_by(pid: int) -> set[Object]:
    """Return the BPF objects that a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found |= objects_of(path.read_text())
    return found


def in_the_kernel() -> set[Object]:
    """Return every BPF object in the kernel."""
    found = set()
    for kind, command in NEXT_ID.items():
        attributes = ctypes.create_string_buffer(128)
        while _bpf(command, attributes) == 0:
            number = struct.unpack_from("II", attributes)[1]
            found.add((kind, number))
            struct.pack_into("I", attributes, 0, number)
    return found


def entries(name: str) -> int:
    """Return the number of entries of one of fgpu's maps."""
    return len(keys(name))


def is_probed(path: Path) -> bool:
    """Return whether the probes of this file are attached."""
    return path.stat().st_ino in (struct.unpack_from("QQ", key)[1] for key in keys("files"))


def _map(name: str) -> int:
    fd = opened(next(BPFFS.glob(f"fgpu/v*/maps/{name}")))
    assert fd >= 0, name
    return fd


def _look_up(fd: int, key: bytes, value_bytes: int) -> bytes:
    """Return the value of a key, or nothing if the map has none. The descriptor is closed."""
    name, value = ctypes.create_string_buffer(key), ctypes.create_string_buffer(value_bytes)
    words = struct.pack("IIQQQ", fd, 0, ctypes.addressof(name), ctypes.addressof(value), 0)
    failed = _bpf(_LOOKUP, words.ljust(128, b"\0"))
    os.close(fd)
    return b"" if failed else value.raw


def limit_in_force(cgroup: int) -> int | None:
    """Return the limit of the first device in bytes, from the page that the kernel uses. None: the cgroup has none."""
    number = _look_up(_map("pages"), struct.pack("Q", cgroup), 4)
    fd = _bpf(_MAP_BY_ID, number.ljust(128, b"\0")) if number else -1
    if fd < 0:
        return None
    return int(struct.unpack_from("Q", _look_up(fd, bytes(4), _PAGE_BYTES), _FIRST_DEVICE)[0])


def keys(name: str) -> list[bytes]:
    """Return the keys of one of fgpu's maps."""
    fd = _map(name)
    key, after = ctypes.create_string_buffer(256), ctypes.create_string_buffer(256)
    found, where = [], 0
    while _bpf(_GET_NEXT_KEY, struct.pack("IIQQ", fd, 0, where, ctypes.addressof(after)).ljust(128, b"\0")) == 0:
        found.append(after.raw)
        key.raw, where = after.raw, ctypes.addressof(key)
    os.close(fd)
    return found
