"""NVML's limits of a cgroup on the memory of a device, as NVIDIA documents them for driver r615.

No real driver with these functions was available. Sizes on the device are whole granules of 2 MiB.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import pytest

from tests.support.host import cgroup_root
from tests.support.wait import remove_cgroup

from .checkpoint_kit import ask, calling
from .conftest import MIB, Machine, say
from .faults_kit import order
from .sharing_kit import SHARING, hear

CONTEXT = 518 * MIB
NONE = (1 << 64) - 1
INVALID, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, NO_RESOURCES = 2, 3, 4, 6, 23
OUT_OF_MEMORY = 2  # of CUDA
SET, GET = "nvmlDeviceSetMemoryLimits_v1", "nvmlDeviceGetMemoryLimits_v1"

# `put` and `look` call the two functions. Structures for both have the fields of the larger one.
NVML = f"""
N = C.CDLL("libnvidia-ml.so.1")
class Limits(C.Structure):
    _fields_ = [("at", C.c_char_p), ("soft", C.c_ulonglong), ("hard", C.c_ulonglong), ("used", C.c_ulonglong)]
device = C.c_void_p()
assert not N.nvmlInit_v2() and not N.nvmlDeviceGetHandleByIndex_v2(0, C.byref(device))
def put(at, soft, hard): return N.{SET}(device, C.byref(Limits(os.fsencode(at) if at else None, soft, hard)))
def look(at):
    limits = Limits(os.fsencode(at) if at else None, 7, 7, 7)
    return N.{GET}(device, C.byref(limits)), limits.soft, limits.hard, limits.used
"""

# A tenant has a context. It evaluates each line of stdin, and prints the value.
TENANT = f"""
{SHARING}
start()
def block(size): return L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(size))
def vmm(size): return L.cuMemCreate(C.byref(C.c_uint64()), C.c_size_t(size), C.byref(Prop(1, 0, 1, 0)), C.c_uint64(0))
def pooled_block(size): return L.cuMemAllocAsync(C.byref(C.c_uint64()), C.c_size_t(size), None)
def stack(size): return L.cuCtxSetLimit(0, C.c_size_t(size))
def shared_pool_block(size):
    shared.append(pool_descriptor(shared[0]))
    return L.cuMemAllocFromPoolAsync(C.byref(C.c_uint64()), C.c_size_t(size), shared[0], None)
shared = [pool()]
def managed(size):
    at = C.c_uint64()
    need("cuMemAllocManaged", C.byref(at), C.c_size_t(size), 1)
    return L.cuMemsetD8_v2(at, 1, C.c_size_t(size)) or L.cuCtxSynchronize()
