"""Format the screen of `fgpu top`, from a Snapshot and the user's choice, as rich Text.

This module runs in the main thread of the command, and does no I/O. The module determines which parts are left out of a
narrow or low window. Rows outside the window are not formatted. Each row is one Text, because a rich Table would
measure and wrap every cell, which takes many times as long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from fgpu_ebpf.api import bars, ranking
from fgpu_ebpf.api.ranking import COLUMNS, GPU, TENANT, Column, Mark, Row
from fgpu_ebpf.cli.help_texts import TOP_KEYS, TOP_WORDS
from fgpu_ebpf.cli.top_input import LatestSnapshot, ViewChoice
from fgpu_ebpf.tenancy.enforcement import no_limit

# The columns to leave out of a narrow window, in this order.
_LEFT_OUT = ("WAITED", "ENTITLED", "PEAK", "HELD BY", "REFUSED", "SHARE", "LIMIT", "USED")
_NARROW_CELLS, _LEAST_BAR_CELLS, _MOST_BAR_CELLS = 100, 8, 40
_USED, _COMMITTED, _UNMANAGED = "green", "blue", "yellow"


@dataclass(frozen=True, slots=True)
class Marks:
    """The characters that are drawn: the parts and the ends of a bar, and the keys that scroll."""

    used: str
    unmanaged: str
    committed: str
    ends: str
    arrows: str


UNICODE = Marks("█", "▒", "░", "▕▏", "↑↓")
ASCII = Marks("#", "x", "-", "[]", "jk")


@dataclass(frozen=True, slots=True)
class Window:
    """The size of the window in character cells, and the characters for drawing."""

    width: int
    height: int
    marks: Marks = UNICODE


def room(latest: LatestSnapshot, window: Window) -> int:
    """Return how many rows of the table fit into the window."""
    above = len(_notices(latest)) + len(_devices(latest.snapshot, window.width, window.marks, _most_devices(window)))
    return max(0, window.height - above - 3)


def live(latest: LatestSnapshot, choice: ViewChoice, window: Window) -> tuple[Text, ViewChoice]:
    """Return the text of the whole window, and the choice with a scroll position within the table."""
    found = ranking.ranked(ranking.rows(latest.snapshot, choice.filter), choice.order)
    seen = room(latest, window)
    choice = choice.within(len(found), seen)
    shown = found[choice.first : choice.first + seen]
    lines = [
        _title(latest.snapshot, found, choice),
        *_notices(latest),
        *_devices(latest.snapshot, window.width, window.marks, _most_devices(window)),
        *(_keys() if choice.helping else _table(shown, latest.snapshot, choice, window.width)),
    ]
    lines += [Text()] * (window.height - 1 - len(lines))
    return _joined([*lines[: window.height - 1], _footer(len(found), seen, choice, window)], window.width), choice


def once(latest: LatestSnapshot, choice: ViewChoice, width: int | None, marks: Marks) -> Text:
    """Return warnings, devices and the whole table. If `width` is None, the table is as wide as its contents."""
    found = ranking.ranked(ranking.rows(latest.snapshot, choice.filter), choice.order)
    devices = _devices(latest.snapshot, width or 120, marks, len(latest.snapshot["devices"]))
    return _joined([*_notices(latest), *devices, *_table(found, latest.snapshot, choice, width)], width)


def _joined(lines: Sequence[Text], width: int | None) -> Text:
    for line in lines:
        line.rstrip()
        if width is not None:
            line.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True).join(lines)


def _gap(width: int | None) -> str:
    return "  " if width is None or width >= _NARROW_CELLS else " "


# -- above the table -----------------------------------------------------------------------------------------------


def _title(snapshot: Mapping[str, Any], found: Sequence[Row], choice: ViewChoice) -> Text:
    when = time.strftime("%T", time.localtime(snapshot["time_seconds"]))
    tenants = len(snapshot["tenants"])
    parts = [f"fgpu {when}", f"{tenants:,} {'tenant' if tenants == 1 else 'tenants'}"]
    if choice.filter:
        parts.append(f"{len({row.tenant['cgroup'] for row in found}):,} of them with {choice.filter!r}")
    way = ", reversed" if choice.order.is_reversed else ""
    return Text(f"{'  '.join(parts)}  by {choice.order.column.word}{way}", style="bold")


def _notices(latest: LatestSnapshot) -> list[Text]:
    """Return the warnings about all lines below: the agent does not reply, or limits are not enforced."""
    said = []
    if latest.error:
        when = time.strftime("%T", time.localtime(latest.snapshot["time_seconds"]))
        said.append(Text(f"as of {when}: {latest.error}", style="bold red"))
    if unenforced := no_limit(latest.snapshot):
        said.append(Text(unenforced, style="bold red"))
    return said


def _most_devices(window: Window) -> int:
    return max(1, window.height // 4)


def _devices(snapshot: Mapping[str, Any], width: int, marks: Marks, most: int) -> list[Text]:
    devices = snapshot["devices"]
    shown = devices if len(devices) <= most else devices[: most - 1]
    lines = list(_bars(shown, width, marks))
    if len(shown) < len(devices):
        lines.append(Text(f"and {len(devices) - len(shown)} more devices", style="dim"))
    return lines or [Text("no device", style="dim")]


def _bars(devices: Sequence[Mapping[str, Any]], width: int, marks: Marks) -> Iterator[Text]:
    """Yield a line for each device.

    Example: `0 NVIDIA H200 ▕██▒░░    ▏ 40GiB/140GiB ░committed 100GiB ▒unmanaged 1GiB turn: alice`.
    """
    gap = _gap(width)
    texts = [bars.figures(d) for d in devices]
    used = [Text(text.used) for text in texts]
    committed = [Text.assemble((marks.committed, _COMMITTED), text.committed) for text in texts]
    unmanaged = [Text.assemble((marks.unmanaged, _UNMANAGED), text.unmanaged) for text in texts]
    owner = [Text(text.turn, style="bold") for text in texts]
    indices = [Text(str(d["index"])) for d in devices]
    names = [Text(d["name"]) for d in devices]
    least = _widest(indices) + 1 + _LEAST_BAR_CELLS + 2
    for figures in ((used, committed, unmanaged, owner), (used, committed, owner), (used, owner)):
        left = width - least - sum(len(gap) + _widest(texts) for texts in figures)
        if left >= 0:
            break
    is_named = left > _widest(names)
    cells = min(_LEAST_BAR_CELLS + max(0, left - (_widest(names) + 1 if is_named else 0)), _MOST_BAR_CELLS)
    drawn = [_bar(d, cells, marks) for d in devices]
    before = [indices, names, drawn] if is_named else [indices, drawn]
    for line in range(len(devices)):
        head = Text(" ").join(_padded(texts, line) for texts in before)
        yield Text(gap).join([head, *(_padded(texts, line) for texts in figures)])


def _widest(texts: Sequence[Text]) -> int:
    return max((text.cell_len for text in texts), default=0)


def _padded(texts: Sequence[Text], line: int) -> Text:
    text = texts[line].copy()
    text.pad_right(_widest(texts) - text.cell_len)
    return text


def _bar(device: Mapping[str, Any], cells: int, marks: Marks) -> Text:
    """Return the bar of a device. The ends of the parts are rounded, so that rounding errors do not add up."""
    styles = ((marks.used, _USED), (marks.unmanaged, _UNMANAGED), (marks.committed, _COMMITTED))
    bar, at = Text(marks.ends[0]), 0
    for end, (mark, style) in zip(bars.ends(device), styles, strict=True):
        stop = round(cells * end)
        bar.append(mark * max(0, stop - at), style=style)
        at = max(at, stop)
    return bar.append(" " * (cells - at) + marks.ends[1])


# -- the table -----------------------------------------------------------------------------------------------------


def _table(shown: Sequence[Row], snapshot: Mapping[str, Any], choice: ViewChoice, width: int | None) -> Iterator[Text]:
    columns = [column for column in COLUMNS if column is not GPU or len(snapshot["devices"]) > 1]
    cells = {column.name: [column.text(row) for row in shown] for column in columns}
    widths = {c.name: max(len(c.name), c.cells, *map(cell_len, cells[c.name]), 0) for c in columns if c is not TENANT}
    longest = max(len(TENANT.name), *map(cell_len, cells[TENANT.name]), 0)
    gap = _gap(width)
    for name in _LEFT_OUT:
        if width is None or min(longest, TENANT.cells) + sum(len(gap) + w for w in widths.values()) <= width:
            break
        widths.pop(name)
    rest = sum(len(gap) + w for w in widths.values())
    widths = {TENANT.name: longest if width is None else max(1, min(longest, width - rest)), **widths}
    yield _heading([column for column in columns if column.name in widths], widths, gap, choice)
    for number, row in enumerate(shown):
        texts = (_cell(name, cells[name][number], widths[name]) for name in widths)
        yield Text(gap.join(texts), style=_style(row))


def _cell(name: str, text: str, width: int) -> str:
    if name != TENANT.name:
        return text.rjust(width)
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _heading(columns: Sequence[Column], widths: Mapping[str, int], gap: str, choice: ViewChoice) -> Text:
    line = Text(style="dim")
    for column in columns:
        if column is not TENANT:
            line.append(gap + " " * (widths[column.name] - len(column.name)))
        line.append(column.name, style="bold reverse" if column is choice.order.column else "")
        if column is TENANT:
            line.append(" " * (widths[TENANT.name] - len(TENANT.name)))
    return line


def _style(row: Row) -> str:
    """Return red for a limit that does not hold or is exceeded, yellow for a nearly reached limit, dim for no use."""
    match ranking.mark(row):
        case Mark.UNHELD | Mark.OVER:
            return "red"
        case Mark.FULL:
            return "yellow"
        case Mark.IDLE:
            return "dim"
        case Mark.USUAL:
            return ""


# -- below the table -----------------------------------------------------------------------------------------------


def _keys() -> Iterator[Text]:
    yield Text("keys", style="bold")
    yield from map(Text, TOP_KEYS)
    yield Text()
    yield from map(Text, TOP_WORDS)


def _footer(count: int, room: int, choice: ViewChoice, window: Window) -> Text:
    if choice.helping:
        return Text("any key: back", style="dim")
    if choice.typing:
        return Text.assemble(("/", "bold"), choice.filter, (" ", "reverse"), "  enter: keep  escape: clear")
    last = min(count, choice.first + room)
    seen = f"{choice.first + 1}-{last} of {count}" if last < count or choice.first else ""
    keys = f"q quit  {window.marks.arrows} scroll  / filter"
    if window.width >= 80:
        keys += "  sort: a column's first letter  ? keys"
    line = Text(keys, style="dim")
    return line.append(" " * max(2, window.width - len(keys) - len(seen)) + seen) if seen else line
