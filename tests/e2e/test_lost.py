"""F10: a device is reset, lost, put into MIG mode, or has an ECC error while agent and programs use it.

The agent uses the device again when it answers, and the ledger drops memory that is gone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest

from tests.support.commands import metrics
from tests.support.host import CONTEXT, MIB, REFUSED
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

LIMIT = CONTEXT + 40 * MIB
AGE = "fgpu_reconcile_age_seconds", frozenset({("gpu", "0")})
REFUSALS = "fgpu_memory_refused_total"
RESETS = ("device-reset", "mig,device-reset")  # the mode changes with a reset, and ends with the fault
Scale = Callable[[int, int, int], int]


def is_seen() -> bool:
    """Return whether NVML has just answered for the device."""
    return metrics()[AGE] < 0.6


def begin(one: Tenant) -> Client:
    """Start a program of the tenant that holds memory."""
    client = one.client()
    client.ok(f"alloc {20 * MIB}")
    return client


def assert_gone(one: Tenant, client: Client) -> None:
    """Close the pipes of a program, and wait for its exit."""
    client.close()
    eventually(lambda: client.pid not in one.pids(), 5, "the exit of the program")


def lives_as_ever(one: Tenant) -> None:
    """Check that a program of the tenant gets its limit, and no more."""
    client = one.client()
    client.ok(f"alloc {40 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact(10) == LIMIT
    os.kill(client.pid, 9)
    eventually(lambda: one.memory()["used_bytes"] == 0, 1, "the release of the memory")
    client.close()


@pytest.mark.timeout(900)
@pytest.mark.places("host")
def test_the_agent_uses_a_reset_device_again(
    service: Service, fault: Callable[[str], None], tenant, scale: Scale
) -> None:
    """The device has the same mode or another one afterwards. Programs from before the reset continue or exit."""
    one = tenant(LIMIT)
    one.assert_enforced()
    for how, goes_on in itertools.islice(itertools.cycle(itertools.product(RESETS, (True, False))), scale(2, 10, 50)):
        client = begin(one)
        fault(how)
        assert not client.do(f"alloc {2 * MIB}").startswith("ok"), "an allocation on the lost device was admitted"
        if not goes_on:
            client.kill()
        eventually(lambda: one.memory()["used_bytes"] == 0 == one.driver(), 10, "the release of the lost memory")
        eventually(is_seen, 5, "an answer of NVML")
        assert not one.view()["bypassing"]
        assert_gone(one, client)
        lives_as_ever(one)
        fault("reset")


@pytest.mark.timeout(900)
@pytest.mark.places("host")
def test_a_lost_device_s_charges_stay_until_nvml_answers_and_metrics_show_the_answer_s_age(
    service: Service, fault: Callable[[str], None], tenant, scale: Scale
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    for _ in range(scale(1, 3, 15)):
        client = begin(one)
        fault("device-lost")
        assert not client.do(f"alloc {2 * MIB}").startswith("ok")
        eventually(lambda: metrics()[AGE] > 2, 10, "the age of NVML's last answer")
        assert one.memory()["limit_bytes"] == LIMIT
        assert one.memory()["used_bytes"] == CONTEXT + 20 * MIB, "memory was released before NVML answered again"
        service.check()
        fault("reset")
        eventually(is_seen, 5, "an answer of NVML")
        eventually(lambda: one.memory()["used_bytes"] == 0, 10, "the release of the lost memory")
        assert_gone(one, client)
        lives_as_ever(one)


def refusals(one: Tenant) -> float:
    """Return the number of refusals of the tenant, for any reason."""
    return sum(n for (name, labels), n in metrics().items() if name == REFUSALS and ("tenant", one.name) in labels)


@pytest.mark.timeout(900)
@pytest.mark.places("host")
def test_a_process_with_an_ecc_error_is_charged_until_it_ends(
    service: Service, fault: Callable[[str], None], tenant, scale: Scale
) -> None:
    """An ECC error is no refusal. A new program works normally beside the failed one, which keeps running."""
    one = tenant(2 * LIMIT)
    one.assert_enforced()
    for _ in range(scale(1, 7, 35)):
        client, refused = begin(one), refusals(one)
        fault("ecc")
        assert client.do(f"alloc {2 * MIB}") == "CUDA_ERROR_ECC_UNCORRECTABLE"
        assert refusals(one) == refused
        later = begin(one)
        assert one.assert_exact(5) == 2 * (CONTEXT + 20 * MIB)
        client.kill()
        eventually(lambda: one.memory()["used_bytes"] == CONTEXT + 20 * MIB, 1, "the charge of one program")
        assert one.assert_exact(5) == CONTEXT + 20 * MIB
        assert_gone(one, client)
        assert_gone(one, later)
        eventually(lambda: one.memory()["used_bytes"] == 0, 1, "the release of all memory")
