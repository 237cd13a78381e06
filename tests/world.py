"""A world: resources that a host has only once, made private for one process and its descendants.

A world has its own /run (with an empty /run/fgpu), /etc (if a preload list is removed there, the kernel also unmounts
what `fgpu run` has mounted over it, in all mount namespaces), /var/lib/fgpu and /sys/fs/bpf, its own copies of the
simulated driver and the shim (uprobes belong to a file, and two agents must not probe the same file), and a cgroup
namespace with its own root cgroup. Agents in two worlds do not affect each other.

`python -m tests.world COMMAND...` runs a command in a new world, and removes the world when the command has exited. If
the command runs in a world, the new world's cgroups are beside those of the first world and not inside them. Otherwise
the first world's agent would probe the files of programs in the new world.
`python -m tests.world --clear COMMAND...` runs a command on the host itself, such as pytest, whose workers make worlds.
Before and after the command it removes processes and cgroups that worlds have left. Everything else of a world ends
with its processes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build"
COPIED = ("sim", "shim")  # folders of build/
FOLDER = "fgpu-worlds"
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWNET = 0x00020000, 0x02000000, 0x40000000
GONE_SECONDS = 20.0
SIZE = "size=32m"  # of the file systems that tests fill to the last byte
HOST = "FGPU_TEST_HOST"  # variable of the processes in a world: the host's cgroup namespace, as a path


def cgroup2() -> Path:
    """Return where cgroup v2 is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise RuntimeError("cgroup v2 is not mounted")


def hierarchies_of_version_1() -> list[Path]:
    """Return where the hierarchies of cgroup v1 are mounted. A host that has only version 2 has none."""
    fields = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(place) for _, place, kind, *_ in fields if kind == "cgroup"]


def enter(name: str) -> None:
    """Give the calling thread, and every process that it starts later, a new world of this name. Needs root."""
    os.environ.setdefault(HOST, f"/proc/{os.getppid()}/ns/cgroup")
    cgroup = cgroup2() / FOLDER / name
    cgroup.mkdir(parents=True)
    (cgroup / "cgroup.procs").write_text("0")
    call("unshare", CLONE_NEWNS | CLONE_NEWCGROUP)
    _mount_hierarchies()
    _own_run_folder()
    _own_etc()
    _run("mount", "-t", "bpf", "bpf", "/sys/fs/bpf")
    Path("/var/lib/fgpu").mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"mode=755,{SIZE}", "tmpfs", "/var/lib/fgpu")
    for folder in (BUILD / name for name in COPIED):
        if folder.exists():
            _own_copy(folder)


def as_host() -> None:
    """Move the calling thread to the cgroup namespace of the host. It stays in its own cgroup."""
    if HOST in os.environ:
        with open(os.environ[HOST], "rb") as host:
            call("setns", host.fileno(), CLONE_NEWCGROUP)
        call("unshare", CLONE_NEWNS)
        _mount_hierarchies()


def call(name: str, *arguments: int) -> None:
    """Call a function of libc. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


def _mount_hierarchies() -> None:
    """Mount the hierarchies of cgroups as the calling process's cgroup namespace shows them."""
    _run("mount", "--make-rprivate", "/")
    for place, kind, options in _hierarchies():
        _run("umount", "--lazy", place)
        _run("mount", "-t", kind, *options, kind, place)


def _hierarchies() -> list[tuple[str, str, list[str]]]:
    """Return the place, the type and the options of the mounts of cgroup v2, and of the memory controller of v1."""
    found = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found.append((place, kind, []))
        elif kind == "cgroup" and "memory" in options.split(","):
            found.append((place, kind, ["-o", "memory"]))
    return found


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=60)


