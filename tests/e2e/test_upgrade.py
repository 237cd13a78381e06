"""Upgrades under load to a version with another shim, and sometimes other programs: no request that fits is refused.

An upgrade works as a package's does: gatekeeper and agent of the old version get SIGTERM, and those of the new version
start. Every version is a copy of the package with its own shim. Its BPF programs are compiled again if they differ.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import metrics
from tests.support.host import BUILD, CONTEXT, DRIVER_ROOT, GIB, LISTEN, MIB, ROOT, RUN_DIR, SHIM
from tests.support.service import Service
from tests.support.tenant import Client, Tenant, answered
from tests.support.wait import eventually

STEP = 2 * MIB
NEW_PROGRAMS = 4  # every fourth version has new programs
ABSENCE_SECONDS = 25  # a shim waits 30 s for memory of an exited process that no agent has examined
PYTHON = ROOT / ".venv/bin/python"
ANOMALIES = ("release", "full", "device", "lost", "bypass", "stale")


class Versions:
    """An installed fgpu, with one version after another: the package's folder, and the two services."""

    def __init__(self, service: Service, work: Path) -> None:
        self._service, self._store = service, work / "store"
        self._package = work / "site/fgpu_ebpf"
        shutil.copytree(ROOT / "fgpu_ebpf", self._package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "bpf", self._package / "bpf")
        shutil.copytree(BUILD / "oci", self._package / "oci")
        self._gatekeeper: subprocess.Popen[bytes] | None = None
        self.number = 0

    def install(self) -> float:
        """Install the next version's files and replace the running services. Return the seconds without an agent."""
        self.number += 1
        said = self._service.log.stat().st_size
        beside = self._package / ".libfgpu.so"
        beside.write_bytes(SHIM.read_bytes() + b"version %d" % self.number)
        beside.replace(self._package / "libfgpu.so")
        if self.number % NEW_PROGRAMS == 0:
            with open(self._package / "bpf/fgpu.bpf.c", "a", encoding="utf-8") as source:
                source.write(f"/* version {self.number} */\n")
        self._end_gatekeeper()
        self._gatekeeper = self._start("gatekeeper", "--run-dir", str(RUN_DIR))
        begun = time.monotonic()
        self.end_agent()
        self._service.agent = self._start(
            "cli", "agent", "--driver-root", str(DRIVER_ROOT), "--shim", str(self._package / "libfgpu.so"),
            "--store", str(self._store), "--listen", LISTEN, "--config", str(self._service.config),
            "--policies", str(self._service.policies),
        )  # fmt: skip
        eventually(lambda: b"ready after" in self._service.log.read_bytes()[said:], 60, "the agent")
        return time.monotonic() - begun

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(self._package.parent)}
        command = [str(PYTHON), "-m", f"fgpu_ebpf.{module}", *arguments]
        with open(self._service.log, "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd="/")

    def end_agent(self) -> None:
        """End the agent, as a service manager does."""
        assert self._service.agent
        self._service.agent.terminate()
        self._service.agent.wait(30)

    def _end_gatekeeper(self) -> None:
        if self._gatekeeper:
            self._gatekeeper.terminate()
            self._gatekeeper.wait(30)

    def close(self) -> None:
        """End agent and gatekeeper. Limits stay in force."""
        self.end_agent()
        self._end_gatekeeper()
        self._gatekeeper = None

    def all_are_readable(self) -> bool:
        """Return whether root may read the mappings of every process on this host."""
        return "cannot be read: probes" not in self._service.log.read_text()

    def stored(self) -> list[Path]:
        """Return the shims that the store keeps."""
        return sorted(path for path in self._store.iterdir() if path.is_dir() and not path.is_symlink())

    def published(self) -> Path:
        """Return the shim that new programs get."""
        return (self._store / "current/libfgpu.so").resolve()


@pytest.fixture
def versions(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Versions]:
    """Run the first version in place of the service's own agent, which runs again afterwards."""
    service.kill_agent()
    service.kill_gatekeeper()
    installed = Versions(service, tmp_path)
    try:
        installed.install()
        yield installed
    finally:
        installed.close()
        service.start_agent()


class Starts(threading.Thread):
    """Programs that start, allocate memory and exit, one after another.

    Each must read its limit, and get memory that fits.
    """

    def __init__(self, tenant: Tenant, limit: int) -> None:
        super().__init__(daemon=True)
        self._tenant, self._limit = tenant, limit
        self._ended = threading.Event()
        self.count, self.longest = 0, 0.0
        self.wrong: list[str] = []

    def run(self) -> None:
        """Start programs until end()."""
        while not self._ended.is_set():
            begun = time.monotonic()
            try:
                self._live()
            except AssertionError as error:
                self.wrong.append(str(error))
            self.longest = max(self.longest, time.monotonic() - begun)

    def _live(self) -> None:
        client = self._tenant.client()
        try:
            said = client.do("info"), client.do(f"alloc {STEP}")
            assert said[0].split()[::2] == ["ok", str(self._limit)], said
            assert said[1].startswith("ok"), said
            self.count += 1
        finally:
            client.close()
            eventually(lambda: client.pid not in self._tenant.pids(), 5, "the exit of the program")

    def end(self) -> None:
        """Wait for the last program."""
        self._ended.set()
        self.join(120)


def asking(one: Tenant, command: str) -> Client:
    """Start a program that has a context and repeats a request until it receives a line."""
    client = one.client()
    client.ok("context")
    client.send(command)
    return client


def anomalies() -> dict[str, float]:
    """Return the kernel's counts of anomalies that should not happen."""
    found = metrics()
    return {kind: found.get(("fgpu_anomalies_total", frozenset({("kind", kind)})), 0.0) for kind in ANOMALIES}


@pytest.mark.slow
@pytest.mark.places("host")
def test_upgrades_under_load_refuse_no_request_that_fits_and_charge_every_allocation(
    versions: Versions, tenant, scale
) -> None:
    limit = 2 * CONTEXT + 40 * MIB
    busy, full, starting = tenant(limit), tenant(limit), tenant(limit)
    for one in (busy, full, starting):
        one.assert_enforced()
    before, strange = {one: one.memory() for one in (busy, full, starting)}, anomalies()
    plain, pools = asking(busy, f"ask {STEP} 0"), asking(busy, f"ask {STEP} 0 1")
    hopeless = asking(full, f"ask {GIB} 0")
    starts = Starts(starting, limit)
    starts.start()
    counts, longest = [], 0.0
    for _ in range(scale(3, 8, 100)):
        longest = max(longest, versions.install())
        counts.append(starts.count)
        # Each start needs the memory of the previous program, after an agent has recorded that the driver freed it.
        eventually(lambda: starts.count > counts[-1] + 1, 30, "a start with this version")
        for one in (busy, full, starting):
            memory = one.memory()
            assert memory["used_bytes"] <= memory["peak_bytes"] <= memory["limit_bytes"] == limit
    eventually(lambda: starts.count > counts[-1], 30, "a start with the last version")
    starts.end()
    print(f"{starts.count} starts, the longest {starts.longest:.2f} s")
    # On a machine with too much work an agent may need longer. A program then waits for as long as it may, in vain.
    assert not starts.wrong or longest > ABSENCE_SECONDS, starts.wrong
    got, refused, other = answered(plain)
    assert got
    assert (refused, other) == (0, 0), "a request that fits was not admitted"
    from_pools, refused, other = answered(pools)
    assert from_pools
    assert (refused, other) == (0, 0), "a request to a pool that fits was not admitted"
    none, refused, other = answered(hopeless)
    assert (none, other) == (0, 0), "a request that does not fit was admitted"
    assert refused
    assert anomalies() == strange
    for one, bytes_ in ((busy, got * STEP), (full, 0), (starting, starts.count * STEP)):
        after = one.memory()
        assert after["witnessed_bytes"] - before[one]["witnessed_bytes"] == bytes_, "witnessed never, or more than once"
        assert not one.view()["bypassing"]
    assert [one.assert_exact() for one in (busy, full, starting)] == [2 * CONTEXT, CONTEXT, 0]
    assert versions.published().read_bytes().endswith(b"version %d" % versions.number)


def shims_mapped_by(pid: int) -> set[str]:
    """Return the paths of the shims that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[5] for line in lines if line.endswith("/libfgpu.so")}


def shims_of(client: Client) -> set[str]:
    """Return the paths of the shims that a program maps."""
    return shims_mapped_by(client.pid)


@pytest.mark.slow
@pytest.mark.places("host")
def test_a_shim_version_is_kept_while_a_process_uses_it(versions: Versions, tenant) -> None:
    one = tenant(2 * CONTEXT + 40 * MIB)
    old = one.client()
    with one.growing():
        old.ok(f"alloc {STEP}")
    (first,) = shims_of(old)
    assert first == str(versions.published())
    for _ in range(3):
        versions.install()
    new = one.client()
    with one.growing():
        new.ok(f"alloc {STEP}")
    (last,) = shims_of(new)
    assert last == str(versions.published()) != first
    with one.growing():
        old.ok(f"alloc {STEP}")
    assert shims_of(old) == {first}, "the running program has another shim than at its start"
    old.close()
    eventually(lambda: old.pid not in one.pids(), 5, "the exit of the program")
    versions.install()
    if versions.all_are_readable():  # otherwise fgpu cannot establish which processes map a version
        its_shell = {Path(path) for pid in one.pids() for path in shims_mapped_by(pid)}
        kept = {Path(last), versions.published()} | its_shell
        assert len(kept) < 5, "the store keeps all five published shims"
        assert {path / "libfgpu.so" for path in versions.stored()} == kept
    with one.growing():
        new.ok(f"alloc {STEP}")
