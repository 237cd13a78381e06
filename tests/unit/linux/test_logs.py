"""Tests of log lines: the three forms. A reader that stops reading delays no process."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgpu_ebpf.linux import logs
from fgpu_ebpf.linux.logs import Format
from tests.support.wait import Deadline


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """Return a separate logger. Its handlers are removed after the test."""
    found = logging.getLogger("fgpu.test")
    found.propagate = False
    found.setLevel(logging.INFO)
    yield found
    found.handlers.clear()


def attached(log: logging.Logger, form: Format, fd: int, **more) -> logs.Handler:
    made = logs.handler(form, fd)
    log.addHandler(made)
    return made


def pipe(tmp_path: Path) -> tuple[int, int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return reader, writer


def untimed(text: str) -> str:
    """Return lines of Format.TEXT without their times. Each line must begin with a time."""
    lines = text.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines), lines
    return "".join(f"{line[20:]}\n" for line in lines)


def test_text_lines_have_the_local_time_and_no_fields(log, tmp_path) -> None:
    reader, writer = pipe(tmp_path)
    attached(log, Format.TEXT, writer)
    before = time.time()
    log.info("limit of %s on %s", 23, "/a", extra={"tenant": "a"})
    line = os.read(reader, 4096).decode()
    assert untimed(line) == "fgpu.test: limit of 23 on /a\n"
    log.info("limit on %s:\n%s", "/a\x1b[2J", "a second line")
    assert os.read(reader, 4096).decode().endswith("fgpu.test: limit on /a?[2J:\na second line\n"), "a name of a tenant"
    assert int(before) <= time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")) <= time.time()


def test_json_lines_are_objects_with_fields(log, tmp_path) -> None:
    reader, writer = pipe(tmp_path)
    attached(log, Format.JSON, writer)
    log.warning("limit of %s\non %s", 23, "/a", extra={"tenant": "a", "cgroup": 101, "path": Path("/a")})
    lines = os.read(reader, 4096).splitlines()
    assert len(lines) == 1
    entry = json.loads(lines[0])
    assert time.strptime(entry.pop("time")[:19], "%Y-%m-%dT%H:%M:%S")
    assert entry == {
        "level": "warning", "logger": "fgpu.test", "message": "limit of 23\non /a",
        "tenant": "a", "cgroup": 101, "path": "/a",
    }  # fmt: skip


@pytest.mark.parametrize("form", [Format.TEXT, Format.JSON])
def test_no_line_is_longer_than_a_pipe_takes_at_once(log, tmp_path, form) -> None:
    reader, writer = pipe(tmp_path)
    attached(log, form, writer)
    log.info("%s", "\n\u20ac" * 5000, extra={"tenant": "a" * 5000})
    line = os.read(reader, 8192)
    assert 1000 < len(line) <= 4096
    assert line.endswith(b"\n")


def entry_of(datagram: bytes) -> dict[str, str]:
    """Parse an entry in the journal's documented native protocol: NAME, newline, length, value, newline."""
    found = {}
    while datagram:
        name, rest = datagram.split(b"\n", 1)
        (size,) = struct.unpack("<Q", rest[:8])
        found[name.decode()] = rest[8 : 8 + size].decode()
        assert rest[8 + size : 9 + size] == b"\n"
        datagram = rest[9 + size :]
    return found


def test_the_journal_gets_fields(log, tmp_path, monkeypatch) -> None:
    place = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(place))
        log.addHandler(logs.Handler(logs.Journal(str(place)), logs.Native()))
        log.error("two\nlines", extra={"tenant": "a=b", "odd-name": 1})
        entry = entry_of(sock.recv(8192))
    assert entry == {
        "MESSAGE": "two\nlines", "PRIORITY": "3", "SYSLOG_IDENTIFIER": "fgpu", "SYSLOG_PID": str(os.getpid()),
        "LOGGER": "fgpu.test", "FGPU_TENANT": "a=b", "FGPU_ODD_NAME": "1",
    }  # fmt: skip


def test_a_traceback_is_included(log, tmp_path) -> None:
    reader, writer = pipe(tmp_path)
    attached(log, Format.JSON, writer)
    try:
        raise ValueError("23")
    except ValueError:
        log.exception("it failed")
    message = json.loads(os.read(reader, 4096))["message"]
    assert message.startswith("it failed\nTraceback")
    assert message.endswith("ValueError: 23")


# -- no reader -----------------------------------------------------------------------------------------------------


def blocked_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    return writer, reader


def blocked_socket() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def blocked_terminal() -> tuple[int, int]:
    theirs, ours = os.openpty()
    return ours, theirs


@pytest.mark.parametrize("make", [blocked_pipe, blocked_socket, blocked_terminal])
def test_a_log_without_a_reader_drops_lines_without_a_delay_and_reports_their_number(log, make) -> None:
    writer, reader = make()
    hours = itertools.count(0, 3600)  # one line an hour is no flood
    handler = logs.Handler(logs.Descriptor(writer), logs.Text(), lambda: next(hours))
    log.addHandler(handler)
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    deadline, count = Deadline(2), 1009
    for number in range(count):
        log.info(f"line {number} " + "x" * 400)
    assert not deadline.is_over()
    assert 0 < handler.dropped < count
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == flags  # other users of the descriptor write as before
    said = drained(reader)
    log.info("the next")
    said = untimed(said + drained(reader))
    assert len(re.findall(r"fgpu.test: line \d+ x{400}\n", said)) == count - handler.dropped
    told = re.findall(r"fgpu.journal: (\d+) lines were dropped: the reader of this log was too slow\n", said)
    assert sum(map(int, told)) == handler.dropped
    assert said.endswith(" lines were dropped: the reader of this log was too slow\nfgpu.test: the next\n")
    for fd in (writer, reader):
        os.close(fd)


