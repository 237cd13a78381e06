"""Measure policy files: the time of the slowest invalid files, the time of decisions, and the memory of the parser.

Prints a line `NAME VALUE UNIT` for each figure, and writes build/bench/policy.json. An invalid file should be read
within 100 ms.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MODULES = ("fgpu_ebpf.policy.rules", "fgpu_ebpf.policy.watch", "fgpu_ebpf.policy.schema")
_RESIDENT = """
import sys, importlib
def mib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
import prometheus_client, pynvml, fgpu_ebpf.agent.agent
sizes = [mib()]
for name in sys.argv[1:]:
    importlib.import_module(name)
    sizes.append(mib())
print(*sizes)
"""


def resident() -> dict[str, tuple[float, str]]:
    """Return the resident memory that the import of each module of MODULES adds to an agent."""
    done = subprocess.run(
        [sys.executable, "-c", _RESIDENT, *MODULES], capture_output=True, text=True, check=True, cwd=ROOT
    )
    sizes = [float(word) for word in done.stdout.split()]
    added = {
        f"resident_{name.rpartition('.')[2]}": (b - a, "MiB")
        for name, a, b in zip(MODULES, sizes[:-1], sizes[1:], strict=True)
    }
    return {"resident_agent_without": (sizes[0], "MiB"), **added}


def bad_files() -> dict[str, tuple[float, str]]:
    """Measure the files that are constructed to be slow, and every invalid file of the corpus."""
    from fgpu_ebpf.policy import schema
    from tests.unit.policy.bad_policies_kit import BAD, BOMBS, MIB

    seconds = {}
    for name, data in {**BOMBS, **{path.stem: path.read_bytes() for path in BAD}}.items():
        begun = time.perf_counter()
        schema.read("bad.yaml", data[:MIB])
        seconds[name] = time.perf_counter() - begun
    slowest = max(seconds, key=seconds.__getitem__)
    return {
        "bad_file_median": (statistics.median(seconds.values()) * 1e3, "ms"),
        f"bad_file_worst ({slowest})": (seconds[slowest] * 1e3, "ms"),
    }


def resolving() -> dict[str, tuple[float, str]]:
    """Measure the reading of 100 policies, and the decisions about 1,000 workloads that none of them matches."""
    from fgpu_ebpf.policy import schema
    from tests.unit import policy_kit as kit

    specs = [f"{{selector: {{cgroup: ['a/**/b{n}', 'c/*{n}*/d'], image: 'x*y*z{n}'}}}}" for n in range(100)]
    text = "".join(kit.text(f"p{n}", spec) for n, spec in enumerate(specs)).encode()
    begun = time.perf_counter()
    schema.read("p.yaml", text)
    read = time.perf_counter() - begun
    policies = kit.policies(*specs)
    workloads = [kit.workload(f"/c/x{n % 100}x/d", image="xyzabc") for n in range(1000)]
    begun = time.perf_counter()
    for workload in workloads:
        policies.resolve(workload, [kit.Gpu(0)])
    return {"read_100_policies": (read * 1e3, "ms"), "resolve_1000x100": ((time.perf_counter() - begun) * 1e3, "ms")}


def main() -> None:
    figures = {**resident(), **bad_files(), **resolving()}
    for name, (value, unit) in figures.items():
        print(f"{name} {value:.1f} {unit}")
    out = ROOT / "build/bench/policy.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({name: {"value": v, "unit": u} for name, (v, u) in figures.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
