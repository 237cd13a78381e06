"""Run everything at once for MINUTES: tenants of every kind start, allocate, are refused, killed and removed, while
limits and policies change, agent and gatekeeper are killed and restarted, and Docker with containers is restarted.

Prints `soak_NAME VALUE UNIT`: the number of each act; errors (bytes above a limit, except for those of a training's
kernels; ledgers that did not agree with the driver in time; programs without output); and for each watched size its
slope per minute with half of its 95 % interval, and the same for the second half of each process's life (`late`).
`soak_grows` has the names of the sizes that grow. `unknown`: agent or gatekeeper lived too briefly between restarts for
a slope (one life needs five minutes, each of two lives four). Writes build/bench/soak.json, soak.csv and soak.svg.
Exits with 1 if there was an error, if the resident memory of agent or gatekeeper grows by more than 1 KiB a minute and
the interval excludes zero growth, or if a slope is unknown after seven minutes or more. Starts and stops driver and
services. DRIVER_ROOT=/ selects the real driver. Then trainings run too, with TORCH_PYTHON, a Python interpreter that
has torch.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.lib.engine import Engine
from bench.lib.service import end_in_order
from bench.lib.slopes import SETTLING_SECONDS, Slope, Watch, plot
from bench.lib.tenants import record
from tests.support.commands import ask, fgpu, metrics_page
from tests.support.host import BUILD, DRIVER_ROOT, MIB, REFUSED, SIM
from tests.support.place import Place, place_of
from tests.support.service import Service, compile_programs
from tests.support.tenant import Client, Program, Tenant
from tests.support.wait import Timeout, eventually

REAL = DRIVER_ROOT != SIM
GRANULE = 2 * MIB
TORCH = os.environ.get("TORCH_PYTHON", "") if REAL else ""
MOST_TENANTS, MOST_PROGRAMS, MOST_JOBS = 10, 3, 4
SMALLEST, LARGEST = (2048 * MIB, 6144 * MIB) if TORCH else (600 * MIB, 1200 * MIB)
CHECK_SECONDS, AGREE_SECONDS = 20.0, 10.0
SETS = 20  # how often crowd() sets the limit of its tenant
ENGINE_SECONDS = 45.0
SLOPE_KIB = 1.0
SLOPE_MINUTES = 7.0  # the shortest run with slopes: its first part, of four fifths, has four minutes after the settling
SHOWN = ("agent_resident", "gatekeeper_resident", "agent_descriptors", "map_processes", "map_allocations", "map_pages")
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: soak-{number}}}
spec:
  selector: {{cgroup: ["fgpu-soak-{number}/*"]}}
  memory: {{limit: {limit}}}
  compute: {{weight: {weight}}}
"""


class Job(Client):
    """A training in a tenant: the program bench/lib/torch_job.py."""

    def __init__(self, tenant: Tenant, number: int) -> None:
        job = Path(__file__).with_name("lib") / "torch_job.py"
        Program.__init__(self, tenant, f"job{number}", f"{TORCH} {job}")
        self._before = [0, 0, 0]
        self._hello()

    def go_on(self) -> list[int]:
        """Return the counts since the last call: completed rounds, rounds without memory, rounds with another error."""
        now = self.ok("how")
        since = [n - before for n, before in zip(now, self._before, strict=True)]
        self._before = now
        return since


