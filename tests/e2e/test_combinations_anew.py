"""More rows of the table of combinations in docs/faults.md: faults that restart fgpu or the tenants.

The faults are another build of fgpu, another layout, `fgpu detach`, a boot, full tables, containers that start again
under their names, and an agent that is stopped until the watchdog kills it. Every fault affects tenants with all
features at once, as in test_combinations.py, with the columns of combination_kit.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.combination_host_kit import NEWER, Host, assert_unlimited_by_hand, is_tenant, newer_build
from tests.e2e.combination_kit import HEAD, Fault, assert_holds, column, held, inside
from tests.e2e.held_kit import LIMIT, STEP, Held
from tests.e2e.layout_kit import PINS, Version, change
from tests.support.commands import fgpu, metrics
from tests.support.containers.docker import Docker
from tests.support.host import BUILD, GPUS, REFUSED, RUN_DIR, SHIM
from tests.support.place import Cgroups
from tests.support.service import Service, run_on_devices
from tests.support.wait import eventually, remove_cgroup

GREEDY = 'selector: {cgroup: ["GROUP/greedy", "GROUP/greedy/**"]}, memory: {limit: 1GiB}'
LEVELS, PROCESSES = 512, 4096  # of one workload, by default


# -- faults


def frozen(host: Host) -> None:
    """Stop the agent with SIGSTOP, and then kill it, as systemd does (WatchdogSec= and WatchdogSignal=SIGKILL)."""
    assert host.service.agent
    host.service.agent.send_signal(signal.SIGSTOP)
    until = time.monotonic() + host.scale(10, 10, 35)
    while time.monotonic() < until:
        host.check_programs()
        time.sleep(0.5)
    host.restart()


def entries(table: str) -> float:
    return metrics()["fgpu_map_entries", frozenset({("map", table)})]


def full_tables(host: Host) -> None:
    """Fill the tables of one workload: the largest numbers of cgroups with limits and of processes that it may have."""
    root = host.columns["turns"].tenant.cgroup.parent / "greedy"
    text = GREEDY.replace("GROUP", host.group.group.lstrip("/"))
    file, others = host.service.policies / "greedy.yaml", entries("levels")
    file.write_text(f"{HEAD}metadata: {{name: greedy}}\nspec: {{{text}}}\n")
    eventually(lambda: not fgpu("reload", check=False).returncode, 5, "the policy")
    for number in range(LEVELS + 10):
        (root / f"{number}").mkdir(parents=True)
    eventually(lambda: entries("levels") >= others + LEVELS, 60, "all levels that a workload may have")
    late = host.group.named("greedy/late")
    assert late.client().do("context") == REFUSED
    assert f"has {LEVELS} of {LEVELS} levels" in fgpu("events").stdout
    host.check()
    host.restart()
    host.check()
    crowd = [BUILD / "e2e/throng", SHIM, root / "0", str(PROCESSES + 10)]
    with subprocess.Popen(crowd, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            assert entries("processes") >= PROCESSES
            host.check_programs()
        finally:
            (root / "0/cgroup.kill").write_text("1")
    late.end()
    host.group.tenants.remove(late)
    for folder in [*root.glob("*/"), root]:
        remove_cgroup(folder, 30)
    file.unlink()
    eventually(lambda: not fgpu("reload", check=False).returncode, 5, "good policies")


def containers_again(host: Host, is_agent_away: bool) -> None:
    """End every tenant, and start another with the same name: its path is the same, its cgroup is new."""
    name = host.columns["by label"].tenant.name
    if is_agent_away:
        host.service.kill_agent()
    host.end_tenants()
    tenants = host.start_tenants()
    if is_agent_away:
        host.service.start_agent()
    assert tenants["by label"].name == name
    assert_unlimited_by_hand(tenants["by hand"])
    host.columns = held(tenants)


def upgraded(host: Host) -> None:
    """Start gatekeeper and agent of another build over running tenants, and then those of the first build again."""
    this, newer = host.versions[0], newer_build(host.work / "newer")
    change(host.service, this, host.store, signal.SIGTERM)
    with host.preloading(host.store / "current/libfgpu.so"):
        for build in (newer, this):
            host.service.kill_agent(signal.SIGTERM)
            host.end_gatekeeper()
            build.start(host.service, host.store)
            host.check()
            shown = {dict(labels)["version"] for name, labels in metrics() if name == "fgpu_build_info"}
            assert (shown == {NEWER}) is (build is newer)
            assert (host.store / "current/libfgpu.so").read_bytes() == build.shim.read_bytes()
            host.programs_anew(*host.columns)
            host.check()
    host.restart(signal.SIGTERM)


def assert_older(name: str, one: Held) -> None:
    """Check that a program of the other layout keeps its memory and gets no more, and that its tenant is `counted`."""
    tenant = one.tenant
    for device, bytes_ in one.bytes.items():
        one.client.ok(f"device {device}")
        assert one.client.do(f"alloc {STEP}") == REFUSED
        assert tenant.driver_by_device()[device] == bytes_
    new = tenant.client()
    assert new.do("context") == REFUSED
    new.close()
    eventually(lambda: one.ledger() == one.bytes, 10, f"the ledger of {name}: {one.ledger()}")
    eventually(lambda: tenant.view()["enforcement"] == "counted", 5, f"{name} is counted")


def other_layout(host: Host) -> None:
    """Upgrade to the next layout after SIGTERM of the agent. Downgrade to this layout after SIGKILL."""
    this, newer = host.versions
    change(host.service, this, host.store, signal.SIGTERM)
    with host.preloading(host.store / "current/libfgpu.so"):
        for to, how in ((newer, signal.SIGTERM), (this, signal.SIGKILL)):
            change(host.service, to, host.store, how)
            for name, one in host.held().items():
                if name != "by label" or to is newer:
                    assert_older(name, one)
            names = [name for name in host.columns if name != "by label" or to is this]
            host.programs_anew(*names)
            for name in names:
                host.columns[name].check()
    host.restart(signal.SIGTERM)


def detached(host: Host) -> None:
    """Run `fgpu detach`, which removes all limits.

    The next agent restores the policies' limits and charges held memory.
    """
    host.service.detach()
    extra = {name: unlimited(one) for name, one in host.held().items()}
    host.service.start_agent()
    by_hand, orphaned = host.columns["by hand"].tenant, host.columns["orphaned memory"].tenant
    assert not is_tenant(by_hand)
    fgpu("set", by_hand.path, "--memory", f"{LIMIT}B", "--device", "0")
    for name, one in host.held().items():
        assert_limited_again(name, one, extra[name])
    eventually(lambda: orphaned.memory()["limit_bytes"] == LIMIT, 10, "the limit of the tenant with orphaned memory")
    assert orphaned.memory()["used_bytes"] == 0
    for pid in orphaned.pids():
        if pid not in (orphaned.hub.pid, host.columns["orphaned memory"].client.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    host.programs_anew(*host.columns)
    host.columns["orphaned memory"] = column("orphaned memory", orphaned)


def unlimited(one: Held) -> dict[int, int]:
    """Allocate memory beyond the limit on each device in a running program. Return its addresses by device."""
    found = {}
    for device in one.bytes:
        one.client.ok(f"device {device}")
        said = eventually(lambda: (said := one.client.do(f"alloc {STEP}")).startswith("ok") and said, 5, "no limit")
        (found[device],) = one.client.numbers(said)
    return found


def assert_limited_again(name: str, one: Held, extra: dict[int, int]) -> None:
    """Check that a program that ran across the detach is charged, and has its limit from its next initialisation on.

    Until then it is not refused. Its tenant is `counted` because it has allocated meanwhile. A program that starts gets
    nothing beyond the limit.
    """
    beyond = {device: bytes_ + STEP for device, bytes_ in one.bytes.items()}
    eventually(lambda: one.ledger() == beyond, 10, f"{name}: the charge of the held memory")
    last = list(one.bytes)[-1]
    (at,) = one.client.ok(f"alloc {STEP}")
    eventually(lambda: one.ledger()[last] == beyond[last] + STEP, 5, f"{name}: more is charged")
    one.client.ok(f"free {at}")
    eventually(lambda: one.tenant.view()["enforcement"] == "counted", 5, f"{name} is counted")
    assert one.tenant.view()["bypassing"] == {"no_admission": 1}
    for device in one.bytes:
        one.client.ok(f"device {device}")
        assert one.client.do(f"alloc {STEP}") == REFUSED, name
        one.client.ok(f"free {extra[device]}")
    eventually(lambda: one.ledger() == one.bytes == one.tenant.driver_by_device(), 5, f"{name}: released")
    new = one.tenant.client()
    assert new.do("context") == REFUSED, name
    new.close()


def booted(host: Host) -> None:
    """Leave no process, cgroup, pin or file under /run, as a boot does. /var stays, and the policies have an error."""
    host.service.kill_agent()
    host.service.kill_gatekeeper()
    host.end_tenants()
    shutil.rmtree(PINS)
    for path in RUN_DIR.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    broken = host.service.policies / "zz.yaml"
    broken.write_text("x: [")
    host.service.start_agent()
    tenants = host.start_tenants()
    assert_unlimited_by_hand(tenants["by hand"])
    host.columns = held(tenants)
    host.check()
    broken.unlink()
    eventually(lambda: not fgpu("reload", check=False).returncode, 5, "good policies")


def same(text: str, **others: str) -> dict[str, str]:
    """Return the cells of a fault after which the tenants with a limit by policy have the same state.

    Args:
        text: the state of these tenants.
        others: the other columns' cells; `_` in a name stands for a space.
    """
    by_policy = dict.fromkeys(("turns", "two GPUs", "two levels"), text)
    return by_policy | {name.replace("_", " "): cell for name, cell in others.items()}


NEW, FREE = "the new cgroup has the limit of its policy, and no charge", "the new cgroup has its policy, and no charge"
GONE = "the limit is removed: the new cgroup has no limit"
LAST = "the memory is freed with the last process of the old cgroup"
COUNTED = "the tenant is `counted` until the program is started again"
AGAIN = "the limit holds for new programs; = when all programs are started again"
FAULTS: dict[str, Fault[Host]] = {
    "the agent hangs and is killed + restart": Fault(
        frozen, {"two GPUs": "=; the first use of a device waits for 2 s at most"}
    ),
    "full tables, + restart": Fault(full_tables),
    "containers start again": Fault(
        partial(containers_again, is_agent_away=False),
        same(
            NEW,
            by_hand=GONE,
            by_label=f"when the engine has reported the label, {NEW}",
            observe=FREE,
            orphaned_memory=LAST,
        ),
    ),
    "containers start again while the agent is not running": Fault(
        partial(containers_again, is_agent_away=True),
        same(
            f"when the agent runs again, {NEW}",
            by_hand=GONE,
            by_label=f"when the agent runs again and the engine has reported the label, {NEW}",
            observe=f"when the agent runs again, {FREE}",
            orphaned_memory=LAST,
        ),
    ),
    "upgrade": Fault(upgraded, {"by label": "=; the container keeps the shim with which the container was started"}),
    "another layout and back": Fault(
        other_layout,
        same(
            COUNTED,
            by_hand=COUNTED,
            by_label="the tenant is `counted` until the container is started again",
            observe="a running program gets no more memory until the program is started again; a program that starts is"
            " counted and never refused",
        ),
    ),
    "`fgpu detach` + a new agent": Fault(
        detached,
        same(
            AGAIN,
            by_hand=f"no limit until `fgpu set` sets the limit again; afterwards, {AGAIN}",
            by_label=AGAIN,
            observe="the memory of running programs is charged again; nothing is refused",
            orphaned_memory="the memory is charged to no tenant, because the agent cannot determine the memory's"
            " tenant",
        ),
    ),
    "boot": Fault(
        booted,
        same(
            NEW,
            by_hand=GONE,
            by_label=f"when the engine has reported the label, {NEW}",
            observe=FREE,
            orphaned_memory="the memory is freed",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(GPUS != "1", reason="this run has these devices already")
@pytest.mark.timeout(600)
def test_the_file_s_tests_pass_on_two_devices() -> None:
    run_on_devices(__file__, seconds=580)


class TestInside:
    """Cause each fault of this file on two devices."""

    pytestmark = inside

    def test_tenants_behave_as_docs_faults_md_documents_after_each_restart(
        self,
        strict: Service,
        feature_places: tuple[Cgroups, Docker],
        columns: dict[str, Held],
        versions: tuple[Version, Version],
        fault: Callable[[str], None],
        scale: Callable[..., int],
        tmp_path: Path,
    ) -> None:
        """Cause the faults one after another. State that a fault leaves behind affects the next one."""
        group, docker = feature_places
        host = Host(strict, columns, fault, scale, group=group, docker=docker, work=tmp_path, versions=versions)
        assert_holds(host, FAULTS)
