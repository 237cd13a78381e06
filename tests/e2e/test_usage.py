"""The use of devices is measured, shown, and kept on disk after the agent exits."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.spin_kit import Spin
from tests.support.commands import fgpu, metrics
from tests.support.host import CONTEXT, GIB
from tests.support.service import Service
from tests.support.wait import eventually

pytestmark = pytest.mark.timed
KERNEL_SECONDS = 200e-6
SECONDS = 8  # NVML's figures are samples of about a second


@pytest.fixture
def agent(service: Service, unharmed: None) -> Iterator[Service]:
    """Return the service, and start its agent again if a test has ended the agent."""
    yield service
    if service.agent is None or service.agent.poll() is not None:
        service.start_agent()


def stored(*words: str) -> dict[tuple[str, str], dict[str, float]]:
    records = json.loads(fgpu("usage", "--since", "90m", "--json", *words).stdout)
    return {(record["tenant"], record["source"]): record for record in records}


@pytest.mark.parametrize(("limits", "source"), [((), "nvml"), (("--compute", "50%"), "turns")])
def test_the_agent_stores_a_tenant_s_device_time_and_memory_on_disk(
    agent: Service, start: Callable[..., Spin], limits: tuple[str, ...], source: str
) -> None:
    busy = start(f"busy-{source}", *limits)
    busy.compute()  # now limits are enforced
    busy.begin(SECONDS)
    ran, part = busy.kernels() * KERNEL_SECONDS, 0.5 if limits else 1.0

    def counted(name: str) -> float:
        return sum(value for (family, labels), value in metrics().items()
                   if family == name and ("tenant", busy.name) in labels)  # fmt: skip

    eventually(lambda: counted("fgpu_tenant_run_seconds_total") > 0.6 * ran, 3, "measured time")
    eventually(lambda: counted("fgpu_tenant_idle_seconds_total") >= 1, 5, "idle time after the work")
    agent.kill_agent(signal.SIGTERM)
    found = stored()[busy.name, source]
    sample_seconds = 1.0 if source == "nvml" else 0.0
    # A turn also includes the time in which the program waits for a processor.
    assert 0.9 * ran - sample_seconds < found["run_seconds"] < 1.1 * part * SECONDS + sample_seconds
    assert 1 <= found["idle_seconds"] < found["held_seconds"]
    assert CONTEXT <= found["memory_byte_seconds"] / found["held_seconds"] < GIB
    assert busy.name in fgpu("usage").stdout
