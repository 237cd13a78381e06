"""Tests of tests/world.py: a command has its own folders, cgroups and libraries, and nothing of it remains."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fgpu_ebpf.linux import procfs
from tests import world
from tests.support.wait import eventually
from tests.unit.root_kit import needs_root

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "tests.world"]
NAMES = """
from fgpu_ebpf.linux import cgroup_namespace
root = cgroup_namespace.root_path()
print(root, cgroup_namespace.inside(root), cgroup_namespace.inside(f"{root}/a"), cgroup_namespace.inside(f"{root}x"))
"""

pytestmark = needs_root("it mounts, and creates cgroups")


def in_world(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *map(str, command)], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


def worlds() -> Path:
    """Return the folder with the cgroups of all worlds, as a path that is valid in each of them."""
    host = os.environ.get(world.HOST)
    process = Path(host).parents[1] if host else Path(f"/proc/{os.getpid()}")
    return process / "root" / world.cgroup2().relative_to("/") / world.FOLDER


def test_folders_are_private(tmp_path: Path) -> None:
    script = 'touch /run/fgpu/mine /var/lib/fgpu/mine && mkdir /sys/fs/bpf/mine "$1/fgpu" && ls /run/fgpu'
    root = world.cgroup2()
    done = in_world("sh", "-ec", script, "sh", root)
    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr
    assert not Path("/run/fgpu/mine").exists()
    assert not Path("/var/lib/fgpu/mine").exists()
    assert not Path("/sys/fs/bpf/mine").exists()


def test_the_copy_of_the_driver_s_library_is_a_separate_file() -> None:
    library = ROOT / "build/sim/lib/libcuda.so.1"
    done = in_world("stat", "--dereference", "--format=%d %i", library)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() != [str(library.stat().st_dev), str(library.stat().st_ino)]


def test_nothing_remains_of_a_command(tmp_path: Path) -> None:
    """The status of the command is returned. Processes that the command leaves are killed."""
    file = tmp_path / "pid"
    made = f"ls -d {worlds()}/run-$PPID"
    done = in_world("sh", "-c", f"setsid sleep 1000 >/dev/null 2>&1 & echo $! >{file}; {made}; exit 7")
    assert done.returncode == 7
    assert not procfs.has_memory(int(file.read_text()))
    assert done.stdout.startswith(f"{worlds()}/run-")
    assert not Path(done.stdout.rstrip()).exists()


def test_nothing_remains_in_a_hierarchy_of_version_1() -> None:
    """The memory hierarchy's mount is the world's own."""
    places = [place for place in world.hierarchies_of_version_1() if place.name in ("pids", "freezer")]
    if not places:
        pytest.skip("this host has only version 2 of cgroups")
    make = 'mkdir -p "$0" && { sleep 1000 & } && echo $! >"$0"/cgroup.procs && ls -d "$0"'
    script = f"exec >/dev/null; sh -ec '{make}' {places[0]}/{world.FOLDER}/run-$PPID/pod >&2"
    done = in_world("sh", "-c", script)
    assert f"{places[0]}/{world.FOLDER}/run-" in done.stderr
    assert not Path(done.stderr.rstrip()).exists()


def test_a_world_that_is_made_in_another_world_is_beside_it() -> None:
    """Otherwise an agent in the outer world would probe the files of programs in the inner world."""
    outer = [] if world.HOST in os.environ else RUN
    command = [*outer, "sh", "-c", f"{' '.join(RUN)} cat /proc/$$/cgroup; exit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    # A test before may have moved this worker to the cgroup `init` of its world.
    assert re.search(r"^0::/\.\./[a-z]+[-0-9]*(/init)?$", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_paths_of_cgroups_are_those_of_the_namespace() -> None:
    """The kernel's tracepoints name cgroups from the root of the hierarchy."""
    root, itself, below, beside = in_world(sys.executable, "-c", NAMES).stdout.split()
    assert f"/{world.FOLDER}/run-" in root
    assert (itself, below, beside) == ("/", "/a", "None")


@pytest.mark.parametrize(("signals", "status"), [([signal.SIGTERM], 5), ([signal.SIGTERM, signal.SIGHUP], 137)])
def test_a_signal_ends_a_command_at_once(signals: list[signal.Signals], status: int) -> None:
    """The first signal is a Ctrl-C for the command. The next signal kills it."""
    ends = "exit 5" if len(signals) == 1 else "echo asked"
    script = f'trap "{ends}" INT; echo up; while :; do sleep 0.1; done'
    command = [*RUN, *RUN, "--clear", "sh", "-c", script]  # the inner command clears inside its own world
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout
            for number, text in zip(signals, ("up\n", "asked\n"), strict=False):
                assert process.stdout.readline() == text
                process.send_signal(number)
            assert process.wait(60) == status
        finally:
            process.kill()


def _clear() -> None:
    for name in ("gw0", "gw1"):
        world.clear(name)


def _clear_until_ended(workers: list[psutil.Process]) -> None:
    """Clear the worlds until all workers have exited.

    A worker may enter its world after pytest was killed.
    """
    eventually(lambda: _clear() or not any(worker.is_running() for worker in workers), 30, "the end of the workers")


@pytest.mark.slow
def test_a_run_after_kill_9_starts_like_the_first_run(scale: Callable[[int, int, int], int]) -> None:
    """Pytest is killed at a random time. Its worlds are cleared, as `./dev test` does, and the same tests pass."""
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=2", "tests/e2e/test_race.py"]
    environment = os.environ | {"FGPU_TEST_WORLDS": "2", "FGPU_TEST_SCALE": "quick"}
    moments = random.Random(os.environ.get("FGPU_TEST_SCALE"))
    worlds = world.cgroup2() / world.FOLDER
    for _ in range(scale(1, 1, 10)):
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as run:
            time.sleep(moments.uniform(1, 10))
            workers = psutil.Process(run.pid).children()
            run.kill()
        _clear_until_ended(workers)
        assert not list(worlds.glob("gw*"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    _clear()
    assert re.search(r"^\d+ passed in ", done.stdout, re.MULTILINE), done.stdout
