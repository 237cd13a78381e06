"""Log lines as text for a person, as JSON for a collector, or as fields for systemd's journal.

This module runs in any thread of the agent and of the device plugin. The gatekeeper has its own log
(`rate_limited_log`). Logging never blocks: a line that cannot be written at once is dropped, and the next line that can
be written is preceded by the number of dropped lines. If writing fails, `dropped` grows, and the service continues.

The number of lines is bounded. In ten seconds, each statement writes at most ten lines, and at most 256 statements
write. A statement with the field `tenant` or `what` counts once for each value of the field. Further lines are only
counted.

A statement adds fields by `extra`: log.info("limit of %s on %s", size, path, extra={"tenant": name}).
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import re
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fgpu_ebpf.linux import printable

JOURNAL = "/run/systemd/journal/socket"
MOST_LINE_BYTES = 4096  # a write of up to this size to a pipe is atomic
MOST_LINES, WINDOW_SECONDS = 10, 10.0
MOST_STATEMENTS, FEW_STATEMENTS = 256, 32
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_USUAL = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", "left_out"}


class Format(enum.StrEnum):
    """The form in which lines are written."""

    TEXT = "text"
    JSON = "json"
    JOURNAL = "journal"


class Sink(Protocol):
    """A destination of lines."""

    def write(self, line: bytes) -> None:
        """Write a whole line at once. Raise OSError if the line cannot be written."""


# -- places --------------------------------------------------------------------------------------------------------


class Descriptor:
    """A file, pipe, terminal or socket that other processes may share. The blocking mode does not change."""

    def __init__(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self._socket = socket.socket(fileno=os.dup(fd)) if stat.S_ISSOCK(mode) else None
        self._fd = fd
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            with contextlib.suppress(OSError):  # O_NONBLOCK belongs to the open file description: open a new file
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)

    def write(self, line: bytes) -> None:
        """Write a line in one call. Raise OSError if the whole line is not accepted at once."""
        if self._socket:
            self._socket.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            return
        ready = select.poll()
        ready.register(self._fd, select.POLLOUT)
        if not ready.poll(0):
            raise BlockingIOError
        if os.write(self._fd, line) < len(line):
            raise BlockingIOError


class Journal:
    """systemd's journal, in its native protocol."""

    def __init__(self, path: str = JOURNAL) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def write(self, line: bytes) -> None:
        """Send one entry to the journal. Raise OSError if the journal does not accept the entry at once."""
        self._socket.sendto(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._path)


# -- forms ---------------------------------------------------------------------------------------------------------


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that the statement added by `extra`."""
    return {name: value for name, value in record.__dict__.items() if name not in _USUAL}


class Text(logging.Formatter):
    """The formatter of lines such as `2026-05-12 09:41:07 fgpu.agent: probed /usr/lib/…`, in local time."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s", "%F %T")

    def encode(self, record: logging.LogRecord) -> bytes:
        """Return the line without control characters, with its newline, at most MOST_LINE_BYTES long."""
        return _cut(printable.lines(self.format(record)).encode(errors="replace")) + b"\n"


class Json(Text):
    """The formatter of lines with a JSON object: time, level, logger, message, then the fields."""

    def encode(self, record: logging.LogRecord) -> bytes:
        """Return the line. The fields, and then the end of the message, of a line that is too long are left out."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry = {"time": when, "level": record.levelname.lower(), "logger": record.name}
        entry["message"] = _message(self, record)
        line = json.dumps({**entry, **fields(record)}, default=str).encode()
        while len(line) >= MOST_LINE_BYTES:
            line = json.dumps(entry).encode()
            entry["message"] = entry["message"][: len(entry["message"]) // 2]
        return line + b"\n"


class Native(Text):
    """An entry of the journal. A field's value may contain any bytes, including newlines."""

    def encode(self, record: logging.LogRecord) -> bytes:
        """Return the entry. Names of fields are in upper case, as the journal requires."""
        entry: dict[str, Any] = {f"FGPU_{name}": value for name, value in fields(record).items()}
        entry |= {"MESSAGE": _message(self, record), "PRIORITY": _PRIORITIES.get(record.levelno, 5)}
        entry |= {"SYSLOG_IDENTIFIER": "fgpu", "LOGGER": record.name, "SYSLOG_PID": record.process}
        return b"".join(_field(name, value) for name, value in entry.items())


