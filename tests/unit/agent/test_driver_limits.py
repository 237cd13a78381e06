"""The driver's own limits: a model of NVML's two functions, without a driver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.agent.driver_limits import DriverLimits, Key
from fgpu_ebpf.driver.nvml_memory_limits import NONE, Limits

MIB = 1 << 20


class Driver:
    """The limits of a driver by device and folder. After `dies` further calls of set(), each call raises Died."""

    def __init__(self) -> None:
        self.absent: set[int] = set()
        self.limits = self
        self.devices = ()
        self.now: dict[tuple[int, str], Limits] = {}
        self.dies: float = float("inf")
        self.answers = True

    def get(self, device: int, folder: str) -> Limits | None:
        return self.now.get((device, folder), NONE) if self.answers else None

    def set(self, device: int, folder: str, limits: Limits) -> bool:
        if self.dies <= 0:
            raise Died
        self.dies -= 1
        if self.answers:
            self.now[device, folder] = limits
        return self.answers


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
    assert one.folder in found.found
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
    for _ in range(3):
        limits.look()
    assert hard(driver, one) == 20 * MIB
    assert limits.check()
    driver.now[one[:2]] = NONE  # the other program removes its limit
    for _ in range(3):
        limits.look()
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


def test_a_driver_that_does_not_answer_loses_no_record(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path)
    put(limits, {one: 5 * MIB})
    driver.answers = False
    put(limits, {})
    driver.answers = True
    limits.look()
    assert driver.get(*one[:2]) == NONE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"limits": 3}', '{"limits": [[1]]}'])
def test_a_damaged_record_counts_as_empty(driver: Driver, tmp_path: Path, text: str) -> None:
    (tmp_path / "driver-limits.json").write_text(text)
    one = key(tmp_path)
    put(agent(driver, tmp_path), {one: 5 * MIB})
    assert hard(driver, one) == 5 * MIB


def test_without_a_record_no_limit_is_set(driver: Driver, tmp_path: Path) -> None:
    one, limits = key(tmp_path), agent(driver, tmp_path / "missing")
    put(limits, {one: 5 * MIB})
    assert driver.get(*one[:2]) == NONE
    (tmp_path / "missing").mkdir()
    limits.look()
    assert hard(driver, one) == 5 * MIB


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
            pass
    driver.dies = float("inf")
    put(agent(driver, work), {})
    assert driver.get(*one[:2]) == before
    for file in work.glob("driver-limits.json"):
        assert json.loads(file.read_text())["limits"] == []
