"""The end-to-end tests' hands: what a user has, and nothing else.

Owns the service under test and the tenants that a test asks for: commands, the control socket, the metrics page, a
container runtime, and a small CUDA program that does what it is told. Imports nothing of fgpu.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SIM = BUILD / "sim"
SHIM = BUILD / "shim/libfgpu.so"
DRIVER_ROOT = Path(os.environ.get("DRIVER_ROOT", SIM))
FGPU = shlex.split(os.environ.get("FGPU", str(ROOT / ".venv/bin/fgpu")))
RUN_DIR = Path("/run/fgpu")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CONTEXT = 518 * MIB  # what a context takes of the simulated device
# Of memory, as the driver's books have them.
KINDS = ("context", "block", "vmm", "managed", "pool", "module", "graph", "local", "runtime", "launch")
GPUS = os.environ.get("FGPU_TEST_GPUS", "1")
MEMORY = os.environ.get("FGPU_TEST_MEMORY", "16GiB")  # of each device
REFUSED = "CUDA_ERROR_OUT_OF_MEMORY"
ENVIRONMENT = {
    "PATH": f"{SIM}:{ROOT}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LD_LIBRARY_PATH": str(SIM / "lib"),
    "HOME": "/root",
}
# What the units and the chart give agent and gatekeeper.
SERVICE_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.pthread.stack_cache_size=0"}
# Starts a program for every line "NAME COMMAND", its stdin and stdout being the pipes NAME.in and NAME.out.
HUB = 'while read -r name command; do (exec $command <"$name.in" >"$name.out" 2>"$name.err") & done; wait'
T = TypeVar("T")


class Timeout(AssertionError):
    """What was waited for did not come."""


def eventually(look: Callable[[], T], seconds: float = 10.0, what: str = "") -> T:
    """Looks until the answer is truthy, and returns it."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Timeout(f"not within {seconds} s: {what or look}: {found!r}")
        time.sleep(0.01)


def steadily(look: Callable[[], object], for_seconds: float, within: float = 10.0, what: str = "") -> None:
    """Looks until the answer has been truthy at every look of `for_seconds`."""
    deadline = time.monotonic() + within
    since = time.monotonic()
    while time.monotonic() - since < for_seconds:
        found = look()
        if not found:
            since = time.monotonic()
        if time.monotonic() > deadline:
            raise Timeout(f"not for {for_seconds} s within {within} s: {what or look}: {found!r}")
        time.sleep(0.01)


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


LISTEN = f"127.0.0.1:{free_port()}"
METRICS = f"http://{LISTEN}/metrics"


def compile_programs() -> None:
    """The C programs beside this file, into build/e2e."""
    out = BUILD / "e2e"
    out.mkdir(parents=True, exist_ok=True)
    for source in Path(__file__).parent.glob("*.c"):
        flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", f"-I{BUILD}/headers"]
        made = out / f".{source.stem}"
        subprocess.run(["gcc", *flags, "-o", made, source, "-ldl", "-pthread"], check=True, timeout=60)
        made.rename(out / source.stem)


def cgroup_root() -> Path:
    """Where cgroup v2 is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise AssertionError("no cgroup v2 here")


def fgpu(
    *arguments: str | Path, check: bool = True, seconds: float = 30, **more: Any
) -> subprocess.CompletedProcess[str]:
    """The command `fgpu`, in the environment of a user of the simulated driver."""
    more.setdefault("env", ENVIRONMENT)
    done = subprocess.run([*FGPU, *arguments], capture_output=True, text=True, timeout=seconds, check=False, **more)
    assert not check or done.returncode == 0, f"fgpu {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def ask(**request: Any) -> Any:
    """One request on the control socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(RUN_DIR / "control.sock"))
        sock.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(b"".join(iter(lambda: sock.recv(1 << 16), b"")))
    assert "ok" in answer, answer
    return answer["ok"]


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def events(what: str) -> list[dict[str, Any]]:
    """What `fgpu events` has of one kind, the oldest first."""
    found = [json.loads(line) for line in fgpu("events", "--json").stdout.splitlines()]
    return [one for one in found if one["what"] == what]