def _field(name: str, value: object) -> bytes:
    text = _cut(str(value).encode(errors="replace"))
    key = re.sub(r"[^A-Z0-9_]", "_", name.upper())[:64].encode()
    return key + b"\n" + struct.pack("<Q", len(text)) + text + b"\n"


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    text = record.getMessage()
    return f"{text}\n{formatter.formatException(record.exc_info)}" if record.exc_info else text


def _cut(text: bytes) -> bytes:
    return text if len(text) < MOST_LINE_BYTES else text[: MOST_LINE_BYTES - 4] + b"..."


# -- the handler ---------------------------------------------------------------------------------------------------


class Handler(logging.Handler):
    """A handler that writes a line at once or drops the line.

    `dropped`: number of lines that could not be written. `left_out`: number of lines beyond the maximum of lines or of
    statements in ten seconds. Both counters only grow.
    """

    def __init__(self, sink: Sink, form: Text, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._sink, self._form, self._now = sink, form, now
        self._windows: dict[tuple[object, ...], tuple[float, int]] = {}  # statement -> begin of its window, its lines
        self._room = FEW_STATEMENTS  # when _windows has this many entries, old entries are removed
        self._reported = 0  # dropped lines that a later line has reported
        self.dropped = self.left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record. `logging` calls this method for one record at a time. No exception is raised."""
        try:
            more = self._too_many(record)
            if more is None:
                self.left_out += 1
                return
            if self.dropped > self._reported:
                dropped = self.dropped
                text = "%d lines were dropped: the reader of this log was too slow"
                self._sink.write(self._form.encode(_line(text, dropped - self._reported)))
                self._reported = dropped
            if more:
                self._sink.write(self._form.encode(_line("%d more lines like the next line were left out", more)))
            self._sink.write(self._form.encode(record))
        except Exception:  # any exception, because a log line must never stop the service
            self.dropped += 1

    def _too_many(self, record: logging.LogRecord) -> int | None:
        """Return how many lines of the statement's last window were left out; None: omit this line too."""
        more = record.__dict__
        statement, now = (record.name, str(record.msg), more.get("what"), more.get("tenant")), self._now()
        begun, count = self._windows.get(statement, (now, 0))
        left_out = 0
        if now - begun >= WINDOW_SECONDS:
            left_out, begun, count = max(0, count - MOST_LINES), now, 0
        if statement not in self._windows and len(self._windows) >= self._room:
            self._windows = {known: seen for known, seen in self._windows.items() if now - seen[0] < WINDOW_SECONDS}
            if len(self._windows) >= MOST_STATEMENTS:
                return None
            self._room = min(MOST_STATEMENTS, max(FEW_STATEMENTS, 2 * len(self._windows)))
        self._windows[statement] = (begun, count + 1)
        return left_out if count < MOST_LINES else None


def _line(text: str, count: int) -> logging.LogRecord:
    entry = {"name": "fgpu.journal", "levelno": logging.WARNING, "levelname": "WARNING"}
    return logging.makeLogRecord({**entry, "msg": text, "args": (count,)})


# -- set-up --------------------------------------------------------------------------------------------------------


def usual_format(environment: Mapping[str, str] = os.environ, fd: int = 2) -> Format:
    """Return JOURNAL if a service manager has connected stderr to the journal, else TEXT."""
    there = os.fstat(fd)
    tied = environment.get("JOURNAL_STREAM", "") == f"{there.st_dev}:{there.st_ino}"
    return Format.JOURNAL if tied and os.path.exists(JOURNAL) else Format.TEXT


def handler(form: Format, fd: int = 2) -> Handler:
    """Return a handler that writes records in this form to the descriptor or, for JOURNAL, to the journal."""
    match form:
        case Format.TEXT:
            return Handler(Descriptor(fd), Text())
        case Format.JSON:
            return Handler(Descriptor(fd), Json())
        case Format.JOURNAL:
            return Handler(Journal(), Native())


def configure(form: Format | None = None, level: int = logging.INFO) -> Handler:
    """Make a handler of this form the root logger's only handler, and return the handler.

    `form` None: use the process's usual form.
    """
    made = handler(form or usual_format())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(made)
    root.setLevel(level)
    return made
