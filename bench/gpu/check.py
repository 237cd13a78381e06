"""Check one claim on a machine with a GPU: `python -m bench.gpu.check CLAIM`.

The program prints figures, and PASS, FAIL or SKIP in the last line, with exit status 0, 1 or 77. bench/gpu_check.sh
runs all claims. The program starts and stops its own agent. It uses the support library of the end-to-end tests, with
the driver at $DRIVER_ROOT (default: /). It needs the Python package pynvml. Some claims need torch or jax in
$TORCH_PYTHON.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml

from bench.gpu.claims import GRANULE, PYTHON, Sampler, Skip, need, say
from bench.gpu.parking import deadline, full, idle, parked, room, sizes
from bench.gpu.runtimes import runtimes
from bench.gpu.views import views
from bench.gpu.ways import contexts, deny, entries, hidden, lookups, sandbox
from bench.lib import nvml
from bench.lib.service import end_in_order
from tests.support.commands import fgpu
from tests.support.host import BUILD, DRIVER_ROOT, FGPU, GIB, MIB, REFUSED
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Client
from tests.support.wait import eventually

SKIPPED = 77  # the exit status that bench/gpu_check.sh reads

# -- the claims: the arguments of each are the service and a place that makes tenants in pid namespaces


def start(service: Service, place: Place) -> None:
    """Measure the start and the resident memory of agent and gatekeeper, and run `fgpu doctor`."""
    assert service.agent
    said = fgpu("doctor", "--driver-root", DRIVER_ROOT, check=False)
    print(said.stdout)
    need(said.returncode == 0, "fgpu doctor finds no error")
    pids = {"agent": service.agent.pid, "gatekeeper": min(service.gatekeepers())}
    time.sleep(3)  # until the resident memory is stable
    total = 0
    for name, pid in pids.items():
        kinds = {}
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            words = line.split()
            kinds[words[0].rstrip(":")] = int(words[1])
        say(f"{name}_rss", kinds["Rss"] // 1024, "MiB")
        say(f"{name}_pss", kinds["Pss"] // 1024, "MiB")
        total += kinds["Rss"] // 1024
    say("together_rss", total, "MiB")
    need(total <= 96, "agent and gatekeeper within 96 MiB")
    say("start_to_enforcing", f"{service.started_in:.2f}", "s")
    need(service.started_in <= 3, "enforcing within 3 s")


def fill(service: Service, place: Place) -> None:
    """Fill a limit up to the last granule, by cuMemAlloc and by cuMemCreate."""
    for how, name in ((0, "cuMemAlloc"), (1, "cuMemCreate")):
        limit = 4 * GIB
        one = place.tenant(limit)
        client = one.client()
        client.ok("context")
        eventually(lambda: not one.memory()["drift_bytes"], 5, "no drift")  # noqa: B023
        before = one.memory()
        sampler = Sampler(one)
        sampler.start()
        client.ok(f"fill {64 * MIB} {how}")
        client.ok(f"fill {GRANULE} {how}")
        time.sleep(1)
        sampler.end({one.name: limit})
        memory = one.memory()
        say(f"{name}_left", limit - memory["used_bytes"], "bytes")
        need(memory["peak_bytes"] <= limit, f"{name}: never beyond {limit} bytes")
        need(limit - memory["used_bytes"] < GRANULE, f"{name}: less than a granule left")
        need(memory["refused"] >= 2, f"{name}: refused")
        grown = {k: memory[f"{k}_bytes"] - before[f"{k}_bytes"] for k in ("admitted", "witnessed")}
        need(len(set(grown.values())) == 1, f"{name}: admitted and witnessed agree: {grown}")
        say(f"{name}_ledger_minus_nvml", memory["used_bytes"] - nvml.bytes_of({client.pid}), "bytes")
        need(abs(memory["used_bytes"] - nvml.bytes_of({client.pid})) <= GRANULE, f"{name}: ledger and NVML agree")
        client.kill()


TORCH = """
import torch
free, total = torch.cuda.mem_get_info()
print("total", total)
kept = []
try:
    while True:
        kept.append(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError as error:
    print("oom after", len(kept), "x 256 MiB")
del kept
torch.cuda.empty_cache()
weights = torch.randn(4096, 4096, device="cuda", requires_grad=True)
loss = (weights @ weights).square().mean()
loss.backward()
torch.cuda.synchronize()
print("then", bool(torch.isfinite(weights.grad).all()), torch.ones(1 << 28, device="cuda").sum().item() == 1 << 28)
"""

JAX = """
import os
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.99"  # so that the limit of the ledger is reached before that of JAX
import jax, jax.numpy as jnp
kept = []
try:
    while True:
        kept.append(jnp.ones((256 << 18,), dtype=jnp.float32).block_until_ready())
except Exception as error:
    print("oom after", len(kept), "x 256 MiB:", type(error).__name__, str(error)[:60].replace(chr(10), " "))
del kept
print("then", float(jnp.ones((1024, 1024)).sum()) == 1024 * 1024)
"""


def framework(place: Place, name: str, program: str) -> str:
    """Run a program in a tenant of 8 GiB while NVML is sampled, and return its output.

    Raises Skip if the Python package `name` is not installed.
    """
    found = subprocess.run([PYTHON, "-c", f"import {name}"], capture_output=True, timeout=120, check=False)
    if found.returncode:
        raise Skip(f"{name} is not installed for {PYTHON}")
    limit = 8 * GIB
    one = place.tenant(limit)
    script = one.folder / f"{name}_program.py"
    script.write_text(program)
    sampler = Sampler(one)
    sampler.start()
    said = one.run(f"{PYTHON} {script}", 300)
    sampler.end({one.name: limit})
    print(said)
    print("\n".join((one.folder / "p1.err").read_text().splitlines()[-5:]))
    memory = one.memory()
    print({k: memory[k] for k in ("limit_bytes", "used_bytes", "peak_bytes", "refused")})
    need("oom after" in said, f"{name} reports its own out-of-memory")
    need("then True" in said, f"{name} continues after it")
    need(memory["refused"] >= 1, "refused by the ledger")
    return said


def torch(service: Service, place: Place) -> None:
    """Check that torch raises its own OutOfMemoryError, and that a smaller allocation works afterwards."""
    said = framework(place, "torch", TORCH)
    need(f"total {8 * GIB}" in said, "torch shows the limit")


def jax(service: Service, place: Place) -> None:
    """Check that JAX, which allocates by cuMemCreate, reports out-of-memory and continues."""
    framework(place, "jax", JAX)


def pair(service: Service, place: Place) -> None:
    """Let two tenants fill their limits at the same moment."""
    limits = (4 * GIB, 6 * GIB)
    tenants = [place.tenant(limit) for limit in limits]
    clients = [one.client() for one in tenants]
    sampler = Sampler(*tenants)
    sampler.start()
    for client in clients:
        client.send(f"fill {16 * MIB} 0")
    for client in clients:
        client.numbers(client.receive(120), "fill")
    time.sleep(1)
    sampler.end({one.name: limit for one, limit in zip(tenants, limits, strict=True)})
    for one, limit in zip(tenants, limits, strict=True):
        memory = one.memory()
        need(memory["peak_bytes"] <= limit, f"{one.name}: peak {memory['peak_bytes']} within {limit}")
        need(limit - memory["used_bytes"] < 16 * MIB, f"{one.name}: filled")


def race(service: Service, place: Place) -> None:
    """Let two processes race for the last bytes, in 1,000 rounds.

    Then check that requests far beyond the limit do not cause refusals of requests that fit.
    """
    one = place.tenant(4 * GIB)
    (one.folder / "track").write_bytes(bytes(4096))
    racers = [one.client(), one.client()]
    for racer in racers:
        racer.ok("context")
    eventually(lambda: not one.memory()["drift_bytes"], 5, "no drift")
    racers[0].ok(f"fill {GRANULE} 0")
    racers[0].ok("drop 1")
    for racer in racers:
        racer.send(f"race {GRANULE} 2 1000")
    results = [racer.numbers(racer.receive(120), "race") for racer in racers]
    print(results)
    need(sum(wins for wins, _ in results) == 1000 and not any(bad for _, bad in results), "one winner in each round")
    other_tenant = place.tenant(8 * GIB)
    times = 100_000
    fitting, *askers = [other_tenant.client() for _ in range(4)]
    fitting.ok("context")
    for asker in askers:
        asker.ok("context")
        asker.send(f"ask {64 * GIB} 0")
    got, refused, other = fitting.ok(f"ask {MIB} {times}", 300)
    need((got, refused, other) == (times, 0, 0), f"{refused} of {times} requests that fit refused, beside others")


def kills(service: Service, place: Place) -> None:
    """Kill 200 processes that hold memory. In half of them the first thread has exited before."""
    one = place.tenant(64 * GIB)
    watcher = one.client()
    watcher.ok("context")
    eventually(lambda: not one.memory()["drift_bytes"], 5, "no drift")
    free, worst, longest = watcher.ok("info")[0], 0.0, 0.0
    for _ in range(4):
        parent = one.client()
        before, in_use = set(one.pids()), nvml.bytes_in_use()
        parent.send(f"brood 50 {4 * MIB}")
        need(parent.numbers(parent.receive(120), "brood") == [50], "50 processes hold memory")
        for pid in set(one.pids()) - before:
            os.kill(pid, 9)
        begun = time.monotonic()
        eventually(lambda most=in_use + GRANULE: nvml.bytes_in_use() <= most, 20, "freed by the driver")
        freed = time.monotonic()
        eventually(lambda: watcher.ok("info")[0] >= free - GRANULE, 20, "released")
        worst, longest = max(worst, time.monotonic() - freed), max(longest, freed - begun)
        parent.ok("reap")
        parent.kill()
    say("driver_freed_in", f"{longest:.3f}", "s")
    say("released_after", f"{worst:.3f}", "s")
    need(worst < 1, "released within a second after the driver freed it")
    eventually(lambda: len(one.view()["processes"]) == 1, 3, "no entry left")
    drift = one.memory()["used_bytes"] - nvml.bytes_of({watcher.pid})
    say("ledger_minus_nvml", drift, "bytes")
    need(abs(drift) <= GRANULE, "ledger and NVML agree")
    told = map(json.loads, fgpu("events", "--json").stdout.splitlines())
    need(not [event for event in told if event["what"] == "adopted"], "no process was adopted as an older one")


def restarts(service: Service, place: Place) -> None:
    """Kill and restart agent and gatekeeper 20 times under load."""
    limit = 4 * GIB
    one = place.tenant(limit)
    fits, hopeless = one.client(), one.client()
    for client in (fits, hopeless):
        client.ok("context")
    fits.send(f"ask {GRANULE} 0")
    hopeless.send(f"ask {64 * GIB} 0")
    for number in range(20):
        service.kill_agent()
        if number % 2:
            service.kill_gatekeeper()
        service.start_agent()
        memory = one.memory()
        assert memory["peak_bytes"] <= memory["limit_bytes"] == limit, memory
    results = []
    for client in (fits, hopeless):
        client.send("context")
        results.append(client.numbers(client.receive(), "ask"))
        client.receive()
    print(results)
    need(results[0][0] > 0 and results[0][1:] == [0, 0], "no request that fits was refused")
    need(results[1][0] == 0 and results[1][2] == 0, "no request beyond the limit was admitted")
    eventually(lambda: not one.memory()["drift_bytes"], 5, "no drift")
    drift = one.memory()["used_bytes"] - nvml.bytes_of({fits.pid, hopeless.pid})
    say("ledger_minus_nvml", drift, "bytes")
    need(abs(drift) <= 2 * GRANULE, "ledger and NVML agree")


def orphan(service: Service, place: Place) -> None:
    """Start a process while neither agent nor gatekeeper runs. Its requests must be refused until both run again."""
    one = place.tenant(4 * GIB)
    one.assert_enforced()
    service.kill_agent()
    service.kill_gatekeeper()
    client: Client = one.client()
    said = client.do("context")
    print(said)
    need(said == REFUSED, "out-of-memory, never memory")
    need(nvml.bytes_of({client.pid}) == 0, "the process holds no memory")
    service.start_agent()
    eventually(lambda: client.do("context") == "ok", 5, "memory once there is a gatekeeper")
    need(True, "memory once there is a gatekeeper")


def freed(service: Service, place: Place) -> None:
    """Free memory in each way of tests/programs/freed.c. A way that works without a limit must work with one."""
    program, limit = BUILD / "e2e/freed", 4 * GIB
    too_large = ("array", "mipmapped", "reset", "released")  # without a limit: arrays that the driver does not support
    for way in subprocess.run([program, "ways"], capture_output=True, text=True, check=True).stdout.split():
        whole = subprocess.run([program, "60", way], capture_output=True, text=True, timeout=60).stdout.strip()
        one = place.tenant(limit)
        below = one.run(f"{program} 60 {way}", 60).strip()
        print(f"{whole} | {below}", flush=True)
        if not whole:
            say(way, "the driver ends the program, without a limit too")
            continue
        _, passed, rounds, *_ = below.split()
        need(passed == rounds, f"{way}: each round has its memory")
        need(way in too_large or whole.split()[1] == rounds, f"{way}: without a limit too")
        one.end()


CLAIMS: dict[str, Callable[[Service, Place], None]] = {
    claim.__name__: claim
    for claim in (
        start,
        views,
        runtimes,
        fill,
        torch,
        jax,
        pair,
        race,
        kills,
        restarts,
        orphan,
        freed,
        lookups,
        hidden,
        sandbox,
        contexts,
        deny,
        parked,
        sizes,
        idle,
        room,
        full,
        deadline,
        entries,
    )
}


@contextlib.contextmanager
def host() -> Iterator[tuple[Service, Place]]:
    """Run an agent, and yield it with a place for tenants. An agent of an earlier claim is detached first."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        service, place = Service(work), Place(work, "--pidns")
        fgpu("detach", check=False)
        for pid in service.gatekeepers():
            os.kill(pid, 9)
        try:
            service.start_agent()
            yield service, place
        finally:
            with contextlib.suppress(Exception):
                place.close()
            service.stop()
            print("\n".join(service.log.read_text().splitlines()[-15:]))


def main() -> int:
    """Check the claim that the command line names. Return 0 for PASS, 77 for SKIP, 1 for FAIL, 2 for wrong usage."""
    if len(sys.argv) != 2 or sys.argv[1] not in CLAIMS:
        print(f"usage: python -m bench.gpu.check {'|'.join(CLAIMS)}   (FGPU={shlex.join(FGPU)})", file=sys.stderr)
        return 2
    end_in_order()
    pynvml.nvmlInit()
    try:
        with host() as (service, place):
            CLAIMS[sys.argv[1]](service, place)
    except Skip as why:
        print(f"SKIP {sys.argv[1]}: {why}")
        return SKIPPED
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        print(f"FAIL {sys.argv[1]}: {error}")
        return 1
    print(f"PASS {sys.argv[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
