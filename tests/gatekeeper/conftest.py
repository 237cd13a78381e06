"""A real ledger with its own pins, its own cgroups, and a real gatekeeper in its own folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fgpu_ebpf.driver import programs
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.level_limits import LevelLimits
from fgpu_ebpf.linux import procfs
from tests.gatekeeper.hello_client import until
from tests.support.wait import remove_cgroup

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
UUIDS = [bytes(range(start, start + 16)) for start in (0, 100)]
numbers = itertools.count(1)
PATIENT = """
import sys
from fgpu_ebpf.gatekeeper import connections, main as gatekeeper
connections.PATIENCE_NS *= 60
sys.exit(gatekeeper.main())
"""  # keeps a connection for a minute, so a test that has no processor for seconds is still in time


class Keeper:
    """A running gatekeeper."""

    def __init__(self, pins: Path, run: Path | None = None, code: str | None = None, stderr: Any = None) -> None:
        self.run = run or Path(tempfile.mkdtemp(prefix="gk-", dir="/tmp"))
        self.run.chmod(0o755)
        read, write = os.pipe()
        what = ["-c", code] if code else ["-m", "fgpu_ebpf.gatekeeper"]
        command = [sys.executable, *what, "--pins", pins, "--run-dir", self.run, "--ready-fd", str(write)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.log = self.run / "log"
        with self.log.open("ab") as log:
            err = stderr or log
            self.process = subprocess.Popen(command, env=environment, pass_fds=[write], stderr=err, cwd="/")
        os.close(write)
        self.ready = os.read(read, 1) == b"1"
        os.close(read)

    def counts(self) -> dict[str, int]:
        return dict(json.loads((self.run / "gatekeeper.json").read_text()))

    def count(self, name: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self.counts()[name]
        return 0

    def grows(self, name: str, by: int = 1, patience: float = 3.0) -> Callable[[], None]:
        """Return a function that waits until the count has grown by at least `by` since this call.

        The function fails after `patience` seconds.
        """
        before = self.count(name)
        return lambda: until(lambda: self.count(name) >= before + by, patience)

    def resident_kib(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(30)
        shutil.rmtree(self.run, ignore_errors=True)
        return code


@pytest.fixture(scope="session")
def pins() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root: BPF and cgroups")
    # The children of this process register. They wait if they have a driver without probes.
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if re.search(r"lib(cuda|fgpu)\.so", line)
    ]
    assert mapped == [], "another test has loaded a driver into this process, and did not unload it"
    base = Path(f"/sys/fs/bpf/fgpu-gatekeeper-test-{os.getpid()}")
    try:
        programs.load(ROOT / "bpf", base)
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def ledger(pins: Path) -> Iterator[Ledger]:
    ledger = Ledger(pins)
    for index, uuid in enumerate(UUIDS):
        ledger.set_device(index, uuid)
    yield ledger
    ledger.close()


@pytest.fixture(scope="session")
def cgroup_base() -> Iterator[Path]:
    root = procfs.cgroup2_root()
    assert root is not None
    base = root / f"fgpu-gatekeeper-test-{os.getpid()}"
    base.mkdir()
    yield base
    for path in sorted(base.rglob("*"), key=lambda p: -len(p.parts)):
        if path.is_dir():
            remove_cgroup(path)
    remove_cgroup(base)


@pytest.fixture
def cgroup(cgroup_base: Path) -> Callable[..., Path]:
    """Return a function that creates a cgroup, below the tests' own or below another."""

    def make(parent: Path | None = None) -> Path:
        path = (parent or cgroup_base) / f"c{next(numbers)}"
        path.mkdir()
        return path

    return make


@pytest.fixture
def tenant(ledger: Ledger, cgroup: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that creates a managed cgroup with 1 GiB of device 0."""

    def make(parent: Path | None = None, limits: dict[int, int] | None = None) -> Path:
        path = cgroup(parent)
        ledger.set_limits([LevelLimits(path.stat().st_ino, limits or {0: GIB})])
        ledger.resolve(path.stat().st_ino, managed=True)
        return path

    return make


@pytest.fixture
def unmanaged(ledger: Ledger, cgroup: Callable[..., Path]) -> Path:
    path = cgroup()
    ledger.resolve(path.stat().st_ino, managed=False)
    return path


@pytest.fixture(scope="module")
def keeper(pins: Path, ledger: Ledger) -> Iterator[Keeper]:
    """Run a gatekeeper that the tests of one file share. At the end it must still run, and exit at once on request."""
    keeper = Keeper(pins)
    assert keeper.ready, keeper.log.read_text()
    yield keeper
    assert keeper.process.poll() is None, keeper.log.read_text()
    log = keeper.log.read_text()
    assert "Traceback" not in log, log
    assert keeper.stop() == 0


@pytest.fixture(scope="module")
def patient(pins: Path, ledger: Ledger) -> Iterator[Keeper]:
    """Run a gatekeeper that keeps connections for a minute. The tests of one file share it."""
    keeper = Keeper(pins, code=PATIENT)
    assert keeper.ready, keeper.log.read_text()
    yield keeper
    assert keeper.process.poll() is None, keeper.log.read_text()
    assert keeper.stop() == 0


@pytest.fixture
def start(pins: Path) -> Iterator[Callable[..., Keeper]]:
    """Return a function that starts a further gatekeeper."""
    started: list[Keeper] = []

    def begin(**changes: Any) -> Keeper:
        started.append(Keeper(**{"pins": pins, **changes}))
        return started[-1]

    yield begin
    for keeper in started:
        if keeper.process.poll() is None:
            keeper.stop()
        shutil.rmtree(keeper.run, ignore_errors=True)
