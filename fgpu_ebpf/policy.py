"""Quantities of memory as people write them.

Owns: what `8GiB` means. Never: does I/O. On failure: QuantityError, which says what would be right.
"""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)")
MOST_BYTES = 2**47


class QuantityError(ValueError):
    """Not a quantity of memory; the text says what would be."""


def memory_bytes(text: str) -> int:
    """`8GiB`, `8Gi`, `8192MiB`, `1.5GiB` or plain bytes -> bytes. Decimal units are refused: nobody means them."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise QuantityError(f"{text!r} is no quantity of memory: write it as 8GiB or 8192MiB")
    number, unit = match["number"], match["unit"]
    unit = unit.removesuffix("B") if unit.endswith("iB") else unit
    if unit not in _UNITS:
        raise QuantityError(_decimal_hint(text, number, unit))
    value = float(number) * _UNITS[unit] if "." in number else int(number) * _UNITS[unit]
    if not 0 < value <= MOST_BYTES or value != int(value):
        raise QuantityError(f"{text!r} is not between 1 byte and 128 TiB")
    return int(value)


def _decimal_hint(text: str, number: str, unit: str) -> str:
    letter = unit[:1].upper()
    if letter in ("K", "M", "G", "T"):
        return f"{text!r}: did you mean {number}{letter}iB?"
    return f"{text!r}: unknown unit {unit!r}; write KiB, MiB, GiB or TiB"


def memory_text(bytes_: int) -> str:
    """Bytes for people: `1.5GiB`, `518MiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(bytes_) >= size:
            return f"{bytes_ / size:.1f}".removesuffix(".0") + unit
    return f"{bytes_}B"
