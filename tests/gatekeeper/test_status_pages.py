"""A real gatekeeper continues with any contents of its tenants' status pages, and their neighbour gets its turns."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.abi import Gate, StatusPage
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.linux import futex
from fgpu_ebpf.scheduling.fair_queue import Share
from tests.gatekeeper.conftest import Keeper
from tests.gatekeeper.hello_client import Child, Reply, hello
from tests.support.wait import Deadline

Make = Callable[..., Path]
MS, WORD = 1_000_000, 2**64 - 1
TURNS = 10
SECONDS, LONGEST_SECONDS = 3.0, 100.0


class Pages:
    """The pages of this process as its program has them: the control page to read, the status page to write."""

    def __init__(self, run: Path) -> None:
        reply = hello(run)
        assert reply
        self._reply: Reply = reply
        self._control = mmap.mmap(reply.fds[0], abi.PAGE_BYTES, prot=mmap.PROT_READ)
        self.memory = mmap.mmap(reply.fds[1], abi.PAGE_BYTES)
        self.status = StatusPage.from_buffer(self.memory)

    def gate(self) -> int:
        return int(struct.unpack_from("I", self._control, abi.ControlPage.gates.offset)[0])

    def ring(self) -> None:
        self.status.bell = (self.status.bell + 1) & 0xFFFFFFFF
        futex.wake(ctypes.addressof(self.status) + StatusPage.bell.offset)

    def wait_until(self, is_open: bool, end: Deadline) -> None:
        while bool(self.gate() & Gate.OPEN) != is_open and not end.is_over():
            time.sleep(0.0001)


def write_anything(run: Path, seed: int, on: Path) -> int:
    """Write arbitrary bytes, nearly valid words, and wake-ups, at full speed. Return how often."""
    mine, draw, end, rounds = Pages(run), random.Random(seed), time.monotonic() + LONGEST_SECONDS, 0
    while on.exists() and time.monotonic() < end:
        rounds += 1
        if draw.random() < 0.3:
            mine.memory[64:1088] = draw.randbytes(1024)
        now_ns, device = time.monotonic_ns(), mine.status.devices[0]
        device.waiting, device.drained = draw.randrange(2), draw.choice((mine.gate() >> 2, 0, 2**32 - 1))
        for part in (mine.status.flights[0], mine.status.spans[0]):
            for name, _ in part._fields_:
                setattr(part, name, draw.choice((0, 1, WORD, 2**63, now_ns + draw.randrange(-20, 20) * MS // 10)))
        mine.ring()
        time.sleep(draw.choice((0.0, 0.0001, 0.001, 0.01)))
    return rounds


def take_turns(run: Path, on: Path) -> int:
    """Run an honest program that always has work to launch, for SECONDS. Return the number of its turns.

    The program continues beyond SECONDS until it has had enough turns, for as long as Deadline allows.
    """
    mine, least, end, turns = Pages(run), time.monotonic() + SECONDS, Deadline(SECONDS), 0
    device = mine.status.devices[0]
    while time.monotonic() < least or (turns <= TURNS and not end.is_over()):
        device.waiting, device.drained = 1, mine.gate() >> 2
        mine.ring()
        mine.wait_until(True, end)
        device.waiting, turns = 0, turns + 1
        while mine.gate() & Gate.OPEN and (time.monotonic() < least or not end.is_over()):
            device.launches += 1
            time.sleep(0.0005)
    on.unlink()
    return turns


@pytest.fixture
def sharing(ledger: Ledger, tenant: Make) -> Iterator[Callable[..., Path]]:
    """Return a function that creates a managed cgroup with a share of device 0."""
    made: list[int] = []

    def make(share: Share) -> Path:
        path = tenant()
        made.append(path.stat().st_ino)
        ledger.times.set_shares({made[-1]: {0: share}})
        return path

    yield make
    ledger.times.forget(made)


def followed(keeper: Keeper, ledger: Ledger, on: Path, *children: Child) -> list[int]:
    """Return the children's results. Check all counts while the children run: a count may only grow."""
    pid, before = keeper.process.pid, dict[tuple[int, int], TurnCounts]()
    while on.exists():
        assert keeper.process.poll() is None, keeper.log.read_text()
        for key, counts in ledger.times.turns().items():
            last = before.get(key, TurnCounts())
            assert all(old <= new < 2**62 for old, new in zip(astuple(last)[:6], astuple(counts)[:6], strict=True))
            before[key] = counts
        time.sleep(0.05)
    assert any(counts.waits for counts in before.values())
    assert os.path.exists(f"/proc/{pid}")
    return [child.result() for child in children]


def test_any_status_page_leaves_the_gatekeeper_running_and_the_neighbour_its_turns(
    keeper: Keeper, ledger: Ledger, sharing: Callable[..., Path], tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    liars = [Share(), Share(limit_millionths=250_000), Share(rank=2)]
    on = tmp_path / "on"  # until the honest program has ended
    on.touch()
    children = [Child(sharing(share), write_anything, keeper.run, seed + n, on) for n, share in enumerate(liars)]
    honest = Child(sharing(Share()), take_turns, keeper.run, on)
    *rounds, turns = followed(keeper, ledger, on, *children, honest)
    assert min(rounds) > 50
    assert turns > TURNS
    assert keeper.counts()["slices"]["faults"] == 0


def test_nvml_s_figures_are_kept_as_long_as_the_share_exists(ledger: Ledger, tenant: Make) -> None:
    """A late thread must not leave an entry of a level that has been removed."""
    level, times = tenant().stat().st_ino, ledger.times
    times.add_ran(level, 0, 5)
    assert times.ran_ns(level, 0) is None
    for _ in range(2):
        times.set_shares({level: {0: Share()}})
        times.add_ran(level, 0, 5)
    assert times.ran_ns(level, 0) == 10
    times.forget([level])
    times.add_ran(level, 0, 5)
    assert times.ran_ns(level, 0) is None
