"""Moves a tenant to another GPU of the same model: the driver restores its parked processes there.

The ledger follows in one step before the driver does (`enter`), as for each wake-up. A move that fails is undone, and
the tenant wakes up where it was. Runs in the agent's main loop.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from fgpu_ebpf.agent.parkable import Parkable
from fgpu_ebpf.agent.parked_tenant import Goal, Move, ParkedTenant, full_level, needs_of
from fgpu_ebpf.driver.nvml import Device, Nvml
from fgpu_ebpf.driver.start_checks import AgentError
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.tenancy.tenant import Tenant

LEAST_DRIVER = 580
ANEW_SECONDS = 0.5  # in which every shim finds that it has to register again, and then asks which GPU it has


class MoveError(AgentError):
    """The tenant cannot be moved. The text has the reason."""


def plan(tenant: Tenant, other: int, parkable: Parkable) -> Move:
    """Return the move of a tenant to a device. Raises MoveError: it is not possible."""
    nvml, found = parkable.nvml, parkable.ledger.processes().items()
    processes = {pid: p for pid, p in found if p.levels[:1] == (tenant.cgroup,) and (any(p.bytes) or any(p.parked))}
    if not parkable.is_on or not nvml:
        raise MoveError("parking is off: set `parking: on` in agent.yaml")
    devices = {device.index: device for device in nvml.devices}
    version = nvml.driver_version.split(".")[0]
    if version.isdigit() and int(version) < LEAST_DRIVER:
        raise MoveError(f"driver {nvml.driver_version} restores no process to another gpu: use {LEAST_DRIVER} or later")
    one = _device_of(processes)
    if one == other:
        raise MoveError(f"it is on gpu {other} already")
    if devices[one].name != devices[other].name:
        models = f"gpu {one} is {devices[one].name}, gpu {other} is {devices[other].name}"
        raise MoveError(f"the driver restores a process only to a gpu of the same model: {models}")
    if nvml.in_mig_mode(other):
        raise MoveError(f"gpu {other} is in MIG mode")
    if why := _shortage(tenant, other, parkable):
        raise MoveError(why)
    return Move(one, other, _pairs(processes, devices[one], devices[other], nvml))


def _device_of(processes: Mapping[int, Process]) -> int:
    """Return the only device with memory of the processes. Raises MoveError."""
    rows = [row for process in processes.values() for row in (process.bytes, process.parked)]
    found = {device for row in rows for device, bytes_ in enumerate(row) if bytes_}
    if len(found) > 1:
        raise MoveError("it has memory on several gpus")
    if not found:
        raise MoveError("no process of the tenant holds device memory")
    return found.pop()


def _shortage(tenant: Tenant, other: int, parkable: Parkable) -> str:
    """Return why a device is not for this tenant, or why its limit does not fit there; empty: it fits."""
    commitments = parkable.enforcer.commitments
    unit = commitments.unit(tenant)
    if not tenant.limits.get(other):
        return f"{tenant.name} may not use gpu {other}: its limit is for other devices"
    if unit is None:
        return ""
    if other in commitments.undecided(unit):
        return commitments.shortage_on(unit, other)
    return "" if commitments.in_force(unit).get(other) else commitments.denied(unit)


def _pairs(processes: Mapping[int, Process], one: Device, other: Device, nvml: Nvml) -> list[tuple[str, str]]:
    """Exchange two devices of those that all processes can use, also by nodes that their programs do not use."""
    seen = [_visible(pid, nvml) for pid in processes]
    for pid, visible in zip(processes, seen, strict=True):
        if other not in visible:
            node = f"/dev/nvidia{nvml.minor(other.index)}"
            raise MoveError(f"pid {pid} has no {node}: start it with `fgpu run`, or with the device in its container")
        if visible != seen[0]:
            raise MoveError("its processes have different device nodes")
    exchanged = {one: other, other: one}
    return [(device.uuid_text, exchanged.get(device, device).uuid_text) for device in seen[0]]


def _visible(pid: int, nvml: Nvml) -> list[Device]:
    """Return the devices with a node in a process's /dev; all devices if there are no nodes of single devices."""
    nodes = {device.index: f"/proc/{pid}/root/dev/nvidia{nvml.minor(device.index)}" for device in nvml.devices}
    return [d for d in nvml.devices if os.path.lexists(nodes[d.index])] or list(nvml.devices)


def enter(parked: ParkedTenant, parkable: Parkable, coming: Mapping[int, int]) -> None:
    """Let a parked tenant that shall be moved have its memory on the other device in the ledger, if it fits there.

    If not, the tenant is not moved any more, and its request has the reason. `coming`: bytes that others may take.
    """
    move, ledger, enforcer = parked.move, parkable.ledger, parkable.enforcer
    if move is None or move.is_entered:
        return
    needed = {move.other: needs_of(parked, ledger)[move.one] + coming.get(move.other, 0)}
    why = parkable.full_device(needed) or enforcer.use_device(parked.cgroup, move.other)
    for life in parked.members if not why else ():
        if error := ledger.parked.exchange(life, move.one, move.other):
            why = f"its limit on gpu {move.other} has no room" if error == errno.ENOSPC else os.strerror(error)
    move.is_entered = True
    if why := why or full_level(parked, ledger, enforcer):
        _undo(parked, parkable, why)


def settle(parked: ParkedTenant, parkable: Parkable) -> None:
    """Undo a move that the driver has not made, before its states of the processes are acted on."""
    move = parked.move
    if move is None or not move.is_entered or move.is_done:
        return
    there = (parkable.nvml and parkable.nvml.process_bytes(move.other)) or {}
    if any(pid in there for pid, _ in parked.members):  # it has made it, and the result was lost
        finish(parked, parkable)
    else:
        _undo(parked, parkable, parked.why)


def finish(parked: ParkedTenant, parkable: Parkable) -> None:
    """Record that the driver has moved the tenant. Its programs have to find out which device they have now."""
    if parked.move:
        parked.move.is_done = True
        parkable.ledger.new_epoch()


def _undo(parked: ParkedTenant, parkable: Parkable, why: str) -> None:
    if parked.move:
        for life, entry in parkable.ledger.parked.entries().items():
            process = parkable.ledger.process(life[0])
            held = entry.bytes[parked.move.other] + (process.bytes[parked.move.other] if process else 0)
            if life in parked.members and held:
                parkable.ledger.parked.exchange(life, parked.move.other, parked.move.one, force=True)
        parked.move = None
    parked.finish(Goal.MOVE, f"{parked.name} cannot be moved: {why}")


def explain(tenant: Tenant, parkable: Parkable) -> str:
    """Return where a tenant with memory can be moved, or why it cannot, as text; empty: there is one device."""
    said = []
    for device in parkable.nvml.devices if parkable.nvml and len(parkable.nvml.devices) > 1 else ():
        try:
            plan(tenant, device.index, parkable)
            said.append(f"can be moved to gpu {device.index}")
        except MoveError as error:
            if "already" not in str(error):
                said.append(f"cannot be moved to gpu {device.index}: {error}")
    return "; ".join(said)
