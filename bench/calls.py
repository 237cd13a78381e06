"""How much each kind of allocation call gets under a limit, asking for three times as much in steps of 2 MiB.

Prints `KIND_usable PERCENT %` (of limit minus context), the driver's error at the end, and what ledger and NVML say;
writes build/bench/calls.json. Starts and stops the agent itself. The command `fgpu` may be given in $FGPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from fill_calls import KINDS
from memory import FGPU, ROOT, BenchError, agent

OUT_OF_MEMORY = 2
ENOUGH_PERCENT = 99.5


def one(kind: str, limit: int) -> dict[str, float]:
    """A tenant that fills its limit by one kind of call."""
    script = str(Path(__file__).with_name("fill_calls.py"))
    command = [
        *FGPU,
        "run",
        "--memory",
        str(limit),
        "--name",
        f"calls-{kind}",
        "--",
        sys.executable,
        script,
        kind,
        str(limit),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = json.loads(process.stdout.readline() or '{"error": "it ended"}')
        if "error" in said:
            raise BenchError(f"{kind}: {said['error']}")
        time.sleep(1.2)  # two reconciles
        status = json.loads(
            subprocess.run([*FGPU, "status", "--json"], capture_output=True, check=True, timeout=30).stdout
        )
        device = next(t for t in status["tenants"] if t["tenant"] == f"calls-{kind}")["devices"][0]
        assert process.stdin
        process.stdin.close()
    percent = 100 * said["got_bytes"] / said["usable_bytes"]
    return {
        "usable_percent": percent,
        "code": said["code"],
        "used": device["used_bytes"],
        "drift": device["drift_bytes"],
    }


def main() -> int:
    """All kinds; 1 where one was not refused at its limit or could not use it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=1 << 30, help="bytes")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    try:
        with agent(["--driver-root", given.driver_root, "--shim", str(given.shim)]):
            for kind in KINDS:
                found[kind] = one(kind, given.limit)
                line = found[kind]
                print(f"{kind}_usable {line['usable_percent']:.2f} %", flush=True)
                print(f"{kind}_end {line['code']:.0f} CUresult")
                print(f"{kind}_beyond_limit {max(0, line['used'] - given.limit)} bytes")
                print(f"{kind}_drift {line['drift']} bytes")
    except (BenchError, OSError) as error:
        print(f"bench calls: {error}", file=sys.stderr)
        return 1
    out = ROOT / "build/bench/calls.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    held = [v["code"] == OUT_OF_MEMORY and ENOUGH_PERCENT <= v["usable_percent"] <= 100 for v in found.values()]
    print(f"calls_held {sum(held)} of {len(held)}")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
