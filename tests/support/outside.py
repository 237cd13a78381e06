"""Programs in a tenant's cgroup without the shim."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.host import ENVIRONMENT
from tests.support.tenant import Client


def outside(tenant, name: str, libraries: Path) -> Client:
    """Start a CUDA program in the tenant's cgroup with these libraries and without the shim."""

    class Outside:
        """A stand-in for a tenant, with the attributes that a program needs."""

        def __init__(self) -> None:
            self.folder, self.name, self.cgroup = tenant.folder, name, tenant.cgroup

        def tell(self, line: str) -> None:
            name, command = line.split(" ", 1)
            enter = f'echo $$ >{self.cgroup}/cgroup.procs; exec {command} <"{name}.in" >"{name}.out" 2>"{name}.err"'
            environment = ENVIRONMENT | {"LD_LIBRARY_PATH": str(libraries)}
            subprocess.Popen(["sh", "-c", enter], cwd=self.folder, env=environment)

        def host_pid(self, inner: int) -> int:
            return inner

    return Client(Outside(), name)  # type: ignore[arg-type]
