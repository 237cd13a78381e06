"""Programs that the shim cannot get into: charged like others, and named with the reason."""

from __future__ import annotations

import json

import pytest
from harness import CONTEXT, MIB, SHIM, SIM, Client, Container, Tenant, eventually, fgpu, metrics
from test_private_copies import outside


def assert_named(tenant: Tenant, client: Client, reason: str) -> None:
    """Metrics, doctor, ps and explain say it; its bytes are the tenant's."""
    client.ok(f"alloc {100 * MIB}")
    key = "fgpu_shimless_processes", frozenset({("tenant", tenant.name), ("reason", reason)})
    eventually(lambda: metrics().get(key) == 1, 3, "its reason")
    checks = {check["name"]: check for check in json.loads(fgpu("doctor", "--json", check=False).stdout)}
    assert not checks["shim"]["ok"]
    assert checks["shim"]["found"] == f"{tenant.name} ({reason})"
    assert checks["shim"]["mend"].startswith(f"{reason}: ")
    assert f"no_admission ({reason})" in " ".join(fgpu("ps").stdout.split())
    assert f"without the shim: pid {client.pid} ({reason})" in fgpu("explain", tenant.path).stdout
    assert tenant.assert_exact() == CONTEXT + 100 * MIB
    client.kill()
    client.close()
    eventually(lambda: key not in metrics(), 3, "its end")


@pytest.mark.places("runc")
def test_each_reason_is_named(place: Container, tenant) -> None:
    one = tenant(CONTEXT + 400 * MIB)
    one.assert_enforced()
    assert_named(one, outside(one, "outside", SIM / "lib"), "not_mounted")
    (place.work / "ld.so.preload").write_text("/nowhere/libfgpu.so\n")
    assert_named(one, one.client(), "not_loaded")
    (place.work / "ld.so.preload").write_text(f"{SHIM}\n")
    one.client().ok(f"alloc {100 * MIB}")
    assert not [name for name, _ in metrics() if name == "fgpu_shimless_processes"]
