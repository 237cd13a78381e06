"""Tests of XIDs: how NVML reports them, which program caused each, and the message."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from fgpu_ebpf import snapshot
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.agent.offers import Offers
from fgpu_ebpf.agent.reporters import XidReports
from fgpu_ebpf.driver import xids
from fgpu_ebpf.driver.nvml import Device, Nvml
from fgpu_ebpf.driver.xid_record import XidRecord, lifetime
from fgpu_ebpf.driver.xids import Reported, Tally
from fgpu_ebpf.tenancy.event_log import EventLog

XID = pynvml.nvmlEventTypeXidCriticalError
HANDLES = [pynvml.c_nvmlDevice_t(pynvml.struct_c_nvmlDevice_t()) for _ in range(3)]


class Library:
    """A stand-in for NVML's events: which events come, which devices can be registered, and which event sets exist."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.coming: list[Any] = []
        self.refused: set[int] = set()
        self.lost: set[int] = set()
        self.made = self.freed = 0
        for name in ("EventSetCreate", "EventSetFree", "DeviceRegisterEvents", "EventSetWait_v2", "Shutdown", "Init"):
            monkeypatch.setattr(pynvml, f"nvml{name}", getattr(self, name, lambda: None))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self.DeviceGetMemoryInfo)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: HANDLES[int(uuid[4:12])])
        self.nvml = Nvml.__new__(Nvml)
        self.nvml._handles = dict(enumerate(HANDLES))
        self.nvml._events, self.nvml._lost, self.nvml._came = None, set(), []
        self.nvml._begin_at = 0.0
        self.nvml.devices = [Device(i, i.to_bytes(4) + bytes(12), "", "", 1, 1) for i in range(len(HANDLES))]
        self.nvml._known = {device.uuid: device.index for device in self.nvml.devices}

    def EventSetCreate(self) -> int:
        self.made += 1
        return self.made

    def EventSetFree(self, one: int) -> None:
        assert one == self.made, "another event set was freed"
        self.freed += 1

    def DeviceRegisterEvents(self, handle: object, types: int, one: int) -> None:
        assert (types, one) == (XID, self.made)
        if HANDLES.index(handle) in self.refused:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def EventSetWait_v2(self, one: int, milliseconds: int) -> object:
        assert (one, milliseconds) == (self.made, 0), "the call must not wait"
        came = self.coming.pop(0) if self.coming else pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        if isinstance(came, Exception):
            raise came
        return came

    def DeviceGetMemoryInfo(self, handle: object) -> None:
        if HANDLES.index(handle) in self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


def event(device: int, xid: int, kind: int = XID) -> SimpleNamespace:
    """Return an event. Its handle is another object at the same address, as with NVML."""
    handle = ctypes.cast(HANDLES[device], ctypes.POINTER(pynvml.struct_c_nvmlDevice_t))
    return SimpleNamespace(device=handle, eventType=kind, eventData=xid)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(monkeypatch)


def test_events_are_processed_in_their_order_and_once(library: Library) -> None:
    library.coming = [event(2, 79), event(0, 31), event(1, 5, pynvml.nvmlEventTypePState), event(0, 31)]
    assert library.nvml.xids() == [(2, 79), (0, 31), (0, 31)]
    assert library.nvml.xids() == []
    assert (library.nvml.watched(), library.made) == ({0, 1, 2}, 1)


def test_a_flood_of_events_ends_a_read_and_loses_no_event(library: Library) -> None:
    library.coming = [event(0, 13)] * 150
    assert [len(library.nvml.xids()) for _ in range(4)] == [64, 64, 22, 0]


def test_a_device_without_events_is_not_watched(library: Library) -> None:
    library.refused = {1}
    library.nvml.xids()
    assert library.nvml.watched() == {0, 2}


