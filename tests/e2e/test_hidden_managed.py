"""Managed memory is in no row of NVML. A process that hides it from the probes is charged for what the driver holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.bypass_kit import Bypass
from tests.e2e.doctored import with_other_names
from tests.support.host import BUILD, CONTEXT, GIB, MIB, SIM
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually, steadily

LARGE = 16 * MIB  # of managed.c
SECONDS = 1.0  # until the ledger has the bytes that the driver allocated
DRIVER = (SIM / "lib/libcuda.so.1").resolve()


@pytest.fixture
def hiding(tenant: Callable[[int], Tenant]) -> Bypass:
    """Start a process that allocates managed memory without the shim."""
    one = tenant(2 * GIB)
    one.assert_enforced()
    client = Bypass(one, "managed", f"{BUILD}/e2e/managed")
    assert one.assert_exact() == CONTEXT
    return client


def assert_charged(client: Bypass, bytes_: int) -> None:
    """Check that within a second the ledger holds as much as the driver, and that this lasts for a second."""
    one = client.tenant
    assert one.driver(("managed",)) == bytes_ > 0
    enough = lambda: one.memory()["used_bytes"] >= one.driver() == bytes_ + CONTEXT  # noqa: E731
    eventually(enough, SECONDS, f"{one.memory()}, the driver {one.driver()}")
    steadily(enough, SECONDS, SECONDS + 0.5, "the charge of the driver's bytes")


@pytest.mark.timed
@pytest.mark.places("cgroups")
def test_managed_memory_is_charged_while_a_thread_overwrites_returned_pointers(hiding: Bypass) -> None:
    for times in (1, 2, 3):
        (bytes_,) = hiding.ok("overwrite 40")
        assert bytes_ == times * 40 * LARGE
        assert_charged(hiding, bytes_)


@pytest.mark.timed
@pytest.mark.places("cgroups")
def test_managed_memory_is_charged_when_vforked_children_allocate_it(hiding: Bypass) -> None:
    (bytes_,) = hiding.ok("vfork 60")
    assert bytes_ == 60 * LARGE
    assert_charged(hiding, bytes_)
    assert hiding.ok("free") == [0]
    hiding.tenant.assert_exact()


@pytest.mark.timed
@pytest.mark.places("cgroups")
def test_managed_memory_stays_charged_after_a_fake_free_of_the_tenant_s_library(
    service: Service, hiding: Bypass, tmp_path: Path
) -> None:
    """The library is the driver's, except that its cuMemFree_v2 frees nothing and returns success."""
    library = tmp_path / "own" / "libcuda.so.1"
    library.parent.mkdir()
    names = {"cuMemFree_v2": "cuMemFree_v0", "cuDriverGetVersion": "cuMemFree_v2"}
    library.write_bytes(with_other_names(DRIVER.read_bytes(), names))
    (bytes_,) = hiding.ok("vfork 60")
    hiding.ok(f"load {library}")
    eventually(lambda: f"probed '{library}' as UNKNOWN" in service.log.read_text(), 35, "the probes of the library")
    assert hiding.ok("stranger") == [bytes_]
    assert_charged(hiding, bytes_)
