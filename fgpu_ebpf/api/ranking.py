"""The table of tenants, with a row for each tenant and device: columns, filter and order.

This module runs in `fgpu top`, and in the agent's threads for the web page. The input is a Snapshot's JSON, and the
module does no I/O. A Column defines a value, the text of the value and the order. A number that was not measured is
shown as `-`, and is at the end of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.policy.units import memory_text
from fgpu_ebpf.tenancy import parking_text
from fgpu_ebpf.tenancy.enforcement import UNHELD

Value = float | str | None
_FULL_RATIO = 0.95


class Row(NamedTuple):
    """A tenant on one device. The tenant and the device are as in the Snapshot's JSON."""

    tenant: Mapping[str, Any]
    device: Mapping[str, Any]


class Column(NamedTuple):
    """A column of the table of tenants.

    `name`: the heading. `cells`: the minimum width in characters. `falls`: the order is descending.
    """

    name: str
    cells: int
    value: Callable[[Row], Value]
    text: Callable[[Row], str]
    falls: bool = True

    @property
    def word(self) -> str:
        """The word that selects the column on the command line."""
        return self.name.split()[0].lower()


def _measured(
    name: str, cells: int, value: Callable[[Row], Any], text: Callable[[Any], str], falls: bool = True
) -> Column:
    def shown(row: Row) -> str:
        found = value(row)
        return "-" if found is None else text(found)

    return Column(name, cells, value, shown, falls)


def _memory(name: str, field: str) -> Column:
    return _measured(name, 7, lambda row: row.device[field], memory_text)


def limit_bytes(row: Row) -> int | None:
    """Return the tenant's limit on the device in bytes, or None if there is no limit."""
    return abi.limit(row.device["limit_bytes"])


def _part(field: str) -> Callable[[Row], float | None]:
    """Return a function that returns a field of a row, which is a ratio of the device's time in the last half second.

    The ratio is None if the tenant is not gated, or is alone on the device.
    """

    def of(row: Row) -> float | None:
        compute = row.device["compute"]
        return compute[field] if compute and not compute["free"] else None

    return of


def _entitled(row: Row) -> float | None:
    """Return the part of the device's time due to the tenant, or None.

    The result is None if the tenant is not gated, is alone on the device, or has no program that uses the device.
    """
    return _part("entitled_ratio")(row) or None


def _share_text(row: Row) -> str:
    had, compute = _part("had_ratio")(row), row.device["compute"]
    free = "concurrent" if compute and compute.get("is_concurrent") else "alone"
    return f"{had:.1%}" if had is not None else free if compute else "-"


def _waited(row: Row) -> float | None:
    compute = row.device["compute"]
    return compute["wait_seconds"] if compute else None


def _name(row: Row) -> str:
    name: str = row.tenant["tenant"]
    parking = row.tenant.get("parking")  # an agent of an older version does not report parking
    if parking and parking_text.is_away(parking):
        return f"{name} ({parking['state']})"
    return f"{name} (group)" if row.tenant["kind"] == "group" else name


TENANT = Column("TENANT", 12, lambda row: str(row.tenant["tenant"]), _name, falls=False)
GPU = _measured("GPU", 3, lambda row: row.device["gpu"], str, falls=False)
COLUMNS = (
    TENANT,
    GPU,
    _measured("LIMIT", 7, limit_bytes, memory_text),
    _memory("USED", "used_bytes"),
    _memory("PEAK", "peak_bytes"),
    Column("SHARE", 6, _part("had_ratio"), _share_text),
    _measured("ENTITLED", 8, _entitled, "{:.1%}".format),
    _measured("WAITED", 6, _waited, "{:.1f}s".format),
    _measured("REFUSED", 7, lambda row: row.device["refused"], str),
    _measured("HELD BY", 7, lambda row: row.tenant["enforcement"], str, falls=False),
)
BY_WORD = {column.word: column for column in COLUMNS}
_KEYS = {"held": "b"}  # h shows the keys; the key of every other column is the column's first letter
BY_KEY = {_KEYS.get(word, word[0]): column for word, column in BY_WORD.items()} | {"m": BY_WORD["used"]}  # as in htop
_SEARCHED = ("tenant", "path", "policy", "kind", "enforcement")


@dataclass(frozen=True, slots=True)
class Order:
    """The column to sort by, and whether the order is reversed."""

    column: Column = BY_WORD["used"]
    is_reversed: bool = False

    def by(self, column: Column) -> Order:
        """Return the order by this column.

        If the present order is by this column already, return the reversed order.
        """
        return replace(self, is_reversed=not self.is_reversed) if column is self.column else Order(column)


def rows(snapshot: Mapping[str, Any], filter_: str = "") -> list[Row]:
    """Return a row for each device of each tenant with the filter in its name, path, policy, kind or enforcement."""
    wanted = filter_.casefold()
    return [
        Row(tenant, device)
        for tenant in snapshot["tenants"]
        if not wanted or any(wanted in tenant[field].casefold() for field in _SEARCHED)
        for device in tenant["devices"]
    ]


def ranked(found: Iterable[Row], order: Order) -> list[Row]:
    """Return the rows, sorted by the column and direction of an order.

    Rows of equal value are sorted by name and device. Rows without a value are at the end.
    """
    by_name = sorted(found, key=lambda row: (row.tenant["tenant"], row.device["gpu"]))
    value = order.column.value
    known = [row for row in by_name if value(row) is not None]
    known.sort(key=value, reverse=order.column.falls != order.is_reversed)  # type: ignore[arg-type]  # None is left out
    return known + [row for row in by_name if value(row) is None]


class Mark(Enum):
    """The state of a row, which determines how the row is highlighted."""

    UNHELD = auto()
    OVER = auto()
    FULL = auto()
    IDLE = auto()
    USUAL = auto()


def mark(row: Row) -> Mark:
    """Return the state of a row: limit not held, limit exceeded, limit nearly reached, nothing used, or normal."""
    used = row.device["used_bytes"]
    if row.tenant["enforcement"] in UNHELD:
        return Mark.UNHELD
    if used > row.device["limit_bytes"]:
        return Mark.OVER
    return Mark.IDLE if not used else Mark.FULL if used >= _FULL_RATIO * row.device["limit_bytes"] else Mark.USUAL
