"""One finding about this host, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """`mend` says what to do where `ok` is False; `found` says what was seen."""

    name: str
    ok: bool
    found: str
    mend: str = ""
