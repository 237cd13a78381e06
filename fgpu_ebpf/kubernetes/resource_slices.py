"""The ResourceSlice of this node: the devices that Kubernetes' scheduler divides, and its publication.

This module runs in the asyncio loop of the DRA driver. A publication is repeated until the API server has accepted it,
and whenever another client has changed or removed the slice. kubelet removes all slices when kubelet starts, and the
slices of a driver that has not been registered for 30 s. Therefore the slice stays when the driver exits, and an
upgrade changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fgpu_ebpf.kubernetes.api_server import ApiError, ApiServer
from fgpu_ebpf.kubernetes.claims import COMPUTE, DRIVER, MEMORY, MIB, MOST_MIB, device_name
from fgpu_ebpf.kubernetes.slots import Host
from fgpu_ebpf.policy.rules import DeviceChoice

log = logging.getLogger("fgpu.kubelet")
SLICES = "/apis/resource.k8s.io/v1/resourceslices"
MINIMUM_MIB = 64  # a smaller share has no room for a context
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 30.0  # after a request that failed
_MOST_TEXT = 64  # characters of an attribute
_CONFLICT, _MISSING = 409, 404


@dataclass(frozen=True, slots=True)
class _Named:
    """The properties by which a device can be chosen."""

    index: int
    uuid_text: str
    name: str
    usable_bytes: int


def left_out(host: Host, facts: Mapping[str, Any], choices: Sequence[DeviceChoice] = ()) -> dict[str, str]:
    """Return why devices are not in the slice, by UUID. The arguments are the arguments of devices()."""
    found = {}
    for device in host.devices.values():
        named = _Named(device.index, device.uuid, str(facts["models"].get(device.uuid, "")), device.capacity_bytes)
        if choices and not any(choice.takes(named) for choice in choices):
            found[device.uuid] = "not named by --device"
        elif device.fault:
            found[device.uuid] = device.fault
        elif device.capacity_bytes < MINIMUM_MIB * MIB:
            found[device.uuid] = f"has less than {MINIMUM_MIB} MiB"
    return found


def devices(host: Host, facts: Mapping[str, Any], choices: Sequence[DeviceChoice] = ()) -> list[dict[str, Any]]:
    """Return the devices of the slice, which are the devices of which shares may be assigned now.

    Args:
        host: the agent's answer.
        facts: the answer's `facts`: the driver's version, the models of devices, and whether overcommit is allowed.
        choices: the only devices that may be in the slice; empty: all devices.
    """
    if host.fault:
        return []
    absent = left_out(host, facts, choices)
    return [
        {
            "name": device_name(device.uuid),
            "allowMultipleAllocations": True,
            "attributes": _texts(
                uuid=device.uuid,
                model=str(facts["models"].get(device.uuid, "")),
                driver=str(facts["driver"]),
                sharingMode="overcommit" if facts["overcommit"] else "reserved",
            ),
            "capacity": _capacity(device.capacity_bytes),
        }
        for device in host.devices.values()
        if device.uuid not in absent
    ]


def _texts(**attributes: str) -> dict[str, Any]:
    return {key: {"string": value[:_MOST_TEXT]} for key, value in attributes.items()}


def _capacity(usable_bytes: int) -> dict[str, Any]:
    """Return the capacities. A request without memory gets the whole device. A request without compute gets no ceiling.

    Kubernetes rounds a request up to a step in 64 bits, which overflow for a request such as 8Ei unless the step is 1.
    """
    whole = _mebibytes(min(usable_bytes // MIB, MOST_MIB))
    memory = {"min": _mebibytes(MINIMUM_MIB), "step": "1"}
    return {
        MEMORY: {"value": whole, "requestPolicy": {"default": whole, "validRange": memory}},
        COMPUTE: {"value": "100", "requestPolicy": {"default": "0", "validRange": {"min": "0", "step": "1"}}},
    }


def _mebibytes(size: int) -> str:
    """Return a quantity in the form that the API server returns."""
    return f"{size // 1024}Gi" if size % 1024 == 0 else f"{size}Mi"


class Publisher:
    """Publication of the wanted devices in this node's slice at the API server. Without devices, there is no slice."""

    def __init__(self, server: ApiServer, node: str) -> None:
        self.name = f"{node}-{DRIVER}"
        self._server, self._node = server, node
        self._path = f"{SLICES}/{self.name}"
        self._wanted: list[dict[str, Any]] | None = None
        self._changed = asyncio.Event()
        self._accepted: tuple[Any, Any] | None = None  # the devices last sent, and their form on the server
        self._said = ""

    def want(self, found: list[dict[str, Any]]) -> None:
        """Set the devices to publish."""
        if found != self._wanted:
            self._wanted = found
            self.look()

    def look(self) -> None:
        """Schedule a comparison of the slice with the wanted devices."""
        self._changed.set()

    async def run(self) -> None:
        """Keep the published ResourceSlice equal to the wanted devices, until the task is cancelled."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._publish()
                pause, self._said = FIRST_PAUSE_SECONDS, ""
            except ApiError as error:
                self._say(f"the ResourceSlice cannot be published: {error}")
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
                self.look()

    async def watch(self) -> None:
        """Compare the slice at each of its changes, until the task is cancelled."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                async for _ in self._server.watch(f"{SLICES}?fieldSelector=metadata.name%3D{self.name}"):
                    self.look()
                    pause = FIRST_PAUSE_SECONDS
            except ApiError as error:
                self._say(f"the ResourceSlice cannot be watched: {error}")
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            self.look()  # the slice may have changed between two watches

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            log.warning("%s", text)

    async def _publish(self) -> None:
        wanted = self._wanted
        if wanted is None:
            return
        now = await self._get()
        if not wanted:
            if now is not None:
                await self._unless(_MISSING, "DELETE", self._path)
                log.info("ResourceSlice %s: removed, no share of a device may be given now", self.name)
            return
        kept = now["spec"].get("devices") if now else None
        if kept == wanted or (kept and self._accepted == (wanted, kept)):
            return
        if now is None:
            answer = await self._unless(_CONFLICT, "POST", SLICES, await self._slice(wanted))
        else:
            pool = {**now["spec"]["pool"], "generation": now["spec"]["pool"]["generation"] + 1}
            spec = {**now["spec"], "devices": wanted, "pool": pool}
            answer = await self._unless(_CONFLICT, "PUT", self._path, {**now, "spec": spec})
        if answer is None:  # another client has written the slice meanwhile
            self.look()
            return
        self._accepted = wanted, answer["spec"].get("devices")
        log.info("ResourceSlice %s: published %d devices", self.name, len(wanted))
        if not all(device.get("allowMultipleAllocations") for device in answer["spec"]["devices"]):
            text = "each device is given to one claim as a whole: enable the feature gate DRAConsumableCapacity"
            log.warning("this cluster has no consumable capacity, so %s", text)

    async def _get(self) -> dict[str, Any] | None:
        return await self._unless(_MISSING, "GET", self._path)

    async def _unless(self, status: int, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
        """Return the answer to a request, or None if the server answers with the status `status`."""
        try:
            return await self._server.call(method, path, body)
        except ApiError as error:
            if error.status != status:
                raise
            return None

    async def _slice(self, wanted: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a new slice, which is removed with its node."""
        node = await self._server.call("GET", f"/api/v1/nodes/{self._node}")
        owner = {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": node["metadata"]["uid"]}
        return {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceSlice",
            "metadata": {"name": self.name, "ownerReferences": [{**owner, "controller": True}]},
            "spec": {
                "driver": DRIVER,
                "nodeName": self._node,
                "pool": {"name": self._node, "generation": 1, "resourceSliceCount": 1},
                "devices": wanted,
            },
        }
