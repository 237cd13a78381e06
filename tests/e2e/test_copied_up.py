"""A libcuda that overlayfs copies up while programs use it: (dev, ino) do not change, and the probes stay."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import fgpu, metrics
from tests.support.host import CONTEXT, MIB, SIM
from tests.support.place import Container, Place
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

COMPAT = "/usr/local/cuda/compat"
ROOM = 96 * MIB


@pytest.fixture
def layers(place: Place, tmp_path: Path) -> Iterator[Path]:
    """Return the driver's libraries in the lower layer of an overlay.

    A container uses them as compatibility libraries.
    """
    names = ("lower", "upper", "work", "merged")
    for name in names:
        (tmp_path / name).mkdir()
    driver = (SIM / "lib/libcuda.so.1").read_bytes()
    # not the host's file, so that its class does not change
    (tmp_path / "lower/libcuda.so.1").write_bytes(driver + b"another")
    options = ",".join(f"{name}dir={tmp_path / name}" for name in names[:3])
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
    if isinstance(place, Container):
        place.mounts = [
            {"source": "tmpfs", "destination": "/usr/local", "type": "tmpfs"},
            {"source": str(merged), "destination": COMPAT, "type": "bind", "options": ["bind", "rw"]},
        ]
    yield merged
    place.close()
    subprocess.run(["umount", "--lazy", merged], check=True)


def before(place: Place, layers: Path) -> str:
    """Return the start of a command line whose program uses the overlay's libcuda."""
    return f"env LD_LIBRARY_PATH={COMPAT if isinstance(place, Container) else layers}:{SIM}/lib"


def copy_up(layers: Path) -> None:
    """Copy the library up, as `: >>libcuda.so.1` in the container does."""
    library = layers / "libcuda.so.1"
    was = library.stat()
    with library.open("ab"):
        pass
    assert (layers.parent / "upper/libcuda.so.1").exists()
    assert (was.st_dev, was.st_ino) == (library.stat().st_dev, library.stat().st_ino), "device and inode have changed"


def take(client: Client, pieces: int) -> list[int]:
    """Allocate this many pieces of 2 MiB."""
    return [client.ok(f"alloc {2 * MIB}")[0] for _ in range(pieces)]


def bypasses(one: Tenant) -> dict[str, float]:
    """Return how the tenant's processes bypass the shim, with the number of processes for each way."""
    mine = {k: v for k, v in metrics().items() if k[0] == "fgpu_bypassing_processes" and ("tenant", one.name) in k[1]}
    return {dict(labels)["how"]: value for (_, labels), value in mine.items() if value}


@pytest.mark.places("host", "runc")
def test_a_program_started_after_the_copy_up_has_its_limit_from_the_first_byte(
    layers: Path, place: Place, tenant
) -> None:
    one = tenant(2 * CONTEXT + ROOM)
    one.assert_enforced()
    first = one.client(before=before(place, layers))
    pieces = take(first, 5)
    copy_up(layers)
    second = one.client(before=before(place, layers))
    with one.growing(ROOM - 10 * MIB):
        assert second.ok(f"fill {2 * MIB} 0") == [(ROOM - 10 * MIB) // (2 * MIB)]
    for piece in pieces:  # the probes of the first inode are still attached
        first.ok(f"free {piece}")
    eventually(lambda: one.assert_exact() == 2 * CONTEXT + ROOM - 10 * MIB, 3, "the release once NVML shows the frees")
    assert second.ok(f"fill {2 * MIB} 0") == [5]
    second.ok("drop 7")
    eventually(lambda: one.assert_exact() == 2 * CONTEXT + ROOM - 14 * MIB, 3, "the release once NVML shows the frees")
    assert one.memory()["peak_bytes"] == 2 * CONTEXT + ROOM
    assert not bypasses(one)


@pytest.mark.places("host")
def test_a_restarted_agent_keeps_the_probes_of_both_inodes(
    service: Service, layers: Path, place: Place, tenant
) -> None:
    """The links of probes are pinned, because the host's processes use these files too."""
    one = tenant(2 * CONTEXT + ROOM)
    clients = [one.client(before=before(place, layers))]
    clients[0].ok("context")
    copy_up(layers)
    clients.append(one.client(before=before(place, layers)))
    clients[1].ok("context")
    service.kill_agent()
    service.start_agent()
    for client in clients:
        with one.growing(10 * MIB):
            take(client, 5)
    assert one.assert_exact() == 2 * CONTEXT + 20 * MIB
    assert not bypasses(one)


@pytest.mark.places("runc")
def test_a_process_whose_libcuda_has_no_path_any_more_gets_no_memory_and_is_named(
    service: Service, layers: Path, place: Place, tenant
) -> None:
    """The process mapped the file of the lower layer, which no path leads to, before any agent ran."""
    one = tenant(2 * CONTEXT + ROOM)
    service.kill_agent()
    client = one.client(before=before(place, layers))
    copy_up(layers)
    service.start_agent()
    assert client.do("context").startswith("CUDA_ERROR_OUT_OF_MEMORY")
    log = eventually(
        lambda: [line for line in service.log.read_text().splitlines() if f"process {client.pid}:" in line]
    )
    assert "not probed" in log[0]
    assert "its layer was changed after the mapping" in log[0]
    assert one.memory()["used_bytes"] == one.driver() == 0
    one.client(before=before(place, layers)).ok("context")  # a new program maps the copied-up file, which is probed
    eventually(lambda: "enforcement: kernel" in fgpu("explain", one.path).stdout, 5, "the tenant as enforced")
