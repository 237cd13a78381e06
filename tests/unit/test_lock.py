"""Tests of deploy/packages.lock: it has every package that pyproject.toml requires, each version with its digests."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


def test_the_lock_has_every_dependency_of_pyproject_and_a_digest_for_each_entry() -> None:
    text = (ROOT / "deploy/packages.lock").read_text()
    locked = {canonicalize_name(name): version for name, version, _ in ENTRY.findall(text)}
    assert len(locked) == len(re.findall(r"^[^#\s]", text, re.MULTILINE)), "an entry without a digest"
    for words in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        asked = Requirement(words)
        assert asked.specifier.contains(locked[canonicalize_name(asked.name)]), words
