"""Standalone mode: without an agent, the shim keeps the image's limit over all programs of the container together."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.shim.root_kit import BY_ITSELF, GIB, MIB, OOM, TOGETHER, Container, limit
from tests.shim.shim_kit import ROOT, Agent, Build

Scale = Callable[[int, int, int], int]


def container(build: Build, text: str = "1GiB\n", more: str = "") -> Container:
    return Container(build, limit(text) + more)


def test_the_limit_holds_and_is_shown_as_the_device_s_memory(build: Build) -> None:
    said = container(build).python("out(info()); out(alloc(700 * MiB), alloc(700 * MiB), info(), L.fake_calls())")
    assert said == [[[0, GIB, GIB]], [0, OOM, [0, 324 * MIB, GIB], 1]]


def test_freed_memory_is_available_again(build: Build) -> None:
    code = "out(alloc(700 * MiB), L.cuMemFree_v2(C.c_uint64(0xd00000)), alloc(1024 * MiB), alloc(512), info()[1])"
    assert container(build).python(code) == [[0, 0, 0, OOM, 0]]


def test_memory_freed_in_stream_order_is_available_again(build: Build) -> None:
    """The driver frees plain memory in this way. It refuses to free managed memory, which stays charged."""
    code = """
p = C.c_uint64()
def free(at): return L.cuMemFreeAsync(C.c_uint64(at), None)
out(alloc(700 * MiB), free(0xd00000), alloc(1024 * MiB), alloc(512), free(0xd00000))
out(L.cuMemAllocManaged(C.byref(p), C.c_size_t(700 * MiB), 1), free(0xe00000), alloc(1024 * MiB), alloc(324 * MiB))"""
    assert container(build).python(code) == [[0, 0, 0, OOM, 0], [0, 801, OOM, 0]]


def test_no_request_waits_for_a_comparison_of_an_agent(build: Build) -> None:
    """The container's ledger has each free, so the next request is answered at once."""
    code = """
L.cuMemFreeAsync(C.c_uint64(0xd00000 + 0 * alloc(700 * MiB)), None); L.cuCtxSynchronize()
r = alloc(1024 * MiB); t = time.monotonic(); out(r, alloc(512 * MiB), time.monotonic() - t < 0.5)"""
    assert container(build).python(code) == [[0, OOM, True]]


def test_a_pool_keeps_its_charge_when_contexts_end(build: Build) -> None:
    code = """
c, p = C.c_void_p(), C.c_uint64()
L.cuDevicePrimaryCtxRetain(C.byref(c), 0); r = L.cuMemAllocAsync(C.byref(p), C.c_size_t(480 * MiB), None)
before = info()[1]; L.fake_active(0); L.cuDevicePrimaryCtxReset_v2(0)
out(r, (info()[1] - before) // MiB, alloc(600 * MiB), alloc(500 * MiB))
L.cuMemFreeAsync(p, None); L.cuCtxSynchronize(); out(alloc(512 * MiB))"""
    assert container(build, "1536MiB").python(code) == [[0, 512, 0, OOM], [0]]


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("8GiB\n", 8 << 30), ("8Gi", 8 << 30), ("512 MiB\n", 512 << 20), ("1073741824B", 1 << 30), ("4096KiB\n", 4 << 20)],
)
def test_the_limit_has_the_same_units_as_in_policies(build: Build, text: str, bytes_: int) -> None:
    assert container(build, text).python("out(info()[2])") == [[bytes_]]


@pytest.mark.parametrize(
    "text", ["", "\n", "lots", "8GB", "-1", "6", "1073741824", "8GiB 9GiB", "1" + "0" * 30, "0x10", "9" * 80]
)
def test_an_invalid_limit_refuses_all_memory(build: Build, text: str) -> None:
    assert container(build, text).python("out(alloc(512), info()[1])") == [[OOM, 0]]


def test_no_environment_variable_changes_the_limit(build: Build) -> None:
    said = container(build).says(
        "export GPU_MEM_LIMIT_GB=9 FGPU_LIMIT=9GiB FGPU_MEMORY=9GiB LD_BIND_NOT=1\npy 'out(info()[2])'"
    )
    assert said == [[GIB]]


