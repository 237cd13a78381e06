"""The bpf(2), perf_event_open(2) and pidfd system calls that fgpu needs, and no others.

Owns: argument layouts of these calls. Never: keeps state, knows a map's meaning, imports bcc.
On failure: OSError with the kernel's errno and the name of the call; a missing map entry is None.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import platform
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_BPF, _PERF_EVENT_OPEN = {"x86_64": (321, 298), "aarch64": (280, 241)}.get(platform.machine(), (321, 298))
_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _OBJ_PIN, _OBJ_GET, _TEST_RUN = 0, 1, 2, 3, 6, 7, 10
_MAP_GET_FD_BY_ID, _RAW_TRACEPOINT_OPEN, _FREEZE, _LOOKUP_BATCH, _LINK_CREATE = 14, 17, 22, 24, 28
_UPDATE_BATCH, _DELETE_BATCH = 26, 27
_ANY, _NOEXIST, _EXIST = 0, 1, 2
_PERF_EVENT, _TRACE_UPROBE_MULTI = 41, 48
_ATTR_BYTES = 128
_PERF_ATTR_BYTES = 128
_ID_BYTES = 4
_PERF_FLAG_FD_CLOEXEC = 8
ARRAY = 2
MMAPABLE = 1 << 10
MOST_INNER = 4096  # of a map of maps
UPROBE_TYPE = Path("/sys/bus/event_source/devices/uprobe/type")
UPROBE_RETURN_BIT = Path("/sys/bus/event_source/devices/uprobe/format/retprobe")


def kernel_release() -> tuple[int, int]:
    """(major, minor) of the running kernel. The loader has this too: it imports nothing of fgpu."""
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in os.uname().release.split(".")[:2])
    return major, minor


# Whoever looks up an entry of a map of maps is held as by a change, 10 to 30 ms, and who changes many for each.
HOLDS_LOOKERS = kernel_release() < (6, 8)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _syscall(name: str, number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _bpf(name: str, command: int, layout: str, *values: int) -> int:
    attr = _buffer(struct.pack(layout, *values), _ATTR_BYTES)
    return _syscall(f"bpf({name})", _BPF, command, attr, _ATTR_BYTES)


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


@functools.cache
def _bytes(length: int) -> type[ctypes.Array[ctypes.c_char]]:
    """To ctypes each length is a type, of some KiB and in cycles: kept, else it is garbage soon, and made anew."""
    return ctypes.c_char * length


def _room(bytes_: int) -> ctypes.Array[ctypes.c_char]:
    """For the kernel to fill: pages that it does not touch cost nothing."""
    room = mmap.mmap(-1, max(bytes_, 1))
    return _bytes(len(room)).from_buffer(room)


def _buffer(data: bytes, bytes_: int = 0) -> ctypes.Array[ctypes.c_char]:
    """For the kernel to read, and zeros after it: up to `bytes_`, or to one of few lengths."""
    buffer = _bytes(bytes_ or max(8, 1 << (len(data) - 1).bit_length()))()
    buffer.value = data
    return buffer


# -- maps ----------------------------------------------------------------------------------------------------------


def create_array_page(name: str, bytes_: int) -> int:
    """Creates a one-element array map that can be mapped; answers its descriptor."""
    attr = struct.pack("6I", ARRAY, 4, bytes_, 1, MMAPABLE, 0) + struct.pack("I16s", 0, name.encode()[:15])
    buffer = _buffer(attr, _ATTR_BYTES)
    return _syscall("bpf(MAP_CREATE)", _BPF, _MAP_CREATE, buffer, _ATTR_BYTES)


def lookup(fd: int, key: bytes, value_bytes: int) -> bytes | None:
    """One value of a map, or None where the key is not there."""
    k, v = _buffer(key), _bytes(value_bytes)()
    try:
        _bpf("MAP_LOOKUP", _LOOKUP, "IIQQQ", fd, 0, _address(k), _address(v), 0)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return v.raw


def number(fd: int, index: int) -> int:
    """One 64-bit number of an array map; 0 where the array is shorter. Raises OSError."""
    raw = lookup(fd, struct.pack("I", index), 8)
    return 0 if raw is None else int.from_bytes(raw, sys.byteorder)


def update(fd: int, key: bytes, value: bytes) -> None:
    """Inserts or replaces one entry. Raises OSError (E2BIG: the map is full)."""
    _update(fd, key, value, _ANY)


def insert(fd: int, key: bytes, value: bytes) -> bool:
    """Inserts one entry; False where there is one. Raises OSError (E2BIG: the map is full)."""
    return _update_unless(errno.EEXIST, fd, key, value, _NOEXIST)


def replace(fd: int, key: bytes, value: bytes) -> bool:
    """Replaces one entry; False where there is none. Raises OSError."""
    return _update_unless(errno.ENOENT, fd, key, value, _EXIST)


def _update_unless(refused: int, fd: int, key: bytes, value: bytes, flag: int) -> bool:
    try:
        _update(fd, key, value, flag)
    except OSError as error:
        if error.errno == refused:
            return False
        raise
    return True


def _update(fd: int, key: bytes, value: bytes, flag: int) -> None:
    k, v = _buffer(key), _buffer(value)
    _bpf("MAP_UPDATE", _UPDATE, "IIQQQ", fd, 0, _address(k), _address(v), flag)


def delete(fd: int, key: bytes) -> bool:
    """Deletes one entry; False where there was none."""
    k = _buffer(key)
    try:
        _bpf("MAP_DELETE", _DELETE, "IIQQQ", fd, 0, _address(k), 0, 0)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def inner_id(fd: int, key: bytes) -> int | None:
    """The id of a map in a hash of maps, or None where the key is not there. Nobody is held."""
    if not HOLDS_LOOKERS:
        raw = lookup(fd, key, _ID_BYTES)
        return None if raw is None else int.from_bytes(raw, sys.byteorder)
    found = (value for there, value in items(fd, len(key), _ID_BYTES, MOST_INNER) if there == key)
    return next((int.from_bytes(value, sys.byteorder) for value in found), None)


def items(fd: int, key_bytes: int, value_bytes: int, chunk: int = 256) -> Iterator[tuple[bytes, bytes]]:
    """All entries of a hash map, in batches of whole buckets: an entry that changes meanwhile is seen at most once, and
    one that has been seen may be deleted.
    """
    token, first = _bytes(8)(), True
    keys, values = _room(key_bytes * chunk), _room(value_bytes * chunk)
    while True:
        attr = _bytes(_ATTR_BYTES)()
        start = 0 if first else _address(token)
        batch = (start, _address(token), _address(keys), _address(values), chunk, fd, 0, 0)
        struct.pack_into("QQQQIIQQ", attr, 0, *batch)
        done = False
        try:
            _syscall("bpf(MAP_LOOKUP_BATCH)", _BPF, _LOOKUP_BATCH, attr, _ATTR_BYTES)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # one bucket holds more than a chunk
                chunk *= 4
                keys, values = _room(key_bytes * chunk), _room(value_bytes * chunk)
                continue
            if error.errno != errno.ENOENT:
                raise
            done = True
        (count,) = struct.unpack_from("I", attr, 32)
        first = False
        k, v = ctypes.string_at(keys, count * key_bytes), ctypes.string_at(values, count * value_bytes)
        for i in range(count):
            yield k[i * key_bytes : (i + 1) * key_bytes], v[i * value_bytes : (i + 1) * value_bytes]
        if done:
            return


@functools.cache
def possible_processors() -> int:
    """How many values a per-processor map has of each entry."""
    spans = [span.split("-") for span in Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")]
    return 1 + max(int(span[-1]) for span in spans)


def update_all(fd: int, entries: Mapping[bytes, bytes]) -> None:
    """Inserts or replaces many at once: a map of maps waits for readers once, not once an entry."""
    if entries:
        _batch("MAP_UPDATE_BATCH", _UPDATE_BATCH, fd, list(entries), list(entries.values()))


def delete_all(fd: int, keys: Sequence[bytes]) -> None:
    """Deletes many at once. Raises OSError, ENOENT: it has stopped at one that is not there."""
    if keys:
        _batch("MAP_DELETE_BATCH", _DELETE_BATCH, fd, keys, [])


def _batch(name: str, command: int, fd: int, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
    k, v = _buffer(b"".join(keys)), _buffer(b"".join(values))
    attr = _bytes(_ATTR_BYTES)()
    struct.pack_into("QQQQIIQQ", attr, 0, 0, 0, _address(k), _address(v), len(keys), fd, 0, 0)
    _syscall(f"bpf({name})", _BPF, command, attr, _ATTR_BYTES)


def freeze(fd: int) -> None:
    """No process may write the map from now on; BPF programs may."""
    _bpf("MAP_FREEZE", _FREEZE, "I", fd)


def frozen(fd: int) -> bool:
    """No process may write the map. (A descriptor that is read-only could not be mapped as shared at all.)"""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as said:
        return "frozen:\t1" in said.read()


def map_by_id(identity: int) -> int:
    """A descriptor of the map with this id."""
    return _bpf("MAP_GET_FD_BY_ID", _MAP_GET_FD_BY_ID, "III", identity, 0, 0)


# -- objects -------------------------------------------------------------------------------------------------------


def pinned(path: Path) -> int:
    """A descriptor of the map, program or link pinned there."""
    name = _buffer(os.fsencode(path) + b"\0")
    return _bpf("OBJ_GET", _OBJ_GET, "QII", _address(name), 0, 0)


def pin(fd: int, path: Path) -> None:
    """Pins a map, program or link; the folder must lie in a bpffs."""
    name = _buffer(os.fsencode(path) + b"\0")
    _bpf("OBJ_PIN", _OBJ_PIN, "QII", _address(name), fd, 0)


def run_raw_tracepoint(program: int, *arguments: int) -> int:
    """Runs a raw tracepoint program once with up to 12 arguments; answers its return value, signed."""
    context = _buffer(struct.pack(f"{len(arguments)}Q", *(a & (2**64 - 1) for a in arguments)))
    attr = _bytes(_ATTR_BYTES)()
    struct.pack_into("IIIIQQII", attr, 0, program, 0, 0, 0, 0, 0, 0, 0)
    struct.pack_into("IIQQ", attr, 40, 8 * len(arguments), 0, _address(context), 0)
    _syscall("bpf(PROG_TEST_RUN)", _BPF, _TEST_RUN, attr, _ATTR_BYTES)
    result: int = struct.unpack_from("i", attr, 4)[0]
    return result


def attach_raw_tracepoint(program: int, name: str) -> int:
    """Attaches; answers the link. EINVAL: the program reads an argument that this kernel's event lacks."""
    event = _buffer(name.encode() + b"\0")
    return _bpf("RAW_TRACEPOINT_OPEN", _RAW_TRACEPOINT_OPEN, "QI", _address(event), program)


