"""Tests of `fgpu.dev/share=…`: a container becomes a tenant with that limit, or fails to start with the reason."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import host, loaders
from tests.support.commands import ask, fgpu
from tests.support.containers import engines as kit
from tests.support.host import CONTEXT, GIB, MIB, REFUSED, RUN_DIR, SHIM
from tests.support.service import Service
from tests.support.tenant import Client, Tenant

INFO = "/var/lib/fgpu/bin/fgpu-info"
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: engines}
spec:
  selector: {cgroup: "fgpu-e2e/*"}
  memory: {limit: 1GiB, max: 3GiB}
"""


@pytest.fixture(params=["runc", "crun"])
def bundles(request: pytest.FixtureRequest, service: Service, unharmed: None, tmp_path: Path) -> Iterator[kit.Bundles]:
    """Return containers that can request the devices of the agent's CDI specification of shares."""
    place = kit.Bundles(tmp_path, request.param)
    place.spec = json.loads((service.cdi / "fgpu.dev-share.json").read_text())
    yield place
    place.close()


@pytest.fixture
def policy(service: Service) -> Iterator[None]:
    """Give 1 GiB, and up to 3 GiB to containers that request it."""
    with kit.policy(service, "engines.yaml", POLICY):
        yield


def assert_held(tenant: Tenant, limit: int) -> None:
    """Check that the limit is enforced and holds to the byte by the driver's own figures."""
    client = tenant.client()
    with tenant.growing():
        assert tenant.memory()["limit_bytes"] == limit
        free, total = client.ok("info")
        assert (free, total) == (limit - CONTEXT, limit)
        client.ok(f"alloc {limit - CONTEXT}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert tenant.driver() == limit
    assert tenant.assert_exact() == limit


def test_a_share_is_the_limit_of_its_container(bundles: kit.Bundles) -> None:
    bundles.device = "2gib"
    assert_held(bundles.tenant(None), 2 * GIB)


def test_a_share_limits_a_device_and_its_time(bundles: kit.Bundles) -> None:
    bundles.device = "25pct-25pct"
    tenant = bundles.tenant(None)
    usable = ask(verb="snapshot")["devices"][0]["capacity_bytes"]
    limit = tenant.memory()["limit_bytes"]
    assert abs(limit - usable / 4) <= 512 * MIB, (limit, usable)
    assert_held(tenant, limit)
    said = json.loads(fgpu("explain", tenant.path, "--json").stdout)
    assert said["levels"][0]["by"] == "share"
    assert said["levels"][0]["compute"][0]["limit_ratio"] == 0.25


def test_a_policy_bounds_the_request_of_a_share(bundles: kit.Bundles, policy: None) -> None:
    for device, limit in (("2gib", 2 * GIB), ("8gib", 3 * GIB), ("", GIB)):
        bundles.device = device
        bundles.spec = bundles.spec if device else {}
        bundles.wrapped = not device
        tenant = bundles.tenant(None)
        assert_held(tenant, limit)
    lines = fgpu("explain", bundles.tenants[1].path).stdout
    assert "fgpu.dev/memory requests 8GiB of device 0, the policy allows 3GiB" in lines


@pytest.mark.parametrize("wrapped", [False, True], ids=["CDI", "fgpu-oci"])
def test_a_program_of_nix_is_limited_by_a_share(bundles: kit.Bundles, tmp_path: Path, wrapped: bool) -> None:
    """The program's loader is a copy of the host's that reads /etc/ld-nix.so.preload, like a loader that Nix built."""
    loader, client = Path("/", loaders.NIX_GLIBC), Path("/nix/store/client")
    loaders.client_of(loaders.of_nix(tmp_path / loaders.NIX_GLIBC), tmp_path / "nix/store/client", loaded_as=loader)
    bundles.mounts = [{"destination": "/nix", "type": "bind", "source": f"{tmp_path}/nix", "options": ["rbind", "ro"]}]
    bundles.device, bundles.wrapped = "" if wrapped else "2gib", wrapped
    tenant = bundles.tenant(2 * GIB if wrapped else None)
    tenant.assert_enforced()
    tenant.assert_holds(2 * GIB - CONTEXT, client)


def test_a_share_survives_an_agent_restart(bundles: kit.Bundles, service: Service) -> None:
    bundles.device = "2gib"
    tenant = bundles.tenant(None)
    service.kill_agent()
    service.start_agent()
    assert_held(tenant, 2 * GIB)
    assert tenant.view()["tenant"] == tenant.name


def assert_still(tenant: Tenant, client: Client, limit: int) -> None:
    """Check that a program at its limit gets no further byte, and can allocate memory again that it frees."""
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert client.ok("info")[1] == limit
    assert tenant.memory()["limit_bytes"] == limit
    client.ok("drop 1")
    client.ok(f"alloc {2 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert tenant.driver() == limit


def test_a_share_survives_set_compute_and_unset_and_agent_restarts(bundles: kit.Bundles, service: Service) -> None:
    bundles.device = "2gib"
    tenant = bundles.tenant(None)
    tenant.assert_enforced()
    client = tenant.client()
    client.ok("context")
    client.ok(f"fill {2 * MIB} 0", 120)
    assert_still(tenant, client, 2 * GIB)
    for command, ratio in ((("set", tenant.path, "--compute", "25%"), 0.25), (("unset", tenant.path), None)):
        fgpu(*command)
        assert_still(tenant, client, 2 * GIB)
        service.kill_agent()
        service.start_agent()
        assert_still(tenant, client, 2 * GIB)
        compute = tenant.memory()["compute"]
        assert (compute["limit_ratio"] if compute else None) == ratio
    assert tenant.view()["source"] == "share"


def test_fgpu_info_in_a_container_prints_the_share(bundles: kit.Bundles) -> None:
    bundles.device = "2gib"
    tenant = bundles.tenant(None)
    assert_held(tenant, 2 * GIB)
    said = tenant.run(INFO)
    assert ": limit 2048 MiB, used 2048 MiB, free 0 MiB\n  refused so far: 1\n" in said, said


def test_nothing_in_the_container_can_change_its_share(bundles: kit.Bundles) -> None:
    bundles.device = "2gib"
    tenant = bundles.tenant(None)
    paths = ["/etc/ld.so.preload", "/run/fgpu/shim/x", str(SHIM), INFO]
    script = tenant.folder / "try.sh"
    script.write_text("".join(f"(echo x >{path}) 2>&1\n" for path in paths) + "ls /run/fgpu\n")
    said = tenant.run(f"sh {script}").splitlines()
    assert [line.rsplit(": ", 1)[-1] for line in said[:4]] == ["Read-only file system"] * 4, said
    assert said[4:] == ["shim"], "the container has more than the folder of the shim's socket"
    client = tenant.client("env -i LD_LIBRARY_PATH=" + host.ENVIRONMENT["LD_LIBRARY_PATH"] + " FGPU_SHARE=12gib")
    assert client.ok("info") == [2 * GIB - CONTEXT, 2 * GIB]


# -- containers that must not start ----------------------------------------------------------------------------------


def refused(bundles: kit.Bundles) -> str:
    """Return the runtime's message about a container that must not start."""
    with pytest.raises(AssertionError) as caught:
        bundles.tenant(None)
    return str(caught.value)


def test_an_invalid_share_is_refused(bundles: kit.Bundles) -> None:
    bundles.device = "2gib"
    bundles.spec["devices"][0]["containerEdits"]["hooks"][0]["args"][-1] = "2gb"
    said = refused(bundles)
    assert "2gb" in said or bundles._runtime == "crun", said


def test_two_shares_are_refused(bundles: kit.Bundles) -> None:
    bundles.device = "2gib"
    two, four = (device["containerEdits"]["hooks"] for device in bundles.spec["devices"][:2])
    two += four
    said = refused(bundles)
    assert (
        "the container has fgpu.dev/share=2gib already: request a single share" in said or bundles._runtime == "crun"
    ), said


def test_a_share_without_an_agent_is_refused(bundles: kit.Bundles, service: Service) -> None:
    service.kill_agent()
    try:
        (RUN_DIR / "control.sock").unlink(missing_ok=True)
        bundles.device = "2gib"
        said = refused(bundles)
        assert "the container needs a limit, and no agent responds" in said or bundles._runtime == "crun", said
    finally:
        service.start_agent()


def test_a_hook_of_another_user_or_outside_a_container_changes_nothing(service: Service) -> None:
    """Every user may run the helper. The agent serves only root of the host, and only for containers."""
    state = json.dumps({"pid": os.getpid(), "id": "x"})
    call = [kit.HELPER, "share", "2gib"]
    unprivileged = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *call], input=state, capture_output=True, text=True, check=False
    )
    assert unprivileged.returncode == 1
    own = subprocess.run(call, input=state, capture_output=True, text=True, check=False)
    assert own.returncode == 1
    assert "the container has no cgroup (version 2) of its own" in own.stderr
    assert not [t for t in ask(verb="snapshot")["tenants"] if t["path"] == "/"]
