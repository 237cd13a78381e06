"""Thousands of short-lived tenants with names of their own choosing: nothing remains of them."""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.hello_kit import GOOD, SOCKET
from tests.support.commands import ask, metrics, metrics_page
from tests.support.host import BUILD, ENVIRONMENT, SHIM, cgroup_root
from tests.support.kernel import entries
from tests.support.service import Service
from tests.support.wait import eventually, remove_cgroup

LIVE = 200
GROWTH_KIB = 5 * 1024
WARM, SOME = 1000, 500  # numbers of tenants before the first measurement of what remains, and between two measurements
MAPS = ("pages", "resolved", "limits", "shares", "turns", "ran", "processes", "threads", "allocations")
ODD = ('quo"te', "back\\slash", "a\ttab", "{}=,", "é" * 100, "x" * 200, "-", " ", "\x7f\x01", "..x")
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: churn}
spec:
  selector: {cgroup: ["fgpu-churn/*"]}
  memory: {limit: 600MiB}
  compute: {weight: 50}
"""


@pytest.fixture
def parent(service: Service, unharmed: None) -> Iterator[Path]:
    """Return a cgroup in which every child cgroup is a tenant."""
    folder = cgroup_root() / "fgpu-churn"
    folder.mkdir()
    (service.policies / "churn.yaml").write_text(POLICY)
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
    yield folder
    for cgroup in folder.iterdir():
        if cgroup.is_dir():
            cgroup.rmdir()
    folder.rmdir()
    (service.policies / "churn.yaml").unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


def say_hello(cgroup: Path) -> None:
    """Run a process in the cgroup that sends a hello, gets a reply or not, and exits."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(2)
                sock.connect(SOCKET)
                sock.send(GOOD)
                sock.recv(4096)
        os._exit(0)
    os.waitpid(child, 0)


def fill(cgroup: Path) -> None:
    """Run a program in the cgroup that allocates memory until it is refused."""
    command = f'echo $$ >"$1/cgroup.procs" && exec {BUILD}/examples/fill --step 8MiB'
    environment = {**ENVIRONMENT, "LD_PRELOAD": str(SHIM)}
    done = subprocess.run(["sh", "-c", command, "sh", cgroup], env=environment, capture_output=True, check=True)
    assert b"OUT_OF_MEMORY" in done.stdout


def shown() -> set[str]:
    """Return the tenants on the page of metrics."""
    return {dict(labels)["tenant"] for name, labels in metrics(metrics_page()) if name == "fgpu_tenant_info"}


def churn(parent: Path, numbers: range) -> None:
    """Make these tenants, LIVE at a time. Every tenth registers, and every hundredth has a program that is refused."""
    live = collections.deque[Path]()
    for number in numbers:
        cgroup = parent / f"{number}-{ODD[number % len(ODD)]}"
        cgroup.mkdir()
        live.append(cgroup)
        if number % 100 == 99:
            fill(cgroup)
        elif number % 10 == 9:
            say_hello(cgroup)
        if len(live) > LIVE:
            oldest = live.popleft()
            remove_cgroup(oldest)
    eventually(lambda: len(shown()) <= 2 * LIVE + 10, 2, "no removed tenants on the page")
    for cgroup in live:
        remove_cgroup(cgroup)


def assert_none_left(seconds: float) -> None:
    """Check that the agent has removed all tenants."""
    eventually(lambda: not [t for t in ask(verb="snapshot")["tenants"] if t["policy"] == "churn"], seconds, "no tenant")


def assert_maps_empty(known: dict[str, int]) -> None:
    """Check that maps of tenants and processes have no more entries than before."""
    for name in MAPS:
        what = f"{known[name]} {name}, not {entries(name)}"
        eventually(lambda of=name: entries(of) <= known[of], 10, what)  # type: ignore[misc]


def assert_never_more(numbers: list[int], what: str) -> None:
    """Check that the numbers do not grow. Ten measurements detect a leak of one object in SOME tenants."""
    some = max(2, len(numbers) // 4)
    assert min(numbers[-some:]) <= max(numbers[:some]), f"{what}: {numbers}"


def kept_descriptors(pid: int) -> int:
    """Return how many descriptors a process keeps: the least of ten counts, because its threads have files open."""
    counts = []
    for _ in range(10):
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.05)
    return min(counts)


def sizes(service: Service) -> dict[str, int]:
    """Return memory, descriptors and threads of agent and gatekeeper, and the numbers of kernel objects for tenants."""
    assert service.agent
    found = {f"entries of {name}": entries(name) for name in MAPS}
    for name, pid in (("agent", service.agent.pid), ("gatekeeper", *service.gatekeepers())):
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found[f"KiB of the {name}"] = int(fields["VmRSS"].split()[0])
        found[f"threads of the {name}"] = int(fields["Threads"])
        found[f"descriptors of the {name}"] = kept_descriptors(pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(7200)  # the full count takes half an hour
def test_many_short_lived_tenants_leave_no_entries_and_at_most_5_mib_of_memory(
    service: Service, parent: Path, scale
) -> None:
    known = {name: entries(name) for name in MAPS}  # registered processes outside every tenant keep their entries
    looks, counters = [], entries("counters")
    for first in range(0, WARM + scale(500, 4_000, 100_000), SOME):
        churn(parent, range(first, first + SOME))
        assert_none_left(60)
        assert_maps_empty(known)
        looks.append(sizes(service))
    looks = looks[WARM // SOME - 1 :]  # the first measurement once all caches are full
    print(f"{SOME} tenants between two of:", *({n: x for n, x in look.items() if x} for look in looks), sep="\n")
    for what, before in looks[0].items():
        if what.startswith("KiB"):
            assert looks[-1][what] - before <= GROWTH_KIB, f"{what}: grown by more than {GROWTH_KIB} KiB"
        else:
            assert_never_more([look[what] for look in looks], what)
    assert entries("counters") <= counters + 5, "counters of removed tenants are left"
    assert ask(verb="snapshot")["failures"] == 0


def test_a_new_tenant_in_an_unmanaged_cgroup_has_its_limit_from_the_start(parent: Path) -> None:
    """The first program of a new tenant in an unmanaged cgroup has its limit, however early it starts."""
    say_hello(parent)
    eventually(lambda: entries("resolved") > 0, 5, "the kernel's record that the parent cgroup is unmanaged")
    refused = "fgpu_memory_refused_total"
    for number in range(20):
        cgroup = parent / f"new-{number}"
        cgroup.mkdir()
        fill(cgroup)
        counts = {k: n for (name, k), n in metrics().items() if name == refused and ("tenant", cgroup.name) in k}
        reasons = {dict(k)["reason"] for k, n in counts.items() if n}
        assert reasons == {"limit"}
        remove_cgroup(cgroup)
