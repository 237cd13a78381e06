"""Execution of the tasks of the device plugin or the DRA driver in an asyncio loop, until a signal arrives."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


async def run_until_signal(*work: Coroutine[Any, Any, Any]) -> None:
    """Run until SIGTERM or SIGINT, or until a coroutine of `work` ends. Raise the error of that coroutine."""
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    tasks = [asyncio.ensure_future(each) for each in (end.wait(), *work)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
