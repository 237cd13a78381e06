"""The file with the names and labels from engines, so that limits by label survive a restart of the agent.

The module runs in the agent's main thread. If the file is invalid, an error is logged and the requests are repeated.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.workload import Names, Subject

log = logging.getLogger("fgpu.engines")
MOST_BYTES = 64 << 20
_FIELDS = {field.name for field in fields(Names)}


def read(file: Path) -> dict[Subject, Names]:
    """Return the stored names, or an empty dict if the file is missing or invalid.

    An entry of an earlier version, which lacks a field, is left out: the agent requests the names again.
    """
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(MOST_BYTES))
        return dict(_entry(entry) for entry in found if entry.keys() >= _FIELDS)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.error("%s cannot be read; the agent queries the engines again: %s", file, error)
        return {}


def write(file: Path, known: Mapping[Subject, Names]) -> None:
    """Replace the file. Only root can read the new file. Raise OSError if the file cannot be written."""
    entries = [{"of": [s.engine, s.id, s.is_pod], **asdict(names)} for s, names in known.items()]
    atomic_file.write(file, json.dumps(entries), 0o600)


def _entry(entry: Any) -> tuple[Subject, Names]:
    """Parse an entry. Fields that this version does not have are ignored.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the entry is invalid.
    """
    names = Names(**{name: entry[name] for name in _FIELDS})
    if not (isinstance(names.name, str) and isinstance(names.is_cut, bool)) or not all(
        text is None or isinstance(text, str) for text in (names.pod, names.namespace, names.image)
    ):
        raise ValueError(f"{names!r} are not valid names")
    for labels in (names.labels, names.image_asks):
        if not isinstance(labels, dict) or not all(isinstance(word, str) for word in (*labels, *labels.values())):
            raise ValueError(f"{labels!r} are not labels")
    return _subject(entry["of"]), names


def _subject(of: Any) -> Subject:
    engine, id_, is_pod = of
    return Subject(str(id_), Engine(engine), bool(is_pod))
