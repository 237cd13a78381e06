"""Tenants: cgroups with a limit, and the programs in them."""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import os
import re
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.commands import ask, metrics
from tests.support.host import BUILD, CONTEXT, KINDS, MIB, REFUSED, cgroup_root
from tests.support.sim_driver import driver_books
from tests.support.wait import Deadline, eventually

if TYPE_CHECKING:
    from tests.support.place import Place

PROGRAM = BUILD / "e2e/client"
LOOK_MS = 100  # between looks at a deadline


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
        """Write one line to the program's stdin."""
        try:
            os.write(self._in, line.encode() + b"\n")
        except BrokenPipeError as error:
            raise AssertionError(f"the program has exited before {line!r}: {self.complaints()}") from error

    def receive(self, seconds: float = 20) -> str:
        """Return one line of the program's stdout. The seconds count as for Deadline."""
        deadline = Deadline(seconds)
        while b"\n" not in self._left:
            if not self._more(deadline):
                text = f"the program has exited, or printed no line within {seconds} s"
                raise AssertionError(f"{text}: {self._left!r}{self.complaints()}")
        line, self._left = self._left.split(b"\n", 1)
        return line.decode()

    def _more(self, deadline: Deadline) -> bool:
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        while not poll.poll(LOOK_MS):
            if deadline.is_over():
                return False
        try:
            data = os.read(self._out, 1 << 16)
        except BlockingIOError:  # the program has opened its end by now
            return True
        self._left += data
        return bool(data)

    def rest(self, seconds: float = 20) -> str:
        """Return its output until it exits. Its stdin is closed. The seconds count as for Deadline."""
        os.close(self._in)
        self._in = -1
        deadline = Deadline(seconds)
        while not deadline.is_over() and self._more(deadline):
            pass
        assert not deadline.is_over(), f"the program did not exit within {seconds} s: {self._left!r}"
        return self._left.decode()

    def complaints(self) -> str:
        """Return its stderr so far."""
        return self._errors.read_text(errors="replace") if self._errors.exists() else ""

    def close(self) -> None:
        """Close both pipes. A program that reads stdin exits."""
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
    """The program tests/programs/client.c. It answers a command by "ok …" or the name of the driver's error."""

    def __init__(self, tenant: Tenant, name: str, via: str = "", before: str = "", program: Path = PROGRAM) -> None:
        super().__init__(tenant, name, f"{before} {program} {via}".strip())
        self._hello()

    def _hello(self) -> None:
        said = self.receive(30)
        assert said.startswith("ready "), said
        self.inner_pid = int(said.split()[1])
        self.pid = eventually(lambda: self.tenant.host_pid(self.inner_pid), 20, "the client's pid")

    def do(self, command: str, seconds: float = 60) -> str:
        """Run one command, and return its answer."""
        self.send(command)
        return self.receive(seconds)

    def ok(self, command: str, seconds: float = 60) -> list[int]:
        """Run one command that must succeed. Return the numbers of its answer."""
        said = self.do(command, seconds)
        return self.numbers(said, command if said.startswith("ok") else f"{self.complaints()}{command}")

    @staticmethod
    def numbers(said: str, command: str = "") -> list[int]:
        """Return the numbers of an answer that must be ok."""
        assert said.split()[0] == "ok", f"{command}: {said}"
        return [int(n) for n in said.split()[1:]]

    def execute_again(self) -> None:
        """Execute the same program again, with the same pipes."""
        self.send("exec")
        self._hello()

    def kill(self) -> None:
        """Kill the program with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


class Tenant:
    """A cgroup with a limit, and a hub in it that starts programs."""

    def __init__(self, place: Place, name: str, path: str, folder: Path, hub: subprocess.Popen[bytes]) -> None:
        self.place, self.name, self.path, self.folder, self.hub = place, name, path, folder, hub
        self.cgroup = cgroup_root() / path.lstrip("/")
        self._programs: list[Program] = []
        self._number = itertools.count(1)

    def tell(self, line: str) -> None:
        """Write one line to the hub."""
        assert self.hub.stdin is not None
        self.hub.stdin.write(line.encode() + b"\n")
        self.hub.stdin.flush()

    def client(self, via: str = "", before: str = "", program: Path = PROGRAM) -> Client:
        """Start another CUDA program in this tenant. `before`: the start of its command line."""
        client = Client(self, f"c{next(self._number)}", via, before, program)
        self._programs.append(client)
        return client

    def run(self, command: str, seconds: float = 20) -> str:
        """Run any program in this tenant, and return its output."""
        program = Program(self, f"p{next(self._number)}", command)
        self._programs.append(program)
        return program.rest(seconds)

    def pids(self) -> list[int]:
        """Return the host pids of all processes in the cgroup."""
        try:
            return [int(pid) for pid in (self.cgroup / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def has_left(self) -> bool:
        """Return whether no process is left.

        A dead process keeps the cgroup until the driver has freed all of its memory.
        """
        try:
            return "populated 0" in (self.cgroup / "cgroup.events").read_text()
        except OSError:
            return True

    def host_pid(self, inner: int) -> int | None:
        """Return the host's pid of a process with the pid `inner` in its namespace."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if int(re.findall(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)[0]) == inner:
                    return pid
        return None

    def view(self) -> dict[str, Any]:
        """Return this tenant in the current Snapshot, once the agent knows its cgroup."""
        return eventually(
            lambda: next((t for t in ask(verb="snapshot")["tenants"] if t["path"] == self.path), None),
            what=f"{self.path} in the snapshot",
        )

    def memory(self) -> dict[str, Any]:
        """Return limit, used, peak, refused and so on, of device 0."""
        return self.view()["devices"][0]

    def driver(self, kinds: tuple[str, ...] = KINDS) -> int:
        """Return the bytes that the driver itself holds for this tenant's processes, on all devices."""
        return sum(self.driver_by_device(kinds).values())

    def driver_by_device(self, kinds: tuple[str, ...] = KINDS) -> collections.Counter[int]:
        """Return the bytes that the driver holds for this tenant's processes, by device."""
        pids, held = set(self.pids()), collections.Counter[int]()
        for entry in driver_books():
            if entry["pid"] in pids:
                held[entry["device"]] += sum(entry[f"{kind}_bytes"] for kind in kinds)
        return held

    def assert_enforced(self) -> None:
        """Check that the metrics show `kernel` for this tenant."""
        key = "fgpu_tenant_enforcement", frozenset({("tenant", self.name), ("mode", "kernel")})
        eventually(lambda: metrics().get(key) == 1, 10, f"enforcement of {self.name}")

    @contextlib.contextmanager
    def growing(self, bytes_: int | None = None, shared: int = 0) -> Iterator[None]:
        """Check that admitted, witnessed and driver's bytes grow by the same figure.

        `shared`: bytes by which the driver's figure may grow more, if small pieces share a block. A reconcile in the
        middle charges the unused part of the current block, and then the last pieces do not fit in the limit.
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
        """Wait until the ledger and the driver agree to the byte. Return their bytes."""

        return self._agree(seconds, lambda seen, held: seen["used_bytes"] == held and not seen["drift_bytes"])

    def assert_holds(self, bytes_: int, program: Path = PROGRAM, before: str = "") -> None:
        """Check that a new program can allocate these bytes besides its context, and no more. Kill the program."""
        client = self.client(program=program, before=before)
        client.ok(f"alloc {bytes_}")
        assert client.do(f"alloc {2 * MIB}") == REFUSED
        assert self.assert_exact(10) == CONTEXT + bytes_
        client.kill()
        client.close()
        eventually(lambda: client.pid not in self.pids(), 20, "the exit of the program")

    def assert_covered(self, seconds: float = 3) -> int:
        """Wait until the ledger holds the driver's bytes and its own drift, as with pools. Return its bytes."""

        return self._agree(seconds, lambda seen, held: 0 <= seen["used_bytes"] - held == (seen["drift_bytes"] or 0))

    def assert_never_below(self, seconds: float = 3) -> int:
        """Wait until the ledger holds no less than the driver. Return the ledger's bytes.

        If the drift of a device is known, it must be 0, and ledger and driver must be equal there.
        """

        def agree(seen: dict[str, Any], held: int) -> bool:
            more = seen["used_bytes"] - held
            return more >= 0 if seen["drift_bytes"] is None else more == seen["drift_bytes"] == 0

        return self._agree(seconds, agree)

    def _agree(self, seconds: float, agree: Callable[[dict[str, Any], int], bool]) -> int:
        """Wait until the condition holds on every device. Return the ledger's bytes on all devices."""
        used = 0

        def all_agree() -> bool:
            nonlocal used
            held, devices = self.driver_by_device(), self.view()["devices"]
            used = sum(int(seen["used_bytes"]) for seen in devices)
            return all(agree(seen, held[seen["gpu"]]) for seen in devices)

        eventually(all_agree, seconds, f"{self.name}: {self.view()['devices']}, the driver {self.driver_by_device()}")
        return used

    def end(self) -> None:
        """End every program, then the hub."""
        for program in self._programs:
            program.close()
        assert self.hub.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.hub.stdin.close()
        self.place.end(self)


def answered(client: Client) -> tuple[int, int, int]:
    """Stop a client that sends requests. Return how often they were admitted, refused, or had another result."""
    client.send("context")
    got, refused, other = client.numbers(client.receive())
    assert client.receive() == "ok"
    return got, refused, other
