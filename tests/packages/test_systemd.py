"""The units under a real systemd: ready, confined, watched, killed, reloaded, upgraded under load, removed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fresh_host
from tests.support import packages as kit

UNITS = ("fgpu-agent.service", "fgpu-gatekeeper.service")
AGENT, GATEKEEPER = UNITS
# linux/capability.h
CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "KILL": 5, "SYS_PTRACE": 19, "SYS_ADMIN": 21}
TO_START = {GATEKEEPER: {"DAC_READ_SEARCH", "SYS_PTRACE", "SYS_ADMIN"}, AGENT: set(CAPABILITIES)}
KEPT = {unit: names - {"DAC_OVERRIDE"} for unit, names in TO_START.items()}
FITS = kit.GIB - kit.CONTEXT


@pytest.fixture(scope="module")
def before(host: fresh_host.Host) -> Iterator[fresh_host.Listing]:
    """Start the host, and return its files before the installation."""
    host.boot()
    yield fresh_host.listing(host.root)
    host.halt()


@pytest.fixture(scope="module")
def service(host: fresh_host.Host, before: fresh_host.Listing, deb: Path) -> Iterator[fresh_host.Host]:
    """Install fgpu. Its agent uses the simulated driver and must answer within six seconds."""
    host.install(deb)
    folder = host.root / "etc/systemd/system"
    # this systemd runs in its own pid namespace
    command = " ".join([*host.agent_words, "--skip-check 'pid namespace'"])
    for unit, lines in ((AGENT, f"ExecStart=\nExecStart={command}\n"), (GATEKEEPER, "")):
        (folder / f"{unit}.d").mkdir()
        (folder / f"{unit}.d/test.conf").write_text(f"[Service]\n{lines}WatchdogSec=6\n")
    host.run("systemctl", "daemon-reload")
    yield host
    for unit in UNITS:
        (folder / f"{unit}.d/test.conf").unlink()
        (folder / f"{unit}.d").rmdir()


@pytest.fixture
def running(service: fresh_host.Host) -> fresh_host.Host:
    """Return the host with both units active."""
    service.run("systemctl", "start", AGENT)
    for unit in UNITS:
        kit.eventually(lambda unit=unit: service.unit(unit, "ActiveState") == ["active"], 10, unit)
    return service


def pid(host: fresh_host.Host, unit: str) -> int:
    """Return the main process of a running unit, or 0."""
    state, number = host.unit(unit, "ActiveState", "MainPID")
    return int(number) if state == "active" else 0


def another(host: fresh_host.Host, unit: str, old: int, seconds: float = 20) -> int:
    """Return the main process that has replaced that one."""
    return kit.eventually(lambda: (new := pid(host, unit)) != old and new, seconds, f"another {unit}")


_numbers = itertools.count()


def fills(host: fresh_host.Host) -> None:
    """Check that a tenant gets exactly its limit.

    The check is repeated. The kernel's pids are not those of this host's pid namespace, so the agent treats a program
    that runs during a reconciliation, twice a second, as exited. test_deb.py is exact, with the kernel's own pids.
    """

    def exact() -> bool:
        tenant = f"tenant-{next(_numbers)}"
        got, why = host.filled("/usr/bin/fgpu", "run", "--name", tenant, "--memory", "1GiB", "--")
        assert (got >= FITS, why) == (True, "CUDA_ERROR_OUT_OF_MEMORY")
        return got == FITS

    kit.eventually(exact, 5, "a limit that holds")


def test_installation_starts_nothing(service: fresh_host.Host) -> None:
    for unit in UNITS:
        assert service.unit(unit, "LoadState", "ActiveState", "UnitFileState") == ["loaded", "inactive", "disabled"]
    assert not (service.root / "run/fgpu").exists()
    done = service.run("fgpu", "status", check=False)
    assert (done.returncode, "start the agent with `systemctl start fgpu-agent`" in done.stderr) == (3, True), done


def test_the_units_are_valid_and_confined(service: fresh_host.Host) -> None:
    done = service.run("systemd-analyze", "verify", "--man=no", *UNITS)  # the manual page comes with the .deb
    assert done.stdout + done.stderr == ""
    for unit, most in ((AGENT, 45), (GATEKEEPER, 25)):  # tenths of systemd's measure of exposure, 0 to 100
        service.run("systemd-analyze", "security", "--offline=yes", f"--threshold={most}", unit)


def test_a_start_enforces_limits_with_confined_units(running: fresh_host.Host) -> None:
    fills(running)
    assert running.unit(AGENT, "StatusText") == ["1 devices"]
    for unit in UNITS:
        status = running.run("cat", f"/proc/{pid(running, unit)}/status").stdout
        facts = dict(re.findall(r"^(\w+):\s*(.*)$", status, re.MULTILINE))
        for field, names in (("CapBnd", TO_START[unit]), ("CapPrm", KEPT[unit])):
            assert int(facts[field], 16) == sum(1 << CAPABILITIES[name] for name in names), (unit, field)
        assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    # the unit's gatekeeper is sufficient
    assert "another gatekeeper" not in running.run("journalctl", "--unit", AGENT).stdout


def test_engines_start_their_containers_after_the_agent(running: fresh_host.Host) -> None:
    (before,) = running.unit(AGENT, "Before")
    engines = ("containerd", "crio", "docker", "k3s", "k3s-agent", "podman-restart", "rke2-agent", "rke2-server")
    assert {f"{name}.service" for name in (*engines, "slurmd")} <= set(before.split())


def test_lines_in_the_journal_have_fields(running: fresh_host.Host) -> None:
    fills(running)
    running.call("set", "/fgpu", "--memory", "3GiB")
    running.call("unset", "/fgpu")
    said = running.run("journalctl", "--unit", AGENT, "--output=json", "--lines=100").stdout.splitlines()
    entry = next(e for e in map(json.loads, reversed(said)) if e["MESSAGE"].startswith("set fgpu"))
    assert (entry["SYSLOG_IDENTIFIER"], entry["LOGGER"], entry["PRIORITY"]) == ("fgpu", "fgpu.events", "6")
    assert (entry["FGPU_WHAT"], entry["FGPU_TENANT"], entry["FGPU_BYTES"]) == ("set", "fgpu", str(3 * kit.GIB))
    assert entry["_TRANSPORT"] == "journal"


@pytest.mark.parametrize(("killed", "lives"), [UNITS, UNITS[::-1]])
def test_agent_and_gatekeeper_survive_the_kill_of_one_another(
    running: fresh_host.Host, killed: str, lives: str
) -> None:
    old, other = pid(running, killed), pid(running, lives)
    running.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", killed)
    another(running, killed, old)
    assert pid(running, lives) == other
    fills(running)


@pytest.mark.parametrize("unit", UNITS)
def test_a_hung_process_is_replaced(running: fresh_host.Host, unit: str) -> None:
    old = pid(running, unit)
    running.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", unit)
    another(running, unit, old)
    assert running.unit(unit, "NRestarts") != ["0"]
    fills(running)


def test_the_agent_s_gatekeeper_exits_for_the_unit_s(running: fresh_host.Host) -> None:
    """F30: the state after a kill on a host with slow starts. The unit never waits for the agent."""

    def holder() -> str:
        number = running.run("cat", "/run/fgpu/gatekeeper.lock").stdout.strip()
        return running.run("cat", f"/proc/{number}/cmdline", check=False).stdout

    running.run("systemctl", "stop", GATEKEEPER)
    kit.eventually(lambda: "--stand-in" in holder(), 10, "a gatekeeper of the agent")
    running.run("systemctl", "start", GATEKEEPER)
    assert running.unit(GATEKEEPER, "ActiveState", "NRestarts") == ["active", "0"]
    assert "--wait" in holder()
    fills(running)


def test_a_reload_does_not_restart_the_agent(running: fresh_host.Host) -> None:
    old = pid(running, AGENT)
    running.run("systemctl", "reload", AGENT)
    fills(running)
    assert pid(running, AGENT) == old


def test_an_upgrade_restarts_both_units_and_refuses_no_program(
    running: fresh_host.Host, deb: Path, tmp_path: Path
) -> None:
    package = fresh_host.newer(deb, running.root / "tmp", tmp_path)
    old, version = [pid(running, unit) for unit in UNITS], running.version()
    with fresh_host.load(running) as said:
        running.apt("install", package)
        for unit, was in zip(UNITS, old, strict=True):
            another(running, unit, was)
    assert running.version() != version
    assert len(said) > 10
    assert all(int(line.split()[1]) >= FITS for line in said), "a program was refused"
    fills(running)


def test_a_purge_leaves_nothing(service: fresh_host.Host, before: fresh_host.Listing, deb: Path) -> None:
    service.install(deb)  # an earlier trial may have purged it
    service.run("systemctl", "enable", "--now", AGENT)
    assert service.unit(GATEKEEPER, "ActiveState", "UnitFileState") == ["active", "enabled"]
    service.apt("purge", "fgpu")
    drop_ins = [f"etc/systemd/system/{unit}.d" for unit in UNITS]  # the administrator's own
    assert [name for name in service.left(before) if not name.startswith(tuple(drop_ins))] == []
    assert service.pins() == []
    assert not list((service.root / "run").glob("fgpu"))
    assert not service.run("sh", "-c", "ls -d /sys/fs/cgroup/fgpu*", check=False).stdout
    assert [service.unit(unit, "ActiveState", "LoadState")[0] for unit in UNITS] == ["inactive"] * 2
    assert "fgpu_ebpf" not in service.run("sh", "-c", "cat /proc/[0-9]*/cmdline", check=False).stdout
