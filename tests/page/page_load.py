"""Five example tenants on two devices: training, notebooks, serving, one without the shim, and an unmanaged program.

The module starts their programs. The page shows the figures of agent and kernel about them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.support.commands import ask
from tests.support.host import BUILD, ENVIRONMENT, GIB, ROOT
from tests.support.place import Place
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually

# python HOLD DEVICE MIB...: a context on that device and these allocations; refused ones are left out.
HOLD = """
import ctypes, sys
cuda, context, at = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()
assert cuda.cuInit(0) == 0 and cuda.cuCtxCreate_v2(ctypes.byref(context), 0, int(sys.argv[1])) == 0
for size in sys.argv[2:]:
    cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(int(size) << 20))
print("holds", flush=True)
sys.stdin.read()
"""


class Host:
    """A host with tenants that have realistic names."""

    def __init__(self, work: Path, closing: ExitStack) -> None:
        self._work, self._closing = work, closing
        self._hold = work / "hold.py"
        self._hold.write_text(HOLD)

    def tenant(self, name: str, memory: int, *options: str) -> Tenant:
        """Make a tenant with `fgpu run`."""
        place = Place(self._work, *options)
        folder = self._work / name
        folder.mkdir()
        tenant = place._make(name, folder, memory)
        place.tenants.append(tenant)
        self._closing.callback(place.close)
        self._closing.callback(end, tenant)
        return tenant

    def hold(self, tenant: Tenant, device: int, *sizes_mib: int) -> None:
        """Start a program that holds these allocations."""
        held = Program(tenant, f"hold{device}", " ".join(map(str, self._command(device, *sizes_mib))))
        self._closing.callback(held.close)
        assert held.receive(60) == "holds"

    def spin(self, tenant: Tenant) -> None:
        """Start a program with kernels in flight whenever possible, on the first device."""
        spinning = Program(tenant, "spin", f"{self._compiled_spin()} 200 burst")
        self._closing.callback(spinning.close)
        assert spinning.receive(60) == "ready"
        spinning.send("600")

    def beside(self, device: int, size_mib: int, enter: str = "") -> None:
        """Start a program without the shim.

        `enter` are the shell's words before it. Without them the program is in no tenant.
        """
        words = [sys.executable, self._hold, device, size_mib]
        command = ["sh", "-c", f'{enter} exec "$@"', "sh", *map(str, words)]
        pipe = subprocess.PIPE
        program = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT)
        self._closing.callback(program.wait)
        self._closing.callback(program.kill)
        assert program.stdout
        assert program.stdout.readline() == "holds\n"

    def _command(self, *words: object) -> list[object]:
        return [sys.executable, self._hold, *words]

    def _compiled_spin(self) -> Path:
        made = self._work / "spin"
        if not made.exists():
            flags = ["-std=gnu11", "-O2", f"-I{BUILD}/headers"]
            subprocess.run(["gcc", *flags, "-o", made, ROOT / "bench/programs/spin.c", "-ldl"], check=True, timeout=60)
        return made


def end(tenant: Tenant) -> None:
    """Kill all processes in the tenant."""
    for pid in tenant.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def applied(work: Path) -> Iterator[None]:
    """Start the tenants and programs of the load, and continue when the Snapshot shows them. They end afterwards."""
    with ExitStack() as closing:
        host = Host(work, closing)
        training = host.tenant("training", 48 * GIB, "--weight", "300")
        alice = host.tenant("alice", 16 * GIB, "--weight", "100")
        bob = host.tenant("bob", 12 * GIB)
        serving = host.tenant("serving", 40 * GIB)
        render = host.tenant("render", 8 * GIB)
        host.hold(training, 0, 30_000, 9_000)
        host.hold(training, 1, 22_000)
        host.hold(alice, 0, 9_000, 9_000, 9_000, 1_500)
        host.hold(bob, 0, 3_300)
        host.hold(serving, 1, 39_900)
        host.beside(1, 5_000, f"echo $$ >{render.cgroup}/cgroup.procs;")
        host.beside(1, 9_500)
        host.spin(training)
        host.spin(alice)
        eventually(_is_seen, 60, "the load in the Snapshot")
        yield


def _is_seen() -> bool:
    """Return whether the snapshot shows the unmanaged program, the tenant without the shim, and the expected shares."""
    snapshot = ask(verb="snapshot")
    shares = [d["compute"] for t in snapshot["tenants"] for d in t["devices"] if d["gpu"] == 0 and d["compute"]]
    around = [t for t in snapshot["tenants"] if t["shimless"]]
    due = [s for s in shares if s["entitled_ratio"] and abs(s["had_ratio"] - s["entitled_ratio"]) < 0.03]
    return bool(snapshot["devices"][1]["unmanaged_bytes"] and around and len(due) == 2)
