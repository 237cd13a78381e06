"""Fixtures of the gatekeeper's unit tests."""

from __future__ import annotations

import _thread
from collections.abc import Callable

import pytest


@pytest.fixture
def no_thread_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next start of a thread by the test's thread fail, as on a host without room for another task."""
    start, failed, own = _thread.start_new_thread, list[bool](), _thread.get_ident()

    def start_later(function: Callable[[], None], args: tuple[()]) -> int:
        if not failed and _thread.get_ident() == own:
            failed.append(True)
            raise RuntimeError("can't start new thread")
        return start(function, args)

    monkeypatch.setattr(_thread, "start_new_thread", start_later)
