"""Opens of device nodes: which processes may open a node of the driver.

The nodes have the driver's major number, and this machine has no driver: an open that is not refused fails with ENXIO.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.abi import LimitFlag, News
from fgpu_ebpf.ledger.level_limits import LevelLimits
from tests.bpf.conftest import MIB, Client, Kernel, Level

DRIVER, OTHER = 195, 240  # major numbers: of the driver, and one for local use
DENIED, NOT_DECIDED = errno.EPERM, errno.ENXIO


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """Return a folder with device nodes, which are named after their type and major number."""
    tmp_path.chmod(0o755)
    for kind, letter in ((stat.S_IFCHR, "c"), (stat.S_IFBLK, "b")):
        for major in (DRIVER, OTHER):
            os.mknod(tmp_path / f"{letter}{major}", kind | 0o666, os.makedev(major, 7))
    return tmp_path


def opens(kernel: Kernel, level: Level) -> tuple[int, int]:
    return kernel.ledger.opens.of(level.cgroup)


def error_of_open(client: Client, node: Path) -> int | None:
    """Return the errno of an open of the node by the client."""
    found: int | None = client(f"error_of_open({str(node)!r})")
    return found


def assert_ends_with_the_program(kernel: Kernel, level: Level, client: Client, node: Path) -> None:
    """Check that neither a child of the client nor its next program may open the node."""
    assert client(f"error_of_open_in_child({str(node)!r})") == DENIED
    client.send("os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])")
    client.begin(level.cgroup)
    assert error_of_open(client, node) == DENIED
    assert opens(kernel, level) == (2, 0)


def test_a_process_without_the_shim_may_not_open_a_node_if_its_level_denies(
    kernel: Kernel, level: Level, client: Client, nodes: Path, events
) -> None:
    level.limit(100 * MIB, LimitFlag.DENY)
    assert error_of_open(client, nodes / "c195") == DENIED
    assert opens(kernel, level) == (1, 0)
    (event,) = [event for event in events.read() if event.kind == News.OPEN]
    assert (event.tgid, event.cgroup, event.bytes) == (client.pid, level.cgroup, DRIVER << 32 | 7)
    for other in ("b195", "c240"):
        assert error_of_open(client, nodes / other) == NOT_DECIDED
    assert opens(kernel, level) == (1, 0)


def test_a_process_with_the_shim_may_open_nodes_until_it_executes_another_program(
    kernel: Kernel, level: Level, client: Client, nodes: Path
) -> None:
    level.limit(100 * MIB, LimitFlag.DENY)
    client(f"admit(0, {int(abi.Kind.HELLO)})")
    assert error_of_open(client, nodes / "c195") == NOT_DECIDED
    assert_ends_with_the_program(kernel, level, client, nodes / "c195")


def test_an_announcement_is_enough_and_sends_no_event(
    kernel: Kernel, level: Level, client: Client, nodes: Path, events
) -> None:
    """The agent would take the level as used before it has decided about the process's own cgroup."""
    level.limit(100 * MIB, LimitFlag.DENY)
    assert client("announce()") is None
    assert error_of_open(client, nodes / "c195") == NOT_DECIDED
    assert (list(events.read()), client.entry(kernel)) == ([], None)


def test_an_announcement_counts_before_the_process_has_a_level(
    kernel: Kernel, make_level: Callable[..., Level], make_client: Callable[..., Client], nodes: Path
) -> None:
    one = make_level(None)
    client = make_client(one)
    assert client("announce()") is None
    one.limit(100 * MIB, LimitFlag.DENY)
    assert error_of_open(client, nodes / "c195") == NOT_DECIDED
    assert_ends_with_the_program(kernel, one, client, nodes / "c195")


def test_an_announcement_ends_with_its_program_also_if_a_later_one_has_the_same_address_space(
    kernel: Kernel, level: Level, client: Client, nodes: Path
) -> None:
    """The kernel gives the structure of an address space to the second program after it in most cases."""
    level.limit(100 * MIB, LimitFlag.DENY)
    for _ in range(10):
        assert client("announce()") is None
        assert error_of_open(client, nodes / "c195") == NOT_DECIDED
        for _ in range(2):
            client.send("os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])")
            client.begin(level.cgroup)
        assert error_of_open(client, nodes / "c195") == DENIED


