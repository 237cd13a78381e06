"""Fuzzing of the control socket, as root: each input gets an answer `ok`, or the error of the request.

It runs the control server, its peers, and all of its handlers: policies, overrides, targets, on a separate folder of
cgroups. A ledger that accepts everything replaces the kernel; tests/e2e sends requests to a real agent. The first byte
of an input is the position at which it is divided into two messages.
"""

from __future__ import annotations

import json
import selectors
import shutil
import socket
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fgpu_ebpf.agent.parked_tenant import Errands
from fgpu_ebpf.api.control_server import ControlServer
from fgpu_ebpf.policy.rules import PolicySet
from fgpu_ebpf.policy.schema import read
from fgpu_ebpf.snapshot import Snapshot
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.gone_tenants import GoneTenants
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.overrides import Overrides
from fgpu_ebpf.workloads.cgroups import Workloads
from tests.fuzz.fuzz_policy import Gpu

VERBS = (
    "ping",
    "snapshot",
    "metrics",
    "explain",
    "events",
    "reload",
    "put",
    "drop",
    "run",
    "share",
    "detach",
    "release",
    "take",
    "park",
    "wake",
    "errand",
)
WORDS = (
    *(f'"{verb}"'.encode() for verb in VERBS),
    *(b'"verb"', b'"target"', b'"memory"', b'"compute"', b'"weight"', b'"priority"', b'"name"', b'"share"', b'"pid"'),
    *(b'"since"', b'"8GiB"', b'"50%"', b'"high"', b'"pid/1"', b'"/a"', b'"/a/../b"', b'"unit/a"', b'"pod/a/b"'),
    *(b'"c1f3a"', b'"8gib-50pct"', b'"\\u0000"', b'"\\ud800"', b'"pid/\xc2\xb2"', b'"pid/' + b"9" * 30 + b'"', b"true"),
    *(b'"for"', b'"15min"', b'"1us"', b'"errand"'),
    *(b"1", b"-1", b"1e400", b"NaN", b"9" * 5000, b"{", b"}", b"[", b"]", b":", b",", b"[" * 3000, b"\n"),
)  # fmt: skip
POLICY = b"""apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: a}
spec: {selector: {cgroup: ["/a/*", c1f3a]}, memory: {limit: 8GiB}, compute: {limit: 50%}}
"""
MOST_TENANTS = 64


class Ledger:
    """A ledger that accepts everything and has no processes."""

    def __init__(self) -> None:
        self._limits: set[int] = set()
        self.orphans = SimpleNamespace(of_level=lambda _: [])
        self.opens = SimpleNamespace(of=lambda _: SimpleNamespace(denied=1, would_deny=1))
        self.times = SimpleNamespace(set_shares=lambda _: None, turns=dict, tell=lambda: None)

    def context_bytes(self, device: int) -> int:
        return 500 << 20

    def page_missing(self, cgroup: int) -> bool:
        return cgroup not in self._limits

    def set_limits(self, levels: Any, over: Any = None) -> None:
        self._limits |= {level.cgroup for level in levels}

    def processes_so_far(self) -> int:
        return 0

    def remove(self, cgroups: Any) -> None:
        self._limits -= set(cgroups)

    def resolve(self, cgroup: int, managed: bool) -> None: ...

    def unresolve(self, cgroups: Any) -> None: ...

    def processes(self) -> dict[int, Any]:
        return {}

    def usage(self, cgroup: int, devices: Any) -> list[Any]:
        return []

    def counters(self) -> dict[Any, int]:
        return {}


class Fuzzer:
    """A control socket, to which this process sends requests as root."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fgpu-fuzz-", dir="/dev/shm"))
        self._begin()

    def _begin(self) -> None:
        run, cgroups = self._folder / "run", self._folder / "cgroups"
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(cgroups, ignore_errors=True)
        run.mkdir()
        for inner in ("a/b", "a/c", "c1f3a.scope"):
            (cgroups / inner).mkdir(parents=True)
        workloads, history = Workloads(cgroups), EventLog()
        ledger: Any = Ledger()
        enforcer = Enforcer(ledger, workloads, [Gpu()], overcommit=False)
        overrides = Overrides(run / "overrides.json")
        manager = Manager(workloads, enforcer, overrides, [Gpu()], history, GoneTenants(ledger))
        manager.reload(PolicySet(tuple(read("p.yaml", POLICY)[0])))
        discovery = SimpleNamespace(unenforced=str, unprobed=frozenset, standalone=frozenset, reasons=dict)
        driver = SimpleNamespace(
            discovery=discovery, shim=Path("/libfgpu.so"), nvml=SimpleNamespace(devices=[]), reasons=None
        )
        asked = SimpleNamespace(view=dict)
        parking = SimpleNamespace(errands=Errands(), park=lambda _: asked, wake=lambda *_: asked, names=list)
        parts = SimpleNamespace(
            driver=driver, ledger=Ledger(), manager=manager, enforcer=enforcer,
            chores=SimpleNamespace(
                shortfalls=SimpleNamespace(found={}), parking=parking, idle_parking=SimpleNamespace(explain=str)
            ),
        )  # fmt: skip
        self._agent: Any = SimpleNamespace(
            settings=SimpleNamespace(run_dir=run, driver_root=Path("/"), loader=("python3",)), chores=[],
            selector=selectors.DefaultSelector(), history=history, parts=parts, failures=0, writes_refused=0,
            devices=SimpleNamespace(is_released=False, release=lambda seconds: {"seconds": seconds}, take=lambda: None),
            reload=lambda: None, detach=lambda: None, look=lambda: Snapshot(1.0), fresh=lambda: Snapshot(1.0),
        )  # fmt: skip
        self._server = ControlServer(self._agent)
        self._server.open()

    def _end(self) -> None:
        self._server.close()
        self._agent.selector.close()

    def _turn(self) -> None:
        for key, _ in self._agent.selector.select(0):
            key.data()

    def __call__(self, data: bytes) -> None:
        cut, line = (data[0] if data else 0), data[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.connect(str(self._agent.settings.run_dir / "control.sock"))
            sock.sendall(line[:cut])
            self._turn()
            try:
                sock.sendall(line[cut:])
                sock.shutdown(socket.SHUT_WR)
            except OSError:  # the first part was a line, and has been answered
                line = line[:cut]
            for _ in range(4):
                self._turn()
            said = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        self._judge(said)
        if len(self._agent.parts.enforcer) > MOST_TENANTS:
            self._end()
            self._begin()

    def _judge(self, said: bytes) -> None:
        assert said.endswith(b"\n"), said
        answer = json.loads(said)
        assert ("ok" in answer) != ("error" in answer)
        assert "ok" in answer or answer["code"] in (1, 2, 4)
        assert self._agent.failures == 0, answer
        outside = Counter(path.name for path in self._folder.iterdir())
        assert outside == {"run": 1, "cgroups": 1}, outside

    def close(self) -> None:
        """Remove the folder."""
        self._end()
        shutil.rmtree(self._folder)
