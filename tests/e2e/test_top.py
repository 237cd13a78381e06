"""`fgpu top` in a terminal: keys, sizes, an agent that stops and starts, and the terminal's state afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator

import pyte
import pytest

from tests.support.commands import fgpu
from tests.support.host import CONTEXT, ENVIRONMENT, FGPU, MIB
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

HEADINGS = ["TENANT", "LIMIT", "USED", "PEAK", "SHARE", "ENTITLED", "WAITED", "REFUSED", "HELD", "BY"]
PATIENCE_SECONDS = 30


class Terminal:
    """A pseudo terminal with a program in it, and the contents of its screen."""

    def __init__(self, *words: str, columns: int = 100, lines: int = 24, **environment: str) -> None:
        self._fd, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.all = b""
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.resize(columns, lines)
        slave = self.slave
        self.program = subprocess.Popen(
            [*FGPU, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),  # so that it receives Ctrl-C and the size
        )

    def resize(self, columns: int, lines: int) -> None:
        """Resize the terminal, as a user does with its window."""
        self.screen.resize(lines, columns)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Send keys as a terminal does."""
        os.write(self._fd, keys.encode())

    def lines(self) -> list[str]:
        """Return the lines of the screen now."""
        while select.select([self._fd], [], [], 0.05)[0]:
            data = os.read(self._fd, 1 << 16)
            self.all += data
            self._stream.feed(data)
        return [line.rstrip() for line in self.screen.display]

    def wait(self, is_there: Callable[[list[str]], object], what: str) -> list[str]:
        """Wait until the condition holds for the screen, and return its lines."""
        eventually(lambda: is_there(self.lines()), PATIENCE_SECONDS, what)
        return self.lines()

    def wait_for(self, pattern: str) -> list[str]:
        """Wait until a line matches."""
        return self.wait(lambda lines: any(re.search(pattern, line) for line in lines), pattern)

    def end(self) -> int:
        """End the program and return its exit code. Its earlier output can still be read."""
        code: int = eventually(lambda: (self.lines(), self.program.poll())[1] is not None, PATIENCE_SECONDS, "its exit")
        self.lines()
        return code and self.program.returncode

    def assert_as_before(self) -> None:
        """Check that the terminal's mode and cursor are restored, and that the earlier screen is shown again."""
        assert termios.tcgetattr(self.slave) == self.before
        assert not self.screen.cursor.hidden
        assert self.all.rindex(b"\x1b[?1049l") > self.all.rindex(b"\x1b[?1049h")
        assert self.all.count(b"\x1b[?1049l") == self.all.count(b"\x1b[?1049h")

    def close(self) -> None:
        """Kill the program, if it runs."""
        if self.program.poll() is None:
            self.program.kill()
            self.program.wait(10)
        os.close(self._fd)
        os.close(self.slave)


@pytest.fixture
def terminal(service: Service) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as opened:

        def opening(*words: str, **more: object) -> Terminal:
            found = Terminal(*words, **more)  # type: ignore[arg-type]
            opened.callback(found.close)
            return found

        yield opening


@pytest.fixture
def pair(tenant: Callable[[int], Tenant]) -> tuple[Tenant, Tenant]:
    """Return two tenants. The first has the smaller limit, one refusal, and more memory in use."""
    first, second = tenant(CONTEXT + 60 * MIB), tenant(CONTEXT + 90 * MIB)
    clients: list[Client] = []
    for one, megabytes in ((first, 50), (second, 20)):
        clients.append(one.client())
        with one.growing(megabytes * MIB):
            clients[-1].ok(f"alloc {megabytes * MIB}")
        one.assert_exact()
    assert "OUT_OF_MEMORY" in clients[0].do(f"alloc {90 * MIB}")
    return first, second


def order(lines: list[str], *tenants: Tenant) -> list[str]:
    """Return these tenants' names in the order of the lines."""
    names = [tenant.name for tenant in tenants]
    return [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in names]


def row(lines: list[str], tenant: Tenant) -> list[str]:
    return next(line.split() for line in lines if line.startswith(tenant.name))


