"""A separate Docker for long runs: containers that request a share and allocate all of it, and a daemon that restarts.

The engine has its own mount namespace and daemon, and at most MOST containers. If one of these does not start,
AssertionError is raised with Docker's output. The module imports nothing of fgpu.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from tests.support.commands import ask
from tests.support.containers import engines as kit
from tests.support.host import GIB
from tests.support.service import Service

MOST = 3
SHARE_BYTES, SHARE = 2 * GIB, "fgpu.dev/share=2gib"


class Engine:
    """A Docker daemon with CDI. Its socket is at the path that the agent uses."""

    def __init__(self, service: Service, work: Path) -> None:
        """Start the daemon. `work`: the folder of the service, for Docker's socket."""
        self.names: list[str] = []
        self._number = 0
        with contextlib.ExitStack() as closing:
            cave = kit.Cave(work, service.cdi)
            closing.callback(cave.close)
            self._docker = kit.NewerDocker(cave, work)
            closing.callback(self._docker.close)
            assert service.engine == work / "docker.sock"
            self._docker.load(kit.make_root(work / "image"), "plain")
            self._closing = closing.pop_all()

    def start(self) -> None:
        """Start another container. If there are MOST, remove the oldest first. Raises AssertionError if it fails."""
        if len(self.names) >= MOST:
            self._docker.remove(self.names.pop(0))
        self._number += 1
        name = f"soak-{self._number}"
        self.names.append(name)
        done = self._docker.run(name, "--device", SHARE, command=f"{kit.HOLD} 3600")
        assert done.returncode == 0, done.stderr

    def restart(self, is_killed: bool) -> None:
        """Stop the daemon with SIGTERM or SIGKILL, start it again, and remove its containers."""
        self._docker.end(is_killed)
        self._docker.begin()
        self._remove_all()

    def wrong(self) -> list[str]:
        """Return the containers that the agent does not show with their names and with exactly their limit in use."""
        shown = {tenant["tenant"]: tenant for tenant in ask(verb="snapshot")["tenants"]}
        return [name for name in self.names if not _is_held(shown.get(name))]

    def close(self) -> None:
        """Remove the containers and stop the daemon."""
        self._remove_all()
        self._closing.close()

    def _remove_all(self) -> None:
        while self.names:
            self._docker.remove(self.names.pop())


def _is_held(tenant: dict[str, Any] | None) -> bool:
    if tenant is None:
        return False
    (device,) = tenant["devices"]
    return bool(device["limit_bytes"] == device["used_bytes"] == SHARE_BYTES)
