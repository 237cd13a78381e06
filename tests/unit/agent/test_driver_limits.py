"""The driver's own limits: a model of NVML's two functions, without a driver."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf import abi
from fgpu_ebpf.agent import driver_limits
from fgpu_ebpf.agent.driver_limits import DriverLimits, Key
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver.nvml import Nvml
from fgpu_ebpf.driver.nvml_memory_limits import GET, NONE, SET, Limits, MemoryLimits

MIB, GIB = 1 << 20, 1 << 30


class Driver:
    """The limits of a driver by device and folder. After `dies` further calls of set(), each call raises Died."""

    def __init__(self) -> None:
        self.absent: set[int] = set()
        self.limits = self
        self.devices: tuple[SimpleNamespace, ...] = ()
        self.now: dict[tuple[int, str], Limits] = {}
        self.dies: float = float("inf")
        self.answers = True
        self.refuses = False
        self.exist = True

    def get(self, device: int, folder: str) -> Limits | None:
        return self.now.get((device, folder), NONE) if self.answers else None

    def set(self, device: int, folder: str, limits: Limits) -> bool:
        if self.dies <= 0:
            raise Died
        self.dies -= 1
        if self.answers and not self.refuses:
            self.now[device, folder] = limits
        return self.answers and not self.refuses


class Died(Exception):
    """The agent is killed."""


@pytest.fixture
def driver() -> Driver:
    return Driver()


def agent(driver: Driver, work: Path) -> DriverLimits:
    made: Any = driver
    return DriverLimits(made, work / "driver-limits.json", Path("/"))


def key(work: Path, name: str = "a", device: int = 0) -> Key:
    folder = work / name
    folder.mkdir(exist_ok=True)
    return Key(device, str(folder), folder.stat().st_ino)


def hard(driver: Driver, of: Key) -> int:
    return driver.get(of.device, of.folder).hard  # type: ignore[union-attr]


def put(limits: DriverLimits, wanted: dict[Key, int]) -> None:
    limits.wanted = wanted
    limits.look()


def look(limits: DriverLimits) -> None:
    """Compare each of a few limits with the driver, several times."""
    for _ in range(8):
        limits.look()


def test_nothing_is_changed_before_the_tenants_are_known(driver: Driver, tmp_path: Path) -> None:
    one = key(tmp_path)
    put(agent(driver, tmp_path), {one: 5 * MIB})
    agent(driver, tmp_path).look()
    assert hard(driver, one) == 5 * MIB


def test_a_limit_follows_the_tenant_s_limit_and_ends_with_it(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    for bytes_ in (5 * MIB, 9 * MIB, 2 * MIB):
        put(limits, {one: bytes_})
        assert driver.get(*one[:2]) == Limits(0, bytes_)
    put(limits, {})
    assert driver.get(*one[:2]) == NONE


def test_a_stricter_limit_of_another_program_stays_and_is_reported(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    driver.now[one[:2]] = Limits(MIB, 4 * MIB)
    put(limits, {one: 5 * MIB})
    assert driver.get(*one[:2]) == Limits(MIB, 4 * MIB)
    found = limits.check()
    assert found
    assert f"limits of another program: 1, such as {one.folder!r}" in found.found
    put(limits, {})
    assert (driver.get(*one[:2]), limits.check()) == (Limits(MIB, 4 * MIB), None)


def test_a_higher_limit_of_another_program_is_lowered_and_restored(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    driver.now[one[:2]] = Limits(7 * MIB, 8 * MIB)
    put(limits, {one: 5 * MIB})
    assert driver.get(*one[:2]) == Limits(5 * MIB, 5 * MIB)
    put(limits, {})
    assert driver.get(*one[:2]) == Limits(7 * MIB, 8 * MIB)


def test_a_limit_that_another_program_changes_stays_as_changed(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    put(limits, {one: 5 * MIB})
    driver.now[one[:2]] = Limits(0, 20 * MIB)
    look(limits)
    assert hard(driver, one) == 20 * MIB
    assert limits.check()
    driver.now[one[:2]] = NONE  # the other program removes its limit
    look(limits)
    assert (hard(driver, one), limits.check()) == (5 * MIB, None)


def test_a_limit_that_another_program_restores_stays(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    driver.now[one[:2]] = Limits(0, 8 * MIB)
    put(limits, {one: 5 * MIB})
    driver.now[one[:2]] = Limits(0, 8 * MIB)
    look(limits)
    assert hard(driver, one) == 8 * MIB
    assert limits.check()


def test_a_refusal_of_the_driver_is_reported_and_writes_no_record_again(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    driver.refuses = True
    put(limits, {one: 5 * MIB})
    written = (tmp_path / "driver-limits.json").stat().st_ino
    look(limits)
    found = limits.check()
    assert found
    assert "that the driver refuses: 1" in found.found
    assert (tmp_path / "driver-limits.json").stat().st_ino == written
    driver.refuses = False
    look(limits)
    assert (hard(driver, one), limits.check()) == (5 * MIB, None)


def test_every_limit_is_compared_in_time(driver: Driver, tmp_path: Path) -> None:
    limits, keys = agent(driver, tmp_path), [key(tmp_path, f"{n}") for n in range(40)]
    put(limits, dict.fromkeys(keys, 5 * MIB))
    driver.now.clear()  # the driver was loaded again
    for _ in range(4):
        limits.look()
    assert {hard(driver, one) for one in keys} == {5 * MIB}


def test_a_later_cgroup_at_the_same_path_keeps_its_own_limit(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    put(limits, {one: 5 * MIB})
    gone = one._replace(cgroup=one.cgroup + 1)
    driver.now[one[:2]] = Limits(0, 3 * MIB)
    put(limits, {gone: 5 * MIB})
    put(limits, {})
    assert hard(driver, one) == 3 * MIB
    driver.now.clear()
    put(limits, {gone: 5 * MIB})
    assert (hard(driver, one), limits.check()) == (NONE.hard, None)


def test_a_driver_that_does_not_answer_loses_no_record(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    put(limits, {one: 5 * MIB})
    driver.answers = False
    put(limits, {})
    driver.answers = True
    limits.look()
    assert driver.get(*one[:2]) == NONE


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"limits": 3}', '{"limits": [[1]]}', '{"limits": [[1e999, "", 1, 1, 1, 1, 1]]}']
)
def test_a_damaged_record_counts_as_empty(driver: Driver, tmp_path: Path, text: str) -> None:
    (tmp_path / "driver-limits.json").write_text(text)
    one = key(tmp_path)
    put(agent(driver, tmp_path), {one: 5 * MIB})
    assert hard(driver, one) == 5 * MIB


def test_without_a_record_no_limit_is_set(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path / "missing")
    put(limits, {one: 5 * MIB})
    found = limits.check()
    assert found
    assert "driver-limits.json cannot be written" in found.found
    assert driver.get(*one[:2]) == NONE
    (tmp_path / "missing").mkdir()
    limits.look()
    assert (hard(driver, one), limits.check()) == (5 * MIB, None)


def published(driver: Driver, work: Path, limits: dict[int, int], observe: bool = False) -> dict[int, int] | None:
    """Return the limits in the driver, by device, for a tenant with these limits in the ledger."""
    tenant = SimpleNamespace(path="/a", cgroup=7, observe=observe)
    enforcer: Any = type("Enforcer", (list,), {"commitments": SimpleNamespace(in_force=lambda _: limits)})([tenant])
    made, checks = agent(driver, work), dict[str, Check]()
    made.publish(enforcer, Path("/sys/fs/cgroup"), 0, checks)
    assert made.wanted is None or {(key.folder, key.cgroup) for key in made.wanted} <= {("/sys/fs/cgroup/a", 7)}
    return None if made.wanted is None else {key.device: bytes_ for key, bytes_ in made.wanted.items()}


def test_limits_of_tenants_get_a_margin_on_devices_that_have_limits(driver: Driver, tmp_path: Path) -> None:
    driver.devices = (SimpleNamespace(index=0), SimpleNamespace(index=1), SimpleNamespace(index=2))
    driver.absent = {2}
    limits = {0: 5 * GIB, 1: 0, 2: 5 * GIB}
    assert published(driver, tmp_path, limits) == {0: 6 * GIB, 1: GIB}  # the limit on device 1 was denied
    assert published(driver, tmp_path, {0: abi.NO_LIMIT}) == {}
    assert published(driver, tmp_path, limits, observe=True) == {}
    driver.exist = False
    assert published(driver, tmp_path, limits) is None


def test_nvml_s_functions_are_found_by_name_and_get_the_folder_s_bytes() -> None:
    asked: list[tuple[object, bytes]] = []

    def get(handle: object, limits: Any) -> int:
        asked.append((handle, limits._obj.folder))
        limits._obj.soft, limits._obj.hard = 1, 2
        return pynvml.NVML_SUCCESS if handle == 10 else pynvml.NVML_ERROR_NOT_SUPPORTED

    def lost(device: int) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    library: Any = SimpleNamespace(**{GET: get, SET: get})
    limits = MemoryLimits(library, lambda device: 10 + device)
    assert (limits.get(0, "/\udcff"), limits.get(1, "/a"), limits.absent) == (Limits(1, 2), None, {1})
    assert asked == [(10, b"/\xff"), (11, b"/a")]
    assert MemoryLimits(library, lost).get(0, "/a") is None
    older: Any = SimpleNamespace(**{GET: get})
    assert not MemoryLimits(older, lost).exist
    assert MemoryLimits(older, lost).set(0, "/a", NONE) is False


def test_a_missing_device_has_no_limits_and_no_mig_mode() -> None:
    nvml = Nvml.__new__(Nvml)
    nvml._handles, nvml.released = {}, False
    library: Any = SimpleNamespace(**{GET: None, SET: None})
    assert MemoryLimits(library, nvml._handle).get(3, "/a") is None
    assert not nvml.in_mig_mode(3)
    assert nvml.free_bytes(3) is None


def test_limits_are_restored_on_the_device_whose_index_the_ledger_had(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVML's numbers differ from the indexes if a device was missing at the first start."""
    driver.devices = (SimpleNamespace(index=1, uuid=b"C" * 16), SimpleNamespace(index=2, uuid=b"B" * 16))
    put(agent(driver, tmp_path), {key(tmp_path, device=1): 5 * MIB})
    known = []
    monkeypatch.setattr(driver_limits, "Nvml", lambda _, found: (known.append(found), driver)[1])
    driver_limits.take_away(tmp_path / "driver-limits.json")
    assert known == [{b"C" * 16: 1, b"B" * 16: 2}]
    assert [*driver.now.values()] == [NONE]


