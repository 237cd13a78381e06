"""F28: no file in /run/fgpu can be written while a container exits, as if `/run` were full. Other containers that start
at that moment still get their limits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, fgpu
from tests.support.host import GIB, RUN_DIR, cgroup_root
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


def remount(how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,bind,{how}", RUN_DIR], check=True)


@pytest.fixture
def unwritable(service: Service, unharmed: None) -> Iterator[Callable[[str], None]]:
    """Yield a function.

    After a call with `ro`, no file in fgpu's folder under /run can be written until a call with `rw`.
    """
    subprocess.run(["mount", "--bind", RUN_DIR, RUN_DIR], check=True)
    yield remount
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
    """Return the limit in bytes on the first device, or None if the cgroup is no tenant."""
    found = [tenant for tenant in ask(verb="snapshot")["tenants"] if tenant["path"] == path]
    return int(found[0]["devices"][0]["limit_bytes"]) if found else None


def set_by_hand() -> set[str]:
    return {entry["path"] for entry in json.loads((RUN_DIR / "overrides.json").read_text())}


def test_a_container_that_starts_while_another_exits_has_its_limit_if_run_fgpu_is_read_only(
    service: Service, group: Path, unwritable: Callable[[str], None]
) -> None:
    assert service.agent
    ended, begun = (f"/{GROUP}/{name}" for name in ("ended", "begun"))
    (group / "ended").mkdir()
    fgpu("set", ended, "--memory", "1GiB")
    assert limit_of(ended) == GIB
    unwritable("ro")
    os.kill(service.agent.pid, signal.SIGSTOP)  # so that the agent handles both events in one iteration
    try:
        (group / "ended").rmdir()
        (group / "begun").mkdir()
    finally:
        os.kill(service.agent.pid, signal.SIGCONT)
    eventually(lambda: limit_of(begun) == 2 * GIB, 5, "the limit of the one that has begun")
    eventually(lambda: limit_of(ended) is None, 5, "the end of the other one")
    assert ended in set_by_hand(), "the file was to be unwritable"
    unwritable("rw")
    eventually(lambda: ended not in set_by_hand(), 5, "a file without the one that ended")
