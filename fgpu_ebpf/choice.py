"""What somebody has chosen to see of a table, and what each key changes in it.

Owns: the meaning of the keys. Never: reads a terminal.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fgpu_ebpf.ranking import BY_KEY, Order

_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1}
_PAGES = {"page up": -1, "page down": 1, " ": 1}
_END = 1 << 30


@dataclass(frozen=True, slots=True)
class Choice:
    """`first`: rows above the first that is shown; `typing`: the filter is being written."""

    order: Order = field(default_factory=Order)
    filter: str = ""
    first: int = 0
    typing: bool = False

    def pressed(self, key: str, page: int) -> Choice | None:
        """After a key, where a page has so many rows; None: nothing more is wanted. Other keys change nothing."""
        if self.typing:
            return self._typed(key)
        if key == "q":
            return None
        if key == "/":
            return replace(self, typing=True)
        if key == "escape":
            return replace(self, filter="", first=0)
        if key in BY_KEY:
            return replace(self, order=self.order.by(BY_KEY[key]), first=0)
        return self._moved(key, page)

    def within(self, count: int, page: int) -> Choice:
        """So that the last of `count` rows is at the bottom of a page at most."""
        return replace(self, first=max(0, min(self.first, count - page)))

    def _moved(self, key: str, page: int) -> Choice:
        if key in ("home", "end"):
            return replace(self, first=0 if key == "home" else _END)
        return replace(self, first=self.first + _STEPS.get(key, 0) + _PAGES.get(key, 0) * page)

    def _typed(self, key: str) -> Choice:
        if key == "enter":
            return replace(self, typing=False)
        if key == "escape":
            return replace(self, filter="", typing=False, first=0)
        if key == "backspace":
            return replace(self, filter=self.filter[:-1], first=0)
        return replace(self, filter=self.filter + key, first=0) if len(key) == 1 and key.isprintable() else self
