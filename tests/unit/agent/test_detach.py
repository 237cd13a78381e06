"""Tests of the parts of a detach that need no agent."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fgpu_ebpf.agent import detach
from tests.support.host import ROOT
from tests.unit.root_kit import needs_root

as_root = needs_root("it makes a pid namespace")
LISTENS = """
import socket, sys
from pathlib import Path
from fgpu_ebpf.agent import detach
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(detach._is_of_systemd(Path(sys.argv[1])))
"""


@as_root
@pytest.mark.parametrize(("prefix", "is_first"), [(("unshare", "--pid", "--fork"), "True"), ((), "False")])
def test_a_socket_of_the_first_process_is_systemd_s(tmp_path: Path, prefix: tuple[str, ...], is_first: str) -> None:
    command = [*prefix, sys.executable, "-c", LISTENS, str(tmp_path / "sock")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    assert done.stdout.strip() == is_first


def test_a_socket_without_a_listener_is_not_systemd_s(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
    assert not detach._is_of_systemd(tmp_path / "sock")
    assert not detach._is_of_systemd(tmp_path / "none")
