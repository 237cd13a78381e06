"""A 32-bit program with a 32-bit libcuda, in a container with the shim: it is charged, named, and not disturbed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable

import pytest

from tests.support import bits32
from tests.support.commands import fgpu, metrics
from tests.support.host import CONTEXT, MIB, SHIM
from tests.support.tenant import Tenant
from tests.support.wait import eventually

ROOM = 40 * MIB
SAID = f"ERROR: ld.so: object '{SHIM}' from /etc/ld.so.preload cannot be preloaded"
WHY = " (wrong ELF class: ELFCLASS64): ignored.\n"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the processor runs no 32-bit program of x86")


@pytest.mark.places("runc")
def test_a_32_bit_program_is_charged_and_named(tenant: Callable[[int], Tenant]) -> None:
    """The kernel has no probe in its driver, so its memory is charged when NVML shows it."""
    program = bits32.client()
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    other = one.client(program=program)
    other.ok(f"alloc {2 * ROOM}")
    assert one.assert_exact(10) == CONTEXT + 2 * ROOM
    key = "fgpu_shimless_processes", frozenset({("tenant", one.name), ("reason", "32_bit")})
    eventually(lambda: metrics().get(key) == 1, 3, "the reason")
    checks = {check["name"]: check for check in json.loads(fgpu("doctor", "--json", check=False).stdout)}
    assert checks["shim"]["found"] == f"{one.name} (32_bit)"
    assert "unprobed (32_bit)" in " ".join(fgpu("ps").stdout.split())
    assert f"without the shim: pid {other.pid} (32_bit)" in fgpu("explain", one.path).stdout
    assert other.complaints() == SAID + WHY
    other.kill()
    other.close()
    eventually(lambda: other.pid not in one.pids(), 10, "the exit of the program")
    one.assert_holds(ROOM)
