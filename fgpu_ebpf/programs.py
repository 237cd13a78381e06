"""The programs in the kernel: whether these very ones are pinned, and the loader that pins them.

Owns: the call of the loader and the stamp of what it pinned. Never: imports bcc (the loader does, in a process of its
own) or attaches. On failure: ProgramError with the mend; what was pinned before stays in force.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fgpu_ebpf import notify
from fgpu_ebpf.checks import Check

log = logging.getLogger("fgpu.agent")
MADE = "fgpu-mounted-this"  # a folder in a bpffs that we mounted ourselves
LOADER = ("/usr/bin/python3", "-I")
LOADER_FILE = Path(__file__).with_name("loader.py")
SOON_SECONDS, LOADER_SECONDS = 0.5, 60


class ProgramError(Exception):
    """What cannot be loaded, and what mends it."""


def sources_digest(sources: Path) -> str:
    """Eight hex digits that change with the programs, and with how they are compiled."""
    digest = hashlib.sha256()
    for path in [*sorted(sources.glob("*.[ch]")), LOADER_FILE]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class Loading:
    """The loader at work in a process of its own; nothing to do where these very programs are pinned already.

    Raises ProgramError, as `wait` does.
    """

    def __init__(self, sources: Path, pins: Path, loader: Sequence[str] = LOADER) -> None:
        self._digest = sources_digest(sources)
        self._stamp = pins / f"loaded-{self._digest}"
        self._child: subprocess.Popen[str] | None = None
        if not self._stamp.is_dir():
            mount_bpffs(pins)
            self._child = _start_loader([*loader, str(LOADER_FILE), str(sources), str(pins)])

    @property
    def begun(self) -> bool:
        """They were not pinned: this is the first start of these programs since the host's."""
        return self._child is not None

    def wait(self) -> str:
        """The programs' digest, once they are pinned. ProgramError has the loader's own line."""
        if self._child is None:
            return self._digest
        try:
            said = self._said(self._child)
        except subprocess.TimeoutExpired as error:
            raise ProgramError(f"the loader does not end within {LOADER_SECONDS} s") from error
        if self._child.returncode:
            lines = (said.strip() or f"the loader ended with {self._child.returncode}").splitlines()
            raise ProgramError(lines[-1].removeprefix("fgpu loader: "))
        for old in self._stamp.parent.glob("loaded-*"):
            old.rmdir()
        self._stamp.mkdir()
        return self._digest

    def _said(self, child: subprocess.Popen[str]) -> str:
        try:
            return child.communicate(timeout=SOON_SECONDS)[1]
        except subprocess.TimeoutExpired:  # what cannot work at all has said so by now, in a line of its own
            notify.tell("STATUS=compiles the kernel's programs")
            if os.isatty(sys.stderr.fileno()):  # a log has what went wrong, not what goes on
                log.info("compiles the kernel's programs: some seconds, once a boot")
            return child.communicate(timeout=LOADER_SECONDS)[1]

    def end(self) -> None:
        """Nobody waits for it any more: what it has pinned is used by nobody, for want of the stamp."""
        if self._child and self._child.poll() is None:
            self._child.kill()
            self._child.communicate()


def _start_loader(command: Sequence[str]) -> subprocess.Popen[str]:
    environment, pipe = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}, subprocess.PIPE
    try:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=pipe, text=True, env=environment)
    except OSError as error:
        raise ProgramError(
            f"cannot run the loader {command[0]} ({error.strerror}): name the system's Python with --loader"
        ) from error


def load(sources: Path, pins: Path, loader: Sequence[str] = LOADER) -> str:
    """Pins the programs unless these very ones are pinned; answers their digest. Raises ProgramError."""
    loading = Loading(sources, pins, loader)
    try:
        return loading.wait()
    finally:
        loading.end()


def mount_bpffs(pins: Path) -> None:
    """A bpffs at its usual place, if there is none, and our folder in it. ProgramError: none can be mounted."""
    root = Path("/sys/fs/bpf")
    if not os.path.ismount(root):
        done = subprocess.run(["mount", "-t", "bpf", "bpf", str(root)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProgramError(
                f"no bpffs at {root} and none can be mounted ({done.stderr.strip()}): mount -t bpf bpf {root}"
            )
        (root / MADE).mkdir()
    pins.mkdir(mode=0o700, parents=True, exist_ok=True)


def unmount_made() -> None:
    """Takes away the bpffs that we mounted, if nobody else has pinned anything there."""
    root = Path("/sys/fs/bpf")
    if not (root / MADE).is_dir():
        return
    (root / MADE).rmdir()
    if not any(not entry.name.endswith("debug") for entry in root.iterdir()):  # the kernel's own: progs, maps
        subprocess.run(["umount", str(root)], capture_output=True, check=False)


def check_loader(loader: Sequence[str]) -> Check:
    """The loader's interpreter sees the distribution's BCC."""
    question = "import bcc; print(bcc.__version__ if hasattr(bcc, 'BPF') else 'wrong ' + str(bcc.__file__))"
    mend = "apt-get install python3-bpfcc (Debian, Ubuntu), python3-bcc (Fedora)"
    try:
        done = subprocess.run([*loader, "-c", question], capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        return Check(
            "bcc", False, f"cannot run {loader[0]}: {error.strerror}", "name the system's Python with --loader"
        )
    said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    if done.returncode:
        return Check("bcc", False, f"{loader[0]} sees no BCC ({said})", mend)
    if said.startswith("wrong"):
        return Check("bcc", False, f"{said[6:]} is not BPF's bcc", f"pip uninstall bcc; {mend}")
    return Check("bcc", True, said)
