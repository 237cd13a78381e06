"""A driver with its own memory limits of cgroups (r615) is a second limit for programs that bypass the shim.

The simulated driver has these limits as NVIDIA documents them. No real driver with these limits has been tested.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.bypass_kit import Bypass
from tests.e2e.policies_kit import Write
from tests.e2e.test_bypasses import WAYS
from tests.support.commands import events, fgpu
from tests.support.host import CONTEXT, DRIVER_LIMITS, ENVIRONMENT, GIB, MIB, REFUSED
from tests.support.place import Place
from tests.support.service import Service, run_on_devices
from tests.support.tenant import Tenant
from tests.support.wait import eventually

LIMIT = CONTEXT + 400 * MIB
MARGIN = GIB  # the default of drivers.modules in agent.yaml
NONE = (1 << 64) - 1
# Reads, or sets with a third argument, the driver's hard limit of a cgroup on device 0.
NVML = """
import ctypes as C, sys
class Limits(C.Structure):
    _fields_ = [("folder", C.c_char_p), ("soft", C.c_uint64), ("hard", C.c_uint64), ("used", C.c_uint64)]
nvml, handle = C.CDLL("libnvidia-ml.so.1"), C.c_void_p()
assert not nvml.nvmlInit_v2() and not nvml.nvmlDeviceGetHandleByIndex_v2(0, C.byref(handle))
limits = Limits(sys.argv[1].encode(), 0, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
call = nvml.nvmlDeviceSetMemoryLimits_v1 if len(sys.argv) > 2 else nvml.nvmlDeviceGetMemoryLimits_v1
assert call(handle, C.byref(limits)) == 0
print(limits.hard)
"""
Make = Callable[[int | None], Tenant]
pytestmark = pytest.mark.places("cgroups")
inside = pytest.mark.skipif(not DRIVER_LIMITS, reason="is run by test_the_file_s_tests_pass_with_the_driver_s_limits")


@pytest.mark.skipif(DRIVER_LIMITS, reason="this run has this driver already")
def test_the_file_s_tests_pass_with_the_driver_s_limits() -> None:
    run_on_devices(__file__, 1, has_limits=True)


def in_driver(folder: Path, *hard: int) -> int:
    """Return the driver's limit of a cgroup, after setting it if `hard` is given."""
    command = [sys.executable, "-c", NVML, folder, *map(str, hard)]
    return int(subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=True).stdout)


def becomes(one: Tenant, hard: int) -> None:
    eventually(lambda: in_driver(one.cgroup) == hard, 10, f"the limit {hard} in the driver")


@pytest.fixture
def limited(write: Write, place: Place, tenant: Make) -> Tenant:
    """A tenant under a policy, with the policy's limit in the driver."""
    write(f"memory: {{limit: {LIMIT >> 20}MiB}}", selector=f'{{cgroup: ["{place.group.lstrip("/")}/*"]}}')
    one = tenant(None)
    one.assert_enforced()
    becomes(one, LIMIT + MARGIN)
    return one


@inside
@pytest.mark.parametrize("way", ["unset", "raw"])
def test_a_program_around_the_shim_gets_no_more_than_the_margin(limited: Tenant, tmp_path: Path, way: str) -> None:
    client = Bypass(limited, "bypass", WAYS[way](tmp_path))
    for _ in range(MARGIN // (100 * MIB) + 10):
        if not client.do(f"alloc {100 * MIB}").startswith("ok"):
            break
    assert LIMIT + MARGIN - 100 * MIB < limited.driver() <= LIMIT + MARGIN


@inside
def test_a_program_with_the_shim_gets_its_whole_limit(limited: Tenant) -> None:
    client = limited.client()
    for size in (1, 64, 1, 200, 2):
        client.ok(f"alloc {size * MIB}")
    client.ok(f"alloc {LIMIT - limited.driver()}")
    assert client.do(f"alloc {MIB}") == REFUSED
    assert limited.assert_exact() == LIMIT
    told = eventually(lambda: [e["reason"] for e in events("refused") if e["tenant"] == limited.name], 5, "the refusal")
    assert told == ["limit"]  # the driver has refused nothing


@inside
def test_the_driver_s_limit_follows_the_tenant_s_limit_across_a_kill(limited: Tenant, service: Service) -> None:
    fgpu("set", limited.path, "--memory", "2GiB")
    becomes(limited, 2 * GIB + MARGIN)
    service.kill_agent()
    assert in_driver(limited.cgroup) == 2 * GIB + MARGIN
    service.start_agent()
    fgpu("unset", limited.path)
    becomes(limited, LIMIT + MARGIN)


@inside
def test_a_limit_of_another_program_stays_and_is_reported(limited: Tenant) -> None:
    in_driver(limited.cgroup, 7 * GIB)
    eventually(lambda: "limits of another program: 1" in fgpu("doctor", check=False).stdout, 10, "the report")
    assert in_driver(limited.cgroup) == 7 * GIB
    in_driver(limited.cgroup, NONE)
    becomes(limited, LIMIT + MARGIN)
    eventually(lambda: "driver limits" not in fgpu("doctor", check=False).stdout, 10, "no report")


@inside
def test_detach_removes_the_driver_s_limits(limited: Tenant, service: Service) -> None:
    before = limited.cgroup / "before"
    before.mkdir()
    in_driver(before, 9 * GIB)
    fgpu("set", f"{limited.path}/before", "--memory", "1GiB")
    eventually(lambda: in_driver(before) == GIB + MARGIN, 10, "the limit of the inner cgroup")
    assert json.loads(Path("/run/fgpu/driver-limits.json").read_text())["limits"]
    service.detach()
    try:
        assert (in_driver(limited.cgroup), in_driver(before)) == (NONE, 9 * GIB)
        assert not Path("/run/fgpu/driver-limits.json").exists()
    finally:
        before.rmdir()
        service.start_agent()
