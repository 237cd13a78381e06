"""A sandbox refuses the shim's socket: the program registers without it, and has its limit."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.support.host import BUILD, CONTEXT, MIB, REFUSED
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

ROOM = 40 * MIB
SANDBOXED = f"{BUILD}/e2e/sandboxed {errno.EAFNOSUPPORT}"


def test_a_program_in_a_sandbox_without_sockets_has_its_limit(tenant: Callable[[int], Tenant]) -> None:
    one = tenant(CONTEXT + ROOM)
    client = one.client(before=SANDBOXED)
    client.ok(f"alloc {ROOM}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact(10) == CONTEXT + ROOM
    assert client.complaints() == ""
    client.kill()
    client.close()


@pytest.mark.places("runc")
def test_a_sandboxed_program_of_a_container_without_a_limit_gets_memory(
    service: Service, tenant: Callable[[int | None], Tenant]
) -> None:
    client = tenant(None).client(before=SANDBOXED)
    client.ok(f"alloc {100 * MIB}")
    assert client.complaints() == ""
    client.kill()
    client.close()


@pytest.mark.places("host")
def test_a_sandboxed_program_registers_with_the_next_gatekeeper(
    service: Service, tenant: Callable[[int], Tenant]
) -> None:
    one = tenant(CONTEXT + ROOM)
    service.kill_gatekeeper()
    client = one.client(before=SANDBOXED)
    eventually(lambda: client.do(f"alloc {ROOM}") != REFUSED, 20, "memory")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact(10) == CONTEXT + ROOM
    client.kill()
    client.close()
