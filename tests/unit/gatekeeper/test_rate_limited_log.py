"""Lines of the gatekeeper's log: their time, and their maximum number."""

from __future__ import annotations

import os
import re

import pytest

from fgpu_ebpf.gatekeeper.rate_limited_log import MOST_LINES, LogLines


def test_a_line_begins_with_the_local_time_as_the_agent_s_lines_do(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgpu_ebpf.gatekeeper.rate_limited_log.time.strftime", lambda form: f"<{form}>")
    LogLines("fgpu gatekeeper").say("listening")
    assert capfd.readouterr().err == "<%F %T >fgpu gatekeeper: listening\n"


def test_a_line_has_no_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    LogLines("fgpu gatekeeper").say("a\x1b[2J\nb")
    assert capfd.readouterr().err.endswith("fgpu gatekeeper: a?[2J?b\n")


def test_a_line_for_the_journal_has_no_time(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{there.st_dev}:{there.st_ino}")
    LogLines("fgpu gatekeeper").say("listening")
    assert capfd.readouterr().err == "fgpu gatekeeper: listening\n"


def test_more_lines_than_the_maximum_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    log = LogLines("fgpu gatekeeper")
    for number in range(MOST_LINES + 3):
        log.say(f"line {number}")
    log.renew()
    lines = [re.sub(r"^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} ", "", line)
             for line in capfd.readouterr().err.splitlines()]  # fmt: skip
    assert lines[-2:] == [f"fgpu gatekeeper: line {MOST_LINES - 1}", "fgpu gatekeeper: 3 more lines omitted"]
