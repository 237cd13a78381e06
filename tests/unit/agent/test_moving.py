"""Tenants that can be moved to another device, and moves that are undone because the driver does not make them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.agent import moving
from fgpu_ebpf.agent.moving import MoveError
from fgpu_ebpf.agent.parked_tenant import Errand, Goal, Move, ParkedTenant, Phase
from fgpu_ebpf.driver.nvml import Device
from fgpu_ebpf.ledger.parked import Parked
from fgpu_ebpf.ledger.process_entry import Process

ZERO = (0,) * abi.DEVICES
HELD = 1 << 20
LIFE = (77, 5)


def row(**bytes_: int) -> tuple[int, ...]:
    return tuple(bytes_.get(f"gpu{device}", 0) for device in range(abi.DEVICES))


def process(*, bytes_: tuple[int, ...] = ZERO, parked: tuple[int, ...] = ZERO, cgroup: int = 9) -> Process:
    return Process(5, (cgroup,), abi.PARKED, 0, True, bytes_, ZERO, ZERO, ZERO, ZERO, parked=parked)


class Host:
    """Three devices, of which the last has another model, and a tenant on the first."""

    def __init__(self) -> None:
        names = ("H200", "H200", "A100")
        devices = [Device(i, bytes([i] * 16), name, "", 1 << 40, 1 << 40) for i, name in enumerate(names)]
        self.processes = {77: process(bytes_=row(gpu0=HELD))}
        self.exchanges: list[tuple[int, int]] = []
        self.results: list[int] = []
        self.there: dict[int, int] = {}
        self.shortage, self.full, self.limits, self.epochs = "", "", {0: 1 << 30, 1: 1 << 30, 2: 1 << 30}, 0
        self.undecided = {1}
        self.nvml = SimpleNamespace(
            devices=devices, driver_version="580.1", in_mig_mode=lambda device: device == 7, minor=lambda index: index,
            process_bytes=lambda _: self.there,
        )  # fmt: skip
        commitments = SimpleNamespace(
            unit=lambda tenant: tenant, undecided=lambda _: self.undecided, in_force=lambda _: self.limits,
            shortage_on=lambda *_: self.shortage, denied=lambda _: "the limit was denied",
        )  # fmt: skip
        parked = SimpleNamespace(exchange=self._exchange, entries=self._entries)
        ledger = SimpleNamespace(
            processes=lambda: self.processes, process=self.processes.get, parked=parked, usage=lambda _: [],
            new_epoch=self._new_epoch,
        )  # fmt: skip
        enforcer = SimpleNamespace(commitments=commitments, use_device=lambda *_: self.shortage)
        self.parkable: Any = SimpleNamespace(
            is_on=True, nvml=self.nvml, ledger=ledger, enforcer=enforcer, full_device=lambda _: self.full
        )
        self.tenant: Any = SimpleNamespace(name="alice", cgroup=9, limits=self.limits)
        self.at = 0

    def _exchange(self, life: object, one: int, other: int, force: bool = False) -> int:
        self.exchanges.append((one, other))
        if error := self.results.pop(0) if self.results else 0:
            return error
        self.at = other
        return 0

    def _entries(self) -> dict[tuple[int, int], Parked]:
        return {LIFE: Parked(0, 9, row(**{f"gpu{self.at}": HELD}))}

    def _new_epoch(self) -> None:
        self.epochs += 1

    def parked(self) -> tuple[ParkedTenant, Errand]:
        errand = Errand(1, Goal.MOVE, "alice", HELD)
        tenant = ParkedTenant(9, "alice", "/alice", {LIFE: 1}, Phase.WAITING, errands=[errand])
        tenant.move = Move(0, 1, [])
        return tenant, errand


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr("os.path.lexists", lambda _: True)
    return Host()


def refusal(host: Host, other: int = 1) -> str:
    with pytest.raises(MoveError) as raised:
        moving.plan(host.tenant, other, host.parkable)
    return str(raised.value)


def uuid(index: int) -> str:
    return "GPU-{0}-{1}-{1}-{1}-{2}".format(*(f"{index:02x}" * n for n in (4, 2, 6)))


def test_the_pairs_exchange_two_devices_and_name_all_others(host: Host) -> None:
    move = moving.plan(host.tenant, 1, host.parkable)
    assert (move.one, move.other) == (0, 1)
    assert move.pairs == [(uuid(0), uuid(1)), (uuid(1), uuid(0)), (uuid(2), uuid(2))]


def test_only_devices_with_nodes_are_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.lexists", lambda path: not path.endswith("nvidia2"))
    assert len(moving.plan(host.tenant, 1, host.parkable).pairs) == 2


def test_a_process_without_the_node_is_not_moved(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.lexists", lambda path: path == "/proc/77/root/dev/nvidia0")
    assert refusal(host).startswith("pid 77 has no /dev/nvidia1: ")


def test_processes_with_different_nodes_are_not_moved(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.processes[78] = process(bytes_=row(gpu0=HELD))
    monkeypatch.setattr("os.path.lexists", lambda path: path != "/proc/78/root/dev/nvidia2")
    assert refusal(host) == "its processes have different device nodes"


def change(name: str, value: Any) -> Callable[[Host], None]:
    return lambda host: setattr(host, name, value)


@pytest.mark.parametrize(
    ("other", "make", "why"),
    [
        (0, lambda _: None, "it is on gpu 0 already"),
        (2, lambda _: None, "only to a gpu of the same model: gpu 0 is H200, gpu 2 is A100"),
        (1, lambda host: host.processes.clear(), "no process of the tenant holds device memory"),
        (
            1,
            lambda host: host.processes.update({78: process(parked=row(gpu1=HELD))}),
            "it has memory on several gpus",
        ),
        (1, lambda host: host.limits.pop(1), "alice may not use gpu 1: its limit is for other devices"),
        (1, change("shortage", "the limit does not fit"), "the limit does not fit"),
        (1, lambda host: host.nvml.__dict__.update(driver_version="575.2"), "driver 575.2 restores no process"),
        (1, lambda host: host.nvml.__dict__.update(in_mig_mode=lambda _: True), "gpu 1 is in MIG mode"),
        (1, lambda host: setattr(host.parkable, "is_on", False), "parking is off"),
    ],
)
def test_a_move_is_refused_with_the_reason(host: Host, other: int, make: Callable[[Host], None], why: str) -> None:
    make(host)
    assert why in refusal(host, other)


def test_a_limit_that_was_denied_on_the_device_refuses_the_move(host: Host) -> None:
    host.undecided = set()
    host.parkable.enforcer.commitments.in_force = lambda _: {0: 1, 1: 0}
    assert refusal(host) == "the limit was denied"


def test_explain_names_each_other_device(host: Host) -> None:
    said = moving.explain(host.tenant, host.parkable)
    assert said.startswith("can be moved to gpu 1; cannot be moved to gpu 2: the driver restores a process only to")
    host.nvml.devices[1:] = []
    assert moving.explain(host.tenant, host.parkable) == ""


def test_the_ledger_moves_once_before_the_driver(host: Host) -> None:
    tenant, errand = host.parked()
    for _ in range(2):
        moving.enter(tenant, host.parkable, {})
    assert (host.exchanges, errand.is_done, tenant.move and tenant.move.is_entered) == ([(0, 1)], False, True)


@pytest.mark.parametrize(
    ("make", "why", "exchanges"),
    [
        (change("full", "gpu 1 has no room"), "gpu 1 has no room", []),
        (change("shortage", "it does not fit"), "it does not fit", []),
        (change("results", [errno.ENOSPC]), "its limit on gpu 1 has no room", [(0, 1)]),
    ],
)
def test_without_room_the_tenant_stays_where_it_was(
    host: Host, make: Callable[[Host], None], why: str, exchanges: list[tuple[int, int]]
) -> None:
    tenant, errand = host.parked()
    make(host)
    moving.enter(tenant, host.parkable, {})
    assert (tenant.move, errand.error, host.exchanges) == (None, f"alice cannot be moved: {why}", exchanges)


def test_a_move_that_the_driver_has_not_made_is_undone(host: Host) -> None:
    tenant, errand = host.parked()
    moving.enter(tenant, host.parkable, {})
    tenant.why = "cuCheckpointProcessRestore failed"
    moving.settle(tenant, host.parkable)
    assert (host.exchanges, tenant.move) == ([(0, 1), (1, 0)], None)
    assert errand.error == "alice cannot be moved: cuCheckpointProcessRestore failed"


def test_a_move_with_a_lost_result_is_found_by_nvml(host: Host) -> None:
    tenant, errand = host.parked()
    moving.enter(tenant, host.parkable, {})
    host.there = {77: HELD}
    moving.settle(tenant, host.parkable)
    assert (host.exchanges, host.epochs, errand.error) == ([(0, 1)], 1, "")
    assert tenant.move
    assert tenant.move.is_done
    moving.settle(tenant, host.parkable)
    assert host.epochs == 1


def test_a_tenant_that_is_not_moved_is_left_alone(host: Host, tmp_path: Path) -> None:
    tenant, _ = host.parked()
    tenant.move = None
    moving.enter(tenant, host.parkable, {})
    moving.settle(tenant, host.parkable)
    assert host.exchanges == []
