"""Tests of the size of the agent's memory: malloc's settings, the cycle collector, and interned names."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from fgpu_ebpf.agent import gatekeeper_process
from fgpu_ebpf.linux import atomic_file, malloc
from fgpu_ebpf.policy.folder import PolicyFolder
from fgpu_ebpf.policy.globs import path_globs
from fgpu_ebpf.workloads.cgroups import Workloads

THREADS = """
import ctypes, sys, threading
from fgpu_ebpf.linux import malloc as heap
{before}
libc, all_there = ctypes.CDLL(None), threading.Barrier(9)
libc.fopen.restype = libc.malloc.restype = ctypes.c_void_p
def take():
    libc.malloc(1000)
    all_there.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads: thread.start()
all_there.wait()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""
MALLINFO = """
import ctypes
class Mallinfo(ctypes.Structure):  # of <malloc.h>: hblkhd and uordblks
    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "mapped", "e", "f", "used", "g", "h")]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Mallinfo
"""
RESIDENT = """
def resident():  # the value in statm may be too old by some pages for each processor
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss:"))
"""
LARGE = """
from fgpu_ebpf.linux import malloc as heap
{before}
libc.free(ctypes.c_void_p(libc.malloc(1 << 20)))
before = libc.mallinfo2().mapped
libc.malloc(1 << 19)
print(libc.mallinfo2().mapped - before)
"""
HOLES = """
import ctypes
from fgpu_ebpf.linux import malloc as heap
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [ctypes.c_void_p(libc.malloc(4000)) for _ in range(2000)]
for block in blocks: ctypes.memset(block, 1, 4000)
for block in blocks[:-1]: libc.free(block)
before = resident()
{after}
print(before - resident())
"""
KEPT = """
blocks = [ctypes.c_void_p(libc.malloc(size)) for size in range(200, 1000, 16) for _ in range(7)]
before = libc.mallinfo2().used
for block in blocks: libc.free(block)
print(before - libc.mallinfo2().used)
"""
STACKS = """
import os, threading, time
from fgpu_ebpf.linux import malloc as heap
heap.keep_small()
threading.stack_size(1 << 18)  # by default, glibc keeps up to 40 MiB of stacks for later threads
def mappings():
    with open("/proc/self/maps") as file:
        return len(file.readlines())
def together(count):
    all_there = threading.Barrier(count)
    threads = [threading.Thread(target=all_there.wait) for _ in range(count)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    while len(os.listdir("/proc/self/task")) > 1: time.sleep(0.001)  # join() returns before the thread has exited
together(1)
before = mappings()
together(32)
for _ in range(3): together(1)  # an exiting thread frees the stacks of earlier threads, never its own
print(mappings() - before)
"""
CROWD = """
from fgpu_ebpf.linux import malloc as heap
{before}
crowd = [None] * 4000  # not a small object
def fill(count):
    for number in range(count): crowd[number] = [str(number), [number]]
fill(10), resident()  # maps the parts of Python's own files that this needs
before = resident()
fill(4000)
print(resident() - before)
"""


def arenas(before: str, out: Path) -> int:
    """Return the number of malloc arenas of a process with eight threads that hold memory at the same time."""
    subprocess.run([sys.executable, "-c", THREADS.format(before=before), out], check=True, timeout=30)
    return out.read_text().count("<heap nr=")


def test_threads_share_one_arena_after_keep_small(tmp_path: Path) -> None:
    assert arenas("heap.keep_small()", tmp_path / "one") == 1
    assert arenas("", tmp_path / "many") > 1


def printed(program: str, environment: dict[str, str] | None = None) -> int:
    """Return the number that a separate process prints."""
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, env=environment, check=True, timeout=30, stdout=subprocess.PIPE).stdout)


def mapped_bytes(before: str) -> int:
    """Return how many bytes of an allocation of 512 KiB are a separate mapping, after 1 MiB was freed."""
    return printed(MALLINFO + LARGE.format(before=before))


def test_a_large_block_stays_a_separate_mapping() -> None:
    assert mapped_bytes("heap.keep_small()") >= 1 << 19
    assert mapped_bytes("") == 0


def given_back_bytes(after: str) -> int:
    """Return how many of 8 MB are returned to the system, if they were freed below a block that is still in use."""
    return printed(RESIDENT + HOLES.format(after=after))