def test_only_opens_for_reading_or_writing_are_decided(level: Level, client: Client, nodes: Path, kernel) -> None:
    level.limit(100 * MIB, LimitFlag.DENY)
    assert client(f"os.access({str(nodes / 'c195')!r}, os.F_OK)") is True
    assert opens(kernel, level) == (0, 0)
    assert client(f"os.access({str(nodes / 'c195')!r}, os.R_OK)") is False
    assert opens(kernel, level) == (1, 0)


def test_events_of_opens_are_few_and_leave_room_for_others(
    kernel: Kernel, level: Level, client: Client, nodes: Path, events
) -> None:
    level.limit(MIB, LimitFlag.DENY)
    assert client(f"[error_of_open({str(nodes / 'c195')!r}) for _ in range(100)]") == [DENIED] * 100
    assert client(f"admit({2 * MIB})") == abi.Verdict.REFUSED
    kinds = [event.kind for event in events.read()]
    assert 1 <= kinds.count(News.OPEN) <= 8  # 4 in a second
    assert kinds.count(News.REFUSED) == 1


def test_a_request_for_memory_is_no_registration(level: Level, client: Client, nodes: Path) -> None:
    level.limit(100 * MIB, LimitFlag.DENY)
    assert client("admit(1)") == abi.Verdict.ADMITTED
    assert error_of_open(client, nodes / "c195") == DENIED


@pytest.mark.usefixtures("context_bytes")
def test_only_the_agent_can_exempt_a_process(kernel: Kernel, level: Level, client: Client, nodes: Path) -> None:
    """Memory that a library reports proves nothing: a tenant can have its own library."""
    level.limit(100 * MIB, LimitFlag.DENY)
    assert client(f"alloc(1, {MIB})") == 0
    assert client("context(0xC0DE)") == 0
    assert error_of_open(client, nodes / "c195") == DENIED
    kernel.ledger.opens.exempt(client.pid, client.entry(kernel).generation + 1)  # of another process with this pid
    assert error_of_open(client, nodes / "c195") == DENIED
    kernel.ledger.opens.exempt(client.pid, client.entry(kernel).generation)
    assert error_of_open(client, nodes / "c195") == NOT_DECIDED


def test_a_level_without_the_flag_counts_opens(kernel: Kernel, level: Level, client: Client, nodes: Path) -> None:
    assert error_of_open(client, nodes / "c195") == NOT_DECIDED
    assert opens(kernel, level) == (0, 1)


def test_the_flag_of_a_group_holds_in_all_levels_inside(
    kernel: Kernel, make_level: Callable[..., Level], make_client: Callable[..., Client], nodes: Path
) -> None:
    group = make_level(100 * MIB)
    inside = make_level(50 * MIB, group)
    group.limit(100 * MIB, LimitFlag.DENY)
    assert error_of_open(make_client(inside), nodes / "c195") == DENIED
    assert (opens(kernel, inside), opens(kernel, group)) == ((1, 0), (0, 0))


def test_a_level_that_may_use_no_device_can_deny(
    kernel: Kernel, make_level: Callable[..., Level], make_client: Callable[..., Client], nodes: Path
) -> None:
    one = make_level(None)
    kernel.ledger.set_limits([LevelLimits(one.cgroup, {}, LimitFlag.DENY)])
    client = make_client(one)
    assert error_of_open(client, nodes / "c195") == DENIED
    kernel.ledger.set_limits([LevelLimits(one.cgroup, {})])
    assert error_of_open(client, nodes / "c195") == NOT_DECIDED


def test_a_number_that_the_driver_no_longer_has_is_not_decided(
    kernel: Kernel, level: Level, client: Client, nodes: Path
) -> None:
    level.limit(100 * MIB, LimitFlag.DENY)
    kernel.ledger.opens.set_majors([DRIVER, OTHER])
    assert error_of_open(client, nodes / "c240") == DENIED
    kernel.ledger.opens.set_majors([DRIVER])
    assert error_of_open(client, nodes / "c240") == NOT_DECIDED
    assert error_of_open(client, nodes / "c195") == DENIED


def test_processes_without_a_level_are_not_concerned(kernel: Kernel, nodes: Path) -> None:
    with pytest.raises(OSError, match="No such device or address"):
        os.open(nodes / "c195", os.O_RDWR)


def test_a_managed_process_may_create_nodes(level: Level, client: Client, nodes: Path) -> None:
    """The runtime of a container creates its nodes inside the container's cgroup."""
    level.limit(100 * MIB, LimitFlag.DENY)
    assert client(f"os.mknod({str(nodes / 'new')!r}, 0o20666, os.makedev({DRIVER}, 0))") is None
