"""A known load on one simulated device, and the resulting figures.

The module starts four tenants and a process outside every tenant. The expected figures of a dashboard are computed here
from the requested load, never from figures of the agent.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import BUILD, CONTEXT, ENVIRONMENT, GIB, MIB, REFUSED, ROOT, SIM
from tests.support.outside import outside
from tests.support.place import Place
from tests.support.tenant import Client, Program, Tenant

CAPACITY = 16 * GIB
FULL_LIMIT, FULL_USED = CONTEXT + 96 * MIB, CONTEXT + 64 * MIB
AROUND_LIMIT, AROUND_USED = 2 * GIB, CONTEXT + 32 * MIB
BUSY_LIMIT = GIB
STRANGER = CONTEXT + 128 * MIB
REFUSALS = 5  # few: the tolerance for Prometheus' extrapolation depends on this number
FATAL_XIDS, XIDS = 1, 3
WEIGHTS = {"heavy": 300, "light": 100}
CEILINGS = {"heavy": 0.8, "light": 0.1}  # less than 1 in sum, so that each tenant is limited by its own ceiling
DUE = CEILINGS  # entitlements: the other tenant is due the time above a tenant's ceiling, up to its own ceiling


@dataclass
class Load:
    """The tenants by their role, and the program whose refusals are counted."""

    tenants: dict[str, Tenant]
    full: Client

    def refuse(self) -> None:
        """Make REFUSALS allocations that are too large."""
        for _ in range(REFUSALS):
            assert self.full.do(f"alloc {64 * MIB}") == REFUSED

    def report_xids(self) -> None:
        """Report FATAL_XIDS of the device, and others of a program."""
        faults = ["xid=79"] * FATAL_XIDS + ["xid=31"] * (XIDS - FATAL_XIDS)
        subprocess.run([SIM / "fgpu-simd", "--fault", ",".join(faults)], check=True, timeout=10)

    @property
    def committed(self) -> int:
        """Return the sum of the limits."""
        return FULL_LIMIT + AROUND_LIMIT + 2 * BUSY_LIMIT

    @property
    def used(self) -> dict[str, int]:
        """Return the bytes of each tenant by its name. The driver's figure is used for modules of busy tenants."""
        busy = {self.tenants[part].name: self.tenants[part].driver() for part in WEIGHTS}
        return busy | {self.tenants["full"].name: FULL_USED, self.tenants["around"].name: AROUND_USED}


def device_used() -> int:
    """Return the bytes in use as nvidia-smi shows them, with the driver's own, in whole MiB."""
    query = [SIM / "nvidia-smi", "--query-gpu=memory.used,memory.reserved", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout
    return sum(map(int, said.split(","))) * MIB


def compiled_spin(work: Path) -> Path:
    """Compile the benchmark's program that keeps the device busy, and return its path."""
    flags = ["-std=gnu11", "-O2", f"-I{BUILD}/headers"]
    subprocess.run(["gcc", *flags, "-o", work / "spin", ROOT / "bench/programs/spin.c", "-ldl"], check=True, timeout=60)
    return work / "spin"


@contextmanager
def stranger() -> Iterator[None]:
    """Start a process in no tenant, with a context and 128 MiB."""
    pipe = subprocess.PIPE
    command = [BUILD / "e2e/client"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=ENVIRONMENT) as process:
        try:
            assert process.stdin
            assert process.stdout
            assert process.stdout.readline().startswith("ready ")
            process.stdin.write(f"alloc {128 * MIB}\n")
            assert process.stdout.readline().startswith("ok ")
            yield
        finally:
            process.kill()


def end(tenant: Tenant) -> None:
    """Kill all processes in the tenant's cgroup."""
    for pid in tenant.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def busy(work: Path, part: str, program: Path, closing: ExitStack) -> Tenant:
    """Return a tenant that has kernels in flight whenever its gate is open."""
    place = Place(work, "--weight", str(WEIGHTS[part]), "--compute", f"{CEILINGS[part]:.0%}")
    closing.callback(place.close)
    tenant = place.tenant(BUSY_LIMIT)
    spinning = Program(tenant, "spin", f"{program} 200 burst")
    closing.callback(spinning.close)
    closing.callback(end, tenant)
    assert spinning.receive(30) == "ready"
    spinning.send("600")
    return tenant


@contextmanager
def applied(work: Path) -> Iterator[Load]:
    """Start all of the load except the refusals."""
    with ExitStack() as closing:
        place = Place(work)
        closing.callback(place.close)
        tenants = {"full": place.tenant(FULL_LIMIT), "around": place.tenant(AROUND_LIMIT)}
        for tenant in tenants.values():
            tenant.assert_enforced()
        full = tenants["full"].client()
        full.ok(f"alloc {64 * MIB}")
        around = outside(tenants["around"], "around", SIM / "lib")
        closing.callback(around.kill)
        around.ok(f"alloc {32 * MIB}")
        closing.enter_context(stranger())
        program = compiled_spin(work)
        tenants |= {part: busy(work, part, program, closing) for part in WEIGHTS}
        yield Load(tenants, full)
