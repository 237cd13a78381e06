#!/usr/bin/python3 -I
"""Slurm's Prolog on a node: limits a job to its shards' part of the GPU's memory, before the job has a process.

Slurm has not made the job's cgroup yet. The prolog makes the cgroup, and `fgpu set` limits it. slurmstepd then uses the
same cgroup, and removes it after the job. The prolog asks slurmctld what the job was granted, because a job chooses
its environment itself. If a step fails, the prolog exits with 1: Slurm does not start the job, and drains the node.

A job may ask for less by its comment, `fgpu:memory=6GiB`. A mistake there must not drain a node: the prolog ignores the
word, and leaves a note, which task.sh prints in the job's output.

The agent gives the job the priority that agent.yaml has for the job's quality of service (QOS).
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

NODE, JOB = os.environ["SLURMD_NODENAME"], os.environ["SLURM_JOB_ID"]  # slurmd sets them
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "SLURM_CONF": os.environ["SLURM_CONF"]}
# A build for several nodes on one host, such as Debian's, has the name of the node in the name of its scope.
SCOPES = (f"system.slice/{NODE}_slurmstepd.scope", "system.slice/slurmstepd.scope")

NOTE = Path("/run/fgpu-slurm", JOB)  # task.sh prints the file, and epilog.sh removes it
UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
LEAST, MOST = 2 << 20, 2**47  # of a limit, in bytes. The agent rounds percentages down to multiples of LEAST.
PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,4})?)%", re.ASCII)
BYTES = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)(?:([KMGT]i)B?|B)", re.ASCII)

NO_AGENT = 3  # the code with which `fgpu` exits if no agent answers
UNTIL = time.monotonic() + 8.0  # an agent that restarts answers again within seconds. BatchStartTimeout is 10 s.
NO_QUALITY = ("", "(null)", "N/A")  # what squeue prints for a job without a quality of service
Parts = dict[int, float]  # for each GPU by its index: the part of its memory, in percent


class Request(NamedTuple):
    """The most that a job asks for of each GPU: of its memory, in percent and in bytes, and of its time, in percent."""

    part: float = 100.0
    memory: float = MOST
    compute: float = 100.0
    unknown: tuple[str, ...] = ()  # words that the prolog does not understand


def refuse(why: str) -> NoReturn:
    """Drain the node with the reason, and exit with 1."""
    drain = ["scontrol", "update", f"nodename={NODE}", "state=drain", f"reason=fgpu: {why}"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(drain, env=ENVIRONMENT, check=False, capture_output=True, timeout=30)
    sys.exit(f"fgpu: job {JOB} is refused: {why}")


def said(*command: str) -> str:
    """Run a command, and return its output. A job's name and comment can have bytes that are not UTF-8.

    A command of fgpu that finds no agent is repeated until UNTIL.
    """
    more: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "timeout": 30}
    try:
        done = subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True, **more)
    except (OSError, subprocess.TimeoutExpired) as error:
        refuse(f"{command[0]}: {error}")
    if done.returncode == NO_AGENT and command[0] == "fgpu" and time.monotonic() < UNTIL:
        time.sleep(0.25)
        return said(*command)
    if done.returncode:
        refuse(done.stderr.strip().removeprefix("fgpu: ") or f"{' '.join(command)} exited with {done.returncode}")
    return done.stdout


def has(text: str, number: int) -> bool:
    """Return whether the ranges `0-1,3` have the number."""
    ranges = re.findall(r"(?:^|,)(\d{1,9})(?:-(\d{1,9}))?(?=,|$)", text)
    return any(int(first) <= number <= int(last or first) for first, last in ranges)


def is_this_node(nodes: str) -> bool:
    """Return whether a list in Slurm's form, such as `gpu[1-3,07],big1`, has the name of this node."""
    for name in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes):
        fixed, ranges = re.split(r"\[[^\[\]]*\]", name), re.findall(r"\[([^\[\]]*)\]", name)
        found = re.fullmatch(r"(\d+)".join(map(re.escape, fixed)), NODE)
        if found and all(has(text, int(number)) for text, number in zip(ranges, found.groups(), strict=True)):
            return True
    return False


