"""The command `fgpu run`, which enters a tenant's cgroup and execs a program.

This module runs in the command. The agent also uses this module to write the preload files, `fgpu doctor` to check
these files, and `fgpu detach` to remove the files that fgpu has created on the host. run() sets up the cgroup, the
namespaces, the preload files and the user of the program. If the setup fails (LaunchError), the program has not run an
instruction.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import select
import signal
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from fgpu_ebpf.check import Check
from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.linux.libc import LIBC
from fgpu_ebpf.workloads import shim_mounts

PRELOADS = tuple(map(Path, shim_mounts.LISTS))
_NEWNS, _NEWPID = 0x00020000, 0x20000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG = 1
_AWAITED = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT)
_AGAIN = "restart the agent, which installs the shim again"


class LaunchError(Exception):
    """The program was not started. The text has the reason."""


class LaunchTarget(NamedTuple):
    """The cgroup and the preload files for a program.

    `folder`: the folder of a cgroup whose limit is in force. `run_dir`: the folder of the preload files.
    `pid_namespace`: the program runs in a new pid namespace.
    """

    folder: Path
    run_dir: Path
    pid_namespace: bool


def _check(result: int, what: str) -> None:
    if result:
        raise LaunchError(f"{what} failed: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    _check(LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None), f"mount {target}")


def _mark(run_dir: Path, host: Path) -> Path:
    return run_dir / f"made-{host.name}"


def _create_preload_file(run_dir: Path, host: Path) -> None:
    """Create an empty file of the host if the file does not exist, and mark the created file for `fgpu detach`."""
    try:
        os.close(os.open(host, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        return
    _mark(run_dir, host).touch()


def remove_created_preloads(run_dir: Path) -> None:
    """Remove the host's preload files that fgpu has created and that are still empty.

    A file is kept if `fgpu run` has mounted a list over the file. If such a file were removed, the kernel would
    unmount the list, and programs that the tenant starts later would run without the shim.
    """
    mounted = shim_mounts.mounted_lists(run_dir)
    for host in PRELOADS:
        mark = _mark(run_dir, host)
        if str(host) in mounted:
            continue
        if mark.exists() and host.exists() and host.stat().st_size == 0:
            host.unlink()
        mark.unlink(missing_ok=True)


def write_preloads(run_dir: Path, shim: Path) -> None:
    """Write the files that `fgpu run` mounts over PRELOADS, under the same names: the host's lines, then the shim.

    Each file is replaced atomically: a program that started while a file was empty would run without the shim.
    """
    for host in PRELOADS:
        own = _text_of(host) or ""
        lines = [line for line in own.splitlines() if line.strip() and line.strip() != str(shim)]
        text = "\n".join([*lines, str(shim)]) + "\n"
        if _text_of(run_dir / host.name) != text:  # writes only a changed text: an agent must also start on a full disk
            atomic_file.write(run_dir / host.name, text)


def _text_of(path: Path) -> str | None:
    """Return a file's text, byte for byte, or None if the file does not exist."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, IsADirectoryError):
        return None


def check(run_dir: Path) -> Check:
    """Check that programs of any user can read every file to preload, and reach the gatekeeper's socket."""
    names = (*(host.name for host in PRELOADS), "container.preload")
    lists = [path for name in names if (path := run_dir / name).exists()]
    files = {Path(line.strip()) for path in lists for line in (_text_of(path) or "").splitlines() if line}
    if not lists:
        return Check("preload", False, "there is no preload list", _AGAIN)
    wanted = [*((file, stat.S_IROTH) for file in (*lists, *sorted(files))), (run_dir / "shim/shim.sock", stat.S_IWOTH)]
    closed = {place: None for file, right in wanted if (place := _closed_to_others(file, right))}
    if not closed:
        return Check("preload", True, ", ".join(sorted(map(str, files))))
    found = f"{', '.join(map(str, closed))}: missing, or not accessible to users other than root"
    folders = " ".join(str(place) for place in closed if place.is_dir())
    return Check("preload", False, found, f"chmod o+x {folders}" if folders else _AGAIN)


def _closed_to_others(file: Path, right: int) -> Path | None:
    """Return the first component of the path that denies `right` to other users (mode bits `o`), or None.

    The path is checked as given, and again with its symbolic links resolved.
    """
    for path in (file, Path(os.path.realpath(file))):
        for place, needed in (*((folder, stat.S_IXOTH) for folder in reversed(path.parents)), (path, right)):
            try:
                mode = place.stat().st_mode
            except OSError:
                return place
            if not mode & needed or (place == path and stat.S_ISDIR(mode)):
                return place
    return None