def _own_run_folder() -> None:
    """Mount the entries of /run into a new /run.

    A removal of a folder there does not remove it on the host.
    """
    own = Path(tempfile.mkdtemp())
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", own)
    for entry in Path("/run").iterdir():
        inside = own / entry.name
        if entry.name in ("fgpu", "fgpu-sim"):
            continue
        if entry.is_symlink():
            inside.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            inside.mkdir()
            _run("mount", "--rbind", entry, inside)
        else:
            inside.touch()
            _run("mount", "--bind", entry, inside)
    _run("mount", "--move", own, "/run")
    own.rmdir()
    for name in ("fgpu", "fgpu-sim"):
        Path("/run", name).mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"mode=755,{SIZE}", "tmpfs", Path("/run", name))


def _own_etc() -> None:
    """Mount an overlay over /etc that has the host's files and its own changes."""
    own = Path(tempfile.mkdtemp())
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", own)
    for name in ("upper", "work"):
        (own / name).mkdir()
    _run("mount", "-t", "overlay", "-o", f"lowerdir=/etc,upperdir={own}/upper,workdir={own}/work", "overlay", "/etc")
    _run("umount", "--lazy", own)  # the overlay keeps it mounted
    own.rmdir()


def _own_copy(folder: Path) -> None:
    own = Path(tempfile.mkdtemp())
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", own)
    _run("cp", "--archive", f"{folder}/.", own)
    _run("mount", "--move", own, folder)
    own.rmdir()


def clear(name: str = "") -> None:
    """Kill all processes of a world, and remove its cgroups.

    Without a name, do this for all worlds, and remove an empty /var/lib/fgpu from the host.
    """
    deadline = time.monotonic() + GONE_SECONDS
    for hierarchy in (cgroup2(), *hierarchies_of_version_1()):  # a cluster's kubelet and runc use those of version 1
        top = hierarchy / FOLDER / name
        while top.exists():
            if hierarchy == cgroup2():
                (top / "cgroup.kill").write_text("1")
            for folder, _, _ in os.walk(top, topdown=False):
                try:
                    os.rmdir(folder)
                except OSError:
                    continue
            if time.monotonic() > deadline:
                raise RuntimeError(f"{top} still has processes")
            time.sleep(0.02)
    state = Path("/var/lib/fgpu")
    if not name and state.exists() and not state.is_mount() and not any(state.iterdir()):
        state.rmdir()


def run(command: list[str]) -> int:
    """Run a command in a new world, and return its exit status. The world ends with the command."""
    name = f"run-{os.getpid()}"
    as_host()
    pid = os.fork()
    if not pid:
        try:
            enter(name)
            os.execvp(command[0], command)
        except BaseException as error:
            print(f"world: {error}", file=sys.stderr)
        os._exit(125)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = os.waitpid(pid, 0)[1]
    clear(name)
    return os.waitstatus_to_exitcode(status) % 256


def run_cleared(command: list[str]) -> int:
    """Clear the worlds, run a command, clear the worlds again, and return the command's exit status.

    The first SIGTERM or SIGHUP is passed on to the command as SIGINT, each further one as SIGKILL. A shell's `trap`
    would run only after the command has exited.
    """
    child: subprocess.Popen[bytes] | None = None
    asked = 0

    def end(*_: object) -> None:
        nonlocal asked
        asked += 1
        if child:
            child.send_signal(signal.SIGINT if asked == 1 else signal.SIGKILL)

    clear()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it in programs that it starts in the background
    child = subprocess.Popen(command)
    if asked:  # before a child was started
        child.send_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the command too
    status = child.wait()
    clear()
    return status % 256 if status >= 0 else 128 - status


def is_possible() -> bool:
    """Return whether this process may create worlds."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


if __name__ == "__main__":
    if sys.argv[1:] == ["--clear"]:
        clear()
    elif sys.argv[1:2] == ["--clear"]:
        sys.exit(run_cleared(sys.argv[2:]))
    elif sys.argv[1:]:
        sys.exit(run(sys.argv[1:]))
    else:
        sys.exit(__doc__)
