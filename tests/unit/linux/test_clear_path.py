"""A folder at the path of a socket is moved aside, and a detach removes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fgpu_ebpf.linux import clear_path

REMOVE = (
    "import pathlib, sys; from fgpu_ebpf.linux import clear_path; clear_path.remove_moved(pathlib.Path(sys.argv[1]))"
)
# The folder with a mount in it is kept, with the mounted files.
MOUNTED = """
other=$(printf "$1/c\\r\\r\\302\\205d")
mkdir "$other" && mount -t tmpfs none "$other"
inner=$1/a.sock.moved-3/inner
mkdir "$inner" && mount -t tmpfs none "$inner" && touch "$inner/data"
"$2" -c "$3" "$1/a.sock"
ls "$inner"
"""


def test_folders_moved_aside_are_removed_with_their_contents(tmp_path: Path) -> None:
    place = tmp_path / "a.sock"
    for _ in range(2):
        (place / "folder").mkdir(parents=True)
        clear_path.make_way(str(place))
        assert not place.exists()
    (tmp_path / "b.sock.moved-1").mkdir()
    assert len(list(tmp_path.glob("a.sock.moved-*"))) == 2
    clear_path.remove_moved(place)
    assert [path.name for path in tmp_path.iterdir()] == ["b.sock.moved-1"]


def test_a_moved_folder_with_a_mount_inside_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.sock.moved-3").mkdir()
    command = ["unshare", "--map-root-user", "--mount", "sh", "-ec", MOUNTED, "sh", tmp_path, sys.executable, REMOVE]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout == "data\n"
