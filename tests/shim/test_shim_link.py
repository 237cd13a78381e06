"""Hello and all of its failures: the resulting state, the time that they take, and no effect on the program."""

import re
import time
from collections.abc import Callable

import pytest

from tests.shim.shim_kit import DEADLINE, IN_A_FRESH_CHILD, PREAMBLE, ROOT, SYSTEM_PYTHON, Agent, Build

MEMORY, HELLO, OOM = 0, 3, 2

# State of the process that the shim must not change.
WATCH = """
import signal, resource
def state():
    mask = os.umask(0); os.umask(mask)
    return [fds(), mask, os.getcwd(), [str(signal.getsignal(s)) for s in range(1, 65)],
            sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), threading.active_count(), os.environ.copy()]
"""


def test_a_managed_process_sends_one_hello_and_requests_memory(held: Agent) -> None:
    assert held.python("out(alloc(1))") == [[0]]
    look = held.do("look")
    assert (look["hellos"], look["sizes"], look["boots"]) == (1, [64], ["00" * 16])
    assert [c["kind"] for c in look["calls"]] == [HELLO, MEMORY]


def test_a_lookup_of_functions_sends_no_hello(held: Agent) -> None:
    held.python("L.cuInit, L.cuMemAlloc_v2, L.cuCtxGetDevice")
    assert held.do("look")["hellos"] == 0


def greeted(agent: Agent) -> None:
    """Wait for a first hello."""
    deadline = time.monotonic() + DEADLINE
    while not agent.do("look")["hellos"]:
        assert time.monotonic() < deadline, "no hello"
        time.sleep(0.002)


# The driver's initialization takes as long as the test requires.
INSIDE = """
def inside(): out("asked", len(fds()) - len(before)); sys.stdin.readline(); %s
then = C.CFUNCTYPE(None)(inside)
L.fake_during_init(then)
before, done = fds(), []
out(L.cuInit(0), alloc(1), done, before == fds())
"""


def test_the_hello_is_sent_before_the_driver_initialises_and_its_answer_read_after(held: Agent) -> None:
    with held.start_python(INSIDE % "pass") as program:
        assert program.stdout.readline() == '["asked", 1]\n'
        greeted(held)
        assert program.communicate("\n", DEADLINE)[0] == "[0, 0, [], true]\n"
    look = held.do("look")
    assert (look["hellos"], [c["kind"] for c in look["calls"]]) == (1, [HELLO, MEMORY])


def test_no_thread_waits_for_a_driver_initialisation_in_another_thread(held: Agent) -> None:
    script = INSIDE % "t = threading.Thread(target=lambda: done.append(alloc(1))); t.start(); t.join()"
    with held.start_python(script) as program:
        assert program.communicate("\n", DEADLINE)[0] == '["asked", 1]\n[0, 0, [0], true]\n'
    assert held.do("look")["hellos"] == 2


def test_a_hello_whose_connection_ended_is_sent_again(agent: Agent) -> None:
    agent.do("set", answer="eof")
    agent.do("start")
    with agent.start_python(INSIDE % "pass") as program:
        assert program.stdout.readline() == '["asked", 1]\n'
        greeted(agent)
        agent.do("set", answer="managed")
        assert program.communicate("\n", DEADLINE)[0] == "[0, 0, [], true]\n"


def test_an_unmanaged_process_has_no_limit(agent: Agent) -> None:
    agent.do("set", answer="unmanaged")
    agent.do("start")
    assert agent.python("out(alloc(64 * GiB), info())") == [[0, [0, 10 << 30, 16 << 30]]]
    assert agent.calls() == []


def test_without_a_listening_gatekeeper_memory_is_refused_after_5_s_then_at_once(agent: Agent) -> None:
    script = (
        WATCH
        + "L.cuCtxGetDevice\nbefore, t = state(), time.monotonic()\n"
        + "out(alloc(1), 4.9 < time.monotonic() - t < 7, info(), L.fake_calls())\nt = time.monotonic()\n"
        + "out([alloc(1) for _ in range(50)] == [2] * 50, time.monotonic() - t < 1.5, before == state())"
    )
    (first, second) = agent.python(script)
    assert first == [OOM, True, [0, 0, 16 << 30], 0]
    assert second == [True, True, True]


def test_memory_is_refused_if_the_directory_that_a_container_has_mounted_was_removed(agent: Agent) -> None:
    """An agent ran there, and may not have exited on purpose. The container could not reach another agent."""
    agent.do("orphan")
    assert agent.python("out(alloc(1), info()[1])") == [[OOM, 0]]


