"""A limit is exact to the byte, whichever call allocates, and programs of the tenant read its share."""

from __future__ import annotations

import pytest

from tests.support.commands import ask, fgpu, output
from tests.support.host import CONTEXT, GIB, KIB, MIB, REFUSED
from tests.support.place import group
from tests.support.wait import Deadline, eventually

PLAIN, VMM, MANAGED = 0, 1, 2
ROOM = 82 * MIB


@pytest.mark.parametrize(
    ("step", "how", "takes", "odd"),
    [
        pytest.param(MIB, PLAIN, 2 * MIB, 0, id="1MiB"),  # two allocations share a block of 2 MiB
        pytest.param(2 * MIB, PLAIN, 2 * MIB, 0, id="2MiB"),
        pytest.param(2 * MIB, PLAIN, 2 * MIB, 1, id="2MiB-and-a-byte-to-spare"),
        pytest.param(2 * MIB, PLAIN, 2 * MIB, -1, id="2MiB-and-a-byte-too-few"),
        pytest.param(3 * MIB, PLAIN, 4 * MIB, 0, id="3MiB"),
        pytest.param(4 * KIB, PLAIN, 2 * MIB, 0, id="4KiB"),
        pytest.param(2 * MIB, VMM, 2 * MIB, 0, id="vmm"),
        pytest.param(2 * MIB, MANAGED, 2 * MIB, 0, id="managed"),
    ],
)
def test_a_limit_is_enforced_to_the_byte(tenant, step: int, how: int, takes: int, odd: int) -> None:
    limit = CONTEXT + ROOM + odd
    fits = (ROOM + odd) // takes * takes
    one = tenant(limit)
    client = one.client()
    client.ok("context")
    shared = max(0, 2 * MIB - step)
    with one.growing(fits, shared):
        client.ok(f"fill {step} {how}")
    memory = one.memory()
    assert memory["used_bytes"] == one.assert_exact() == CONTEXT + fits
    assert memory["limit_bytes"] == limit
    # NVML counts whole blocks. Until the next comparison, the rest of a block and the pieces in it are both charged.
    assert memory["peak_bytes"] <= limit + shared
    assert memory["refused"] >= 1
    assert client.do(f"alloc {takes}") == REFUSED


@pytest.mark.parametrize("via", ["", "proc"], ids=["dlsym", "cuGetProcAddress"])
def test_freed_memory_can_be_allocated_again(tenant, via: str) -> None:
    one = tenant(CONTEXT + ROOM)
    client = one.client(via)
    client.ok("context")
    for _ in range(3):
        with one.growing(ROOM):
            (taken,) = client.ok(f"fill {2 * MIB} {PLAIN}")
        client.ok(f"drop {taken}")
        assert one.assert_exact() == CONTEXT
    assert one.memory()["peak_bytes"] == CONTEXT + ROOM


@pytest.mark.places("host", "runc")
def test_mapped_memory_stays_charged_after_its_handle_is_released(tenant) -> None:
    one = tenant(CONTEXT + ROOM)
    client = one.client()
    client.ok("context")
    with one.growing(60 * MIB):
        (mapped,) = client.ok(f"vmm {40 * MIB}")  # its handle has been released already
        (handle,) = client.ok(f"create {20 * MIB}")
    assert client.do(f"create {40 * MIB}") == REFUSED
    client.ok(f"unmap {mapped} {40 * MIB}")
    client.ok(f"release {handle}")
    assert one.assert_exact() == CONTEXT
    with one.growing(ROOM):
        client.ok(f"create {ROOM}")


@pytest.mark.places("host", "runc")
def test_a_context_is_charged_and_released(tenant) -> None:
    one = tenant(2 * CONTEXT - 1)
    one.assert_enforced()
    first, second = one.client(), one.client()
    first.ok("context")
    assert one.assert_exact() == CONTEXT
    assert second.do("context") == REFUSED
    assert one.assert_exact() == CONTEXT
    first.ok("dropcontext")
    second.ok("context")
    assert one.assert_exact() == CONTEXT


