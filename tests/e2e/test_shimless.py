"""Programs that the shim cannot be loaded into: they are charged like others, and named with the reason."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import fgpu, metrics
from tests.support.host import CONTEXT, MIB, SHIM, SIM
from tests.support.outside import outside
from tests.support.place import Container
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually


def assert_named(tenant: Tenant, clients: list[Client], reason: str) -> None:
    """Check that metrics, doctor, ps and explain show the reason, and that the tenant is charged."""
    for client in clients:
        client.ok("context")
    first = min(clients, key=lambda client: client.pid)
    first.ok(f"alloc {100 * MIB}")
    key = "fgpu_shimless_processes", frozenset({("tenant", tenant.name), ("reason", reason)})
    eventually(lambda: metrics().get(key) == len(clients), 3, "the reason of each process")
    checks = {check["name"]: check for check in json.loads(fgpu("doctor", "--json", check=False).stdout)}
    assert not checks["shim"]["ok"]
    assert checks["shim"]["found"] == f"{tenant.name} ({reason})"
    assert checks["shim"]["fix"].startswith(f"{reason}: ")
    assert " ".join(fgpu("ps").stdout.split()).count(f"no_admission ({reason})") == len(clients)
    assert f"without the shim: pid {first.pid} ({reason})" in fgpu("explain", tenant.path).stdout
    assert tenant.assert_exact() == len(clients) * CONTEXT + 100 * MIB
    for client in clients:
        client.kill()
        client.close()
    eventually(lambda: key not in metrics(), 3, "no shimless process in the metrics")


@pytest.mark.places("runc")
def test_every_output_names_the_reason_for_a_missing_shim(place: Container, tenant, scale) -> None:
    one, times = tenant(CONTEXT + 400 * MIB), scale(1, 10, 25)
    one.assert_enforced()
    assert_named(one, [outside(one, f"outside{n}", SIM / "lib") for n in range(times)], "not_mounted")
    (place.work / "ld.so.preload").write_text("/nowhere/libfgpu.so\n")
    assert_named(one, [one.client() for _ in range(times)], "not_loaded")
    (place.work / "ld.so.preload").write_text(f"{SHIM}\n")
    one.client().ok(f"alloc {100 * MIB}")
    assert not [name for name, _ in metrics() if name == "fgpu_shimless_processes"]
