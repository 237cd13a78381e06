"""What happened, for `fgpu events`: refusals, bypasses, adoptions, kills, overruns, XIDs, reloads, what was set.

Owns: the last thousand, and their numbers. Never: grows, or tells the same more than once a second, unless somebody
did it by hand: what was left out is counted in the next one. Cannot fail.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from fgpu_ebpf.quantities import memory_text

log = logging.getLogger("fgpu.events")
MOST = 1000
MOST_KINDS, FEW_KINDS = 4096, 128
AGAIN_SECONDS, REMEMBERED_SECONDS = 1.0, 60.0
BY_HAND = {"set", "unset"}


@dataclass(frozen=True, slots=True)
class Happening:
    """One line. `number` grows by one each; `time_seconds` since the epoch; what is not known is empty or 0.

    `more`: how many of the same kind and tenant went untold before this one, if that was within a minute.
    """

    number: int
    time_seconds: float
    what: str
    tenant: str = ""
    pid: int = 0
    gpu: int | None = None
    operation: str = ""
    reason: str = ""
    bytes: int = 0
    text: str = ""
    more: int = 0


class History:
    """The last MOST happenings."""

    def __init__(self) -> None:
        self._last: deque[bytes] = deque(maxlen=MOST)  # JSON: one object each, not ten that come and go between others
        self._number = 0
        self._told: dict[tuple[str, str, str, str], tuple[float, int]] = {}  # when last, and how many since
        self._room = FEW_KINDS  # in the former, until it is looked through

    def add(self, what: str, **more: Any) -> None:
        """Notes one and logs it, unless the same was told just now."""
        happening = Happening(self._number + 1, time.time(), what, **more)
        kind = (what, happening.tenant, happening.reason, happening.operation + happening.text)
        now = time.monotonic()
        last, untold = self._told.get(kind, (-REMEMBERED_SECONDS, 0))
        if now - last >= REMEMBERED_SECONDS:
            untold = 0
        if now - last < AGAIN_SECONDS and what not in BY_HAND:
            self._told[kind] = (last, untold + 1)
            return
        if len(self._told) >= self._room:
            self._forget(now)
        self._told[kind] = (now, 0)
        self._number += 1
        happening = replace(happening, more=untold)
        fields = asdict(happening)
        self._last.append(json.dumps(fields).encode())
        log.info("%s", line_of(fields), extra={name: value for name, value in fields.items() if value})

    def _forget(self, now: float) -> None:
        """Most tenants come once, and end in the middle of what they are refused."""
        kept = {kind: told for kind, told in self._told.items() if now - told[0] < _remembered(told[1])}
        self._told = kept if len(kept) < MOST_KINDS else {}
        self._room = min(MOST_KINDS, max(FEW_KINDS, 2 * len(self._told)))

    def since(self, number: int) -> dict[str, Any]:
        """Those after `number`, and how many were forgotten before anybody asked."""
        first = self._number + 1 - len(self._last)
        found = [json.loads(kept) for kept in islice(self._last, max(0, number + 1 - first), None)]
        return {"events": found, "last": self._number, "forgotten": max(0, first - number - 1)}


def _remembered(untold: int) -> float:
    return REMEMBERED_SECONDS if untold else AGAIN_SECONDS


def line_of(happening: dict[str, Any]) -> str:
    """One happening as a line for people, its time left out."""
    words = [happening["what"], happening["tenant"]]
    words += [f"pid {happening['pid']}"] if happening["pid"] else []
    words += [f"gpu {happening['gpu']}"] if happening["gpu"] is not None else []
    words += [happening["operation"], memory_text(happening["bytes"]) if happening["bytes"] else ""]
    words += [f"({happening['reason']})"] if happening["reason"] else []
    words += [happening["text"], f"and {happening['more']} more before" if happening["more"] else ""]
    return " ".join(word for word in words if word)
