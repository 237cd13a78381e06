"""Nothing remains of removed containers, with their own libcuda or with the host's."""

from __future__ import annotations

import collections
import contextlib
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.commands import ask, metrics
from tests.support.host import CONTEXT, MIB, RUN_DIR, SIM
from tests.support.kernel import is_probed, keys
from tests.support.place import Container
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

LIVE = 4  # at one time
MORE = 5  # how many more descriptors a busy agent may have
OF_CGROUPS, OF_PROCESSES = ("pages", "resolved", "limits", "shares", "turns", "counters"), ("processes", "allocations")
OWN = f"env LD_LIBRARY_PATH=/.:{SIM}/lib"  # the start of a program with the image's libcuda
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: gone}
spec:
  selector: {cgroup: ["fgpu-e2e/*"]}
  memory: {limit: 600MiB}
"""


class Layered(Container):
    """Containers whose root is a separate mount, as engines create it."""

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        layers = [bundle / layer for layer in ("lower", "upper", "spare", "rootfs")]
        for layer in layers:
            layer.mkdir(parents=True)
        options = "lowerdir={},upperdir={},workdir={}".format(*layers)
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, layers[-1]], check=True, timeout=60)
        super()._bundle(bundle, name, folder)

    def root(self, tenant: Tenant) -> Path:
        """Return where a container's root is mounted."""
        return self.work / f"{tenant.name}.bundle/rootfs"


@pytest.fixture
def layered(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Layered]:
    """Return a place of containers with 600 MiB each."""
    (service.policies / "gone.yaml").write_text(POLICY)
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
    place = Layered(tmp_path, "runc")
    yield place
    place.close()
    subprocess.run(["umount", "--lazy", *tmp_path.glob("*.bundle/rootfs")], capture_output=True, check=False)
    (service.policies / "gone.yaml").unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


@dataclass(frozen=True, slots=True)
class Made:
    """Traces of the containers that were made: ids of cgroups, host pids, inodes of libcuda."""

    cgroups: set[int] = field(default_factory=set)
    pids: set[int] = field(default_factory=set)
    files: set[int] = field(default_factory=set)

    def left(self, place: Layered) -> list[str]:
        """Return the traces that still exist."""
        found = [name for name in OF_CGROUPS if self.cgroups & {struct.unpack_from("Q", key)[0] for key in keys(name)}]
        found += [name for name in OF_PROCESSES if self.pids & {struct.unpack_from("I", key)[0] for key in keys(name)}]
        found += ["threads"] if self.pids & {struct.unpack_from("II", key)[1] for key in keys("threads")} else []
        found += ["files"] if self.files & {struct.unpack_from("QQ", key)[1] for key in keys("files")} else []
        found += [tenant["path"] for tenant in ask(verb="snapshot")["tenants"] if tenant["cgroup"] in self.cgroups]
        found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(place.work) in line]
        return found


def started(place: Layered, made: Made, with_own: bool) -> Tenant:
    """Start a container with a program that holds memory."""
    place.image = {"libcuda.so.1": (SIM / "lib/libcuda.so.1").resolve()} if with_own else {}
    tenant = place.tenant(None)
    client: Client = tenant.client(before=OWN if with_own else "")
    client.ok(f"alloc {10 * MIB}")
    seen = tenant.memory()
    assert seen["admitted_bytes"] == seen["witnessed_bytes"] == 10 * MIB, seen  # the container works
    assert seen["used_bytes"] == CONTEXT + 10 * MIB
    made.cgroups.add(tenant.cgroup.stat().st_ino)
    made.pids.update(tenant.pids())
    if with_own:
        own = place.root(tenant) / "libcuda.so.1"
        assert is_probed(own)
        made.files.add(own.stat().st_ino)
    return tenant


def removed(place: Layered, tenant: Tenant) -> float:
    """Delete a container and unmount its root, as an engine does. Return the seconds until the unmount succeeded."""
    tenant.end()
    place.tenants.remove(tenant)
    root, begun = place.root(tenant), time.monotonic()
    eventually(lambda: not subprocess.run(["umount", root], capture_output=True, check=False).returncode, 20, "umount")
    return time.monotonic() - begun


def descriptors(service: Service) -> dict[str, int]:
    """Return the numbers of descriptors of agent and gatekeeper."""
    assert service.agent
    pids = {"agent": service.agent.pid, "gatekeeper": next(iter(service.gatekeepers()))}
    return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()}


def is_kept(path: Path) -> bool:
    """Return whether this is a file that no other file is about to be replaced by."""
    return path.is_file() and not (path.name.startswith(".") and path.name.endswith(".new"))


def written(service: Service) -> dict[Path, str]:
    """Return the files that the agent keeps about containers, and those that engines read."""
    paths = [path for folder in (RUN_DIR, service.cdi) for path in folder.rglob("*") if is_kept(path)]
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # renamed since, to the name of the file that it replaces
            found[path] = path.read_text(errors="replace")
    return found


@pytest.mark.timeout(3600)
def test_removed_containers_leave_no_trace(service: Service, layered: Layered, scale) -> None:
    made = Made()
    for with_own in (False, True):  # first run: creates everything that is created only once
        removed(layered, started(layered, made, with_own))
    eventually(lambda: not made.left(layered), 10, "no trace of the first containers")
    before, files = descriptors(service), written(service).keys()
    count, live, took = scale(4, 50, 500), collections.deque[Tenant](), []
    for number in range(count):
        live.append(started(layered, made, number % 10 > 0))
        if len(live) > LIVE:
            took.append(removed(layered, live.popleft()))
    assert set(OF_CGROUPS[:3]) < set(made.left(layered)), "left() does not find the traces of running containers"
    took += [removed(layered, tenant) for tenant in live]
    print(f"{count} containers: umount after {sorted(took)[count // 2]:.2f} s, at most {max(took):.2f} s")
    eventually(lambda: not made.left(layered), 10, "no trace of any container")
    assert written(service).keys() == files
    assert not [path for path, text in written(service).items() if f"{layered.group}/e2e-{os.getpid()}-" in text]

    def are_closed() -> bool:
        return all(number <= before[name] + MORE for name, number in descriptors(service).items())

    eventually(are_closed, 10, f"not more descriptors than {before}, and {MORE}: {descriptors(service)}")
