"""Starts of threads on a host that may have no room for another thread."""

from __future__ import annotations

import _thread
import errno
from collections.abc import Callable


def start(function: Callable[[], None]) -> None:
    """Run a function in a new thread. Raise OSError if no thread can be started.

    The call does not wait until the thread runs, as threading.Thread.start() does.
    """
    try:
        _thread.start_new_thread(function, ())
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error