class Soak:
    """The load: acts in sequence, in an order that follows from the seed."""

    def __init__(self, service: Service, work: Path, engine: Engine | None, seed: int) -> None:
        self.service, self.engine, self.random = service, engine, random.Random(seed)
        kinds = ["pidns", "host", "cgroups", *(runtime for runtime in ("runc", "crun") if _is_there(runtime))]
        self.places: list[Place] = []
        for kind in kinds:
            (work / kind).mkdir()
            self.places.append(place_of(kind, work / kind))
        self.tenants: dict[Tenant, list[Client]] = {}
        self.limits: dict[Tenant, int] = {}
        self.jobs: list[Job] = []
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: collections.Counter[str] = collections.Counter()
        self.above = 0
        self._policies = 0
        self._busy: list[Client] = []
        self._acts: list[tuple[Callable[[], None], int]] = [
            (self.arrive, 4), (self.work, 30), (self.fill, 6), (self.start, 6), (self.kill, 5), (self.leave, 4),
            (self.limit, 4), (self.policy, 1), (self.busy, 4), (self.calm, 3), (self.scrape, 1),
        ]  # fmt: skip
        self._acts += [(self.train, 4), (self.ask_job, 6), (self.kill_job, 3)] if TORCH else []
        self._acts += [(self.contain, 1)] if engine else []

    # -- acts

    def step(self) -> None:
        """Do one act."""
        acts, often = zip(*self._acts, strict=True)
        self.do(self.random.choices(acts, often)[0])

    def each(self) -> None:
        """Do every possible act once."""
        for act, _ in self._acts:
            self.do(act)

    def do(self, act: Callable[[], None]) -> None:
        """Do an act, and count it."""
        act()
        self.done[act.__name__] += 1

    def arrive(self) -> None:
        """Add a tenant with a program. If there are MOST_TENANTS, remove a tenant first."""
        if len(self.tenants) >= MOST_TENANTS:
            self.leave()
        limit = self.random.randrange(SMALLEST, LARGEST, MIB)
        tenant = self.random.choice(self.places).tenant(limit)
        self.tenants[tenant], self.limits[tenant] = [], limit
        self._start(tenant)
        if self.random.random() < 0.5:
            fgpu("set", tenant.path, "--weight", str(self.random.randrange(50, 400)))

    def crowd(self) -> None:
        """Add a tenant with MOST_PROGRAMS programs that fill its limit, set its limit SETS times, and add a policy."""
        self.arrive()
        tenant = next(reversed(self.tenants))
        for _ in range(MOST_PROGRAMS - 1):
            self._start(tenant)
        for client in list(self.tenants[tenant]):  # a copy, because _said() removes a program without output
            self._said(client, f"fill {8 * MIB} 0", also=(REFUSED,))
        self.scrape()
        for _ in range(SETS):
            ask(verb="put", target=tenant.path, memory=f"{self.limits[tenant]}B")
        self.policy()

    def start(self) -> None:
        """Start another program in a tenant."""
        if (tenant := self._tenant()) and len(self.tenants[tenant]) < MOST_PROGRAMS:
            self._start(tenant)

    def work(self) -> None:
        """Let a program allocate a little, in one of several ways, and free something in half of all cases."""
        if not (client := self._client()):
            return
        # With a real driver there is no managed memory, because NVML shows only its touched bytes.
        how = self.random.choice(("alloc", "vmm", *(() if REAL else ("managed",))))
        self._said(client, f"{how} {self.random.randrange(1, 17) * GRANULE}", also=(REFUSED,))
        if self.random.random() < 0.5:
            self._said(client, f"drop {self.random.randrange(1, 9)}")

    def fill(self) -> None:
        """Let a program allocate until an allocation is refused, and then free everything."""
        if client := self._client():
            self._said(client, f"fill {8 * MIB} 0", also=(REFUSED,))
            self._said(client, "drop 100000")

    def busy(self) -> None:
        """Make a program allocate and free without pause, until calm() stops it."""
        if client := self._client():
            self._busy.append(client)
            with self._speaking("busy", client):
                client.send(f"ask {GRANULE} 0")

    def calm(self) -> None:
        """End the loop of a random program that busy() has started, if there is one.

        Allocations that failed with another error than out-of-memory are added to `wrong`.
        """
        if not self._busy:
            return
        client = self._busy.pop(self.random.randrange(len(self._busy)))
        with self._speaking("calm", client):
            client.send("info")  # any line stops the loop; the program then answers this line too
            if (said := client.receive(60)) != REFUSED:  # REFUSED: there was no memory for a context
                self.wrong["busy"] += client.numbers(said, "ask")[2]
            client.receive(60)

    def kill(self) -> None:
        """Kill a random program with SIGKILL."""
        clients = [client for mine in self.tenants.values() for client in mine]
        if clients:
            client = self.random.choice(clients)
            self._end(client)

    def train(self) -> None:
        """Start a training in a tenant."""
        if (tenant := self._tenant()) and len(self.jobs) < MOST_JOBS:
            try:
                self.jobs.append(Job(tenant, self.done["train"]))
            except AssertionError as why:
                self.wrong["silent"] += 1
                print(f"# train: {why}", flush=True)

    def ask_job(self) -> None:
        """Read the counts of a training."""
        if self.jobs:
            job = self.random.choice(self.jobs)
            with self._speaking("job", job):
                steps, refused, failed = job.go_on()
                self.done["job_steps"] += steps
                self.done["job_refused"] += refused
                self.wrong["job_failed"] += failed
                assert not failed, f"a training failed, and not for memory: {job.complaints()[-2000:]}"

    def kill_job(self) -> None:
        """Kill a random training with SIGKILL."""
        if self.jobs:
            self._end(self.random.choice(self.jobs))

    def leave(self) -> None:
        """Remove a tenant with all its programs."""
        if tenant := self._tenant():
            for job in [job for job in self.jobs if job.tenant is tenant]:
                self._end(job)
            self._busy = [client for client in self._busy if client.tenant is not tenant]
            tenant.place.tenants.remove(tenant)
            del self.tenants[tenant], self.limits[tenant]
            tenant.end()

    def limit(self) -> None:
        """Change a tenant's limit. The new limit may be below its memory in use."""
        if tenant := self._tenant():
            limit = self.random.randrange(SMALLEST, LARGEST, MIB)
            before = tenant.memory()["used_bytes"]
            fgpu("set", tenant.path, "--memory", f"{limit}B")
            self.limits[tenant] = max(limit, before, tenant.memory()["used_bytes"])  # trainings allocate all the time

    def policy(self) -> None:
        """Add a policy file, and remove the previous one."""
        (self.service.policies / f"soak-{self._policies}.yaml").unlink(missing_ok=True)
        self._policies += 1
        text = POLICY.format(number=self._policies, limit=f"{self.random.randrange(1, 9)}GiB", weight=100)
        (self.service.policies / f"soak-{self._policies}.yaml").write_text(text)

    def contain(self) -> None:
        """Start a container of the engine. Its program allocates the whole share of the container."""
        assert self.engine
        try:
            self.engine.start()
            self.done["contained"] += 1
        except AssertionError as why:
            self.wrong["engine"] += 1
            print(f"# engine: {why}", flush=True)

    def scrape(self) -> None:
        """Read the metrics."""
        metrics_page()

    def restart_engine(self) -> None:
        """Stop or kill the engine, start it again without its containers, and start another container."""
        if self.engine:
            self.engine.restart(is_killed := self.random.random() < 0.5)
            self.done["restart_engine_killed" if is_killed else "restart_engine"] += 1
            self.contain()

    def restart(self) -> None:
        """Kill agent, gatekeeper or both with SIGKILL. The agent starts the gatekeeper again."""
        which = self.random.choice(("agent", "gatekeeper", "both"))
        if which != "gatekeeper":
            self.service.kill_agent()
        if which != "agent":
            self.service.kill_gatekeeper()
        if which != "gatekeeper":
            self.service.start_agent()
        eventually(self.service.gatekeepers, 20, "a gatekeeper")
        self.done[f"restart_{which}"] += 1

    # -- checks

    def check(self) -> None:
        """Check that no tenant was ever above its limit, and that the ledger agrees with the driver."""
        self.service.check()
        while self._busy:
            self.calm()
        for tenant in list(self.tenants):
            seen = tenant.memory()
            self._look_at_limit(tenant, seen["used_bytes"] - max(self.limits[tenant], seen["limit_bytes"]))
            try:
                _agrees_with_nvml(tenant) if REAL else tenant.assert_covered(AGREE_SECONDS)
            except AssertionError as why:
                self.wrong["disagree"] += 1
                print(f"# {why}", flush=True)
        self._check_engine()
        self.wrong["failures"] = max(self.wrong["failures"], ask(verb="snapshot")["failures"])
        self.done["check"] += 1

    def _look_at_limit(self, tenant: Tenant, above: int) -> None:
        """Record bytes above a limit. Code of a training's kernels is charged at its first use, without admission."""
        if above <= 0:
            return
        print(f"# above its limit: {tenant.view()}", flush=True)
        if above <= _modules(sum(job.tenant is tenant for job in self.jobs)):
            self.done["above_by_modules"] += 1
        else:
            self.wrong["above"] += 1
            self.above = max(self.above, above)

    def _check_engine(self) -> None:
        """Check that the agent shows each container of the engine by its name, with exactly its share in use."""
        if engine := self.engine:
            try:
                eventually(lambda: not engine.wrong(), AGREE_SECONDS, "the engine's containers, with their share")
            except AssertionError as why:
                self.wrong["engine"] += 1
                print(f"# {why}: {engine.wrong()}", flush=True)

    def close(self) -> None:
        """Remove all tenants. Processes that remain in the ledger after 20 s are errors."""
        for job in list(self.jobs):
            self._end(job)
        if self.engine:
            self.engine.close()
        for place in self.places:
            place.close()
        (self.service.policies / f"soak-{self._policies}.yaml").unlink(missing_ok=True)

        def is_empty() -> bool:
            return not any(t["processes"] for t in ask(verb="snapshot")["tenants"])

        with contextlib.suppress(Timeout):
            eventually(is_empty, 20)
        self.wrong["left"] = sum(len(t["processes"]) for t in ask(verb="snapshot")["tenants"])

    # -- helpers

    def _tenant(self) -> Tenant | None:
        return self.random.choice(list(self.tenants)) if self.tenants else None

    def _client(self) -> Client | None:
        """Return a random program that is not in the loop of busy(), or None."""
        clients = [client for mine in self.tenants.values() for client in mine if client not in self._busy]
        return self.random.choice(clients) if clients else None

    def _start(self, tenant: Tenant) -> None:
        client = tenant.client()
        self.tenants[tenant].append(client)
        self._said(client, "context", also=(REFUSED,))

    def _said(self, client: Client, command: str, also: tuple[str, ...] = ()) -> None:
        with self._speaking(command, client):
            said = client.do(command)
            if said.split()[0] != "ok" and said not in also:
                self.wrong["answers"] += 1
                print(f"# {command}: {said}", flush=True)
            self.done["refused"] += said == REFUSED

    @contextlib.contextmanager
    def _speaking(self, what: str, client: Client) -> Iterator[None]:
        """Count an error if the program writes no output in time or has exited, and kill the program."""
        try:
            yield
        except AssertionError as why:
            self.wrong["silent"] += 1
            print(f"# {what}: {why}", flush=True)
            self._end(client)

    def _end(self, client: Client) -> None:
        """Kill a program with SIGKILL. If the program has exited before, that is an error."""
        try:
            client.kill()
        except ProcessLookupError:
            self.wrong["ended"] += 1
        for clients in (self._busy, self.jobs, *self.tenants.values()):
            if client in clients:
                clients.remove(client)
        client.close()