def fill(filler: Path) -> None:
    """Not a byte is left on the file system of this file."""
    with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def metrics(page: str | None = None) -> Samples:
    """The metrics of this moment, or those of a page: (name, labels) -> value."""
    found = {}
    text = ask(verb="metrics") if page is None else page
    for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
        found[name, frozenset(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))] = float(value)
    return found


def metrics_page() -> str:
    """What Prometheus is given; it is made anew once a second."""
    with urllib.request.urlopen(METRICS, timeout=5) as page:
        return str(page.read().decode())


def _driver_dump() -> dict[str, Any]:
    done = subprocess.run([SIM / "fgpu-simd", "--dump"], capture_output=True, text=True, check=True, timeout=10)
    return dict(json.loads(done.stdout))


def driver_books() -> list[dict[str, Any]]:
    """What the driver itself holds: one entry a process and device."""
    return list(_driver_dump()["processes"])


def unnamed_bytes() -> int:
    """Bytes on all devices that are in no living process's name: of ended ones, or held by an export alone."""
    said = _driver_dump()
    ended = sum(entry["bytes"] for entry in said["processes"] if entry["ended"])
    return ended + sum(device["exported_bytes"] for device in said["devices"])


def orphans() -> list[dict[str, Any]]:
    """All memory that is charged for processes that have ended, or that have exported and freed it."""
    return [orphan for tenant in ask(verb="snapshot")["tenants"] for orphan in tenant["orphans"]]


