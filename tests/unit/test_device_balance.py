"""Orphans beside a model of a device: whatever happens there, and whenever NVML is asked, no more is let go than the
device has let go of; and in the end all of that.
"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
from device_model import MIB, NOT_A_PID, Action, Host, Live, Step
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fgpu_ebpf import device_sample
from fgpu_ebpf.device_balance import LOOKS, Balance

PIDS = 4
STRANGERS = 1 << 24
sizes = st.integers(1, 64).map(lambda n: n * 32 * MIB)
which = st.integers(0, 7)
seldom = st.integers(0, 3).map(lambda n: n == 0)


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sample, "APART_SECONDS", 0)


class Device(RuleBasedStateMachine):
    """`pending`: changes that have begun; each goes on at some time, or in the middle of a look."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host()
        self.reconciler = self.host.reconciler()
        self.pending: list[Action] = []

    def some(self, n: int) -> Live:
        live = sorted(self.host.live)
        return self.host.live[live[n % len(live)]]

    def do(self, action: Action, at_once: bool) -> None:
        """To its end, or up to some later time."""
        self.pending.append(list(action))
        if at_once:
            self.finish()

    def finish(self) -> None:
        for action in self.pending:
            for step in action:
                step()
        self.pending.clear()

    def next_steps(self, chosen: list[int]) -> Step:
        """These changes go on by a step each."""

        def go_on() -> None:
            for n in chosen:
                there = [action for action in self.pending if action]
                if there:
                    there[n % len(there)].pop(0)()

        return go_on

    # -- processes

    @precondition(lambda self: len(self.host.live) < PIDS)
    @rule(n=st.integers(0, PIDS - 1), has_context=st.sampled_from([True, True, False]))
    def start(self, n: int, has_context: bool) -> None:
        """Its pid may be that of one that has ended and is still there."""
        pid = NOT_A_PID + n
        if pid in self.host.live:
            return
        self.host.begin(pid)
        if has_context:
            self.do(self.host.make_context(self.host.live[pid]), True)

    @precondition(lambda self: self.host.live)
    @rule(n=which, what=st.sampled_from(["plain", "handles"]), size=sizes, stays=seldom)
    def take(self, n: int, what: str, size: int, stays: bool) -> None:
        live = self.some(n)
        if live.contexts or what == "handles":
            self.do(self.host.take(live, what, size), not stays)

    @precondition(lambda self: self.host.live)
    @rule(n=which, what=st.sampled_from(["plain", "handles"]), stays=seldom)
    def free(self, n: int, what: str, stays: bool) -> None:
        self.finish()
        if not self.host.live:
            return
        live = self.some(n)
        self.do(self.host.free(live, what, getattr(live, what)), not stays)

    @precondition(lambda self: self.host.live)
    @rule(n=which, kept=st.booleans())
    def end(self, n: int, kept: bool) -> None:
        """Something keeps what it had, or the driver lets go of it soon."""
        step, left = self.host.end(self.some(n))
        self.do([step] if kept else [step, *self.host.clean_up(left)], kept)

    @precondition(lambda self: self.host.ended)
    @rule(n=which)
    def close_keeper(self, n: int) -> None:
        self.finish()
        if self.host.ended:
            self.do(self.host.clean_up(self.host.ended[n % len(self.host.ended)]), True)

    # -- exports

    @precondition(lambda self: any(live.handles for live in self.host.live.values()))
    @rule(n=which, stays=seldom)
    def export_and_free(self, n: int, stays: bool) -> None:
        self.finish()
        having = [live for live in self.host.live.values() if live.handles]
        if having:
            live = having[n % len(having)]
            self.do(self.host.export_and_free(live, live.handles), not stays)

    @precondition(lambda self: self.host.exported)
    @rule(n=which, importer=which, to_importer=st.booleans())
    def close_export(self, n: int, importer: int, to_importer: bool) -> None:
        self.finish()
        if not self.host.exported:
            return
        bytes_ = self.host.exported[n % len(self.host.exported)]
        having = [live for live in self.host.live.values() if live.contexts]
        if to_importer and having:
            self.do(self.host.import_(having[importer % len(having)], bytes_), True)
        else:
            self.do(self.host.close_export(bytes_), True)

    @precondition(lambda self: any(live.imported for live in self.host.live.values()))
    @rule(n=which)
    def close_import(self, n: int) -> None:
        self.do(self.host.close_import(self.some(n)), True)

    # -- processes that are in no managed cgroup

    @rule(n=st.integers(0, 1), size=st.none() | sizes, stays=seldom)
    def change_stranger(self, n: int, size: int | None, stays: bool) -> None:
        """It comes, goes, or has another size from now on."""
        self.do(self.host.set_stranger(STRANGERS + n, size), not stays)

    # -- looks

    @rule(between=st.lists(st.lists(which, max_size=4), max_size=16))
    def look(self, between: list[list[int]]) -> None:
        """`between`: which changes go on after each question."""
        self.host.between = map(self.next_steps, between)
        self.reconciler.look(False)
        self.host.between = iter(())
        assert self.reconciler.truth.failure == ""

    @rule()
    def settle(self) -> None:
        """Nothing happens for some time."""
        self.finish()
        for _ in range(LOOKS + 2):
            self.reconciler.look(False)
        self.is_exact()

    def is_exact(self) -> None:
        assert self.host.orphaned() == self.host.held_by_none()
        assert self.host.charged() == self.host.held()

    @invariant()
    def no_less_is_charged_than_held(self) -> None:
        assert self.host.charged() >= self.host.held()


class Managed(Device):
    """With managed memory, of which NVML shows nothing: how much of it is on the device is estimated from below."""

    @precondition(lambda self: self.host.live)
    @rule(n=which, size=sizes, stays=seldom)
    def take_managed(self, n: int, size: int, stays: bool) -> None:
        live = self.some(n)
        if live.contexts:
            self.do(self.host.take(live, "managed", size), not stays)

    @precondition(lambda self: any(live.managed > live.resident for live in self.host.live.values()))
    @rule(n=which, size=sizes, stays=seldom)
    def touch(self, n: int, size: int, stays: bool) -> None:
        self.finish()
        live = self.some(n)
        self.do(self.host.touch(live, min(size, live.managed - live.resident)), not stays)

    @precondition(lambda self: any(live.managed for live in self.host.live.values()))
    @rule(n=which, stays=seldom)
    def free_managed(self, n: int, stays: bool) -> None:
        self.finish()
        live = self.some(n)
        self.do(self.host.free(live, "managed", live.managed), not stays)

    def is_exact(self) -> None:
        """But for managed memory that was touched while orphans might explain it."""
        unknown = self.host.resident_of_live() - self.balance().resident
        assert 0 <= self.host.orphaned() - self.host.held_by_none() <= max(0, unknown)

    def balance(self) -> Balance:
        return self.reconciler._releases[0].balance


def run(machine: Callable[[], RuleBasedStateMachine], examples: int) -> None:
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=60,
        deadline=None,
        phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(machine, settings=settings)


def test_orphans_are_what_the_device_holds_of_them(scale: Callable[[int, int, int], int]) -> None:
    run(Device, scale(30, int(__import__("os").environ.get("N","200")), 5000))


def test_managed_memory_lets_no_orphan_go_that_is_held(scale: Callable[[int, int, int], int]) -> None:
    run(Managed, scale(30, int(__import__("os").environ.get("N","200")), 5000))
