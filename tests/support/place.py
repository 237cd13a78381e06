"""Places in which tenants run: `fgpu run`, plain cgroups, containers of runc and crun."""

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
from typing import Any

from tests.support import host
from tests.support.commands import ask, fgpu
from tests.support.host import BUILD, FGPU, ROOT, SHIM, cgroup_root
from tests.support.tenant import Tenant
from tests.support.wait import eventually, remove_cgroup

# Starts a program for every line "NAME COMMAND", with stdin from the pipe NAME.in, stdout to the pipe NAME.out and
# stderr to the file NAME.err.
HUB = 'while read -r name command; do (exec $command <"$name.in" >"$name.out" 2>"$name.err") & done; wait'


class Place:
    """A kind of tenant: `fgpu run` on the host, with or without a pid namespace."""

    group = "/fgpu"
    _numbers = itertools.count(1)

    def __init__(self, work: Path, *options: str) -> None:
        self.work, self._options = work, options
        self.tenants: list[Tenant] = []

    def tenant(self, memory: int | None) -> Tenant:
        """Return a new tenant with that limit in force before its first program starts.

        With None, it is a container without a limit.
        """
        name = f"e2e-{os.getpid()}-{next(self._numbers)}"
        folder = self.work / name
        folder.mkdir()
        tenant = self._make(name, folder, memory)
        self.tenants.append(tenant)
        return tenant

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        command = [*FGPU, "run", *self._options, "--name", name, "--memory", f"{memory}B", "--", "sh", "-c", HUB]
        hub = subprocess.Popen(command, stdin=subprocess.PIPE, env=host.ENVIRONMENT, cwd=folder)
        return Tenant(self, name, f"/fgpu/{name}", folder, hub)

    def end(self, tenant: Tenant) -> None:
        """Wait for the hub, and kill the processes that do not end with it, such as those of a failed test."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            tenant.hub.wait(5)
        for pid in tenant.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        tenant.hub.wait(30)
        eventually(tenant.has_left, 20, f"the end of {tenant.name}")
        with contextlib.suppress(FileNotFoundError):
            tenant.cgroup.rmdir()

    def close(self) -> None:
        """End every tenant."""
        for tenant in self.tenants:
            tenant.end()
        self.tenants.clear()

    def left(self) -> list[Path]:
        """Return the existing cgroups of tenants made here."""
        return [*(cgroup_root() / self.group.lstrip("/")).glob(f"e2e-{os.getpid()}-*")]


class Cgroups(Place):
    """Plain cgroups that are limited by `fgpu set`, below one that only this test uses."""

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.group = f"/fgpu-e2e-{os.getpid()}"

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        return self._tenant(f"{self.group}/{name}", folder, memory)

    def named(self, path: str) -> Tenant:
        """Return a tenant in the cgroup of that path below the place's own. No limit is set."""
        folder = self.work / path.replace("/", "-")
        folder.mkdir()
        self.tenants.append(self._tenant(f"{self.group}/{path}", folder, None))
        return self.tenants[-1]

    def _tenant(self, path: str, folder: Path, memory: int | None) -> Tenant:
        cgroup = cgroup_root() / path.lstrip("/")
        cgroup.mkdir(parents=True)
        if memory is not None:
            fgpu("set", path, "--memory", f"{memory}B")
        enter = ["sh", "-c", f'echo $$ >{cgroup}/cgroup.procs && exec sh -c "$0"', HUB]
        environment = {**host.ENVIRONMENT, "LD_PRELOAD": str(SHIM)}
        hub = subprocess.Popen(enter, stdin=subprocess.PIPE, env=environment, cwd=folder)
        return Tenant(self, os.path.basename(path), path, folder, hub)

    def close(self) -> None:
        """End every tenant, and remove the folder of their cgroups."""
        super().close()
        for folder, _, _ in os.walk(cgroup_root() / self.group.lstrip("/"), topdown=False):
            remove_cgroup(Path(folder))


LISTS = ("/etc/ld.so.preload", "/etc/ld-nix.so.preload")
# A container runtime uses version 2 of cgroups if that is mounted at /sys/fs/cgroup.
PRIVATE_MOUNTS = """
[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup
exec "$@"
"""


