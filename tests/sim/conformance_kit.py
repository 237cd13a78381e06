"""The recorded answers of a real driver."""

from __future__ import annotations

from .conftest import HERE


def sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("=== "):
            lines = found.setdefault(line[4:], [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


REAL = sections((HERE / "conformance_h200.txt").read_text())
WAITING = sections((HERE / "conformance_unrecorded.txt").read_text())
NO_DEVICE = sections((HERE / "conformance_no_device.txt").read_text())
