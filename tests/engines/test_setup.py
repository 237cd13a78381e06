"""Tests of `fgpu setup`: every container of Docker and Podman has the shim without a flag, and none after --undo.

If the engine has CDI, `--device fgpu.dev/share=…` works with and without setup.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.seen_kit import seen
from tests.support.commands import ask
from tests.support.containers import engines as kit
from tests.support.host import CONTEXT, GIB, KINDS, RUN_DIR, SHIM
from tests.support.service import Service
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually

podman_alone = pytest.mark.parametrize("engine", ["podman"], indirect=True)
with_cdi = pytest.mark.parametrize("engine", [name for name, kind in kit.ALL.items() if kind.cdi], indirect=True)

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: engine}}
spec:
  selector: {{cgroup: ["{group}/*"]}}
  memory: {{limit: 1GiB, max: 3GiB}}
"""


@pytest.fixture(scope="package")
def set_up(engine: kit.Engine, service: Service) -> Iterator[kit.Engine]:
    """Return an engine after `fgpu setup`, with a policy for its containers."""
    with kit.policy(service, "engine.yaml", POLICY.format(group=engine.group)):
        engine.setup()
        engine.apply()
        yield engine


@pytest.fixture
def ready(set_up: kit.Engine, unharmed: None) -> kit.Engine:
    """Return `set_up`, without any state of the previous test."""
    return set_up


def assert_held(engine: kit.Engine, *options: str, image: str = "plain") -> None:
    with engine.filled("held", *options, image=image) as admitted:
        found = seen()
        # The shim is in use: it has requested all witnessed bytes.
        assert found["admitted_bytes"] == found["witnessed_bytes"] == admitted == GIB - CONTEXT, found
        assert (found["limit_bytes"], found["used_bytes"]) == (GIB, GIB)
        held = [sum(process[f"{kind}_bytes"] for kind in KINDS) for process in driver_books()]
        assert held == [GIB]


def test_containers_have_the_shim_without_a_flag_until_undo(ready: kit.Engine) -> None:
    assert_held(ready)
    ready.setup("--undo")
    assert (ready.settings.read_text() if ready.settings.exists() else None) == ready.before
    ready.apply()
    with ready.filled("free") as admitted:
        assert admitted > GIB, "a container without the shim is refused too"
    if ready.cdi:
        assert_share(ready, "2gib", 2 * GIB)
    ready.setup()
    ready.apply()


@pytest.mark.parametrize("options", [("--read-only",), ("--user", "65534:65534"), ("--env", "LD_PRELOAD=")])
def test_containers_that_are_read_only_or_unprivileged_or_clear_ld_preload_have_the_shim(
    ready: kit.Engine, options: tuple[str, ...]
) -> None:
    assert_held(ready, *options)


@podman_alone  # Docker has one mode for all containers
def test_a_container_in_a_user_namespace_has_the_shim(ready: kit.Engine) -> None:
    assert_held(ready, "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536")


@podman_alone
def test_crio_s_monitor_accepts_the_runtime(ready: kit.Podman, tmp_path: Path) -> None:
    """CRI-O itself is not installed here. Like Podman, it lets conmon call the runtime, by the path in its settings."""
    file = tmp_path / "crio.conf.d/zz-fgpu.conf"
    file.parent.mkdir()
    runc = f'default_runtime = "runc"\n[crio.runtime.runtimes.runc]\nruntime_path = "{ready.runtime}"\n'
    file.with_name("10-crio.conf").write_text(f"[crio.runtime]\n{runc}")
    ready.setup("--undo")
    ready.fgpu("setup", "crio", "--file", file)
    ready.runtime = tomllib.loads(file.read_text())["crio"]["runtime"]["runtimes"]["runc"]["runtime_path"]
    try:
        assert "fgpu-runtime-crio-runc" in ready.runtime
        assert_held(ready)
    finally:
        del ready.runtime
        ready.fgpu("setup", "crio", "--undo")
        ready.setup()
    assert not file.exists()


BY_LABEL = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: notebooks}
spec:
  selector: {cgroup: ["libpod_parent/*"], matchLabels: {tier: notebook}}
  memory: {limit: 4GiB, max: 6GiB}