def open_uprobe(path: str, offset: int, at_return: bool) -> int:
    """A perf event at a file offset, for all processes. ENODEV: the kernel has no uprobe PMU."""
    try:
        pmu = int(UPROBE_TYPE.read_text())
        bit = int(UPROBE_RETURN_BIT.read_text().split(":")[1])
    except FileNotFoundError as error:
        raise OSError(errno.ENODEV, "the kernel has no uprobe PMU") from error
    name = _buffer(os.fsencode(path) + b"\0")
    attr = _bytes(_PERF_ATTR_BYTES)()
    struct.pack_into("IIQQQQ", attr, 0, pmu, _PERF_ATTR_BYTES, int(at_return) << bit, 1, 0, 0)
    struct.pack_into("QQ", attr, 56, _address(name), offset)
    return _syscall("perf_event_open", _PERF_EVENT_OPEN, attr, -1, 0, -1, _PERF_FLAG_FD_CLOEXEC)


def attach_uprobes(program: int, path: str, places: Sequence[tuple[int, int]], at_return: bool) -> list[int]:
    """Links for many (file offset, cookie) of a file, for all processes; the program is told the cookie at a hit.

    One link for all, attached and detached as one; before Linux 6.6 a perf event for each, which costs 5 ms to attach
    and 0.1 s to detach. Raises OSError, and nothing is attached then.
    """
    try:
        return [_attach_multi(program, path, places, at_return)]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    links: list[int] = []
    try:
        for offset, cookie in places:
            links.append(_attach_one(program, path, offset, cookie, at_return))
    except OSError:
        for link in links:
            os.close(link)
        raise
    return links


def _attach_one(program: int, path: str, offset: int, cookie: int, at_return: bool) -> int:
    event = open_uprobe(path, offset, at_return)
    try:
        return _bpf("LINK_CREATE", _LINK_CREATE, "IIIIQ", program, event, _PERF_EVENT, 0, cookie)
    finally:
        os.close(event)


def _attach_multi(program: int, path: str, places: Sequence[tuple[int, int]], at_return: bool) -> int:
    name = _buffer(os.fsencode(path) + b"\0")
    offsets, cookies = (_buffer(struct.pack(f"{len(places)}Q", *column)) for column in zip(*places, strict=True))
    attr = _bytes(_ATTR_BYTES)()
    struct.pack_into("IIII", attr, 0, program, 0, _TRACE_UPROBE_MULTI, 0)
    where = (_address(name), _address(offsets), 0, _address(cookies), len(places), int(at_return), 0)
    struct.pack_into("QQQQIII", attr, 16, *where)
    return _syscall("bpf(LINK_CREATE)", _BPF, _LINK_CREATE, attr, _ATTR_BYTES)
