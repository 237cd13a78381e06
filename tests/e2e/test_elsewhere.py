"""Memory of one device that is allocated or freed while another device is current counts on the device that holds it.

The tests need a driver with two devices and their own agent, so they run themselves in a separate mount namespace.
"""

from __future__ import annotations

import pytest

from tests.support.host import BUILD, CONTEXT, GIB, GPUS, MIB
from tests.support.service import run_on_devices

inside = pytest.mark.skipif(GPUS == "1", reason="is run by test_the_file_s_tests_pass_on_two_devices")
ROUNDS = 2
LIMIT = CONTEXT + GIB
BYTES = 640 * MIB  # of one round: two rounds together exceed the limit
WAYS = (
    "plain", "plain_there", "plain_back", "plain_default", "pitched", "managed", "async", "async_there", "async_back",
    "async_afar", "pool_default", "pool_own", "mapped", "array", "mipmapped",
)  # fmt: skip


@pytest.mark.skipif(GPUS != "1", reason="this run has these devices already")
def test_the_file_s_tests_pass_on_two_devices() -> None:
    run_on_devices(__file__)


@inside
@pytest.mark.places("host")
def test_memory_is_charged_to_its_own_device_whichever_device_is_current(tenant) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    said = one.run(f"{BUILD}/e2e/elsewhere {ROUNDS} {BYTES // MIB}", 60).splitlines()
    expected = [f"{way} {device} {ROUNDS} {ROUNDS} {BYTES // MIB} 0 0 0" for way in WAYS for device in (0, 1)]
    assert [line for line in said if line not in expected] == []
    assert len(said) == len(expected)