@pytest.mark.places("host")
def test_top_once_prints_one_sorted_table(service: Service, pair: tuple[Tenant, Tenant]) -> None:
    first, second = pair
    for words in ([], ["-1"], ["--once", "--sort", "used"]):
        lines = fgpu("top", *words).stdout.splitlines()
        assert lines[1].split() == HEADINGS
        assert row(lines, first)[1:] == ["578MiB", "568MiB", "568MiB", "-", "-", "-", "1", "kernel"]
        assert row(lines, second)[1:] == ["608MiB", "538MiB", "538MiB", "-", "-", "-", "0", "kernel"]
        assert order(lines, *pair) == [first.name, second.name]
        assert re.search(r"16GiB .*committed .*unmanaged 0B", lines[0])
    assert order(fgpu("top", "--sort", "limit").stdout.splitlines(), *pair) == [second.name, first.name]
    assert order(fgpu("top", "--reverse").stdout.splitlines(), *pair) == [second.name, first.name]
    assert order(fgpu("top", "--filter", second.name).stdout.splitlines(), *pair) == [second.name]
    assert "\x1b" not in fgpu("top").stdout


@pytest.mark.places("host")
def test_keys_sort_and_filter_the_table_and_quit(
    terminal: Callable[..., Terminal], pair: tuple[Tenant, Tenant]
) -> None:
    first, second = pair
    there = terminal("top")
    lines = there.wait_for(re.escape(second.name))
    assert lines[2].split() == HEADINGS
    assert order(lines, *pair) == [first.name, second.name]
    there.press("l")
    there.wait(lambda lines: order(lines, *pair) == [second.name, first.name], "the higher limit first")
    there.press("l")
    there.wait(lambda lines: order(lines, *pair) == [first.name, second.name], "the lower limit first")
    there.press(f"/{second.name}\r")
    there.wait(lambda lines: order(lines, *pair) == [second.name], "the second tenant alone")
    there.press("\x1b")
    there.wait(lambda lines: len(order(lines, *pair)) == 2, "both tenants")
    there.press("q")
    assert there.end() == 0
    there.assert_as_before()


@pytest.mark.places("host")
def test_top_refreshes_without_a_key(terminal: Callable[..., Terminal], tenant: Callable[[int], Tenant]) -> None:
    there = terminal("top")
    there.wait_for("TENANT")
    one = tenant(CONTEXT + 60 * MIB)
    there.wait_for(rf"^{one.name} +578MiB +0B")
    client = one.client()
    with one.growing(50 * MIB):
        client.ok(f"alloc {50 * MIB}")
    there.wait_for(rf"^{one.name} +578MiB +568MiB")


@pytest.mark.places("host")
def test_top_adapts_its_table_to_the_terminal_size(
    terminal: Callable[..., Terminal], place: Place, pair: tuple[Tenant, Tenant]
) -> None:
    there = terminal("top", columns=100, lines=30)
    there.wait_for("HELD BY")
    there.resize(40, 8)
    lines = there.wait(lambda lines: lines[2].split() == ["TENANT", "LIMIT", "USED", "SHARE"], "the narrow table")
    assert re.search(r"/16GiB", lines[1])
    assert lines[-1].startswith("q quit")
    there.resize(80, 24)
    lines = there.wait(lambda lines: lines[2].split() == HEADINGS, "the wide table")
    assert len(order(lines, *pair)) == 2
    assert lines[-1].startswith("q quit")
    there.resize(12, 3)
    there.wait(lambda lines: not any("LIMIT" in line for line in lines), "a screen without a table")
    there.press("q")
    assert there.end() == 0


def test_top_prints_no_colours_if_no_color_is_set(terminal: Callable[..., Terminal]) -> None:
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        there = terminal("top", **environment)
        there.wait_for("committed")
        assert bool(re.search(rb"\x1b\[[0-9;]*3[0-7]", there.all)) is coloured


