"""Attacks of a tenant on the kernel's ledger by calls only: T6, T15, T16, T21, T22 of docs/security.md."""

from __future__ import annotations

import pytest

from fgpu_ebpf import abi
from tests.bpf.conftest import MIB, anomalies, assert_left, wait_until
from tests.bpf.events_kit import fates

HELD = 64 * MIB  # bytes that each attacker has


# -- T15, T16: floods -----------------------------------------------------------------------------------------------


def test_a_flood_of_one_level_loses_no_event_of_its_neighbour(kernel, events, make_level, make_client, attack, scale):
    """Every request of one level is refused and counted. Each event that is not sent is counted too.

    The other level is refused less often than a level may report in a second. None of its events is lost.
    """
    loud, quiet = make_level(100 * MIB), make_level(MIB)
    client, times, asked = make_client(quiet), scale(20_000, 1_000_000, 1_000_000), 15
    client(f"admit({2 * MIB})")
    list(events.read())
    before = fates(kernel)
    assert attack(loud, "flood", times) == times
    for _ in range(asked):
        client(f"admit({2 * MIB})")
    found = list(events.read())
    assert len([e for e in found if e.cgroup == quiet.cgroup and e.kind == abi.News.REFUSED]) == asked
    told = len([e for e in found if e.cgroup == loud.cgroup and e.kind == abi.News.REFUSED])
    sent, rate, full = (now - was for now, was in zip(fates(kernel), before, strict=True))
    assert (loud.usage().refused, full) == (times, 0)
    assert told + rate >= times
    assert sent >= told + asked


@pytest.mark.parametrize(("code", "holds"), [(201, 0), (0, 4096 * MIB)])
def test_an_unadmitted_call_that_does_not_fit_refuses_no_other_request(
    kernel, make_level, make_client, tmp_path, code, holds
):
    """A tenant may make any number of failing calls unadmitted. Only memory that the driver returns is charged."""
    group = make_level(1024 * MIB)
    one, other = make_client(make_level(512 * MIB, parent=group)), make_client(make_level(512 * MIB, parent=group))
    begun, over = tmp_path / "begun", tmp_path / "over"
    one(f"linger({str(begun)!r}, {str(over)!r})")
    one.send(f"alloc(0x1000, {4096 * MIB}, code={code})")
    wait_until(lambda: begun.exists() and (process := one.entry(kernel)) and process.flags & abi.Seen.CALL)
    assert other(f"admit({4 * MIB})") == abi.Verdict.ADMITTED
    over.touch()
    assert one.process.stdout.readline() == f"{code}\n"
    assert group.used == holds + 4 * MIB
    assert group.usage().peak == group.used


# -- T21: arbitrary calls ----------------------------------------------------------------------------------------------


def test_no_calls_make_the_ledger_less_than_the_driver_s_bytes(kernel, level, attack, scale):
    before = anomalies(kernel)
    assert attack(level, "noise", scale(20_000, 1_000_000, 10_000_000), seed=0xF69) == 0
    after = anomalies(kernel)
    assert {name for name in after if after[name] > before[name]} >= {"RELEASE", "DEVICE"}
    assert HELD <= level.used <= level.usage().limit


# -- T22: sizes -----------------------------------------------------------------------------------------------------


def test_no_impossible_size_is_admitted(level, attack, scale):
    times = scale(1000, 10_000, 100_000)
    assert attack(level, "sizes", times, seed=23) == 0
    assert (level.used, level.usage().refused) == (HELD, times)


@pytest.mark.parametrize(
    "call",
    [
        f"pitched(0x1000, {1 << 40}, {1 << 40}, {1 << 40})",
        f"pitched(0x1000, 1, {1 << 24}, {1 << 40})",  # the size that the driver calculates
        f"array(0x1000, {(1 << 64) - 1}, {(1 << 64) - 1}, 32, 4)",
    ],
)
def test_products_of_sizes_do_not_wrap_around(level, client, call):
    """The products are charged as more than any limit, so nothing more fits. All of it is released, to the byte."""
    client(f"alloc(0x2000, {MIB})")
    client(call)
    charged = level.used
    assert charged > level.usage().limit
    assert client(f"admit({MIB})") == abi.Verdict.REFUSED
    client.kill()
    assert_left(level, charged)


@pytest.mark.parametrize(
    "call",
    [
        f"pitched(0x1000, {(1 << 64) - 1}, {(1 << 64) - 1}, {(1 << 64) - 1})",
        f"array3d(0x1000, {1 << 33}, {1 << 33}, {1 << 33}, 32, 4)",
        f"array3d(0x1000, {(1 << 64) - 1}, {(1 << 64) - 1}, {(1 << 64) - 1}, 32, 4, levels=32)",
    ],
)
def test_impossible_sizes_are_not_charged(level, client, call):
    """No driver returns more than 2^48 bytes. The charge does not change."""
    client(f"alloc(0x2000, {MIB})")
    client(call)
    assert level.used == MIB
    assert client(f"admit({MIB})") == abi.Verdict.ADMITTED


# -- T6: a pid that is reused ------------------------------------------------------------------------------------------


def test_a_reused_pid_is_another_process(kernel, make_level, make_client, scale):
    """The kernel refuses changes for the earlier process, and does not charge the later one for its orphans."""
    gone, here = make_level(1024 * MIB), make_level(1024 * MIB)
    before, after = make_client(gone), make_client(here)
    wanted, done = scale(20, 1000, 10_000), 0
    for _ in range(10 * wanted):
        pid = before(f"spawn({3 * MIB})")
        entry = kernel.ledger.process(pid)
        assert (entry.bytes[0], entry.levels) == (3 * MIB, (gone.cgroup,))
        before("bury()")
        if after(f"spawn({5 * MIB}, {pid})") == pid:
            assert_own(kernel, pid, entry, gone, here)
            done += 1
        after("bury()")
        assert (gone.let_go(), here.let_go()) == (3 * MIB, 5 * MIB)
        assert (gone.used, here.used) == (0, 0)
        if done == wanted:
            return
    pytest.fail(f"only {done} of {wanted} pids were used again")


def assert_own(kernel, pid, entry, gone, here):
    """Check that changes for the earlier process do not affect the new one."""
    newcomer, ledger = kernel.ledger.process(pid), kernel.ledger
    assert newcomer.generation != entry.generation
    assert not ledger.overhead(pid, entry.generation, 0, 7 * MIB, entry.changes)
    assert not ledger.raise_overhead(pid, entry.generation, 0, 7 * MIB)
    assert not ledger.move(pid, entry.generation, (gone.cgroup,))
    assert not ledger.reap(pid, entry.generation)
    assert ledger.process(pid) == newcomer
    (orphan,) = gone.orphans()
    assert (orphan.tgid, orphan.generation, orphan.bytes) == (pid, entry.generation, 3 * MIB)
    assert (gone.held, here.used, here.orphaned) == (0, 5 * MIB, 0)
