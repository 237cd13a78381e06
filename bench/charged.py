"""Check that all memory of the device is charged: shared memory, exits of processes, the driver's own memory.

Each scenario (bench/programs/charged_*.c) runs in a separate tenant with a limit of 8 GiB. For each mark of a scenario,
one line is printed: in MiB, the increase of the device's memory in use since the scenario began, and the ledger's bytes
of the tenant; for how many milliseconds after the mark the ledger was lower, or higher, than the device; and NVML's
bytes of each process.

Then prints `charged_NAME VALUE UNIT`, and writes build/bench/charged.json. Exits with 1 if device and ledger still
differ SECONDS after a mark, or if memory beyond the limit was not refused. Starts and stops the agent, except with
--running. No other program may use the device.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pynvml

from bench.lib import nvml
from bench.lib.service import ROOT, BenchError, agent, end_in_order
from bench.lib.tenants import Program, ask, ending, record

MIB = 1 << 20
LIMIT = 8 << 30
ROUNDING = 2 * MIB
LAST_BLOCK = 38 * MIB  # of a pool: may be beyond the limit
PERIOD_SECONDS, SETTLED_SECONDS = 0.02, 0.3
SCENARIOS = {
    "shared": ("exp_fd", "exp_dead", "imp_dead", "ipc_free", "ipc_dead", "dma_buf", "pool_exp"),
    "kept": ("fork_fd", "fork_managed", "scm", "exec_keep", "reuse", "leader"),
    "alone": (
        "stack", "lmem", "heap", "fifo", "globals", "managed", "hostreg", "streams", "graph_nodes", "reset", "contexts",
        "graph_mem",
    ),
    "arrays": ("former", "formats", "sparse", "multicast", "fragments"),
}  # fmt: skip
PROGRAM_OF = {name: f"charged_{program}" for program, names in SCENARIOS.items() for name in names}
# Memory in use on the device that NVML shows for no process, measured on one H200: for each context, and once for the
# device. BESIDES has more of it in some scenarios: what the driver keeps of managed memory, page tables of registered
# host memory (2 MiB for each GiB), and 2 MiB from the first launch of a kernel that prints.
CONTEXT_REST, DEVICE_REST, MANAGED_REST = 5.6 * MIB, 3.2 * MIB, 25 * MIB
# The number of contexts at one time; 1 in all other scenarios.
CONTEXTS = dict.fromkeys(("imp_dead", "ipc_free", "ipc_dead", "pool_exp", "contexts"), 2)
BESIDES = {"managed": MANAGED_REST, "fork_managed": MANAGED_REST, "hostreg": 8 * 2 * MIB, "fifo": 2 * MIB}
REFUSED = {"exp_fd": "cuMemCreate returns 2", "stack": "cuCtxSetLimit returns 2"}


@dataclass(slots=True)
class Row:
    """A mark: the bytes of device and ledger, and for how long they differed.

    `lower_ms` and `higher_ms` are the milliseconds for which the ledger was lower or higher than the device. `wrong`
    has the errors that remain at the end. `rows` has NVML's bytes of each process, as text.
    """

    text: str
    device: int = 0
    rows: str = ""
    ledger: int = 0
    lower_ms: float = 0.0
    higher_ms: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the printed line."""
        times = f"lower {self.lower_ms:4.0f} ms, higher {self.higher_ms:4.0f} ms"
        wrong = f"  <-- {', '.join(self.wrong)}" if self.wrong else ""
        return f"   {self.text:<48} {self.device // MIB:>7} {self.ledger // MIB:>7}  {times}  {self.rows}{wrong}"


def driver_rest(scenario: str) -> float:
    """Return the bytes that the device may hold in a scenario and that NVML shows for no process."""
    return CONTEXTS.get(scenario, 1) * CONTEXT_REST + DEVICE_REST + BESIDES.get(scenario, 0.0)


def rows_of(roles: dict[int, str]) -> str:
    """Return NVML's bytes of each process on device 0, as text."""
    shown = [f"{roles.get(pid, pid)}:{bytes_ // MIB}" for pid, bytes_ in sorted(nvml.bytes_by_pid().items())]
    return " ".join(shown) or "none"


def tenant_bytes(name: str) -> int:
    """Return the ledger's bytes of a tenant on device 0. The tenant's cgroup may be gone."""
    tenants = [t for t in ask(verb="snapshot")["tenants"] if t["tenant"] == name or t["tenant"].startswith(f"{name}-")]
    return sum(int(tenant["devices"][0]["used_bytes"]) for tenant in tenants)


def bypasses(name: str) -> int:
    """Return how many processes of a tenant the agent reports as bypassing."""
    return sum(sum(t["bypassing"].values()) for t in ask(verb="snapshot")["tenants"] if t["tenant"] == name)


