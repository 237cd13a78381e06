"""Measure a host with many tenants: start, `fgpu status`, scrapes, web page, change of a limit, `fgpu top`, idle cost.

Makes --tenants cgroups (default: 1,000) that one policy matches, and prints `scale_NAME VALUE UNIT`. Then makes a tenth
of them, and prints the processor time and memory of agent and gatekeeper while these tenants are idle. Writes
build/bench/scale.json. Exits with 1 if a bar is missed. Starts and stops the agent, with the driver at --driver-root.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench.lib.service import FGPU, BenchError, agent, percentile
from bench.lib.tenants import ask, cgroup_root, cpu_ms, record, service_pids

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: scale}
spec:
  selector: {cgroup: ["fgpu-scale/*"]}
  memory: {limit: 1GiB}
"""
LISTEN = "127.0.0.1:19424"
PAGE_SECONDS = 2  # the interval at which the script of the web page asks the agent
BARS = {
    "start_seconds": 3.0,
    "status_cold_ms": 1000.0,
    "status_warm_ms": 250.0,
    "scrape_ms": 150.0,
    "scrape_mb": 2.5,
    "page_ms": 150.0,
    "page_kb": 100.0,
    "page_agent_percent": 5.0,
    "set_p99_ms": 100.0,
    "top_percent": 5.0,
    "agent_rss_mib": 80.0,
    "agent_idle_percent": 0.5,
}


@contextlib.contextmanager
def cgroups(count: int) -> Iterator[Path]:
    """Make `count` empty cgroups inside a common cgroup, and yield the path of that cgroup."""
    parent = cgroup_root() / "fgpu-scale"
    parent.mkdir()
    try:
        for number in range(count):
            (parent / f"t{number}").mkdir()
        yield parent
    finally:
        for child in parent.iterdir():
            if child.is_dir():
                child.rmdir()
        parent.rmdir()


def milliseconds(what: list[str]) -> float:
    """Return how long a command takes, in milliseconds."""
    begun = time.monotonic()
    subprocess.run(what, stdout=subprocess.DEVNULL, check=True, timeout=60)
    return 1e3 * (time.monotonic() - begun)


def asked(path: str) -> tuple[float, int]:
    """Request a path at the metrics address. Return the milliseconds until the whole answer, and its size in bytes."""
    begun = time.monotonic()
    with urllib.request.urlopen(f"http://{LISTEN}{path}", timeout=30) as answer:
        size = len(answer.read())
    return 1e3 * (time.monotonic() - begun), size


def page(seconds: float) -> dict[str, float]:
    """Measure the web page: first and later loads, and the agent's processor time at one load every PAGE_SECONDS."""
    first, size = asked("/")
    found = {"page_cold_ms": first, "page_kb": size / 1e3}
    found["page_ms"] = percentile([asked("/")[0] for _ in range(7)], 50)
    pid = service_pids()["agent"]
    before, begun = cpu_ms(pid), time.monotonic()
    while time.monotonic() - begun < seconds:
        time.sleep(PAGE_SECONDS)
        asked("/")
    return found | {"page_agent_percent": 100 * (cpu_ms(pid) - before) / (1e3 * (time.monotonic() - begun))}


def sets(parent: Path, times: int) -> list[float]:
    """Return the milliseconds of each request that changes a limit. The agent replies when the limit is in force."""
    taken = []
    path = f"/{parent.name}/t0"
    for number in range(times):
        begun = time.monotonic()
        ask(verb="put", target=path, memory=f"{1024 + number % 2}MiB")
        taken.append(1e3 * (time.monotonic() - begun))
    ask(verb="drop", target=path)
    return taken


