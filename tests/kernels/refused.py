"""The agent does not start on a kernel where the product cannot work, and reports the reason.

tests/kernels/__main__.py selects these kernels (UNFIT).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.service import Service

REASONS = {
    "old": r"Linux \S+ is too old",
    "return_probes": "return probes kill containers on this kernel",
}


@pytest.mark.parametrize("why", REASONS)
def test_the_agent_refuses_to_start_and_reports_the_reason(why: str, tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.start_driver()
    try:
        with pytest.raises(AssertionError, match=f"the agent ended: fgpu: {REASONS[why]}"):
            service.start_agent()
    finally:
        service.agent = None
        service.stop()
