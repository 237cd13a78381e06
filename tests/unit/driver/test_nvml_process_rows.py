"""Tests of the combination of NVML's two lists of processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from fgpu_ebpf.driver.nvml import Nvml
from fgpu_ebpf.driver.nvml_process_rows import COMPUTE, GRAPHICS, ProcessRows

Said = list[tuple[int, int | None]]


class Question:
    """A function of NVML's library. Bytes of None are "N/A"."""

    def __init__(self, said: Said, code: int = 0) -> None:
        self._said, self._code, self.calls = said, code, 0

    def __call__(self, _: object, n: Any, rows: Any) -> int:
        room, n._obj.value = n._obj.value, len(self._said)
        self.calls += 1
        if room < len(self._said):
            return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
        for row, (pid, bytes_) in zip(rows, self._said, strict=False):
            row.pid, row.usedGpuMemory = pid, 2**64 - 1 if bytes_ is None else bytes_
        return self._code


def nvml_of(**questions: Question) -> Nvml:
    nvml = Nvml.__new__(Nvml)
    nvml._handles, nvml._rows = {0: None}, ProcessRows(SimpleNamespace(**questions))  # type: ignore[arg-type]
    nvml._lost, nvml._restart = set(), lambda: None  # type: ignore[method-assign]  # this library cannot be restarted
    return nvml


def rows(compute: Said, graphics: Said) -> dict[int, int | None] | None:
    return nvml_of(**{COMPUTE: Question(compute), GRAPHICS: Question(graphics)}).process_bytes(0)


@pytest.mark.parametrize(
    ("said", "held"),
    [([(7, 5), (7, 6), (8, 9)], {7: 11, 8: 9}), ([(7, 5), (7, None), (8, 9)], {7: None, 8: 9}),
     ([(7, None), (7, 5)], {7: None}), ([], {})],
)  # fmt: skip
@pytest.mark.parametrize("draws", [False, True])
def test_bytes_of_a_process_are_the_sum_of_its_rows_and_unknown_if_a_row_is_unknown(
    said: Said, held: dict[int, int | None], draws: bool
) -> None:
    assert rows([], said) == held if draws else rows(said, []) == held


@pytest.mark.parametrize(
    ("compute", "graphics", "held"),
    [([(7, 5)], [(8, 9)], {7: 5, 8: 9}), ([(7, 5)], [(7, 5)], {7: 5}), ([(7, 5)], [(7, 6)], {7: 6}),
     ([(7, 6)], [(7, 5)], {7: 6}), ([(7, None)], [(7, 5)], {7: None}), ([(7, 5)], [(7, None)], {7: None})],
)  # fmt: skip
def test_a_process_in_both_lists_has_the_larger_value_and_none_if_a_value_is_unknown(
    compute: Said, graphics: Said, held: dict[int, int | None]
) -> None:
    assert rows(compute, graphics) == held


def test_each_list_is_requested_once_per_reading_and_again_only_if_the_buffer_was_too_small() -> None:
    many, few = Question([(pid, pid) for pid in range(300)]), Question([(7, 5)])
    nvml = nvml_of(**{COMPUTE: many, GRAPHICS: few})
    for _ in range(3):
        assert nvml.process_bytes(0) == {pid: pid for pid in range(300)} | {7: 7}
    assert (many.calls, few.calls) == (2 + 1 + 1, 3), "another call for a larger buffer"


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
def test_the_compute_list_is_used_for_a_device_without_graphics(code: int) -> None:
    questions = {COMPUTE: Question([(7, 5)]), GRAPHICS: Question([], code)}
    assert nvml_of(**questions).process_bytes(0) == {7: 5}


def test_the_compute_list_is_used_with_a_driver_without_the_graphics_list() -> None:
    assert nvml_of(**{COMPUTE: Question([(7, 5)])}).process_bytes(0) == {7: 5}


@pytest.mark.parametrize("failing", [COMPUTE, GRAPHICS])
def test_bytes_of_processes_are_unknown_if_one_of_nvml_s_lists_fails(failing: str) -> None:
    """A list that fails may have contained any process, so nothing is known about any of them."""
    questions = {COMPUTE: Question([(7, 5)]), GRAPHICS: Question([(8, 9)])}
    questions[failing] = Question([], pynvml.NVML_ERROR_UNKNOWN)
    assert nvml_of(**questions).process_bytes(0) is None


def test_a_driver_without_any_list_gives_no_answer() -> None:
    assert nvml_of().process_bytes(0) is None
