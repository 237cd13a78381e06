"""Tests of the keys of a terminal: sequences in one or several pieces, and the terminal's mode afterwards."""

from __future__ import annotations

import os
import pty
import termios
from collections.abc import Iterator

import pytest

from fgpu_ebpf.cli import top_input as terminal_keys
from fgpu_ebpf.cli.top_input import Keyboard


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Return both ends of a terminal: the keyboard's and the program's."""
    hands, program = pty.openpty()
    yield hands, program
    for fd in (hands, program):
        os.close(fd)


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"\x1b[A\x1b[Bjk", ["up", "down", "j", "k"]),
        (b"\x1bOA\x1b[5~\x1b[6~\x1b[H\x1bOF\x1b[4~", ["up", "page up", "page down", "home", "end", "end"]),
        (b"\x7f\r\n", ["backspace", "enter", "enter"]),
        (b"/\xc3\xa9", ["/", "é"]),
        (b"\x1b[1;5Aq", ["\x1b[1;5A", "q"]),
        (b"\x1b", ["escape"]),
    ],
)
def test_key_sequences_are_read_as_keys(terminal: tuple[int, int], data: bytes, keys: list[str]) -> None:
    hands, program = terminal
    with Keyboard(program) as board:
        os.write(hands, data)
        found: list[str] = []
        while len(found) < len(keys):
            found += board.keys()
    assert found == keys


def test_a_sequence_in_several_pieces_is_one_key(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    hands, program = terminal
    pieces = [b"\x1b", b"[5", b"~"]
    read = os.read

    def slow(fd: int, size: int) -> bytes:
        data = read(fd, size)
        if pieces:
            os.write(hands, pieces.pop(0))
        return data

    monkeypatch.setattr(terminal_keys.os, "read", slow)
    with Keyboard(program) as board:
        os.write(hands, pieces.pop(0))
        assert board.keys() == ["page up"]


def test_the_terminal_s_mode_is_restored(terminal: tuple[int, int]) -> None:
    _, program = terminal
    before = termios.tcgetattr(program)
    with Keyboard(program):
        assert not termios.tcgetattr(program)[3] & (termios.ECHO | termios.ICANON)
        assert termios.tcgetattr(program)[3] & termios.ISIG
    assert termios.tcgetattr(program) == before