def test_an_event_of_an_unknown_handle_counts_for_every_device(library: Library) -> None:
    library.coming = [SimpleNamespace(device=ctypes.c_void_p(1), eventType=XID, eventData=79)]
    assert library.nvml.xids() == [(0, 79), (1, 79), (2, 79)]


def test_events_before_an_error_are_kept_and_the_next_read_registers_again(library: Library) -> None:
    library.coming = [event(1, 79), pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST), event(0, 48)]
    assert library.nvml.xids() == [(1, 79)]
    assert library.nvml.watched() == set()
    assert (library.made, library.freed) == (1, 1)
    assert library.nvml.xids() == [(0, 48)]
    assert library.made == 2


def test_devices_found_again_are_reported_once(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.nvml.xids()
    library.lost = {1}
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: library.DeviceGetMemoryInfo(HANDLES[1]))
    assert library.nvml.used_bytes(1) is None
    assert library.nvml.xids() == [], "not found yet"
    library.lost = set()
    error = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    library.nvml._find_again(error)
    assert library.nvml.xids() == [(1, None)]
    assert library.freed == library.made - 1, "the event set in use was freed"


def test_an_unknown_error_restarts_nvml_at_times_and_is_no_loss_of_a_device(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[None] = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: starts.append(None))
    for _ in range(10):
        library.nvml._find_again(pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN))
    assert len(starts) == 1
    assert library.nvml.xids() == []


