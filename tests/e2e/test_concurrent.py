"""A concurrent device: tenants with a share of time use MPS, and launch at the same time.

The simulated device of this file runs the kernels of one program at a time, also of programs that use MPS.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.concurrent_kit import shared
from tests.e2e.policies_kit import Write
from tests.e2e.spin_kit import SECONDS, together
from tests.support.commands import ask
from tests.support.host import BUILD, ENVIRONMENT, FGPU
from tests.support.service import Service
from tests.support.wait import eventually

pytestmark = pytest.mark.timed
KERNEL_SECONDS = 200e-6


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the benchmark's program that prints whether it uses MPS."""
    source, out = Path(__file__).parents[2] / "bench/programs/writes.c", tmp_path_factory.mktemp("writes") / "writes"
    subprocess.run(
        ["gcc", "-std=gnu11", "-O2", f"-I{BUILD}/headers", "-o", out, source, "-ldl"], check=True, timeout=60
    )
    return out


def mps(program: Path, *options: str) -> str:
    """Return what a program in a tenant prints about MPS."""
    command = [*FGPU, "run", "--memory", "1GiB", *options, "--", program]
    done = subprocess.run(command, input="\n", capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=True)
    return done.stdout.splitlines()[0]


def test_programs_with_a_share_of_a_concurrent_device_use_mps(concurrent: Service, writes: Path) -> None:
    assert ask(verb="snapshot")["devices"][0]["sharing"] == "concurrent"
    assert mps(writes, "--weight", "100") == "ready 1"
    assert mps(writes) == "ready 0"  # without a share of time nothing would hold the program


def test_a_policy_keeps_programs_out_of_mps(concurrent: Service, write: Write, writes: Path) -> None:
    write("compute: {isolation: own}", selector='{cgroup: ["**"]}')
    assert mps(writes, "--weight", "100") == "ready 0"
    write("compute: {isolation: shared}", selector='{cgroup: ["**"]}')
    assert mps(writes, "--weight", "100") == "ready 1"


def test_programs_of_other_devices_do_not_use_mps(service: Service, unharmed: None, writes: Path) -> None:
    assert ask(verb="snapshot")["devices"][0]["sharing"] == "turns"
    assert mps(writes, "--weight", "100") == "ready 0"


def test_busy_tenants_run_at_the_same_time(concurrent: Service, start) -> None:
    first, second = start("first", "--weight", "300"), start("second", "--weight", "100")
    before = shared()
    for one in (first, second):
        one.begin(8)
    # Changes between two busy programs cost time here, so together they do less than under turns: then a trial ends.
    eventually(lambda: shared() > before + 0.3, 8, "concurrency")
    assert all(one.kernels() > 0 for one in (first, second))


def test_a_ceiling_holds_beside_a_tenant_that_runs_at_the_same_time(concurrent: Service, start) -> None:
    most = SECONDS / KERNEL_SECONDS  # kernels that the device can run
    first, second = start("first", "--compute", "25%"), start("second", "--weight", "100")
    before = shared()
    together(first, second)  # until the costs are known
    done = together(first, second)
    assert shared() > before
    assert 0 < done[0] / most < 0.33
    assert done[1] > done[0]


def test_tenants_go_on_after_the_gatekeeper_was_killed(concurrent: Service, start) -> None:
    first, second = start("first", "--weight", "100"), start("second", "--weight", "100")
    before = shared()
    for one in (first, second):
        one.begin(12)
    eventually(lambda: shared() > before, 10, "concurrency")
    concurrent.kill_gatekeeper()
    eventually(concurrent.gatekeepers, 3, "another gatekeeper")
    eventually(lambda: shared() > 0.3, 12, "concurrency again")
    assert all(one.kernels() > 0 for one in (first, second))
