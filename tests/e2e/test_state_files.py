"""Every file that the agent keeps, damaged in every way before a start: tenants at their limit get not a byte more or
less.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import (
    RUN_DIR,
    Cgroups,
    Place,
    Service,
    eventually,
    fill,
    metrics,
)
from held_kit import LIMIT, Held, filled

STATE = Path("/var/lib/fgpu")
RUN_FILES = (
    *("overrides.json", "engines.json", "tenants.json", "elders.json", "xids.json", "gatekeeper.json"),
    *("ld.so.preload", "agent.lock", "gatekeeper.lock", "control.sock", "discover.sock", "shim/shim.sock"),
)
STATE_FILES = ("policies.json", "contexts.json")
FILES = [*(RUN_DIR / name for name in RUN_FILES), *(STATE / name for name in STATE_FILES)]
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: state}}
spec:
  selector: {{cgroup: ["{group}/*"]}}
  memory: {{limit: {bytes}B}}
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
    """Its file system has no byte left."""
    root = RUN_DIR if path.is_relative_to(RUN_DIR) else STATE
    fill(root / "filler")


DAMAGES = (gone, empty, garbage, unknown_key, folder, full)


class Kept:
    """The files as an agent that runs leaves them, and their file systems, small ones of their own."""

    def __init__(self, service: Service, copies: Path) -> None:
        self._service, self._copies = service, copies

    def save(self) -> None:
        for number, path in enumerate(FILES):
            if path.is_file():
                shutil.copy2(path, self._copies / str(number))

    def restore(self) -> None:
        for root in (RUN_DIR, STATE):
            (root / "filler").unlink(missing_ok=True)
        for number, path in enumerate(FILES):
            if (self._copies / str(number)).exists():
                remove(path)
                shutil.copy2(self._copies / str(number), path)
            elif path.is_dir():
                remove(path)

    def start_after(self, damage: Callable[[Path], None], path: Path, how: int) -> None:
        self._service.kill_agent(how)
        self.restore()
        damage(path)
        self._service.start_agent()


@pytest.fixture
def kept(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Kept]:
    copies = tmp_path / "copies"
    copies.mkdir()
    if not os.path.ismount(RUN_DIR):
        pytest.skip(f"{RUN_DIR} is no file system of its own: ./dev test gives it one")
    service.kill_agent()
    shutil.copytree(STATE, tmp_path / "state", symlinks=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", STATE], check=True)
    shutil.copytree(tmp_path / "state", STATE, symlinks=True, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,size=64M", RUN_DIR], check=True)
    service.start_agent()
    found = Kept(service, copies)
    yield found
    service.kill_agent()
    found.restore()
    subprocess.run(["mount", "-o", "remount,size=50%", RUN_DIR], check=True)
    subprocess.run(["umount", "--lazy", STATE], check=True)
    service.start_agent()


@pytest.fixture
def tenants(service: Service, kept: Kept, tmp_path: Path) -> Iterator[list[Held]]:
    """One by policy, one by `fgpu set`, one by `fgpu run`: all at their limit."""
    cgroups, place = Cgroups(tmp_path), Place(tmp_path)
    file = service.policies / "state.yaml"
    file.write_text(POLICY.format(group=cgroups.group.lstrip("/"), bytes=LIMIT))
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
    found = []
    for tenant in (cgroups.tenant(None), cgroups.tenant(LIMIT), place.tenant(LIMIT)):
        tenant.assert_enforced()
        found.append(filled(tenant))
    yield found
    for one in (cgroups, place):
        one.close()
    file.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_damage_to_a_file_changes_what_a_tenant_gets(
    kept: Kept, tenants: list[Held], scale: Callable[..., int]
) -> None:
    """Every file, damaged in every way, before a start after SIGTERM and after SIGKILL."""
    for held in tenants:
        held.check()
    kept.save()
    cells = list(itertools.product(FILES, DAMAGES))
    for number, (path, damage) in enumerate(cells):
        for how in (signal.SIGTERM, signal.SIGKILL)[:: -1 if number % 2 else 1][: scale(1, 1, 2)]:
            try:
                kept.start_after(damage, path, how)
                for held in tenants:
                    held.check()
            except AssertionError as error:
                raise AssertionError(f"{path} {damage.__name__}, after {how.name}") from error
