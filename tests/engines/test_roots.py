"""Any image reads its share and its limit: three engines, and in a full run nine C libraries.

Other runs take the oldest release that a mirror has whole, and the oldest for which there is numba.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import roots_kit
from tests.support import roots
from tests.support.containers import engines as kit
from tests.support.host import CONTEXT, GIB, MIB
from tests.support.service import Service
from tests.support.tenant import Tenant

SHARES = {"1.5gib": 1536 * MIB, "2gib": 2 * GIB, "4gib": 4 * GIB, "8gib": 8 * GIB, "12gib": 12 * GIB}
ALL = os.environ.get("FGPU_TEST_SCALE") == "full"
RELEASES = roots.RELEASES if ALL else roots.FEW
# The shares that each engine tries, except in runs that try all of them.
ENGINES = {"runc": ("1.5gib",), "crun": ("4gib",), "podman": ("12gib",)}
OUT_OF_MEMORY = 2


@pytest.fixture(scope="module")
def driver(service: Service) -> Iterator[Service]:
    """Run the agent on a host whose driver all of these roots can load."""
    before = service.config.read_text()
    service.kill_agent()
    service.config.write_text(f"{before}shares: [{', '.join(SHARES)}]\n")
    service.start_agent(None, "--driver-root", str(roots.driver()))
    yield service
    service.kill_agent()
    service.config.write_text(before)
    service.start_agent()


@pytest.fixture(scope="module")
def podman(driver: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Podman]:
    """Run Podman in a separate mount namespace."""
    work = tmp_path_factory.mktemp("podman")
    cave = kit.Cave(work, driver.cdi)
    try:
        found = kit.Podman(cave, work)
        yield found
        found.close()
    finally:
        cave.close()


@pytest.fixture(params=RELEASES, ids=lambda release: f"glibc-{release.glibc}")
def release(request: pytest.FixtureRequest) -> roots.Release:
    return request.param


@pytest.fixture(params=ENGINES)
def runtime(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def containers(
    request: pytest.FixtureRequest, runtime: str, release: roots.Release, driver: Service, unharmed: None,
    tmp_path: Path,
) -> Iterator[roots_kit.Images | roots_kit.Pods]:  # fmt: skip
    """Return containers of that root, by that engine."""
    podman = request.getfixturevalue("podman") if runtime == "podman" else None
    with roots_kit.layered(release, tmp_path, podman.cave.prefix if podman else ()) as root:
        place = roots_kit.Pods(tmp_path, podman) if podman else roots_kit.Images(tmp_path, runtime)
        place.root = root
        if isinstance(place, roots_kit.Images):
            place.spec = json.loads((driver.cdi / "fgpu.dev-share.json").read_text())
        yield place
        place.close()


def shown_in(tenant: Tenant, limit: int) -> dict[str, Any]:
    """Return the figures that programs in the container read."""
    shutil.copy(Path(__file__).with_name("seed_checks.py"), tenant.folder)
    said = tenant.run(f"python3 seed_checks.py {limit - CONTEXT}", 60)
    assert said, (tenant.folder / "p1.err").read_text()
    return json.loads(said)


def test_seed_checks_show_the_limit_in_every_image(
    containers: roots_kit.Images | roots_kit.Pods, release: roots.Release, runtime: str
) -> None:
    """All checks show the limit, which holds to the byte, in a separate pid namespace."""
    for device in SHARES if ALL else ENGINES[runtime]:
        limit, containers.device = SHARES[device], device
        tenant = containers.tenant(None)
        tenant.assert_enforced()
        said = shown_in(tenant, limit)
        if release.wheels:
            assert said.pop("numba") == [limit - CONTEXT, limit]
        assert said.pop("pids") != os.readlink("/proc/self/ns/pid")
        free = limit - CONTEXT
        assert said == {
            "glibc": release.glibc, "smi": [0, limit // MIB], "runtime": [free, limit],
            "took": [0, OUT_OF_MEMORY],
        }  # fmt: skip
        seen = tenant.memory()
        assert seen["admitted_bytes"] == seen["witnessed_bytes"] == free, seen
        tenant.end()
        containers.tenants.remove(tenant)