@pytest.mark.parametrize(
    "more",
    [
        "chmod 666 /etc/fgpu/limit\n",
        "chmod 664 /etc/fgpu/limit\n",
        "chown 65534 /etc/fgpu/limit\n",
        "chmod 777 /etc/fgpu\n",
        "chown 65534 /etc/fgpu\n",
        "mv /etc/fgpu/limit /etc/other; ln -s /etc/other /etc/fgpu/limit\n",
        "mv /etc/fgpu /etc/other; ln -s /etc/other /etc/fgpu\n",
        "rm /etc/fgpu/limit; mkfifo /etc/fgpu/limit\n",
        "rm /etc/fgpu/limit; mkdir /etc/fgpu/limit\n",
    ],
)
def test_a_limit_file_that_other_users_can_change_or_that_is_not_regular_sets_no_limit(build: Build, more: str) -> None:
    done = container(build, more=more).run("py 'out(alloc(2 * GiB), info()[2])'")
    assert (done.stdout, done.stderr) == (
        f"[0, {16 * GIB}]\n",
        "fgpu: no agent on this host: limits are not enforced\n",
    )


def test_processes_share_a_limit_and_each_reports_that_once(build: Build) -> None:
    done = container(build).run("""
export NEXT='py "out(alloc(600 * MiB), alloc(400 * MiB), info()[1])"'
py 'out(alloc(600 * MiB), info()[1]); os.system(os.environ["NEXT"]); out(alloc(400 * MiB))'""")
    assert done.stdout == f"[0, {424 * MIB}]\n[{OOM}, 0, {24 * MIB}]\n[0]\n", done
    assert done.stderr == 2 * TOGETHER


def test_killed_processes_hold_no_charge(build: Build) -> None:
    said = container(build).says("for i in 1 2 3 4 5; do py 'out(alloc(GiB)); os.kill(os.getpid(), 9)' || :; done")
    assert said == [[0]] * 5


def test_a_surviving_child_holds_no_charge_of_its_parent(build: Build) -> None:
    said = container(build).says("""
py 'out(alloc(GiB)); os.fork() or (os.close(1), os.close(2), time.sleep(9)); os._exit(0)'
py 'out(alloc(GiB), info()[1])'""")
    assert said == [[0], [0, 0]]


def test_exec_releases_the_charges_of_a_process(build: Build) -> None:
    code = 'out(alloc(GiB)); os.execv("/etc/py", ["py", "out(alloc(GiB), info()[1])"])'
    assert container(build).python(code) == [[0], [0, 0]]


def test_a_forked_child_shares_the_limit_and_its_charge_ends_with_it(build: Build) -> None:
    code = """
out(alloc(600 * MiB)); pid = os.fork()
if not pid: out(alloc(600 * MiB), alloc(400 * MiB), info()[1]); os._exit(0)
os.waitpid(pid, 0); out(info()[1], alloc(400 * MiB))"""
    assert container(build).python(code) == [[0], [OOM, 0, 24 * MIB], [424 * MIB, 0]]


@pytest.mark.parametrize(("first", "second", "mode"), [("", "$unprivileged", 755), ("$unprivileged", "", 1777)])
def test_users_share_one_limit_in_any_order(build: Build, first: str, second: str, mode: int) -> None:
    said = container(build).says(f"""
chmod {mode} /run
mkfifo -m 666 /run/in
unprivileged='setpriv --reuid=65534 --regid=65534 --clear-groups'
{first} py 'out(alloc(600 * MiB)); open("/run/in").read()' >/run/out &
until [ -s /run/out ]; do sleep 0.02; done
{second} py 'out(alloc(600 * MiB), alloc(400 * MiB))'
: >/run/in
wait
cat /run/out""")
    assert said == [[OOM, 0], [0]]


def test_a_process_has_the_whole_limit_without_a_place_for_the_ledger(build: Build) -> None:
    done = container(build, more="mount -o remount,ro /run\n").run("py 'out(alloc(GiB), alloc(512), info()[1:])'")
    assert (done.stdout, done.stderr) == (f"[0, {OOM}, [0, {GIB}]]\n", BY_ITSELF)