class Container(Place):
    """A container of runc or crun: pid, mount and cgroup namespaces, the host's folders as its root."""

    group = "/fgpu-e2e"

    def __init__(self, work: Path, runtime: str) -> None:
        super().__init__(work)
        self._runtime = runtime
        self._state = work / "state"
        self.mounts: list[dict[str, Any]] = []  # in addition to those of every container
        self.image: dict[str, Path] = {}  # files in its root: path -> the copied file
        self.devices: list[dict[str, Any]] = []  # rules for device nodes, in addition to the usual ones
        (work / "ld.so.preload").write_text(f"{SHIM}\n")

    def _command(self, *words: str | Path) -> list[str | Path]:
        return ["unshare", "-m", "sh", "-c", PRIVATE_MOUNTS, "sh", self._runtime, "--root", self._state, *words]

    def _call(self, *words: str | Path, check: bool = True) -> None:
        done = subprocess.run(self._command(*words), capture_output=True, text=True, timeout=30, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        bundle = self.work / f"{name}.bundle"
        self._bundle(bundle, name, folder)
        with open(self.work / f"{name}.log", "wb") as log:
            create = self._command("create", "--bundle", bundle, name)
            hub = subprocess.Popen(create, stdin=subprocess.PIPE, stdout=log, stderr=log)
        assert hub.wait(30) == 0, (self.work / f"{name}.log").read_text()
        path = f"{self.group}/{name}"
        tenant = Tenant(self, name, path, folder, hub)
        try:
            if memory is not None:
                fgpu("set", path, "--memory", f"{memory}B")
            self._call("start", name)
        except BaseException:
            self.end(tenant)
            raise
        return tenant

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        (bundle / "rootfs/etc").mkdir(parents=True)
        shutil.copy("/etc/ld.so.cache", bundle / "rootfs/etc/ld.so.cache")
        for path, source in self.image.items():
            shutil.copy(source, bundle / "rootfs" / path)
        for link in ("bin", "sbin", "lib", "lib64"):
            if Path("/", link).is_symlink():
                (bundle / "rootfs" / link).symlink_to(os.readlink(Path("/", link)))
        subprocess.run(["runc", "spec"], cwd=bundle, check=True, timeout=30)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"].update(
            terminal=False,
            args=["sh", "-c", HUB],
            cwd=str(folder),
            env=[f"{k}={v}" for k, v in host.ENVIRONMENT.items()],
        )
        spec["linux"]["cgroupsPath"] = f"{self.group}/{name}"
        spec["linux"]["resources"]["devices"] += self.devices
        if self._runtime == "crun":  # its device rules need CAP_SYS_RESOURCE, which a test machine may lack
            del spec["linux"]["resources"]
        spaces = spec["linux"]["namespaces"]
        if {"type": "cgroup"} not in spaces:
            spaces.append({"type": "cgroup"})
        spec["mounts"] += [_bind("/usr"), *(_bind(f"/{d}") for d in ("bin", "sbin", "lib", "lib64") if _is_folder(d))]
        spec["mounts"] += [_bind(BUILD), _bind(ROOT / ".venv"), _bind("/run/fgpu-sim"), _bind(folder, read_only=False)]
        # The mounts that fgpu needs, except the folder beside the shim.
        spec["mounts"] += [_bind(SHIM), _bind("/run/fgpu/shim")]
        spec["mounts"] += [_bind(self.work / "ld.so.preload", place) for place in LISTS]
        spec["mounts"] += self.mounts
        (bundle / "config.json").write_text(json.dumps(spec))

    def end(self, tenant: Tenant) -> None:
        """Delete the container."""
        self._call("delete", "--force", tenant.name)
        eventually(tenant.has_left, 20, f"the end of {tenant.name}")

    def close(self) -> None:
        """Delete all containers, the rest of their cgroups, and their folder unless other cgroups are in it."""
        names = [tenant.name for tenant in self.tenants]
        super().close()
        parent = cgroup_root() / self.group.lstrip("/")
        for folder in (*(parent / name for name in names), parent):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _is_folder(name: str) -> bool:
    return Path("/", name).is_dir() and not Path("/", name).is_symlink()


def _bind(source: str | Path, target: str | Path | None = None, read_only: bool = True) -> dict[str, Any]:
    options = ["rbind", "nosuid", "ro"] if read_only else ["rbind", "nosuid"]  # build/ has mounts of this world
    return {"source": str(source), "destination": str(target or source), "type": "bind", "options": options}


@contextlib.contextmanager
def group(place: Place, memory: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """Set a limit on the cgroup above all tenants of a place. Yield a function that returns its memory figures."""
    fgpu("set", place.group, "--memory", f"{memory}B")
    try:

        def look() -> dict[str, Any]:
            whole = next(t for t in ask(verb="snapshot")["tenants"] if t["path"] == place.group)
            assert whole["kind"] == "group"
            return whole["devices"][0]

        yield look
    finally:
        fgpu("unset", place.group)


def place_of(kind: str, work: Path) -> Place:
    """Return the place of a kind: host, pidns, cgroups, runc, crun."""
    if kind == "cgroups":
        return Cgroups(work)
    if kind in ("runc", "crun"):
        return Container(work, kind)
    return Place(work, "--pidns") if kind == "pidns" else Place(work)