def test_the_record_is_kept_until_all_limits_are_restored(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "driver-limits.json"
    put(agent(driver, tmp_path), {key(tmp_path): 5 * MIB})
    monkeypatch.setattr(driver_limits, "Nvml", lambda *_: driver)
    driver.refuses = True
    assert not driver_limits.take_away(file)
    assert hard(driver, key(tmp_path)) == 5 * MIB
    driver.refuses = False
    assert driver_limits.take_away(file)
    assert hard(driver, key(tmp_path)) == NONE.hard


def test_a_record_that_cannot_be_read_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.ENFILE, "too many open files")

    monkeypatch.setattr(Path, "read_text", fail)
    assert not driver_limits.take_away(tmp_path / "driver-limits.json")


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_record_that_is_missing_or_damaged_is_not_needed(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "driver-limits.json"
    if text is not None:
        file.write_text(text)
    assert driver_limits.take_away(file)


@given(
    before=st.sampled_from([NONE, Limits(0, 4 * MIB), Limits(MIB, 40 * MIB)]),
    steps=st.lists(st.tuples(st.integers(5, 30), st.integers(0, 2)), max_size=6),
)
def test_after_kills_at_any_point_the_former_limit_comes_back(
    tmp_path_factory: pytest.TempPathFactory, before: Limits, steps: list[tuple[int, int]]
) -> None:
    work, driver = tmp_path_factory.mktemp("work"), Driver()
    one = key(work)
    driver.now[one[:2]] = before
    for mib, dies in steps:
        driver.dies = dies
        limits = agent(driver, work)
        try:
            put(limits, {one: mib * MIB})
            limits.look()
        except Died:
            continue
        assert hard(driver, one) == min(before.hard, mib * MIB)
    driver.dies = float("inf")
    put(agent(driver, work), {})
    assert driver.get(*one[:2]) == before
    for file in work.glob("driver-limits.json"):
        assert json.loads(file.read_text())["limits"] == []
