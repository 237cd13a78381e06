"""The bpf(2) and perf_event_open(2) system calls that fgpu needs.

This module runs in any thread of the agent, the gatekeeper and the commands. The module has no state. Errors are
OSError with the kernel's errno and the name of the call. For a missing map entry the result is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.linux import bpf_attributes as attributes
from fgpu_ebpf.linux.libc import LIBC, check

_BPF, _PERF_EVENT_OPEN = {"x86_64": (321, 298), "aarch64": (280, 241)}.get(os.uname().machine, (321, 298))
_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _PROG_LOAD, _OBJ_PIN, _OBJ_GET, _TEST_RUN = 0, 1, 2, 3, 5, 6, 7, 10
_MAP_GET_FD_BY_ID, _RAW_TRACEPOINT_OPEN, _FREEZE, _LOOKUP_BATCH, _LINK_CREATE = 14, 17, 22, 24, 28
_UPDATE_BATCH, _DELETE_BATCH, _ANY, _NOEXIST, _EXIST = 26, 27, 0, 1, 2
_OF_CGROUP_DEVICE, _PERF_EVENT, _TRACE_UPROBE_MULTI = 6, 41, 48
KPROBE, CGROUP_DEVICE, RAW_TRACEPOINT = 2, 15, 17  # types of programs
_MULTI_FROM = (6, 6)  # from this version on, one link attaches a program to all offsets of a file
_ID_BYTES, _PERF_FLAG_FD_CLOEXEC, _MOST_LOADS = 4, 8, 5
ARRAY, ARRAY_OF_MAPS, HASH_OF_MAPS = 2, 12, 13
MMAPABLE, MOST_INNER = 1 << 10, 4096  # MOST_INNER: maximum of inner maps in a map of maps
UPROBE_TYPE = Path("/sys/bus/event_source/devices/uprobe/type")
UPROBE_RETURN_BIT = Path("/sys/bus/event_source/devices/uprobe/format/retprobe")


def kernel_release() -> tuple[int, int]:
    """Return (major, minor) of the running kernel. driver/compiler.py, which may not import fgpu, has a copy."""
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in os.uname().release.split(".")[:2])
    return major, minor


# Before Linux 6.8 a lookup in a map of maps also waits for an RCU grace period, 10 to 30 ms, and a batch update waits
# for one grace period for each entry.
HOLDS_LOOKERS = kernel_release() < (6, 8)


def _bpf(name: str, command: int, attr: ctypes.Structure) -> int:
    return check(f"bpf({name})", LIBC.syscall(_BPF, command, ctypes.byref(attr), ctypes.sizeof(attr)))


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


@functools.cache
def _bytes(length: int) -> type[ctypes.Array[ctypes.c_char]]:
    """Return the ctypes array type of this length.

    The types are cached, because each call would otherwise create garbage: a type takes some KiB and has reference
    cycles.
    """
    return ctypes.c_char * length


def _output_buffer(bytes_: int) -> ctypes.Array[ctypes.c_char]:
    """Return a buffer that the kernel fills. Pages that the kernel does not write take no memory."""
    room = mmap.mmap(-1, max(bytes_, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory would need an inode
    return _bytes(len(room)).from_buffer(room)


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    """Return a buffer that the kernel reads: the data, padded with zeros to a power of two, so that few types exist."""
    buffer = _bytes(max(8, 1 << (len(data) - 1).bit_length()))()
    buffer.value = data
    return buffer


def _path(path: str | Path) -> ctypes.Array[ctypes.c_char]:
    return _buffer(os.fsencode(path) + b"\0")


# -- maps ----------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """The type and sizes of a map, named as in /proc/PID/fdinfo."""

    map_type: int
    key_size: int
    value_size: int
    max_entries: int
    map_flags: int


def create(name: str, form: Form, inner: int = 0) -> int:
    """Create a map and return its descriptor. Raise OSError on failure.

    Args:
        name: the name that tools show; the first 15 characters are used.
        form: the map's type and sizes.
        inner: for a map of maps, the descriptor of a map that has the form of all inner maps.
    """
    return _bpf("MAP_CREATE", _MAP_CREATE, attributes.MapCreateAttr(*form, inner, 0, name.encode()[:15]))


def create_array_page(name: str, bytes_: int) -> int:
    """Create an array map with one element that can be mapped into memory. Return its descriptor."""
    return create(name, Form(ARRAY, 4, bytes_, 1, MMAPABLE))


def form(fd: int) -> Form:
    """Return the form of an open map. Raise OSError, with EINVAL if the descriptor is not a map."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":\t") for line in lines if ":\t" in line)
    if not found.keys() >= set(Form._fields):
        raise OSError(errno.EINVAL, f"descriptor {fd} is not a BPF map")
    return Form(*(int(found[name], 0) for name in Form._fields))


