"""`fgpu detach` restores a host to its state before fgpu: files, mounts, cgroups, processes and kernel objects."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import fgpu
from tests.support.host import CONTEXT, ENVIRONMENT, FGPU, MIB, RUN_DIR, SHIM, SIM, cgroup_root, free_port
from tests.support.kernel import NEXT_ID, held_by, in_the_kernel, pinned
from tests.support.place import place_of
from tests.support.service import Service
from tests.support.wait import eventually

STATE = Path("/var/lib/fgpu")
MEASURED = f"{STATE}/contexts.json"  # the size of a context, which detach keeps: measuring it needs a context
FOLDERS = ("/etc", "/run/fgpu", "/usr/lib/fgpu", STATE, "/sys/fs/bpf")


def files(*folders: str | Path) -> dict[str, tuple[int, int, int, int]]:
    """Return every file in the folders by path: mode and owner, and of a file also size and modification time."""
    found = {}
    for folder in folders:
        for around, inside, names in os.walk(folder):
            for name in inside + names:
                path = Path(around, name)
                with contextlib.suppress(FileNotFoundError):
                    stat = path.lstat()
                    is_file = name in names
                    found[str(path)] = (
                        stat.st_mode,
                        stat.st_uid,
                        *((stat.st_size, stat.st_mtime_ns) * is_file or (0, 0)),
                    )
    return found


def mounts() -> list[str]:
    """Return the mounts of this mount namespace."""
    return sorted(Path("/proc/self/mountinfo").read_text().splitlines())


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """Mount an empty file system over a folder of the host, so that no other process writes there during the test."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "own", folder], check=True)
    yield
    subprocess.run(["umount", "--lazy", folder], check=True)  # a removed probe still references its file for a moment
    if made:
        folder.rmdir()


@pytest.fixture
def bare(service: Service, unharmed: None) -> Iterator[Service]:
    """Return a host without fgpu, with new folders for a service's files; afterwards the usual service runs."""
    service.detach()
    with own(STATE):
        yield service
        service.detach()
    service.start_agent()


@pytest.mark.parametrize("alive", [True, False], ids=["a running agent", "a dead one"])
def test_detach_restores_the_host_to_its_state_before_fgpu(bare: Service, tmp_path: Path, alive: bool) -> None:
    folders = (*FOLDERS, bare.cdi)
    before, mounted = files(*folders), mounts()
    bare.start_agent(None, "--store", str(STATE / "shim"))
    assert bare.agent
    place = place_of("host", tmp_path)
    one = place.tenant(CONTEXT + 40 * MIB)
    one.assert_enforced()
    with one.growing():
        one.client().ok(f"alloc {20 * MIB}")
    (gatekeeper,) = bare.gatekeepers()
    ours = pinned() | held_by(bare.agent.pid) | held_by(gatekeeper)
    assert {kind for kind, _ in ours} == set(NEXT_ID)
    assert len(ours) > 30
    assert ours <= in_the_kernel()
    there = files(*folders).keys() - before.keys()
    for folder in (RUN_DIR, bare.cdi, STATE / "shim", STATE / "bin", Path("/sys/fs/bpf/fgpu")):
        assert any(name.startswith(f"{folder}/") for name in there), folder
    place.close()
    if not alive:
        bare.kill_agent()
        (RUN_DIR / ".overrides.json.new").touch()  # as if the agent had been killed while it wrote the file
    fgpu("detach", seconds=60)
    bare.agent.wait(60)
    eventually(lambda: not bare.gatekeepers(), 5, "the gatekeeper's end")
    after = files(*folders)
    assert after.pop(MEASURED)
    after.pop(str(STATE / "usage.db"), None)  # `fgpu usage` keeps it; an agent that ran for a minute has written it
    assert after == before
    assert mounts() == mounted
    own = cgroup_root() / "fgpu"
    assert not own.exists() or any(path.is_dir() for path in own.iterdir()), "an empty cgroup is left"
    eventually(lambda: not ours & in_the_kernel(), 10, "no BPF object of fgpu in the kernel")


def test_detach_keeps_a_shim_that_a_program_uses(bare: Service, tmp_path: Path) -> None:
    """A program of `fgpu run`, and the programs that it starts, continue after `fgpu detach`."""
    preload = Path("/etc/ld.so.preload")
    was_there = preload.exists()
    bare.start_agent(None, "--store", str(STATE / "shim"))
    place = place_of("host", tmp_path)
    one = place.tenant(CONTEXT + 40 * MIB)
    one.assert_enforced()
    client = one.client()
    with one.growing():
        client.ok(f"alloc {20 * MIB}")
    assert fgpu("detach", seconds=60).stdout == "detached: 1 tenant has lost its limit\n"
    assert bare.agent
    bare.agent.wait(60)
    assert (STATE / "shim/current/libfgpu.so").exists()
    eventually(lambda: client.do(f"alloc {100 * MIB}").startswith("ok"), 3, "memory without fgpu")
    assert "cannot be preloaded" not in one.run("sh -c 'true 2>&1; ls / 2>&1'")
    assert one.run(f"cat {preload}").endswith("/libfgpu.so\n"), "the program's preload list has lost the shim"
    place.close()
    fgpu("detach")
    assert preload.exists() == was_there


def test_detach_waits_for_an_agent_that_starts(bare: Service) -> None:
    """An agent that starts holds its lock and has no socket yet. Here this process holds the lock."""
    bare.start_agent()
    bare.kill_agent()
    pins = Path("/sys/fs/bpf/fgpu")
    before = sorted(pins.rglob("*"))
    assert before
    with open(RUN_DIR / "agent.lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = subprocess.Popen([*FGPU, "detach"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            command.communicate(timeout=2)
        assert sorted(pins.rglob("*")) == before
    said, _ = command.communicate(timeout=60)
    assert (command.returncode, said) == (0, "detached: limits, probes and set-up files of the agent are removed\n")
    assert not pins.exists()
    assert not RUN_DIR.exists() or not list(RUN_DIR.iterdir())


def test_detach_unmounts_a_bpffs_that_the_agent_mounted(service: Service, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    fgpu_there = [*FGPU, "--run-dir", str(tmp_path / "run")]
    agent = [
        *fgpu_there,
        "agent",
        "--shim",
        str(SHIM),
        "--listen",
        f"127.0.0.1:{free_port()}",
        "--driver-root",
        str(SIM),
    ]
    script = f"""
    while umount /sys/fs/bpf 2>/dev/null; do :; done
    sort /proc/self/mountinfo >{tmp_path}/before
    {" ".join(agent)} >{tmp_path}/log 2>&1 &
    for try in $(seq 1000); do grep -q enforcing {tmp_path}/log && break; sleep 0.1; done
    sort /proc/self/mountinfo >{tmp_path}/during
    {" ".join(fgpu_there)} detach
    wait
    sort /proc/self/mountinfo >{tmp_path}/after
    """
    subprocess.run(["unshare", "--mount", "sh", "-ec", script], check=True, timeout=200, env=ENVIRONMENT)
    before, during, after = ((tmp_path / name).read_text() for name in ("before", "during", "after"))
    assert " /sys/fs/bpf " not in before
    assert " /sys/fs/bpf " in during, (tmp_path / "log").read_text()
    assert after == before
    assert not (tmp_path / "run").exists()
    # Detach has removed the service's cgroup too. The suite's agent cannot create it again while it runs, because a
    # host has one agent.
    (cgroup_root() / "fgpu").mkdir(exist_ok=True)
