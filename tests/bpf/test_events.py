"""Events that the kernel sends at once: refusals, bypasses, kills, orphans and moves, and its counts of lost events."""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import threading
import time

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.ledger import compute_maps
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.ledger.event_budgets import BUSY, EventBudgets, name_of
from fgpu_ebpf.linux import bpf, cgroup_namespace
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.workloads.bound_owner import Owner, Why
from tests.bpf.conftest import MIB, anomalies, wait_until
from tests.bpf.events_kit import News, fates, of, reasons

HOST_SECOND, HOST_COUNT = 2, 3  # as in events.bpf.h
VMM = abi.Kind.VMM


def test_the_first_call_of_a_process_is_reported_once(events, level, client):
    client(f"admit({MIB})")
    client(f"admit({MIB})")
    (event,) = of(events, level, News.PROCESS)
    assert event.tgid == client.pid


def test_only_one_of_many_simultaneous_new_processes_is_reported(kernel, events, level, make_client):
    before = fates(kernel)[abi.Fate.RATE]
    clients = [make_client(level) for _ in range(3)]
    wait_until(lambda: time.monotonic_ns() % (1 << 30) < 1 << 28)  # the kernel's second has just begun
    begun = time.monotonic_ns() >> 30
    for client in clients:
        client(f"admit({MIB})")
    seconds = (time.monotonic_ns() >> 30) - begun + 1  # 1, if all processes have a processor
    assert 1 <= len(of(events, level, News.PROCESS)) <= seconds
    assert fates(kernel)[abi.Fate.RATE] == before, "nor is anything lost"


def test_a_program_that_starts_in_a_managed_cgroup_is_reported(kernel, events, level, make_level, make_client):
    clients = [make_client(level), make_client(make_level(None))]
    (event,) = [e for e in events.read() if e.kind == News.EXECUTED and e.tgid in [c.pid for c in clients]]
    assert (event.tgid, event.cgroup) == (clients[0].pid, level.cgroup)
    clients[0].send("os.execv('/bin/sleep', ['sleep', '100'])")
    wait_until(lambda: any(e.tgid == clients[0].pid for e in of(events, level, News.EXECUTED)))


def test_at_most_four_started_programs_a_second_are_reported(kernel, events, level):
    before = fates(kernel)[abi.Fate.RATE]
    storm = f"echo $$ >{level.path}/cgroup.procs; i=0; while [ $i -lt 101 ]; do /bin/true; i=$((i + 1)); done"
    wait_until(lambda: time.monotonic_ns() % (1 << 30) < 1 << 28)  # the kernel's second has just begun
    begun = time.monotonic_ns() >> 30
    subprocess.run(["sh", "-c", storm], check=True)
    seconds = (time.monotonic_ns() >> 30) - begun + 1
    assert 4 <= len(of(events, level, News.EXECUTED)) <= 4 * seconds < 101
    assert fates(kernel)[abi.Fate.RATE] == before, "nor is anything lost"


def test_a_refusal_names_the_process_and_the_bytes(events, level, client):
    client(f"admit({2048 * MIB}, kind={int(VMM)})")
    (event,) = of(events, level)
    assert (event.kind, event.tgid, event.bytes, event.operation) == (News.REFUSED, client.pid, 2048 * MIB, VMM)
    assert event.reason == abi.Reason.LIMIT


def test_a_first_use_is_refused_uncounted_and_reported_until_the_agent_has_decided(kernel, events, level, client):
    level.limit(8 * MIB, uncommitted=True, devices=(0, 1))
    assert client(f"admit({MIB})") == abi.Verdict.REFUSED
    (event,) = of(events, level)
    assert (event.kind, event.tgid, event.bytes, event.device) == (News.FIRST_USE, client.pid, MIB, 0)
    assert (level.usage().limit, level.usage().used, level.usage().refused) == (8 * MIB, 0, 0)
    assert reasons(kernel, level) == {}
    assert client(f"admit({MIB}, device=1)") == abi.Verdict.ADMITTED
    level.limit(8 * MIB)
    assert client(f"admit({MIB})") == abi.Verdict.ADMITTED


