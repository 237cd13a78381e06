"""Containers with systemd as process 1, and with a root of this distribution: what all engines have in common.

The module reads the lines of docs/system-containers.md, for which the page names a file. LXC and systemd-nspawn are
unpacked into build/engines/inits once and never installed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.support import debian, fresh_host, host
from tests.support.containers import engines as kit
from tests.support.host import BUILD, ROOT, SHIM
from tests.support.place import HUB, PRIVATE_MOUNTS, Place
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

PAGE = (ROOT / "docs/system-containers.md").read_text()
PACKAGES = ("lxc", "libsystemd-shared", "systemd-container")
SIM = Path("/mnt")  # where the container gets the simulated driver's folder, which is below /run
# The first mounts that folder at its usual path, once systemd has mounted its own /run. The second starts programs.
UNITS = {
    "run-fgpu\\x2dsim.mount": f"[Mount]\nWhat={SIM}\nWhere=/run/fgpu-sim\nOptions=bind\n",
    "hub.service": """
[Unit]
Requires=run-fgpu\\x2dsim.mount
After=run-fgpu\\x2dsim.mount
[Service]
ExecStart=/bin/sh /hub
WorkingDirectory={folder}
StandardInput=file:{folder}/hub.in
Environment={environment}
""",
}
WANTED = "etc/systemd/system/multi-user.target.wants"
_numbers = itertools.count()


def block(title: str) -> str:
    """Return the lines of the page for the file of that path, with the shim of the build instead of a published one."""
    (found,) = re.findall(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```', PAGE, re.M | re.S)
    return str(found).replace("var/lib/fgpu/shim/current/libfgpu.so", str(SHIM).lstrip("/"))


def binds(folder: Path) -> list[tuple[Path, Path, str]]:
    """Return the mounts of a container that its programs need, besides those of fgpu: source, target and mode."""
    return [(BUILD, BUILD, "ro"), (Path("/run/fgpu-sim"), SIM, "rw"), (folder, folder, "rw")]


def unpacked() -> Path:
    """Return a root with the programs of LXC and systemd-nspawn."""
    return debian.unpacked(kit.ENGINES / "inits", PACKAGES)


class System(Tenant):
    """A container with an init, which has cgroups of its own in the container's cgroup."""

    def client(self, *words: Any, **more: Any) -> Client:
        """See Tenant. The container may have a user namespace, and needs the pipes of the program."""
        before = os.umask(0)
        try:
            return super().client(*words, **more)
        finally:
            os.umask(before)

    def pids(self) -> list[int]:
        """Return the host pids of all processes in the cgroup and below it."""
        found = []
        for folder, _, _ in os.walk(self.cgroup):
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in Path(folder, "cgroup.procs").read_text().split()]
        return found


