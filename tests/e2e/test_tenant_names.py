"""Cgroups with equal last path components, as a service of several users has: each tenant has a unique name."""

from __future__ import annotations

import collections
import contextlib
import os
import re
from collections.abc import Iterator

import pytest

from tests.support.commands import fgpu, metrics_page, output
from tests.support.host import GIB, RUN_DIR, cgroup_root
from tests.support.service import Service
from tests.support.wait import eventually

GROUP = f"fgpu-names-{os.getpid()}"
POLICY = f"""
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: names}}
spec:
  selector: {{cgroup: ["{GROUP}/*/job"]}}
  memory: {{limit: 2GiB}}
"""
USERS = ("zoe", "yan", "ann", "bob")  # in the order in which their cgroups are created


@pytest.fixture
def jobs(service: Service, unharmed: None) -> Iterator[list[str]]:
    """Yield the paths of cgroups that a policy matches, oldest first."""
    root = cgroup_root() / GROUP
    file = service.policies / "50-names.yaml"
    file.write_text(POLICY)
    try:
        for user in USERS:
            (root / user / "job").mkdir(parents=True)
        yield [f"/{GROUP}/{user}/job" for user in USERS]
    finally:
        file.unlink()
        for user in USERS:
            for folder in (root / user / "job", root / user):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        root.rmdir()


def names() -> dict[str, str]:
    found = output("status")["tenants"]
    return {tenant["path"]: tenant["tenant"] for tenant in found if tenant["path"].startswith(f"/{GROUP}/")}


def assert_each_has_its_own(jobs: list[str], had: dict[str, str]) -> None:
    eventually(lambda: len(names()) == len(jobs), 10, "all of them managed")
    assert names() == had
    samples = collections.Counter(re.findall(r"^(\w+(?:\{.*\})?) ", metrics_page(), re.MULTILINE))
    assert [sample for sample, times in samples.items() if times > 1] == []
    for path, name in had.items():
        fgpu("set", name, "--memory", "1GiB")
        found = output("status")["tenants"]
        limited = [one["path"] for one in found if any(d["limit_bytes"] == GIB for d in one["devices"])]
        assert limited == [path]
        fgpu("unset", name)


def test_tenants_with_equal_cgroup_names_keep_unique_names_after_restarts(service: Service, jobs: list[str]) -> None:
    ids = [(cgroup_root() / path.lstrip("/")).stat().st_ino for path in jobs]
    eventually(lambda: len(names()) == len(jobs), 10, "all of them managed")
    in_order = dict(zip(jobs, ["job", *(f"job-{number}" for number in ids[1:])], strict=True))
    assert_each_has_its_own(jobs, in_order)
    for forgotten in (False, True):
        service.kill_agent()
        if forgotten:  # the state at the first start after an upgrade
            (RUN_DIR / "tenants.json").unlink()
        service.start_agent()
        assert_each_has_its_own(jobs, in_order)
    (cgroup_root() / jobs.pop(0).lstrip("/")).rmdir()
    left = {path: name for path, name in in_order.items() if path in jobs}
    eventually(lambda: names() == left, 5, "the removal of the oldest tenant")
    service.kill_agent()
    service.start_agent()
    assert_each_has_its_own(jobs, left)
