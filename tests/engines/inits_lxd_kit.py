"""Containers with systemd as process 1, under LXD or Incus with a daemon of each place's own.

The packages are unpacked into build/engines once and never installed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.engines.inits_engines_kit import own_cgroup
from tests.engines.inits_kit import Inits, binds, block
from tests.support import debian, fresh_host
from tests.support.containers import engines as kit
from tests.support.wait import eventually

# As on a host where the packages are installed: with their /usr, and with a range of users for containers.
INSTALLED = """
packages=$1 users=$2
mount --make-rprivate /
mount -t overlay -o "lowerdir=$packages/usr:/usr" overlay /usr
echo root:1000000:1000000000 >"$users"
for file in /etc/subuid /etc/subgid; do
    [ -e "$file" ] || : >"$file"
    mount --bind "$users" "$file"
done
shift 2
exec "$@"
"""


class OfLxd(Inits):
    """Containers of LXD with a user namespace, and with the profile of the page."""

    client, daemon, prefix = "lxc", "lxd", "LXD"

    def __init__(self, work: Path, spec: dict[str, Any]) -> None:
        """Start the daemon, and create the profile."""
        super().__init__(work, spec)
        self._packages = self._unpacked()
        self._data = fresh_host.ROOTS / f".{self.daemon}-{work.name}"  # on the file system of the roots
        self._data.mkdir()
        installed = ["unshare", "-m", "sh", "-euc", INSTALLED, "sh", self._packages, work / "users"]
        with open(self._log("daemon"), "wb") as log:
            self._daemon = subprocess.Popen(
                [*installed, self.daemon, "--group", "root"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._programs(),
            )  # fmt: skip
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        eventually(lambda: self._lxc("query", "/1.0").returncode == 0, 30, self.daemon)
        self._must("storage", "create", "default", "dir")
        self._must("profile", "device", "add", "default", "root", "disk", "path=/", "pool=default")
        self._must("profile", "create", "fgpu")
        self._must("profile", "edit", "fgpu", input=block("fgpu.yaml"))

    @staticmethod
    def _unpacked() -> Path:
        return debian.unpacked(kit.ENGINES / "lxd", ("lxd", "lxd-client"))

    def path(self, name: str) -> str:
        """See Inits."""
        return f"{own_cgroup()}/lxc.payload.{name}"

    def _programs(self) -> dict[str, str]:
        return {
            "PATH": f"{self._packages}/usr/bin:/usr/libexec/incus:/usr/sbin:/usr/bin:/sbin:/bin",
            f"{self.prefix}_DIR": str(self._data),
            f"{self.prefix}_SECURITY_APPARMOR": "false",
            "HOME": str(self.work),
        }

    def _lxc(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.client, *words], capture_output=True, text=True, timeout=60, check=False, env=self._programs(),
            **({"stdin": subprocess.DEVNULL} if "input" not in more else more),
        )  # fmt: skip

    def _must(self, *words: str, **more: Any) -> None:
        done = self._lxc(*words, **more)
        assert done.returncode == 0, f"{words}: {done.stderr}{self._log('daemon').read_text(errors='replace')}"

    def _begin(self, name: str, folder: Path, root: Path) -> None:
        self._log(name).touch()
        self._must("init", "--empty", name, "--profile=default", "--profile=fgpu")
        root.rename(self._data / "storage-pools/default/containers" / name / "rootfs")
        self._roots.remove(root)
        self._must("config", "set", name, "raw.lxc=lxc.cgroup.relative = 1")
        for number, (source, target, mode) in enumerate(binds(folder)):
            how = "readonly=true" if mode == "ro" else "recursive=true"  # LXD has no read-only recursive bind mount
            self._must("config", "device", "add", name, f"b{number}", "disk", f"source={source}", f"path={target}", how)
        self._must("start", name)

    def _enter(self, name: str, *words: str | Path) -> list[str | Path]:
        return [self.client, "exec", name, "--", *words]

    def _end(self, name: str) -> None:
        self._must("delete", "--force", name)

    def close(self) -> None:
        """End every container, and the daemon."""
        super().close()
        self._daemon.terminate()
        self._daemon.wait(30)
        shutil.rmtree(self._data)


class OfIncus(OfLxd):
    """Containers of Incus, of Debian's backports."""

    client, daemon, prefix = "incus", "incusd", "INCUS"

    @staticmethod
    def _unpacked() -> Path:
        suite = "bookworm-backports"
        words = [
            "install",
            "-y",
            "--download-only",
            "--no-install-recommends",
            "--reinstall",
            f"--target-release={suite}",
        ]
        options = debian.suite(kit.ENGINES, "backports", "bookworm", suite)
        return debian.fetched(kit.ENGINES / "incus", [*words, "incus-base"], options)