def lookup(fd: int, key: bytes, value_bytes: int) -> bytes | None:
    """Return one value of a map, or None if the map does not have the key. Raise OSError on failure."""
    k, v = _buffer(key), _bytes(value_bytes)()
    try:
        _bpf("MAP_LOOKUP", _LOOKUP, attributes.MapElemAttr(fd, _address(k), _address(v)))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return v.raw


def number(fd: int, index: int) -> int:
    """Return one 64-bit number of an array map. Raise OSError, with ENOENT if the array has no such index."""
    raw = lookup(fd, struct.pack("I", index), 8)
    if raw is None:
        raise OSError(errno.ENOENT, f"a BPF array has no entry {index}")
    return int.from_bytes(raw, sys.byteorder)


def update(fd: int, key: bytes, value: bytes) -> None:
    """Insert or replace one entry. Raise OSError, with E2BIG if the map is full."""
    _update(fd, key, value, _ANY)


def insert(fd: int, key: bytes, value: bytes) -> bool:
    """Insert one entry. Return False if the key already exists. Raise OSError, with E2BIG if the map is full."""
    return _update_unless(errno.EEXIST, fd, key, value, _NOEXIST)


def replace(fd: int, key: bytes, value: bytes) -> bool:
    """Replace one entry. Return False if the key does not exist. Raise OSError on failure."""
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
    _bpf("MAP_UPDATE", _UPDATE, attributes.MapElemAttr(fd, _address(k), _address(v), flag))


def delete(fd: int, key: bytes) -> bool:
    """Delete one entry. Return False if the key does not exist. Raise OSError on failure."""
    k = _buffer(key)
    try:
        _bpf("MAP_DELETE", _DELETE, attributes.MapElemAttr(fd, _address(k)))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def inner_id(fd: int, key: bytes) -> int | None:
    """Return the id of a map in a hash of maps, or None if the key does not exist. Never wait for a grace period."""
    if not HOLDS_LOOKERS:
        raw = lookup(fd, key, _ID_BYTES)
        return None if raw is None else int.from_bytes(raw, sys.byteorder)
    found = (value for there, value in items(fd, len(key), _ID_BYTES, MOST_INNER) if there == key)
    return next((int.from_bytes(value, sys.byteorder) for value in found), None)


def items(fd: int, key_bytes: int, value_bytes: int, chunk: int = 256) -> Iterator[tuple[bytes, bytes]]:
    """Yield all entries of a hash map or array, read in batches. A batch of a hash map consists of whole buckets.

    An entry that changes during the call is yielded at most once. The caller may delete entries that were yielded.

    Args:
        chunk: how many entries are read at a time. The number grows if one bucket has more entries.

    Raises:
        OSError: the kernel cannot read the map.
    """
    token = _bytes(8)()
    attr = attributes.BatchAttr(out_batch=_address(token), map_fd=fd)
    keys, values = _output_buffer(key_bytes * chunk), _output_buffer(value_bytes * chunk)
    done = False
    while not done:
        attr.keys, attr.values, attr.count = _address(keys), _address(values), chunk
        try:
            _bpf("MAP_LOOKUP_BATCH", _LOOKUP_BATCH, attr)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # one bucket holds more than a chunk
                chunk *= 4
                keys, values = _output_buffer(key_bytes * chunk), _output_buffer(value_bytes * chunk)
                continue
            if error.errno != errno.ENOENT:
                raise
            done = True  # these are the last entries
        attr.in_batch = _address(token)
        k, v = ctypes.string_at(keys, attr.count * key_bytes), ctypes.string_at(values, attr.count * value_bytes)
        for i in range(attr.count):
            yield k[i * key_bytes : (i + 1) * key_bytes], v[i * value_bytes : (i + 1) * value_bytes]


