"""A separate ledger in this kernel, with real programs, real uprobes and real cgroups. There is no agent and no GPU."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.driver import attach, programs
from fgpu_ebpf.driver.library_class import Role
from fgpu_ebpf.driver.library_files import Target
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.level_limits import LevelLimits
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.usage_pages import Usage
from fgpu_ebpf.linux import bpf, procfs
from tests.bpf.spaces_kit import Child
from tests.support.wait import eventually, remove_cgroup

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
MIB = 1 << 20
CONTEXT = 518 * MIB
SECONDS = 5.0
GONE_SECONDS = 60.0  # time for thousands of killed processes to leave a cgroup


@dataclass
class Kernel:
    """Programs that are pinned, and attached to the tests' driver library and to the shim.

    `unknown` is a copy of the driver library that is not trusted.
    """

    ledger: Ledger
    pins: Path
    driver: Path
    shim: Path
    root: Path
    probes: attach.Probes
    unknown: Path


def pins_of(folder: Path) -> Path:
    """Return the folder in which `loaded` pins its objects for a folder."""
    return Path(f"/sys/fs/bpf/fgpu-test-{os.getpid()}-{folder.name}")


@contextlib.contextmanager
def loaded(folder: Path, sources: Path, shim: Path) -> Iterator[Kernel]:
    """Yield the programs of `sources`, attached to a separate driver in `folder` and to that shim."""
    driver = folder / "libcuda.so.1"
    flags = ["-O1", "-shared", "-fPIC", "-w", "-fno-omit-frame-pointer", "-fcf-protection=none", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", str(driver), str(HERE / "driver.c")], check=True)
    pins = pins_of(folder)
    try:
        digest = programs.load(sources, pins)
        ledger = Ledger(pins)
        ledger.set_device(0, bytes(range(16)))
        ledger.set_context_bytes(0, 0)
        attached = attach.Probes(pins, digest, ledger)
        attached.attach_process_ends()
        unknown = folder / "unknown" / driver.name
        unknown.parent.mkdir()
        shutil.copy(driver, unknown)
        for path, role in ((driver, Role.HOST), (unknown, Role.UNKNOWN), (shim, Role.SHIM)):
            attached.attach(Target.of(str(path)), role)
        root = procfs.cgroup2_root()
        assert root is not None
        yield Kernel(ledger, pins, driver, shim, root, attached, unknown)
    finally:
        attach.detach(pins)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("bpf")
    shim = Path(
        shutil.copy(REPOSITORY / "build/shim/libfgpu.so", folder)
    )  # an agent of another suite probes the original
    with loaded(folder, REPOSITORY / "bpf", shim) as kernel:
        yield kernel


@pytest.fixture
def context_bytes(kernel: Kernel) -> Iterator[int]:
    """Let contexts of the first device have a size. In other tests, programs allocate without creating a context, and
    the context that the kernel then counts has no bytes.
    """
    kernel.ledger.set_context_bytes(0, CONTEXT)
    yield CONTEXT
    kernel.ledger.set_context_bytes(0, 0)


def forget_empty(kernel: Kernel) -> None:
    """Delete the entries of exited processes without orphaned bytes, as the agent does."""
    living = {(tgid, process.generation) for tgid, process in kernel.ledger.processes().items()}
    kernel.ledger.orphans.forget_empty(living)


class Level:
    """A cgroup with a limit."""

    _numbers = itertools.count()

    def __init__(self, kernel: Kernel, limit: int | None, parent: Path | None = None) -> None:
        self.kernel = kernel
        self.path = (parent or kernel.root) / f"fgpu-bpf-{os.getpid()}-{next(self._numbers)}"
        self.path.mkdir()
        self.cgroup = self.path.stat().st_ino
        if limit is not None:
            self.limit(limit)

    def limit(self, bytes_: int, flags: int = 0, uncommitted: bool = False, devices: tuple[int, ...] = (0,)) -> None:
        limits, first = dict.fromkeys(devices, bytes_), frozenset({0} if uncommitted else ())
        self.kernel.ledger.set_limits([LevelLimits(self.cgroup, limits, flags, uncommitted=first)])

    def usage(self) -> Usage:
        usage = self.kernel.ledger.usage(self.cgroup)
        assert usage is not None
        return usage[0]

    @property
    def used(self) -> int:
        """Return all charged bytes."""
        return self.usage().used

    @property
    def orphaned(self) -> int:
        """Return the charged bytes of processes that have exited, or that have exported and freed them."""
        return self.usage().orphaned

    @property
    def held(self) -> int:
        """Return the charged bytes of living processes."""
        usage = self.usage()
        return usage.used - usage.orphaned

    def orphans(self) -> list[Orphan]:
        """Return the entries of the map `orphans` that this level is charged for, the oldest first."""
        found = [orphan for orphan in self.kernel.ledger.orphans.entries() if self.cgroup in orphan.levels]
        return sorted(found, key=lambda orphan: orphan.since_ns)

    def let_go(self) -> int:
        """Release all orphans of the level, as the agent does when the device holds nothing of them.

        Return their bytes.
        """
        orphans = self.orphans()
        for orphan in orphans:
            assert self.kernel.ledger.orphans.let_go(orphan, orphan.bytes)
        forget_empty(self.kernel)
        return sum(orphan.bytes for orphan in orphans)

    def remove(self) -> None:
        remove_cgroup(self.path, GONE_SECONDS)
        self.let_go()
        self.kernel.ledger.remove([self.cgroup])


class Client:
    """A process in a level. call() runs a line of Python in the process."""

    def __init__(self, kernel: Kernel, level: Level, page_of: Level | None = None, later: Sequence[Level] = ()) -> None:
        """Start the process.

        `page_of` is the level whose page the process reads, if not its own. `later` are levels whose pages it may read
        later.
        """
        found = {of.cgroup: kernel.ledger.page_fd(of.cgroup) for of in (page_of or level, *later)}
        self.pages = {cgroup: fd for cgroup, fd in found.items() if fd is not None}
        keep = tuple(self.pages.values())
        command = [sys.executable, str(HERE / "client.py"), str(kernel.driver), str(kernel.shim)]
        enter = lambda: (level.path / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=keep, preexec_fn=enter)
        self.pid = self.process.pid
        for fd in keep:
            os.close(fd)  # the process keeps its own descriptor
        self.begin((page_of or level).cgroup)

    def begin(self, cgroup: int) -> None:
        """Start the process in the cgroup, for the first time or after an exec."""
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"
        if cgroup in self.pages:
            self(f"use_page({self.pages[cgroup]})")

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def __call__(self, line: str) -> Any:
        self.send(line)
        assert self.process.stdout
        answer = self.process.stdout.readline()
        assert answer, f"the client died in {line!r}"
        return ast.literal_eval(answer)

    def entry(self, kernel: Kernel) -> Any:
        return kernel.ledger.process(self.pid)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(GONE_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


@pytest.fixture
def make_level(kernel: Kernel) -> Iterator[Callable[..., Level]]:
    made: list[Level] = []

    def make(limit: int | None, parent: Level | None = None) -> Level:
        made.append(Level(kernel, limit, parent.path if parent else None))
        return made[-1]

    yield make
    for level in reversed(made):
        level.remove()


@pytest.fixture
def make_client(kernel: Kernel, make_level: Callable[..., Level]) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(level: Level, page_of: Level | None = None) -> Client:
        made.append(Client(kernel, level, page_of))
        return made[-1]

    yield make
    for client in made:
        client.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def start(client: Client, flags: int, bytes_: int = 4 * MIB) -> Child:
        made.append(Child(client, tmp_path / f"orders{len(made)}", flags, bytes_))
        return made[-1]

    yield start
    for child in made:
        child.close()


@pytest.fixture
def level(make_level: Callable[..., Level]) -> Level:
    return make_level(1024 * MIB)


@pytest.fixture
def client(make_client: Callable[..., Client], level: Level) -> Client:
    return make_client(level)


def assert_left(level: Level, bytes_: int) -> None:
    """Check that exited processes of the level held these bytes, which stay charged until they are released."""
    wait_until(lambda: level.held == 0)
    assert (level.used, level.orphaned) == (bytes_, bytes_)
    assert level.let_go() == bytes_
    assert (level.used, level.orphaned) == (0, 0)


def leave_levels(kernel: Kernel, client: Client) -> None:
    """Move a process out of all levels, and finish the move, as the agent does."""
    generation = client.entry(kernel).generation
    assert kernel.ledger.move(client.pid, generation, ())
    wait_until(lambda: kernel.ledger.finish_move(client.pid, generation) and client.entry(kernel) is None)


def assert_corrected(kernel: Kernel, client: Client, overhead: int) -> None:
    """Set the overhead of a quiet process to these bytes, as after a reading of NVML. The kernel must accept it."""
    process = client.entry(kernel)
    assert kernel.ledger.overhead(client.pid, process.generation, 0, overhead, process.changes)


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    eventually(condition, seconds, pause=0.001)


def page_of(kernel: Kernel, level: Level) -> abi.UsagePage:
    """Return the level's usage page in its current state."""
    fd = kernel.ledger.page_fd(level.cgroup)
    assert fd is not None
    raw = bpf.lookup(fd, bytes(4), abi.PAGE_BYTES)
    os.close(fd)
    return abi.UsagePage.from_buffer_copy(raw or b"")