class Inits(Place):
    """Containers in which systemd has started. A unit in each of them starts the tenant's programs."""

    hides_run = True  # whether the init hides what the engine has mounted below /run

    def __init__(self, work: Path, spec: dict[str, Any]) -> None:
        """Create the place. `spec` is the CDI specification of shares."""
        super().__init__(work)
        self.spec = spec
        self._roots: list[Path] = []

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        assert memory is None, "a share or a policy has the limit"
        folder.chmod(0o777)
        hub = self._writer(folder)
        try:
            self._begin(name, folder, self._root(name, folder))
            tenant = System(self, name, self.path(name), folder, hub)
        except BaseException:
            hub.kill()
            raise
        try:
            self._await(name)
        except BaseException:
            self.end(tenant)
            raise
        return tenant

    @staticmethod
    def _writer(folder: Path) -> subprocess.Popen[bytes]:
        """Return a process that passes its input on to a hub in the container, which reads a pipe in the folder."""
        os.mkfifo(folder / "hub.in")
        (folder / "hub.in").chmod(0o666)
        return subprocess.Popen(["sh", "-c", 'exec cat >"$0"', folder / "hub.in"], stdin=subprocess.PIPE)

    def assert_enforced(self, tenant: Tenant) -> None:
        """Check that a limit is enforced. A policy's limit gets in force with the first program that uses a device."""
        client = tenant.client()
        tenant.name = tenant.view()["tenant"]
        tenant.assert_enforced()
        client.kill()
        client.close()

    def entered(self, tenant: Tenant) -> Tenant:
        """Return the same container, with programs that a command from outside starts."""
        folder = tenant.folder / "entered"
        folder.mkdir()
        folder.chmod(0o777)
        words = ["env", "-i", *self._environment(), "sh", "-c", f"cd {folder}; . /hub"]
        hub = self._outside(tenant.folder.name, folder, words)
        self.tenants.insert(0, System(self, tenant.name, tenant.path, folder, hub))
        return self.tenants[0]

    def _outside(self, name: str, folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
        """Start a hub in the container by a command from outside."""
        return subprocess.Popen(self._enter(name, *words), stdin=subprocess.PIPE, env=self._programs())

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, by the engine's own command."""
        command = self._enter(name, *words)
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=self._programs(),
            stdin=subprocess.DEVNULL,
        )

    def _await(self, name: str) -> None:
        said = ""

        def up() -> bool:
            nonlocal said
            done = self.run(name, "systemctl", "is-system-running")
            said = done.stdout + done.stderr
            return done.stdout.strip() in ("running", "degraded")

        try:
            eventually(up, 30, "systemd")
        except AssertionError as error:
            raise AssertionError(f"{said}{self._log(name).read_text(errors='replace')}") from error

    def _root(self, name: str, folder: Path) -> Path:
        """Return a copy of the distribution's root with the units."""
        root = fresh_host.ROOTS / f".init-{os.getpid()}-{next(_numbers)}"
        self._roots.append(root)
        subprocess.run(["cp", "--archive", "--reflink=auto", fresh_host.fresh_root(), root], check=True, timeout=60)
        (root / "hub").write_text(HUB)
        for unit, text in UNITS.items():
            known = {"folder": folder, "environment": " ".join(self._environment())}
            (root / "etc/systemd/system" / unit).write_text(text.format(**known))
        (root / WANTED / "hub.service").symlink_to("/etc/systemd/system/hub.service")
        for place in (BUILD, folder):
            (root / str(place).lstrip("/")).mkdir(parents=True)
        return root

    @staticmethod
    def _environment() -> list[str]:
        return [f"{key}={value}" for key, value in host.ENVIRONMENT.items()]

    def _programs(self) -> dict[str, str]:
        """Return the environment of the engine."""
        packages = unpacked()
        folders = [packages / folder for folder in ("usr/bin", "usr/sbin", "bin", "sbin")]
        found = [path for path in packages.glob("**/*-linux-gnu") if path.is_dir()]
        libraries = [*found, *(path / "systemd" for path in found)]
        usual = "/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "PATH": ":".join([*map(str, folders), usual]),
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "XDG_RUNTIME_DIR": str(self.work),
            "HOME": str(self.work),
        }

    def _private(self, *words: str | Path) -> list[str | Path]:
        return ["unshare", "-m", "sh", "-c", PRIVATE_MOUNTS, "sh", *words]

    def _call(self, name: str, *words: str | Path) -> None:
        with open(self._log(name), "ab") as log:
            command = self._private(*words)
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60, check=False, env=self._programs()
            )
        assert done.returncode == 0, f"{words}: {self._log(name).read_text(errors='replace')}"

    def _log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def path(self, name: str) -> str:
        """Return the path of the container's cgroup."""
        raise NotImplementedError

    def _begin(self, name: str, folder: Path, root: Path) -> None:
        raise NotImplementedError

    def _enter(self, name: str, *words: str | Path) -> list[str | Path]:
        """Return a command that runs a program in the container."""
        raise NotImplementedError

    def _end(self, name: str) -> None:
        raise NotImplementedError

    def end(self, tenant: Tenant) -> None:
        """End the container, and remove its cgroups."""
        if tenant.folder.name == "entered":
            tenant.hub.kill()
            tenant.hub.wait(10)
            return
        self._end(tenant.folder.name)
        tenant.hub.kill()
        tenant.hub.wait(10)
        eventually(lambda: not tenant.pids(), 20, f"the end of {tenant.name}")
        for folder, _, _ in os.walk(tenant.cgroup, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def close(self) -> None:
        """End every container, and remove their roots."""
        super().close()
        for root in self._roots:
            shutil.rmtree(root)
            root.with_name(f".#{root.name}.lck").unlink(missing_ok=True)  # of systemd-nspawn
