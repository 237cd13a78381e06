"""Classes of protobuf messages, made from a table at their first use.

The CRI client and the device plugin use this module. protobuf is imported by classes() only: most hosts do not need it.
Code made by protoc would tie fgpu to the versions of protobuf that still load it, from 3.21 in Debian 12 to today's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STRING, BOOL, INT64, INT32 = 9, 8, 3, 5  # numbers of FieldDescriptorProto; an enum is read as INT32
MAP = -1
_MESSAGE, _ONE, _REPEATED = 11, 1, 3

# message -> field -> number, type: a scalar, a map of strings, a message, or [one of these] where it is repeated
Table = Mapping[str, Mapping[str, tuple[int, Any]]]


def classes(package: str, table: Table) -> dict[str, Any]:
    """Return message name -> class. Raises ImportError: protobuf is not installed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"fgpu_{package}.proto", package=package, syntax="proto3")
    for name, fields in table.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _add_field(package, message, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{package}.{name}") for name in table}
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22
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
