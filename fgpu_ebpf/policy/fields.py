"""The types of the fields of configuration files: the permitted values of each field, and the checks of values.

The checks run in the thread that reads the file. A wrong value raises ValueError with the correct form in its text,
which pydantic converts into a ValidationError. The types also contain the patterns of the JSON Schema, which editors
use.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema

from fgpu_ebpf import abi
from fgpu_ebpf.policy.device_choice import device_choice
from fgpu_ebpf.policy.globs import name_globs, path_globs
from fgpu_ebpf.policy.rules import DeviceChoice
from fgpu_ebpf.policy.units import MILLION, Amount, amount, duration_ns, millionths, shown

MOST_METRIC_LABELS = 8
MOST_ITEMS = 64
# The labels that fgpu's metrics already have, and the labels that Prometheus adds.
RESERVED_LABELS = frozenset(
    (
        *("tenant", "kind", "policy", "namespace", "pod", "container", "cgroup_path", "gpu"),
        *("le", "quantile", "job", "instance"),
    )
)

_NAME = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
_METRIC_LABEL = r"[a-zA-Z_][a-zA-Z0-9_]{0,63}"
_MEMORY = r"^\s*[0-9]+(\.[0-9]+)?\s*(B|[KMGT]iB?)\s*$"
_PERCENT = r"^\s*[0-9]{1,3}(\.[0-9]{1,4})?\s*%\s*$"
_DURATION = r"^\s*[0-9]+(\.[0-9]+)?\s*(us|ms|s)\s*$"
_LONG = r"^\s*[0-9]+(\.[0-9]+)?\s*(s|m|min|h)\s*$"


class Model(BaseModel):
    """The base of all mappings in configuration files.

    Unknown keys are errors. Files have the field names in camelCase.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, alias_generator=to_camel)


class _OrOne:
    """The annotation of a list for which the JSON Schema also accepts a single item."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        return {"anyOf": [schema["items"], schema]}


def absent(description: str, *examples: Any) -> Any:
    """Return the field of an optional key. A key with an empty value is an error.

    Therefore the JSON Schema of the field has no null and no default.
    """
    shown = list(examples) or None
    return Field(default=None, description=description, examples=shown, json_schema_extra=_without_default)


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


# -- checks ------------------------------------------------------------------------------------------------------------


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _device_listed(value: Any) -> Any:
    return [value] if isinstance(value, (str, int)) else value


def _written(value: Any, example: str) -> str:
    """Return the text of a quantity. Raise ValueError if the value is neither text nor a number.

    YAML reads a quantity without a unit as a number. The function accepts the number, so that the parser of quantities
    can report the missing unit.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"is not a quantity: write it as {example}")
    return str(value)


def _amount(value: Any) -> Amount:
    return amount(_written(value, "8GiB or 50%"))


def _limit(value: Any) -> Amount:
    return Amount() if type(value) is int and not value else _amount(value)


def _size(value: Any) -> int:
    text = _written(value, "1GiB")
    found = amount(text)
    if not found.bytes:
        raise ValueError(f"{shown(text)} is a part of a device: write a size, such as 1GiB")
    return found.bytes


def _ceiling(value: Any) -> float:
    return millionths(_written(value, "50%")) / MILLION


def _duration(example: str, least: str, most: str) -> PlainValidator:
    """Return a validator of durations between two durations, which returns nanoseconds.

    `example`: for the error text.
    """
    bounds_ns = duration_ns(least), duration_ns(most)

    def validated(value: Any) -> int:
        text = _written(value, example)
        found_ns = duration_ns(text)
        if not bounds_ns[0] <= found_ns <= bounds_ns[1]:
            raise ValueError(f"{shown(text)} is not between {least} and {most}")
        return found_ns

    return PlainValidator(validated)


def _path_pattern(value: str) -> str:
    path_globs([value])
    return value


def _name_pattern(value: str) -> str:
    name_globs([value])
    return value


def _image_pattern(value: str) -> str:
    name_globs([value], forbidden="{}")  # permits [], because [::1]:5000/x is the name of an image
    return value