def test_a_process_without_a_request_is_charged_before_the_agent_has_decided(events, level, client):
    level.limit(8 * MIB, abi.LimitFlag.KILL, uncommitted=True)
    client(f"alloc(0x1000, {MIB})")
    assert level.usage().used == MIB
    assert [event.kind for event in of(events, level)] == [News.BYPASS]


def test_a_request_below_an_uncommitted_group_is_refused_and_reported_for_the_group(
    events, level, make_level, make_client
):
    level.limit(8 * MIB, uncommitted=True)
    inside = make_client(make_level(4 * MIB, level))
    assert inside(f"admit({MIB})") == abi.Verdict.REFUSED
    (event,) = of(events, level)
    assert (event.kind, event.cgroup) == (News.FIRST_USE, level.cgroup)


def undecided(kernel, level, device):
    """Return how many requests of the level's programs met a limit that is not committed yet."""
    fd = kernel.ledger.page_fd(level.cgroup)
    try:
        with mmap.mmap(fd, abi.PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ) as page:
            return abi.UsagePage.from_buffer_copy(page).undecided[device]
    finally:
        os.close(fd)


def test_a_page_counts_requests_that_met_an_uncommitted_group(level, make_level, make_client, kernel):
    leaf = make_level(4 * MIB, level)
    inside = make_client(leaf)
    leaf.limit(4 * MIB, devices=(0, 1))
    level.limit(8 * MIB, uncommitted=True, devices=(0, 1))
    for device, verdict in ((0, abi.Verdict.REFUSED), (0, abi.Verdict.REFUSED), (1, abi.Verdict.ADMITTED)):
        assert inside(f"admit({MIB}, device={device})") == verdict
    assert [undecided(kernel, leaf, device) for device in (0, 1)] == [2, 0]
    level.limit(8 * MIB)
    assert inside(f"admit({5 * MIB})") == abi.Verdict.REFUSED
    assert undecided(kernel, leaf, 0) == 2, "this refusal is by the committed limit"


def test_a_would_be_refusal_of_observe_is_reported(events, level, client):
    level.limit(MIB, abi.LimitFlag.OBSERVE)
    client(f"admit({2 * MIB})")
    (event,) = of(events, level)
    assert (event.kind, event.reason) == (News.REFUSED, abi.Reason.OBSERVED)


def test_a_bypass_is_reported_once_a_process(kernel, events, level, client):
    client(f"alloc(0x1000, {MIB})")
    client(f"alloc(0x2000, {MIB})")
    (event,) = of(events, level)
    assert (event.kind, event.tgid, event.bytes) == (News.BYPASS, client.pid, MIB)
    assert anomalies(kernel)["BYPASS"] >= 2


def test_refusals_do_not_use_the_budget_of_bypasses(events, level, client):
    wait_until(lambda: time.monotonic_ns() % (1 << 30) < 1 << 28)  # the kernel's second has just begun
    for _ in range(101):
        client(f"admit({2048 * MIB})")
    client(f"alloc(0x1000, {MIB})")
    assert [event.tgid for event in of(events, level, News.BYPASS)] == [client.pid]


def test_an_unreported_bypass_is_reported_at_a_later_call(events, level, client):
    """More processes call at the same time than a level may report in a second."""
    twice = "(alloc(0x1000, 4096), time.sleep(2.2), alloc(0x2000, 4096), os._exit(0))"
    wait_until(lambda: time.monotonic_ns() % (1 << 30) < 1 << 28)  # the kernel's second has just begun
    children = client(f"[os.fork() or {twice} for _ in range(25)]")
    client(f"[os.waitpid(pid, 0) for pid in {children}]")
    told = [event.tgid for event in of(events, level, News.BYPASS)]
    assert sorted(told) == sorted(children)


