"""Cgroups in one folder of the hierarchy's root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.host import ENVIRONMENT, SHIM, cgroup_root
from tests.support.place import HUB, Place
from tests.support.tenant import Tenant
from tests.support.wait import remove_cgroup


class CgroupFolder(Place):
    """Cgroups in a folder of that name. They are created directly, with the shim and without own limits."""

    def __init__(self, work: Path, name: str) -> None:
        super().__init__(work)
        self.root = cgroup_root() / name
        self.root.mkdir()

    def start(self, path: str) -> Tenant:
        """Start a hub in the cgroup with that path in the folder. Create the cgroup if it does not exist."""
        cgroup = self.root / path
        cgroup.mkdir(parents=True, exist_ok=True)
        folder = self.work / path.replace("/", "-")
        folder.mkdir()
        enter = ["sh", "-c", f'echo $$ >{cgroup}/cgroup.procs && exec sh -c "$0"', HUB]
        environment = {**ENVIRONMENT, "LD_PRELOAD": str(SHIM)}
        hub = subprocess.Popen(enter, stdin=subprocess.PIPE, env=environment, cwd=folder)
        self.tenants.append(Tenant(self, path, f"/{self.root.name}/{path}", folder, hub))
        return self.tenants[-1]

    def close(self) -> None:
        """End every program and remove every cgroup."""
        super().close()
        for folder, _, _ in os.walk(self.root, topdown=False):
            remove_cgroup(Path(folder))
