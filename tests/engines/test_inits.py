"""Containers in which process 1 is a real systemd: programs of units, and of commands from outside, are limited."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import inits_engines_kit, inits_kit, inits_lxd_kit
from tests.support import fresh_host
from tests.support.containers import engines as kit
from tests.support.host import CONTEXT, GIB
from tests.support.service import Service

ROOM = GIB - CONTEXT
SHARES = "shares: [1gib]\n"
KINDS = {
    "runc": inits_engines_kit.OfBundles,
    "crun": inits_engines_kit.OfCrun,
    "lxc": inits_engines_kit.OfLxc,
    "unprivileged-lxc": inits_engines_kit.OfUnprivilegedLxc,
    "lxd": inits_lxd_kit.OfLxd,
    "incus": inits_lxd_kit.OfIncus,
    "nspawn": inits_engines_kit.OfNspawn,
}
HIDDEN = "test -d /run/systemd/system && test ! -e /run/fgpu/shim/shim.sock"
LXC = "40-lxc.yaml"
POLICIES = {"lxc": LXC, "unprivileged-lxc": LXC, "lxd": LXC, "incus": LXC, "nspawn": "40-nspawn.yaml"}

pytestmark = pytest.mark.timeout(240, func_only=True)  # the first run creates a root and unpacks LXC


@pytest.fixture(scope="module")
def sharing(service: Service) -> Iterator[Service]:
    """Let the agent publish the share of these tests."""
    fresh_host.fresh_root()
    inits_kit.unpacked()
    before = service.config.read_text()
    service.kill_agent()
    service.config.write_text(before + SHARES)
    service.start_agent()
    yield service
    service.kill_agent()
    service.config.write_text(before)
    service.start_agent()


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, sharing: Service, unharmed: None, tmp_path: Path
) -> Iterator[inits_kit.Inits]:
    """Return a place with containers of that kind, limited to 1 GiB by a share or by the policy of the page."""
    spec = json.loads((sharing.cdi / "fgpu.dev-share.json").read_text())
    place = KINDS[request.param](tmp_path, spec)
    with contextlib.ExitStack() as stack:
        if file := POLICIES.get(request.param):
            text = inits_kit.block(f"/etc/fgpu/policy.d/{file}")
            text = text.replace('"lxc.payload', f'"{inits_engines_kit.own_cgroup()}/lxc.payload'.replace('"/', '"'))
            stack.enter_context(kit.policy(sharing, file, text))
        stack.callback(place.close)
        yield place


def test_programs_have_their_limit_in_a_container_with_systemd(place: inits_kit.Inits) -> None:
    one = place.tenant(None)
    place.assert_enforced(one)
    done = place.run(one.folder.name, "sh", "-c", HIDDEN)
    assert done.returncode == (not place.hides_run), done.stderr
    one.assert_holds(ROOM)
    place.entered(one).assert_holds(ROOM)
