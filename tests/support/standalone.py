"""Containers of one image that has the shim and a limit, on a host without an agent.

The module creates the image's root, and a copy of it for each container. Imports nothing of fgpu.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.host import GIB, KINDS, MIB
from tests.support.place import LISTS, Container
from tests.support.sim_driver import driver_books
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

LIMIT = 4 * GIB
CONTEXT = 512 * MIB  # bytes that the ledger charges for a context
TOGETHER = "fgpu: no agent: this container's programs share the image's limit"
BY_ITSELF = "fgpu: no agent, no shared file in /run/fgpu: each process has the image's whole limit"


class Images(Container):
    """Containers of runc or crun. Attributes that are set here apply to the next container."""

    def __init__(self, work: Path, runtime: str) -> None:
        super().__init__(work, runtime)
        self.shared: set[str] = set()  # namespaces that the container shares with the host
        self.read_only = False
        self.run_is_tmpfs = False
        self.root: Path | None = None  # of another container, which was started earlier

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        super()._bundle(bundle, name, folder)
        root = bundle / "rootfs"
        (root / "etc/fgpu").mkdir()
        (root / "etc/fgpu/limit").write_text(f"{LIMIT >> 20}MiB\n")
        shutil.copy(self.work / "ld.so.preload", root / "etc/ld.so.preload")
        (root / "run").mkdir()
        path = bundle / "config.json"
        spec = json.loads(path.read_text())
        spec["root"] = {"path": str(self.root or root), "readonly": self.read_only}
        ours = {"/run/fgpu/shim", *LISTS}
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] not in ours]
        if self.run_is_tmpfs:
            tmpfs = {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
            first = next(i for i, m in enumerate(spec["mounts"]) if m["destination"].startswith("/run"))
            spec["mounts"].insert(first, tmpfs)
        spaces = spec["linux"]["namespaces"]
        spec["linux"]["namespaces"] = [space for space in spaces if space["type"] not in self.shared]
        if "pid" in self.shared:  # a new procfs shows only a namespace that the runtime itself is in
            proc = next(mount for mount in spec["mounts"] if mount["destination"] == "/proc")
            proc.update(type="bind", source="/proc", options=["rbind", "nosuid"])
        if "ipc" in self.shared:
            spec["mounts"] = [m for m in spec["mounts"] if m["destination"] != "/dev/mqueue"]
        path.write_text(json.dumps(spec))

    def rootfs(self, tenant: Tenant) -> Path:
        """Return the root that a container was made with."""
        return self.work / f"{tenant.name}.bundle/rootfs"


def assert_live(tenant: Tenant, limit: int = LIMIT) -> Client:
    """Check that the shim is in use and a program reads the image's limit. Return the program."""
    client = tenant.client()
    free, total = client.ok("info")
    assert total == limit
    assert free <= limit - CONTEXT
    return client


def used(client: Client) -> int:
    """Return the container's charge in the ledger."""
    free, total = client.ok("info")
    return total - free


def held(tenant: Tenant) -> int:
    """Return the bytes that the driver holds for the container's processes, with contexts as in the ledger."""
    pids, sum_ = set(tenant.pids()), 0
    for entry in driver_books():
        if entry["pid"] in pids:
            sum_ += sum(entry[f"{kind}_bytes"] for kind in KINDS if kind != "context")
            sum_ += entry["contexts"] * CONTEXT
    return sum_


def buried(client: Client) -> None:
    """Wait until a killed program has exited and the driver has freed its memory. Close the program's pipes."""
    eventually(lambda: client.pid not in client.tenant.pids(), 10, "the exit of the program")
    eventually(lambda: all(entry["pid"] != client.pid for entry in driver_books()), 10, "memory freed by the driver")
    client.close()


def said(tenant: Tenant) -> set[str]:
    """Return the stderr of all programs."""
    return {line for path in tenant.folder.glob("*.err") for line in path.read_text().splitlines()}
