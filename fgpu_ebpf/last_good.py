"""The last good set of policies, kept on disk: a start uses it where the policy files have an error or are gone.

Owns: one file that root alone may write, replaced as a whole. Never: decides when it is used (`policies` does). On
failure: writing raises OSError and leaves the old file; a file that cannot be understood is no set, which is logged.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from fgpu_ebpf import configfile, wholefile
from fgpu_ebpf.policy import Policy, PolicySet
from fgpu_ebpf.policyfolder import parse
from fgpu_ebpf.yamlfile import Fault, FaultError

log = logging.getLogger("fgpu.policy")
FILE = Path("/var/lib/fgpu/policies.json")
VERSION = 1
MOST_BYTES = 300 << 20  # as many policy files as a folder may hold, each as large as it may be


def write(file: Path, folder: Path, policies: PolicySet) -> None:
    """Keeps the files that this set was read from, and the folder that they lie in. Raises OSError."""
    files = [[name, data.decode("utf-8", "surrogateescape")] for name, data in policies.files]
    text = json.dumps({"version": VERSION, "folder": str(folder), "files": files})
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    wholefile.write(file, text)


def read(file: Path, folder: Path) -> PolicySet | None:
    """The set that was last written for this folder; None: there is none that this version understands."""
    try:
        data, _ = configfile.load(str(file), str(file), root_only=True, most_bytes=MOST_BYTES)
        found = json.loads(data)
        if found["folder"] != str(folder):
            return None
        if found["version"] != VERSION:
            raise ValueError(f"is of version {found['version']!r}")
        return _parsed([(name, text.encode("utf-8", "surrogateescape")) for name, text in found["files"]])
    except FileNotFoundError:
        return None
    except (OSError, FaultError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.error("the last good set of policies cannot be used: %s: %s", file, error)
        return None


def _parsed(files: list[tuple[str, bytes]]) -> PolicySet:
    """Raises ValueError: this version finds an error in them."""
    policies: list[Policy] = []
    faults: list[Fault] = []
    for name, data in files:
        found, wrong = parse(name, data)
        policies += found
        faults += wrong
    if faults:
        raise ValueError(str(faults[0]))
    return PolicySet(tuple(policies), tuple(files))
