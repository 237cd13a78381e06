"""Measure the effect of upgrades (--upgrades) on tenants. Each has a new shim, every fifth also new BPF programs.

While two tenants allocate and free without pause, and programs of another tenant start in turn, gatekeeper and agent
are replaced as a package does: they get SIGTERM, and then the next version is started. Prints `upgrade_NAME VALUE
UNIT`: the time from the end of the old agent until the new agent enforces limits (median and maximum), the completed
pairs of an allocation and a free, refused allocations and starts, bytes that were not witnessed or were witnessed
twice, drift after the last upgrade, and old shims that are kept. Writes build/bench/upgrade.json. Exits with 1 if
anything was refused, if unwitnessed bytes or drift are not 0, or if the tenants did not allocate during all upgrades.
Starts and stops the services.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.lib.service import READY_SECONDS, ROOT, BenchError, end_in_order
from bench.lib.tenants import RUN, Program, ask, ending, memory_of, record

LISTEN = "127.0.0.1:19426"
LIMIT, PAIR, RATE = 2 << 30, 4 << 20, 500
NEW_PROGRAMS = 5
# For every line of stdin, starts a program that makes a pair and exits, and prints the program's output on one line.
STARTER = 'while read -r line; do echo "$line" | "$0" | tr "\\n" " "; echo; done'


class Services:
    """An installation of fgpu in its own folder, and its running services."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self._package, self._store, self._given = folder / "site/fgpu_ebpf", folder / "store", given
        self._log = folder / "log"
        shutil.copytree(ROOT / "fgpu_ebpf", self._package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "bpf", self._package / "bpf")
        (self._package / "oci").mkdir()
        shutil.copy(ROOT / "build/oci/fgpu-oci", self._package / "oci")
        (folder / "policy.d").mkdir()
        self._options = ["--driver-root", given.driver_root, "--shim", str(self._package / "libfgpu.so")]
        self._options += ["--store", str(self._store), "--listen", LISTEN, "--policies", str(folder / "policy.d")]
        self._running: list[subprocess.Popen[bytes]] = []
        self.number = 0

    def install(self) -> float:
        """Install and start the next version. Return the seconds between the end of the old agent and enforcement."""
        self.number += 1
        beside = self._package / ".libfgpu.so"
        beside.write_bytes(Path(self._given.shim).read_bytes() + b"version %d" % self.number)
        beside.replace(self._package / "libfgpu.so")
        if self.number % NEW_PROGRAMS == 0:
            with open(self._package / "bpf/fgpu.bpf.c", "a", encoding="utf-8") as source:
                source.write(f"/* version {self.number} */\n")
        said = self._log.stat().st_size if self._log.exists() else 0
        self.stop()
        begun = time.monotonic()
        self._running = [self._start("gatekeeper", "--run-dir", str(RUN)), self._start("cli", "agent", *self._options)]
        while b"ready after" not in self._log.read_bytes()[said:]:
            if time.monotonic() > begun + READY_SECONDS or self._running[1].poll() is not None:
                raise BenchError(f"version {self.number} does not enforce limits: {self._log.read_text()[-500:]}")
            time.sleep(0.005)
        return time.monotonic() - begun

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {"PATH": os.defpath, "PYTHONPATH": str(self._package.parent)}
        with open(self._log, "ab") as log:
            command = [sys.executable, "-m", f"fgpu_ebpf.{module}", *arguments]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd="/")

    def stop(self) -> None:
        """Stop gatekeeper and agent in turn, with SIGTERM."""
        for process in self._running:
            process.terminate()
            process.wait(10)
        self._running = []

    def detach(self) -> None:
        """Stop the services, and remove all probes, limits and pinned maps."""
        self.stop()
        environment = {"PATH": os.defpath, "PYTHONPATH": str(self._package.parent)}
        subprocess.run([sys.executable, "-m", "fgpu_ebpf.cli", "detach"], env=environment, cwd="/", check=False)

    def stored(self) -> int:
        """Return how many versions of the shim are stored."""
        return sum(not path.is_symlink() for path in self._store.iterdir())