def update_all(fd: int, entries: Mapping[bytes, bytes]) -> None:
    """Insert or replace many entries at once. Raise OSError on failure.

    If the map is a map of maps, the kernel waits for one RCU grace period, or before Linux 6.8 for one grace period per
    entry.
    """
    if entries:
        k, v = _buffer(b"".join(entries)), _buffer(b"".join(entries.values()))
        attr = attributes.BatchAttr(keys=_address(k), values=_address(v), count=len(entries), map_fd=fd)
        _bpf("MAP_UPDATE_BATCH", _UPDATE_BATCH, attr)


def delete_all(fd: int, keys: Sequence[bytes]) -> int:
    """Delete many entries at once. Missing keys are skipped. Return the number of deleted entries."""
    deleted = at = 0
    while at < len(keys):
        k = _buffer(b"".join(keys[at:]))
        attr = attributes.BatchAttr(keys=_address(k), count=len(keys) - at, map_fd=fd)
        try:
            _bpf("MAP_DELETE_BATCH", _DELETE_BATCH, attr)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        deleted += attr.count
        at += attr.count + 1  # skip the missing key
    return deleted


def freeze(fd: int) -> None:
    """Forbid all processes, but not BPF programs, to write the map from now on. Raise OSError on failure."""
    _bpf("MAP_FREEZE", _FREEZE, attributes.MapElemAttr(fd))