def _policy_name(value: str) -> str:
    if not re.fullmatch(_NAME, value):
        better = re.sub(r"[^a-z0-9.-]+", "-", value[:63].lower()).strip("-.")
        hint = f": did you mean {better!r}?" if better and len(value) < 64 else ""
        raise ValueError(f"{shown(value)} is not a name: use up to 63 lowercase letters, digits, '-' and '.'{hint}")
    return value


def _label_key(value: str) -> str:
    if not 0 < len(value) <= 256 or not value.isprintable() or " " in value:
        raise ValueError(f"{shown(value)} is not a label: use up to 256 characters, no spaces")
    return value


def _metric_label(value: str) -> str:
    if not re.fullmatch(_METRIC_LABEL, value):
        better = re.sub(r"\W", "_", value[:63], flags=re.A)
        raise ValueError(f"{shown(value)} is not a name of a Prometheus label: did you mean {better!r}?")
    if value.startswith("__") or value in RESERVED_LABELS:
        raise ValueError(f"{shown(value)} is a reserved label of metrics: choose another name")
    return value


def _unique(values: list[str]) -> list[str]:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{shown(twice)} is listed twice: keep one entry")
    return values


# -- types ---------------------------------------------------------------------------------------------------------

_TEXT, _WHOLE = {"type": "string"}, {"type": "integer"}
_QUANTITY = {"anyOf": [{**_TEXT, "pattern": _MEMORY}, {**_TEXT, "pattern": _PERCENT}]}
_DEVICE = {"anyOf": [{**_TEXT, "minLength": 1}, {**_WHOLE, "minimum": 0, "maximum": abi.DEVICES - 1}]}

Bytes = Annotated[Amount, PlainValidator(_amount), WithJsonSchema(_QUANTITY)]
Limit = Annotated[Amount, PlainValidator(_limit), WithJsonSchema({"anyOf": [*_QUANTITY["anyOf"], {"const": 0}]})]
Size = Annotated[int, PlainValidator(_size), WithJsonSchema({**_TEXT, "pattern": _MEMORY})]
Ceiling = Annotated[float, PlainValidator(_ceiling), WithJsonSchema({"type": "string", "pattern": _PERCENT})]
_SHORT_TEXT, _LONG_TEXT = (WithJsonSchema({**_TEXT, "pattern": pattern}) for pattern in (_DURATION, _LONG))
Quantum = Annotated[int, _duration("20ms", "1ms", "1s"), _SHORT_TEXT]
IdleTime = Annotated[int, _duration("10m", "10s", "720h"), _LONG_TEXT]  # a shorter time has more cost than benefit
WaitTime = Annotated[int, _duration("30s", "1s", "2m"), _LONG_TEXT]  # a program waits no longer in one call
PolicyName = Annotated[str, AfterValidator(_policy_name), Field(json_schema_extra={"pattern": f"^{_NAME}$"})]
LabelKey = Annotated[str, AfterValidator(_label_key)]
MetricLabel = Annotated[str, AfterValidator(_metric_label), Field(json_schema_extra={"pattern": f"^{_METRIC_LABEL}$"})]
MetricLabels = Annotated[list[MetricLabel], Field(max_length=MOST_METRIC_LABELS), AfterValidator(_unique)]
DeviceItem = Annotated[DeviceChoice, PlainValidator(device_choice), WithJsonSchema(_DEVICE)]

Several = Field(min_length=1, max_length=MOST_ITEMS)
Paths = Annotated[list[Annotated[str, AfterValidator(_path_pattern)]], Several, BeforeValidator(_listed), _OrOne()]
Names = Annotated[list[Annotated[str, AfterValidator(_name_pattern)]], Several, BeforeValidator(_listed), _OrOne()]
Images = Annotated[list[Annotated[str, AfterValidator(_image_pattern)]], Several, BeforeValidator(_listed), _OrOne()]
Devices = Annotated[list[DeviceItem], Several, BeforeValidator(_device_listed), _OrOne()]
