"""Tests of tests/changed.py: which tests a change can break."""

from __future__ import annotations

import pytest

from tests.changed import ALWAYS, broken_by


@pytest.mark.parametrize(
    ("path", "broken", "spared"),
    [
        (
            "fgpu_ebpf/ledger/orphans.py",
            {"tests/bpf", "tests/e2e", "tests/unit/agent/test_nvml_reconcile.py"},
            {"tests/page"},
        ),
        ("tests/unit/policy/test_globs.py", {"tests/unit/policy/test_globs.py"}, {"tests/unit/test_xids.py"}),
        ("tests/unit/agent/ledger_kit.py", {"tests/unit"}, {"tests/e2e"}),
        ("tests/support/wait.py", {"tests/e2e/test_limit.py", "tests/gatekeeper/test_hello.py"}, {"tests/unit"}),
        ("tests/e2e/conftest.py", {"tests/e2e"}, {"tests/bpf"}),
        ("shim/core/driver.c", {"tests/shim", "tests/e2e"}, {"tests/page"}),
        ("tests/programs/client.c", {"tests/e2e", "tests/shim"}, {"tests/page"}),
        ("docs/policy.md", {"tests/docs"}, {"tests/e2e"}),
        ("README.md", {"tests/docs"}, {"tests/e2e"}),
        ("dev", {"tests"}, set()),
    ],
)
def test_the_tests_that_a_change_can_break_are_selected(path: str, broken: set[str], spared: set[str]) -> None:
    found = set(broken_by([path]))
    assert broken <= found
    assert not spared & found
    assert "tests" in found or all(name in found or "tests/unit" in found for name in ALWAYS)
