"""The agent: puts limits in force, keeps probes and truth up to date, publishes one Snapshot a second.

Owns: the order of things at start, the managed cgroups, the gatekeeper that it started. Never: sits in the path of an
allocation. When it ends, limits stay in force in the kernel; the next agent takes up what is pinned.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import devices, launch, probes, procfs
from fgpu_ebpf.ledger import PINS, Ledger
from fgpu_ebpf.reconcile import Reconciler, Truth
from fgpu_ebpf.snapshot import Snapshot
from fgpu_ebpf.view import take_snapshot
from fgpu_ebpf.workloads import Workload, Workloads

log = logging.getLogger("fgpu.agent")
TICK_SECONDS = 0.1
SNAPSHOT_SECONDS = 1.0
UNMANAGED_SWEEP_SECONDS = 10.0
GATEKEEPER_SECONDS = 5.0
STATE = Path("/var/lib/fgpu/contexts.json")


class AgentError(Exception):
    """Why there is no enforcement, and what mends it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where things are. `loader` is the interpreter that sees BCC."""

    run_dir: Path = Path("/run/fgpu")
    pins: Path = PINS
    driver_root: Path = Path("/")
    shim: Path = Path()
    sources: Path = Path()
    listen: str = "127.0.0.1:9423"
    loader: tuple[str, ...] = probes.LOADER


def package_file(*names: str) -> Path:
    """A file that the package carries, or that a checkout has built."""
    package = Path(__file__).parent
    for base in (package, package.parent, package.parent / "build"):
        path = base.joinpath(*names)
        if path.exists():
            return path
    raise AgentError(f"{'/'.join(names)} is not installed: reinstall fgpu, or run ./dev build in a checkout")


class Agent:
    """One a host, by flock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.snapshot = Snapshot(time.time())
        self.reconciler: Reconciler | None = None
        self._gatekeeper: subprocess.Popen[bytes] | None = None
        self._ended = False
        self.selector = selectors.DefaultSelector()
        self._swept = 0.0

    # -- start

    def start(self) -> None:
        """Takes the lock, loads, probes, puts known limits in force. AgentError: what is missing, and the mend."""
        self.settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock()
        root = procfs.cgroup2_root()
        if root is None:
            raise AgentError("only cgroup v1 is mounted: boot with systemd.unified_cgroup_hierarchy=1")
        try:
            self.nvml = devices.Nvml(self.settings.driver_root)
            digest = probes.load(self.settings.sources, self.settings.pins, self.settings.loader)
            self.ledger = Ledger(self.settings.pins)
            self._name_devices()
            self._attach(digest)
        except (devices.DriverError, probes.ProbeError) as error:
            raise AgentError(str(error)) from error
        self.workloads = Workloads(root, self.settings.run_dir / "overrides.json")
        self._restore()
        self._write_preload()
        self._listen_for_files()
        self.reconciler = Reconciler(self.nvml, self.ledger, self.workloads.levels)
        self.reconciler.start()
        self._start_gatekeeper()

    def _lock(self) -> None:
        self._lock_file = open(self.settings.run_dir / "agent.lock", "w", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AgentError("an agent is running on this host already") from error

    def _name_devices(self) -> None:
        libraries = probes.driver_libraries(self.settings.driver_root, "libcuda.so.1")
        if not libraries:
            raise AgentError(f"no libcuda.so.1 under {self.settings.driver_root}: install the driver's CUDA library")
        sizes = devices.context_bytes(self.nvml, libraries[0], STATE)
        for device in self.nvml.devices:
            self.ledger.set_device(device.index, device.uuid)
            self.ledger.set_context_bytes(device.index, sizes[device.index])

    def _attach(self, digest: str) -> None:
        if not probes.return_probes_survive_seccomp(str(self.settings.shim)):
            raise AgentError("return probes kill containers on this kernel (Linux 6.11 to 6.13): update it")
        self.probes = probes.Probes(self.settings.pins, digest, self.ledger)
        self.probes.attach_process_ends()
        libraries = probes.driver_libraries(self.settings.driver_root, "libcuda.so.1")
        own = [probes.Target.of(str(path)) for path in (self.settings.shim, *libraries)]
        for target in own:
            self.probes.attach(target)
        pids = procfs.pids()
        self._attach_mapped(pids)
        self.probes.drop_older()
        self._drop_unused(pids, {(t.dev, t.ino) for t in own})

    def _drop_unused(self, pids: list[int], used: set[tuple[int, int]]) -> None:
        """Takes away the links to files that nobody maps; none where it cannot be told of somebody."""
        for pid in pids:
            mapped = procfs.fgpu_mappings(pid)
            if mapped is None and procfs.has_memory(pid):
                log.warning("the mappings of process %s cannot be read: all probes stay", pid)
                return
            used |= {(m.dev, m.ino) for m in mapped or ()}
        self.probes.drop_unused(used)

    def _attach_mapped(self, pids: list[int]) -> None:
        for target in probes.mapped_targets(pids, self.probes.known):
            try:
                self.probes.attach(target)
                log.info("probed %s", target.path)
            except probes.ProbeError as error:
                log.warning("not probed: %s", error)

    def _restore(self) -> None:
        """Brings the kernel's levels and the remembered workloads together: the file says, the kernel follows."""
        for workload in self.workloads:
            if self.workloads.is_gone(workload):
                self._forget(workload)
            else:
                self._enforce(workload)
        known = {w.cgroup for w in self.workloads}
        for cgroup in self.ledger.tenants():
            if cgroup not in known:
                self._release_level(cgroup)

    def _write_preload(self) -> None:
        """What `fgpu run` binds over /etc/ld.so.preload: the host's own lines, then the shim."""
        preload = Path(launch.PRELOAD)
        own = preload.read_text(encoding="utf-8") if preload.exists() else ""
        shim = str(self.settings.shim)
        lines = [line for line in own.splitlines() if line.strip() and line.strip() != shim]
        (self.settings.run_dir / "ld.so.preload").write_text("\n".join([*lines, shim]) + "\n", encoding="utf-8")

    def _listen_for_files(self) -> None:
        """The gatekeeper tells here of processes whose files or cgroup nobody has looked at."""
        path = self.settings.run_dir / "discover.sock"
        path.unlink(missing_ok=True)
        self._discover = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._discover.bind(str(path))
        path.chmod(0o600)
        self.selector.register(self._discover, selectors.EVENT_READ, self._look_at)

    def _start_gatekeeper(self) -> None:
        command = [sys.executable, "-m", "fgpu_ebpf.gatekeeper", "--run-dir", str(self.settings.run_dir)]
        command += ["--pins", str(self.settings.pins)]
        environment = {"PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parent.parent)}
        self._gatekeeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
        self._gatekeeper_since = time.monotonic()

    def gatekeeper_answers(self) -> bool:
        """A gatekeeper holds its lock and its socket."""
        return (
            _locked(self.settings.run_dir / "gatekeeper.lock") and (self.settings.run_dir / "shim/shim.sock").exists()
        )

    def wait_for_gatekeeper(self) -> None:
        """AgentError: none came up."""
        deadline = time.monotonic() + GATEKEEPER_SECONDS
        while not self.gatekeeper_answers():
            if time.monotonic() > deadline:
                raise AgentError("the gatekeeper does not come up: see its lines above")
            time.sleep(0.005)

    # -- life

    def end(self, *_: object) -> None:
        """Leave run() at the next tick; for signal handlers too."""
        self._ended = True

    def run(self, publish: Callable[[Snapshot], None]) -> None:
        """Ticks until end(); `publish` is given each new Snapshot."""
        next_snapshot = 0.0
        while not self._ended:
            for key, _ in self.selector.select(TICK_SECONDS):
                key.data()
            if self._ended:
                break
            self._keep_gatekeeper()
            self._drop_gone()
            if time.monotonic() >= next_snapshot:
                next_snapshot = time.monotonic() + SNAPSHOT_SECONDS
                publish(self.look())

    def look(self) -> Snapshot:
        """A Snapshot of this moment."""
        truth = self.reconciler.truth if self.reconciler else Truth(0.0)
        self.snapshot = take_snapshot(self.ledger, self.workloads, self.nvml.devices, truth, self.settings.run_dir)
        return self.snapshot

    def stop(self) -> None:
        """Ends what this agent started, however far it came; what is in force stays so."""
        if self.reconciler:
            self.reconciler.stop()
        if self._gatekeeper and self._gatekeeper.poll() is None:
            self._gatekeeper.terminate()
            try:
                self._gatekeeper.wait(2.0)
            except subprocess.TimeoutExpired:
                self._gatekeeper.kill()
                self._gatekeeper.wait()

    def _keep_gatekeeper(self) -> None:
        """Starts a gatekeeper when there is none, at most one a second; one that a service runs is left alone."""
        if self._gatekeeper and self._gatekeeper.poll() is None:
            return
        if time.monotonic() - self._gatekeeper_since < 0.5 or _locked(self.settings.run_dir / "gatekeeper.lock"):
            return
        log.warning("the gatekeeper is gone: starting another")
        self._start_gatekeeper()

    def _look_at(self) -> None:
        """One message of the gatekeeper: probe the process's files, decide about its cgroup."""
        while True:
            try:
                tgid = int(json.loads(self._discover.recv(4096))["tgid"])
            except BlockingIOError:
                return
            except (ValueError, KeyError, TypeError):
                continue
            self._attach_mapped([tgid])
            path = procfs.cgroup_path(tgid)
            if path is None or self.workloads.levels(path):
                continue
            for cgroup in list(procfs.cgroup_ids(self.workloads.root, path))[:1]:
                self.ledger.resolve(cgroup, False)

    def _drop_gone(self) -> None:
        for workload in self.workloads:
            if self.workloads.is_gone(workload):
                self._forget(workload)
        if time.monotonic() - self._swept > UNMANAGED_SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._sweep_unmanaged()

    def _sweep_unmanaged(self) -> None:
        """Forgets unmanaged cgroups that are gone, so that the map holds live ones only."""
        decided = set(self.ledger.unmanaged())
        if not decided:
            return
        live = {os.stat(folder).st_ino for folder, _, _ in os.walk(self.workloads.root)}
        for cgroup in decided - live:
            self.ledger.forget(cgroup)

    # -- limits

    def put(self, path: str, memory_bytes: int, name: str = "", ephemeral: bool = False) -> Workload:
        """Puts a limit in force on a cgroup, its present processes included."""
        workload = self.workloads.put(path, memory_bytes, name, ephemeral)
        self._enforce(workload)
        log.info("limit of %s on %s", memory_bytes, path)
        return workload

    def _enforce(self, workload: Workload) -> None:
        limits = {d.index: workload.memory_bytes for d in self.nvml.devices}
        new = self.ledger.page_missing(workload.cgroup)
        self.ledger.set_limits(workload.cgroup, limits)
        if new:
            self._move_processes(workload)
        self.ledger.resolve(workload.cgroup, True)

    def _move_processes(self, workload: Workload) -> None:
        """Charges that processes of the cgroup have already come along; the rest NVML shows at the next reconcile."""
        known = self.ledger.processes()
        for pid in self.workloads.pids(workload):
            path = procfs.cgroup_path(pid)
            if pid in known and path:
                self.ledger.move(pid, known[pid].generation, self.workloads.levels(path))

    def drop(self, path: str) -> bool:
        """Takes a limit away; False where there was none."""
        workload = next((w for w in self.workloads if w.path == path), None)
        if workload:
            self._forget(workload)
        return workload is not None

    def _forget(self, workload: Workload) -> None:
        self.workloads.drop(workload.cgroup)
        self._release_level(workload.cgroup)

    def _release_level(self, cgroup: int) -> None:
        for tgid, process in self.ledger.processes().items():
            if cgroup in process.levels:
                self.ledger.move(tgid, process.generation, tuple(c for c in process.levels if c != cgroup))
        self.ledger.remove(cgroup)

    def run_cgroup(self, memory_bytes: int, name: str) -> Workload:
        """A new cgroup with its limit in force before anybody is in it."""
        path = self.workloads.make(name)
        return self.put(path, memory_bytes, ephemeral=True)

    def detach(self) -> None:
        """Opens everything and leaves the host as it was; run() ends."""
        self.stop()
        for workload in list(self.workloads):
            self.workloads.drop(workload.cgroup)
        take_away(self.settings.run_dir, self.settings.pins)
        self.end()


def take_away(run_dir: Path, pins: Path) -> None:
    """Unpins everything and removes what was set up; for a host without a running agent too."""
    _end_gatekeeper(run_dir)
    probes.detach(pins)
    launch.take_away_what_was_made(run_dir)
    for name in (
        "shim/shim.sock",
        "control.sock",
        "discover.sock",
        "ld.so.preload",
        "overrides.json",
        "gatekeeper.json",
    ):
        (run_dir / name).unlink(missing_ok=True)
    if (run_dir / "shim").is_dir():
        (run_dir / "shim").rmdir()


def _end_gatekeeper(run_dir: Path) -> None:
    """Ends whichever gatekeeper holds the lock, an earlier agent's too: it would make its folder again."""
    lock, deadline = run_dir / "gatekeeper.lock", time.monotonic() + GATEKEEPER_SECONDS
    with contextlib.suppress(OSError, ValueError):
        pid = int(lock.read_text(encoding="ascii"))
        while _locked(lock) and time.monotonic() < deadline:
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.02)


def _locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def handle_signals(agent: Agent) -> None:
    """SIGTERM and SIGINT end the agent in order."""
    signal.signal(signal.SIGTERM, agent.end)
    signal.signal(signal.SIGINT, agent.end)


def tell_service_manager(state: str) -> None:
    """sd_notify(3), where a service manager asked for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall(state.encode())
