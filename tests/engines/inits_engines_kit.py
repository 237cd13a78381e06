"""Containers with systemd as process 1: under runc, crun, LXC and systemd-nspawn."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.engines.inits_kit import Inits, binds, block, unpacked
from tests.support.containers import engines as kit
from tests.support.host import BUILD, cgroup_root

CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL MKNOD NET_ADMIN NET_BIND_SERVICE SETFCAP SETGID SETPCAP "
    "SETUID SYS_ADMIN SYS_CHROOT SYS_NICE SYS_PTRACE"
)
LXC = """
lxc.include = {packages}/usr/share/lxc/config/common.conf
lxc.seccomp.profile = {packages}/usr/share/lxc/config/common.seccomp
lxc.uts.name = {name}
lxc.rootfs.path = dir:{root}
lxc.rootfs.mount = {mount}
lxc.apparmor.profile = unconfined
lxc.net.0.type = empty
lxc.cgroup.relative = 1
{mounts}
"""
# A user namespace.
UNPRIVILEGED = """
lxc.include = {packages}/usr/share/lxc/config/userns.conf
lxc.idmap = u 0 1000000 65536
lxc.idmap = g 0 1000000 65536
lxc.rootfs.options = idmap=container
"""
# Mounts the two folders again, above a folder around them that other users cannot enter: in a user namespace, root is
# another user. LXC mounts them only after it has entered the namespace.
OPENED = """
for folder in "$1" "$2"; do
    chmod a+x "$folder"
    closed='' at=${folder%/*}
    while [ -n "$at" ]; do
        [ -n "$(find "$at" -maxdepth 0 -perm -001)" ] || closed=$at
        at=${at%/*}
    done
    [ -n "$closed" ] || continue
    mount --rbind "$folder" /mnt
    mount -t tmpfs -o mode=755 tmpfs "$closed"
    mkdir -p "$folder"
    mount --move /mnt "$folder"
done
shift 2
exec "$@"
"""
# systemd-nspawn needs a process 1 in the root of the cgroups that it sees, as on a host with systemd. It is the shell.
LIKE_SYSTEMD = 'cgroup=$1; shift; (echo 0 >"$cgroup/cgroup.procs" && exec "$@"); exit'


def own_cgroup() -> str:
    """Return the path of this process's cgroup, in which LXC makes its own; empty: the root.

    A test with dockerd may have moved the process: dockerd empties the root of its cgroup namespace.
    """
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line for line in lines if line.startswith("0::")).removeprefix("0::").rstrip("/")


class OfBundles(Inits):
    """Containers of runc or crun with a share."""

    group = "/fgpu-e2e"
    share = "1gib"
    runtime = "runc"

    def path(self, name: str) -> str:
        """See Inits."""
        return f"{self.group}/{name}"

    def _begin(self, name: str, folder: Path, root: Path) -> None:
        bundle = self.work / f"{name}.bundle"
        bundle.mkdir()
        subprocess.run(["runc", "spec"], cwd=bundle, check=True, timeout=30)
        path = bundle / "config.json"
        spec = json.loads(path.read_text())
        process = spec["process"]
        del process["rlimits"]
        process.update(terminal=False, args=["/sbin/init"], noNewPrivileges=False)
        process["env"] = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "container=oci"]
        for kind in ("bounding", "effective", "permitted"):
            process["capabilities"][kind] = [f"CAP_{name}" for name in CAPABILITIES.split()]
        spec["root"] = {"path": str(root), "readonly": False}
        spec["linux"]["cgroupsPath"] = self.path(name)
        spec["linux"]["maskedPaths"] = spec["linux"]["readonlyPaths"] = []
        del spec["linux"]["resources"]
        if {"type": "cgroup"} not in spec["linux"]["namespaces"]:
            spec["linux"]["namespaces"].append({"type": "cgroup"})
        for mount in spec["mounts"]:
            mount["options"] = [option for option in mount.get("options", []) if option != "ro"]
        for source, target, mode in binds(folder):
            mount = {"source": str(source), "destination": str(target), "type": "bind", "options": ["rbind", mode]}
            spec["mounts"].append(mount)
        kit.inject(spec, self.spec, self.share)
        path.write_text(json.dumps(spec))
        self._call(name, *self._words("run", "--detach", "--bundle", bundle, name))

    def _words(self, *words: str | Path) -> list[str | Path]:
        return [self.runtime, "--root", self.work / "state", *words]

    def _enter(self, name: str, *words: str | Path) -> list[str | Path]:
        return self._private(*self._words("exec", name, *words))

    def _end(self, name: str) -> None:
        self._call(name, *self._words("delete", "--force", name))


class OfCrun(OfBundles):
    """Containers of crun with a share."""

    runtime = "crun"


class OfLxc(Inits):
    """Containers of LXC, with the lines of the page."""

    more = ""

    def path(self, name: str) -> str:
        """See Inits."""
        return f"{own_cgroup()}/lxc.payload.{name}"

    def _begin(self, name: str, folder: Path, root: Path) -> None:
        (self.work / "mount").mkdir(exist_ok=True)
        mounts = [
            f"lxc.mount.entry = {source} {str(target).lstrip('/')} none rbind,{mode},create=dir 0 0"
            for source, target, mode in binds(folder)
        ]
        known = {"packages": unpacked(), "name": name, "root": root, "mount": self.work / "mount"}
        text = LXC.format(**known, mounts="\n".join(mounts))
        config = self.work / f"{name}.config"
        config.write_text(f"{text}{self.more.format(**known)}{block('/var/lib/lxc/NAME/config')}")
        where = ["--lxcpath", self.work, "--name", name, "--rcfile", config]
        entered = ["sh", "-euc", OPENED, "sh", BUILD, self.work]
        self._call(
            name, *entered, "lxc-start", *where, "--daemon", "--logfile", self._log(name), "--logpriority", "NOTICE"
        )

    def _enter(self, name: str, *words: str | Path) -> list[str | Path]:
        return self._private("lxc-attach", "--lxcpath", self.work, "--name", name, "--", *words)

    def _end(self, name: str) -> None:
        self._call(name, "lxc-stop", "--lxcpath", self.work, "--name", name, "--kill")


class OfUnprivilegedLxc(OfLxc):
    """Containers of LXC with a user namespace."""

    more = UNPRIVILEGED


class OfNspawn(Inits):
    """Containers of systemd-nspawn, started as its unit systemd-nspawn@.service does, with the lines of the page."""

    hides_run = False  # systemd-nspawn itself mounts a file system over /run, before the mounts of the page

    def path(self, name: str) -> str:
        """See Inits."""
        return f"/machine.slice/systemd-nspawn@{name}.service"

    def _begin(self, name: str, folder: Path, root: Path) -> None:
        place = Path("/etc/systemd/nspawn")
        place.mkdir(parents=True, exist_ok=True)
        kinds = {"ro": "BindReadOnly", "rw": "Bind"}
        mounts = [f"{kinds[mode]}={source}:{target}\n" for source, target, mode in binds(folder)]
        (place / f"{name}.nspawn").write_text("".join([block("/etc/systemd/nspawn/NAME.nspawn"), *mounts]))
        cgroup = cgroup_root() / self.path(name).lstrip("/")
        cgroup.mkdir(parents=True)
        command = [
            *("systemd-nspawn", "--quiet", "--keep-unit", "--boot", "--link-journal=try-guest", "--private-network"),
            *("-U", "--settings=override", f"--machine={name}", f"--directory={root}", "--register=no"),
        ]
        enter = self._private("sh", "-c", LIKE_SYSTEMD, "sh", f"/sys/fs/cgroup{self.path(name)}", *command)
        enter[1:1] = ["--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self._log(name), "wb") as log:
            self._nspawn = subprocess.Popen(
                enter, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._programs()
            )

    def _enter(self, name: str, *words: str | Path) -> list[str | Path]:
        first = cgroup_root() / f"{self.path(name)}/payload/init.scope/cgroup.procs".lstrip("/")
        pid = next(iter(first.read_text().split() if first.exists() else ()), "0")
        return ["nsenter", f"--target={pid}", "--all", *words]

    def _outside(self, name: str, folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
        """Start a hub as a unit of the container, like `machinectl shell`, which needs D-Bus in the container."""
        hub = self._writer(folder)
        done = self.run(name, "systemd-run", f"--property=StandardInput=file:{folder}/hub.in", *words)
        assert done.returncode == 0, done.stderr
        return hub

    def _end(self, name: str) -> None:
        self._nspawn.kill()  # and with its process 1 all processes of the pid namespace
        self._nspawn.wait(10)
        Path(f"/etc/systemd/nspawn/{name}.nspawn").unlink()
