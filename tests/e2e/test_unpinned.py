"""Another program removes the probes. The missing enforcement is shown, and repaired if possible."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, fgpu, metrics
from tests.support.host import CONTEXT, MIB, REFUSED, SHIM, SIM
from tests.support.service import Service
from tests.support.wait import eventually


def pins() -> Path:
    return next(Path("/sys/fs/bpf/fgpu").glob("v*"))


def links() -> set[str]:
    """Return the links of process events and of the host's own files. Links of other files may come and go.

    A file that is probed again may have another number in the names of its links, so the numbers are left out.
    """
    own = {f"{path.resolve().stat().st_ino:x}" for path in (SHIM, SIM / "lib/libcuda.so.1")}
    names = [path.name for path in (pins() / "links").iterdir()]
    found = {name for name in names if name.count("-") == 1 or name.split("-")[2] in own}
    return {re.sub(r"-([a-z])[0-9a-f]+-(?=[^-]*$)", r"-\1-", name) for name in found}


def are(expected: set[str]) -> bool:
    """Return whether exactly these links exist, and print the difference."""
    found = links()
    if found != expected:
        print("missing", sorted(expected - found), "too many", sorted(found - expected))
    return found == expected


def unpin(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture
def whole(service: Service, unharmed: None) -> Iterator[Service]:
    """Return the service. Afterwards an agent runs with all probes."""
    yield service
    service.detach()
    service.start_agent()


@pytest.mark.places("host")
@pytest.mark.parametrize(
    ("alive", "every"),
    [(True, 1), (False, 1), (False, 2)],
    ids=["under a running agent", "while there is none", "every other one while there is none"],
)
def test_the_agent_restores_removed_links(service: Service, tenant, alive: bool, every: int) -> None:
    one = tenant(CONTEXT + 40 * MIB)
    one.assert_enforced()
    client = one.client()
    client.ok("context")
    before = links()
    assert len(before) > 8
    if not alive:
        service.kill_agent()
    there = sorted(path for path in (pins() / "links").iterdir() if not path.is_dir())
    for path in there[::every]:
        path.unlink(missing_ok=True)  # a running agent may restore it at once
    if not alive:
        service.start_agent()
    eventually(lambda: are(before), 5, "the links")
    with one.growing(40 * MIB):
        client.ok(f"fill {2 * MIB} 0")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact() == CONTEXT + 40 * MIB


@pytest.mark.places("host")
def test_every_output_shows_missing_enforcement(whole: Service, place) -> None:
    one = place.tenant(CONTEXT + 40 * MIB)
    one.assert_enforced()
    assert "ok    probes" in fgpu("doctor", "--driver-root", SIM, check=False).stdout
    unpin(pins() / "programs")
    unpin(pins() / "links")
    mode = "fgpu_tenant_enforcement", frozenset({("tenant", one.name), ("mode", "none")})
    eventually(lambda: metrics().get(mode) == 1, 3, "enforcement: none")
    eventually(lambda: "cannot be attached" in ask(verb="snapshot")["unenforced"], 5, "the reason")
    assert one.view()["enforcement"] == "none"
    assert "No limit is enforced: probes are missing" in fgpu("status").stdout
    said = fgpu("explain", one.path).stdout
    assert "enforcement: none: probes are missing" in said
    doctor = fgpu("doctor", "--driver-root", SIM, check=False)
    assert doctor.returncode == 1
    assert "FAIL  probes: probes are missing" in doctor.stdout
    place.close()
