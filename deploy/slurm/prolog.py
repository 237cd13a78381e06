#!/usr/bin/python3 -I
"""Slurm's Prolog on a node: limits a job to its shards' part of the GPU's memory, before the job has a process.

Slurm has not made the job's cgroup yet. The prolog makes the cgroup, and `fgpu set` limits it. slurmstepd then uses the
same cgroup, and removes it after the job. The prolog asks slurmctld what the job was granted, because a job chooses
its environment itself. If a step fails, the prolog exits with 1: Slurm does not start the job, and drains the node.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

NODE, JOB = os.environ["SLURMD_NODENAME"], os.environ["SLURM_JOB_ID"]  # slurmd sets them
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_CONF": os.environ["SLURM_CONF"]}
# A build for several nodes on one host, such as Debian's, has the name of the node in the name of its scope.
SCOPES = (f"system.slice/{NODE}_slurmstepd.scope", "system.slice/slurmstepd.scope")


def refuse(why: str) -> NoReturn:
    """Drain the node with the reason, and exit with 1."""
    drain = ["scontrol", "update", f"nodename={NODE}", "state=drain", f"reason=fgpu: {why}"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(drain, env=ENVIRONMENT, check=False, capture_output=True, timeout=30)
    sys.exit(f"fgpu: job {JOB} is refused: {why}")


def said(*command: str) -> str:
    """Run a command, and return its output."""
    try:
        done = subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        refuse(f"{command[0]}: {error}")
    if done.returncode:
        refuse(done.stderr.strip().removeprefix("fgpu: ") or f"{' '.join(command)} exited with {done.returncode}")
    return done.stdout


def counted(gres: str, name: str) -> dict[str, int]:
    """Return the count of gpu or shard for each index in `shard:2(IDX:0)` or `gpu:model:2(IDX:0-1)`."""
    found = re.search(rf"(?:^|,){name}:(?:[^,:(]+:)?(\d+)\(IDX:([\d,-]*)\)", gres)
    return dict.fromkeys(indexes(found[2]), int(found[1])) if found else {}


def indexes(text: str) -> list[str]:
    """Return the numbers of `0-1,3`."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return [str(index) for first, _, last in ranges for index in range(int(first), int(last or first) + 1)]


def granted() -> str:
    """Return what the job was granted on this node, in the form `shard:2(IDX:0)`."""
    job = said("scontrol", "--oneliner", "--details", "show", "job", JOB)
    for nodes, gres in re.findall(r" Nodes=(\S+) CPU_IDs=\S+ Mem=\S+ GRES=(\S*)", job):
        if NODE in said("scontrol", "show", "hostnames", nodes).split():
            return str(gres)
    refuse(f"slurmctld names nothing that the job has on {NODE}")


def shards_of_a_gpu() -> int:
    """Return the number of shards of each GPU of this node."""
    node = said("scontrol", "--oneliner", "show", "node", NODE)
    gres = (re.search(r" Gres=(\S+)", node) or [""])[1]
    count = {name: sum(map(int, re.findall(rf"\b{name}:(?:[^,:(]+:)?(\d+)", gres))) for name in ("gpu", "shard")}
    if not count["gpu"] or count["shard"] % count["gpu"]:
        refuse(f"{gres} has not the same number of shards for each GPU")
    return count["shard"] // count["gpu"]


def share() -> list[str]:
    """Return the options of `fgpu set` for this job, or nothing if it has no GPU."""
    gres = granted()
    shards, gpus = counted(gres, "shard"), counted(gres, "gpu")
    if len(shards) > 1:
        refuse(f"shards on several GPUs ({gres}) are not supported")
    part = 100.0
    for count in shards.values():
        part = 100 * count / shards_of_a_gpu()
    devices = [word for index in shards or gpus for word in ("--device", index)]
    return [f"--memory={int(part * 10000) / 10000:.4f}%", *devices] if devices else []


def cgroup() -> Path:
    """Return the place of cgroup v2."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Path(line.split()[1])
    refuse("cgroup v2 is not mounted")


def main() -> None:
    limits = share()
    if not limits:
        return
    status: dict[str, Any] = json.loads(said("fgpu", "status", "--json"))
    if status["unenforced"]:
        refuse(status["unenforced"])
    scope = next((scope for scope in SCOPES if (cgroup() / scope).is_dir()), None)
    if scope is None:
        refuse(f"neither {' nor '.join(SCOPES)} is a cgroup")
    (cgroup() / scope / f"job_{JOB}").mkdir(exist_ok=True)
    said("fgpu", "set", f"/{scope}/job_{JOB}", *limits)


main()
