"""A tenant replaces or damages libraries. The agent still examines other tenants' libraries, replies, and starts."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, fgpu, metrics
from tests.support.host import CONTEXT, MIB, SIM
from tests.support.service import Service
from tests.support.wait import Deadline, eventually

NOBODY = 65534
MAP = """
import mmap, os, sys
held = []
for path in sys.argv[2:]:
    fd = os.open(path, os.O_RDONLY)
    held.append(mmap.mmap(fd, 0, prot=mmap.PROT_READ | mmap.PROT_EXEC, flags=mmap.MAP_PRIVATE))
    os.close(fd)
    if sys.argv[1] == "fifo":
        os.unlink(path)
        os.mkfifo(path)
print("mapped", flush=True)
sys.stdin.read()
"""
Mapper = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that belongs to an unprivileged user."""
    tmp_path.chmod(0o755)
    place = tmp_path / "own"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    return place


@pytest.fixture
def mapper(service: Service, unharmed: None) -> Iterator[Mapper]:
    """Return a function that starts processes of an unprivileged user which map these files as executable."""
    started: list[subprocess.Popen[bytes]] = []

    def start(what: str, *paths: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", MAP, what, *map(str, paths)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=NOBODY, group=NOBODY)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"mapped\n"
        return process

    yield start
    for process in started:
        process.communicate()
    if service.agent and service.agent.poll() is not None:
        service.start_agent()


def library(path: Path) -> Path:
    """Copy the driver's library for an unprivileged user."""
    shutil.copy(SIM / "lib/libcuda.so.1", path)
    os.chown(path, NOBODY, NOBODY)
    return path


def without_segments(path: Path) -> Path:
    """Remove the segments, so that no segment of the file contains its functions."""
    text = bytearray(library(path).read_bytes())
    (at,), (count,) = struct.unpack_from("<Q", text, 0x20), struct.unpack_from("<H", text, 56)
    for segment in range(count):
        struct.pack_into("<I", text, at + 56 * segment, 0)
    path.write_bytes(text)
    return path


def junk(path: Path) -> Path:
    path.write_bytes(b"x" * 5000)
    return path


MADE = {"fifo": ("fifo", library), "segments": ("file", without_segments), "junk": ("file", junk)}


@pytest.mark.places("host")
@pytest.mark.parametrize("kind", MADE)
def test_an_agent_starts_and_continues_beside_a_hostile_library(
    service: Service, mapper: Mapper, folder: Path, tenant, kind: str
) -> None:
    how, make = MADE[kind]
    mapper(how, make(folder / "libcuda.so.1"))
    service.kill_agent()
    before = len(service.log.read_text())
    deadline = Deadline(10)
    service.start_agent()
    assert not deadline.is_over()
    log = service.log.read_text()[before:]
    one = tenant(CONTEXT + 40 * MIB)
    with one.growing(40 * MIB):
        one.client().ok(f"fill {2 * MIB} 0")
    deadline = Deadline(2)
    assert ask(verb="ping")["pid"]
    assert not deadline.is_over()
    assert ("not probed" in log) == (kind != "fifo"), "only the library behind the fifo can be probed"
    service.check()


def links() -> list[Path]:
    """Return the pinned links of all probes."""
    return list(next(Path("/sys/fs/bpf/fgpu").glob("v*/links")).iterdir())


@pytest.mark.places("host")
def test_many_libraries_of_one_cgroup_get_a_bounded_number_of_probes_and_descriptors(
    service: Service, mapper: Mapper, folder: Path, tenant
) -> None:
    assert service.agent
    eventually(lambda: len(links()) < 30, 20, "the removal of probes that an earlier trial has left")
    before = len(os.listdir(f"/proc/{service.agent.pid}/fd"))
    service.kill_agent()
    greedy = mapper("file", *(library(folder / f"libcuda.so.{n}") for n in range(311)))
    said = service.log.stat().st_size
    service.start_agent()
    limits = Path(f"/proc/{service.agent.pid}/limits").read_text().split("Max open files")[1].split()
    assert limits[0] == limits[1] != "1024"
    assert len(os.listdir(f"/proc/{service.agent.pid}/fd")) < before + 2 * 136
    assert len(links()) < 3 * 136
    assert metrics()["fgpu_anomalies_total", frozenset({("kind", "unprobed")})] > 0
    assert service.log.read_bytes()[said:].count(b"other files that processes of") == 1
    assert fgpu("run", "--memory", f"{CONTEXT}B", "--", "true").returncode == 0
    one = tenant(CONTEXT + 40 * MIB)
    with one.growing(40 * MIB):
        one.client().ok(f"fill {2 * MIB} 0")
    greedy.communicate()
    eventually(lambda: len(links()) < 30, 20, "the removal of the probes")
