"""`fgpu setup`: every container of Docker and Podman has the shim with no flag at all, and none after --undo."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import engine_kit as kit
import harness
import pytest
from harness import CONTEXT, GIB

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: engine}}
spec:
  selector: {{cgroup: ["{group}/*"]}}
  memory: {{limit: 1GiB}}
"""


@pytest.fixture(scope="package")
def set_up(engine: kit.Engine, service: harness.Service) -> Iterator[kit.Engine]:
    """An engine set up as `fgpu setup` does, with a policy for its containers."""
    path = service.policies / "engine.yaml"
    path.write_text(POLICY.format(group=engine.group))
    harness.eventually(lambda: harness.ask(verb="snapshot")["policies"]["count"] == 1, 5, "the policy")
    engine.setup()
    engine.apply()
    yield engine
    path.unlink()
    harness.eventually(lambda: harness.ask(verb="snapshot")["policies"]["count"] == 0, 5, "no policy")


@pytest.fixture
def ready(set_up: kit.Engine, unharmed: None) -> kit.Engine:
    """The same, with nothing left of the test before."""
    return set_up


def seen() -> dict:
    """The one tenant that holds something, in the Snapshot of this moment."""
    (tenant,) = [t for t in harness.ask(verb="snapshot")["tenants"] if t["processes"]]
    return tenant["devices"][0]


def assert_held(engine: kit.Engine, *options: str, image: str = "plain") -> None:
    with engine.filled("held", *options, image=image) as admitted:
        found = seen()
        assert found["admitted_bytes"] == found["witnessed_bytes"] == admitted == GIB - CONTEXT, found  # it is live
        assert (found["limit_bytes"], found["used_bytes"]) == (GIB, GIB)
        held = [sum(process[f"{kind}_bytes"] for kind in harness.KINDS) for process in harness.driver_books()]
        assert held == [GIB]


def test_no_flag_at_all_and_undone(ready: kit.Engine) -> None:
    assert_held(ready)
    ready.setup("--undo")
    assert (ready.settings.read_text() if ready.settings.exists() else None) == ready.before
    ready.apply()
    with ready.filled("free") as admitted:
        assert admitted > GIB, "without the shim it is not refused: what was seen above was ours"
    ready.setup()
    ready.apply()


@pytest.mark.parametrize("options", [("--read-only",), ("--user", "65534:65534"), ("--env", "LD_PRELOAD=")])
def test_containers_of_every_kind(ready: kit.Engine, options: tuple[str, ...]) -> None:
    assert_held(ready, *options)


def test_an_image_with_preloads_of_its_own(ready: kit.Engine, image: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(image, root, symlinks=True)
    (root / "etc/ld.so.preload").write_text("# ours\n/opt/build/sim/lib/libcuda.so.1 /usr/lib/old/libfgpu.so\n")
    ready.load(root, "preloads")
    done = ready.run("lists", image="preloads", command="cat /etc/ld.so.preload")
    assert done.returncode == 0, done.stderr
    lines = harness.eventually(lambda: ready.call("logs", "lists").stdout, 10, "what it preloads").splitlines()
    ready.remove("lists")
    assert lines == ["/opt/build/sim/lib/libcuda.so.1", str(harness.SHIM)], "its own, not its shim, then the host's"
    assert_held(ready, image="preloads")


def test_a_set_up_that_cannot_work_says_so(ready: kit.Engine) -> None:
    told = harness.RUN_DIR / "containers"
    text = told.read_text()
    told.write_text("nothing of use\n")
    try:
        done = ready.run("broken")
        ready.remove("broken")
    finally:
        told.write_text(text)
    assert done.returncode
    if isinstance(ready, kit.Docker):
        assert "is incomplete: restart the agent" in done.stderr, done.stderr
    assert_held(ready)


def test_podman_gives_shares(ready: kit.Engine) -> None:
    """Docker has CDI from version 25 on."""
    if isinstance(ready, kit.Docker):
        return
    with ready.filled("share", "--device", "fgpu.dev/share=4gib") as admitted:
        assert admitted == GIB - CONTEXT, "the policy allows no more"
    done = ready.run("none", "--device", "fgpu.dev/share=5gib")
    assert "unresolvable CDI devices fgpu.dev/share=5gib" in done.stderr, done.stderr