def test_a_failed_call_names_no_process(kernel, events, level, client):
    before = anomalies(kernel)["BYPASS"]
    client(f"alloc(0x1000, {MIB}, code=3)")  # the call of a forked child, which has no context
    assert (level.used, of(events, level), anomalies(kernel)["BYPASS"]) == (0, [], before)
    assert not client.entry(kernel).flags & abi.Seen.BYPASS


# -- which level was out of memory


@pytest.mark.usefixtures("context_bytes")
@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("admit({n}); alloc(0x1000, {n}, code=2)", abi.Kind.MEMORY),
        ("admit({n}, kind=4); create(0x77, {n}, code=2)", VMM),
        ("admit(0, kind=2); retain(code=2)", abi.Kind.CONTEXT),
        (
            "admit(0, kind=2); retain(); admit({n}, kind=1); "
            f"shim.fgpu_release(0, u64({{n}}), {1 | abi.FULL}, u64(9)); primary_release()",
            abi.Kind.POOL,
        ),
    ],
)
def test_an_out_of_memory_of_the_driver_is_reported_as_the_device_s(kernel, events, level, client, call, kind):
    for line in call.format(n=4 * MIB).split("; "):
        client(line)
    assert level.used == 0
    assert reasons(kernel, level) == {(kind, abi.Reason.DEVICE_FULL): 1}
    (event,) = of(events, level)
    assert (event.kind, event.reason, event.operation) == (News.REFUSED, abi.Reason.DEVICE_FULL, kind)


def test_another_failure_is_not_out_of_memory(kernel, level, client):
    client(f"admit({4 * MIB})")
    client(f"alloc(0x1000, {4 * MIB}, code=1)")
    assert reasons(kernel, level) == {}


# -- onBypass: kill


def test_on_bypass_kill_ends_an_exceeding_process_before_the_driver_is_called(kernel, events, level, client):
    level.limit(100 * MIB, abi.LimitFlag.KILL)
    client(f"alloc(0x1000, {60 * MIB})")  # it fits: charged and named, nothing else
    assert level.used == 60 * MIB
    client.send(f"alloc(0x2000, {60 * MIB})")
    client.process.wait(30)
    assert client.process.returncode == -signal.SIGKILL
    assert [e.kind for e in of(events, level)] == [News.BYPASS, News.KILLED, News.ORPHANED]
    assert (level.orphaned, level.usage().refused, level.usage().peak) == (60 * MIB, 1, 60 * MIB)


def test_on_bypass_kill_never_ends_a_process_that_requests_admission(level, client):
    level.limit(100 * MIB, abi.LimitFlag.KILL)
    assert client(f"admit({200 * MIB})") == abi.Verdict.REFUSED
    assert client(f"admit({100 * MIB})") == abi.Verdict.ADMITTED
    client(f"alloc(0x1000, {100 * MIB})")
    assert level.used == 100 * MIB


def test_observe_kills_no_process(level, client):
    level.limit(MIB, abi.LimitFlag.KILL | abi.LimitFlag.OBSERVE)
    client(f"alloc(0x1000, {60 * MIB})")
    assert level.used == 60 * MIB


# -- cgroups


def test_the_creation_and_the_end_of_a_cgroup_are_reported(kernel, events, make_level, client):
    other = make_level(None)
    path = "/" + str(other.path.relative_to(kernel.root))
    for cgroup in (other.path, kernel.root):
        (cgroup / "cgroup.procs").write_text(str(client.pid))
    other.path.rmdir()
    told = [e.kind for e in events.read() if e.path == path]
    assert told == [News.MADE, News.MOVED, News.EMPTIED, News.REMOVED]


# -- floods


def test_a_level_sends_twenty_events_a_second_and_the_rest_is_counted(kernel, events, level, client):
    before, begun = fates(kernel), time.monotonic_ns() >> 30
    for _ in range(101):
        client(f"admit({2048 * MIB})")
    seconds = (time.monotonic_ns() >> 30) - begun + 1
    told = of(events, level, News.REFUSED)
    sent, rate, full = (now - was for now, was in zip(fates(kernel), before, strict=True))
    assert 19 <= len(told) <= 20 * max(4, seconds)
    assert full == 0
    assert sent >= len(told)
    assert rate + len(told) >= 101
    assert level.usage().refused == 101


