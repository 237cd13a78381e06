"""A verdict is read from a place that no other process of the level can write, on pages with and without tags."""

import subprocess
from collections.abc import Callable

import pytest

from tests.shim.shim_kit import DEADLINE, PREAMBLE, ROOT, SYSTEM_PYTHON, Agent, Build

MEMORY, HELLO, TAGGED, OOM = 0, 3, 0x200, 2
MIB = 1 << 20
TALK = "L.cuInit(0); out(os.getpid())\nfor line in sys.stdin: out(alloc(512))\n"


@pytest.fixture
def tagged(agent: Agent) -> Agent:
    """Return `held` with a gatekeeper that gives each process a tag."""
    agent.do("set", tagged=True)
    agent.do("start")
    return agent


def test_a_tagged_request_is_answered_at_its_tag(tagged: Agent) -> None:
    assert tagged.python("out(alloc(MiB), alloc(2 * GiB), info()[2] >> 30)") == [[0, OOM, 1]]
    assert [(c["kind"], c["flags"]) for c in tagged.calls()] == [(HELLO, TAGGED), (MEMORY, TAGGED), (MEMORY, TAGGED)]


def test_a_process_without_a_tag_makes_untagged_requests(held: Agent) -> None:
    assert held.python("out(alloc(MiB))") == [[0]]
    assert {c["flags"] for c in held.calls()} == {0}


# A process of the same level makes an admitted request with the ticket that its neighbour will use next.
FORGE = """
before, count = int(sys.argv[1]), int(sys.argv[2])
S = C.CDLL("{shim}"); L.cuInit(0)
for i in range(count): S.fgpu_admit(3, C.c_uint64(0), {kind}, C.c_uint64(before + 1 + i))
out(1)
"""


@pytest.mark.parametrize("kind", [MEMORY, MEMORY | TAGGED])
def test_another_process_cannot_forge_a_verdict(build: Build, tagged: Agent, kind: int) -> None:
    """The kernel does not answer the victim. Everything on the page was written by the forger."""
    script = TALK.replace("alloc(512)", "alloc(512), os.getpid()")
    with tagged.start_python(script) as victim:
        pid = int(victim.stdout.readline().strip(" []\n"))
        ticket = next(c["ticket"] for c in tagged.calls() if c["tgid"] == pid)
        forge = FORGE.format(shim=build.shim, kind=kind)
        tagged.run(SYSTEM_PYTHON, "-c", PREAMBLE + forge, ticket, 100)
        tagged.do("knobs", mute=pid)
        out, _ = victim.communicate("\n", timeout=DEADLINE)
    assert out == f"[{OOM}, {pid}]\n"


def test_an_answer_with_a_wrong_tag_is_ignored_and_the_shim_registers_again(tagged: Agent) -> None:
    """The request is admitted after another hello, because the new pages have the right tag."""
    with tagged.start_python(TALK) as program:
        pid = int(program.stdout.readline().strip(" []\n"))
        tagged.do("tag", pid=pid, tag=77)
        out, _ = program.communicate("\n", timeout=DEADLINE)
    assert out == "[0]\n"  # after another hello, whose pages have the right tag
    assert tagged.do("look")["hellos"] == 2


def test_a_changed_tag_in_the_page_does_not_break_requests(tagged: Agent) -> None:
    with tagged.start_python(TALK) as program:
        pid = int(program.stdout.readline().strip(" []\n"))
        tagged.do("tag", pid=pid, tag=78, page=0)
        assert program.communicate("\n" * 3, timeout=DEADLINE)[0] == "[0]\n" * 3
    assert tagged.do("look")["hellos"] == 1
    assert len(tagged.calls(MEMORY)) == 3


@pytest.mark.parametrize("first", [False, True], ids=["upgrade", "downgrade"])
def test_a_gatekeeper_with_or_without_tags_takes_over(agent: Agent, first: bool) -> None:
    agent.do("set", tagged=first)
    agent.do("start")
    with agent.start_python(TALK) as program:
        program.stdout.readline()
        for epoch, now in ((8, not first), (9, first)):
            agent.do("set", tagged=now, epoch=epoch)
            agent.do("bump", epoch=epoch)
            said = ""
            while agent.do("look")["hellos"] < epoch - 6:
                program.stdin.write("\n")
                program.stdin.flush()
                said = program.stdout.readline()
                assert said == "[0]\n"
            program.stdin.write("\n")
            program.stdin.flush()
            assert program.stdout.readline() == "[0]\n"
            assert agent.calls(MEMORY)[-1]["flags"] == (TAGGED if now else 0)


def test_a_hello_follows_if_an_older_kernel_side_answers_on_newer_pages(tagged: Agent) -> None:
    """The BPF programs have no tags after a downgrade and answer at the old place. The gatekeeper gives no tags."""
    with tagged.start_python(TALK) as program:
        program.stdout.readline()
        tagged.do("knobs", old=1)
        tagged.do("set", tagged=False)
        assert program.communicate("\n", timeout=DEADLINE)[0] == "[0]\n"
    look = tagged.do("look")
    assert look["hellos"] == 2
    assert look["calls"][-1]["flags"] == 0


def test_an_answer_with_one_changed_bit_in_tag_or_ticket_is_rejected(
    build: Build, scale: Callable[[int, int, int], int]
) -> None:
    program = build.compile("verdict.c", "verdict", f"-I{ROOT}/shim", f"-I{ROOT}/bpf", "-O2")
    done = subprocess.run([program, str(scale(3, 10, 100))], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