@pytest.mark.every_place
def test_a_tenant_s_program_reads_its_share_as_the_device_s_memory(tenant) -> None:
    limit = CONTEXT + 200 * MIB
    one, other = tenant(limit), tenant(2 * GIB)
    client, neighbour = one.client(), other.client()
    assert client.ok("total") == [limit]
    assert client.ok("info") == [200 * MIB, limit]
    neighbour.ok(f"alloc {300 * MIB}")
    with one.growing(52 * MIB):
        client.ok(f"alloc {51 * MIB}")
    assert client.ok("info") == client.ok("info.apart") == [148 * MIB, limit]
    assert neighbour.ok("info") == [2 * GIB - CONTEXT - 300 * MIB, 2 * GIB]


def test_nvidia_smi_in_a_tenant_shows_the_tenant_s_share_and_processes(tenant) -> None:
    one, other = tenant(CONTEXT + 200 * MIB), tenant(2 * GIB)
    client, neighbour = one.client(), other.client()
    neighbour.ok(f"alloc {300 * MIB}")
    with one.growing(100 * MIB):
        client.ok(f"alloc {100 * MIB}")
    one.assert_exact()
    held, limit = (CONTEXT + 100 * MIB) // MIB, (CONTEXT + 200 * MIB) // MIB
    eventually(lambda: str(held) in one.run("nvidia-smi --query-compute-apps=used_memory --format=csv"), 3)
    table = one.run("nvidia-smi")
    assert f"{held}MiB / {limit:6}MiB" in table
    query = "nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader,nounits"
    assert one.run(query).split("\n")[:-1] == [f"{client.inner_pid}, {held}"]
    assert one.run("nvidia-smi --query-gpu=memory.total,memory.used --format=csv,noheader,nounits").split() == [
        f"{limit},",
        str(held),
    ]


ABSURD = (
    f"alloc {2**64 - 1}",
    f"alloc {2**63}",
    f"alloc {2**64 - 2 * MIB + 1}",
    f"vmm {2**64 - 2 * MIB}",
    f"create {2**63}",
    f"managed {2**64 - 1}",
    f"pitch {2**63} 4",
    f"pitch {2**33} {2**33}",
    "alloc 0",
)


@pytest.mark.places("host", "runc")
def test_sizes_of_zero_and_near_the_end_of_the_integer_range_are_refused(tenant) -> None:
    one = tenant(CONTEXT + ROOM)
    client = one.client()
    client.ok("context")
    for command in ABSURD:
        with one.growing(0):
            assert client.do(command).startswith("CUDA_ERROR_"), command
        assert one.assert_exact() == CONTEXT, command
    with one.growing(ROOM):
        client.ok(f"alloc {ROOM}")


@pytest.mark.places("host", "runc")
def test_a_full_tenant_does_not_affect_its_neighbour(tenant) -> None:
    one, other = tenant(CONTEXT + ROOM), tenant(CONTEXT + ROOM)
    greedy, neighbour = one.client(), other.client()
    greedy.ok("context")
    neighbour.ok("context")
    with one.growing(ROOM):
        greedy.ok(f"fill {2 * MIB} {PLAIN}")
    with other.growing(ROOM):
        neighbour.ok(f"alloc {ROOM}")
    assert one.assert_exact() == other.assert_exact() == CONTEXT + ROOM
    assert other.memory()["refused"] == 0


@pytest.mark.places("host", "runc")
def test_a_group_s_limit_applies_to_the_sum_of_its_tenants(place, tenant) -> None:
    one, other = tenant(2 * GIB), tenant(2 * GIB)
    with group(place, 2 * CONTEXT + ROOM) as whole:
        first, second = one.client(), other.client()
        first.ok("context")
        second.ok("context")
        with one.growing(ROOM - 20 * MIB):
            first.ok(f"alloc {ROOM - 20 * MIB}")
        with other.growing(20 * MIB):
            second.ok(f"fill {2 * MIB} {PLAIN}")
        assert first.do(f"alloc {2 * MIB}") == REFUSED
        assert first.ok("info") == [0, 2 * CONTEXT + ROOM]  # the smaller of both levels' values
        assert one.assert_exact() + other.assert_exact() == whole()["used_bytes"] == 2 * CONTEXT + ROOM
        assert whole()["refused"] == 2  # at the level that refused
        assert one.memory()["refused"] == other.memory()["refused"] == 0
        first.kill()
        eventually(lambda: whole()["used_bytes"] == CONTEXT + 20 * MIB, 1)