class Scenario:
    """One scenario in a tenant, and the rows of its marks."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._tenant = f"charged-{name.replace('_', '-')}"
        self._victim = f"{self._tenant}-victim"
        self._notes: list[str] = []
        self.rows: list[Row] = []
        self._before = nvml.bytes_in_use()

    def run(self) -> None:
        """Run the scenario, and print each row when it is known. Raises BenchError if the scenario fails."""
        with ending() as programs:
            program = Program([str(ROOT / "build/bench" / PROGRAM_OF[self._name]), self._name], LIMIT, self._tenant)
            programs.append(program)
            threading.Thread(target=program.process.wait, daemon=True).start()  # reaps the process when it exits
            print(f"== {self._name}", flush=True)
            while self._answer(program, programs):
                pass
        self._look("after its end", {}, 0)
        refused = REFUSED.get(self._name)
        if refused and not any(note.startswith(refused) for note in self._notes):
            self.rows[-1].wrong.append(f"no {refused}")
            print(f"   <-- no {refused}")

    def _answer(self, program: Program, programs: list[Program]) -> bool:
        kind, text, roles, host = program.hear(20).split("|")
        if kind == "note":
            self._notes.append(text)
            print(f"   . {text}", flush=True)
        if kind == "reuse":
            programs.append(self._reuse(int(roles.split()[0].partition("=")[2])))
        if kind == "mark":
            pids = {int(pid): role for role, _, pid in (part.partition("=") for part in roles.split())}
            self._look(text, pids, int(host))
            program.say("")
        return kind != "end"

    def _look(self, text: str, roles: dict[int, str], host: int) -> None:
        """Compare device and ledger until they have agreed for SETTLED_SECONDS, or the time is over. Add a row."""
        row, begun = Row(text), time.monotonic()
        agreed = None
        while True:
            row.device, row.ledger = nvml.bytes_in_use() - self._before, tenant_bytes(self._tenant)
            now = time.monotonic()
            lower = row.device - row.ledger > driver_rest(self._name) + ROUNDING
            higher = row.ledger - row.device > host + ROUNDING
            row.lower_ms = 1000 * (now - begun) if lower else row.lower_ms
            row.higher_ms = 1000 * (now - begun) if higher else row.higher_ms
            agreed = None if lower or higher else agreed or now
            if (agreed and now - agreed >= SETTLED_SECONDS) or now - begun >= self._seconds:
                break
            time.sleep(PERIOD_SECONDS)
        beyond = row.device > LIMIT + driver_rest(self._name) + LAST_BLOCK
        row.rows = rows_of(roles)
        found = (("lower", lower), ("higher", higher), ("beyond the limit", beyond))
        row.wrong = [word for word, is_so in found if is_so] + self._harmed()
        self.rows.append(row)
        print(row.line(), flush=True)

    def _harmed(self) -> list[str]:
        """Return errors about the second tenant, which must not be charged or reported as bypassing."""
        charged = sum(
            t["devices"][0]["used_bytes"] for t in ask(verb="snapshot")["tenants"] if t["tenant"] == self._victim
        )
        harm = [f"another tenant is charged {charged // MIB}"] if charged else []
        return [*harm, "another tenant is reported as bypassing"] if bypasses(self._victim) else harm

    def _reuse(self, pid: int) -> Program:
        """Start a process of another tenant with the pid of an exited process. Raises BenchError if it is not free."""
        for _ in range(100):
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
            victim = Program(["sleep", "60"], 2 * MIB, self._victim)
            if victim.process.pid != pid:
                victim.end()
                continue
            time.sleep(1.0)  # until its cgroup is a tenant
            if all(tenant["tenant"] != self._victim for tenant in ask(verb="snapshot")["tenants"]):
                victim.end()
                raise BenchError(f"process {pid} of another tenant did not start")
            return victim
        raise BenchError(f"another process has pid {pid}")


def measure(names: list[str], seconds: float) -> dict[str, list[Row] | str]:
    """Run all scenarios in turn. Return the rows of each, or the error of a scenario that failed."""
    found: dict[str, list[Row] | str] = {}
    print(f"{'MiB since before':<52}{'device':>7} {'ledger':>7}")
    for name in names:
        scenario = Scenario(name, seconds)
        try:
            scenario.run()
            found[name] = scenario.rows
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            print(f"   <-- failed: {error}", flush=True)
            found[name] = f"{error}"
    return found


def report(found: dict[str, list[Row] | str]) -> int:
    """Print the figures. Return 1 if a mark has an error or a scenario failed."""
    rows = [row for said in found.values() if not isinstance(said, str) for row in said]
    failed = sum(isinstance(said, str) for said in found.values())
    wrong = sum(bool(row.wrong) for row in rows)
    lines: dict[str, tuple[float, str]] = {
        "charged_scenarios": (len(found), "of them failed: " + str(failed)),
        "charged_rows": (len(rows), "marks"),
        "charged_wrong": (wrong, "marks"),
        "charged_lower_longest": (max((row.lower_ms for row in rows), default=0.0), "ms"),
        "charged_higher_longest": (max((row.higher_ms for row in rows), default=0.0), "ms"),
    }
    record("charged", lines)
    return 1 if wrong or failed else 0


@contextlib.contextmanager
def service(given: argparse.Namespace) -> Iterator[None]:
    """Run the agent, except with --running."""
    if given.running:
        end_in_order()
        yield
        return
    with agent(["--driver-root", given.driver_root, "--shim", str(given.shim)]):
        yield


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(PROGRAM_OF)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="in which device and ledger must agree")
    parser.add_argument("--running", action="store_true", help="an agent runs already")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    given = parser.parse_args()
    unknown = set(given.scenarios) - set(PROGRAM_OF)
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}")
    try:
        pynvml.nvmlInit()
        with service(given):
            found = measure(given.scenarios or list(PROGRAM_OF), given.seconds)
    except (BenchError, OSError, pynvml.NVMLError) as error:
        print(f"bench charged: {error}", file=sys.stderr)
        return 1
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
