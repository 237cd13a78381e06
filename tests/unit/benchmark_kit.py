"""A place for benchmarks of a real GPU in a unit test."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from tests.support import host


@contextlib.contextmanager
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what these benchmarks change in this process: tests.support is set up for a real driver, and SIGTERM."""
    monkeypatch.setenv("DRIVER_ROOT", str(host.DRIVER_ROOT))
    monkeypatch.setattr(host, "ENVIRONMENT", host.ENVIRONMENT)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