def test_a_full_ring_counts_the_lost_events(kernel, events, make_level, client):
    one, two = make_level(MIB), make_level(MIB)
    list(events.read())
    before = fates(kernel)
    moves = 0
    while fates(kernel)[abi.Fate.FULL] == before[abi.Fate.FULL]:
        for level in (one, two):
            (level.path / "cgroup.procs").write_text(str(client.pid))
            moves += 1
        assert moves < 100_000
    told = [e for e in events.read() if e.path]
    sent, rate, full = (now - was for now, was in zip(fates(kernel), before, strict=True))
    assert len(told) <= sent, "the count includes events of other workloads"
    assert len(told) + rate + full >= moves
    (one.path / "cgroup.procs").write_text(str(client.pid))
    assert one.path.name in [os.path.basename(e.path) for e in events.read()]


@pytest.fixture
def budgets(kernel):
    """Return budgets of workloads, which are distinguished as if each belonged to a different user."""

    def owner(path):
        parts = path.split("/")
        return Owner(0, "/".join(parts[:2]), Why.USER)

    found = EventBudgets(kernel.ledger.event_budgets, owner)
    yield found
    EventBudgets(kernel.ledger.event_budgets, owner)  # removes all budgets


def flood(level, times):
    """Create and remove this many cgroups in a level. Each causes two events."""
    for _ in range(times):
        (level.path / "one").mkdir()
        (level.path / "one").rmdir()


def path_of(kernel, level):
    return "/" + str(level.path.relative_to(kernel.root))


def test_a_workload_sends_its_budget_of_events_and_leaves_the_rest_to_others(kernel, events, budgets, make_level):
    greedy, modest = make_level(None), make_level(None)
    budgets.note([path_of(kernel, greedy)] * BUSY)
    list(events.read())
    before, begun, told = fates(kernel), time.monotonic(), []
    while time.monotonic() - begun < 1.5:  # a second of the kernel's programs may begin at any time
        flood(greedy, 100)
        told += events.read()
    seconds = int(time.monotonic() - begun) + 2
    flood(modest, 20)
    told += events.read()
    of_greedy = [e for e in told if e.path.startswith(path_of(kernel, greedy) + "/")]
    of_modest = [e for e in told if e.path.startswith(path_of(kernel, modest) + "/")]
    assert 250 <= len(of_greedy) <= seconds * 250
    assert len(of_modest) == 40
    assert budgets.lost() == [path_of(kernel, greedy)]
    assert budgets.lost() == []
    assert fates(kernel)[abi.Fate.RATE] > before[abi.Fate.RATE]


def test_workloads_with_budgets_do_not_use_the_host_s_events(kernel, events, budgets, make_level):
    """3,000 events a second are sent for all workloads with budgets together, and 1,000 more for the rest."""
    greedy, modest = make_level(None), make_level(None)
    budgets.note([path_of(kernel, greedy)] * BUSY)

    def told_after(count, *floods):
        """Return the events and the losses of floods after `count` events, all in one second of the kernel."""
        while True:
            wait_until(lambda: time.monotonic_ns() % (1 << 30) < 1 << 28)
            list(events.read())
            budgets.lost()
            second = time.monotonic_ns() >> 30
            kernel.ledger._set_host(HOST_SECOND, second)
            kernel.ledger._set_host(HOST_COUNT, count)
            for level, times in floods:
                flood(level, times)
            if time.monotonic_ns() >> 30 == second:
                return list(events.read()), budgets.lost()

    told, lost = told_after(2990, (greedy, 100), (modest, 20))
    assert len([e for e in told if e.path.startswith(path_of(kernel, greedy) + "/")]) <= 10
    assert len([e for e in told if e.path.startswith(path_of(kernel, modest) + "/")]) == 40
    assert lost == [path_of(kernel, greedy)]
    told, lost = told_after(3990, (modest, 20))
    assert len([e for e in told if e.path.startswith(path_of(kernel, modest) + "/")]) <= 10
    assert lost == [""]


