"""A tenant with a process that is only counted: every output shows the same word, and no output shows `kernel`."""

from __future__ import annotations

import json
import urllib.request

import pytest

from tests.e2e.bypass_kit import BYPASS, Bypass
from tests.support.commands import fgpu, metrics
from tests.support.host import CONTEXT, LISTEN, MIB
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

LIMIT = CONTEXT + 400 * MIB
WITHOUT = f"env -u LD_PRELOAD {BYPASS} plain"
WORDS = "kernel", "counted", "cooperative", "observe", "none"


def words(one: Tenant) -> dict[str, str]:
    """Return the word that each output shows for the tenant."""
    (top,) = [line for line in fgpu("top", "-1").stdout.splitlines() if line.strip().startswith(one.name)]
    (status,) = [line for line in fgpu("status").stdout.splitlines() if line.split()[0:1] == [one.name]]
    exported = [
        dict(labels)["mode"]
        for (name, labels), value in metrics().items()
        if name == "fgpu_tenant_enforcement" and ("tenant", one.name) in labels and value == 1
    ]
    return {
        "snapshot": one.view()["enforcement"],
        "explain": json.loads(fgpu("explain", one.path, "--json").stdout)["enforcement"],
        "explain, in words": fgpu("explain", one.path).stdout.split("enforcement: ")[1].split()[0].strip(":"),
        "top": top.split()[-1],
        "status": status.split()[-1],
        "metrics": ",".join(exported),
    }


def assert_said(one: Tenant, word: str) -> None:
    assert word in WORDS
    eventually(lambda: set(words(one).values()) == {word}, 5, f"{word}: {words(one)}")


@pytest.mark.places("cgroups")
def test_no_output_shows_kernel_for_a_tenant_above_its_limit(service: Service, tenant) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    assert_said(one, "kernel")
    client = Bypass(one, "counted", WITHOUT)
    assert client.do(f"alloc {700 * MIB}").startswith("ok"), "an allocation was refused under `onBypass: report`"
    assert_said(one, "counted")
    assert one.memory()["used_bytes"] > LIMIT
    assert str(client.pid) in fgpu("status").stdout, "`fgpu status` does not name the process"
    assert "only counted" in fgpu("explain", one.path).stdout
    with urllib.request.urlopen(f"http://{LISTEN}/", timeout=20) as answer:
        page = answer.read().decode()
    assert 'class="unheld"' in page
    assert "only counted" in page
    client.kill()
    assert_said(one, "kernel")
