"""A fresh host for tests, of this distribution or of another Debian: a root made by debootstrap.

systemd may be its first process. The module creates build/roots/NAME once, and a copy of it for every host, in which
every changed file is visible. A failed download fails the tests with the name of the mirror, and never skips a test.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests import world
from tests.support import packages as kit

ROOTS = kit.BUILD / "roots"
MIRRORS = {"debian": "http://deb.debian.org/debian", "ubuntu": "http://archive.ubuntu.com/ubuntu"}
OTHERS = {"trixie": MIRRORS["debian"]}
BASE = "systemd,systemd-sysv"  # packages that every host has
RESOLVER = "/etc/resolv.conf"
MOUNTS = ("dev", "opt/build", "proc", "run", "sys", "tmp")
# Files that apt, dpkg, systemd and the distribution's own packages write.
NOISE = re.compile(
    r"var/(lib/dpkg|lib/apt|lib/python|lib/systemd|cache|log)(/|$)|etc/ld\.so\.cache$|etc/(alternatives|python3[.\d]*)(/|$)"
    r"|(etc|var)/\.updated$|etc/(group-|gshadow-|inputrc)$|usr/local/lib/python3[.\d]*(/|$)|usr/(lib|share)/python3[/.\d].*__pycache__(/|$)"
)
DEBOOTSTRAP_SECONDS = 280
BUILD = Path("/opt/build")  # the path of the checkout's build/ inside a host

# Enters a cgroup, to make it the root of a cgroup namespace.
ENTER = 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"'
# A mount, cgroup and pid namespace with the mounts of a host, and systemd as its process 1.
BOOT = """
set -eu
mount --make-rprivate /
cd "$1"
umount -R proc sys dev
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for device in null zero full random urandom tty; do touch dev/$device; mount --bind /dev/$device dev/$device; done
pivot_root . mnt
umount -l /mnt
exec env -i container=fgpu PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd
"""


def distribution() -> tuple[str, str]:
    """Return (code name, mirror) of this machine's distribution, for which a package is made."""
    lines = [line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line]
    known = {name: value.strip('"') for name, value in lines}
    assert known["ID"] in MIRRORS, f"no mirror is known for {known['ID']}"
    return known["VERSION_CODENAME"], MIRRORS[known["ID"]]


def fresh_root(other: str = "") -> Path:
    """Return the root that hosts are made of: the distribution's base, its lists of packages, and nothing else.

    `other` is the code name of another distribution, one of OTHERS. One process creates the root, and others wait for
    it.
    """
    name, mirror = (other, OTHERS[other]) if other else distribution()
    root = ROOTS / name
    ROOTS.mkdir(parents=True, exist_ok=True)
    with open(ROOTS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return root if root.exists() else _bootstrapped(root, name, mirror)


def _bootstrapped(root: Path, name: str, mirror: str) -> Path:
    aside = ROOTS / f".{name}"
    # An interrupted run may have left this mounted, and nothing below it may be removed.
    subprocess.run(["umount", "--quiet", aside / "proc"], check=False, timeout=10)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    command = ["debootstrap", "--variant=minbase", f"--include={BASE}", name, str(aside), mirror]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEBOOTSTRAP_SECONDS, check=False)
    assert done.returncode == 0, f"no {name} from {mirror}: {done.stdout[-500:]}{done.stderr[-500:]}"
    (aside / "opt/build").mkdir()
    (aside / "etc/machine-id").write_text(f"{os.urandom(16).hex()}\n")
    aside.rename(root)
    return root


Listing = dict[str, tuple[int, int, int, int, str]]


