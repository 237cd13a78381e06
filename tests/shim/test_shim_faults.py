"""The k-th system call of the shim fails, for every k until no call is left to fail. At most, memory is refused."""

import pytest

from tests.shim.shim_kit import IN_A_FRESH_CHILD, Agent, Build

OOM = 2
SCRIPT = """F = C.CDLL("{folder}/fault.so")
F.fault_made, F.fault_arm
before = fds(); made = F.fault_made(); F.fault_arm({k}); C.set_errno(77)
r = alloc(512)
e = C.get_errno(); made = F.fault_made() - made
F.fault_arm(-1)
f = info()
out(r, e, made, before == fds(), f[0], L.fake_calls())
"""


@pytest.mark.parametrize("answer", ["managed", "unmanaged"])
def test_a_failed_system_call_of_the_shim_keeps_errno_and_refuses_memory_at_most(
    build: Build, agent: Agent, answer: str
) -> None:
    agent.do("set", answer=answer)
    agent.do("start")
    results, k = [], 0
    while True:
        k += 1
        script = IN_A_FRESH_CHILD + SCRIPT.format(folder=build.folder, k=k)
        result, errno, made, same_files, viewed, calls = agent.python(script, preload=(build.folder / "fault.so",))[0]
        assert result in (0, OOM), k
        assert (errno, same_files, viewed, calls) == (77, True, 0, 1 if result == 0 else 0), k
        results.append(result)
        if made < k:
            break
    assert k > 8
    assert results[-1] == 0
