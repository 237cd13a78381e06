"""Limits of containers whose init or entry point mounts over /run, with engines of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import engines as kit
from tests.support.host import CONTEXT, GIB, MIB, REFUSED
from tests.support.service import Service
from tests.support.wait import eventually

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: hidden}}
spec:
  selector: {{cgroup: ["{group}/*"]}}
  memory: {{limit: 1GiB}}
"""
TMPFS = {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}
SIMULATOR = {"destination": "/run/fgpu-sim", "type": "bind", "source": "/run/fgpu-sim", "options": ["rbind", "ro"]}
MOUNT = "/bin/mount"
# The mounts of an init. The simulated driver is under /run too.
OVER_RUN = """set -e
mount -o bind,X-mount.mkdir /run/fgpu-sim /sim
mount -t tmpfs tmpfs /run
mount -o bind,X-mount.mkdir /sim /run/fgpu-sim
"""


class Hiding(kit.Bundles):
    """Containers in which a file system is mounted over /run after all mounts of the engine."""

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        super()._bundle(bundle, name, folder)
        path = bundle / "config.json"
        config = json.loads(path.read_text())
        config["mounts"] += [TMPFS, SIMULATOR]
        path.write_text(json.dumps(config))


@pytest.fixture(params=["runc", "crun"])
def bundles(request: pytest.FixtureRequest, service: Service, unharmed: None, tmp_path: Path) -> Iterator[Hiding]:
    """Return containers that request devices."""
    place = Hiding(tmp_path, request.param)
    place.spec = json.loads((service.cdi / "fgpu.dev-share.json").read_text())
    yield place
    place.close()


def test_a_share_is_in_force_if_run_is_hidden(bundles: Hiding) -> None:
    bundles.device = "2gib"
    tenant = bundles.tenant(None)
    client = tenant.client()
    assert client.ok("info") == [2 * GIB - CONTEXT, 2 * GIB]
    client.ok(f"alloc {2 * GIB - CONTEXT}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert tenant.assert_exact() == 2 * GIB


@pytest.fixture
def set_up(engine: kit.Engine, service: Service, unharmed: None) -> Iterator[kit.Engine]:
    """Return an engine after `fgpu setup`, with a limit for its containers."""
    with kit.policy(service, "00-hidden.yaml", POLICY.format(group=engine.group)):
        engine.setup()
        engine.apply()
        yield engine
        engine.setup("--undo")
        engine.apply()


def test_a_limit_is_in_force_with_the_engine_s_own_mount_at_run(set_up: kit.Engine) -> None:
    with set_up.filled("held", "--tmpfs", "/run") as admitted:
        assert admitted == GIB - CONTEXT


def test_a_limit_is_in_force_after_an_entry_point_mounts_over_run(set_up: kit.Engine) -> None:
    options = ["--cap-add", "SYS_ADMIN", "--security-opt", "apparmor=unconfined"]
    for path in (MOUNT, *kit.libraries(MOUNT)):
        options += ["--volume", f"{path}:{path}:ro"]
    try:
        done = set_up.run("held", *options, command=OVER_RUN + kit.FILL)
        assert done.returncode == 0, done.stderr
        found = eventually(lambda: kit.ANSWER.search(set_up.call("logs", "held").stdout), 30, "its memory")
        assert int(found[1]) == GIB - CONTEXT
    finally:
        set_up.remove("held")