def test_cgroups_outside_the_agents_namespace_are_not_reported(kernel, events, budgets, make_level):
    level = make_level(None)
    fd, root = kernel.ledger._maps["event_budgets"], cgroup_namespace.root_path() + path_of(kernel, level)

    def told_with(root: str) -> bool:
        entry = abi.EventBudget(second=name_of(os.fsencode(root)))
        bpf.update(fd, abi.BUDGET_ROOT.to_bytes(8, "little"), bytes(entry))
        list(events.read())
        kernel.ledger._set_host(HOST_COUNT, 0)  # a test of floods may have used up this second
        inner = level.path / "inner"
        inner.mkdir()
        inner.rmdir()
        return path_of(kernel, level) + "/inner" in [event.path for event in events.read()]

    assert told_with(root)
    assert not told_with(root + "x")
    assert not told_with("/elsewhere")
    assert told_with(root)


# -- wake-ups


@pytest.fixture
def bell(kernel):
    reader = kernel.ledger.times.bell()
    list(reader.read())
    yield reader
    reader.close()


def is_rung(bell, seconds=0.0):
    return bool(select.select([bell], [], [], seconds)[0])


def test_a_reader_of_the_ring_buffer_is_woken_when_shares_change(kernel, bell, level):
    share = {level.cgroup: {0: Share()}}
    later = threading.Timer(0.1, kernel.ledger.times.set_shares, [share])
    later.start()
    assert is_rung(bell, 30.0)
    later.join()
    assert list(bell.read()) == []
    assert not is_rung(bell)
    kernel.ledger.times.set_shares(share)
    assert not is_rung(bell), "nothing has changed"
    kernel.ledger.times.forget([level.cgroup])
    assert is_rung(bell)


def test_an_unread_ring_buffer_delays_no_process(kernel, bell, level):
    for weight in range(1, 5000):  # more than the ring has room for
        kernel.ledger.times.set_shares({level.cgroup: {0: Share(weight=weight)}})
    assert kernel.ledger.times.shares()[level.cgroup, 0].weight == weight
    list(bell.read())
    kernel.ledger.times.forget([level.cgroup])
    assert is_rung(bell)


@pytest.mark.usefixtures("context_bytes")
@pytest.mark.parametrize("how", ["exit", "kill", "the leader first"])
def test_the_end_of_a_process_with_a_context_is_reported_at_once(bell, level, client, how):
    client("retain()")
    assert not is_rung(bell)
    before = time.monotonic_ns()
    if how == "exit":
        client.send("os._exit(0)")
    elif how == "kill":
        os.kill(client.pid, signal.SIGKILL)
    else:
        client.send("cuda.leave_leader()")
        assert not is_rung(bell, 0.2), "another thread of the process is alive"
        os.kill(client.pid, signal.SIGKILL)
    assert is_rung(bell, 30.0)
    (event,) = bell.read()
    assert (event.kind, event.tgid) == (News.ENDED, client.pid)
    assert before < event.at_ns < time.monotonic_ns()
    client.process.wait()
    assert not is_rung(bell, 0.1)


def test_the_end_of_a_process_without_a_context_is_not_reported(bell, level, client):
    client(f"create(7, {4 * MIB})")
    client.kill()
    for _ in range(1009):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    assert not is_rung(bell)


@pytest.mark.usefixtures("context_bytes")
def test_the_end_of_a_thread_and_of_an_executing_program_is_not_reported(kernel, bell, level, client):
    client("retain()")
    client("import threading")
    client(f"[t.start() or t.join() for t in [threading.Thread(target=lambda: admit({MIB}))]] and None")
    client.send("os.execv('/bin/sleep', ['sleep', '100'])")
    wait_until(lambda: client.entry(kernel) is None)
    client.kill()
    assert not is_rung(bell)


