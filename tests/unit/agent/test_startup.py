"""Tests of the agent's start: when the gatekeeper may start too, and the devices that containers can request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.agent import startup
from fgpu_ebpf.agent.agent import Agent
from fgpu_ebpf.containers import injection
from fgpu_ebpf.driver import host_driver, programs
from fgpu_ebpf.driver.start_checks import AgentError
from fgpu_ebpf.tenancy.overrides import Override
from fgpu_ebpf.tenancy.profiles import Profile


def test_an_agent_does_not_start_while_another_layout_has_parked_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only an agent of that layout finds the processes that have to be woken, so the layout must stay."""
    (tmp_path / "v2" / "maps").mkdir(parents=True)
    (tmp_path / "v2" / "maps" / "parked").touch()
    monkeypatch.setattr(host_driver, "libcuda", lambda _: pytest.fail("the start continues"))
    settings: Any = SimpleNamespace(pins=tmp_path / "v3", driver_root=None)
    with pytest.raises(AgentError, match=f"parked processes .*{tmp_path / 'v2'}.*fgpu wake --all"):
        startup.attach(settings, lambda _: None, lambda: None)


@pytest.mark.parametrize(("begun", "started"), [(False, 1), (True, 0)])
def test_a_gatekeeper_starts_early_only_if_the_maps_of_this_version_are_pinned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: bool, started: int
) -> None:
    """Otherwise the gatekeeper could open maps that the agent then replaces."""

    def fail(*_: Any) -> None:
        raise AgentError("no device")

    loading = SimpleNamespace(begun=begun, end=lambda: None)
    monkeypatch.setattr(programs, "Loading", lambda *_: loading)
    monkeypatch.setattr(host_driver, "libcuda", lambda _: [Path("libcuda.so.1")])
    monkeypatch.setattr(host_driver, "prepare", fail)
    names = ("driver_root", "sources", "pins", "loader", "shim", "store")
    settings: Any = SimpleNamespace(**dict.fromkeys(names) | {"pins": tmp_path / "v3"})
    calls: list[str] = []
    with pytest.raises(AgentError, match="no device"):
        startup.attach(settings, calls.append, lambda: calls.append("gatekeeper"))
    assert calls.count("gatekeeper") == started


def test_files_for_containers_that_could_not_be_written_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent: Any = Agent.__new__(Agent)
    agent.settings = SimpleNamespace(
        store=None, helper=Path("/fgpu-oci"), run_dir=tmp_path, cdi_folder=tmp_path / "cdi", shares=("4gib",),
        profiles=(),
    )  # fmt: skip
    driver = SimpleNamespace(shim=Path("/libfgpu.so"), nvml=SimpleNamespace(devices=[]))
    agent._parts = SimpleNamespace(driver=driver, manager=SimpleNamespace(overrides=()))
    agent.given, agent._given_devices, agent._given_error = None, -1, ""
    agent.settings.cdi_folder.touch()
    agent.set_up_containers()
    agent.set_up_containers()
    assert len(caplog.records) == 1, "one error is logged once"
    assert agent.given is None
    agent.settings.cdi_folder.unlink()
    agent.set_up_containers()
    assert len(injection.written(tmp_path)) == 2
    assert agent.given.shim == driver.shim


def test_containers_can_request_shares_of_a_late_device_and_the_shares_of_running_containers(tmp_path: Path) -> None:
    """A profile that agent.yaml no longer has stays for containers that have its share, which may be restarted."""
    uuids = [f"GPU-00000000-0000-4000-8000-00000000000{n}" for n in (1, 2)]
    first, late = (SimpleNamespace(index=n, uuid_text=uuid, name="NVIDIA T4") for n, uuid in enumerate(uuids))
    overrides = [
        Override(5, "/one", None, share="2gib", share_devices=tuple(uuids)),
        Override(6, "/two", None, share="all-50pct"),
        Override(7, "/three", 1 << 30),
    ]
    agent: Any = Agent.__new__(Agent)
    agent.settings = SimpleNamespace(
        store=None, helper=Path("/fgpu-oci"), run_dir=tmp_path, cdi_folder=tmp_path / "cdi", shares=("4gib",),
        profiles=(Profile("8gib"),),
    )  # fmt: skip
    driver = SimpleNamespace(shim=Path("/libfgpu.so"), nvml=SimpleNamespace(devices=[first]))
    agent._parts = SimpleNamespace(driver=driver, manager=SimpleNamespace(overrides=overrides))
    agent._given_devices = -1

    def names() -> list[str]:
        agent.set_up_containers()
        _, shares = injection.written(tmp_path)
        return [device["name"] for device in shares["devices"]]

    used = [*(f"2gib:{uuid}" for uuid in uuids), "all-50pct"]
    assert names() == ["4gib", f"8gib:{uuids[0]}", *used]
    driver.nvml.devices.append(late)
    assert names() == ["4gib", *(f"8gib:{uuid}" for uuid in uuids), *used]
    agent.settings.cdi_folder = tmp_path / "other"
    names()
    assert not agent.settings.cdi_folder.exists(), "the files are written again without a new device"
