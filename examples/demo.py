"""Run two tenants side by side on one GPU; each takes memory until it is refused.

It uses the tools of a user: the `fgpu` command, nvidia-smi and the metrics page. The service must run (`./dev demo`
starts it). The exit status is 0 only if every limit held to the byte. The output marks each claim that is not true.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
GIB = 1 << 30
DEADLINE_SECONDS = 50
EVERY_SECONDS = 0.25
# Prints the program's own line, then the output of nvidia-smi in the tenant while the program still holds the memory.
SCRIPT = '"$@" | { IFS= read -r line; echo "$line"; sleep 0.5; nvidia-smi; cat; }'


@dataclass
class Share:
    """One tenant: its limit, its steps, and the samples of its use."""

    name: str
    limit: int
    step: int
    pause_ms: int
    process: subprocess.Popen[str] | None = None
    seen: dict[str, float] = field(default_factory=dict)
    most_used: float = 0
    driver: int | None = None
    output: str = ""

    def start(self, fill: Path) -> None:
        """Run the filling program as a tenant in a pid namespace of its own."""
        tenant = ["fgpu", "run", "--pidns", "--name", self.name, "--memory", f"{self.limit // MIB}MiB", "--"]
        asks = [fill, "--step", f"{self.step // MIB}MiB", "--pause", str(self.pause_ms), "--hold", "6"]
        command = [*tenant, "sh", "-c", SCRIPT, "sh", *map(str, asks)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def note(self, seen: dict[str, float]) -> None:
        """Record one sample of the metrics."""
        if not seen:
            return
        self.seen = seen
        self.most_used = max(self.most_used, seen.get("used", 0))

    def full(self) -> bool:
        """Return whether the tenant was refused and still holds its memory."""
        return self.seen.get("refused", 0) >= 1 and self.running()

    def running(self) -> bool:
        """Return whether the program still runs."""
        return self.process is not None and self.process.poll() is None


# -- the view from outside


def scrape(url: str) -> dict[str, dict[str, float]]:
    """Read the metrics page and return tenant -> {limit, used, peak, refused, kernel}."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        page = answer.read().decode()
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            tenant = sample.labels.get("tenant", "")
            if sample.name == "fgpu_tenant_enforcement":
                found[tenant]["kernel"] = sample.value if sample.labels["mode"] == "kernel" else 0
            elif sample.name == "fgpu_memory_refused_total":
                found[tenant]["refused"] += sample.value
            elif sample.name.startswith("fgpu_memory_") and sample.labels.get("gpu") == "0":
                found[tenant][sample.name.removeprefix("fgpu_memory_").removesuffix("_bytes")] = sample.value
    return found


def ask_driver(shares: list[Share]) -> None:
    """Store the memory of each tenant as the driver shows it.

    nvidia-smi runs outside of any tenant, so it shows host pids, by which its rows are assigned to tenants. A share
    whose tenant has no process with memory stays unchanged.
    """
    status = json.loads(subprocess.check_output(["fgpu", "status", "--json"], text=True))
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = [line.split(",") for line in subprocess.check_output(query, text=True).splitlines() if line.strip()]
    held = {int(pid): int(mib) * MIB for pid, mib in rows}
    for share in shares:
        pids = {p["pid"] for t in status["tenants"] if t["tenant"] == share.name for p in t["processes"]}
        if pids & held.keys():
            share.driver = sum(held.get(pid, 0) for pid in pids)


# -- output


def size(value: float | None) -> str:
    """Format bytes for people."""
    return "-" if value is None else f"{value / MIB:,.0f} MiB"


def table(shares: list[Share]) -> Table:
    """Return the live view."""
    view = Table(title="One GPU, two tenants", title_justify="left")
    for heading in ("tenant", "limit", "used", "", "peak", "refused"):
        view.add_column(heading, justify="left" if heading in ("tenant", "") else "right", min_width=9)
    for share in shares:
        used, limit = share.seen.get("used", 0), share.seen.get("limit", share.limit)
        bar = ProgressBar(total=limit, completed=min(used, limit), width=24)
        refused = f"{share.seen.get('refused', 0):.0f}"
        view.add_row(share.name, size(limit), size(used), bar, size(share.seen.get("peak")), refused)
    return view


