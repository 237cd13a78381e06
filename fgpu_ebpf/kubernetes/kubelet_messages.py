"""The messages between kubelet and a device plugin: names, field numbers and types.

The source is pkg/apis/deviceplugin/v1beta1/api.proto of https://github.com/kubernetes/kubelet (Apache License 2.0, the
Kubernetes Authors). The tables lack fields that fgpu does not use; protobuf skips these fields. The module `protobuf`
creates the classes. This module runs in the asyncio loop of the device plugin.
"""

from __future__ import annotations

from typing import Any

from fgpu_ebpf import protobuf
from fgpu_ebpf.protobuf import BOOL, INT32, INT64, MAP, STRING

PACKAGE = "v1beta1"
HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"

# message -> field -> number and type, as in `protobuf`
MESSAGES: dict[str, dict[str, tuple[int, Any]]] = {
    "Empty": {},
    "DevicePluginOptions": {"get_preferred_allocation_available": (2, BOOL)},
    "RegisterRequest": {
        "version": (1, STRING),
        "endpoint": (2, STRING),
        "resource_name": (3, STRING),
        "options": (4, "DevicePluginOptions"),
    },
    "ListAndWatchResponse": {"devices": (1, ["Device"])},
    "Device": {"ID": (1, STRING), "health": (2, STRING), "topology": (3, "TopologyInfo")},
    "TopologyInfo": {"nodes": (1, ["NUMANode"])},
    "NUMANode": {"ID": (1, INT64)},
    "PreferredAllocationRequest": {"container_requests": (1, ["ContainerPreferredAllocationRequest"])},
    "ContainerPreferredAllocationRequest": {
        "available_deviceIDs": (1, [STRING]),
        "must_include_deviceIDs": (2, [STRING]),
        "allocation_size": (3, INT32),
    },
    "PreferredAllocationResponse": {"container_responses": (1, ["ContainerPreferredAllocationResponse"])},
    "ContainerPreferredAllocationResponse": {"deviceIDs": (1, [STRING])},
    "AllocateRequest": {"container_requests": (1, ["ContainerAllocateRequest"])},
    "ContainerAllocateRequest": {"devices_ids": (1, [STRING])},
    "AllocateResponse": {"container_responses": (1, ["ContainerAllocateResponse"])},
    "ContainerAllocateResponse": {
        "envs": (1, MAP),
        "mounts": (2, ["Mount"]),
        "devices": (3, ["DeviceSpec"]),
        "annotations": (4, MAP),
        "cdi_devices": (5, ["CDIDevice"]),
    },
    "Mount": {"container_path": (1, STRING), "host_path": (2, STRING), "read_only": (3, BOOL)},
    "DeviceSpec": {"container_path": (1, STRING), "host_path": (2, STRING), "permissions": (3, STRING)},
    "CDIDevice": {"name": (1, STRING)},
    "PreStartContainerRequest": {"devices_ids": (1, [STRING])},
    "PreStartContainerResponse": {},
}


def classes() -> dict[str, Any]:
    """Return the class of each message by its name. Raise ImportError if protobuf is not installed."""
    return protobuf.classes(PACKAGE, MESSAGES)
