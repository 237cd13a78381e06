"""Programs at uprobes have a stack that no other program writes to, if the kernel may preempt them (Linux 6.13).

Only such a kernel shows an error: there `./dev test kernels newest --suite ledger` ends in an oops.
"""

from __future__ import annotations

import pytest

from tests.bpf.compile_kit import compiled

CALL, TAIL_CALL = 0x85, 12
AT_UPROBES = {"admit", "give_back", "call_enter", "call_return"}


@pytest.mark.parametrize("arch", ["x86", "arm64"])
def test_the_kernel_detects_a_tail_call_in_programs_at_uprobes(arch: str) -> None:
    """A tail call prevents the kernel from giving these programs the stack of a processor."""
    code = compiled(arch)
    assert {name for name, made in code.items() if (CALL, 0, 0, TAIL_CALL) in made} == AT_UPROBES
