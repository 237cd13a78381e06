"""Measure the time that a share by CDI (mounts and a hook), and fgpu's container runtime, add to a container's start.

Each time is that of `runc run` of a bundle whose program exits at once: plain, with a share, and with fgpu's runtime,
which calls runc. Each round has the three in a random order, so that other load on the host affects all of them.
Prints `start_plain`, `start_share_added` and `start_runtime_added`. The last two are medians of the differences within
a round. They include the loading of the shim into the program. Writes build/bench/start_container.json. Exits with 1
if the bar is missed. Starts and stops the agent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.lib.service import ROOT, BenchError, agent
from bench.lib.tenants import cgroup_root, record

BAR_MS = 20.0
GROUP = "/fgpu-bench-start"
HELPER = ROOT / "build/oci/fgpu-oci"
# A container runtime uses cgroup v2 only if that is mounted at /sys/fs/cgroup.
CAVE = '[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup; echo; exec sleep 900'


def bind(source: str) -> dict[str, Any]:
    """Return a read-only bind mount of a path of the host, at the same path in the container."""
    return {"source": source, "destination": source, "type": "bind", "options": ["bind", "ro"]}


def config(work: Path) -> dict[str, Any]:
    """Return the configuration of a container that has the host's /usr and runs `true`."""
    if not (work / "config.json").exists():
        subprocess.run(["runc", "spec"], cwd=work, check=True, timeout=10)
    found: dict[str, Any] = json.loads((work / "config.json").read_text())
    found["process"].update(terminal=False, args=["/bin/true"])
    found["root"] = {"path": "rootfs", "readonly": True}
    found["mounts"] += [bind("/usr")]
    return found


def share(found: dict[str, Any], folder: Path) -> None:
    """Add the edits that an engine makes for `--device fgpu.dev/share=8gib`. `folder`: the CDI folder."""
    spec = json.loads((folder / "fgpu.dev-share.json").read_text())
    device = next(device["containerEdits"] for device in spec["devices"] if device["name"] == "8gib")
    for mount in spec["containerEdits"]["mounts"]:
        found["mounts"].append(
            {"source": mount["hostPath"], "destination": mount["containerPath"], "options": mount["options"]}
        )
    hooks = [{key: hook[key] for key in ("path", "args", "timeout")} for hook in device["hooks"]]
    found["hooks"] = {"createRuntime": hooks}


def bundle(work: Path, name: str, found: dict[str, Any]) -> Path:
    """Make the bundle of a container with this name, and return its folder."""
    folder = work / name
    (folder / "rootfs/etc").mkdir(parents=True)
    (folder / "rootfs/usr").mkdir()
    shutil.copy("/etc/ld.so.cache", folder / "rootfs/etc/ld.so.cache")
    for link in ("bin", "sbin", "lib", "lib64"):
        (folder / "rootfs" / link).symlink_to(f"usr/{link}")
    found["linux"]["cgroupsPath"] = f"{GROUP}/{name}"
    (folder / "config.json").write_text(json.dumps(found))
    return folder


def start_ms(command: list[str | Path], folder: Path, work: Path) -> float:
    """Return the milliseconds from the runtime's start to the container's exit. Restores the bundle afterwards."""
    before = (folder / "config.json").read_text()
    words = [*command, "--root", work / "state", "run", "--bundle", folder, folder.name]
    begun = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    took = (time.perf_counter() - begun) * 1e3
    (folder / "config.json").write_text(before)
    if done.returncode:
        raise BenchError(f"{folder.name}: {done.stdout}{done.stderr}")
    return took


def measure(work: Path, cdi: Path, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of all starts by their way: plain, share, runtime."""
    holder = subprocess.Popen(["unshare", "--mount", "sh", "-c", CAVE], stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        holder.stdout.readline()
        inside: list[str | Path] = ["nsenter", f"--target={holder.pid}", "--mount"]
        plain, shared = config(work), config(work)
        share(shared, cdi)
        ways = {
            "plain": ([*inside, "runc"], bundle(work, "plain", plain)),
            "share": ([*inside, "runc"], bundle(work, "share", shared)),
            "runtime": ([*inside, HELPER, "runtime", "runc"], bundle(work, "runtime", plain)),
        }
        took: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 2):  # the first two warm up
            for way in sorted(ways, key=lambda _: os.urandom(1)):
                ms = start_ms(*ways[way], work)
                if number >= 2:
                    took[way].append(ms)
        return took
    finally:
        holder.kill()
        holder.wait(5)


def figures(took: dict[str, list[float]]) -> dict[str, tuple[float, str]]:
    """Return the medians. Differences are taken within a round."""
    added = {
        way: statistics.median(b - a for a, b in zip(took["plain"], took[way], strict=True))
        for way in ("share", "runtime")
    }
    lines = {"start_plain": (statistics.median(took["plain"]), "ms")}
    return lines | {f"start_{way}_added": (ms, "ms") for way, ms in added.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "agent.yaml").write_text(f"cdiFolder: {work}/cdi\novercommit: allow\n")
        places = [
            "--driver-root",
            options.driver_root,
            "--listen",
            "127.0.0.1:0",
            "--shim",
            str(ROOT / "build/shim/libfgpu.so"),
        ]
        try:
            with agent([*places, "--config", str(work / "agent.yaml")]):
                lines = figures(measure(work, work / "cdi", options.rounds))
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            folder = cgroup_root() / GROUP.lstrip("/")
            subprocess.run(["find", folder, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"], capture_output=True)
    record("start_container", lines)
    return int(any(ms > BAR_MS for name, (ms, _) in lines.items() if name.endswith("_added")))


if __name__ == "__main__":
    sys.exit(main())
