"""Every file that the agent keeps is damaged in every way before a start, and no limit changes.

Tenants at their limit get not a byte more or less, and containers that start afterwards get the same as before.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import world
from tests.e2e.held_kit import LIMIT, Held, filled
from tests.support.commands import metrics
from tests.support.containers.docker import DOCKERD, Docker
from tests.support.host import BUILD, MIB, RUN_DIR, SHIM, fill
from tests.support.place import Cgroups, Place
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

STATE = Path("/var/lib/fgpu")
STORE = STATE / "shim"
RUN_FILES = (
    *("overrides.json", "engines.json", "tenants.json", "elders.json", "xids.json", "gatekeeper.json"),
    *("spared.json", "driver-limits.json", "ld.so.preload", "ld-nix.so.preload", "agent.lock", "gatekeeper.lock"),
    *("control.sock", "discover.sock", "shim/shim.sock"),
)
STATE_FILES = ("policies.json", "contexts.json", "shim/previous", "shim/versions")
# Files that containers get when they start.
GIVEN_RUN_FILES = ("published", "containers", "container.preload", "cdi.files")
GIVEN_STATE_FILES = ("shim/current", "bin/fgpu-oci")
SHARE = f"{LIMIT // MIB}mib"
CDI_FILES = ("fgpu.dev-shim.json", "fgpu.dev-share.json")
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: {name}}}
spec:
  selector: {selector}
  memory: {{limit: {bytes}B}}
---
"""


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def with_an_unknown_key(found: object) -> object:
    if isinstance(found, dict):
        return {**{key: with_an_unknown_key(value) for key, value in found.items()}, "of a newer version": [1]}
    return [with_an_unknown_key(one) for one in found] if isinstance(found, list) else found


def gone(path: Path) -> None:
    remove(path)


def empty(path: Path) -> None:
    remove(path)
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    remove(path)
    path.write_bytes(bytes(range(256)))


