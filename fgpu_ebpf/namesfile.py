"""What engines have said, kept over restarts of the agent: limits by label hold although the engine is down then.

Owns: one file under /run. Never: decides what is still of use. On failure: a file that cannot be read is none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgpu_ebpf import wholefile
from fgpu_ebpf.cgroupnames import Engine
from fgpu_ebpf.identity import Names, Subject

MOST_BYTES = 64 << 20


def read(file: Path) -> dict[Subject, Names]:
    """All that was written."""
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(MOST_BYTES))
        return {_subject(entry.pop("of")): Names(**entry) for entry in found}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def write(file: Path, known: Mapping[Subject, Names]) -> None:
    """All of it, in the file's place; readable for root alone. Raises OSError."""
    entries = [{"of": [s.engine, s.id, s.is_pod], **asdict(names)} for s, names in known.items()]
    wholefile.write(file, json.dumps(entries), 0o600)


def _subject(of: Any) -> Subject:
    engine, id_, is_pod = of
    return Subject(str(id_), Engine(engine), bool(is_pod))
