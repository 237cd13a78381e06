"""Create the classes of protobuf messages from tables of the messages' fields.

This module runs in the agent (messages of the CRI) and in the device plugin. Only classes() imports protobuf, because
most hosts do not need protobuf. fgpu contains no code that protoc has generated. Generated code works only with some
versions of protobuf, and fgpu supports all versions since 3.21 (Debian 12).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

STRING, BOOL, INT64, INT32 = 9, 8, 3, 5  # numbers of FieldDescriptorProto; an enum is read as INT32
MAP = -1
_MESSAGE, _ONE, _REPEATED = 11, 1, 3

# message -> field -> (number, type). The type is a scalar, MAP (of strings) or the name of a message. The type of a
# repeated field is a list of one type.
Table = Mapping[str, Mapping[str, tuple[int, Any]]]


def lacks(error: ImportError) -> str:
    """Return which package is missing for this error, and how to install the packages for this installation of fgpu."""
    fix = "install python3-grpcio and python3-protobuf"
    if sys.prefix != sys.base_prefix:  # a virtual environment does not have the packages of the system
        fix = f"run `pipx inject fgpu-ebpf grpcio protobuf`, or install both packages into {sys.prefix}"
    return f"{error.name} is not installed: {fix}"


def classes(package: str, table: Table) -> dict[str, Any]:
    """Return the class of each message by the message's name. Raise ImportError if protobuf is not installed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"fgpu_{package}.proto", package=package, syntax="proto3")
    for name, fields in table.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _add_field(package, message, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{package}.{name}") for name in table}
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22 or later
        return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}
    factory = message_factory.MessageFactory(pool)
    return {name: factory.GetPrototype(descriptor) for name, descriptor in found.items()}


def _add_field(package: str, message: Any, name: str, number: int, kind: Any) -> None:
    repeated = kind is MAP or isinstance(kind, list)
    field = message.field.add(name=name, number=number, label=_REPEATED if repeated else _ONE)
    one = kind[0] if isinstance(kind, list) else kind
    if kind is MAP:
        entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_ONE, type=STRING)
        entry.field.add(name="value", number=2, label=_ONE, type=STRING)
        field.type, field.type_name = _MESSAGE, f".{package}.{message.name}.{entry.name}"
    elif isinstance(one, int):
        field.type = one
    else:
        field.type, field.type_name = _MESSAGE, f".{package}.{one}"