def test_memory_is_unlimited_if_a_detach_has_marked_the_agent_s_directory(agent: Agent) -> None:
    agent.do("detach")
    assert agent.python("out(alloc(1), info()[1])") == [[0, 10 << 30]]


def test_a_program_that_began_without_an_agent_registers_at_its_next_initialisation(agent: Agent) -> None:
    agent.do("detach")
    # A shim without an answer registers at most four times in a second.
    script = "out(alloc(64 * GiB)); sys.stdin.readline(); out(alloc(1)); time.sleep(0.3); {}; out(alloc(64 * GiB))"
    with agent.start_python(script.format("L.cuInit(0)")) as program:
        assert program.stdout.readline() == "[0]\n"
        agent.do("start")
        assert program.communicate("\n", DEADLINE)[0] == f"[0]\n[{OOM}]\n"
    assert agent.do("look")["hellos"] == 1


def test_a_program_that_began_without_an_agent_goes_on_beside_one_that_does_not_answer(agent: Agent) -> None:
    agent.do("detach")
    script = "out(alloc(1)); sys.stdin.readline(); time.sleep(0.3); t = time.monotonic(); L.cuInit(0); out(alloc(1))"
    with agent.start_python(f"{script}; out(time.monotonic() - t < 1)") as program:
        assert program.stdout.readline() == "[0]\n"
        agent.do("set", answer="silent")
        agent.do("start")
        assert program.communicate("\n", DEADLINE)[0] == "[0]\n[true]\n"


@pytest.mark.parametrize("answer", ["managed", "unmanaged"])
@pytest.mark.parametrize(
    "call", ["L.cuInit(0)", "N.nvmlInit()", "N.nvmlInit_v2()", "N.nvmlInitWithFlags(0)", "L.cuCtxCreate_v2(p, 0, 0)"]
)
def test_a_program_announces_itself_at_each_call_for_which_the_driver_opens_nodes(
    agent: Agent, call: str, answer: str
) -> None:
    """The kernel side that knew an earlier announcement may have been replaced."""
    agent.do("set", answer=answer)
    agent.do("start")
    script = f"N, p = C.CDLL('libnvidia-ml.so.1'), C.byref(C.c_void_p())\nout(alloc(1), {call}, {call}, {call})"
    assert agent.python(script) == [[0] * 4]
    assert agent.do("look")["announced"] == 3


def test_a_shim_without_an_answer_reports_that_once(agent: Agent) -> None:
    _, err = agent.run(SYSTEM_PYTHON, "-c", PREAMBLE + "alloc(1); alloc(1); info()")
    assert err == "fgpu: the agent does not answer: device memory is refused\n"


def test_a_refusal_by_the_gatekeeper_is_reported_once(agent: Agent) -> None:
    agent.do("set", answer="refused")
    agent.do("start")
    _, err = agent.run(SYSTEM_PYTHON, "-c", PREAMBLE + "alloc(1); alloc(1); info()")
    assert err == "fgpu: a limit of this program is not in force: device memory is refused\n"


def test_a_refusal_for_too_many_entries_is_reported_once(agent: Agent) -> None:
    agent.do("start")
    agent.do("limit", limit=100)
    script = PREAMBLE + "C.set_errno(77); out(alloc(1), C.get_errno(), alloc(1))"
    assert agent.run(SYSTEM_PYTHON, "-c", script) == (f"[{OOM}, 77, {OOM}]\n", ""), "a refusal for bytes prints a line"
    agent.do("knobs", crowded=1)
    said = "fgpu: device memory is refused: too many allocations, threads or processes\n"
    assert agent.run(SYSTEM_PYTHON, "-c", script) == (f"[{OOM}, 77, {OOM}]\n", said)


def test_the_shim_finds_a_gatekeeper_that_starts_late(agent: Agent) -> None:
    process = agent.start_python("out(0)\nt = time.monotonic(); out(alloc(1), time.monotonic() - t < 4.9)")
    process.stdout.readline()
    time.sleep(3)  # as long as a gatekeeper needs to start on a busy host
    agent.do("start")
    assert process.communicate(timeout=10)[0] == "[0, true]\n"


