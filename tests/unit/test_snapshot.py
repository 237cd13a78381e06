"""Tests of Fields: the web page reads a Snapshot with it, as if the Snapshot were its JSON form."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from fgpu_ebpf import snapshot
from fgpu_ebpf.snapshot import Snapshot


def parts_of(kind: Any) -> set[type]:
    """Return all dataclasses in the fields of `kind`, in the fields of these dataclasses, and so on."""
    found: set[type] = set()
    hints = [*typing.get_type_hints(kind).values()]
    while hints:
        hint = hints.pop()
        hints += typing.get_args(hint)
        if dataclasses.is_dataclass(hint) and hint not in found:
            found.add(typing.cast(type, hint))
            hints += typing.get_type_hints(hint).values()
    return found


def test_every_part_of_a_snapshot_is_read_by_the_names_of_its_fields() -> None:
    assert parts_of(Snapshot) == snapshot._VIEWS
