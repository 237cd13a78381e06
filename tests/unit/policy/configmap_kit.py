"""A folder of policies as kubelet mounts a ConfigMap."""

from __future__ import annotations

import os
from pathlib import Path

from tests.unit import policy_kit as kit


class ConfigMap:
    """A folder as kubelet updates it: each file is a link through `..data`, itself a link that one rename replaces."""

    def __init__(self, path: Path, files: int) -> None:
        self.path, self._names, self._count = path, [f"{n}.yaml" for n in range(files)], 0
        path.mkdir()
        self.swap("v0")
        for name in self._names:
            (path / name).symlink_to(f"..data/{name}")

    def swap(self, version: str) -> None:
        self._count += 1
        fresh = self.path / f"..{self._count}"
        fresh.mkdir()
        for name in self._names:
            (fresh / name).write_text(kit.text(f"{version}-{name[:-5]}"))
        (self.path / "..data_tmp").symlink_to(fresh.name)
        os.rename(self.path / "..data_tmp", self.path / "..data")
        self._remove(f"..{self._count - 2}")

    def _remove(self, old: str) -> None:
        for name in self._names if (self.path / old).is_dir() else ():
            (self.path / old / name).unlink()
        if (self.path / old).is_dir():
            (self.path / old).rmdir()
