"""Peers with root in namespaces of their own: they are tenants like others, and may only read from the agent."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import metrics
from tests.support.host import CONTEXT, MIB, REFUSED, RUN_DIR

TOPOLOGIES = {
    "user": "unshare --user --map-root-user",
    "user and pid": "unshare --user --map-root-user --pid --fork --mount-proc --kill-child",
    "user in user": "unshare --user --map-root-user unshare --user --map-root-user",
    "all": "unshare --user --map-root-user --pid --fork --kill-child --mount --net --ipc --uts --cgroup",
}
TELL = (
    "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
    "s.sendall(sys.argv[2].encode()+b'\\n'); print(s.recv(65536).decode()[:200])"
)


def refused_writes() -> float:
    return metrics()["fgpu_control_refused_total", frozenset()]


@pytest.mark.places("host")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_root_of_another_user_namespace_is_limited_and_may_only_read_from_the_agent(tenant, topology: str) -> None:
    one, into = tenant(CONTEXT + 100 * MIB), TOPOLOGIES[topology]
    client = one.client(before=into)
    with one.growing(60 * MIB):
        client.ok("context")
        client.ok(f"alloc {60 * MIB}")
    assert client.do(f"alloc {60 * MIB}") == REFUSED
    limit, counted = one.memory()["limit_bytes"], refused_writes()
    for request, answer in (
        ({"verb": "ping"}, '"ok"'),
        ({"verb": "put", "target": one.path, "memory": "9GiB"}, "needs root on the host"),
        ({"verb": "drop", "target": one.path}, "needs root on the host"),
        ({"verb": "detach"}, "needs root on the host"),
    ):
        script = one.folder / "tell.sh"
        script.write_text(f"/usr/bin/python3 -c {TELL!r} {RUN_DIR}/control.sock '{json.dumps(request)}'")
        assert answer in one.run(f"{into} sh {script}")
    assert one.memory()["limit_bytes"] == limit
    assert refused_writes() == counted + 3