def test_no_device_is_watched_without_an_event_set(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is too old, or the driver is missing."""

    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlEventSetCreate", refuse)
    assert (library.nvml.xids(), library.nvml.watched()) == ([], frozenset())


# -- errors of programs or of the device ----------------------------------------------------------------------------


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 109])
def test_errors_of_programs_are_only_counted(xid: int) -> None:
    assert Tally().take([0], [(0, xid), (0, xid)]) == {0: Reported({xid: 2}, 2)}


def test_the_first_device_error_stays_until_the_device_is_found_again() -> None:
    tally = Tally()
    assert tally.take([0, 1], []) == {0: Reported({}), 1: Reported({})}
    assert tally.take([0, 1], [(1, 31), (1, 48), (1, 79)])[1] == Reported({31: 1, 48: 1, 79: 1}, 1, 48)
    assert tally.take([], [])[1].fatal == 48, "an error was forgotten while the device was not watched"
    assert tally.take([0, 1], [(1, None)])[1] == Reported({31: 1, 48: 1, 79: 1}, 1)
    assert tally.take([0, 1], [(1, 79)])[1] == Reported({31: 1, 48: 1, 79: 2}, 1, 79)


def test_the_host_can_choose_the_ignored_xids() -> None:
    tally = Tally([94])
    assert tally.take([0], [(0, 94), (0, 31)])[0] == Reported({94: 1, 31: 1}, 1, 31)


def test_a_record_holds_over_restarts_and_ends_with_the_lifetime_of_the_driver(tmp_path: Path) -> None:
    devices = [Device(i, i.to_bytes(16), "", "", 1, 1) for i in range(2)]
    file = tmp_path / "xids.json"
    record = XidRecord(file, "a")
    record.keep({}, devices)
    assert not file.exists(), "a record without an XID was kept"
    record.keep({0: Reported({79: 1}, 0, 79), 1: Reported({31: 1}, 1)}, devices)
    XidRecord(file, "a").keep({}, devices)
    assert XidRecord(file, "a").tally((), devices).take([], []) == {0: Reported({}, 0, 79)}
    assert XidRecord(file, "a").tally((79,), devices).take([], []) == {}, "an ignored XID was kept"
    assert XidRecord(file, "b").tally((), devices).take([], []) == {}
    XidRecord(file, "a").keep({0: Reported({}), 1: Reported({})}, devices)
    assert XidRecord(file, "a").tally((), devices).take([], []) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"of": "a"}', '{"of": "a", "fatal": [1]}', "[" * 10**5])
def test_an_invalid_record_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "xids.json").write_text(text)
    devices = [Device(0, bytes(16), "", "", 1, 1)]
    assert XidRecord(tmp_path / "xids.json", "a").tally((), devices).take([], []) == {}


def test_a_record_that_cannot_be_written_is_written_again(tmp_path: Path) -> None:
    devices = [Device(0, bytes(16), "", "", 1, 1)]
    record = XidRecord(tmp_path / "later/xids.json", "a")
    for _ in range(2):
        record.keep({0: Reported({79: 1}, 0, 79)}, devices)
    (tmp_path / "later").mkdir()
    record.keep({0: Reported({79: 1}, 0, 79)}, devices)
    assert "79" in (tmp_path / "later/xids.json").read_text()


def test_a_driver_that_is_loaded_again_has_another_lifetime(tmp_path: Path) -> None:
    (tmp_path / "boot").write_text("1-2\n")
    (tmp_path / "nvidia").mkdir()
    before = lifetime(tmp_path / "boot", tmp_path / "nvidia")
    assert lifetime(tmp_path / "boot", tmp_path / "nvidia") == before
    (tmp_path / "nvidia").rename(tmp_path / "earlier")
    (tmp_path / "nvidia").mkdir()
    assert lifetime(tmp_path / "boot", tmp_path / "nvidia") != before
    assert lifetime(tmp_path / "boot", tmp_path / "gone") != before


# -- messages -------------------------------------------------------------------------------------------------------


def view(index: int, **more: Any) -> dict[str, Any]:
    shown = snapshot.DeviceView(index, "GPU-1", "x", "y", 1, None, 0, None, **more)
    return snapshot.plain(shown)


def test_doctor_names_the_device_and_the_xid() -> None:
    failed = xids.check([view(0, xids={}), view(1, xids={79: 1}, fatal_xid=79), view(2)])
    assert (failed.ok, failed.found) == (False, "device 1 has reported XID 79")
    assert "dmesg" in failed.fix
    assert xids.check([view(0, xids={31: 2}, ignored_xids=2)]).ok
    assert xids.check([view(0)]).found == "not checked: NVML reports no XIDs"


def test_no_share_of_a_failed_device_is_offered() -> None:
    truth = Truth(
        answered={0: float("inf"), 1: float("inf")}, xids={0: Reported({79: 1}, 0, 79), 1: Reported({31: 1}, 1)}
    )
    offers = Offers([], [], SimpleNamespace(), truth, "")  # type: ignore[arg-type]
    assert [offers._failure(index) for index in (0, 1)] == ["the device has reported XID 79", ""]


def test_no_share_of_a_device_in_mig_mode_is_offered() -> None:
    truth = Truth(answered={0: float("inf"), 1: float("inf")}, mig=frozenset({1}))
    commitments = SimpleNamespace(committed=lambda _: 0, overcommit=False)
    devices = [Device(index, bytes([index]) * 16, "H200", "00000000:01:00.0", 1 << 34, 1 << 34) for index in (0, 1)]
    offers = Offers([], devices, SimpleNamespace(commitments=commitments), truth, "")  # type: ignore[arg-type]
    faults = [device["fault"] for device in offers.view([], [])["devices"]]
    assert faults[0] == ""
    assert faults[1].startswith("the device is in MIG mode")


def test_events_lists_each_xid_with_its_number() -> None:
    before, after = Truth(xids={0: Reported({31: 2}, 2)}), Truth(xids={0: Reported({31: 3, 79: 1}, 3, 79)})
    truths, history = iter([before, before, after]), EventLog()
    news = XidReports(lambda: next(truths), history)
    for _ in range(3):
        news.look()
    told = [(happening["what"], happening["gpu"], happening["text"]) for happening in history.since(0)["events"]]
    assert told == [
        ("xid", 0, "31, 2 times"),
        ("xid", 0, "31"),
        ("xid", 0, "79: no share of the device is offered"),
    ]
