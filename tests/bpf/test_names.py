"""Two charges with one name (pointer or handle), after an unrecorded free or a pointer that a tenant overwrote.

No free by that name releases more than the driver library frees. A name that collides with no other can hide memory:
docs/security.md says what a tenant gains by that.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fgpu_ebpf.ledger.level_limits import LevelLimits
from tests.bpf.conftest import HERE, MIB, REPOSITORY, Client, Kernel, Level, anomalies, assert_corrected, assert_left


def charges(kernel: Kernel, client: Client, level: Level) -> dict[str, int]:
    """Return the charges in MiB."""
    entry = client.entry(kernel)
    found = {"used": level.used, "managed": entry.managed[0], "overhead": entry.overhead[0], "orphaned": level.orphaned}
    return {name: bytes_ // MIB for name, bytes_ in found.items() if bytes_}


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4)])
@pytest.mark.parametrize(
    ("first", "second", "overhead", "managed"),
    [
        pytest.param("alloc", "alloc", 6, 0, id="both-plain"),
        pytest.param("managed", "managed", 0, 10, id="both-managed"),
        pytest.param("alloc", "managed", None, None, id="plain-then-managed"),
        pytest.param("managed", "alloc", None, None, id="managed-then-plain"),
    ],
)
def test_a_name_with_two_charges_frees_only_the_smaller(
    kernel, level, client, old, new, first, second, overhead, managed
):
    before = anomalies(kernel)["STALE"]
    client(f"{first}(0x1000, {old * MIB})")
    client(f"{second}(0x1000, {new * MIB})")
    assert anomalies(kernel)["STALE"] == before + 1
    if managed is None:
        managed = new if second == "managed" else old
        overhead = 10 - managed - 4
    expected = {"used": 10, "managed": managed, "overhead": overhead}
    assert charges(kernel, client, level) == {name: n for name, n in expected.items() if n}
    client("free(0x1000)")
    expected["used"] = 6
    if first == second == "managed":
        expected["managed"] = 6
    assert charges(kernel, client, level) == {name: n for name, n in expected.items() if n}
    client("free(0x1000)")
    assert level.used == 6 * MIB
    client.kill()
    assert_left(level, 6 * MIB)


def test_nvml_corrects_charges_without_an_entry(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client(f"alloc(0x1000, {6 * MIB})")  # the driver has freed the first allocation
    assert_corrected(kernel, client, 2 * MIB)
    assert level.used == 6 * MIB
    client("free(0x1000)")
    assert_corrected(kernel, client, 0)
    assert level.used == 0


def test_a_name_with_three_charges_frees_the_smallest(level, client):
    for bytes_ in (6, 2, 8):
        client(f"managed(0x1000, {bytes_ * MIB})")
    client("free(0x1000)")
    assert level.used == 14 * MIB


def test_a_name_on_two_devices_frees_nothing(kernel, level, client):
    kernel.ledger.set_limits([LevelLimits(level.cgroup, {0: 64 * MIB, 1: 64 * MIB})])
    for device, bytes_ in ((1, 4 * MIB), (0, 6 * MIB), (0, 8 * MIB)):
        client(f"admit({bytes_}, device={device})")
        client(f"managed(0x1000, {bytes_})")
    client("free(0x1000)")
    entry = client.entry(kernel)
    assert (entry.managed[:2], entry.bytes[:2]) == ((14 * MIB, 4 * MIB), (14 * MIB, 4 * MIB))


def test_an_exported_name_frees_nothing(level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client("export_pointer(0x1000)")
    client(f"alloc(0x1000, {6 * MIB})")
    assert (level.used, level.orphaned) == (10 * MIB, 4 * MIB)
    client("free(0x1000)")
    assert (level.used, level.orphaned) == (10 * MIB, 4 * MIB)
    client.kill()
    assert_left(level, 10 * MIB)


@pytest.mark.usefixtures("context_bytes")
def test_exported_memory_whose_name_is_reused_is_orphaned_once(level, client):
    client("retain()")
    client(f"alloc(0x1000, {4 * MIB})")
    client("export_pointer(0x1000)")
    client(f"alloc(0x1000, {6 * MIB})")
    assert level.orphaned == 4 * MIB
    client("primary_release()")
    assert (level.used, level.orphaned) == (10 * MIB, 10 * MIB), "only a probe shows that memory ends with its context"


@pytest.mark.usefixtures("context_bytes")
def test_a_handle_without_an_entry_survives_the_context(kernel, level, client):
    """NVML shows nothing of a process without a context, so no comparison would correct its overhead."""
    client(f"create(7, {8 * MIB})")
    client(f"create(7, {2 * MIB})")
    client("retain()")
    client("primary_release()")
    assert (level.used, client.entry(kernel).overhead[0]) == (10 * MIB, 0)
    client("release(7)")
    assert level.used == 8 * MIB


def test_mappings_of_a_handle_keep_its_entry_when_its_name_is_reused(level, client):
    client(f"create(7, {4 * MIB})")
    client(f"map_(0x100000, {4 * MIB}, 7)")
    client(f"create(7, {4 * MIB})")
    client("release(7)")
    assert level.used == 8 * MIB
    client(f"unmap(0x100000, {4 * MIB})")
    assert level.used == 4 * MIB


def test_a_name_of_an_ended_context_can_be_reused(kernel, level, client):
    before = anomalies(kernel)["STALE"]
    client("retain()")
    client(f"alloc(0x1000, {4 * MIB})")
    client("primary_release()")
    client(f"alloc(0x1000, {6 * MIB})")
    assert (level.used, anomalies(kernel)["STALE"]) == (6 * MIB, before)
    client("free(0x1000)")
    assert level.used == 0


def test_a_name_of_an_ended_context_can_be_reused_after_a_failed_free(kernel, level, client):
    """The driver refuses to free memory that ended with the context."""
    client("retain()")
    client(f"managed(0x1000, {4 * MIB})")
    client("primary_release()")
    client("free(0x1000, code=1)")
    client(f"managed(0x1000, {6 * MIB})")
    client("free(0x1000)")
    assert (level.used, client.entry(kernel).managed[0]) == (0, 0)


@pytest.mark.usefixtures("context_bytes")
def test_a_reused_context_name_is_an_additional_context(kernel, level, client):
    for _ in range(2):
        client("context(0xabc)")
    client("destroy(0xabc)")
    assert client.entry(kernel).contexts[0] == 1


# -- a thread that overwrites returned values


def test_memory_hidden_behind_the_name_of_a_smaller_allocation_is_uncharged_until_nvml_shows_it(kernel, level, client):
    """The driver returned 0x5000 and 0x9000. Another thread replaced both before the return probe read them."""
    client(f"alloc(0x1000, {2 * MIB})")
    client(f"alloc(0x5000, {8 * MIB})")
    client("free(0x5000)")  # the driver frees 2 MiB
    assert level.used == 2 * MIB
    assert_corrected(kernel, client, 6 * MIB)
    assert level.used == 8 * MIB


@pytest.fixture(scope="session")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("liar") / "liar"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{REPOSITORY}/bpf"]
    subprocess.run(["gcc", *flags, "-o", out, HERE / "liar.c", "-ldl"], check=True)
    return out


@pytest.mark.parametrize("library", ["driver", "unknown"])
@pytest.mark.parametrize("seed", [0xF69, 0xBEEF])
def test_no_call_releases_more_than_the_driver_frees_if_forged_names_collide(
    kernel, make_level, liar, scale, library, seed
):
    level = make_level(1 << 40)
    page, before = kernel.ledger.page_fd(level.cgroup), anomalies(kernel)
    command = [liar, getattr(kernel, library), str(page), str(scale(2000, 20_000, 1_000_000)), str(seed)]
    enter = lambda: (level.path / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=[page], preexec_fn=enter) as child:
        os.close(page)
        wrong, given = map(int, child.stdout.readline().split())
        assert (wrong, level.used >= given) == (0, True)
        child.kill()
    assert level.orphaned >= given
    after = anomalies(kernel)
    assert after["STALE"] - before["STALE"] > scale(100, 1000, 50_000), "too few forged names were recorded"
    assert after["RELEASE"] == before["RELEASE"]