@pytest.mark.parametrize(
    "planted",
    [
        "mkfifo /run/fgpu/books",
        "mkdir /run/fgpu/books",
        "ln -s /run/precious /run/fgpu/books",
        "ln /run/precious /run/fgpu/books",
        "truncate -s 40960 /run/fgpu/books",
        "truncate -s 8 /run/fgpu/books",
        "rmdir /run/fgpu; ln -s /run/elsewhere /run/fgpu",
        "rmdir /run/fgpu; touch /run/fgpu",
    ],
)
def test_the_shim_does_not_write_a_file_that_is_no_ledger(build: Build, planted: str) -> None:
    more = f"mkdir /run/fgpu /run/elsewhere; seq 1 9000 | head -c 40960 >/run/precious; {planted}\n"
    done = container(build, more=more).run("""
py 'out(alloc(GiB), alloc(512))'
[ "$(seq 1 9000 | head -c 40960 | sha1sum)" = "$(sha1sum </run/precious)" ] && [ -z "$(ls /run/elsewhere)" ]""")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"[0, {OOM}]\n", BY_ITSELF)


def test_random_bytes_in_the_ledger_cause_at_most_a_refusal_of_memory(build: Build) -> None:
    done = container(build).run("""
py 'out(alloc(512))'
for seed in 1 2 3 4 5 6 7 8; do
    head -c 40952 /dev/urandom | dd of=/run/fgpu/books bs=8 seek=1 conv=notrunc status=none
    py 'out(alloc(512) in (0, 2), info()[0], L.cuMemFree_v2(C.c_uint64(0xd00000)))'
done""")
    assert done.stdout == "[0]\n" + "[true, 0, 0]\n" * 8, done


def test_the_shim_changes_no_state_of_the_program(build: Build) -> None:
    code = """
import resource
def state():
    mask = os.umask(0); os.umask(mask)
    return [fds(), mask, os.getcwd(), threading.active_count(), resource.getrlimit(7)]
L.cuMemAlloc_v2, L.fake_calls
before = state(); C.set_errno(77); r = alloc(512); e = C.get_errno()
out(r, e, before == state(), sorted(os.listdir("/run/fgpu")), oct(os.stat("/run/fgpu/books").st_mode)[-3:])"""
    assert container(build).python(code) == [[0, 77, True, ["books"], "666"]]


FAIL = """F = C.CDLL("{folder}/fault.so")
F.fault_made, F.fault_arm
before = fds(); made = F.fault_made(); F.fault_arm({k}); C.set_errno(77)
r = alloc(512); e = C.get_errno(); made = F.fault_made() - made
F.fault_arm(-1)
out(r, e, made, before == fds(), info()[0])
"""


def test_a_failed_system_call_in_standalone_mode_keeps_errno_and_refuses_memory_at_most(build: Build) -> None:
    """Each system call of the shim fails once. The program's open descriptors do not change."""
    fresh = """
for name in ("cuInit", "cuMemAlloc_v2", "cuMemGetInfo_v2"): getattr(L, name)
pid = os.fork()
if pid: os.waitpid(pid, 0); os._exit(0)
"""
    place, results, k = Container(build, limit("1GiB"), f"{build.folder}/fault.so:"), [], 0
    while True:
        k += 1
        result, errno, made, same_files, viewed = place.python(fresh + FAIL.format(folder=build.folder, k=k))[0]
        assert (errno, same_files, viewed) == (77, True, 0), k
        assert result in (0, OOM), k
        results.append(result)
        if made < k:
            break
    assert k > 20
    assert results[-1] == 0


# -- an agent


@pytest.fixture
def image(agent: Agent) -> Iterator[Agent]:
    """Return the fake agent, in a root with an image whose limit is 700 MiB. No gatekeeper listens."""
    script = "mkdir -p /run/etc/fgpu && cp /etc/ld.so.cache /run/etc && mount --bind /run/etc /etc && " + limit(
        "700MiB"
    )
    inside = ["nsenter", f"--mount=/proc/{agent.process.pid}/ns/mnt", "--"]
    subprocess.run([*inside, "sh", "-c", script], check=True)
    yield agent
    subprocess.run([*inside, "sh", "-c", "umount /etc; rm -rf /run/fgpu/books"], check=True)