"""


@pytest.fixture
def labelled(ready: kit.Podman, service: Service, image: Path) -> Iterator[kit.Podman]:
    """Serve Podman's socket at the agent's path, with a policy by label, and an image with its own labels."""
    ready.load(image, "asks", {"tier": "notebook", "fgpu.dev/memory": "2GiB"})
    with kit.policy(service, "a-label.yaml", BY_LABEL), ready.serving(service.podman):
        yield ready


@podman_alone
@pytest.mark.parametrize(
    ("options", "which", "expected"),
    [
        (("--label", "tier=notebook"), "plain", ("notebooks", 4 * GIB)),
        (("--label", "tier=notebook", "--label", "fgpu.dev/memory=5GiB"), "plain", ("notebooks", 5 * GIB)),
        ((), "asks", ("notebooks", 2 * GIB)),  # the image's own
        ((), "plain", ("engine", GIB)),
    ],
)
def test_labels_of_podman_s_containers_select_the_policy(
    labelled: kit.Podman, options: tuple[str, ...], which: str, expected: tuple[str, int]
) -> None:
    """Docker's labels are tested in tests/e2e."""

    def has() -> tuple[str, int] | None:
        found = [t for t in ask(verb="snapshot")["tenants"] if t["tenant"] == "labelled"]
        return (found[0]["policy"], found[0]["devices"][0]["limit_bytes"]) if found else None

    try:
        done = labelled.run("labelled", *options, image=which, command="sleep 60")
        assert done.returncode == 0, done.stderr
        eventually(lambda: has() == expected, 10, f"{expected}, not {has()}")
    finally:
        labelled.remove("labelled")


@podman_alone
def test_podman_build_works_after_setup(ready: kit.Podman, tmp_path: Path) -> None:
    """A build reads the hooks that all programs share, and fails at an unknown stage."""
    (tmp_path / "Dockerfile").write_text("FROM localhost/plain:1\nRUN cat /proc/uptime >/made\n")
    limits = ["--ulimit", "nproc=100:100", "--ulimit", "nofile=1024:1024"]
    done = ready.call("build", "--no-cache", "--network", "none", *limits, "--tag", "built", tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    ready.call("rmi", "built")


def test_an_image_with_its_own_preload_list_has_the_shim(ready: kit.Engine, image: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(image, root, symlinks=True)
    (root / "etc/ld.so.preload").write_text("# ours\n/opt/build/sim/lib/libcuda.so.1 /usr/lib/old/libfgpu.so\n")
    older = root / str(SHIM).lstrip("/")  # the path of the host's shim
    older.parent.mkdir(parents=True)
    older.write_text("an older one")
    ready.load(root, "preloads")
    done = ready.run("lists", image="preloads", command="cat /etc/ld.so.preload")
    assert done.returncode == 0, done.stderr
    lines = eventually(lambda: ready.call("logs", "lists").stdout, 10, "the list of preloaded libraries").splitlines()
    ready.remove("lists")
    assert lines == ["/opt/build/sim/lib/libcuda.so.1", str(SHIM)], "the image's library, then the host's shim"
    assert_held(ready, image="preloads")


def test_a_container_does_not_start_if_the_agent_s_file_for_containers_is_incomplete(ready: kit.Engine) -> None:
    told = RUN_DIR / "containers"
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


def assert_share(engine: kit.Engine, name: str, limit: int) -> None:
    with engine.filled("share", "--device", f"fgpu.dev/share={name}") as admitted:
        assert (admitted, seen()["limit_bytes"]) == (limit - CONTEXT, limit)


@with_cdi
def test_device_options_of_an_engine_with_cdi_select_shares(ready: kit.Engine, service: Service) -> None:
    assert_share(ready, "2gib", 2 * GIB)
    assert_share(ready, "8gib", 3 * GIB)  # the policy allows no more
    uuid = ask(verb="snapshot")["devices"][0]["uuid"]
    spec = service.cdi / "mine.json"
    spec.write_text((service.cdi / "fgpu.dev-share.json").read_text().replace('"2gib"', f'"2gib:{uuid}"'))
    try:
        assert_share(ready, f"2gib:{uuid}", 2 * GIB)
    finally:
        spec.unlink()
    done = ready.run("none", "--device", "fgpu.dev/share=5gib")
    ready.remove("none")
    assert "unresolvable CDI devices fgpu.dev/share=5gib" in done.stderr, done.stderr