def test_the_shim_sends_another_hello_after_a_closed_connection(agent: Agent) -> None:
    agent.do("set", answer="eof")
    agent.do("start")
    process = agent.start_python("out(0)\nout(alloc(1))")
    process.stdout.readline()
    time.sleep(0.2)
    agent.do("set", answer="managed")
    assert process.communicate(timeout=10)[0] == "[0]\n"
    assert 2 < agent.do("look")["hellos"] < 100


def test_a_shim_that_refused_memory_admits_it_after_a_gatekeeper_starts(agent: Agent) -> None:
    script = "out(alloc(1)); sys.stdin.readline()\nwhile alloc(1): time.sleep(0.1)\nout(info()[2])"
    process = agent.start_python(script)
    assert process.stdout.readline() == f"[{OOM}]\n"
    agent.do("start")
    assert process.communicate("\n", timeout=10)[0] == f"[{1 << 30}]\n"


MALFORMED = [
    "refused", "empty", "short", "huge", "magic", "version", "wrong_size", "unknown_code", "levels_0", "levels_9",
    "few", "many", "none", "twenty", "short_control", "short_status", "pipe_for_usage", "control_version",
]  # fmt: skip


@pytest.mark.parametrize("answer", MALFORMED)
def test_the_shim_rejects_an_invalid_answer(agent: Agent, answer: str) -> None:
    agent.do("set", answer=answer)
    agent.do("start")
    script = WATCH + "L.cuCtxGetDevice\nb = state()\nout(alloc(1), L.fake_calls(), info()[1], b == state())"
    assert agent.python(script) == [[OOM, 0, 0, True]]


def test_the_shim_rejects_a_usage_page_of_another_version(agent: Agent) -> None:
    agent.do("version", level=0, version=99)
    agent.do("start")
    assert agent.python("out(alloc(1))") == [[OOM]]


@pytest.mark.parametrize("what", ["answer", "control", "usage"])
@pytest.mark.parametrize("ahead", [-2, -1, 0, 1, 2])
def test_the_shim_refuses_memory_and_reports_an_agent_of_another_layout(agent: Agent, what: str, ahead: int) -> None:
    """F16: the agent has an older or newer layout, which the shim does not interpret."""
    layout = int(re.findall(r"#define FGPU_LAYOUT (\d+)", (ROOT / "bpf/fgpu.h").read_text())[0])
    if what == "usage":
        agent.do("version", level=0, version=layout + ahead)
    else:
        agent.do("set", versions={what: layout + ahead})
    agent.do("start")
    said, err = agent.run(SYSTEM_PYTHON, "-c", PREAMBLE + "out(alloc(1), info()[1])")
    if ahead:
        assert (said, err) == ("[2, 0]\n", "fgpu: the agent does not answer: device memory is refused\n")
    else:
        assert (said, err) == (f"[0, {(1 << 30) - 512}]\n", "")


def test_the_shim_reads_pages_with_additional_fields_at_their_end(agent: Agent) -> None:
    """F16: a newer kernel side with the same layout writes additional fields."""
    agent.do("grow")
    agent.do("set", answer="longer")
    agent.do("start")
    assert agent.python("out(alloc(1), info()[1:], alloc(1 << 30))") == [[0, [(1 << 30) - 512, 1 << 30], OOM]]


def test_a_reply_of_a_newer_gatekeeper_may_be_longer(agent: Agent) -> None:
    agent.do("set", answer="longer")
    agent.do("start")
    assert agent.python("out(alloc(1))") == [[0]]


def test_memory_is_refused_after_64_hello_requests_without_a_verdict(agent: Agent) -> None:
    agent.do("knobs", mute=1)
    agent.do("start")
    assert agent.python("out(alloc(1), info()[1])") == [[OOM, 0]]
    assert len(agent.calls(HELLO)) == 64


@pytest.mark.parametrize("heard_from", [1, 2, 3, 4])
def test_the_shim_registers_again_if_the_received_pages_are_outdated(held: Agent, heard_from: int) -> None:
    """A level gets a limit between the gatekeeper's answer and the first request to the kernel."""
    held.do("set", heard_from=heard_from)
    assert held.python("out(alloc(1), alloc(1))") == [[0, 0]]
    assert held.do("look")["hellos"] == heard_from