def top(seconds: float) -> dict[str, float]:
    """Return the processor time of `fgpu top` (160 x 50 characters) and of the agent, in percent of one processor."""
    hands, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 50, 160, 0, 0))
    threading.Thread(target=drain, args=(hands,), daemon=True).start()
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen([*FGPU, "top"], stdin=terminal, stdout=terminal, env=environment) as watching:
        time.sleep(3)  # the start of the program is not measured
        if watching.poll() is not None:
            raise BenchError("fgpu top has ended")
        pids = {"top": watching.pid, "top_agent": service_pids()["agent"]}
        before, begun = {name: cpu_ms(pid) for name, pid in pids.items()}, time.monotonic()
        time.sleep(seconds)
        elapsed_ms = 1e3 * (time.monotonic() - begun)
        spent = {f"{name}_percent": 100 * (cpu_ms(pid) - before[name]) / elapsed_ms for name, pid in pids.items()}
        os.write(hands, b"q")
        watching.wait(10)
    os.close(terminal)
    return spent


def drain(terminal: int) -> None:
    """Read the output of the program, as a terminal does, until the program exits."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def idle(seconds: float) -> dict[str, float]:
    """Return the processor time of agent and gatekeeper in percent of one processor, and their resident memory."""
    pids = service_pids()
    before, begun = {name: cpu_ms(pid) for name, pid in pids.items()}, time.monotonic()
    time.sleep(seconds)
    elapsed_ms = 1e3 * (time.monotonic() - begun)
    spent = {f"{name}_idle_percent": 100 * (cpu_ms(pid) - before[name]) / elapsed_ms for name, pid in pids.items()}
    return spent | {f"{name}_rss_mib": resident_mib(pid) for name, pid in pids.items()}


def page_grows() -> dict[str, float]:
    """Return by how much the first loads of the web page increase the agent's resident memory, in MiB."""
    pid = service_pids()["agent"]
    before = resident_mib(pid)
    for _ in range(7):
        asked("/")
    return {"page_grown_mib": resident_mib(pid) - before}


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def many(options: list[str], count: int, watched_seconds: float) -> dict[str, float]:
    """Measure everything except the idle cost, with `count` tenants. Raises BenchError if a tenant is missing."""
    with cgroups(count) as parent, agent(options) as started:
        there = len(ask(verb="snapshot")["tenants"])
        if there != count:
            raise BenchError(f"{there} tenants of {count} are in force")
        found = {"start_seconds": started, "status_cold_ms": milliseconds([*FGPU, "status", "--json"])}
        found["status_warm_ms"] = percentile([milliseconds([*FGPU, "status", "--json"]) for _ in range(7)], 50)
        time.sleep(1.5)
        scrapes = [asked("/metrics") for _ in range(7)]
        found["scrape_ms"] = percentile([ms for ms, _ in scrapes], 50)
        found["scrape_mb"] = scrapes[0][1] / 1e6
        found |= page(watched_seconds)
        found["set_p50_ms"] = percentile(taken := sets(parent, 300), 50)
        return found | {"set_p99_ms": percentile(taken, 99)} | top(watched_seconds)


def unit(name: str) -> str:
    """Return the unit of a figure, which is the last word of its name."""
    return name.rpartition("_")[2].replace("percent", "%")


def report(found: dict[str, float]) -> int:
    """Print all figures and the missed bars. Return 1 if there are any."""
    record("scale", {f"scale_{name}": (value, unit(name)) for name, value in found.items()})
    missed = [name for name, bar in BARS.items() if name in found and found[name] > bar]
    for name in missed:
        print(f"scale_{name}: bar {BARS[name]:g} {unit(name)} MISSED")
    return 1 if missed else 0


def main() -> int:
    """Read the command line, measure and print. Return 0 if every bar is held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", default=str(Path(__file__).resolve().parent.parent / "build/shim/libfgpu.so"))
    parser.add_argument("--tenants", type=int, default=1000)
    parser.add_argument("--idle-seconds", type=float, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        policies = Path(folder, "policy.d")
        policies.mkdir()
        (policies / "scale.yaml").write_text(POLICY, encoding="utf-8")
        options = ["--driver-root", given.driver_root, "--shim", given.shim, "--listen", LISTEN]
        options += ["--policies", str(policies)]
        found = many(options, given.tenants, given.idle_seconds)
        with cgroups(given.tenants // 10), agent(options):
            time.sleep(2)
            found |= idle(given.idle_seconds) | page_grows()
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