def gatekeepers_of(run_dir: Path) -> set[int]:
    """Pids of every gatekeeper that was started with that folder."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):  # no glob: it fails where a process ends under it
        with contextlib.suppress(OSError):
            words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
            if b"fgpu_ebpf.gatekeeper" in words and str(run_dir).encode() in words:
                found.add(int(pid))
    return found


def _reads(link: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


# -- several devices

ALONE = """
mkdir -p /run/fgpu /run/fgpu-sim
mount -t tmpfs tmpfs /run/fgpu && mount -t tmpfs tmpfs /run/fgpu-sim && mount -t bpf bpf /sys/fs/bpf && exec "$@"
"""


def run_on_devices(file: str, number: int = 2, memory: str = "16GiB", seconds: float = 170) -> None:
    """Run the tests of a file with a driver of so many devices of that size and an agent of its own, in a mount
    namespace of its own; they end within `seconds`.
    """
    command = ["unshare", "--mount", "sh", "-c", ALONE, "sh", sys.executable, "-m", "pytest", "-q", file]
    environment = {**os.environ, "FGPU_TEST_GPUS": str(number), "FGPU_TEST_MEMORY": memory}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    (cgroup_root() / "fgpu").mkdir(exist_ok=True)  # its detach took it away, and all agents of a host have one
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# -- the service


class Service:
    """The simulated driver and the agent, started once and restarted at will."""

    def __init__(self, work: Path, asked: Sequence[str] = ("docker", "cri")) -> None:
        """`asked`: the kinds of engines whose sockets the agent looks for."""
        self.log = work / "agent.log"
        self.config = work / "agent.yaml"
        self.cdi = work / "cdi"
        self.cdi.mkdir()
        sockets = {kind: work / f"{kind}.sock" for kind in ("docker", "podman", "cri")}
        self.engine, self.podman, self.containerd = sockets.values()
        engines = [f"{kind}:{sockets[kind]}" for kind in asked]
        self.config.write_text(f"overcommit: allow\nengines: {engines}\ncdiFolder: {self.cdi}\n")
        self.policies = work / "policy.d"
        self.policies.mkdir()
        self._driver_log = work / "driver.log"
        self._driver: subprocess.Popen[bytes] | None = None
        self.agent: subprocess.Popen[bytes] | None = None
        self.started_in = 0.0  # seconds from start to enforcing, the last time
        self._checked = 0  # characters of the log that check() has read
        self.command = FGPU  # of the agent

    def start_driver(self, memory: str = MEMORY) -> None:
        """fgpu-simd with one device, or FGPU_TEST_GPUS; returns when it is ready."""
        assert not self.gatekeepers(), "fgpu runs on this host already"
        running = subprocess.run([SIM / "fgpu-simd", "--dump"], capture_output=True, check=False, timeout=10)
        assert running.returncode, "a simulated driver runs on this host already"
        with open(self._driver_log, "wb") as log:
            self._driver = subprocess.Popen(
                [SIM / "fgpu-simd"], stdout=log, stderr=log, env={"FGPU_SIM_MEMORY": memory, "FGPU_SIM_GPUS": GPUS}
            )
        eventually(lambda: b"ready" in self._driver_log.read_bytes(), 20, "the simulated driver")

    def start_agent(self, stderr: int | None = None, *options: str) -> float:
        """`fgpu agent`, logging there or as always; returns when limits are in force, with the seconds that it took."""
        begun = time.monotonic()
        said = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") if stderr is None else open(stderr, "wb", closefd=False) as log:
            command = [*self.command, "agent", "--driver-root", DRIVER_ROOT, "--shim", SHIM, "--listen", LISTEN]
            command += ["--config", self.config, "--policies", self.policies, *options]
            environment = {k: v for k, v in ENVIRONMENT.items() if k != "LD_LIBRARY_PATH"} | SERVICE_ENVIRONMENT
            self.agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

        def enforcing() -> bool:
            text = self.log.read_bytes()[said:]
            assert self.agent is not None
            assert self.agent.poll() is None, f"the agent ended: {text.decode()}"
            return b"enforcing" in text if stderr is None else not fgpu("status", check=False).returncode

        eventually(enforcing, 60, "the agent")
        self.started_in = time.monotonic() - begun
        return self.started_in

    def gatekeepers(self) -> set[int]:
        """Pids of every gatekeeper that sees our /run, whoever started it."""
        here = os.readlink("/proc/self/ns/mnt")
        return {pid for pid in gatekeepers_of(RUN_DIR) if _reads(f"/proc/{pid}/ns/mnt") == here}

    def stand(self) -> None:
        """There is an agent, also after a trial that failed between two of them."""
        assert self.agent is not None
        if self.agent.poll() is not None:
            self.start_agent()

    def kill_agent(self, how: int = signal.SIGKILL) -> None:
        """kill -9, or another signal."""
        assert self.agent is not None
        self.agent.send_signal(how)
        self.agent.wait(30)

    def kill_gatekeeper(self) -> None:
        """kill -9."""
        pids = self.gatekeepers()
        assert pids, "no gatekeeper to kill"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not pids & self.gatekeepers(), 20, "the gatekeeper's end")

    @classmethod
    @contextlib.contextmanager
    def running(cls, work: Path, *asked: str) -> Iterator[Service]:
        """The simulated driver (16 GiB, one device) and the agent, which enforces; both end with it."""
        service = cls(work, asked) if asked else cls(work)
        try:
            service.start_driver()
            service.start_agent()
            yield service
        finally:
            service.stop()

    def check(self) -> None:
        """Nothing has fallen over."""
        assert self.agent is not None
        assert self.agent.poll() is None, "the agent ended"
        log = self.log.read_text()[self._checked :]
        self._checked += len(log)  # a traceback is the failure of one test, not of all that follow
        assert "Traceback" not in log, log

    def detach(self) -> None:
        """`fgpu detach`; a gatekeeper that stays all the same is ended."""
        self.stand()
        fgpu("detach")
        self.agent.wait(10)
        for pid in self.gatekeepers():
            os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Detaches, and ends what was started here."""
        try:
            if self.agent:
                self.detach()
        finally:  # an agent that cannot start leaves no driver behind
            if self._driver:
                self._driver.terminate()
                self._driver.wait(10)


# -- programs in a tenant


