"""The messages of the container runtime interface that fgpu sends and reads: names, field numbers and types.

The fields are the used fields of `runtime.v1` of https://github.com/kubernetes/cri-api (Apache License 2.0, the
Kubernetes Authors). protobuf skips all other fields. The module runs in an engine thread of the agent.
"""

from __future__ import annotations

from typing import Any

from fgpu_ebpf import protobuf
from fgpu_ebpf.protobuf import BOOL, INT32, INT64, MAP, STRING

PACKAGE = "runtime.v1"

# message -> field -> (number, type). A type is a scalar, a map of strings, a message, or [a message] if it is repeated.
MESSAGES: dict[str, dict[str, tuple[int, Any]]] = {
    "ContainerStatusRequest": {"container_id": (1, STRING)},
    "ContainerStatusResponse": {"status": (1, "ContainerStatus")},
    "ContainerStatus": {
        "id": (1, STRING),
        "metadata": (2, "ContainerMetadata"),
        "image": (8, "ImageSpec"),
        "image_ref": (9, STRING),
        "labels": (12, MAP),
        "annotations": (13, MAP),
    },
    "ContainerMetadata": {"name": (1, STRING)},
    "ImageSpec": {"image": (1, STRING), "user_specified_image": (18, STRING)},
    "ListPodSandboxRequest": {"filter": (1, "PodSandboxFilter")},
    "PodSandboxFilter": {"id": (1, STRING), "label_selector": (3, MAP)},
    "ListPodSandboxResponse": {"items": (1, ["PodSandbox"])},
    "PodSandbox": {
        "id": (1, STRING),
        "metadata": (2, "PodSandboxMetadata"),
        "state": (3, INT32),
        "created_at": (4, INT64),
        "labels": (5, MAP),
        "annotations": (6, MAP),
    },
    "PodSandboxMetadata": {"name": (1, STRING), "uid": (2, STRING), "namespace": (3, STRING)},
    "ImageStatusRequest": {"image": (1, "ImageSpec"), "verbose": (2, BOOL)},
    "ImageStatusResponse": {"info": (2, MAP)},
}


def classes() -> dict[str, Any]:
    """Return the class of each message, by name. Raise ImportError if protobuf is not installed."""
    return protobuf.classes(PACKAGE, MESSAGES)
