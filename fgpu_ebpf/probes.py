"""Finds libcuda and shim files, and ties the pinned programs to them.

Owns: the links under PINS/links and the map `files`. Never: compiles (the loader does), or asks who maps a file for
anything but its place. On failure: ProbeError with the mend; a file that cannot be probed is not entered in `files`,
so its processes get no answer to their hello and no memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import bpf, procfs
from fgpu_ebpf.checks import Check
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.pages import Function

LOADER = ("/usr/bin/python3", "-I")
SHIM = {"fgpu_admit": "admit", "fgpu_release": "give_back"}
REQUIRED = {
    "cuMemAlloc_v2": Function.ALLOC,
    "cuMemFree_v2": Function.FREE,
    "cuMemCreate": Function.CREATE,
    "cuMemMap": Function.MAP,
    "cuMemUnmap": Function.UNMAP,
    "cuMemRelease": Function.RELEASE,
    "cuDevicePrimaryCtxRetain": Function.RETAIN,
    "cuDevicePrimaryCtxRelease_v2": Function.PRIMARY_RELEASE,
    "cuCtxCreate_v2": Function.CONTEXT_V2,
    "cuCtxDestroy_v2": Function.DESTROY,
}
OPTIONAL = {
    "cuMemAllocManaged": Function.ALLOC_MANAGED,
    "cuMemAllocPitch_v2": Function.ALLOC_PITCH,
    "cuMemRetainAllocationHandle": Function.RETAIN_HANDLE,
    "cuDevicePrimaryCtxReset_v2": Function.PRIMARY_RESET,
    "cuCtxCreate_v3": Function.CONTEXT_V3,
    "cuCtxCreate_v4": Function.CONTEXT_V4,
    "cuArrayCreate_v2": Function.ARRAY,
    "cuArray3DCreate_v2": Function.ARRAY_3D,
    "cuMipmappedArrayCreate": Function.ARRAY_MIPMAPPED,
    "cuArrayDestroy": Function.ARRAY_DESTROY,
    "cuMipmappedArrayDestroy": Function.ARRAY_DESTROY,
}
TRACEPOINTS = {"process_exit": "sched_process_exit", "process_exec": "sched_process_exec"}
LIBRARY_FOLDERS = (
    "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64", "lib", ".",
    "usr/local/nvidia/lib64", "usr/local/nvidia/lib", "usr/lib/wsl/lib", "usr/local/cuda/compat",
)  # fmt: skip
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_URETPROBE_CALL, _ALLOW, _ERRNO_EPERM = 335, 0x7FFF0000, 0x00050001


class ProbeError(Exception):
    """What cannot be probed, and what mends it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A file to probe: `path` opens it from here; (dev, ino) is how /proc/PID/maps names it."""

    path: str
    dev: int
    ino: int
    pinned: bool

    @classmethod
    def of(cls, path: str) -> Target:
        """A file of the host's own."""
        stat = os.stat(path)
        return cls(os.path.realpath(path), stat.st_dev, stat.st_ino, True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a file a probe sits; `function` is what its program is told."""

    symbol: str
    offset: int
    at_return: bool = False
    function: Function = Function.NONE


# -- finding -------------------------------------------------------------------------------------------------------


def driver_libraries(root: Path, name: str) -> list[Path]:
    """Every file of this name in a driver root's library folders, each once; the loader's cache comes first for /."""
    candidates = [root / folder / name for folder in LIBRARY_FOLDERS]
    if root == Path("/"):
        candidates = _cached_libraries(name) + candidates
    found: dict[Path, None] = {}
    for path in candidates:
        with contextlib.suppress(OSError):
            found.setdefault(path.resolve(strict=True))
    return list(found)


def _cached_libraries(name: str) -> list[Path]:
    command = ["/sbin/ldconfig", "-p"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False, env={})
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [Path(line.split(" => ")[1]) for line in done.stdout.splitlines() if line.split(" ")[0].strip() == name]


def mapped_targets(pids: Iterable[int], known: Set[tuple[int, int]]) -> Iterator[Target]:
    """The libcuda and shim files that these processes map and that are not known yet, each once."""
    seen = set(known)
    for pid in pids:
        for mapped in procfs.fgpu_mappings(pid) or ():
            if (mapped.dev, mapped.ino) in seen:
                continue
            seen.add((mapped.dev, mapped.ino))
            with contextlib.suppress(OSError):
                yield _target_of(pid, mapped)


def _target_of(pid: int, mapped: procfs.Mapping) -> Target:
    with contextlib.suppress(OSError):
        stat = os.stat(mapped.path)
        if (stat.st_dev, stat.st_ino) == (mapped.dev, mapped.ino):
            return Target(mapped.path, mapped.dev, mapped.ino, True)
    inside = f"/proc/{pid}/root{mapped.path}"
    os.stat(inside)
    return Target(inside, mapped.dev, mapped.ino, False)  # a container's own layer: a pin would keep its mount busy


# -- offsets -------------------------------------------------------------------------------------------------------


def symbol_offsets(path: str, names: Iterable[str]) -> dict[str, int]:
    """File offsets of a library's exported functions, those that it has. ProbeError: not an ELF library."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    wanted, found = set(names), {}
    try:
        with open(path, "rb") as file:
            elf = ELFFile(file)
            table = elf.get_section_by_name(".dynsym")
            if not isinstance(table, SymbolTableSection):
                raise ProbeError(f"{path} has no dynamic symbols: is it a driver library?")
            for symbol in table.iter_symbols():
                if symbol.name in wanted and symbol["st_value"]:
                    found[symbol.name] = next(elf.address_offsets(symbol["st_value"]))
    except ELFError as error:
        raise ProbeError(f"{path} is no ELF library ({error})") from error
    return found


@functools.lru_cache(maxsize=64)
def _offsets(path: str, dev: int, ino: int) -> dict[str, int]:
    return symbol_offsets(path, [*SHIM, *REQUIRED, *OPTIONAL])


def missing_functions(path: str) -> list[str]:
    """What a driver library would need and lacks."""
    try:
        return sorted(set(REQUIRED) - set(symbol_offsets(path, REQUIRED)))
    except ProbeError as error:
        return [str(error)]


# -- loading -------------------------------------------------------------------------------------------------------


def sources_digest(sources: Path) -> str:
    """Eight hex digits that change with the programs."""
    digest = hashlib.sha256()
    for name in ("fgpu.h", "fgpu.bpf.c"):
        digest.update((sources / name).read_bytes())
    return digest.hexdigest()[:8]


def load(sources: Path, pins: Path, loader: Sequence[str] = LOADER) -> str:
    """Pins the programs unless these very ones are pinned; answers their digest.

    Raises ProbeError with the loader's own line.
    """
    digest = sources_digest(sources)
    stamp = pins / f"loaded-{digest}"
    if stamp.is_dir():
        return digest
    _mount_bpffs(pins)
    script = Path(__file__).with_name("loader.py")
    command, environment = [*loader, str(script), str(sources), str(pins)], {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    except OSError as error:
        raise ProbeError(
            f"cannot run the loader {loader[0]} ({error.strerror}): name the system's Python with --loader"
        ) from error
    if done.returncode:
        said = (done.stderr.strip() or f"the loader ended with {done.returncode}").splitlines()[-1]
        raise ProbeError(said.removeprefix("fgpu loader: "))
    for old in pins.glob("loaded-*"):
        old.rmdir()
    stamp.mkdir()
    return digest


def _mount_bpffs(pins: Path) -> None:
    root = Path("/sys/fs/bpf")
    if not os.path.ismount(root):
        done = subprocess.run(["mount", "-t", "bpf", "bpf", str(root)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProbeError(
                f"no bpffs at {root} and none can be mounted ({done.stderr.strip()}): mount -t bpf bpf {root}"
            )
    pins.mkdir(mode=0o700, parents=True, exist_ok=True)


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


# -- attaching -----------------------------------------------------------------------------------------------------


class Probes:
    """The links of one set of programs."""

    def __init__(self, pins: Path, digest: str, ledger: Ledger) -> None:
        self._programs = pins / "programs"
        self._links = pins / "links"
        self._digest = digest
        self._ledger = ledger
        self._held: dict[tuple[int, int], list[int]] = {}
        self._links.mkdir(mode=0o700, exist_ok=True)
        self._known = self._pinned_files()

    def _pinned_files(self) -> set[tuple[int, int]]:
        """The files whose links survived an earlier agent; all others are forgotten."""
        files = {tuple(int(n, 16) for n in p.name.split("-")[1:3]) for p in self._links.glob(f"{self._digest}-*-*-end")}
        self._ledger.forget_files()
        for dev, ino in files:
            self._ledger.enter_file(dev, ino)
        return files  # type: ignore[return-value]

    @property
    def known(self) -> frozenset[tuple[int, int]]:
        """(dev, ino) of every probed file."""
        return frozenset(self._known)

    def attach_process_ends(self) -> None:
        """Links the process events. ProbeError: this kernel does not say when a process is gone."""
        for program, event in TRACEPOINTS.items():
            path = self._links / f"{self._digest}-{program}"
            if path.exists():
                continue
            fd = bpf.pinned(self._programs / program)
            try:
                link = bpf.attach_raw_tracepoint(fd, event)
            except OSError as error:
                raise ProbeError(
                    f"this kernel's {event} does not tell a process's end (Linux >= 6.16 does): {error}"
                ) from error
            finally:
                os.close(fd)
            bpf.pin(link, path)
            os.close(link)

    def attach(self, target: Target) -> None:
        """Probes a libcuda or shim file and enters it in `files`. ProbeError: it lacks a function that must be seen."""
        if (target.dev, target.ino) in self._known:
            return
        offsets = _offsets(target.path, target.dev, target.ino)
        if "fgpu_admit" in offsets:  # it exports the driver's names too: those are not the driver
            self._attach_shim(target, offsets)
        else:
            self._attach_driver(target, offsets)
        if target.pinned:
            (self._links / f"{self._digest}-{target.dev:x}-{target.ino:x}-end").mkdir(exist_ok=True)
        self._known.add((target.dev, target.ino))
        self._ledger.enter_file(target.dev, target.ino)

    def _attach_shim(self, target: Target, offsets: Mapping[str, int]) -> None:
        _need(target, SHIM, offsets)
        for symbol, program in SHIM.items():
            self._link(target, Place(symbol, offsets[symbol]), program)

    def _attach_driver(self, target: Target, offsets: Mapping[str, int]) -> None:
        _need(target, REQUIRED, offsets)
        for symbol, function in (REQUIRED | OPTIONAL).items():
            if symbol in offsets:
                # The return first: an entry seen without its return would stay in flight.
                self._link(target, Place(symbol, offsets[symbol], True, function), "call_return")
                self._link(target, Place(symbol, offsets[symbol], False, function), "call_enter")

    def _link(self, target: Target, place: Place, program: str) -> None:
        name = f"{self._digest}-{target.dev:x}-{target.ino:x}-{place.symbol}-{'r' if place.at_return else 'e'}"
        path = self._links / name
        if target.pinned and path.exists():
            return
        fd = bpf.pinned(self._programs / program)
        event = -1
        try:
            event = bpf.open_uprobe(target.path, place.offset, place.at_return)
            link = bpf.attach_perf_event(fd, event, place.function)
        except OSError as error:
            raise ProbeError(f"cannot probe {place.symbol} in {target.path}: {error.strerror}") from error
        finally:
            os.close(fd)
            if event >= 0:
                os.close(event)
        if target.pinned:
            bpf.pin(link, path)
            os.close(link)
        else:
            self._held.setdefault((target.dev, target.ino), []).append(link)

    def drop_older(self) -> None:
        """Takes away the links of earlier programs; these ones see everything already."""
        remove_links(path for path in self._links.iterdir() if not path.name.startswith(self._digest))

    def drop_unused(self, used: set[tuple[int, int]]) -> None:
        """Takes away the links to files that nobody can be using any more."""
        for dev, ino in self._known - used:
            remove_links(self._links.glob(f"{self._digest}-{dev:x}-{ino:x}-*"))
            self._ledger.forget_file(dev, ino)
            self._known.discard((dev, ino))


def _need(target: Target, wanted: Iterable[str], offsets: Mapping[str, int]) -> None:
    missing = sorted(set(wanted) - set(offsets))
    if missing:
        raise ProbeError(f"{target.path} lacks {', '.join(missing)}: no driver that fgpu knows")


def remove_links(paths: Iterable[Path]) -> None:
    """Unpins; the kernel detaches, 0.1 s a probe, aside."""
    for path in list(paths):
        path.rmdir() if path.is_dir() else path.unlink()


def detach(pins: Path) -> None:
    """Takes away everything that is pinned."""
    for folder in (pins / "links", pins / "programs", pins / "maps"):
        if folder.is_dir():
            remove_links(folder.iterdir())
            folder.rmdir()
    for stamp in pins.glob("loaded-*"):
        stamp.rmdir()
    if pins.is_dir():
        pins.rmdir()


# -- the trial -----------------------------------------------------------------------------------------------------

# Denies one system call, as Docker's profile does what it does not know, and calls a probed function.
_TRIAL = f"""
import ctypes, struct, sys
libc = ctypes.CDLL(None)
code = struct.pack("HBBI", 0x20, 0, 0, 0) + struct.pack("HBBI", 0x15, 0, 1, int(sys.argv[2]))
code += struct.pack("HBBI", 6, 0, 0, {_ERRNO_EPERM}) + struct.pack("HBBI", 6, 0, 0, {_ALLOW})
program = ctypes.create_string_buffer(code)
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(program)))
shim = ctypes.CDLL(sys.argv[1])
libc.prctl({_PR_SET_NO_NEW_PRIVS}, 1, 0, 0, 0)
libc.prctl({_PR_SET_SECCOMP}, {_SECCOMP_MODE_FILTER}, filter, 0, 0)
shim.fgpu_release(0, 0, 0, 0)
"""


def return_probes_survive_seccomp(shim: str, denied: int = _URETPROBE_CALL) -> bool:
    """Whether a process under Docker's seccomp profile outlives a return probe.

    From Linux 6.11 to early 6.13 the trampoline is a system call that the profile refuses, and the process dies.
    """
    event = bpf.open_uprobe(shim, symbol_offsets(shim, ["fgpu_release"])["fgpu_release"], True)
    try:
        done = subprocess.run([sys.executable, "-I", "-c", _TRIAL, shim], capture_output=True, timeout=30, check=False)
    finally:
        os.close(event)
    return done.returncode >= 0
