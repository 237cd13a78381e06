"""The last valid set of policies, stored on disk.

The agent starts with the stored set if the policy files have an error or are gone. The module runs in the agent's main
thread. Only root may write the file, and each write replaces the file as a whole. If the file is invalid, an error is
logged and there is no last valid set.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.policy import trusted_file
from fgpu_ebpf.policy.folder import parse
from fgpu_ebpf.policy.rules import Policy, PolicySet
from fgpu_ebpf.policy.yaml_document import ConfigError, InvalidFileError

log = logging.getLogger("fgpu.policy")
FILE = Path("/var/lib/fgpu/policies.json")
VERSION = 1
MOST_BYTES = 300 << 20  # more than the maximum number of policy files, each of the maximum size


def write(file: Path, folder: Path, policies: PolicySet) -> None:
    """Store the files from which a set was read, and the name of their folder.

    Raises:
        OSError: the new file could not be written, and the old file is kept.
    """
    files = [[name, data.decode("utf-8", "surrogateescape")] for name, data in policies.files]
    text = json.dumps({"version": VERSION, "folder": str(folder), "files": files})
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    atomic_file.write(file, text, durable=True)


def read(file: Path, folder: Path) -> PolicySet | None:
    """Return the set that was last written for this folder, or None if no set is stored or the set is unreadable."""
    try:
        data, _ = trusted_file.load(str(file), str(file), root_only=True, most_bytes=MOST_BYTES)
        found = json.loads(data)
        if found["folder"] != str(folder):
            return None
        if found["version"] != VERSION:
            raise ValueError(f"has version {found['version']!r}, and this agent reads version {VERSION}")
        return _parsed([(name, text.encode("utf-8", "surrogateescape")) for name, text in found["files"]])
    except FileNotFoundError:
        return None
    except (OSError, InvalidFileError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.error("the last good set of policies cannot be used: %s: %s", file, error)
        return None


def _parsed(files: list[tuple[str, bytes]]) -> PolicySet:
    """Return the policies in these files. Raise ValueError if this version of fgpu finds an error in a file."""
    policies: list[Policy] = []
    errors: list[ConfigError] = []
    for name, data in files:
        found, wrong = parse(name, data)
        policies += found
        errors += wrong
    if errors:
        raise ValueError(str(errors[0]))
    return PolicySet(tuple(policies), tuple(files))
