"""T29: a tenant starts programs in many root directories. Each has files named like libcuda that take long to read."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.pings import Pings
from tests.support.host import BUILD, CONTEXT, MIB, REFUSED
from tests.support.tenant import Program

ROOTS, NEIGHBOURS = 60, 5
ROOM = 40 * MIB
LARGE_BYTES = 256 * MIB
PING_SECONDS = 0.1
NAMES = (
    "usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "usr/lib64/libcuda.so.1",
    "usr/lib/libcuda.so.1",
    "usr/lib/libcuda.so",
)
SYMBOLS = 1023  # symbols in one chain: the agent compares this many for each name
SLEEPER = "#include <unistd.h>\nint main(void) { return usleep(300000); }\n"


def slow_library() -> bytes:
    """Return an ELF library without the driver's functions, with all symbols in one chain of its hash table."""
    dynamic_at, hash_at, strings_at = 0x200, 0x1000, 0x4000
    symbols_at, size = 0x5000, 0x5000 + 24 * (SYMBOLS + 1)
    chain = [*range(1, SYMBOLS + 1), 0]
    parts = {
        0: b"\x7fELF\x02\x01\x01" + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0),
        64: struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
        + struct.pack("<IIQQQQQQ", 2, 4, dynamic_at, dynamic_at, 0, 64, 64, 8),
        dynamic_at: struct.pack("<8Q", 4, hash_at, 5, strings_at, 6, symbols_at, 0, 0),
        hash_at: struct.pack(f"<{3 + SYMBOLS + 1}I", 1, SYMBOLS + 1, 1, *[0, *chain[1:]]),
    }  # fmt: skip
    text = bytearray(size)
    for at, part in parts.items():
        text[at : at + len(part)] = part
    return bytes(text)


def make_root(root: Path, program: Path, number: int) -> None:
    """Create a folder with a program and files with libcuda's name: slow, short and large ones."""
    for name in NAMES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x7fELF" if number % 6 == 5 else slow_library())
        if number % 6 == 4:
            os.truncate(path, LARGE_BYTES)
    os.link(program, root / "program")


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    program = tmp_path / "program"
    subprocess.run(["gcc", "-static", "-x", "c", "-o", program, "-"], input=SLEEPER, text=True, check=True, timeout=60)
    folder = tmp_path / "roots"
    for number in range(ROOTS):
        make_root(folder / str(number), program, number)
    return folder


@pytest.mark.timed
@pytest.mark.places("host")
@pytest.mark.timeout(120)
def test_programs_in_many_roots_delay_no_other_tenant(
    unharmed: None, tenant, roots: Path, scale: Callable[..., int]
) -> None:
    hostile = tenant(CONTEXT + ROOM)
    with hostile.growing(ROOM):
        hostile.client().ok(f"alloc {ROOM}")
    hostile.assert_enforced()
    program = Program(hostile, "roots", f"{BUILD}/e2e/roots {roots}")
    assert program.receive() == "ready"
    with Pings() as pings:
        for _ in range(NEIGHBOURS):
            client = tenant(CONTEXT + ROOM).client()
            client.ok(f"alloc {ROOM}")
            assert client.do(f"alloc {MIB}") == REFUSED
        time.sleep(scale(2, 4, 20))
    print(pings)
    assert program.rest() == "", "the program did not run to its end"
    program.close()
    assert pings.p99() <= PING_SECONDS
