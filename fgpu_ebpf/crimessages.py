"""The messages of the container runtime interface that fgpu sends and reads: names, field numbers and types.

From `runtime.v1` of https://github.com/kubernetes/cri-api (Apache License 2.0, the Kubernetes Authors), those fields
alone that are used; protobuf skips the others. The classes are made from this table when they are first wanted: code
made by protoc would tie fgpu to the versions of protobuf that still load it, from 3.21 in Debian 12 to today's.
"""

from __future__ import annotations

from typing import Any

PACKAGE = "runtime.v1"
STRING, BOOL, INT64, INT32 = 9, 8, 3, 5  # as FieldDescriptorProto has them; an enum is read as INT32
MAP = -1

# message -> field -> number, type: a scalar, a map of strings, a message, or [a message] where it is repeated
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
    """Message name -> class. ImportError: protobuf is not installed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="fgpu_cri.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _add_field(message, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{PACKAGE}.{name}") for name in MESSAGES}
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22
        return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}
    factory = message_factory.MessageFactory(pool)
    return {name: factory.GetPrototype(descriptor) for name, descriptor in found.items()}


def _add_field(message: Any, name: str, number: int, kind: Any) -> None:
    repeated = kind is MAP or isinstance(kind, list)
    field = message.field.add(name=name, number=number, label=3 if repeated else 1)
    if kind is MAP:
        entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=1, type=STRING)
        entry.field.add(name="value", number=2, label=1, type=STRING)
        field.type, field.type_name = 11, f".{PACKAGE}.{message.name}.{entry.name}"
    elif isinstance(kind, int):
        field.type = kind
    else:
        field.type, field.type_name = 11, f".{PACKAGE}.{kind[0] if repeated else kind}"
