"""Tests of the functions with probes, compared with the functions with hooks."""

from __future__ import annotations

import re
from pathlib import Path

from fgpu_ebpf.driver import probe_plan

CONTEXTS = Path(__file__).parents[3] / "shim/hooks/contexts.c"


def test_each_hooked_function_that_ends_a_context_has_a_probe() -> None:
    ends = set(re.findall(r"^END_\w+\((\w+)\)", CONTEXTS.read_text(), re.MULTILINE))
    assert len(ends) == 6
    assert ends <= probe_plan.REQUIRED.keys() | probe_plan.OPTIONAL.keys()
