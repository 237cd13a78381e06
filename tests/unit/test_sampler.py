"""Tests of the sampler of NVML in bench/gpu: a maximum of nothing is no evidence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.unit.benchmark_kit import benchmarks

GIB = 1 << 30


class Tenant:
    """A tenant with one process."""

    name = "one"

    def pids(self) -> list[int]:
        return [1]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return bench.gpu.claims."""
    with benchmarks(monkeypatch):
        from bench.gpu import claims

        yield claims


def sampler(claims: ModuleType, monkeypatch: pytest.MonkeyPatch, figures: Iterator[int]) -> Any:
    """Return a sampler that has seen these figures. After the last figure, NVML raises an error."""
    monkeypatch.setattr(claims.nvml, "bytes_of", lambda _: next(figures))
    started = claims.Sampler(Tenant())
    started.start()
    while started.is_alive() and not started.samples:
        started.join(0.01)
    return started


def test_a_tenant_within_its_limit_passes(claims: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler(claims, monkeypatch, itertools.repeat(GIB)).end({"one": GIB})


def test_a_tenant_above_its_limit_fails(claims: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="NVML never above the limit"):
        sampler(claims, monkeypatch, itertools.repeat(2 * GIB)).end({"one": GIB})


def test_a_tenant_that_nvml_has_never_shown_fails(claims: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="one: NVML has shown memory"):
        sampler(claims, monkeypatch, itertools.repeat(0)).end({"one": GIB})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("figures", [[], [GIB]], ids=["at once", "after one sample"])
def test_a_sampling_that_has_failed_fails(
    claims: ModuleType, monkeypatch: pytest.MonkeyPatch, figures: list[int]
) -> None:
    failing = sampler(claims, monkeypatch, iter(figures))
    failing.join(60)
    with pytest.raises(AssertionError, match="NVML was sampled until the end"):
        failing.end({"one": GIB})