def unknown_key(path: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        path.write_text(json.dumps(with_an_unknown_key(json.loads(path.read_text()))))


def folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def full(path: Path) -> None:
    """Fill the file system that has this file."""
    root = next(root for root in (RUN_DIR, STATE, path.parent) if path.is_relative_to(root))
    fill(root / "filler")


DAMAGES = (gone, empty, garbage, unknown_key, folder, full)


class Kept:
    """The state files as a running agent leaves them, and their file systems, which are small separate ones."""

    def __init__(self, service: Service, copies: Path) -> None:
        self._service, self._copies = service, copies
        published = STORE / hashlib.sha256(SHIM.read_bytes()).hexdigest()[:16] / SHIM.name
        self.roots = (RUN_DIR, STATE, service.cdi)
        self.given = [
            *(RUN_DIR / name for name in GIVEN_RUN_FILES),
            *(STATE / name for name in GIVEN_STATE_FILES),
            *(service.cdi / name for name in CDI_FILES),
            published,
        ]
        self.files = [*(RUN_DIR / name for name in RUN_FILES), *(STATE / name for name in STATE_FILES), *self.given]

    def start(self) -> None:
        self._service.start_agent(None, "--store", str(STORE))

    def save(self) -> None:
        for number, path in enumerate(self.files):
            if path.is_file() or path.is_symlink():
                shutil.copy2(path, self._copies / str(number), follow_symlinks=False)

    def restore(self) -> None:
        for root in self.roots:
            (root / "filler").unlink(missing_ok=True)
        for number, path in enumerate(self.files):
            if os.path.lexists(self._copies / str(number)):
                remove(path)
                path.parent.mkdir(exist_ok=True)
                shutil.copy2(self._copies / str(number), path, follow_symlinks=False)
            elif path.is_dir():
                remove(path)

    def start_after(self, damage: Callable[[Path], None], path: Path, how: int) -> None:
        self._service.kill_agent(how)
        self.restore()
        damage(path)
        self.start()

    def assert_given(self) -> None:
        """Check that containers get the same as when the files were saved."""
        for path in self.given:
            copy = self._copies / str(self.files.index(path))
            if path.is_symlink() or copy.is_symlink():
                assert os.readlink(path) == os.readlink(copy), path
            else:
                assert path.read_bytes() == copy.read_bytes(), path


@pytest.fixture
def kept(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Kept]:
    copies = tmp_path / "copies"
    copies.mkdir()
    if not os.path.ismount(RUN_DIR):
        pytest.skip(f"{RUN_DIR} is no file system of its own: ./dev test gives it one")
    service.kill_agent()
    shutil.copytree(STATE, tmp_path / "state", symlinks=True)
    for root in (STATE, service.cdi):
        root.mkdir(exist_ok=True)  # a detach of another test has removed it if it was empty
        subprocess.run(["mount", "-t", "tmpfs", "-o", world.SIZE, "tmpfs", root], check=True)
    shutil.copytree(tmp_path / "state", STATE, symlinks=True, dirs_exist_ok=True)
    config = service.config.read_text()
    service.config.write_text(f"{config}shares: [{SHARE}]\n")
    found = Kept(service, copies)
    found.start()
    yield found
    service.kill_agent()
    service.config.write_text(config)
    found.restore()
    for root in (STATE, service.cdi):
        subprocess.run(["umount", "--lazy", root], check=True)
    (RUN_DIR / "published").unlink()
    service.start_agent()


@pytest.fixture
def places(service: Service, kept: Kept, tmp_path: Path) -> Iterator[tuple[Cgroups, Place, Docker]]:
    """Yield the places of the tenants. Policies match cgroups that a test has not named, and a label."""
    (tmp_path / "docker").mkdir()
    cgroups, place, docker = Cgroups(tmp_path), Place(tmp_path), Docker(tmp_path / "docker", service.engine)
    selectors = {
        "state": f'{{cgroup: ["{cgroups.group.lstrip("/")}/e2e-*"]}}',
        "labels": '{cgroup: "docker/*", matchLabels: {tier: small}}',
    }
    file = service.policies / "state.yaml"
    file.write_text("".join(POLICY.format(name=n, selector=text, bytes=LIMIT) for n, text in selectors.items()))
    try:
        eventually(lambda: metrics()["fgpu_policies", frozenset()] == len(selectors), 5, "the policies")
        yield cgroups, place, docker
    finally:
        for one in (cgroups, place, docker):
            one.close()
        file.unlink()


@pytest.fixture
def tenants(places: tuple[Cgroups, Place, Docker]) -> dict[str, Held]:
    """Return tenants at their limits, by the source of the limit."""
    cgroups, place, docker = places
    made = {
        "policy": cgroups.tenant(None),
        "fgpu set": cgroups.tenant(LIMIT),
        "fgpu run": place.tenant(LIMIT),
        "label": docker.container({"tier": "small"}),
        "share": with_a_share(cgroups.named("share")),
    }
    for tenant in made.values():
        tenant.assert_enforced()
    return {name: filled(tenant) for name, tenant in made.items()}


def with_a_share(tenant: Tenant) -> Tenant:
    """Make the tenant request its limit by a share's name, with the hook that engines call at a container's start."""
    pid = eventually(tenant.pids, 5, "the tenant's first process")[0]
    hook = [BUILD / "oci/fgpu-oci", "share", SHARE]
    subprocess.run(hook, input=json.dumps({"pid": pid}), text=True, check=True, timeout=10)
    return tenant


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not DOCKERD, reason="no dockerd: ./dev test unpacks it")
def test_no_damage_to_a_state_file_changes_a_tenant_s_limit(
    kept: Kept, tenants: dict[str, Held], scale: Callable[..., int]
) -> None:
    """Damage every file in every way, and start an agent after SIGTERM and after SIGKILL.

    Outside the full run, each file gets every second damage, after one of the two signals.
    """
    for held in tenants.values():
        held.check()
    kept.save()
    for file, way in itertools.product(range(len(kept.files)), range(len(DAMAGES))):
        if (file + way) % scale(2, 2, 1):
            continue
        path, damage = kept.files[file], DAMAGES[way]
        for how in (signal.SIGTERM, signal.SIGKILL)[:: -1 if (file + way) // 2 % 2 else 1][: scale(1, 1, 2)]:
            cell = f"{path} {damage.__name__}, after {how.name}"
            try:
                kept.start_after(damage, path, how)
                kept.assert_given()
            except (AssertionError, OSError) as error:
                raise AssertionError(cell) from error
            for name, held in tenants.items():
                try:
                    held.check()
                except AssertionError as error:
                    raise AssertionError(f"{cell}: the tenant by {name}") from error
