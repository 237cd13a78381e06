"""Podman of a user: the shim by name and without any flag, and the limit from the policy of the user's slice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.seen_kit import seen
from tests.support.commands import ask, metrics
from tests.support.containers import engines as kit
from tests.support.host import CONTEXT, GIB, KINDS
from tests.support.service import Service
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually

POLICY = f"""
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: anna}}
spec:
  selector: {{cgroup: "{kit.Rootless.group}"}}
  memory: {{limit: 1GiB}}
"""


@pytest.fixture(scope="module")
def anna(service: Service, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Rootless]:
    """Return the engine of a user, with a policy for the user's slice."""
    work = tmp_path_factory.mktemp("rootless")
    with contextlib.ExitStack() as stack:
        stack.enter_context(kit.policy(service, "anna.yaml", POLICY))
        cave = stack.enter_context(contextlib.closing(kit.Cave(work, service.cdi)))
        found = stack.enter_context(contextlib.closing(kit.Rootless(cave, work)))
        found.load(image, "plain")
        yield found


@pytest.fixture
def ready(anna: kit.Rootless, unharmed: None) -> kit.Rootless:
    """Return `anna`, without any state of the previous test."""
    return anna


def assert_held(engine: kit.Rootless, *options: str) -> None:
    """Check that one container fills the user's limit. The slice counts all containers so far."""

    def counted(kind: str) -> int:
        slices = [t for t in ask(verb="snapshot")["tenants"] if t["path"] == f"/{engine.group}"]
        return sum(device[f"{kind}_bytes"] for tenant in slices for device in tenant["devices"])

    before = counted("admitted"), counted("witnessed")
    with engine.filled("held", *options) as admitted:
        assert admitted == GIB - CONTEXT
        # The shim is in use: it has requested all witnessed bytes.
        assert (counted("admitted") - before[0], counted("witnessed") - before[1]) == (admitted, admitted)
        assert (counted("limit"), counted("used")) == (GIB, GIB)
        held = [sum(process[f"{kind}_bytes"] for kind in KINDS) for process in driver_books()]
        assert held == [GIB]


def test_a_container_gets_the_shim_by_name(ready: kit.Rootless) -> None:
    assert_held(ready, "--device", "fgpu.dev/shim=all")


def test_containers_have_the_shim_without_a_flag_until_undo(ready: kit.Rootless) -> None:
    ready.setup()
    assert_held(ready)
    ready.setup("--undo")
    with ready.filled("free") as admitted:
        assert admitted > GIB - CONTEXT, "a container without the shim is refused too"
        eventually(lambda: seen()["used_bytes"] > GIB, 5, "a charge to the user's slice")

        def named() -> list[float]:
            return [value for (name, _), value in metrics().items() if name == "fgpu_bypassing_processes"]

        eventually(lambda: named() == [1], 5, "the program without the shim in the metrics")


def test_a_share_is_refused(ready: kit.Rootless) -> None:
    """Only root may request shares."""
    done = ready.run("share", "--device", "fgpu.dev/share=2gib")
    ready.remove("share")
    assert done.returncode == 126
    assert "error executing hook" in done.stderr, done.stderr