def test_the_agent_s_limit_replaces_the_image_s(image: Agent) -> None:
    image.do("start")
    assert image.python("out(alloc(800 * MiB), info()[2])") == [[0, GIB]]


def test_a_process_that_an_agent_does_not_manage_has_the_image_s_limit(image: Agent) -> None:
    image.do("set", answer="unmanaged")
    image.do("start")
    assert image.python("out(alloc(800 * MiB), alloc(600 * MiB), info()[1:])") == [[OOM, 0, [100 * MIB, 700 * MIB]]]


def test_an_agent_that_starts_later_takes_over(image: Agent) -> None:
    image.do("remove")
    code = "out(alloc(600 * MiB), info()[2]); sys.stdin.readline(); time.sleep(1.05); out(alloc(800 * MiB), info()[2])"
    process = image.start_python(code)
    assert process.stdout.readline() == f"[0, {700 * MIB}]\n"
    image.do("reset")
    image.do("start")
    assert process.communicate("\n", timeout=10)[0] == f"[0, {GIB}]\n"


def test_after_an_agent_died_new_programs_get_no_memory_and_running_ones_keep_the_limit(image: Agent) -> None:
    """The agent's socket still exists. The agent's limit may have been lower than the image's."""
    image.do("start")
    held = image.start_python(
        "out(alloc(512)); sys.stdin.readline(); time.sleep(1.05); out(alloc(800 * MiB), info()[2])"
    )
    assert held.stdout.readline() == "[0]\n"
    image.do("die")
    assert image.python("out(alloc(512), info()[1])") == [[OOM, 0]]
    assert held.communicate("\n", timeout=10)[0] == f"[0, {GIB}]\n", "the kernel's limit stays in force"


def test_the_image_s_limit_applies_if_no_agent_ever_answered_in_the_folder(image: Agent) -> None:
    assert image.python("out(alloc(800 * MiB), alloc(600 * MiB))") == [[OOM, 0]]


def test_the_image_s_limit_applies_after_a_detach(image: Agent) -> None:
    image.do("start")
    code = """
out(alloc(512), info()[2]); sys.stdin.readline(); time.sleep(1.3)
alloc(512); out(alloc(800 * MiB), info()[2])"""
    process = image.start_python(code)
    assert process.stdout.readline() == f"[0, {GIB}]\n"
    image.do("stop")
    image.do("remove")
    image.do("knobs", mute=1)
    assert process.communicate("\n", timeout=10)[0] == f"[{OOM}, {700 * MIB}]\n"


# -- the ledger alone


@pytest.fixture(scope="module")
def books(build: Build) -> Path:
    """Build tests/shim/programs/ledger.c."""
    return build.compile("ledger.c", "ledger", f"-I{ROOT}/shim", f"-I{ROOT}/bpf", "-O2")


def counted(books: Path, what: str, n: int) -> str:
    done = subprocess.run(
        ["unshare", "--ipc", books, what, str(n)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_exactly_one_process_gets_the_last_piece(books: Path, scale: Scale) -> None:
    assert ", 0 without exactly one winner, 0 bytes left" in counted(books, "races", scale(100, 1000, 20000))


def test_the_ledger_holds_exactly_the_unreleased_bytes(books: Path, scale: Scale) -> None:
    assert " 0 beyond, 0 of " in counted(books, "churn", scale(100_000, 1_000_000, 20_000_000))


def test_a_request_that_fits_is_never_refused(books: Path, scale: Scale) -> None:
    assert " 0 refused, 0 bytes left" in counted(books, "fits", scale(10_000, 100_000, 2_000_000))


def test_the_next_process_completes_an_unfinished_change(books: Path) -> None:
    assert counted(books, "left", 1000) == "1000 rounds, 0 wrong\n"


def test_killed_and_stopped_processes_delay_no_other_and_leave_nothing(books: Path, scale: Scale) -> None:
    assert " 0 stalled, 0 beyond, 0 bytes and 0 seats left" in counted(books, "kills", scale(20, 60, 1000))
