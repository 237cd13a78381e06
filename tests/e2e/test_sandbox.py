"""A sandbox refuses the shim's socket: the program registers without it, and has its limit."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.support.host import BUILD, CONTEXT, MIB, REFUSED
from tests.support.service import Service
from tests.support.tenant import PROGRAM, Tenant
from tests.support.wait import eventually

ROOM = 40 * MIB
SANDBOXED = f"{BUILD}/e2e/sandboxed {errno.EAFNOSUPPORT}"
KILLING = f"{BUILD}/e2e/sandboxed kill"
SIGSYS = 128 + 31  # as a shell's exit status


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


@pytest.mark.places("cgroups")
def test_a_sandbox_that_kills_at_a_socket_kills_a_program_with_the_shim_when_it_registers(
    service: Service, tenant: Callable[[int], Tenant]
) -> None:
    """The shim cannot ask the kernel what a filter does, and has no way to register without a new socket."""
    one = tenant(CONTEXT + ROOM)
    one.assert_holds(ROOM)
    (one.folder / "status").write_text('echo context | "$@"; echo status $?\n')
    assert one.run(f"sh status {KILLING} {PROGRAM}").endswith(f"status {SIGSYS}\n")
    assert one.run(f"sh status env -u LD_PRELOAD {KILLING} {PROGRAM}").endswith("status 0\n")
    client = one.client()
    client.ok("context")
    client.ok("forbid")
    client.ok(f"alloc {ROOM}")  # it is registered, and needs no socket
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    service.kill_gatekeeper()

    def killed() -> bool:
        try:
            client.do(f"alloc {2 * MIB}")
        except AssertionError:
            return True
        return False

    eventually(killed, 20, "another registration")
    client.close()
    one.assert_holds(ROOM)
