"""NVML fails for processes or completely. Limits hold, charges stay, and the ledger is exact again afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.support.commands import fgpu, metrics, metrics_page
from tests.support.host import CONTEXT, MIB, REFUSED, SIM
from tests.support.service import Service
from tests.support.wait import eventually

LIMIT = CONTEXT + 200 * MIB
PERIODS = 2.0  # seconds: four reconciles


@pytest.mark.places("host")
@pytest.mark.parametrize("kind", ["nvml-na", "nvml-stall:60s", "nvml-gone"])
def test_charges_stay_and_the_limit_holds_while_nvml_fails(
    service: Service, fault: Callable[[str], None], tenant, kind: str
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    client = one.client()
    client.ok("context")
    with one.growing():
        (kept,) = client.ok(f"alloc {150 * MIB}")[:1]
    assert one.assert_exact() == CONTEXT + 150 * MIB
    fault(kind)
    until = time.monotonic() + PERIODS
    while time.monotonic() < until:
        assert one.memory()["used_bytes"] == CONTEXT + 150 * MIB
        assert client.do(f"alloc {51 * MIB}") == REFUSED
        time.sleep(0.1)
    unknown = "the drift is not shown while NVML does not answer"
    eventually(lambda: one.memory()["drift_bytes"] is None or "stall" in kind, 2, unknown)
    client.ok(f"alloc {40 * MIB}")
    assert client.do(f"alloc {20 * MIB}") == REFUSED
    client.ok(f"free {kept}")
    eventually(
        lambda: one.memory()["used_bytes"] == CONTEXT + 40 * MIB == one.driver(), 2, "the release of freed bytes"
    )
    late = one.client()  # only the probes report this process
    assert late.do("context") == REFUSED, "a context was admitted beyond the limit"
    service.check()
    fault("reset")
    assert one.assert_exact(10) == CONTEXT + 40 * MIB


@pytest.mark.places("host")
def test_nvml_is_restarted_if_it_has_lost_its_connection_to_the_driver(fault: Callable[[str], None], tenant) -> None:
    """Each call of NVML in the agent returns "Unknown Error" until NVML is initialised again."""
    one = tenant(LIMIT)
    one.assert_enforced()
    one.client().ok("context")
    eventually(lambda: one.memory()["drift_bytes"] == 0, 3, "a comparison with NVML")
    fault("nvml-cut")
    eventually(lambda: one.memory()["drift_bytes"] is None, 5, "no drift without an answer of NVML")
    eventually(lambda: one.memory()["drift_bytes"] == 0, 10, "a comparison with NVML")
    assert one.assert_exact() == CONTEXT


@pytest.mark.places("host")
def test_metrics_show_the_age_of_nvml_s_last_answer_and_no_drift_while_nvml_stalls(
    service: Service, fault: Callable[[str], None], tenant
) -> None:
    one = tenant(LIMIT)
    one.client().ok("context")
    eventually(lambda: one.memory()["drift_bytes"] == 0, 3, "a comparison with NVML")
    key = "fgpu_reconcile_age_seconds", frozenset({("gpu", "0")})
    eventually(lambda: metrics(metrics_page())[key] < 3, 3, "an answer of NVML that is less than 3 s old")
    assert "ok    reconcile" in fgpu("doctor", "--driver-root", SIM, check=False).stdout
    fault("nvml-stall:60s")
    drift = "fgpu_memory_drift_bytes", frozenset({("tenant", one.name), ("gpu", "0")})
    eventually(lambda: metrics(metrics_page())[key] > 5.2, 8, "the age of NVML's last answer")
    eventually(lambda: drift not in metrics(metrics_page()), 2, "no drift without a measurement")
    said = metrics(metrics_page())
    assert said["fgpu_memory_used_bytes", drift[1]] == CONTEXT
    fault("reset")
    eventually(lambda: metrics(metrics_page())[key] < 3, 10, "an answer of NVML")
    eventually(lambda: metrics(metrics_page()).get(drift) == 0, 5, "a comparison with NVML")
