"""The CDI specifications of prepared ResourceClaims: one file for each claim, named after the UID of the claim.

This module runs in the asyncio loop of the DRA driver. The files are the whole state of the driver. The files outlive
the driver and kubelet, and a boot removes the files with all of /var/run. Engines read a file as a whole or not at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf.containers import cdi
from fgpu_ebpf.containers.cdi import Parts
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.policy.share_name import Share

log = logging.getLogger("fgpu.kubelet")
_PREFIX, _SUFFIX = f"{cdi.CLAIM_KIND.replace('/', '-')}_", ".json"


@dataclass(frozen=True, slots=True)
class ClaimFiles:
    """The folder of the specifications."""

    folder: Path = cdi.FOLDER

    def place(self, uid: str) -> Path:
        """Return the path of a claim's file."""
        return self.folder / f"{_PREFIX}{uid}{_SUFFIX}"

    def prepare(self, uid: str, shares: Sequence[Share], env: Mapping[str, str], parts: Parts) -> list[str]:
        """Write the file of a claim, and return the CDI device of each share. Raise OSError on failure."""
        self._write(self.place(uid), uid, shares, [f"{key}={value}" for key, value in env.items()], parts)
        return [f"{cdi.CLAIM_KIND}={uid}-{number}" for number in range(len(shares))]

    def _write(self, path: Path, uid: str, shares: Sequence[Share], env: Sequence[str], parts: Parts) -> None:
        spec = cdi.claim_spec(parts, uid, shares, env)
        if not path.exists() or path.read_text() != cdi.text(spec):
            cdi.write(path, spec)

    def unprepare(self, uid: str) -> None:
        """Remove the file of a claim, if the file exists. Raise OSError on failure."""
        self.place(uid).unlink(missing_ok=True)

    def renew(self, parts: Parts) -> None:
        """Write all files again, with the paths of another version of the agent, because containers may restart."""
        for path in self.folder.glob(f"{_PREFIX}*{_SUFFIX}"):
            try:
                spec = json.loads(path.read_text())
                words = [device["containerEdits"]["hooks"][0]["args"] for device in spec["devices"]]
                shares = [share_name.parse(each[-1]) for each in words]
                uid = path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
                self._write(path, uid, shares, spec["containerEdits"]["env"], parts)
            except (OSError, ValueError, LookupError, TypeError) as error:
                log.error("%s cannot be written again: %s", path, error)