def line(shares: list[Share]) -> str:
    """Return the state on one line, for output without a terminal."""
    return "   ".join(
        f"{s.name}: {size(s.seen.get('used', 0))} of {size(s.limit)}, refused {s.seen.get('refused', 0):.0f}"
        for s in shares
    )


def watch(shares: list[Share], url: str, console: Console) -> None:
    """Take samples until both programs have exited."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    said = ""
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        while any(s.running() for s in shares) and time.monotonic() < deadline:
            found = scrape(url)
            for share in shares:
                share.note(found.get(share.name, {}))
            if any(s.full() and s.driver is None for s in shares):
                ask_driver(shares)
            if live:
                live.update(table(shares), refresh=True)
            elif (now := line(shares)) != said:
                said = now
                console.print(now, highlight=False)
            time.sleep(EVERY_SECONDS)


# -- checks


def verdicts(share: Share) -> list[tuple[bool, str]]:
    """Return each claim about one tenant, and whether it is true."""
    seen = share.seen
    peak, refused, last = seen.get("peak", 0), seen.get("refused", 0), seen.get("used", 0)
    left = share.limit - peak
    driver = share.driver
    return [
        (seen.get("kernel") == 1, "enforced by the kernel"),
        (seen.get("limit") == share.limit, f"limit {share.limit:,} bytes in force"),
        (0 < share.most_used <= share.limit and last <= share.limit, f"never over it (most {share.most_used:,.0f})"),
        (peak <= share.limit, f"peak {peak:,.0f} within it"),
        (refused >= 1, f"refused {refused:.0f} time(s)"),
        (0 <= left < share.step, f"{left:,.0f} bytes left, less than the {share.step:,} asked for"),
        (driver is not None and driver <= share.limit, f"the driver itself counts {size(driver)}"),
        (share.process is not None and share.process.returncode == 0, "its program got out-of-memory and continued"),
    ]


def conclude(shares: list[Share], url: str, console: Console) -> int:
    """Print the result; return 0 if every claim is true."""
    first, _, smi = shares[0].output.partition("\n")
    console.print(f"\nnvidia-smi inside {shares[0].name} ({first}):", highlight=False)
    console.print(smi.rstrip(), highlight=False, markup=False)
    failed = 0
    for share in shares:
        claims = verdicts(share)
        bad = [text for ok, text in claims if not ok]
        failed += bool(bad)
        mark = "[red]NOT HELD[/red]" if bad else "[green]held[/green]"
        console.print(f"\n{share.name}: {size(share.limit)} {mark}", highlight=False)
        for ok, text in claims:
            console.print(f"  {'ok ' if ok else 'NOT'}  {text}", highlight=False)
        if bad:
            console.print(share.output.rstrip(), highlight=False, markup=False)
    console.print(f"\nmetrics: {url}", highlight=False)
    return 1 if failed else 0


def run(shares: list[Share], fill: Path, url: str, console: Console) -> int:
    """Run the demo; leave no process behind."""
    try:
        for share in shares:
            share.start(fill)
        watch(shares, url, console)
    finally:
        for share in shares:
            if share.process is not None:
                if share.running():
                    share.process.terminate()
                share.output = share.process.communicate(timeout=10)[0]
    return conclude(shares, url, console)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fill", type=Path, default=ROOT / "build/examples/fill", help="the program examples/fill.c")
    parser.add_argument("--metrics", default="http://127.0.0.1:9423/metrics")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sim", action="store_true", help="the simulated driver (the caller has set it up)")
    which.add_argument("--real", action="store_true", help="the NVIDIA driver of this machine")
    given = parser.parse_args()
    shares = [Share("alice", 4 * GIB, 64 * MIB, 120), Share("bob", 2 * GIB, 48 * MIB, 200)]
    try:
        return run(shares, given.fill, given.metrics, Console(soft_wrap=True))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"demo: {error}: is the service running? `./dev demo` starts it", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