@pytest.mark.parametrize("devices", [1, compute_maps.FEW + 1])
def test_counters_are_read_for_levels_with_a_share(kernel, level, devices):
    times = kernel.ledger.times
    assert (times.turns(), list(times.shared())) == ({}, [])
    keys = {(level.cgroup, device) for device in range(devices)}
    times.set_shares({level.cgroup: {device: Share() for _, device in keys}})
    assert (times.turns(), set(times.shared())) == ({}, keys)
    counts = {key: TurnCounts(owned_ns=1009 + key[1], overruns=3) for key in keys}
    for key, count in counts.items():
        times.set_turns(*key, count)
    assert times.turns() == counts
    times.forget([level.cgroup])
    assert (times.turns(), list(times.shared())) == ({}, [])
    assert (times.take_ended(), times.take_ended()) == (counts, {})
    times.set_turns(level.cgroup, 0, TurnCounts(owned_ns=1))  # by a gatekeeper that has not read the shares yet
    assert kernel.ledger.times.turn(level.cgroup, 0) is None


def test_a_change_of_shares_is_reported_even_if_some_shares_find_no_room(kernel, level, bell, monkeypatch):
    times, update = kernel.ledger.times, compute_maps.bpf.update
    assert list(times.shared()) == []

    def full(fd, key, value):
        if key == compute_maps._KEY.pack(level.cgroup, 1):
            raise OSError(7, "no room")
        update(fd, key, value)

    monkeypatch.setattr(compute_maps.bpf, "update", full)
    with pytest.raises(OSError, match="no room"):
        times.set_shares({level.cgroup: {0: Share(), 1: Share()}})
    assert set(times.shared()) == {(level.cgroup, 0)}
    assert is_rung(bell)
    times.forget([level.cgroup])
    assert list(times.shared()) == []


HELLO = int(abi.Kind.HELLO) | abi.KNOCK
SECOND = 1.1  # until a budget that an earlier test has used is there again


def owned(kernel, owner, *levels):
    """Make a level the bound owner of levels, and return the owner's slot."""
    (slot,) = {kernel.ledger.owners.attach(level.cgroup, owner.cgroup, (1 << 30,) * 4, ()) for level in levels}
    return slot


@pytest.mark.parametrize("limit", [1024 * MIB, None], ids=["managed", "unmanaged"])
def test_knocks_are_reported_with_the_descriptor_and_each_second_only_the_first(
    kernel, bell, level, make_level, make_client, limit
):
    mine = make_level(limit)
    slot = owned(kernel, mine, mine) if limit else 0
    client = make_client(mine, page_of=level)
    time.sleep(SECOND)
    client(f"admit(0, {HELLO}, device=7)")
    assert is_rung(bell)
    (event,) = bell.read()
    assert (event.kind, event.tgid, event.device, event.bytes) == (News.KNOCK, client.pid, 7, slot)
    begun = time.monotonic()
    client(f"[admit(0, {HELLO}, device=7) for _ in range(10_000)] and None")
    seconds = time.monotonic() - begun
    assert 0 < len(list(bell.read())) <= 20 * (seconds + 2)


def test_knocks_of_other_workloads_do_not_delay_a_workload(kernel, bell, level, client, make_level, make_client):
    """The cgroups inside a workload have one budget together."""
    greedy = make_level(1024 * MIB)
    inside = [make_level(1024 * MIB, greedy) for _ in range(3)]
    owned(kernel, greedy, greedy, *inside)
    owned(kernel, level, level)
    crowd = [make_client(one, page_of=level) for one in (*inside, make_level(None))]
    time.sleep(SECOND)
    begun = time.monotonic()
    for one in crowd:
        one(f"[admit(0, {HELLO}, device=7) for _ in range(1000)] and None")
    seconds = time.monotonic() - begun
    assert 0 < len(list(bell.read())) <= 2 * 20 * (seconds + 2), "the greedy workload, and all without an owner"
    client(f"admit(0, {HELLO}, device=9)")
    assert [event.device for event in bell.read() if event.kind == News.KNOCK] == [9]