def _preload_the_shim(run_dir: Path) -> None:
    """Mount the agent's files over PRELOADS, in a new mount namespace. Programs with musl never read these files."""
    _check(LIBC.unshare(_NEWNS), "unshare")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    for host in PRELOADS:
        try:
            _create_preload_file(run_dir, host)
            _mount(str(run_dir / host.name), str(host), "", _MS_BIND)
        except OSError as error:
            # The files after the first are for programs that Nix has built. If /etc is read-only or the agent is older,
            # these programs alone lack the shim, and the agent reports them.
            if host == PRELOADS[0] or error.errno not in (errno.EROFS, errno.ENOENT):
                raise LaunchError(f"cannot mount the preload list over {host}: {error.strerror}") from error


def _drop_to_caller() -> None:
    """Switch to the user that called sudo."""
    uid, gid = os.environ.get("SUDO_UID", ""), os.environ.get("SUDO_GID", "")
    if os.geteuid() or not uid.isdecimal() or not gid.isdecimal() or uid == "0":
        return
    try:
        name = pwd.getpwuid(int(uid)).pw_name
        os.initgroups(name, int(gid))
    except (KeyError, OverflowError) as error:
        raise LaunchError(f"SUDO_UID {uid} and SUDO_GID {gid} are not the ids of a user") from error
    os.setgid(int(gid))
    os.setuid(int(uid))


def _exec(command: Sequence[str]) -> NoReturn:
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        os.write(2, f"fgpu: {command[0]}: {error.strerror}\n".encode())
        os._exit(127 if error.errno == errno.ENOENT else 126)


def enter(target: LaunchTarget) -> None:
    """Move this process into the tenant, and preload the shim for the programs of this process.

    Raises:
        LaunchError: the process is not in the tenant, or not in a state that permits the program.
    """
    if os.geteuid():
        raise LaunchError("this command needs root: sudo fgpu run … (the program runs as your user)")
    try:
        (target.folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    except OSError as error:
        raise LaunchError(f"cannot enter the cgroup {target.folder}: {error.strerror}") from error
    _preload_the_shim(target.run_dir)


def run(target: LaunchTarget, command: Sequence[str]) -> int:
    """Enter the tenant and exec the program.

    With a pid namespace this process waits, and returns the program's exit code, or 128 plus the number of the signal
    that has killed the program. Otherwise the function does not return.
    """
    enter(target)
    if not target.pid_namespace:
        _drop_to_caller()
        _exec(command)
    _check(LIBC.unshare(_NEWPID), "unshare")
    waiting = os.pidfd_open(os.getpid())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if this signal were ignored, the kernel would not send the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    child = os.fork()
    if child == 0:
        _become_init(command, waiting, before)
    os.close(waiting)
    return _wait_for(child)


def _wait_for(child: int) -> int:
    """Forward signals to a child and reap all children until that child ends. The caller has blocked _AWAITED.

    A signal of the terminal is not forwarded, because the terminal sends this signal to the program too. The exception
    is the terminal's hangup, which the terminal reports only to the session's leader.

    If the child stops and has the terminal, this process group stops, so that the user's shell takes the terminal back.
    The first process of a pid namespace does not stop, and forwards the SIGCONT that the shell sends later.

    Returns:
        The child's exit code, or 128 plus the number of the signal that has killed the child.
    """
    while True:
        info = signal.sigwaitinfo(_AWAITED)
        if info.si_signo == signal.SIGCHLD:
            while (changed := os.waitpid(-1, os.WNOHANG | os.WUNTRACED))[0]:
                if os.WIFSTOPPED(changed[1]):
                    if changed[0] == child and _has_terminal(child):
                        os.kill(0, signal.SIGSTOP)
                elif changed[0] == child:
                    code = os.waitstatus_to_exitcode(changed[1])
                    return code if code >= 0 else 128 - code
        elif info.si_code <= 0 or (info.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()):
            os.kill(child, info.si_signo)


def _has_terminal(child: int) -> bool:
    """Return whether a child has a process group of its own, and this group is the foreground of the terminal."""
    try:
        return os.tcgetpgrp(0) == os.getpgid(child) != os.getpgrp()
    except OSError:
        return False


def _end_with(parent: int) -> None:
    """Make the kernel kill this process when its parent exits. `parent`: a pidfd of the parent.

    A change of the uid would reset this setting.
    """
    LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([parent], [], [], 0)[0]:
        os._exit(125)  # the parent exited before the setting was made


def _become_init(command: Sequence[str], parent: int, mask: set[int | signal.Signals]) -> NoReturn:
    """Run the program as a child of this process, which is pid 1 of a new pid namespace and stays root.

    The program is not pid 1, because the kernel drops signals to pid 1 that have their default action.

    Args:
        command: the program and its arguments.
        parent: a pidfd of the waiting process.
        mask: the signals that the program begins with as blocked signals.
    """
    try:
        _end_with(parent)
        _mount("proc", "/proc", "proc", 0)
        if child := os.fork():
            os._exit(_wait_for(child))
        _drop_to_caller()
    except (LaunchError, OSError) as error:
        os.write(2, f"fgpu: {error}\n".encode())
        os._exit(125)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else Python would write a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _exec(command)