def drained(fd: int) -> str:
    """Return all bytes that the descriptor has. A terminal passes lines on with a delay."""
    text = b""
    while select.select([fd], [], [], 0.5)[0]:
        text += os.read(fd, 1 << 16)
    return text.replace(b"\r", b"").decode()


def test_lines_lost_by_a_full_disk_or_a_missing_journal_are_counted(log, tmp_path) -> None:
    with open("/dev/full", "wb") as full:
        handler = attached(log, Format.TEXT, full.fileno())
        nowhere = logs.Handler(logs.Journal(str(tmp_path / "absent")), logs.Native())
        log.addHandler(nowhere)
        log.info("lost")
        log.info("lost: %s", "too", extra={"tenant": "a"})
    assert (handler.dropped, nowhere.dropped) == (2, 2)


def test_a_statement_that_cannot_be_formatted_is_counted(log, tmp_path) -> None:
    _, writer = pipe(tmp_path)
    handler = attached(log, Format.TEXT, writer)
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert handler.dropped == 1


# -- floods ---------------------------------------------------------------------------------------------------------


def test_one_statement_gets_ten_lines_in_ten_seconds(log, tmp_path) -> None:
    clock = [100.0]
    path = tmp_path / "log"
    with open(path, "ab") as file:
        handler = logs.Handler(logs.Descriptor(file.fileno()), logs.Text(), lambda: clock[0])
        log.addHandler(handler)
        for number in range(101):
            log.info("refused %s", number)
        log.info("another")
        clock[0] += 10
        log.info("refused %s", 101)
    lines = untimed(path.read_text()).splitlines()
    assert lines[:10] == [f"fgpu.test: refused {n}" for n in range(10)]
    assert lines[10:] == [
        "fgpu.test: another",
        "fgpu.journal: 91 more lines like the next line were left out",
        "fgpu.test: refused 101",
    ]
    assert (handler.left_out, handler.dropped) == (91, 0)


def test_many_lines_of_one_tenant_do_not_suppress_lines_of_another_tenant(log, tmp_path) -> None:
    path = tmp_path / "log"
    with open(path, "ab") as file:
        attached(log, Format.TEXT, file.fileno())
        for number in range(101):
            log.info("%s", f"refused a {number}", extra={"what": "refused", "tenant": "a"})
        log.info("%s", "refused b", extra={"what": "refused", "tenant": "b"})
        log.info("%s", "killed a", extra={"what": "killed", "tenant": "a"})
    assert untimed(path.read_text()).splitlines()[10:] == ["fgpu.test: refused b", "fgpu.test: killed a"]


def test_lines_of_many_tenants_are_bounded(log, tmp_path) -> None:
    clock, path = [100.0], tmp_path / "log"
    with open(path, "ab") as file:
        handler = logs.Handler(logs.Descriptor(file.fileno()), logs.Text(), lambda: clock[0])
        log.addHandler(handler)
        for number in range(1009):
            log.info("%s", number, extra={"tenant": f"tenant-{number}"})
        assert len(path.read_text().splitlines()) == 256
        assert handler.left_out == 1009 - 256
        clock[0] += 10
        log.info("%s", "again", extra={"tenant": "tenant-1008"})
    assert untimed(path.read_text()).splitlines()[-1] == "fgpu.test: again"


def test_the_number_of_remembered_statements_stays_bounded_over_time(log) -> None:
    clock = [100.0]
    with open(os.devnull, "wb") as devnull:
        handler = logs.Handler(logs.Descriptor(devnull.fileno()), logs.Text(), lambda: clock[0])
        log.addHandler(handler)
        for number in range(100 * logs.FEW_STATEMENTS):
            clock[0] += 1
            log.info("%s", number, extra={"tenant": f"tenant-{number}"})
    assert (handler.left_out, len(handler._windows) <= logs.FEW_STATEMENTS) == (0, True)


# -- set-up ---------------------------------------------------------------------------------------------------------


def test_the_default_log_format_is_journal_only_if_the_output_is_the_journal(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(logs, "JOURNAL", str(tmp_path))
    with open(tmp_path / "log", "wb") as file:
        there = os.fstat(file.fileno())
        tied = {"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino}"}
        assert logs.usual_format(tied, file.fileno()) is Format.JOURNAL
        assert logs.usual_format({"JOURNAL_STREAM": "1:2"}, file.fileno()) is Format.TEXT
        assert logs.usual_format({}, file.fileno()) is Format.TEXT
        monkeypatch.setattr(logs, "JOURNAL", str(tmp_path / "absent"))
        assert logs.usual_format(tied, file.fileno()) is Format.TEXT


def test_configure_installs_the_only_handler() -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        logs.configure(Format.JSON)
        assert logs.configure(Format.TEXT) is root.handlers[0]
        assert len(root.handlers) == 1
    finally:
        root.handlers[:] = before
        root.setLevel(level)