def parts(gres: str, shards: int) -> Parts:
    """Return what a description such as `gpu:a100:1(IDX:0)`, `shard:2(IDX:1)` or `shard:2(0/4,2/4)` grants.

    Args:
        gres: the description of what a job has on this node.
        shards: the number of shards of each GPU. The third form, since Slurm 24.05, has these numbers itself.
    """
    found: Parts = {}
    for name, count, what in re.findall(r"\b(gpu|shard):(?:[^,:()]+:)?(\d{1,9})\(([^()]*)\)", gres):
        if what.startswith("IDX:"):
            gpus = [index for index in range(64) if has(what.removeprefix("IDX:"), index)]
            # Of shards on several GPUs, each has at least one, and at least what does not fit on the others.
            least = percent(max(int(count) - (len(gpus) - 1) * shards, 1), shards)
            more = dict.fromkeys(gpus, 100.0 if name == "gpu" else least)
        else:
            pairs = re.findall(r"(\d{1,9})/(\d{1,9})", what)
            more = {index: percent(int(mine), int(total)) for index, (mine, total) in enumerate(pairs)}
        found |= {index: part for index, part in more.items() if part and (name == "shard" or index not in found)}
    return found


def percent(mine: int, total: int) -> float:
    """Return the part of a GPU, or 0 if the GPU has no shards."""
    return min(100 * mine / total, 100.0) if total else 0.0


def granted(job: str, shards: int) -> Parts:
    """Return what the job has on this node.

    Args:
        job: the job as slurmctld describes it. This text also has the job's name and comment, in which a user can
            imitate the line of the node. If several lines describe this node, the smallest part is what they agree on.
        shards: see parts().
    """
    found: list[Parts] = []
    words = job.split()  # a search with an expression would take the square of the length of a long comment
    for line in zip(words, words[1:], words[2:], words[3:], strict=False):
        nodes, _, _, gres = (word.partition("=")[2] for word in line)
        if all(map(str.startswith, line, ("Nodes=", "CPU_IDs=", "Mem=", "GRES="))) and is_this_node(nodes):
            found.append(parts(gres, shards))
    if not found:
        refuse(f"slurmctld names nothing that the job has on {NODE}")
    return {index: min(one[index] for one in found) for index in found[0] if all(index in one for one in found)}


def shards_of_a_gpu(node: str) -> int:
    """Return the number of shards of each GPU of this node, as slurmctld describes the node."""
    gres = (re.search(r" Gres=(\S+)", node) or [""])[1]
    count = {name: sum(map(int, re.findall(rf"\b{name}:(?:[^,:(]+:)?(\d+)", gres))) for name in ("gpu", "shard")}
    if count["shard"] and (not count["gpu"] or count["shard"] % count["gpu"]):
        refuse(f"{gres} has not the same number of shards for each GPU")
    return count["shard"] // count["gpu"] if count["gpu"] else 0


def folder(node: str) -> str:
    """Return the name that Slurm gives the job's cgroup. If the name is wrong, the policy gives the job nothing.

    slurmd sets SLURM_JOB_SLUID since 25.11. This is the cgroup's name since 26.05, unless cgroup.conf has
    `CgroupJobIdPaths=yes` (since 26.05.2). slurmctld may be of a later release than this node's slurmd.

    Args:
        node: the node as slurmctld describes it.
    """
    release = re.search(r" Version=(\d+)\.(\d+)", node)
    sluid = os.environ.get("SLURM_JOB_SLUID")
    if not sluid or not release or (int(release[1]), int(release[2])) < (26, 5):
        return f"job_{JOB}"
    has_number = re.search(r"^CgroupJobIdPaths\s*= yes", said("scontrol", "show", "config"), re.MULTILINE)
    return f"job_{JOB}" if has_number else sluid


def own_name() -> str:
    """Return the name by which slurmctld describes only this job: `7`, `7_2`, `7+0`.

    The number of an array is also that of its last task, and the number of a heterogeneous job that of its first part.
    With this number, slurmctld would describe all of them. The output has no text of a user.
    """
    rows = said("squeue", "--noheader", "--states=all", f"--jobs={JOB}", "--format=%A %i").splitlines()
    return next((row.split()[1] for row in rows if row.split()[0] == JOB), JOB)


