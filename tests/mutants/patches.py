"""Patches that remove the defence of one row of docs/security.md: NAME.patch beside this file.

A patch begins with its header, lines `Key: value`, and continues with the output of `git diff`:

    Row: T7
    Test: tests/gatekeeper/test_abuse.py::test_a_malformed_message_closes_the_connection_of_its_sender
    Removes: one sentence that names the removed code

The test's assertion must fail with the patch. If the test can only hang, the header has `Hangs:` with the reason.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.judge import Outcome

HERE = Path(__file__).parent
COMPILED = re.compile(r"^\+\+\+ b/(shim|sim|oci|examples|bench)/|^\+\+\+ b/bpf/fgpu\.h$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch and its header."""

    name: str
    row: str
    test: str
    removes: str
    compiled: bool  # whether it changes files that `./dev build` compiles
    kills: frozenset[Outcome]

    @property
    def tests(self) -> tuple[str, ...]:
        return (self.test,)

    @property
    def path(self) -> Path:
        return HERE / f"{self.name}.patch"

    def apply(self, root: Path, *how: str) -> None:
        """Remove the defence in the tree at `root`. Raise CalledProcessError if the patch does not apply."""
        subprocess.run(["git", "apply", *how, self.path], cwd=root, check=True, capture_output=True, text=True)


def read(path: Path) -> Patch:
    """Return the patch in a file. Raise SystemExit if its header is incomplete."""
    text = path.read_text(encoding="utf-8")
    head = dict(re.findall(r"^(\w+): (.+)$", text.partition("\ndiff --git ")[0], re.MULTILINE))
    if not {"Row", "Test", "Removes"} <= head.keys() <= {"Row", "Test", "Removes", "Hangs"}:
        raise SystemExit(f"{path}: its header has {', '.join(head)}")
    kills = {Outcome.ASSERTED, Outcome.HUNG} if "Hangs" in head else {Outcome.ASSERTED}
    return Patch(path.stem, head["Row"], head["Test"], head["Removes"], bool(COMPILED.search(text)), frozenset(kills))


def patches() -> list[Patch]:
    """Return all patches, in the order of their rows."""
    found = [read(path) for path in sorted(HERE.glob("*.patch"))]
    return sorted(found, key=lambda patch: (patch.row[:1] == "F", int(patch.row[1:]), patch.name))
