"""The folder with the agent's socket is hidden from a program that has the shim, or a sandbox refuses the socket."""

from __future__ import annotations

import errno
import json
import platform
import shutil
import time

import pytest

from tests.shim.shim_kit import PREAMBLE, SYSTEM_PYTHON, Agent, Build

OOM, HELD = 2, (1 << 30) - 512
HIDDEN = "fgpu: /run/fgpu/shim is hidden from this program: device memory is refused\n"
# A mounted list preloads the shim, as in a container. /mnt and /var/lib belong to the program's namespace too.
INJECTED = """
mount -t tmpfs none /mnt
mount -t tmpfs none /var/lib
cp /etc/ld.so.cache /mnt
mount -t tmpfs none /etc
cp /mnt/ld.so.cache /etc
touch /mnt/list /etc/ld.so.preload
mount --bind /mnt/list /etc/ld.so.preload
mkdir -p /mnt/shim /var/lib/fgpu/run
mount --bind /run/fgpu/shim /mnt/shim
"""
OVER_RUN = "mount -t tmpfs none /run\n"
BESIDE = "mount --bind /run/fgpu/shim /var/lib/fgpu/run\n"
MOVED = f"{OVER_RUN}mkdir -p /run/fgpu/shim\nmount --bind /mnt/shim /run/fgpu/shim\nmv /run/fgpu /run/other\n"
IMAGE_LIMIT = "mkdir /etc/fgpu\necho 8GiB >/etc/fgpu/limit\n"


def injected(agent: Agent, more: str, code: str = "out(alloc(1), info()[1])", **options: object) -> tuple[str, str]:
    """Run these shell lines in a program's mount namespace, then the program with the shim. Return its output."""
    inside = ["unshare", "-m", "sh", "-ec", f'{INJECTED}{more}exec "$@"', "sh"]
    return agent.run(*inside, SYSTEM_PYTHON, "-c", PREAMBLE + code, **options)


@pytest.mark.parametrize(
    "more",
    [
        OVER_RUN,
        MOVED,
        f"{MOVED}mkdir -p /run/fgpu/shim\nchmod 1755 /run/fgpu/shim\n",
        f"{OVER_RUN}{IMAGE_LIMIT}",
        f"{OVER_RUN}{IMAGE_LIMIT}mkdir -p /run/fgpu/shim\n",
    ],
    ids=["a mount over /run", "moved", "as after a detach", "an image's limit", "a folder without a socket"],
)
def test_memory_is_refused_and_a_line_printed_if_the_agent_s_folder_is_hidden(held: Agent, more: str) -> None:
    assert injected(held, more) == (f"[{OOM}, 0]\n", HIDDEN)


def test_memory_is_refused_after_a_change_of_the_root_directory(held: Agent) -> None:
    code = "os.mkdir('/mnt/root'); os.chroot('/mnt/root'); out(alloc(1), info()[1])"
    assert injected(held, "", code) == (f"[{OOM}, 0]\n", HIDDEN)


@pytest.mark.parametrize(("flags", "printed"), [("os.O_RDWR", ""), ("os.O_RDWR | os.O_APPEND", HIDDEN)])
def test_nothing_is_printed_into_a_data_file(held: Agent, flags: str, printed: str) -> None:
    """The program has closed descriptors 0 to 2, and a file that it opened later has descriptor 2."""
    code = f"os.dup2(os.open('/mnt/data', os.O_CREAT | {flags}), 2); out(alloc(1), open('/mnt/data').read())"
    assert json.loads(injected(held, OVER_RUN, code)[0]) == [OOM, printed]


def test_the_shim_does_not_wait_for_a_hidden_folder(held: Agent) -> None:
    code = "L.cuInit(0); t = time.monotonic(); [alloc(1) for _ in range(50)]; out(time.monotonic() - t < 1)"
    assert injected(held, OVER_RUN, code)[0] == "[true]\n"


def test_the_shim_uses_the_folder_beside_it_if_run_is_hidden(held: Agent) -> None:
    assert injected(held, BESIDE + OVER_RUN) == (f"[0, {HELD}]\n", "")


def test_a_folder_beside_the_shim_that_is_no_mount_is_ignored(held: Agent) -> None:
    """Root in a container can create such a folder, and could imitate that of a host after a detach."""
    assert injected(held, "chmod 1755 /var/lib/fgpu/run\n") == (f"[0, {HELD}]\n", "")


def test_memory_is_refused_if_the_folder_beside_the_shim_was_removed(agent: Agent) -> None:
    more = "mkdir /mnt/host\nmount --bind /mnt/host /var/lib/fgpu/run\nrmdir /mnt/host\n"
    assert injected(agent, more)[0] == f"[{OOM}, 0]\n"


@pytest.mark.parametrize("more", [OVER_RUN, f"chmod 1755 /mnt/shim\n{BESIDE}", f"{BESIDE}chmod 1755 /mnt/shim\n"])
def test_a_shim_without_probes_treats_the_host_as_one_without_an_agent(build: Build, agent: Agent, more: str) -> None:
    """`fgpu detach` removes the probes of the shim. This copy has no probes."""
    copy = shutil.copy(build.shim, build.folder / "unprobed.so")
    said = injected(agent, more, libraries=(copy,))
    assert said == (f"[0, {10 << 30}]\n", "fgpu: no agent on this host: limits are not enforced\n")


# -- a sandbox that refuses the socket

NUMBERS = {"socket": 41, "connect": 42} if platform.machine() == "x86_64" else {"socket": 198, "connect": 203}
FILTER = """
import struct
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (6, 0, 0, 0x50000 | {error}), (6, 0, 0, 0x7fff0000)]
text = b"".join(struct.pack("HBBI", *rule) for rule in rules)
kept = C.create_string_buffer(text)
program = C.create_string_buffer(struct.pack("H6xQ", len(rules), C.addressof(kept)))
libc = C.CDLL(None)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, program, 0, 0)
out(alloc(1), info()[1])
"""


def test_a_sandbox_that_refuses_ppoll_slows_the_registration_and_does_not_prevent_it(held: Agent) -> None:
    code = FILTER.format(number=271 if platform.machine() == "x86_64" else 73, error=errno.EPERM)
    assert held.run(SYSTEM_PYTHON, "-c", PREAMBLE + code) == (f"[0, {HELD}]\n", "")


@pytest.mark.parametrize(
    ("call", "error"), [("socket", "EPERM"), ("socket", "EAFNOSUPPORT"), ("connect", "EACCES"), ("connect", "ENOSYS")]
)
def test_the_shim_reports_a_sandbox_that_refuses_its_socket(held: Agent, call: str, error: str) -> None:
    code = FILTER.format(number=NUMBERS[call], error=getattr(errno, error))
    began = time.monotonic()
    said = held.run(SYSTEM_PYTHON, "-c", PREAMBLE + code)
    text = f"fgpu: the socket to the agent is refused ({error}, a sandbox?): device memory is refused\n"
    assert said == (f"[{OOM}, 0]\n", text)
    assert time.monotonic() - began < 10
