"""Measure the processor time of fgpu while tenants allocate and free all the time, in percent of one processor.

Prints `load_PART VALUE %`, before any program allocates (idle) and under load. PART is `agent` or `gatekeeper` (their
processor time), or `kernel`: the run time of the pinned BPF programs, by the kernel's own clock around each run. The
trap into the kernel before each run is not included; `./dev bench memory` measures it. Writes build/bench/load.json.
Exits with 1 if the bar is missed. Starts and stops the agent.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.lib.service import ROOT, BenchError, agent
from bench.lib.tenants import Program, cpu_ms, ending, record, service_pids

BAR_PERCENT = 1.0
RUNS_A_PAIR = 6  # 5, and some for processes that start and exit. If there are more, other programs use the driver too
LIMIT = 1 << 30
IDLE_SECONDS = 5
BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 321)
OBJ_GET, ENABLE_STATS, RUN_TIME = 7, 32, 0
CALLED_BY_THE_AGENT = "adjust"  # its run time is already in the agent's processor time
libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, attributes: bytes) -> int:
    """Call bpf(2) with a command that returns a descriptor. Raises BenchError."""
    room = ctypes.create_string_buffer(attributes, 128)
    fd = int(libc.syscall(BPF, command, room, 128))
    if fd < 0:
        raise BenchError(f"bpf({command}): {os.strerror(ctypes.get_errno())}")
    return fd


@contextmanager
def programs() -> Iterator[dict[str, int]]:
    """Yield descriptors of the pinned programs by name. Inside the block, the kernel measures their run time."""
    found = {"": bpf(ENABLE_STATS, struct.pack("I", RUN_TIME))}
    try:
        for path in Path("/sys/fs/bpf/fgpu").glob("v*/programs/*"):
            name = ctypes.create_string_buffer(os.fsencode(path))
            found[path.name] = bpf(OBJ_GET, struct.pack("QII", ctypes.addressof(name), 0, 0))
        yield {name: fd for name, fd in found.items() if name not in ("", CALLED_BY_THE_AGENT)}
    finally:
        for fd in found.values():
            os.close(fd)


def runs(fd: int) -> tuple[int, int]:
    """Return the run time of a BPF program in nanoseconds, and the number of its runs."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(said["run_time_ns"]), int(said["run_cnt"])


class Meter:
    """The processor time since its creation, as percent of one processor."""

    def __init__(self, fds: dict[str, int]) -> None:
        self._fds, self._pids = fds, service_pids()
        self._before, self._begun = self._spent(), time.monotonic()

    def _spent(self) -> dict[str, float]:
        counted = [runs(fd) for fd in self._fds.values()]
        kernel_ms, count = sum(ns for ns, _ in counted) / 1e6, sum(n for _, n in counted)
        return {name: cpu_ms(pid) for name, pid in self._pids.items()} | {"kernel": kernel_ms, "runs": count}

    def read(self) -> dict[str, float]:
        """Return the percentage of each part. The value of "runs" is the number of runs of BPF programs."""
        elapsed_ms = 1e3 * (time.monotonic() - self._begun)
        spent = {name: value - self._before[name] for name, value in self._spent().items()}
        return {name: value if name == "runs" else 100 * value / elapsed_ms for name, value in spent.items()}


def load(given: argparse.Namespace, fds: dict[str, int]) -> tuple[dict[str, float], float, int, int]:
    """Run pairs of an allocation and a free in all processes, each in a tenant.

    Returns:
        The percentages of Meter.read() after all processes have started, the seconds, the number of completed pairs,
        and the number of late pairs.
    """
    with ending() as programs:
        for number in range(given.processes):
            programs.append(Program([str(given.program)], LIMIT, f"load-{number}"))
        for program in programs:
            if not program.hear().startswith("ready"):
                raise BenchError(f"{program.name} is not ready")
        time.sleep(1)  # until all processes have started
        meter, begun = Meter(fds), time.monotonic()
        for program in programs:
            program.say(f"paced {given.rate // given.processes} {given.seconds}")
        said = [program.hear(given.seconds + 60).split() for program in programs]
        seconds, spent = time.monotonic() - begun, meter.read()
    if any(words[0] == "-" for words in said):
        raise BenchError(f"refused: {said}")
    return spent, seconds, sum(int(words[0]) for words in said), sum(int(words[1]) for words in said)


def report(idle: dict[str, float], loaded: dict[str, float], seconds: float, done: int, late: int) -> int:
    """Print all figures. Return 1 if the bar is missed."""
    lines: dict[str, tuple[float, str]] = {"load_pairs": (done / seconds, "per s"), "load_pairs_late": (late, "")}
    for name in ("agent", "gatekeeper", "kernel"):
        lines[f"load_{name}_idle"] = (idle[name], "%")
        lines[f"load_{name}"] = (loaded[name], "%")
    lines["load_programs_per_pair"] = (loaded["runs"] / done, "")
    if lines["load_programs_per_pair"][0] > RUNS_A_PAIR:
        print("# load: other programs use the driver too, and the kernel's part includes theirs", file=sys.stderr)
    lines["load_kernel_per_pair"] = (loaded["kernel"] / 100 * seconds * 1e6 / done, "us")
    for which, found in (("idle", idle), ("together", loaded)):
        lines[f"load_{which}"] = (found["agent"] + found["gatekeeper"] + found["kernel"], "%")
    held = lines["load_together"][0] <= BAR_PERCENT
    lines["load_bars_held"] = (int(held), "of 1")
    record("load", lines)
    return 0 if held else 1


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=int, default=3000, help="pairs a second, of all processes")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--program", type=Path, default=ROOT / "build/bench/pairs")
    given = parser.parse_args()
    try:
        with agent(["--driver-root", given.driver_root, "--shim", str(given.shim)]), programs() as fds:
            time.sleep(1)  # until the agent has completed its start
            meter = Meter(fds)
            time.sleep(IDLE_SECONDS)
            idle = meter.read()
            loaded, seconds, done, late = load(given, fds)
    except (BenchError, OSError) as error:
        print(f"bench load: {error}", file=sys.stderr)
        return 1
    return report(idle, loaded, seconds, done, late)


if __name__ == "__main__":
    sys.exit(main())