def frozen(fd: int) -> bool:
    """Return whether the map is frozen. A read-only descriptor, which cannot be mapped as shared, is no substitute."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return "frozen:\t1" in file.read()


def map_by_id(identity: int) -> int:
    """Open the map with this id, and return its descriptor. Raise OSError on failure."""
    return _bpf("MAP_GET_FD_BY_ID", _MAP_GET_FD_BY_ID, attributes.IdAttr(identity))


# -- objects -------------------------------------------------------------------------------------------------------


def pinned(path: Path) -> int:
    """Open the map, program or link that is pinned at the path, and return its descriptor. Raise OSError on failure."""
    name = _path(path)
    return _bpf("OBJ_GET", _OBJ_GET, attributes.ObjAttr(_address(name)))


def pin(fd: int, path: Path) -> None:
    """Pin a map, program or link at a path in a bpffs. Raise OSError on failure."""
    name = _path(path)
    _bpf("OBJ_PIN", _OBJ_PIN, attributes.ObjAttr(_address(name), fd))


def load_program(name: str, code: bytes, type_: int) -> int:
    """Load a BPF program under the GPL, and return its descriptor. Raise OSError if the kernel refuses the program.

    Args:
        name: the name that tools show; the first 15 characters are used.
        code: the instructions, which contain descriptors of maps.
        type_: KPROBE (for uprobes), CGROUP_DEVICE or RAW_TRACEPOINT.
    """
    instructions, licence = _buffer(code), _buffer(b"GPL\0")
    attr = attributes.ProgLoadAttr(insn_cnt=len(code) // 8, insns=_address(instructions), license=_address(licence))
    attr.prog_type, attr.prog_name = type_, name.encode()[:15]
    if type_ == KPROBE and kernel_release() >= _MULTI_FROM:
        attr.expected_attach_type = _TRACE_UPROBE_MULTI
    for _ in range(_MOST_LOADS):
        with contextlib.suppress(BlockingIOError):  # EAGAIN: a signal has ended the verification
            return _bpf("PROG_LOAD", _PROG_LOAD, attr)
    raise BlockingIOError(errno.EAGAIN, "bpf(PROG_LOAD): interrupted by signals")


def run_raw_tracepoint(program: int, *arguments: int) -> int:
    """Run a raw tracepoint program once with up to 12 arguments, and return its signed result."""
    context = _buffer(struct.pack(f"{len(arguments)}Q", *(a & (2**64 - 1) for a in arguments)))
    attr = attributes.TestRunAttr(prog_fd=program, ctx_size_in=8 * len(arguments), ctx_in=_address(context))
    _bpf("PROG_TEST_RUN", _TEST_RUN, attr)
    return ctypes.c_int32(attr.retval).value


def attach_raw_tracepoint(program: int, name: str) -> int:
    """Attach a program to a raw tracepoint, and return the link's descriptor.

    Raise OSError, with EINVAL if the program reads an argument that this kernel's event does not have.
    """
    event = _buffer(name.encode() + b"\0")
    return _bpf("RAW_TRACEPOINT_OPEN", _RAW_TRACEPOINT_OPEN, attributes.RawTracepointAttr(_address(event), program))


def attach_to_cgroup(program: int, folder: int) -> int:
    """Attach a program of the type CGROUP_DEVICE to an open cgroup folder, and return the link.

    The program decides about processes in this cgroup and below, in addition to all other programs of the cgroup.
    """
    return _bpf("LINK_CREATE", _LINK_CREATE, attributes.LinkCreateAttr(program, folder, _OF_CGROUP_DEVICE))


def open_uprobe(path: str, offset: int, at_return: bool) -> int:
    """Open a uprobe perf event at a file offset, for all processes, and return its descriptor.

    Args:
        offset: the offset of the instruction in the file.
        at_return: the event occurs at the function's return instead of its entry.

    Raises:
        OSError: ENODEV: the kernel has no uprobe PMU.
    """
    try:
        pmu = int(UPROBE_TYPE.read_text())
        bit = int(UPROBE_RETURN_BIT.read_text().split(":")[1])
    except FileNotFoundError as error:
        raise OSError(errno.ENODEV, "the kernel has no uprobe PMU") from error
    name = _path(path)
    size = ctypes.sizeof(attributes.PerfEventAttr)
    attr = attributes.PerfEventAttr(type=pmu, size=size, config=int(at_return) << bit, sample_period=1)
    attr.uprobe_path, attr.probe_offset = _address(name), offset
    arguments = (_PERF_EVENT_OPEN, ctypes.byref(attr), -1, 0, -1, _PERF_FLAG_FD_CLOEXEC)
    return check("perf_event_open", LIBC.syscall(*arguments))


def attach_uprobes(program: int, path: str, places: Sequence[tuple[int, int]], at_return: bool) -> list[int]:
    """Attach a program to offsets of a file, for all processes.

    One link attaches all offsets together (uprobe_multi). Before Linux 6.6 each offset gets its own perf event, which
    takes 5 ms to attach and 0.1 s to detach.

    Args:
        places: pairs of file offset and cookie, which the program can read when it runs.
        at_return: run the program at the function's return instead of its entry.

    Returns:
        The descriptors of the links, which the caller closes.

    Raises:
        OSError: nothing is attached.
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
    common = attributes.LinkCreateAttr(program, event, _PERF_EVENT)
    try:
        attr = attributes.PerfEventLinkAttr(common, attributes.PerfEventLink(cookie))
        return _bpf("LINK_CREATE", _LINK_CREATE, attr)
    finally:
        os.close(event)


def _attach_multi(program: int, path: str, places: Sequence[tuple[int, int]], at_return: bool) -> int:
    name = _path(path)
    offsets, cookies = (_buffer(struct.pack(f"{len(places)}Q", *column)) for column in zip(*places, strict=True))
    common = attributes.LinkCreateAttr(program, attach_type=_TRACE_UPROBE_MULTI)
    where = attributes.UprobeMultiLink(_address(name), _address(offsets), 0, _address(cookies), len(places))
    where.flags = int(at_return)
    return _bpf("LINK_CREATE", _LINK_CREATE, attributes.UprobeMultiLinkAttr(common, where))
