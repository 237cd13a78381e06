"""The BPF programs in the kernel: whether exactly these are pinned, and the loader process that pins them.

Used by the agent at its start and by `fgpu doctor`. ProgramError names the fix; what was pinned before stays in force.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fgpu_ebpf.check import Check
from fgpu_ebpf.linux import sd_notify

log = logging.getLogger("fgpu.agent")
MADE = "fgpu-mounted-this"  # a folder in a bpffs that an agent has mounted
LOADER = ("/usr/bin/python3", "-I")
LOADER_FILE = Path(__file__).with_name("loader.py")
SOON_SECONDS, LOADER_SECONDS = 0.5, 60


class ProgramError(Exception):
    """Programs cannot be loaded; the text names the fix."""


def sources_digest(sources: Path) -> str:
    """Return eight hex digits that change with the programs, and with how they are compiled."""
    digest = hashlib.sha256()
    for path in [*sorted(sources.glob("*.[ch]")), LOADER_FILE]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class Loading:
    """The loader in a process of its own; it is not started if exactly these programs are pinned already.

    The constructor and `wait` raise ProgramError.
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
        """True if the programs were not pinned, so that this is their first start since the host's."""
        return self._child is not None

    def wait(self) -> str:
        """Wait until the programs are pinned, and return their digest. ProgramError has the loader's own line."""
        if self._child is None:
            return self._digest
        try:
            output = self._output(self._child)
        except subprocess.TimeoutExpired as error:
            raise ProgramError(f"the loader does not end within {LOADER_SECONDS} s") from error
        if self._child.returncode:
            lines = (output.strip() or f"the loader exited with {self._child.returncode}").splitlines()
            raise ProgramError(lines[-1].removeprefix("fgpu loader: "))
        for old in self._stamp.parent.glob("loaded-*"):
            old.rmdir()
        self._stamp.mkdir()
        return self._digest

    def _output(self, child: subprocess.Popen[str]) -> str:
        try:
            return child.communicate(timeout=SOON_SECONDS)[1]
        except subprocess.TimeoutExpired:  # an error that shows at once has ended the loader by now
            sd_notify.tell("STATUS=compiles the kernel's programs")
            if os.isatty(sys.stderr.fileno()):  # a log gets errors, not progress
                log.info("compiling the kernel's programs: some seconds, once a boot")
            return child.communicate(timeout=LOADER_SECONDS)[1]

    def end(self) -> None:
        """Kill the loader if it still runs. What it has pinned is not used, since the completion stamp is missing."""
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
    """Pin the programs unless exactly these are pinned; return their digest. Raises ProgramError."""
    loading = Loading(sources, pins, loader)
    try:
        return loading.wait()
    finally:
        loading.end()


def mount_bpffs(pins: Path) -> None:
    """Mount a bpffs at its usual place if there is none, and create our folder in it. Raises ProgramError."""
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
    """Unmount the bpffs that we have mounted, if no other program has pinned anything there."""
    root = Path("/sys/fs/bpf")
    if not (root / MADE).is_dir():
        return
    (root / MADE).rmdir()
    if not any(not entry.name.endswith("debug") for entry in root.iterdir()):  # the kernel's own: progs, maps
        subprocess.run(["umount", str(root)], capture_output=True, check=False)


def check_loader(loader: Sequence[str]) -> Check:
    """Return the finding whether the loader's interpreter has the distribution's BCC."""
    question = "import bcc; print(bcc.__version__ if hasattr(bcc, 'BPF') else 'wrong ' + str(bcc.__file__))"
    fix = "apt-get install python3-bpfcc (Debian, Ubuntu), python3-bcc (Fedora)"
    try:
        done = subprocess.run([*loader, "-c", question], capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        return Check(
            "bcc", False, f"cannot run {loader[0]}: {error.strerror}", "name the system's Python with --loader"
        )
    output = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    if done.returncode:
        return Check("bcc", False, f"{loader[0]} finds no BCC ({output})", fix)
    if output.startswith("wrong"):
        return Check("bcc", False, f"{output[6:]} is not BPF's bcc", f"pip uninstall bcc; {fix}")
    return Check("bcc", True, output)