def test_free_memory_below_used_memory_is_returned_too() -> None:
    assert given_back_bytes("heap.give_back()") >= 7 << 20
    assert given_back_bytes("") < 1 << 20


def given_up_bytes(environment: dict[str, str]) -> int:
    """Return how many of the 207 KB that a thread freed, in blocks of 200 to 984 bytes, are not kept for it."""
    return printed(MALLINFO + KEPT, environment)


def test_the_allocator_s_environment_leaves_a_thread_little_of_the_memory_that_it_freed() -> None:
    assert given_up_bytes(malloc.ENVIRONMENT) > 180_000
    assert given_up_bytes({}) < 30_000


def stacks_left(environment: dict[str, str]) -> int:
    """Return how many mappings of stacks remain after 32 threads existed at one time: two for each stack."""
    return printed(STACKS, environment)


def test_the_allocator_s_environment_leaves_few_stacks_of_ended_threads_mapped() -> None:
    assert stacks_left(malloc.ENVIRONMENT) < 8
    assert stacks_left({}) > 48


@pytest.mark.parametrize(
    "file",
    [
        "systemd/fgpu-agent.service",
        "systemd/fgpu-gatekeeper.service",
        "helm/fgpu/templates/agent.yaml",
        "helm/fgpu/templates/gatekeeper.yaml",
    ],
)
def test_each_service_file_sets_the_allocator(file: str) -> None:
    (setting,) = malloc.ENVIRONMENT.values()
    assert setting in (Path(__file__).resolve().parents[2] / "deploy" / file).read_text()


class Thing:
    """An object that may be in a cycle."""


def test_give_back_frees_unreachable_cycles() -> None:
    thing = Thing()
    thing.itself = thing  # type: ignore[attr-defined]
    gc.collect()  # older objects are examined less often
    seen = weakref.ref(thing)
    del thing
    gc.collect(1)
    assert seen()
    malloc.give_back()
    assert not seen()


def test_give_back_frees_patterns_that_are_no_longer_used() -> None:
    seen = weakref.ref(path_globs(["some/*"])._compiled)
    assert seen(), "the object was freed too early for this test"
    malloc.give_back()
    assert not seen()


def looked_at(before: str) -> int:
    """Return how many objects the cycle collector examines, of 100,000 lists and all others."""
    program = f"import gc; from fgpu_ebpf.linux import malloc; stay = [[] for _ in range(100_000)]; {before}"
    return printed(f"{program}; print(len(gc.get_objects()))")


def test_the_cycle_collector_does_not_examine_objects_from_before_settle() -> None:
    assert looked_at("malloc.settle(0)") < 1000
    assert looked_at("pass") > 100_000


def grown_bytes(before: str) -> int:
    """Return the growth of the process in bytes while 900 KB of small objects exist."""
    return printed(RESIDENT + CROWD.format(before=before))


def test_many_small_objects_fit_in_the_reserved_memory() -> None:
    assert grown_bytes("heap.settle(1 << 20)") < 1 << 17
    assert grown_bytes("heap.settle(0)") > 1 << 19


def test_names_of_short_lived_files_are_not_interned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's table of interned names never shrinks, and a Path interns its parts."""
    (tmp_path / "run/shim").mkdir(parents=True)
    (tmp_path / "policy.d").mkdir()
    (tmp_path / "policy.d/some.yaml").write_text("")
    cgroups, run, policies = Workloads(tmp_path), tmp_path / "run", PolicyFolder(tmp_path / "policy.d", False, 0)
    policies.read()  # the first call imports modules
    interned: list[str] = []
    intern = sys.intern
    monkeypatch.setattr(sys, "intern", lambda text: (interned.append(text), intern(text))[1])
    _ = tmp_path / "seen"
    assert interned.pop() == "seen", "the test does not detect an interned name"
    interned.clear()

    tenant = cgroups.make("tenant")
    assert list(cgroups.walk())
    for asked in (cgroups.identify, cgroups.folder, cgroups.pids, cgroups.is_populated):
        asked(tenant)
    assert cgroups.remove(tenant)
    policies.read()
    atomic_file.write(f"{run}/one", "")
    gatekeeper_process.is_up(run)
    assert interned == []
