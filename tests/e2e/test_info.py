"""`fgpu-info`: a program in a container reads its own limits, and changes nothing by that request."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from tests.e2e.policies_kit import Write
from tests.support.commands import ask, fgpu
from tests.support.host import BUILD, CONTEXT, GIB, MIB, REFUSED, RUN_DIR
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually

INFO = f"{BUILD}/oci/fgpu-info"
NUMBERS = itertools.count()


def info(one: Tenant) -> str:
    return Program(one, f"info-{next(NUMBERS)}", INFO).rest()


def sessions() -> int:
    return int(json.loads((RUN_DIR / "gatekeeper.json").read_text())["processes"])


@pytest.mark.places("host", "runc")
def test_fgpu_info_prints_the_limit_and_the_use_of_its_cgroup(place: Place, tenant) -> None:
    one = tenant(CONTEXT + 40 * MIB)
    client = one.client()
    with one.growing():
        client.ok(f"alloc {20 * MIB}")
    assert client.do(f"alloc {40 * MIB}") == REFUSED, "the limit is not enforced"
    limit, used = (CONTEXT >> 20) + 40, (CONTEXT >> 20) + 20
    eventually(lambda: sessions() == 1, 3, "the client's session")
    said = info(one).splitlines()
    assert re.fullmatch(rf"gpu 0 GPU-[0-9a-f-]{{36}}: limit {limit} MiB, used {used} MiB, free 20 MiB", said[0]), said
    assert said[1:] == ["  refused so far: 1"]
    (shown,) = [found for found in ask(verb="snapshot")["tenants"] if found["tenant"] == one.name]
    assert [process["pid"] for process in shown["processes"]] == [client.pid], "fgpu-info counts as a process"
    fgpu("set", one.name, "--compute", "50%", "--weight", "200")
    assert "  time: up to 50%, weight 200, normal priority" in info(one).splitlines()


@pytest.mark.places("runc")
def test_fgpu_info_reports_a_container_without_a_limit(place: Place, service) -> None:
    assert info(place.tenant(None)).startswith("no limit: ")


@pytest.mark.places("runc")
def test_a_request_of_fgpu_info_is_no_first_use(strict: Service, place: Place, write: Write) -> None:
    write("memory: {limit: 600MiB}")
    one, counts = place.tenant(None), "the limit counts against the device from the tenant's first use on"
    eventually(lambda: counts in fgpu("explain", one.path).stdout, 3, "the policy's limit")
    said = info(one)
    assert "limit 600 MiB, used 0 MiB, free 600 MiB" in said
    assert "  not used so far: " in said
    assert counts in fgpu("explain", one.path).stdout
    client = one.client()
    assert client.do(f"alloc {GIB}") == REFUSED, "the limit is not enforced"
    assert "not used so far" not in info(one)
