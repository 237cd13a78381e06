"""What tests of a host have for themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

WORLD = Path(__file__).parents[1] / "world.sh"
INSIDE = """
touch /run/fgpu/mine "$0/made"
until [ -e "$0/removed" ]; do sleep 0.01; done
ls /run/fgpu
"""
OUTSIDE = """
mount -t tmpfs tmpfs /run
mkdir /run/fgpu
unshare --mount sh "$1" sh -c "$2" "$0" &
until [ -e "$0/made" ]; do sleep 0.01; done
rmdir /run/fgpu
touch "$0/removed"
wait $!
"""


def test_who_removes_the_hosts_folder_takes_nothing_of_it(tmp_path: Path) -> None:
    command = ["unshare", "--mount", "sh", "-ec", OUTSIDE, tmp_path, WORLD, INSIDE]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=True).stdout == "mine\n"