def listing(root: Path) -> Listing:
    """Return every file of a root, without mounts: mode, owners, size and where a link points."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            stat = path.lstat()
            size = 0 if name in folders else stat.st_size
            link = os.readlink(path) if path.is_symlink() else ""
            found[str(path.relative_to(root))] = (stat.st_mode, stat.st_uid, stat.st_gid, size, link)
        folders[:] = [name for name in folders if str(Path(folder, name).relative_to(root)) not in MOUNTS]
    return found


class Host(kit.Installed):
    """A separate root, entered by chroot. boot() and halt() start and stop systemd in it."""

    def __init__(self, work: Path, other: str = "") -> None:
        """Create the host.

        `other` is the code name of another distribution, one of OTHERS.
        """
        self._other = other
        self.root = ROOTS / f".host-{os.getpid()}"
        self._cgroup = kit.cgroup2() / f"fgpu-packages-{os.getpid()}"
        self._own_tree = ["sh", "-c", ENTER, "sh", str(self._cgroup), "unshare", "--cgroup"]
        self._chroot = [*self._own_tree, "chroot", str(self.root)]
        super().__init__("/usr/bin/fgpu", self._chroot, BUILD)
        self._work = work
        self._init: subprocess.Popen[bytes] | None = None
        self._mounted: list[Path] = []

    def mount(self) -> None:
        """Copy the root and mount a host's file systems in the copy.

        The root is no overlay, because on an overlay mappings have another device number than files.
        """
        kit.run("cp", "--archive", "--reflink=auto", fresh_root(self._other), self.root)
        self._mount(str(self.root), self.root, "--bind")
        self._mount("tmpfs", self.root / "run", "-t", "tmpfs")
        self._mount("tmpfs", self.root / "tmp", "-t", "tmpfs")
        for name in ("proc", "dev"):
            self._mount(f"/{name}", self.root / name, "--rbind")
            kit.run("mount", "--make-rslave", self.root / name)
        self._mount("sysfs", self.root / "sys", "-t", "sysfs")
        self._mount("bpf", self.root / "sys/fs/bpf", "-t", "bpf")
        self._cgroup.mkdir()
        kit.run(*self._own_tree, "mount", "-t", "cgroup2", "cgroup2", self.root / "sys/fs/cgroup")
        (self.root / "run/fgpu-sim").mkdir()
        for source, target in ((kit.BUILD, BUILD), ("/run/fgpu-sim", "/run/fgpu-sim"), (RESOLVER, RESOLVER)):
            self._mount(str(source), self.root / str(target).lstrip("/"), "--bind")
        for name in world.COPIED:  # mounts of this world, because another host's root is in build/ too
            self._mount(str(kit.BUILD / name), self.root / str(BUILD / name).lstrip("/"), "--bind")

    def show(self, source: Path, *options: str) -> None:
        """Mount a file or a folder of this machine at the same path."""
        place = self.root / str(source).lstrip("/")
        (place if source.is_dir() else place.parent).mkdir(parents=True, exist_ok=True)
        if not source.is_dir():
            place.touch()
        self._mount(str(source), place, "--bind", *options)

    def _without_cgroup(self) -> bool:
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        return not self._cgroup.exists()

    def processes(self) -> list[str]:
        """Return the processes of this host."""
        return (self._cgroup / "cgroup.procs").read_text().split()

    def left(self, before: Listing) -> list[str]:
        """Return files added, removed or changed since `before` that belong to no package of the distribution."""
        lists = (self.root / "var/lib/dpkg/info").glob("*.list")
        owned = {line.lstrip("/") for path in lists for line in path.read_text().splitlines()}
        owned |= {re.sub(r"^(lib|bin|sbin|lib64)/", r"usr/\1/", name) for name in owned}
        now = listing(self.root)
        changed = {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}
        return sorted(name for name in changed - owned if not NOISE.match(name))

    def accounts(self) -> dict[str, str]:
        """Return the texts of the files of users, groups and preloaded libraries, by their names in /etc."""
        names = ("passwd", "group", "shadow", "gshadow", "ld.so.preload")
        found = {name: self.root / "etc" / name for name in names}
        return {name: path.read_text() for name, path in found.items() if path.exists()}

    def pins(self) -> list[str]:
        """Return the objects that are pinned in this host's BPF file system."""
        return self.run("find", "/sys/fs/bpf", "-mindepth", "1", "!", "-name", "*.debug").stdout.split()

    def _mount(self, source: str, target: Path, *options: str) -> None:
        kit.run("mount", *options, source, target)
        self._mounted.append(target)

    def close(self) -> None:
        """Kill what runs there, and remove the root."""
        self.stop()
        self.halt()
        if self._cgroup.exists():
            kit.eventually(self._without_cgroup, 10, f"an empty {self._cgroup}")
        for target in reversed(self._mounted):
            kit.run("umount", "--recursive", "--lazy", target)
        shutil.rmtree(self.root, ignore_errors=True)

    def apt(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run apt-get there, as an administrator types it."""
        environment = {**self.environment, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        environment |= {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
        del environment["LD_LIBRARY_PATH"]
        command = ["apt-get", "-y", "-q", "--no-install-recommends", "-o", "APT::Sandbox::User=root"]
        return self.run(*command, *words, check=check, env=environment, timeout=170)

    def install(self, deb: Path) -> None:
        """Install a package of build/, even after a newer one."""
        self.apt("install", "--allow-downgrades", BUILD / deb.relative_to(kit.BUILD))

    @contextlib.contextmanager
    def gatekeeper(self) -> Iterator[None]:
        """Run the gatekeeper as its unit does, until the end of the block."""
        command = self.command("/usr/lib/fgpu/fgpu-gatekeeper")
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={"PATH": self.environment["PATH"]}) as process:
            try:
                lock = self.root / "run/fgpu/gatekeeper.lock"
                mine = f"{process.pid}\n"
                kit.eventually(lambda: lock.exists() and lock.read_text() == mine, 10, "the gatekeeper")
                yield
            finally:
                process.terminate()

    # -- with systemd

    def boot(self) -> float:
        """Start systemd as the first process of a pid namespace. Return the seconds until it is up."""
        command = [*self._own_tree, "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts"]
        command += ["sh", "-c", BOOT, "sh", str(self.root)]
        with open(self._work / "console", "wb") as console:
            self._init = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        begun = time.monotonic()
        pid = kit.eventually(self._first_process, 10, "systemd's start")
        self.prefix = ["nsenter", f"--target={pid}", "--mount", "--pid", "--ipc", "--uts", "--cgroup"]

        def up() -> bool:
            return self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")

        kit.eventually(up, 30, f"systemd: {(self._work / 'console').read_text()}")
        return time.monotonic() - begun

    def _first_process(self) -> str:
        """Return the pid of the host's systemd, once it runs."""
        assert self._init is not None
        assert self._init.poll() is None, (self._work / "console").read_text()
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        with contextlib.suppress(OSError):
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
                return children[0]
        return ""

    def halt(self) -> None:
        """Kill systemd, and with it everything in its namespace."""
        if self._init is None:
            return
        self._init.kill()
        self._init.wait(10)
        self._init, self.prefix = None, self._chroot

    def version(self) -> str:
        """Return the version of the package that is installed there."""
        return self.run("dpkg-query", "--show", "--showformat=${Version}", "fgpu").stdout

    def unit(self, name: str, *properties: str) -> list[str]:
        """Return the values of these properties of a unit, as systemd shows them."""
        words = [f"--property={name}" for name in properties]
        shown = dict(line.split("=", 1) for line in self.run("systemctl", "show", name, *words).stdout.splitlines())
        return [shown[name] for name in properties]


_majors = itertools.count(10)  # all differ: a failed trial may have upgraded a host


def newer(deb: Path, folder: Path, work: Path) -> str:
    """Put a package with the highest version so far and another shim into a host's /tmp. Return its path there."""
    major = next(_majors)
    tree, name = work / "tree", f"fgpu_{major}.deb"
    kit.run("dpkg-deb", "-R", deb, tree)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: \d+", f"Version: {major}", control.read_text(), count=1, flags=re.MULTILINE))
    with open(next(tree.rglob("libfgpu.so")), "ab") as shim:
        shim.write(f"another {major}".encode())
    kit.run("dpkg-deb", "-Znone", "--root-owner-group", "--build", tree, folder / name)
    return f"/tmp/{name}"


@contextlib.contextmanager
def load(host: Host) -> Iterator[list[str]]:
    """Run a tenant that starts one program after another. Each allocates all that it can. Yield their output."""
    script = f"while [ ! -e /tmp/enough ]; do {host.build}/examples/fill --step 2MiB; done"
    command = host.command("/usr/bin/fgpu", "run", "--name", "load", "--memory", "1GiB", "--", "sh", "-c", script)
    said: list[str] = []
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, env=host.environment, **both) as tenant:
        try:
            assert tenant.stdout
            said.append(tenant.stdout.readline())
            yield said
        finally:
            (host.root / "tmp/enough").touch()
            said += tenant.communicate(timeout=60)[0].splitlines(keepends=True)
            (host.root / "tmp/enough").unlink()
