"""Log lines: text for a person, JSON for a collector, fields for systemd's journal.

Owns: the root logger's one handler, and the count of lines that it had to drop. Never: waits: where a line cannot be
written at once it is dropped, and the next one that can be says how many were. Nobody makes it grow without bound: in
ten seconds ten lines are written of one statement (about one tenant, where it names one), of 256 of those; the rest
are counted.
When it fails: nothing is written, `dropped` grows, and the service goes on.

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

JOURNAL = "/run/systemd/journal/socket"
MOST_LINE_BYTES = 4096  # a pipe takes as much at once or not at all
MOST_LINES, WINDOW_SECONDS = 10, 10.0
MOST_STATEMENTS, FEW_STATEMENTS = 256, 32
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_USUAL = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", "left_out"}


class Format(enum.StrEnum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"
    JOURNAL = "journal"


class Sink(Protocol):
    """Where lines go."""

    def write(self, line: bytes) -> None:
        """All of it, at once; OSError where that cannot be."""


# -- places --------------------------------------------------------------------------------------------------------


class Descriptor:
    """A file, pipe, terminal or socket that others may write to as well: their way of writing is left as it is."""

    def __init__(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self._socket = socket.socket(fileno=os.dup(fd)) if stat.S_ISSOCK(mode) else None
        self._fd = fd
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            with contextlib.suppress(OSError):  # a description of our own, for the flag is the description's
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)

    def write(self, line: bytes) -> None:
        """One write. A line of which a terminal takes a part is no line."""
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
    """systemd's journal, by its native protocol."""

    def __init__(self, path: str = JOURNAL) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def write(self, line: bytes) -> None:
        """One entry."""
        self._socket.sendto(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._path)


# -- forms ---------------------------------------------------------------------------------------------------------


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the statement added by `extra`."""
    return {name: value for name, value in record.__dict__.items() if name not in _USUAL}


class Text(logging.Formatter):
    """`fgpu.agent: probed /usr/lib/…`, one line."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def encode(self, record: logging.LogRecord) -> bytes:
        """Ended by a newline, and never longer than a pipe takes at once."""
        return _cut(self.format(record).encode(errors="replace")) + b"\n"


class Json(Text):
    """One object a line: time, level, logger, message, then the fields."""

    def encode(self, record: logging.LogRecord) -> bytes:
        """What is too long loses its fields first, then the end of its message."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry = {"time": when, "level": record.levelname.lower(), "logger": record.name}
        entry["message"] = _message(self, record)
        line = json.dumps({**entry, **fields(record)}, default=str).encode()
        while len(line) >= MOST_LINE_BYTES:
            line = json.dumps(entry).encode()
            entry["message"] = entry["message"][: len(entry["message"]) // 2]
        return line + b"\n"


class Native(Text):
    """An entry of the journal; a field's value may hold anything, newlines too."""

    def encode(self, record: logging.LogRecord) -> bytes:
        """The name of a field is upper case there."""
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
    """Writes at once or drops. `dropped` and `left_out` only grow."""

    def __init__(self, sink: Sink, form: Text, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._sink, self._form, self._now = sink, form, now
        self._said: dict[tuple[object, ...], tuple[float, int]] = {}
        self._room = FEW_STATEMENTS  # in the former, until it is looked through
        self._told = 0
        self.dropped = self.left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging, one line at a time; never raises."""
        try:
            more = self._too_many(record)
            if more is None:
                self.left_out += 1
                return
            if self.dropped > self._told:
                told = self.dropped
                self._sink.write(self._form.encode(_line("%d lines dropped: nobody read them", told - self._told)))
                self._told = told
            if more:
                self._sink.write(self._form.encode(_line("%d more like the next line left out", more)))
            self._sink.write(self._form.encode(record))
        except Exception:  # whatever it is: a log line is never worth the service
            self.dropped += 1

    def _too_many(self, record: logging.LogRecord) -> int | None:
        """None: this statement has had its lines; else how many of its last window were left out."""
        more = record.__dict__
        statement, now = (record.name, str(record.msg), more.get("what"), more.get("tenant")), self._now()
        begun, count = self._said.get(statement, (now, 0))
        untold = 0
        if now - begun >= WINDOW_SECONDS:
            untold, begun, count = max(0, count - MOST_LINES), now, 0
        if statement not in self._said and len(self._said) >= self._room:
            self._said = {known: seen for known, seen in self._said.items() if now - seen[0] < WINDOW_SECONDS}
            if len(self._said) >= MOST_STATEMENTS:
                return None
            self._room = min(MOST_STATEMENTS, max(FEW_STATEMENTS, 2 * len(self._said)))
        self._said[statement] = (begun, count + 1)
        return untold if count < MOST_LINES else None


def _line(text: str, count: int) -> logging.LogRecord:
    entry = {"name": "fgpu.journal", "levelno": logging.WARNING, "levelname": "WARNING"}
    return logging.makeLogRecord({**entry, "msg": text, "args": (count,)})


# -- set-up --------------------------------------------------------------------------------------------------------


def usual_format(environment: Mapping[str, str] = os.environ, fd: int = 2) -> Format:
    """The journal's where a service manager has tied stderr to it, else text."""
    there = os.fstat(fd)
    tied = environment.get("JOURNAL_STREAM", "") == f"{there.st_dev}:{there.st_ino}"
    return Format.JOURNAL if tied and os.path.exists(JOURNAL) else Format.TEXT


def handler(form: Format, fd: int = 2) -> Handler:
    """A handler of this form, to stderr or to the journal."""
    match form:
        case Format.TEXT:
            return Handler(Descriptor(fd), Text())
        case Format.JSON:
            return Handler(Descriptor(fd), Json())
        case Format.JOURNAL:
            return Handler(Journal(), Native())


def configure(form: Format | None = None, level: int = logging.INFO) -> Handler:
    """Makes it the only handler; None: what is usual here. The answer counts what was dropped."""
    made = handler(form or usual_format())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(made)
    root.setLevel(level)
    return made
