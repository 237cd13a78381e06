"""A checkpointed process is restored to another simulated device of the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from subprocess import Popen

import pytest

from tests.sim.checkpoint_kit import (
    CALLER,
    CHECKPOINTED,
    DATA,
    INVALID_VALUE,
    OUT_OF_MEMORY,
    SERVES,
    ask,
    calling,
    serving,
)

from .conftest import MIB, Machine

FUNCTIONS = CALLER.replace(SERVES, "").replace('need("cuInit", 0)', "")
HOLDS = DATA + FUNCTIONS + "start(); p = alloc(100 << 20); write(p, 1 << 20)"
PCI = "[L.cuDeviceGetPCIBusId(b := C.create_string_buffer(16), 16, 0), b.value]"


@pytest.fixture
def machine(make_machine: Callable[..., Machine]) -> Machine:
    return make_machine(FGPU_SIM_GPUS="2")


@pytest.fixture
def caller(machine: Machine) -> Iterator[Popen[str]]:
    with calling(machine) as program:
        yield program


@pytest.fixture
def target(machine: Machine) -> Iterator[Popen[str]]:
    with serving(machine, HOLDS) as program:
        yield program


def held(machine: Machine, pid: int) -> list[int]:
    """Return the bytes of a process on each device."""
    rows = {row["device"]: row for row in machine.dump()["processes"] if row["pid"] == pid}
    return [rows[device]["bytes"] if device in rows else 0 for device in range(2)]


def test_a_process_goes_on_on_the_other_device_and_comes_back(
    machine: Machine, caller: Popen[str], target: Popen[str]
) -> None:
    """The ordinals stay. They have the UUIDs of the other devices, and the PCI addresses of their own (driver 580)."""
    before, used = held(machine, target.pid), (machine.used(0), machine.used(1))
    uuids, pci = ask(target, "[uuid(0), uuid(1)]"), ask(target, PCI)
    for here, there in ((0, 1), (1, 0)):
        assert ask(caller, f"park({target.pid}), move({target.pid}, (0, 1), (1, 0)), unlock({target.pid})") == (
            "((0, 0), 0, 0)"
        )
        assert held(machine, target.pid)[there] == before[0]
        assert held(machine, target.pid)[here] == 0
        assert ask(target, "is_intact(p, 1 << 20)") == "True"
        assert ask(target, f"[uuid({there}), uuid({here})]") == uuids
        assert ask(target, PCI) == pci
        assert ask(target, "(q := alloc(64 << 20)).value > 0") == "True"
        assert held(machine, target.pid)[there] == before[0] + 64 * MIB
        assert ask(target, "need('cuMemFree_v2', q)") == "None"
    assert (machine.used(0), machine.used(1)) == used
    assert ask(target, "launch(kernel('f')[1]), L.cuCtxSynchronize()") == "(0, 0)"


def test_a_process_that_was_moved_is_parked_and_woken_where_it_is(
    machine: Machine, caller: Popen[str], target: Popen[str]
) -> None:
    before = held(machine, target.pid)
    assert ask(caller, f"park({target.pid}), move({target.pid}, (0, 1), (1, 0)), unlock({target.pid})")
    assert ask(caller, f"park({target.pid}), wake({target.pid})") == "((0, 0), (0, 0))"
    assert held(machine, target.pid) == before[::-1]
    assert ask(target, "is_intact(p, 1 << 20)") == "True"


@pytest.mark.parametrize("pairs", ["(0, 1)", "(0, 1), (1, 1)", "(0, 0), (0, 1)", "(0, 1), (1, 0), (0, 1)"])
def test_the_pairs_name_each_device_once(caller: Popen[str], target: Popen[str], pairs: str) -> None:
    """Measured with driver 580, also for a process with CUDA_VISIBLE_DEVICES=0."""
    assert ask(caller, f"park({target.pid}), move({target.pid}, {pairs})") == f"((0, 0), {INVALID_VALUE})"
    assert ask(caller, f"state({target.pid}), wake({target.pid})") == f"({CHECKPOINTED}, (0, 0))"
    assert ask(target, "is_intact(p, 1 << 20)") == "True"


def test_a_device_with_an_unknown_uuid_is_refused(caller: Popen[str], target: Popen[str]) -> None:
    unknown = "(C.c_uint64 * 8)(C.addressof(raw := C.create_string_buffer(64)), 2)"
    line = f"park({target.pid}), L.cuCheckpointProcessRestore({target.pid}, {unknown})"
    assert ask(caller, line) == f"((0, 0), {INVALID_VALUE})"
    assert ask(caller, f"wake({target.pid})") == "(0, 0)"


def test_a_process_without_room_there_stays_parked(machine: Machine, caller: Popen[str], target: Popen[str]) -> None:
    before = held(machine, target.pid)
    with serving(machine, "start(1); q = alloc(info()[0] - (64 << 20))"):
        used = machine.used(1)
        assert ask(caller, f"park({target.pid}), move({target.pid}, (0, 1), (1, 0))") == f"((0, 0), {OUT_OF_MEMORY})"
        assert machine.used(1) == used
        assert ask(caller, f"wake({target.pid})") == "(0, 0)"
        assert held(machine, target.pid) == before
    assert ask(target, "is_intact(p, 1 << 20)") == "True"
