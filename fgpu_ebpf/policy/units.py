"""Parsing and printing of quantities: memory, shares and lengths of time, such as `8GiB`, `50%` and `20ms`.

The functions have no state, do no I/O, and run in any thread. Each regular expression limits the number of characters,
so that a long text costs no time.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_UNITS = {"B": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SHIFTS = (("GiB", 30), ("MiB", 20), ("B", 0))
_TIMES = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60 * 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}
_QUANTITY = re.compile(r"(?P<number>[0-9]{1,20}(?:\.[0-9]{1,20})?)\s{0,4}(?P<unit>[A-Za-z]{0,20})")
_FRACTION = re.compile(r"(?P<whole>[0-9]{1,4})(?:\.(?P<part>[0-9]{1,6}))?")
_PERCENT = re.compile(r"(?P<whole>[0-9]{1,3})(?:\.(?P<part>[0-9]{1,4}))?\s{0,4}%")
MOST_BYTES = 2**47
GRANULE = 2 << 20  # the driver's unit of allocation, in bytes
MILLION = 1_000_000
_SHOWN = 40


class QuantityError(ValueError):
    """The error of a text that is not a valid quantity. The message contains the correct form."""


class Amount(NamedTuple):
    """An amount of memory, in bytes or in millionths of the usable memory of a device.

    The field of the other unit is 0.
    """

    bytes: int = 0
    millionths: int = 0

    def of(self, usable_bytes: int) -> int:
        """Return the amount in bytes on a device with `usable_bytes` of memory for tenants.

        Millionths are rounded down to a multiple of GRANULE, and are at least one GRANULE.
        """
        if not self.millionths:
            return self.bytes
        share = usable_bytes * self.millionths // MILLION
        return max(share // GRANULE, 1) * GRANULE


def shown(text: str) -> str:
    """Return untrusted text in a form for messages: quoted, escaped, and truncated after 40 characters."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


# -- memory --------------------------------------------------------------------------------------------------------


def amount(text: str) -> Amount:
    """Parse `8GiB`, `1.5GiB`, `8Gi`, `8192MiB`, `8589934592B` or `50%`, in files, labels and on the command line.

    A number needs a binary unit. Decimal units are refused, because 8GB would be 7.45GiB. The minimum is 2MiB, the
    driver's unit of allocation. An invalid text raises QuantityError.
    """
    if text.rstrip().endswith("%"):
        return Amount(millionths=millionths(text))
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise QuantityError(f"{shown(text)} is not a memory size: write it as 8GiB or 50%")
    bytes_ = _bytes(text, match["number"], match["unit"])
    if bytes_ < GRANULE:
        raise QuantityError(f"{shown(text)} is less than the driver's unit of allocation: write at least 2MiB")
    return Amount(bytes_)


def _bytes(text: str, number: str, unit: str) -> int:
    if not 0 < float(number) <= MOST_BYTES:
        raise QuantityError(f"{shown(text)} is not between 1 byte and 128 TiB")
    if not unit:
        raise QuantityError(f"{shown(text)} has no unit: did you mean {_with_unit(number)}?")
    unit = unit.removesuffix("B") if unit.endswith("iB") else unit
    if unit not in _UNITS:
        raise QuantityError(_decimal_hint(text, number, unit))
    value = float(number) * _UNITS[unit] if "." in number else int(number) * _UNITS[unit]
    if not 1 <= value <= MOST_BYTES:
        raise QuantityError(f"{shown(text)} is not between 1 byte and 128 TiB")
    if value != int(value):
        near = max(int(value), GRANULE) >> 20
        raise QuantityError(f"{shown(text)} is not a whole number of bytes: did you mean {near}MiB?")
    return int(value)


def _with_unit(number: str) -> str:
    """Return a number with the unit that its size suggests: gibibytes, mebibytes or bytes."""
    if float(number) < 1024:
        return f"{number}GiB"
    if float(number) < GRANULE or "." in number:
        return f"{number}MiB"
    return next((f"{int(number) >> shift}{unit}" for unit, shift in _SHIFTS if not int(number) % (1 << shift)), "")


def _decimal_hint(text: str, number: str, unit: str) -> str:
    letter = unit[:1].upper()
    if letter in ("K", "M", "G", "T"):
        return f"{shown(text)}: did you mean {number}{letter}iB?"
    return f"{shown(text)}: unknown unit {unit!r}; write KiB, MiB, GiB or TiB"


def memory_text(bytes_: int) -> str:
    """Return a number of bytes as text for messages, rounded to one decimal place: `1.5GiB`, `518MiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(bytes_) >= size:
            return f"{bytes_ / size:.1f}".removesuffix(".0") + unit
    return f"{bytes_}B"


def amount_text(amount: Amount) -> str:
    """Return an Amount as text for messages: `50%`, `1.5GiB`."""
    return millionths_text(amount.millionths) if amount.millionths else memory_text(amount.bytes)


# -- shares and times ----------------------------------------------------------------------------------------------


def millionths(text: str) -> int:
    """Parse `50%` or `12.5%` and return millionths, from 1 to 1,000,000. Raise QuantityError if the text is invalid."""
    match = _PERCENT.fullmatch(text.strip())
    if match is None:
        raise QuantityError(f"{shown(text)} is not a share: write it as 50%")
    value = int(match["whole"]) * 10_000 + int((match["part"] or "").ljust(4, "0"))
    if not 0 < value <= MILLION:
        raise QuantityError(f"{shown(text)} must be above 0% and at most 100%")
    return value


def fraction(text: str) -> Amount:
    """Parse `0.25` or `0.500`, the format of ClearML's label. Raise QuantityError if the text is invalid.

    A number of whole GPUs, such as `1` or `2.0`, is read as the whole memory of each device.
    """
    match = _FRACTION.fullmatch(text.strip())
    if match is None:
        raise QuantityError(f"{shown(text)} is not a fraction: write it as 0.25")
    value = int(match["whole"]) * MILLION + int((match["part"] or "").ljust(6, "0"))
    if not value:
        raise QuantityError(f"{shown(text)} is not above 0")
    return Amount(millionths=min(value, MILLION))


def mebibytes(text: str) -> Amount:
    """Parse `2000`, the format of KAI's annotation `gpu-memory`. Raise QuantityError if the text is invalid."""
    if not (text.isascii() and text.isdigit()):
        raise QuantityError(f"{shown(text)} is not a number of MiB: write it as 2000")
    return amount(f"{text}MiB")


def millionths_text(millionths: int) -> str:
    """Return millionths as text, such as `50%` or `12.5%`."""
    return f"{millionths / 10_000:.4f}".rstrip("0").rstrip(".") + "%"


def duration_ns(text: str) -> int:
    """Parse `20ms`, `500us`, `0.5s`, `15min`, `15m` or `2h` and return nanoseconds. Raise QuantityError on failure."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match["unit"] not in _TIMES:
        raise QuantityError(f"{shown(text)} is not a length of time: write it as 20ms")
    return round(float(match["number"]) * _TIMES[match["unit"]])


def duration_text(seconds: float) -> str:
    """Return a length of time as text for messages, in whole seconds, or in minutes from ten minutes on: `95 s`."""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
