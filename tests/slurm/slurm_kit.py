"""Debian's Slurm with munge: one node with two GPUs of four shards each, in a mount namespace of its own.

The packages are of this release of Debian or of another. They are unpacked below /usr of that namespace and never
installed. Those of another release bring all libraries that they need, and the jobs' programs use these too. The
daemons run as root. Jobs belong to a user without rights.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import debian
from tests.support.commands import output
from tests.support.host import BUILD, FGPU, ROOT, SIM, cgroup_root, free_port
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually

PACKAGES = ("munge", "slurm-client", "slurm-wlm-basic-plugins", "slurmctld", "slurmd")
SHARDS = 4  # of each GPU
USER = "daemon"
NODE = socket.gethostname().partition(".")[0]
SLICE = cgroup_root() / "system.slice"
SERVICE = SLICE / "slurmd.service"  # systemd would start the daemon in this cgroup
FILL = BUILD / "examples/fill"
# A mount namespace with the packages in /usr, until stdin is closed.
CAVE = 'mount -t overlay -o "lowerdir=$1:$2:/usr" overlay /usr && echo ready && exec cat'
CONF = f"""
ClusterName=tests
SlurmctldHost={NODE}(127.0.0.1)
SlurmUser=root
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
ProctrackType=proctrack/cgroup
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
GresTypes=gpu,shard
NodeName={NODE} NodeAddr=127.0.0.1 CPUs=16 Gres=gpu:2,shard:{2 * SHARDS}
PartitionName=all Nodes=ALL Default=YES
"""
# A file of a device must exist, and Slurm does not open it. The simulated driver has none.
GRES = f"Name=gpu File=/dev/null\nName=gpu File=/dev/zero\nName=shard Count={2 * SHARDS}\n"
FILLED = re.compile(r"admitted (\d+) bytes(?:, then (\w+))?\n")


class Slurm:
    """A cluster. `suite`: the release of Debian that has the packages; empty: this one."""

    def __init__(self, work: Path, suite: str = "") -> None:
        work.chmod(0o755)
        self.work = work
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._ports = {"SlurmctldPort": free_port(), "SlurmdPort": free_port()}
        self._write()
        more = self._more()
        packages = unpacked(suite)
        command = ["unshare", "--mount", "sh", "-c", CAVE, "sh", str(more), str(packages / "usr")]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout
        assert self._holder.stdout.readline() == b"ready\n", "no mount namespace"

    def _write(self) -> None:
        """Write the files of a cluster's administrator."""
        places = {"StateSaveLocation": "state", "SlurmdSpoolDir": "spool"}
        places |= {f"{name}PidFile": f"{name}.pid" for name in ("Slurmctld", "Slurmd")}
        places |= {f"{name}LogFile": f"{name}.log" for name in ("Slurmctld", "Slurmd")}
        lines = [f"{key}={self.work / name}" for key, name in places.items()]
        lines += [f"{key}={port}" for key, port in self._ports.items()]
        # A requeued job waits until credentials have expired, by default for two minutes.
        lines += [f"AuthInfo=socket={self.work}/munge.sock,cred_expire=6"]
        (self.work / "slurm.conf").write_text(CONF + "\n".join(lines) + "\n")
        (self.work / "gres.conf").write_text(GRES)
        hierarchy = f"CgroupPlugin=cgroup/v2\nCgroupMountpoint={cgroup_root()}\nIgnoreSystemd=yes\n"
        (self.work / "cgroup.conf").write_text(hierarchy)
        (self.work / "key").write_bytes(secrets.token_bytes(1024))
        (self.work / "key").chmod(0o400)

    def _more(self) -> Path:
        """Return a folder with what an installation adds to /usr: the daemons' usual names, and `fgpu`."""
        more = self.work / "usr"
        for folder in ("sbin", "bin"):
            (more / folder).mkdir(parents=True)
        for name in ("slurmctld", "slurmd", "slurmstepd"):
            (more / "sbin" / name).symlink_to(f"{name}-wlm")
        (more / "bin/fgpu").write_text(f'#!/bin/sh\nexec {" ".join(FGPU)} "$@"\n')
        (more / "bin/fgpu").chmod(0o755)
        return more

    def start(self, settings: str) -> None:
        """Start the daemons. Returns when the node accepts jobs. `settings`: further lines of slurm.conf."""
        with open(self.work / "slurm.conf", "a") as conf:
            conf.write(settings)
        files = {f"--{option}-file": self.work / f"munged.{option}" for option in ("pid", "log", "seed")}
        options = [f"{option}={file}" for option, file in files.items()]
        options += [f"--socket={self.work}/munge.sock", f"--key-file={self.work}/key"]
        self._start("munged", "--foreground", "--force", "--num-threads=10", *options)
        eventually(lambda: (self.work / "munge.sock").exists(), 10, "munged")
        self._start("slurmctld", "-D")
        SERVICE.mkdir(parents=True, exist_ok=True)
        flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        source = ROOT / "tests/slurm/unified.c"
        subprocess.run(["gcc", *flags, "-o", self.work / "unified.so", source], check=True, timeout=60)
        self.start_node()

    def start_node(self) -> None:
        """Start slurmd. Returns when slurmctld knows of it."""
        begun = self.call("scontrol", "show", "node", check=False).stdout
        enter = f"echo $$ >{SERVICE}/cgroup.procs; LD_PRELOAD={self.work}/unified.so exec slurmd -D"
        self._start("sh", "-c", enter)
        eventually(lambda: self._is_new(begun), 20, "slurmd")

    def _is_new(self, before: str) -> bool:
        """Return whether slurmctld has another time of slurmd's start than in that text."""
        start = re.compile(r"SlurmdStartTime=(\d\S+)")
        now = start.findall(self.call("scontrol", "show", "node", check=False).stdout)
        return bool(now) and now != start.findall(before)

    def restart_node(self) -> None:
        """Stop slurmd, and start it again. Jobs go on."""
        daemon = self._daemons.pop()
        daemon.terminate()
        daemon.wait(20)
        self.start_node()

    def _start(self, *words: str) -> None:
        with open(self.work / f"{words[0]}.out", "ab") as out:
            daemon = subprocess.Popen(self.command(*words), stdout=out, stderr=out, env=self.environment)
        self._daemons.append(daemon)

    def text(self) -> str:
        """Return the ends of all logs."""
        return "\n".join(f"{log.name}: {log.read_text()[-1000:]}" for log in self.work.glob("*.log"))

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a user of the cluster and of the simulated driver."""
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "LD_LIBRARY_PATH": f"{SIM}/lib", "SLURM_CONF": f"{self.work}/slurm.conf"}

    def command(self, *words: str | Path) -> list[str]:
        """Return the command line that runs a command in the namespace, as root."""
        return ["nsenter", f"--target={self._holder.pid}", "--mount", *map(str, words)]

    def call(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one command as root, and return its output."""
        more = {"env": self.environment, "cwd": "/", "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(self.command(*words), check=False, **more)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}{self.text()}"
        return done

    def job(self, *words: str | Path, **variables: str) -> subprocess.Popen[str]:
        """Start a command such as srun as a user. Its stdout also has its stderr."""
        command = self.command("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *words)
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        more = {"cwd": "/", "env": self.environment | variables, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, text=True, **both, **more)

    def filled(self, *words: str | Path, **variables: str) -> tuple[int, str]:
        """Run a command that ends with `fill` as a user. Return the bytes that it got, and the answer after them."""
        with self.job(*words, **variables) as job:
            said = job.communicate(timeout=60)[0]
        return parsed(said)

    @contextlib.contextmanager
    def holding(self, *words: str | Path) -> Iterator[int]:
        """Run a command that ends with `fill --hold` as a user until the end of the block. Yield the bytes that it got.

        The job must have run until then.
        """
        with self.job(*words) as job:
            assert job.stdout
            try:
                yield parsed(job.stdout.readline())[0]
                assert job.poll() is None, f"the job has ended: {job.stdout.read()}"
            finally:
                job.terminate()

    def cgroups(self) -> list[str]:
        """Return the names of the jobs' cgroups."""
        return sorted(path.name for path in SLICE.glob("*slurmstepd.scope/*/") if is_job(str(path)))

    def assert_nothing_is_left(self) -> None:
        """Check that ended jobs have left neither a cgroup nor a tenant nor memory."""
        eventually(lambda: not self.cgroups(), 20, "the end of the jobs' cgroups")
        eventually(lambda: not [t for t in output("status")["tenants"] if is_job(t["path"])], 10, "no tenants")
        eventually(lambda: not driver_books(), 10, "an empty driver")

    def stop(self) -> None:
        """Cancel all jobs, stop the daemons, and remove their cgroups."""
        with contextlib.suppress(AssertionError):
            self.call("scancel", "--full", "--signal=KILL", "--user", USER, check=False)
            eventually(lambda: not self.cgroups(), 20, "the end of all jobs")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(20)
        self._holder.kill()
        self._holder.wait(10)
        for place in (*SLICE.glob("*slurmstepd.scope"), SERVICE):
            for folder, _, _ in os.walk(place, topdown=False):
                os.rmdir(folder)


def unpacked(suite: str) -> Path:
    """Return a root with the packages of a release of Debian."""
    if not suite:
        return debian.unpacked(BUILD / "slurm", PACKAGES)
    folder = BUILD / "slurms"
    folder.mkdir(exist_ok=True)
    (folder / f"{suite}.status").touch()  # no package is installed
    words = ["install", "-y", "--download-only", "--no-install-recommends", *PACKAGES]
    options = [*debian.suite(folder, suite, suite), f"Dir::State::status={folder / suite}.status"]
    return debian.fetched(folder / suite, words, options)


def is_job(path: str) -> bool:
    """Return whether this cgroup is a job's. Up to 25.11 its name is job_JOBID; later it is any name."""
    return bool(re.search(r"slurmstepd\.scope/(?!(?:system|slurmd)$)[^/]+$", path))


def parsed(said: str) -> tuple[int, str]:
    """Return the bytes that `fill` got, and the driver's answer after them."""
    found = FILLED.search(said)
    assert found, said
    return int(found[1]), found[2] or ""


def fill(step: str = "2MiB", chunks: int = 0, hold: int = 0) -> list[str]:
    """Return the words of a program that allocates `chunks` steps, or all that it gets, and holds them for seconds."""
    return [str(FILL), "--step", step, "--hold", str(hold), *(["--chunks", str(chunks)] if chunks else [])]


def srun(shards: int, *options: str) -> list[str]:
    """Return the words of srun for a job with that number of shards."""
    return ["srun", "--quiet", *([f"--gres=shard:{shards}"] if shards else []), *options]
