"""F28: /run/fgpu is full or read-only while a container exits. Containers that start then still get their limits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.commands import ask, fgpu
from tests.support.host import GIB, RUN_DIR, cgroup_root, fill
from tests.support.service import Service
from tests.support.wait import eventually

GROUP = f"fgpu-full-run-{os.getpid()}"
POLICY = f"""
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: full-run}}
spec:
  selector: {{cgroup: ["{GROUP}/*"]}}
  memory: {{limit: 2GiB}}
"""


@contextlib.contextmanager
def full() -> Iterator[None]:
    """Fill the file system of fgpu's folder under /run to the last byte."""
    assert os.stat(RUN_DIR).st_dev != os.stat("/run").st_dev, f"{RUN_DIR} is no file system of this world's own"
    filler = RUN_DIR / "filler"
    try:
        fill(filler)
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only() -> Iterator[None]:
    """Make fgpu's folder under /run read-only."""
    subprocess.run(["mount", "-o", "remount,bind,ro", RUN_DIR], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,bind,rw", RUN_DIR], check=True)


@pytest.fixture
def mounted(service: Service, unharmed: None) -> Iterator[None]:
    """Make fgpu's folder under /run a mount, which can be made read-only."""
    subprocess.run(["mount", "--bind", RUN_DIR, RUN_DIR], check=True)
    yield
    subprocess.run(["umount", "--lazy", RUN_DIR], check=True)


@pytest.fixture
def group(service: Service, unharmed: None) -> Iterator[Path]:
    """Return a cgroup whose children have a policy."""
    file = service.policies / "full-run.yaml"
    file.write_text(POLICY)
    assert fgpu("reload").returncode == 0
    group = cgroup_root() / GROUP
    group.mkdir()
    yield group
    for child in [*group.iterdir()]:
        if child.is_dir():
            child.rmdir()
    group.rmdir()
    file.unlink()
    fgpu("reload")


def limit_of(path: str) -> int | None:
    """Return the limit in bytes on the first device, or None if the cgroup is not a tenant."""
    found = [tenant for tenant in ask(verb="snapshot")["tenants"] if tenant["path"] == path]
    return int(found[0]["devices"][0]["limit_bytes"]) if found else None


def set_by_hand() -> set[str]:
    return {entry["path"] for entry in json.loads((RUN_DIR / "overrides.json").read_text())}


@pytest.mark.parametrize("unwritable", [full, read_only])
def test_a_container_that_starts_while_another_exits_has_its_limit_if_run_fgpu_is_unwritable(
    service: Service, group: Path, mounted: None, unwritable: Callable[[], AbstractContextManager[None]]
) -> None:
    assert service.agent
    ended, begun = (f"/{GROUP}/{name}" for name in ("ended", "begun"))
    (group / "ended").mkdir()
    fgpu("set", ended, "--memory", "1GiB")
    assert limit_of(ended) == GIB
    with unwritable():
        os.kill(service.agent.pid, signal.SIGSTOP)  # so that the agent handles both events in one iteration
        try:
            (group / "ended").rmdir()
            (group / "begun").mkdir()
        finally:
            os.kill(service.agent.pid, signal.SIGCONT)
        eventually(lambda: limit_of(begun) == 2 * GIB, 5, "the limit of the container that has begun")
        eventually(lambda: limit_of(ended) is None, 5, "the removal of the container that has ended")
        assert ended in set_by_hand(), "overrides.json was written although its file system is unwritable"
    eventually(lambda: ended not in set_by_hand(), 5, "overrides.json without the container that has ended")