def _modules(trainings: int) -> int:
    """Return the maximum size of the kernels' code of this many trainings, in bytes."""
    if not trainings:
        return 0
    from bench.gpu import claims  # imports pynvml, which may be missing on machines without a GPU

    return trainings * claims.MODULE


def _agrees_with_nvml(tenant: Tenant) -> None:
    """Check that the ledger has the bytes that NVML shows for the tenant's processes, except for rounding."""
    from bench.lib import nvml

    def agree() -> bool:
        pids = set(tenant.pids())
        return abs(tenant.memory()["used_bytes"] - nvml.bytes_of(pids)) <= GRANULE * max(1, len(pids))

    said = f"{tenant.name}: {tenant.memory()}, NVML {nvml.bytes_of(set(tenant.pids()))}"
    eventually(agree, AGREE_SECONDS, said)


def _is_there(runtime: str) -> bool:
    """Return whether containers can run with this runtime. They need the simulator: their root has no real driver."""
    return not REAL and shutil.which(runtime) is not None


def run(soak: Soak, seconds: float, every: float) -> None:
    """Run the acts. fgpu is restarted every `every` seconds, and the engine every 45 s, or three times in a short run.

    The first acts are all crowd(), so that tables of tenants and events are full before sizes are first measured.
    Otherwise these tables would seem to grow until they are full. Then each act runs once, so that a short soak has all
    of them. After that, random acts run for at least half of the time, even if the first acts took long.
    """
    begun = time.monotonic()
    while time.monotonic() < begun + min(SETTLING_SECONDS, seconds / 2):
        soak.do(soak.crowd)
    end = max(begun + seconds, time.monotonic() + seconds / 2)
    soak.each()
    often = {soak.check: CHECK_SECONDS, soak.restart: every, soak.restart_engine: min(ENGINE_SECONDS, seconds / 3)}
    due = {act: begun + each for act, each in often.items()}
    while (now := time.monotonic()) < end:
        soak.step()
        for act in [act for act, at in due.items() if at <= now]:
            act()
            due[act] = now + often[act]
    soak.check()


