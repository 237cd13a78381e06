"""The messages between kubelet and a DRA driver: names, field numbers and types.

The sources are pkg/apis/dra/v1/api.proto and pkg/apis/pluginregistration/v1/api.proto of
https://github.com/kubernetes/kubelet (Apache License 2.0, the Kubernetes Authors). The module `protobuf` creates the
classes. A map of messages is a repeated message with a key and a value, which has the same encoding. This module runs
in the asyncio loop of the DRA driver.
"""

from __future__ import annotations

from typing import Any

from fgpu_ebpf import protobuf
from fgpu_ebpf.protobuf import BOOL, STRING, Table

DRA_PACKAGE, REGISTRATION_PACKAGE = "k8s.io.kubelet.pkg.apis.dra.v1", "pluginregistration"
DRA_SERVICE, REGISTRATION_SERVICE = f"{DRA_PACKAGE}.DRAPlugin", f"{REGISTRATION_PACKAGE}.Registration"
HEALTH_SERVICE = "v1alpha1.DRAResourceHealth"  # messages of this service are not used
TYPE, VERSION = "DRAPlugin", "v1.DRAPlugin"  # of the registration

# message -> field -> number and type, as in `protobuf`
DRA: Table = {
    "Claim": {"namespace": (1, STRING), "uid": (2, STRING), "name": (3, STRING)},
    "NodePrepareResourcesRequest": {"claims": (1, ["Claim"])},
    "NodePrepareResourcesResponse": {"claims": (1, ["Prepared"])},
    "Prepared": {"key": (1, STRING), "value": (2, "NodePrepareResourceResponse")},
    "NodePrepareResourceResponse": {"devices": (1, ["Device"]), "error": (2, STRING)},
    "Device": {
        "request_names": (1, [STRING]),
        "pool_name": (2, STRING),
        "device_name": (3, STRING),
        "cdi_device_ids": (4, [STRING]),
    },
    "NodeUnprepareResourcesRequest": {"claims": (1, ["Claim"])},
    "NodeUnprepareResourcesResponse": {"claims": (1, ["Unprepared"])},
    "Unprepared": {"key": (1, STRING), "value": (2, "NodeUnprepareResourceResponse")},
    "NodeUnprepareResourceResponse": {"error": (1, STRING)},
}
REGISTRATION: Table = {
    "InfoRequest": {},
    "PluginInfo": {
        "type": (1, STRING),
        "name": (2, STRING),
        "endpoint": (3, STRING),
        "supported_versions": (4, [STRING]),
    },
    "RegistrationStatus": {"plugin_registered": (1, BOOL), "error": (2, STRING)},
    "RegistrationStatusResponse": {},
}


def classes() -> dict[str, Any]:
    """Return the class of each message by its name. Raise ImportError if protobuf is not installed."""
    return protobuf.classes(DRA_PACKAGE, DRA) | protobuf.classes(REGISTRATION_PACKAGE, REGISTRATION)