class Program:
    """A program in a tenant, at the other end of two named pipes."""

    def __init__(self, tenant: Tenant, name: str, command: str) -> None:
        self.tenant = tenant
        self._left = b""
        self._errors = tenant.folder / f"{name}.err"
        ends = [tenant.folder / f"{name}.in", tenant.folder / f"{name}.out"]
        for end in ends:
            os.mkfifo(end, 0o666)
        self._out = os.open(ends[1], os.O_RDONLY | os.O_NONBLOCK)
        tenant.tell(f"{name} {command}")
        self._in = eventually(lambda: _open_writer(ends[0]), 30, f"{command} in {tenant.name}")

    def send(self, line: str) -> None:
        """One line to its stdin."""
        try:
            os.write(self._in, line.encode() + b"\n")
        except BrokenPipeError as error:
            raise AssertionError(f"it has ended, nobody reads {line!r}: {self.complaints()}") from error

    def receive(self, seconds: float = 20) -> str:
        """One line of its stdout."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._left:
            if not self._more(deadline - time.monotonic()):
                raise AssertionError(f"it ended, or said nothing within {seconds} s: {self._left!r}{self.complaints()}")
        line, self._left = self._left.split(b"\n", 1)
        return line.decode()

    def _more(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if seconds <= 0 or not poll.poll(int(seconds * 1000) + 1):
            return False
        try:
            data = os.read(self._out, 1 << 16)
        except BlockingIOError:  # its end has been opened since
            return True
        self._left += data
        return bool(data)

    def rest(self, seconds: float = 20) -> str:
        """Everything it says until it ends; its stdin is closed."""
        os.close(self._in)
        self._in = -1
        deadline = time.monotonic() + seconds
        while self._more(deadline - time.monotonic()):
            pass
        assert time.monotonic() < deadline, f"it did not end within {seconds} s: {self._left!r}"
        return self._left.decode()

    def complaints(self) -> str:
        """What it has said on stderr."""
        return self._errors.read_text(errors="replace") if self._errors.exists() else ""

    def close(self) -> None:
        """Lets go of both pipes; a program that reads stdin ends."""
        for end in (self._in, self._out):
            if end >= 0:
                os.close(end)
        self._in = self._out = -1


def _open_writer(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK) or None
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


class Client(Program):
    """tests/e2e/client.c: commands with numbers, answered by "ok …" or the name of the driver's error."""

    def __init__(self, tenant: Tenant, name: str, via: str = "", before: str = "") -> None:
        super().__init__(tenant, name, f"{before} {BUILD}/e2e/client {via}".strip())
        self._hello()

    def _hello(self) -> None:
        said = self.receive(30)
        assert said.startswith("ready "), said
        self.inner_pid = int(said.split()[1])
        self.pid = eventually(lambda: self.tenant.host_pid(self.inner_pid), 20, "the client's pid")

    def do(self, command: str, seconds: float = 60) -> str:
        """One command, its answer."""
        self.send(command)
        return self.receive(seconds)

    def ok(self, command: str, seconds: float = 60) -> list[int]:
        """One command that must succeed, the numbers of its answer."""
        return self.numbers(self.do(command, seconds), command)

    @staticmethod
    def numbers(said: str, command: str = "") -> list[int]:
        """The numbers of an answer that must be ok."""
        assert said.split()[0] == "ok", f"{command}: {said}"
        return [int(n) for n in said.split()[1:]]

    def execute_again(self) -> None:
        """exec of the same program: another life, the same pipes."""
        self.send("exec")
        self._hello()

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)


# -- tenants