say("ready")
for line in sys.stdin: say(eval(line))
"""


@pytest.fixture
def limited(make_machine: Callable[..., Machine]) -> Machine:
    return make_machine(FGPU_SIM_MEMORY_LIMITS="1")


@pytest.fixture
def groups() -> Iterator[Callable[[str], Path]]:
    """Make cgroups below the root, by paths, and remove them at the end. Their processes have ended by then."""
    made: list[Path] = []

    def make(path: str) -> Path:
        first, _, rest = path.partition("/")
        made.append(cgroup_root() / f"sim-limits-{os.getpid()}-{first}" / rest)
        made[-1].mkdir()
        return made[-1]

    yield make
    for folder in reversed(made):
        if folder.exists():
            remove_cgroup(folder)


@pytest.fixture
def tenant(limited: Machine) -> Iterator[Callable[[Path], Popen[str]]]:
    """Start programs in cgroups, and end them."""
    with ExitStack() as stack:

        def start(folder: Path) -> Popen[str]:
            enter = ("sh", "-c", f'echo $$ >{folder}/cgroup.procs; exec "$@"', "-")
            client = stack.enter_context(limited.spawn(TENANT, enter))
            stack.callback(client.kill)
            assert hear(client) == "ready"
            return client

        yield start


def nvml(machine: Machine, *calls: str, prefix: tuple[str, ...] = ()) -> list[object]:
    """Evaluate calls in a new program, outside all cgroups of the tests."""
    script = "\n".join([NVML, *(f"say({call})" for call in calls)])
    with machine.spawn(script, prefix) as client:
        output, _ = client.communicate(timeout=60)
    assert client.returncode == 0
    return [eval(line) for line in output.splitlines()]


def limit(machine: Machine, folder: Path, hard: int, soft: int = 0) -> None:
    assert nvml(machine, f"put({str(folder)!r}, {soft}, {hard})") == [0]


def looked(machine: Machine, folder: Path) -> object:
    return nvml(machine, f"look({str(folder)!r})")[0]


def results(client: Popen[str], *calls: str) -> list[int]:
    """Return the results of CUDA for calls of a tenant. A size is a number of MiB, with `b` a number of bytes."""
    found = []
    for call in calls:
        name, size = call.split()
        say(client, f"{name}({size[:-1] if size.endswith('b') else int(size) * MIB})")
        found.append(int(hear(client)))
    return found


def test_both_functions_are_off_by_default(machine: Machine, groups: Callable[[str], Path]) -> None:
    at = str(groups("a"))
    missing = f"{at}/missing"
    found = nvml(machine, f"put({at!r}, 0, 5)", f"look({at!r})", f"put({missing!r}, 0, 5)")
    assert found == [NOT_SUPPORTED, (NOT_SUPPORTED, 7, 7, 7), NOT_SUPPORTED]


def test_limits_are_set_read_and_cleared(limited: Machine, groups: Callable[[str], Path]) -> None:
    at, other = str(groups("a")), str(groups("b"))
    found = nvml(
        limited,
        *(f"look({at!r})", f"put({at!r}, 3, {1 << 40})", f"look({at!r})", f"look({other!r})"),
        *(f"put({at!r}, 0, 0)", f"look({at + '/'!r})", f"put({at!r}, 0, {NONE})", f"look({at!r})"),
        *(f"put({at!r}, 5, {NONE})", f"look({at!r})"),
    )
    assert found == [
        *((0, 0, NONE, 0), 0, (0, 3, 1 << 40, 0), (0, 0, NONE, 0)),
        *(0, (0, 0, 0, 0), 0, (0, 0, NONE, 0)),
        *(0, (0, 5, NONE, 0)),
    ]


def test_bad_arguments_and_users_without_root_are_refused(limited: Machine, groups: Callable[[str], Path]) -> None:
    at = str(groups("a"))
    folders = (f"{at}/missing", f"{at}/cgroup.procs", "/tmp", at.lstrip("/"), "")
    found = nvml(
        limited,
        *(f"N.{SET}(device, None)", f"N.{GET}(device, None)", f"N.{SET}(None, C.byref(Limits({at.encode()!r}, 0, 5)))"),
        *("put(None, 0, 5)", "look(None)", f"put({at!r}, 6, 5)", f"look({at!r})"),
        *(f"put({folder!r} or '/', 0, 5)" for folder in folders),
        *(f"look({folder!r} or '/')[0]" for folder in folders),
    )
    assert found[:7] == [INVALID] * 4 + [(INVALID, 7, 7, 7), INVALID, (0, 0, NONE, 0)]
    assert found[7:] == [NOT_FOUND] * 2 * len(folders)
    call = f"put({at!r}, 0, 5)"
    assert nvml(limited, call, prefix=("setpriv", "--reuid=65534", "--clear-groups")) == [NO_PERMISSION]
    assert nvml(limited, call, prefix=("unshare", "--pid", "--fork")) == [NO_PERMISSION]
    assert looked(limited, Path(at)) == (0, 0, NONE, 0)


def test_allocations_succeed_up_to_the_hard_limit(
    limited: Machine, groups: Callable[[str], Path], tenant: Callable[[Path], Popen[str]]
) -> None:
    at = groups("a")
    limit(limited, at, CONTEXT + 100 * MIB, soft=MIB)
    client = tenant(at)
    assert looked(limited, at) == (0, MIB, CONTEXT + 100 * MIB, CONTEXT)
    assert results(client, "block 60", "vmm 40") == [0, 0]
    assert results(client, "block 1b", "vmm 2", "pooled_block 1") == [OUT_OF_MEMORY] * 3
    assert looked(limited, at) == (0, MIB, CONTEXT + 100 * MIB, CONTEXT + 100 * MIB)
    limit(limited, at, CONTEXT + 134 * MIB - 1)
    assert results(client, "vmm 34", "pooled_block 1", "block 1b") == [OUT_OF_MEMORY, 0, OUT_OF_MEMORY]
    limit(limited, at, CONTEXT + 134 * MIB)
    assert results(client, "block 1b", "stack 16384b") == [0, OUT_OF_MEMORY]
    limit(limited, at, 1)  # takes nothing away
    assert results(client, "block 1b", "block 2") == [0, OUT_OF_MEMORY]  # the first is in a granule that has room
    limit(limited, at, NONE)
    assert results(client, "block 200", "vmm 200", "stack 16384b") == [0, 0, 0]


def test_a_context_needs_room_below_the_limit(limited: Machine, groups: Callable[[str], Path]) -> None:
    at = groups("a")
    enter = ("sh", "-c", f'echo $$ >{at}/cgroup.procs; exec "$@"', "-")
    for hard, expected in ((CONTEXT - 1, "failed cuDevicePrimaryCtxRetain 2"), (CONTEXT, "ready")):
        limit(limited, at, hard)
        with limited.spawn(TENANT, enter) as client:
            assert hear(client) == expected
            client.kill()


def test_a_pool_that_can_be_shared_grows_up_to_the_limit(
    limited: Machine, groups: Callable[[str], Path], tenant: Callable[[Path], Popen[str]]
) -> None:
    at = groups("a")
    limit(limited, at, CONTEXT + 66 * MIB)
    client = tenant(at)
    assert results(client, *["shared_pool_block 32"] * 3, "block 2") == [0, 0, OUT_OF_MEMORY, 0]
    assert looked(limited, at) == (0, 0, CONTEXT + 66 * MIB, CONTEXT + 66 * MIB)


def test_processes_of_a_cgroup_share_its_limit(
    limited: Machine, groups: Callable[[str], Path], tenant: Callable[[Path], Popen[str]]
) -> None:
    at, elsewhere = groups("a"), groups("ab")  # the second name only begins like the first
    limit(limited, at, 2 * CONTEXT + 100 * MIB)
    first, second, other = tenant(at), tenant(at), tenant(elsewhere)
    assert results(first, "block 60") == [0]
    assert results(second, "block 42", "block 40", "block 2") == [OUT_OF_MEMORY, 0, OUT_OF_MEMORY]
    assert results(other, "block 200") == [0]
    assert looked(limited, elsewhere) == (0, 0, NONE, CONTEXT + 200 * MIB)
    assert looked(limited, cgroup_root()) == (0, 0, NONE, 3 * CONTEXT + 300 * MIB)
    first.kill()
    first.wait()
    assert results(second, "vmm 58") == [OUT_OF_MEMORY]  # the memory of a process outlives it
    limited.settles_at(limited.used() - CONTEXT - 60 * MIB - 5832704)
    assert results(second, "vmm 60") == [0]


def test_a_nested_cgroup_is_bounded_by_the_outer_one(
    limited: Machine, groups: Callable[[str], Path], tenant: Callable[[Path], Popen[str]]
) -> None:
    outer, inner = groups("a"), groups("a/inner")
    limit(limited, outer, 2 * CONTEXT + 100 * MIB)
    limit(limited, inner, CONTEXT + 60 * MIB)
    above, below = tenant(outer), tenant(inner)
    assert results(below, "block 62", "block 60") == [OUT_OF_MEMORY, 0]
    assert results(above, "block 42", "block 38") == [OUT_OF_MEMORY, 0]
    limit(limited, inner, NONE)
    assert results(below, "block 4", "block 2") == [OUT_OF_MEMORY, 0]
    assert looked(limited, inner) == (0, 0, NONE, CONTEXT + 62 * MIB)
    assert looked(limited, outer) == (0, 0, 2 * CONTEXT + 100 * MIB, 2 * CONTEXT + 100 * MIB)


def test_managed_memory_is_not_limited(
    limited: Machine, groups: Callable[[str], Path], tenant: Callable[[Path], Popen[str]]
) -> None:
    at = groups("a")
    limit(limited, at, CONTEXT)
    client = tenant(at)
    assert results(client, "managed 200", "block 1b") == [0, OUT_OF_MEMORY]
    assert looked(limited, at) == (0, 0, CONTEXT, CONTEXT)


def test_a_cgroup_that_is_made_again_has_no_limit(
    limited: Machine, groups: Callable[[str], Path], tenant: Callable[[Path], Popen[str]]
) -> None:
    before = limited.descriptors()
    at = groups("a")
    limit(limited, at, CONTEXT)
    limited.has_descriptors(before + 1)
    at.rmdir()
    at.mkdir()
    assert looked(limited, at) == (0, 0, NONE, 0)
    assert results(tenant(at), "block 200") == [0]
    limit(limited, at, 0)  # the server forgets the removed cgroup when it stores another limit
    limit(limited, at, NONE)
    subprocess.run(["kill", *(at / "cgroup.procs").read_text().split()], check=True)
    limited.has_descriptors(before)


def test_each_device_has_its_own_limit(make_machine: Callable[..., Machine], groups: Callable[[str], Path]) -> None:
    machine = make_machine(FGPU_SIM_MEMORY_LIMITS="1", FGPU_SIM_GPUS="2")
    at = groups("a")
    limit(machine, at, CONTEXT)
    enter = ("sh", "-c", f'echo $$ >{at}/cgroup.procs; exec "$@"', "-")
    for device, expected in ((0, OUT_OF_MEMORY), (1, 0)):
        with machine.spawn(TENANT.replace("start()", f"start({device})"), enter) as client:
            assert hear(client) == "ready"
            assert results(client, "block 2") == [expected]
            client.kill()


def test_the_number_of_limits_is_bounded(make_machine: Callable[..., Machine], groups: Callable[[str], Path]) -> None:
    """The table is full after 1,024 limits, here 64 on each of 16 devices. A removed cgroup makes room for others."""
    machine = make_machine(FGPU_SIM_MEMORY_LIMITS="1", FGPU_SIM_GPUS="16")
    outer, folders = groups("a"), [groups(f"a/{i}") for i in range(64)]
    fill = f"""[
    N.nvmlDeviceGetHandleByIndex_v2(i, C.byref(device)) or put(f'{outer}/{{name}}', 0, 5)
    for i in range(16) for name in range(64)
]"""
    limit = f"put({str(outer)!r}, 0, 5)"
    assert nvml(machine, f"set({fill})", limit) == [{0}, NO_RESOURCES]
    folders[3].rmdir()
    assert nvml(machine, limit) == [0]


def test_a_checkpointed_process_returns_only_within_the_limit(
    limited: Machine, groups: Callable[[str], Path], tenant: Callable[[Path], Popen[str]]
) -> None:
    at = groups("a")
    client = tenant(at)
    assert results(client, "block 100") == [0]
    with calling(limited) as caller:
        assert ask(caller, f"park({client.pid})") == "(0, 0)"
        for hard, expected in ((CONTEXT + 100 * MIB - 1, OUT_OF_MEMORY), (CONTEXT + 100 * MIB, 0)):
            limit(limited, at, hard)
            assert looked(limited, at) == (0, 0, hard, 0)
            assert ask(caller, f"restore({client.pid})") == str(expected)
    assert looked(limited, at) == (0, 0, CONTEXT + 100 * MIB, CONTEXT + 100 * MIB)


def test_a_limit_that_waits_for_the_end_of_a_stall_is_set(limited: Machine, groups: Callable[[str], Path]) -> None:
    before, at = limited.descriptors(), groups("a")
    script = f"{NVML}\nsay('ready'); wait(); say(put({str(at)!r}, 0, 5))"
    with limited.spawn(script) as client:
        assert hear(client) == "ready"
        order(limited, "nvml-stall:300ms")
        say(client)
        assert hear(client) == "0"
    assert looked(limited, at) == (0, 0, 5, 0)
    limited.has_descriptors(before + 1)