@pytest.mark.parametrize("change", [{"epoch": 8}, {"boot": "aa" * 16}])
def test_the_shim_registers_again_when_the_page_requests_it(held: Agent, change: dict[str, object]) -> None:
    script = "out(alloc(1)); sys.stdin.readline(); time.sleep(1.05); out(*[alloc(1) for _ in range(9)], info()[2])"
    process = held.start_python(script)
    process.stdout.readline()
    held.do("set", **change)
    held.do("limit", limit=1 << 29)
    held.do("bump", **change)
    assert process.communicate("\n", timeout=10)[0] == f"[{'0, ' * 9}{1 << 29}]\n"
    look = held.do("look")
    assert look["hellos"] == 2
    assert look["boots"][1] == "42" * 16


def test_a_stopped_heartbeat_causes_one_hello_and_no_wait_of_a_second(held: Agent) -> None:
    held.do("set", beats=False)
    script = """
out(alloc(1)); time.sleep(2.1)
t = time.monotonic(); n = 0; slow = 0
while time.monotonic() - t < 1:
    s = time.monotonic(); assert alloc(512) == 0; n += 1; slow = max(slow, time.monotonic() - s)
out(n > 100, slow < 1)
"""  # the lease of the second page ends after 2 s: a program that waits for a processor needs the rest
    assert held.python(script) == [[0], [True, True]]
    assert held.do("look")["hellos"] == 2  # the page of the second answer is fresh


def test_pages_stay_in_force_when_the_gatekeeper_dies(held: Agent) -> None:
    held.do("set", beats=False)
    script = "out(alloc(1)); sys.stdin.readline(); time.sleep(2.1); out(alloc(512 << 20), alloc(1 << 30), info()[2])"
    process = held.start_python(script)
    process.stdout.readline()
    held.do("stop")
    assert process.communicate("\n", timeout=10)[0] == f"[0, {OOM}, {1 << 30}]\n"


@pytest.mark.parametrize("answer", ["pipe_for_usage", "control_version", "short_status", "refused"])
def test_a_bad_second_answer_leaves_the_pages_in_use(held: Agent, answer: str) -> None:
    script = "out(alloc(1)); sys.stdin.readline(); time.sleep(1.05); out(alloc(1), alloc(2 << 30), info()[2])"
    process = held.start_python(script)
    process.stdout.readline()
    held.do("set", answer=answer)
    held.do("bump", epoch=8)
    assert process.communicate("\n", timeout=10)[0] == f"[0, {OOM}, {1 << 30}]\n"
    assert held.do("look")["hellos"] == 2


def test_a_refusal_ends_the_memory_of_an_unmanaged_process_until_the_next_answer(agent: Agent) -> None:
    agent.do("set", answer="unmanaged")
    agent.do("start")
    script = "for _ in range(3): out(alloc(1)); sys.stdin.readline(); time.sleep(1.05)"
    process = agent.start_python(script)
    assert process.stdout.readline() == "[0]\n"
    agent.do("set", answer="refused")
    agent.do("bump", epoch=8)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"[{OOM}]\n"
    agent.do("set", answer="unmanaged")
    assert process.communicate("\n", timeout=10)[0] == "[0]\n"


def test_a_removed_directory_does_not_lift_a_limit_of_the_kernel(held: Agent) -> None:
    held.do("set", beats=False)
    script = "out(alloc(1)); sys.stdin.readline(); time.sleep(2.1); out(alloc(2 << 30), info()[2])"
    process = held.start_python(script)
    process.stdout.readline()
    held.do("remove")
    assert process.communicate("\n", timeout=10)[0] == f"[{OOM}, {1 << 30}]\n"


def test_a_forked_child_registers_as_another_process(held: Agent) -> None:
    script = """
out(alloc(1), os.getpid())
for _ in range(3):
    pid = os.fork()
    if not pid:
        out(alloc(1), os.getpid()); os._exit(0)
    os.waitpid(pid, 0)
out(alloc(1), os.getpid())
"""
    lines = held.python(script)
    pids = [pid for _, pid in lines]
    assert [result for result, _ in lines] == [0] * 5
    assert len(set(pids)) == 4
    look = held.do("look")
    assert look["hellos"] == 4
    asked = [(c["kind"], c["tgid"]) for c in look["calls"]]
    expected = [(k, p) for p in pids[:4] for k in (HELLO, MEMORY)] + [(MEMORY, pids[4])]
    assert asked == expected
    assert len({c["ticket"] >> 22 for c in look["calls"]}) == 4


