"""A cgroup that is frozen or is being frozen, in each version of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpu_ebpf.parker import processes


@pytest.mark.parametrize(
    ("name", "text", "frozen"),
    [
        ("cgroup.events", "populated 1\nfrozen 1\n", True),
        ("cgroup.events", "populated 1\nfrozen 0\n", False),
        ("cgroup.freeze", "1\n", True),
        ("cgroup.freeze", "0\n", False),
        ("freezer.state", "FROZEN\n", True),
        ("freezer.state", "FREEZING\n", True),
        ("freezer.state", "THAWED\n", False),
        ("cgroup.procs", "1\n", False),
    ],
)
def test_a_cgroup_counts_as_frozen_from_the_request_on(tmp_path: Path, name: str, text: str, frozen: bool) -> None:
    (tmp_path / name).write_text(text)
    assert processes._is_frozen(tmp_path) is frozen