def report(soak: Soak, watch: Watch, minutes: float) -> int:
    """Print all figures. Return 1 if there was an error, a resident memory grows, or a long run has no slopes."""
    lines: dict[str, tuple[float, str]] = {f"soak_{name}": (n, "") for name, n in sorted(soak.done.items())}
    lines |= {f"soak_wrong_{name}": (n, "") for name, n in sorted(soak.wrong.items())}
    lines["soak_most_above"] = (soak.above, "bytes")
    for name in watch.names():
        unit = "KiB/min" if name.endswith("resident") else "/min"
        for part, late in (("", False), ("late_", True)):
            if slope := watch.slope(name, late):
                lines[f"soak_{part}slope_{name}"] = (slope.value, unit)
                lines[f"soak_{part}within_{name}"] = (slope.within, unit)
    grows = [name for name in watch.names() if name.endswith("resident") and _grows(watch.slope(name))]
    record("soak", lines)
    if watch.fault:
        print(f"# the sampling has ended: {watch.fault}")
    is_known = not watch.fault and all(watch.slope(f"{name}_resident") for name in ("agent", "gatekeeper"))
    print(f"soak_grows {' '.join(grows) or ('nothing' if is_known else 'unknown')}")
    is_missed = not is_known and minutes >= SLOPE_MINUTES
    return 1 if grows or is_missed or any(soak.wrong.values()) else 0