def drift() -> int:
    """Return the sum of the absolute drifts of all tenants, in bytes."""
    devices = [device for tenant in ask(verb="snapshot")["tenants"] for device in tenant["devices"]]
    return sum(abs(device["drift_bytes"] or 0) for device in devices)


def settled_drift(seconds: float = 3.0) -> int:
    """Return the lowest drift within `seconds`, because the driver shows a program for a short time after its exit."""
    least, end = drift(), time.monotonic() + seconds
    while least and time.monotonic() < end:
        time.sleep(0.1)
        least = min(least, drift())
    return least


def measure(services: Services, given: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Run all upgrades, and return the figures."""
    took: list[float] = []
    starts = refused = 0
    with ending() as programs:
        for number in range(2):
            programs.append(Program([str(given.program)], LIMIT, f"upgrade-{number}"))
            programs[-1].hear()
        starter = Program(["sh", "-c", STARTER, str(given.program)], LIMIT, "upgrade-starts")
        programs.append(starter)
        starter.say("paced 1 1")
        starter.hear()
        before = {program.name: memory_of(program.name)["witnessed_bytes"] for program in programs}
        for program in programs[:2]:
            program.say(f"paced {RATE} {given.seconds}")
        end = time.monotonic() + given.seconds - 1
        for _ in range(given.upgrades):
            starter.say("paced 1 1")
            took.append(services.install())
            said = starter.hear()
            starts += 1
            refused += "- " in said or not said.startswith("ready")
        left = max(0.0, end - time.monotonic())
        said_last = [program.hear(left + 120) for program in programs[:2]]
        pairs = [0 if line.startswith("-") else int(line.split()[0]) for line in said_last]
        seen = {program.name: memory_of(program.name)["witnessed_bytes"] - before[program.name] for program in programs}
        done = dict(zip(seen, [*pairs, starts - refused], strict=True))
        unseen = sum(abs(done[name] * PAIR - bytes_) for name, bytes_ in seen.items())
        return {
            "upgrade_count": (given.upgrades, ""),
            "upgrade_p50": (statistics.median(took), "s"),
            "upgrade_most": (max(took), "s"),
            "upgrade_pairs": (sum(pairs), ""),
            "upgrade_refused": (sum(line.startswith("-") for line in said_last), ""),
            "upgrade_starts": (starts, ""),
            "upgrade_starts_refused": (refused, ""),
            "upgrade_unseen": (unseen, "bytes"),
            "upgrade_drift": (settled_drift(), "bytes"),
            "upgrade_shims_kept": (services.stored(), ""),
            "upgrade_covered": (100 * min(1.0, given.seconds / sum(took)), "%"),
        }


def main() -> int:
    """Read the command line, measure and print. Return 0 if every bar is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--program", type=Path, default=ROOT / "build/bench/pairs")
    parser.add_argument("--upgrades", type=int, default=20)
    parser.add_argument(
        "--seconds", type=int, default=40, help="for which the tenants allocate: longer than all upgrades"
    )
    given = parser.parse_args()
    given.driver_root = str(Path(given.driver_root).resolve())
    end_in_order()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        services = Services(Path(folder), given)
        try:
            services.install()
            lines = measure(services, given)
        except (BenchError, OSError) as error:
            print(f"bench upgrade: {error}", file=sys.stderr)
            return 1
        finally:
            services.detach()
    record("upgrade", lines)
    wrong = ("upgrade_refused", "upgrade_starts_refused", "upgrade_unseen", "upgrade_drift")
    missed = [name for name in wrong if lines[name][0]]
    print(f"upgrade_bars_held {len(wrong) - len(missed)} of {len(wrong)}")
    return 1 if missed or lines["upgrade_covered"][0] < 100 else 0


if __name__ == "__main__":
    sys.exit(main())
