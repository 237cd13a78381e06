"""The BPF programs in the kernel: compiled, loaded and pinned, unless exactly these programs are pinned.

Compiling needs BCC and takes seconds. The output is kept in CACHE for the next start on this kernel, for example after
a boot. This module runs in the agent's main thread at its start, in `fgpu load` and in `fgpu doctor`. The text of a
ProgramError names the fix. After an error, the programs that were pinned before stay in force.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fgpu_ebpf.check import Check
from fgpu_ebpf.driver import image
from fgpu_ebpf.driver.image import ProgramError
from fgpu_ebpf.linux import atomic_file, sd_notify

log = logging.getLogger("fgpu.agent")
MADE = "fgpu-mounted-this"  # a folder that marks a bpffs that an agent has mounted
LOADER = ("/usr/bin/python3", "-I")
COMPILER_FILE = Path(__file__).with_name("compiler.py")
CACHE = Path("/var/cache/fgpu")
MOST_CACHED = 4
SOON_SECONDS, COMPILER_SECONDS = 0.5, 60


def sources_digest(sources: Path) -> str:
    """Return eight hex digits that change with the sources of the programs and of the compiler."""
    digest = hashlib.sha256()
    for path in [*sorted(sources.glob("*.[ch]")), COMPILER_FILE]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class Loading:
    """The compiler in a process of its own, unless exactly these programs are pinned or cached.

    The constructor and wait() raise ProgramError.
    """

    def __init__(self, sources: Path, pins: Path, loader: Sequence[str] = LOADER, cache: Path = CACHE) -> None:
        self._digest, self._pins = sources_digest(sources), pins
        self._stamp = pins / f"loaded-{self._digest}"
        self._child: subprocess.Popen[str] | None = None
        self._image: image.Image | None = None
        self.begun = not self._stamp.is_dir()
        """True if exactly these programs were not pinned, for example at the first start since the host's boot."""
        if self.begun:
            mount_bpffs(pins)
            kernel = os.uname()
            parts = [self._digest, *loader, kernel.release, kernel.version, kernel.machine]
            self._file = cache / f"programs-{_sha256(repr(parts))[:16]}"
            self._image = _read(self._file)
            if not self._image:
                self._child = _start_compiler([*loader, str(COMPILER_FILE), str(sources)])

    def wait(self) -> str:
        """Wait until the programs are pinned, and return their digest. A ProgramError has the compiler's error line."""
        if not self.begun:
            return self._digest
        if self._child:
            self._image = self._compiled(self._child)
        assert self._image
        for old in self._pins.glob("loaded-*"):  # before the first program is replaced
            old.rmdir()
        image.load(self._image, self._pins)
        self._stamp.mkdir()
        return self._digest

    def _compiled(self, child: subprocess.Popen[str]) -> image.Image:
        try:
            output, errors = self._output(child)
        except subprocess.TimeoutExpired as error:
            raise ProgramError(f"the compiler did not finish within {COMPILER_SECONDS} s") from error
        if child.returncode:
            lines = (errors.strip() or f"the compiler exited with {child.returncode}").splitlines()
            raise ProgramError(lines[-1].removeprefix("fgpu compiler: "))
        try:
            found = image.parsed(output)
        except ValueError as error:
            raise ProgramError(f"the compiler printed invalid output ({error})") from error
        _write(self._file, output)
        return found

    def _output(self, child: subprocess.Popen[str]) -> tuple[str, str]:
        try:
            return child.communicate(timeout=SOON_SECONDS)
        except subprocess.TimeoutExpired:  # an early error would have ended the compiler by now
            sd_notify.tell("STATUS=compiling the BPF programs")
            if os.isatty(sys.stderr.fileno()):  # a log contains errors, not progress
                log.info("compiling the BPF programs: this takes a few seconds, once for each kernel")
            return child.communicate(timeout=COMPILER_SECONDS)

    def end(self) -> None:
        """Kill the compiler if the compiler is still running."""
        if self._child and self._child.poll() is None:
            self._child.kill()
            self._child.communicate()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path) -> image.Image | None:
    """Return the image in a file of the cache; None: the file does not exist or is damaged."""
    try:
        digest, _, text = file.read_text(encoding="ascii").partition("\n")
        os.utime(file)  # _write() removes the files that were not used for the longest time
        return image.parsed(text) if digest == _sha256(text) else None
    except (OSError, ValueError):
        return None


def _write(file: Path, text: str) -> None:
    """Write an image to the cache, and keep only the MOST_CACHED images that were used last.

    Errors are ignored: the next start compiles again.
    """
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_file.write(file, f"{_sha256(text)}\n{text}")
        by_age = sorted(file.parent.glob("programs-*"), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-MOST_CACHED]:
            old.unlink()


def _start_compiler(command: Sequence[str]) -> subprocess.Popen[str]:
    environment, pipe = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}, subprocess.PIPE
    try:
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    except OSError as error:
        raise ProgramError(
            f"cannot run the compiler {command[0]} ({error.strerror}): name the system's Python with --loader"
        ) from error


def load(sources: Path, pins: Path, loader: Sequence[str] = LOADER, cache: Path = CACHE) -> str:
    """Pin the programs unless exactly these programs are pinned, and return their digest.

    Raise ProgramError on failure.
    """
    loading = Loading(sources, pins, loader, cache)
    try:
        return loading.wait()
    finally:
        loading.end()


def mount_bpffs(pins: Path) -> None:
    """Mount a bpffs at /sys/fs/bpf if none is mounted, and create the folder `pins`. Raise ProgramError on failure."""
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
    """Unmount the bpffs that an agent has mounted, unless another program has pinned an object in this bpffs."""
    root = Path("/sys/fs/bpf")
    if not (root / MADE).is_dir():
        return
    (root / MADE).rmdir()
    # The kernel itself has put progs.debug and maps.debug into the bpffs.
    if not any(not entry.name.endswith("debug") for entry in root.iterdir()):
        subprocess.run(["umount", str(root)], capture_output=True, check=False)


def check_loader(loader: Sequence[str]) -> Check:
    """Return the finding for `fgpu doctor`: whether the loader's interpreter has the distribution's BCC."""
    question = "import bcc; print(bcc.__version__ if hasattr(bcc, 'BPF') else 'wrong ' + str(bcc.__file__))"
    fix = "apt-get install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora)"
    try:
        done = subprocess.run([*loader, "-c", question], capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        return Check(
            "bcc", False, f"cannot run {loader[0]}: {error.strerror}", "name the system's Python with --loader"
        )
    output = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    if done.returncode:
        return Check("bcc", False, f"{loader[0]} cannot import BCC ({output})", fix)
    if output.startswith("wrong"):
        return Check("bcc", False, f"{output[6:]} is not the BPF Compiler Collection", f"pip uninstall bcc; {fix}")
    return Check("bcc", True, output)