class Tenant:
    """A cgroup with a limit, and a hub in it that starts programs."""

    def __init__(self, place: Place, name: str, path: str, folder: Path, hub: subprocess.Popen[bytes]) -> None:
        self.place, self.name, self.path, self.folder, self.hub = place, name, path, folder, hub
        self.cgroup = cgroup_root() / path.lstrip("/")
        self._programs: list[Program] = []
        self._number = itertools.count(1)

    def tell(self, line: str) -> None:
        """One line to the hub."""
        assert self.hub.stdin is not None
        self.hub.stdin.write(line.encode() + b"\n")
        self.hub.stdin.flush()

    def client(self, via: str = "", before: str = "") -> Client:
        """Another CUDA program in this tenant; `before`: what starts it."""
        client = Client(self, f"c{next(self._number)}", via, before)
        self._programs.append(client)
        return client

    def run(self, command: str, seconds: float = 20) -> str:
        """Any program in this tenant: what it printed."""
        program = Program(self, f"p{next(self._number)}", command)
        self._programs.append(program)
        return program.rest(seconds)

    def pids(self) -> list[int]:
        """Host pids of everything in the cgroup."""
        try:
            return [int(pid) for pid in (self.cgroup / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def has_left(self) -> bool:
        """The cgroup can be removed: whoever has died is no process of it, but holds it until the driver lets go."""
        try:
            return "populated 0" in (self.cgroup / "cgroup.events").read_text()
        except OSError:
            return True

    def host_pid(self, inner: int) -> int | None:
        """The host's pid of a process that calls itself `inner`."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if int(re.findall(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)[0]) == inner:
                    return pid
        return None

    def view(self) -> dict[str, Any]:
        """This tenant in the Snapshot of this moment."""
        return next(t for t in ask(verb="snapshot")["tenants"] if t["path"] == self.path)

    def memory(self) -> dict[str, Any]:
        """Limit, used, peak, refused and so on, of device 0."""
        return self.view()["devices"][0]

    def driver(self, kinds: tuple[str, ...] = KINDS) -> int:
        """Bytes that the driver itself holds for this tenant's processes, on all devices."""
        return sum(self.driver_by_device(kinds).values())

    def driver_by_device(self, kinds: tuple[str, ...] = KINDS) -> collections.Counter[int]:
        """The same, device by device."""
        pids, held = set(self.pids()), collections.Counter[int]()
        for entry in driver_books():
            if entry["pid"] in pids:
                held[entry["device"]] += sum(entry[f"{kind}_bytes"] for kind in kinds)
        return held

    def assert_enforced(self) -> None:
        """The metrics say that the kernel holds this tenant's limit."""
        key = "fgpu_tenant_enforcement", frozenset({("tenant", self.name), ("mode", "kernel")})
        eventually(lambda: metrics().get(key) == 1, 10, f"enforcement of {self.name}")

    @contextlib.contextmanager
    def growing(self, bytes_: int | None = None, shared: int = 0) -> Iterator[None]:
        """What is admitted, what is witnessed and what the driver holds grow by the same figure.

        `shared`: bytes that the driver may hold beyond, for the blocks that small pieces share: a reconcile in the
        middle charges what is not taken yet of the block at hand, and the last pieces find the limit reached.
        """
        self.assert_enforced()
        before, held = self.memory(), self.driver(("block", "vmm", "managed"))
        yield
        after, holds = self.memory(), self.driver(("block", "vmm", "managed"))
        grown = {
            "admitted": after["admitted_bytes"] - before["admitted_bytes"],
            "witnessed": after["witnessed_bytes"] - before["witnessed_bytes"],
            "driver": holds - held,
        }
        assert grown["admitted"] == grown["witnessed"], grown
        assert 0 <= grown["driver"] - grown["witnessed"] <= shared, grown
        assert bytes_ is None or grown["driver"] == bytes_, (grown, bytes_)

    def assert_exact(self, seconds: float = 3) -> int:
        """The ledger and the driver agree to the byte; what they hold."""

        return self._agree(seconds, lambda seen, held: seen["used_bytes"] == held and not seen["drift_bytes"])

    def assert_covered(self, seconds: float = 3) -> int:
        """The ledger holds what the driver does and its own drift, as where programs use pools; what it holds."""

        return self._agree(seconds, lambda seen, held: 0 <= seen["used_bytes"] - held == (seen["drift_bytes"] or 0))

    def assert_never_below(self, seconds: float = 3) -> int:
        """The ledger holds no less than the driver, and no more where it knows its drift; what it holds."""

        def agree(seen: dict[str, Any], held: int) -> bool:
            more = seen["used_bytes"] - held
            return more >= 0 if seen["drift_bytes"] is None else more == seen["drift_bytes"] == 0

        return self._agree(seconds, agree)

    def _agree(self, seconds: float, agree: Callable[[dict[str, Any], int], bool]) -> int:
        """Waits until it is so on every device; what the ledger holds on all."""

        def all_agree() -> bool:
            held = self.driver_by_device()
            return all(agree(seen, held[seen["gpu"]]) for seen in self.view()["devices"])

        eventually(all_agree, seconds, f"{self.name}: {self.view()['devices']}, the driver {self.driver_by_device()}")
        return sum(int(seen["used_bytes"]) for seen in self.view()["devices"])

    def end(self) -> None:
        """Ends every program, then the hub."""
        for program in self._programs:
            program.close()
        assert self.hub.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.hub.stdin.close()
        self.place.end(self)


class Place:
    """A way to be a tenant: `fgpu run` on the host, with or without a pid namespace."""

    group = "/fgpu"
    _numbers = itertools.count(1)

    def __init__(self, work: Path, *options: str) -> None:
        self.work, self._options = work, options
        self.tenants: list[Tenant] = []

    def tenant(self, memory: int | None) -> Tenant:
        """A new tenant with that limit in force before its first program starts; None: a container without a limit."""
        name = f"e2e-{os.getpid()}-{next(self._numbers)}"
        folder = self.work / name
        folder.mkdir()
        tenant = self._make(name, folder, memory)
        self.tenants.append(tenant)
        return tenant

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        command = [*FGPU, "run", *self._options, "--name", name, "--memory", f"{memory}B", "--", "sh", "-c", HUB]
        hub = subprocess.Popen(command, stdin=subprocess.PIPE, env=ENVIRONMENT, cwd=folder)
        return Tenant(self, name, f"/fgpu/{name}", folder, hub)

    def end(self, tenant: Tenant) -> None:
        """Waits for the hub; kills what does not end."""
        try:
            tenant.hub.wait(5)
        except subprocess.TimeoutExpired:
            for pid in tenant.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            tenant.hub.wait(5)
        eventually(tenant.has_left, 20, f"the end of {tenant.name}")
        with contextlib.suppress(FileNotFoundError):
            tenant.cgroup.rmdir()

    def close(self) -> None:
        """Ends every tenant."""
        for tenant in self.tenants:
            tenant.end()
        self.tenants.clear()

    def left(self) -> list[Path]:
        """The cgroups that are there of tenants made here, or made inside them."""
        return [*(cgroup_root() / self.group.lstrip("/")).glob(f"e2e-{os.getpid()}-*")]


class Cgroups(Place):
    """Cgroups made by hand and limited by `fgpu set`, below one of our own that no other test has anything in."""

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.group = f"/fgpu-e2e-{os.getpid()}"

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        return self._tenant(f"{self.group}/{name}", folder, memory)

    def named(self, path: str) -> Tenant:
        """A tenant in the cgroup of that path below ours; no limit is set by hand."""
        folder = self.work / path.replace("/", "-")
        folder.mkdir()
        self.tenants.append(self._tenant(f"{self.group}/{path}", folder, None))
        return self.tenants[-1]

    def _tenant(self, path: str, folder: Path, memory: int | None) -> Tenant:
        cgroup = cgroup_root() / path.lstrip("/")
        cgroup.mkdir(parents=True)
        if memory is not None:
            fgpu("set", path, "--memory", f"{memory}B")
        enter = ["sh", "-c", f'echo $$ >{cgroup}/cgroup.procs && exec sh -c "$0"', HUB]
        environment = {**ENVIRONMENT, "LD_PRELOAD": str(SHIM)}
        hub = subprocess.Popen(enter, stdin=subprocess.PIPE, env=environment, cwd=folder)
        return Tenant(self, os.path.basename(path), path, folder, hub)

    def close(self) -> None:
        """Ends every tenant; the folder of their cgroups goes."""
        super().close()
        for folder, _, _ in os.walk(cgroup_root() / self.group.lstrip("/"), topdown=False):
            os.rmdir(folder)


# A container runtime takes version 2 of cgroups where that is what it sees at /sys/fs/cgroup.
PRIVATE_MOUNTS = """
[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup
exec "$@"
"""


class Container(Place):
    """A container of runc or crun: pid, mount and cgroup namespaces, the host's folders as its root."""

    group = "/fgpu-e2e"

    def __init__(self, work: Path, runtime: str) -> None:
        super().__init__(work)
        self._runtime = runtime
        self._state = work / "state"
        self.mounts: list[dict[str, Any]] = []  # beside what every container has
        self.image: dict[str, Path] = {}  # files in its root: path -> what is copied there
        (work / "ld.so.preload").write_text(f"{SHIM}\n")

    def _command(self, *words: str | Path) -> list[str | Path]:
        return ["unshare", "-m", "sh", "-c", PRIVATE_MOUNTS, "sh", self._runtime, "--root", self._state, *words]

    def _call(self, *words: str | Path, check: bool = True) -> None:
        done = subprocess.run(self._command(*words), capture_output=True, text=True, timeout=30, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        bundle = self.work / f"{name}.bundle"
        self._bundle(bundle, name, folder)
        with open(self.work / f"{name}.log", "wb") as log:
            create = self._command("create", "--bundle", bundle, name)
            hub = subprocess.Popen(create, stdin=subprocess.PIPE, stdout=log, stderr=log)
        assert hub.wait(30) == 0, (self.work / f"{name}.log").read_text()
        path = f"{self.group}/{name}"
        tenant = Tenant(self, name, path, folder, hub)
        try:
            if memory is not None:
                fgpu("set", path, "--memory", f"{memory}B")
            self._call("start", name)
        except BaseException:
            self.end(tenant)
            raise
        return tenant

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        (bundle / "rootfs/etc").mkdir(parents=True)
        shutil.copy("/etc/ld.so.cache", bundle / "rootfs/etc/ld.so.cache")
        for path, source in self.image.items():
            shutil.copy(source, bundle / "rootfs" / path)
        for link in ("bin", "sbin", "lib", "lib64"):
            if Path("/", link).is_symlink():
                (bundle / "rootfs" / link).symlink_to(os.readlink(Path("/", link)))
        subprocess.run(["runc", "spec"], cwd=bundle, check=True, timeout=10)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"].update(
            terminal=False, args=["sh", "-c", HUB], cwd=str(folder), env=[f"{k}={v}" for k, v in ENVIRONMENT.items()]
        )
        spec["linux"]["cgroupsPath"] = f"{self.group}/{name}"
        if self._runtime == "crun":  # its device rules need CAP_SYS_RESOURCE, which a test machine may lack
            del spec["linux"]["resources"]
        spaces = spec["linux"]["namespaces"]
        if {"type": "cgroup"} not in spaces:
            spaces.append({"type": "cgroup"})
        spec["mounts"] += [_bind("/usr"), *(_bind(f"/{d}") for d in ("bin", "sbin", "lib", "lib64") if _is_folder(d))]
        spec["mounts"] += [_bind(BUILD), _bind(ROOT / ".venv"), _bind("/run/fgpu-sim"), _bind(folder, read_only=False)]
        # The three mounts that fgpu needs.
        spec["mounts"] += [
            _bind(SHIM),
            _bind("/run/fgpu/shim"),
            _bind(self.work / "ld.so.preload", "/etc/ld.so.preload"),
        ]
        spec["mounts"] += self.mounts
        (bundle / "config.json").write_text(json.dumps(spec))

    def end(self, tenant: Tenant) -> None:
        """Deletes the container."""
        self._call("delete", "--force", tenant.name)
        eventually(lambda: not tenant.pids(), 20, f"the end of {tenant.name}")

    def close(self) -> None:
        """Deletes every container, what is left of their cgroups, and the folder of these unless others are in it."""
        names = [tenant.name for tenant in self.tenants]
        super().close()
        parent = cgroup_root() / self.group.lstrip("/")
        for folder in (*(parent / name for name in names), parent):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _is_folder(name: str) -> bool:
    return Path("/", name).is_dir() and not Path("/", name).is_symlink()


def _bind(source: str | Path, target: str | Path | None = None, read_only: bool = True) -> dict[str, Any]:
    options = ["bind", "nosuid", "ro"] if read_only else ["bind", "nosuid"]
    return {"source": str(source), "destination": str(target or source), "type": "bind", "options": options}


@contextlib.contextmanager
def group(place: Place, memory: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """A limit on the cgroup above all tenants of a place; yields a look at its memory."""
    fgpu("set", place.group, "--memory", f"{memory}B")
    try:

        def look() -> dict[str, Any]:
            whole = next(t for t in ask(verb="snapshot")["tenants"] if t["path"] == place.group)
            assert whole["kind"] == "group"
            return whole["devices"][0]

        yield look
    finally:
        fgpu("unset", place.group)


def place_of(kind: str, work: Path) -> Place:
    """host, pidns, cgroups, runc, crun."""
    if kind == "cgroups":
        return Cgroups(work)
    if kind in ("runc", "crun"):
        return Container(work, kind)
    return Place(work, "--pidns") if kind == "pidns" else Place(work)