def asked(comment: str) -> Request:
    """Return what a comment asks for. A request can only lower a limit, so that no text gets a job more than its share.

    A word that is nearly a request is in `unknown`, such as `fgpu:memory=6GB`.
    """
    part, memory, compute, unknown = 100.0, float(MOST), 100.0, []
    for word in re.findall(r"fgpu:\S*", comment):
        name, _, value = word.removeprefix("fgpu:").partition("=")
        percents, size = PERCENT.fullmatch(value), BYTES.fullmatch(value)
        share = float(percents[1]) if percents else 0.0
        count = float(size[1]) * UNITS[size[2] or ""] if size else 0.0
        if name == "memory" and 0 < share <= 100:
            part = min(part, share)
        elif name == "memory" and LEAST <= count <= MOST:
            memory = min(memory, count)
        elif name == "compute" and 0 < share <= 100:
            compute = min(compute, share)
        else:
            unknown.append(word)
    return Request(part, memory, compute, tuple(unknown))


def quality_and_comment(name: str) -> tuple[str, str]:
    """Return the job's quality of service, empty if it has none, and its comment.

    The administrator has chosen the names of qualities, so that the first `|` ends the name. The comment can have more.
    """
    text = said("squeue", "--noheader", "--states=all", f"--jobs={name}", "--format=%q|%k")
    quality, _, comment = text.partition("|")
    return "" if quality.strip() in NO_QUALITY else quality.strip(), comment


def note(unknown: Sequence[str]) -> None:
    """Leave a note for the job about words that the prolog does not understand, or remove an earlier one."""
    NOTE.unlink(missing_ok=True)
    if unknown:
        words = ", ".join(ascii(word[:40]) for word in unknown[:5])
        form = "write fgpu:memory=6GiB, fgpu:memory=10% or fgpu:compute=25%"
        NOTE.parent.mkdir(mode=0o755, exist_ok=True)
        NOTE.write_text(f"fgpu: ignored in the job's comment: {words}: {form}\n", encoding="ascii")


def limits(of: Parts, request: Request, usable: dict[int, int]) -> list[str]:
    """Return the options of `fgpu set`. `fgpu set` has one limit for all GPUs: the smallest part is valid for each.

    Args:
        of: what the job was granted.
        request: what the job asks for.
        usable: the memory of each GPU that tenants can get, in bytes.
    """
    part = min(*of.values(), request.part)
    sizes = [int(usable[index] * part / 100) // LEAST * LEAST for index in of]
    memory = f"{int(part * 10000) / 10000:.4f}%"
    if request.memory < max(sizes):
        memory = f"{max(int(min(request.memory, *sizes)), LEAST)}B"
    compute = [f"--compute={request.compute:.4f}%"] if request.compute < 100 else []
    devices = [f"--device={index}" for index in sorted(of)]
    return [f"--memory={memory}", f"--weight={max(round(min(of.values())), 1)}", *compute, *devices]


def cgroup() -> Path:
    """Return the place of cgroup v2."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Path(line.split()[1])
    refuse("cgroup v2 is not mounted")


def main() -> None:
    """Limit the cgroup of the job, if the job has a GPU. Without a limit, the policy gives the job nothing."""
    name = own_name()
    job = said("scontrol", "--oneliner", "--details", "show", "job", name)
    node = said("scontrol", "--oneliner", "show", "node", NODE)
    if not (of := granted(job, shards_of_a_gpu(node))):
        return
    status: dict[str, Any] = json.loads(said("fgpu", "status", "--json"))
    if status["unenforced"]:
        refuse(status["unenforced"])
    scope = next((scope for scope in SCOPES if (cgroup() / scope).is_dir()), None)
    if scope is None:
        refuse(f"neither {' nor '.join(SCOPES)} is a cgroup")
    quality, comment = quality_and_comment(name)
    request = asked(comment)
    note(request.unknown)
    options = limits(of, request, {device["index"]: device["usable_bytes"] for device in status["devices"]})
    options += [f"--priority-class={quality}"] if quality else []
    place = f"{scope}/{folder(node)}"
    (cgroup() / place).mkdir(exist_ok=True)
    said("fgpu", "set", f"/{place}", *options)


if __name__ == "__main__":
    main()