def restart_seconds(minutes: float) -> float:
    """Return the default interval of restarts: one restart if more lives would be too short for slopes."""
    return minutes * 60 * 0.8 if minutes < 20 else min(1200.0, minutes * 60 / 5)


def _grows(slope: Slope | None) -> bool:
    return slope is not None and slope.value > SLOPE_KIB and not slope.may_be_none


def main() -> int:
    """Read the command line, run the soak and print."""
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("minutes", type=float, nargs="?", default=10.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    default = "seconds (a fifth of all, 20 minutes at most; in less than 20 minutes: four fifths of all)"
    parser.add_argument("--restart-every", type=float, help=default)
    given = parser.parse_args()
    every = given.restart_every or restart_seconds(given.minutes)
    print(f"soak_seed {given.seed}", flush=True)
    compile_programs()
    end_in_order()
    if REAL:
        import pynvml

        pynvml.nvmlInit()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        service = Service(work)

        def pids() -> dict[str, int]:
            found = {"agent": service.agent.pid} if service.agent else {}
            for gatekeeper in sorted(service.gatekeepers())[:1]:  # during a restart there may be two
                found["gatekeeper"] = gatekeeper
            return found

        watch = Watch(pids)
        try:
            if not REAL:
                service.start_driver("24GiB")  # room for all tenants together, with their contexts
            service.start_agent()
            soak = Soak(service, work, None if REAL else Engine(service, work), given.seed)
            watch.start()
            try:
                run(soak, given.minutes * 60, every)
            finally:
                watch.end()
                _keep(watch)
                soak.close()
        except (AssertionError, OSError) as error:
            print(f"bench soak: {error}\n{service.log.read_text()[-2000:]}", file=sys.stderr)
            return 1
        finally:
            service.stop()
    return report(soak, watch, given.minutes)


def _keep(watch: Watch) -> None:
    """Write the measurements. This is done even if the soak failed."""
    out = BUILD / "bench"
    watch.write(out / "soak.csv")
    if names := [name for name in SHOWN if name in watch.names()]:
        plot(watch, names, out / "soak.svg")


if __name__ == "__main__":
    sys.exit(main())
