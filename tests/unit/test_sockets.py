"""What stands where a socket is to be goes aside, and is removed by a detach."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fgpu_ebpf import sockets

REMOVE = "import pathlib, sys; from fgpu_ebpf import sockets; sockets.remove_moved(pathlib.Path(sys.argv[1]))"
# The one with a mount in it stays, with what is mounted there.
MOUNTED = """
inner=$1/a.sock.moved-3/inner
mkdir "$inner" && mount -t tmpfs none "$inner" && touch "$inner/data"
"$2" -c "$3" "$1/a.sock"
ls "$inner"
"""


def test_what_was_moved_aside_is_removed_with_its_contents(tmp_path: Path) -> None:
    place = tmp_path / "a.sock"
    for _ in range(2):
        (place / "folder").mkdir(parents=True)
        sockets.make_way(str(place))
        assert not place.exists()
    (tmp_path / "b.sock.moved-1").mkdir()
    assert len(list(tmp_path.glob("a.sock.moved-*"))) == 2
    sockets.remove_moved(place)
    assert [path.name for path in tmp_path.iterdir()] == ["b.sock.moved-1"]


def test_a_mount_inside_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "a.sock.moved-3").mkdir()
    command = ["unshare", "--mount", "sh", "-ec", MOUNTED, "sh", tmp_path, sys.executable, REMOVE]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout == "data\n"
