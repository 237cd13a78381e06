"""Tests of the two forms of a device's UUID, and of XIDs around a restart of NVML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pynvml
import pytest

from fgpu_ebpf.driver import nvml
from fgpu_ebpf.driver.nvml import Nvml, uuid_bytes, uuid_text


def test_uuids_are_converted_to_bytes_and_text_and_invalid_uuids_are_refused() -> None:
    text = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert uuid_bytes(text) == bytes(range(16))
    assert uuid_text(bytes(range(16))) == text
    for wrong in ("", "GPU-", "GPU-00", text + "00", "GPU-zz010203-0405-0607-0809-0a0b0c0d0e0f"):
        with pytest.raises(ValueError, match=r"UUID|hex"):
            uuid_bytes(wrong)
    with pytest.raises(ValueError, match="16 bytes"):
        uuid_text(b"short")


class Driver:
    """An NVML with a dead device 0 and a healthy device 1. An XID is lost if no event set is registered."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, int]] = []
        self.registered = self.restarts = 0

    def report(self, xid: int) -> None:
        if self.registered:
            self.pending.append((1, xid))

    def restart(self) -> None:
        assert not self.registered, "an event set was not freed"
        self.restarts += 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()

    class Events:
        def __init__(self, handles: Mapping[int, object]) -> None:
            made.registered += 1
            self.watched = frozenset(handles)

        def take(self) -> Iterator[tuple[int, int]]:
            while made.pending:
                yield made.pending.pop(0)

        def end(self) -> None:
            made.registered -= 1
            made.pending.clear()

    def memory(handle: int) -> None:
        if handle == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(nvml, "Events", Events)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlInit", made.restart)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda text: int(text[-1]))
    return made


def of_two_devices() -> Nvml:
    found = Nvml.__new__(Nvml)
    found._known = {bytes(15) + bytes([index]): index for index in (0, 1)}
    found._handles, found._events, found._lost, found._came = {0: 0, 1: 1}, None, set(), []
    found._arrived, found.missing = [], {}
    return found


def test_xids_before_and_after_a_restart_of_nvml_are_reported(driver: Driver) -> None:
    """NVML is restarted every few seconds while a device is dead. The other devices continue to report XIDs."""
    found = of_two_devices()
    assert found.xids() == []
    for _ in range(2):
        driver.report(79)
        found._begin_at = 0.0
        assert found.used_bytes(0) is None
        driver.report(48)
        assert found.xids() == [(1, 79), (1, 48)]
    assert (driver.restarts, driver.registered, found.watched()) == (2, 1, frozenset({0, 1}))


def test_the_xids_of_a_device_that_a_restart_has_found_are_reported(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, late = of_two_devices(), nvml.Device(2, bytes(16), "late", "", 1, 1)

    def find() -> tuple[list[nvml.Device], dict[str, str]]:
        found._handles[2] = 2
        return [late], {}

    monkeypatch.setattr(found, "_find", find)
    found.missing, found._begin_at = {"device 2": "lost"}, 0.0
    assert found.xids() == []
    driver.report(79)
    found.look_for_missing()
    assert found.xids() == [(1, 79), (2, None)]
    assert (found.watched(), found.arrived(), driver.registered) == (frozenset({0, 1, 2}), [late], 1)