@pytest.mark.parametrize("ending", ["\x03", signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "INT", "TERM"])
def test_top_restores_the_terminal_after_ctrl_c_sigint_and_sigterm(
    terminal: Callable[..., Terminal], ending: str | int
) -> None:
    there = terminal("top")
    there.wait_for("TENANT")
    if isinstance(ending, str):
        there.press(ending)
    else:
        there.program.send_signal(ending)
    assert there.end() == (143 if ending == signal.SIGTERM else 0)
    there.assert_as_before()
    assert b"Traceback" not in there.all


def test_top_restores_the_terminal_when_stopped_and_redraws_when_continued(terminal: Callable[..., Terminal]) -> None:
    there = terminal("top")
    there.wait_for("TENANT")
    there.program.send_signal(signal.SIGTSTP)

    def is_stopped() -> bool:
        there.lines()
        return os.waitid(os.P_PID, there.program.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None

    eventually(is_stopped, PATIENCE_SECONDS, "the stop of the program")
    there.assert_as_before()
    there.screen.reset()
    there.program.send_signal(signal.SIGCONT)
    there.wait_for("TENANT")
    there.press("q")
    assert there.end() == 0
    there.assert_as_before()


def test_top_continues_when_a_killed_agent_has_been_restarted(
    service: Service, terminal: Callable[..., Terminal]
) -> None:
    there = terminal("top")
    there.wait_for("TENANT")
    service.kill_agent()
    try:
        lines = there.wait_for(r"^as of \d\d:\d\d:\d\d: no agent answers")
        assert any("TENANT" in line for line in lines)
    finally:
        service.start_agent()
    there.wait(lambda lines: not any("as of" in line for line in lines), "a screen of the new agent")
    there.press("q")
    assert there.end() == 0


def test_a_hung_agent_delays_no_key_of_top(service: Service, terminal: Callable[..., Terminal]) -> None:
    there = terminal("top")
    there.wait_for("TENANT")
    assert service.agent is not None
    service.agent.send_signal(signal.SIGSTOP)
    try:
        there.wait_for("no answer from the agent for")
        there.press("/x")
        there.wait_for("^/x")
        there.press("\x1bq")
        assert there.end() == 0
    finally:
        service.agent.send_signal(signal.SIGCONT)


def test_top_exits_with_an_error_without_an_agent(service: Service, tmp_path: object) -> None:
    for words in ("top", "top -1"):
        done = fgpu("--run-dir", str(tmp_path), *words.split(), check=False)
        assert (done.returncode, done.stdout) == (3, "")
        assert "start the agent with `fgpu agent`" in done.stderr


# -- completion

BASH = """
eval "$(fgpu completion bash)"
COMP_WORDS=(fgpu "$@" "")
COMP_CWORD=$(($# + 1))
_fgpu_completion fgpu
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(*words: str) -> list[str]:
    """Return the words that bash offers after these words."""
    command = ["bash", "-c", BASH, "bash", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=True)
    return done.stdout.split()


@pytest.mark.places("host")
def test_completion_offers_commands_options_and_tenants(service: Service, tenant: Callable[[int], Tenant]) -> None:
    one = tenant(CONTEXT + 60 * MIB)
    assert {"top", "status", "completion"} <= set(completed())
    assert completed("completion") == ["bash", "zsh", "fish"]
    assert "refused" in completed("top", "--sort")
    for command in ("set", "unset", "explain"):
        assert one.name in completed(command)


@pytest.mark.parametrize(("shell", "begins"), [("zsh", "#compdef fgpu"), ("fish", "function _fgpu_completion")])
def test_completion_supports_zsh_and_fish(service: Service, shell: str, begins: str) -> None:
    assert fgpu("completion", shell).stdout.startswith(begins)
    asked = {
        "_FGPU_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "fgpu st",
        "COMP_CWORD": "st" if shell == "fish" else "1",
    }
    assert "status" in fgpu(env={**ENVIRONMENT, **asked}).stdout


def test_completion_waits_at_most_20_seconds_for_a_hung_agent(service: Service) -> None:
    assert service.agent is not None
    service.agent.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        assert completed("set") == []
        assert time.monotonic() - begun < 20, "completion waited as long as a command"
    finally:
        service.agent.send_signal(signal.SIGCONT)