def test_without_wipe_on_fork_a_fork_is_detected_by_its_pid(build: Build, held: Agent) -> None:
    script = f"""
F = C.CDLL("{build.folder}/fault.so"); F.fault_arm(1)
out(alloc(1))
pid = os.fork()
if not pid: out(alloc(1)); os._exit(0)
os.waitpid(pid, 0); out(alloc(1))
"""
    assert held.python(script, preload=(build.folder / "fault.so",)) == [[0]] * 3
    assert held.do("look")["hellos"] == 2


def test_children_by_exec_spawn_and_vfork_register_themselves(held: Agent) -> None:
    script = """
import subprocess
out(alloc(1))
again = "import ctypes as C; p = C.c_uint64(); L = C.CDLL('libcuda.so.1'); "
me = [sys.executable, "-c", again + "print([L.cuMemAlloc_v2(C.byref(p), C.c_size_t(1))])"]
for go in (lambda: subprocess.check_output(me), lambda: subprocess.check_output(me, close_fds=False)):
    os.write(1, go())
os.waitpid(os.posix_spawn(me[0], me, os.environ), 0)
out(alloc(1))
"""
    assert held.python(script) == [[0]] * 5
    assert held.do("look")["hellos"] == 4


def test_daemons_that_close_every_descriptor_keep_their_limit(held: Agent) -> None:
    script = "out(alloc(1)); os.closerange(3, 4096); out(alloc(1), info()[2])"
    assert held.python(script) == [[0], [0, 1 << 30]]


def test_the_shim_keeps_no_descriptor_and_does_not_change_errno(held: Agent) -> None:
    script = (
        WATCH
        + IN_A_FRESH_CHILD
        + """
b = state(); C.set_errno(77)
r = [alloc(1), C.get_errno(), info()[0], C.get_errno(), L.cuInit(0), C.get_errno()]
L.fake_errno(55); r += [alloc(1), C.get_errno()]
out(r, b == state())
"""
    )
    assert held.python(script) == [[[0, 77, 0, 77, 0, 77, 0, 55], True]]


def test_errno_is_kept_when_hello_fails(agent: Agent) -> None:
    agent.do("set", answer="magic")
    agent.do("start")
    script = "C.set_errno(77); out(alloc(1), C.get_errno(), info()[0], C.get_errno())"
    assert agent.python(IN_A_FRESH_CHILD + script) == [[OOM, 77, 0, 77]]


def test_threads_share_one_hello_and_wait_for_it(agent: Agent) -> None:
    agent.do("set", delay=0.3)
    agent.do("start")
    script = """
got = []
ts = [threading.Thread(target=lambda: got.append(alloc(512))) for _ in range(16)]
[t.start() for t in ts]; [t.join() for t in ts]
out(got)
"""
    assert agent.python(IN_A_FRESH_CHILD + script) == [[[0] * 16]]
    assert agent.do("look")["hellos"] == 1


def test_many_hellos_leak_no_memory_or_descriptor(
    build: Build, held: Agent, scale: Callable[[int, int, int], int]
) -> None:
    """Each jump of the shim's clock makes the heartbeat stale, so that the next call registers again."""
    hellos = scale(200, 2000, 10000)
    script = f"""
F = C.CDLL("{build.folder}/fault.so"); F.fault_skip.argtypes = [C.c_int64]
def size(): return int(open("/proc/self/statm").read().split()[0]), len(open("/proc/self/maps").readlines()), len(fds())
def work(n):
    for _ in range(n): F.fault_skip(3 * 10**9); assert alloc(0x200) == 0
work(50); before = size(); work({hellos}); out(before, size())
"""
    held.do("limit", limit=1 << 40)
    before, after = held.python(script, preload=(build.folder / "fault.so",))[0]
    assert held.do("look")["hellos"] > hellos
    assert before == after


def test_threads_get_correct_results_while_the_shim_swaps_pages(build: Build, held: Agent) -> None:
    script = f"""
F = C.CDLL("{build.folder}/fault.so"); F.fault_skip.argtypes = [C.c_int64]
stop, bad, count = [], [], []
def work():
    n = 0
    while not stop:
        if alloc(512): bad.append(1)
        f = info()
        if f[2] != 16 * GiB: bad.append(f)
        n += 1
    count.append(n)
ts = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in ts]
for _ in range(150): F.fault_skip(3 * 10**9); time.sleep(0.005)
stop.append(1); [t.join() for t in ts]
out(bad, min(count) > 10)
"""
    held.do("limit", limit=1 << 40)
    assert held.python(script, preload=(build.folder / "fault.so",)) == [[[], True]]
    assert held.do("look")["hellos"] > 100
