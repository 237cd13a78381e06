"""The verifier of the running kernel accepts every program; FGPU_TEST_PROGRAMS is a file that compile.py wrote.

Because of its name, pytest does not collect this file by default.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

_MAP_CREATE, _PROG_LOAD, _BPF = 0, 5, 321
_ARRAY, _OF_MAPS, _MMAPABLE = 2, (12, 13), 1 << 10
_KPROBE, _CGROUP_DEVICE, _RAW_TRACEPOINT, _STATISTICS = 2, 15, 17, 4
_LOAD_MAP = 0x1018
# As in fgpu_ebpf/driver/image.py, which the guest does not have.
RAW_TRACEPOINTS = {"process_exit", "process_exec", "program_began", "adjust"} | {
    f"cgroup_{what}" for what in ("attach", "made", "populated", "removed")
}
_LIBC = ctypes.CDLL(None, use_errno=True)
SAID = json.loads(Path(os.environ["FGPU_TEST_PROGRAMS"]).read_text())


def bpf(command: int, layout: str, *values: int) -> int:
    attr = ctypes.create_string_buffer(struct.pack(layout, *values), 128)
    made = int(_LIBC.syscall(_BPF, command, attr, 128))
    if made < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return made


@pytest.fixture(scope="module")
def maps() -> Iterator[list[int]]:
    """Return the maps, in the order in which the code numbers them."""
    page = bpf(_MAP_CREATE, "6I", _ARRAY, 4, 4096, 1, _MMAPABLE, 0)
    made = [bpf(_MAP_CREATE, "6I", *form, page if form[0] in _OF_MAPS else 0) for form in SAID["maps"].values()]
    yield made
    for fd in (page, *made):
        os.close(fd)


@pytest.mark.parametrize("name", SAID["programs"])
def test_the_verifier_accepts_each_program(name, maps):
    code = bytearray.fromhex(SAID["programs"][name])
    for at in range(0, len(code), 8):
        operation, _, number = struct.unpack_from("HhI", code, at)
        if operation & 0xF0FF == _LOAD_MAP:
            struct.pack_into("I", code, at + 4, maps[number])
    said = ctypes.create_string_buffer(1 << 16)
    instructions = (ctypes.c_char * len(code)).from_buffer(code)
    licence = ctypes.create_string_buffer(b"GPL")
    kind = _RAW_TRACEPOINT if name in RAW_TRACEPOINTS else _CGROUP_DEVICE if name == "device_open" else _KPROBE
    where = ctypes.addressof(instructions), ctypes.addressof(licence)
    log = _STATISTICS, len(said), ctypes.addressof(said)
    try:
        os.close(bpf(_PROG_LOAD, "IIQQIIQII", kind, len(code) // 8, *where, *log, 0, 0))
    except OSError as error:
        tail = said.value.decode(errors="replace").strip().splitlines()[-2:]
        pytest.fail(f"{errno.errorcode.get(error.errno or 0)}: {tail}")
    print(name, said.value.decode(errors="replace").strip().splitlines()[-1])