def entries(kernel: Kernel, level: Level, shared: abi.Shared = abi.Shared.ALLOCATIONS) -> int:
    return page_of(kernel, level).entries[shared]


def anomalies(kernel: Kernel) -> dict[str, int]:
    counts = {c.reason: n for c, n in kernel.ledger.counters().items() if c.kind == abi.Kind.KINDS}
    return {a.name: counts.get(a, 0) for a in abi.Anomaly}


@pytest.fixture(scope="session")
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attacker") / "attacker"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{REPOSITORY}/bpf"]
    subprocess.run(["gcc", *flags, "-o", out, HERE / "attacker.c", "-ldl"], check=True)
    return out


@pytest.fixture
def attack(kernel: Kernel, attacker: Path) -> Iterator[Callable[..., int]]:
    """Yield a function that starts an attacker in a level, and returns the number that the attacker prints.

    The attacker exits at the end of the test.
    """
    started = []

    def run(level: Level, way: str, times: int, seed: int = 1) -> int:
        page = kernel.ledger.page_fd(level.cgroup)
        command = [attacker, kernel.driver, kernel.shim, str(page), way, str(times), str(seed)]
        enter = lambda: (level.path / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=[page], preexec_fn=enter)
        os.close(page)
        started.append(child)
        said = child.stdout.readline()
        assert said, f"the attacker ended with {child.wait()}"
        return int(said)

    yield run
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture
def events(kernel):
    reader = kernel.ledger.events()
    list(reader.read())
    yield reader
    reader.close()