@pytest.mark.places("host", "runc")
def test_a_changed_limit_applies_to_a_running_program(tenant) -> None:
    one = tenant(CONTEXT + 20 * MIB)
    client = one.client()
    client.ok("context")
    with one.growing(20 * MIB):
        client.ok(f"fill {2 * MIB} {PLAIN}")
    fgpu("set", one.path, "--memory", f"{CONTEXT + 50 * MIB}B")
    assert client.ok("info") == [30 * MIB, CONTEXT + 50 * MIB]
    with one.growing(30 * MIB):
        client.ok(f"fill {2 * MIB} {PLAIN}")
    fgpu("set", one.path, "--memory", f"{CONTEXT + 10 * MIB}B")  # below the bytes in use
    free, total = client.ok("info")
    assert (free, total) == (0, CONTEXT + 10 * MIB)
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    client.ok("drop 21")
    with one.growing(2 * MIB):
        client.ok(f"alloc {2 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED


@pytest.mark.places("host")
def test_a_limit_without_a_unit_is_refused_and_a_percentage_is_of_the_device(tenant) -> None:
    one = tenant(GIB)
    one.client()  # so that the tenant exists
    for words in (["set", one.path], ["run"]):
        command = [] if words[0] == "set" else ["--", "true"]
        done = fgpu(*words, "--memory", "6", *command, check=False)
        assert "'6' has no unit: did you mean 6GiB?" in done.stderr, done
    assert one.memory()["limit_bytes"] == GIB
    asked = ask(verb="put", target=one.path, memory="50%")
    usable = next(device for device in ask(verb="snapshot")["devices"])["capacity_bytes"]
    assert usable // 2 - 64 * MIB <= one.memory()["limit_bytes"] <= usable // 2, asked
    fgpu("set", one.path, "--memory", "2GiB")
    assert one.memory()["limit_bytes"] == 2 * GIB, "the limit of the last command is not in force"
    done = fgpu("run", "--memory", "12.5%", "--", "nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader")
    assert 1900 <= int(done.stdout.split()[0]) <= 2048, done


@pytest.mark.slow
@pytest.mark.places("host", "runc")
def test_unset_removes_the_limit_of_a_running_program(tenant) -> None:
    one = tenant(CONTEXT + 20 * MIB)
    client = one.client()
    client.ok("context")
    assert client.do(f"alloc {GIB}") == REFUSED
    fgpu("unset", one.path)
    eventually(lambda: client.do(f"alloc {GIB}").startswith("ok"), 3, "memory without a limit")
    assert client.ok("info")[1] > 15 * GIB
    assert not any(t["path"] == one.path for t in ask(verb="snapshot")["tenants"])


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.places("runc")
def test_a_container_without_a_limit_is_not_limited_or_delayed(place, tenant) -> None:
    one, free = tenant(CONTEXT + ROOM), place.tenant(None)
    client, stranger = one.client(), free.client()
    deadline = Deadline(1)
    stranger.ok("context")
    stranger.ok(f"alloc {4 * GIB}")
    assert not deadline.is_over()
    assert stranger.ok("info")[1] > 15 * GIB
    assert not any(t["path"] == free.path for t in ask(verb="snapshot")["tenants"])
    eventually(lambda: ask(verb="snapshot")["devices"][0]["unmanaged_bytes"] == CONTEXT + 4 * GIB, 3)
    assert output("status")["devices"][0]["unmanaged_processes"] == 1
    with one.growing(ROOM):
        client.ok(f"alloc {ROOM}")
    assert stranger.do(f"alloc {16 * GIB}") == REFUSED  # the driver's own error
    fgpu("set", free.path, "--memory", "1GiB")  # less than the container holds
    eventually(lambda: stranger.do(f"alloc {2 * MIB}") == REFUSED, 2, "the limit's first refusal")
    assert free.assert_exact() >= CONTEXT + 4 * GIB  # plus what it allocated before its shim had read the limit
    assert [stranger.do(f"alloc {2 * MIB}") for _ in range(20)] == [REFUSED] * 20
