"""Remove defences one at a time and check that tests fail: a check that cannot fail is a defect.

usage: python -m tests.mutants [NAME or ROW…]; without arguments, all. A mutant is a patch beside this file, which
removes what a row of docs/security.md promises (patches.py), or one broken rule of the kernel's ledger (rules.py). Each
is tried in a copy of the tree (trees.py). Its tests must pass without it and fail with it (judge.py defines failing).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.mutants.judge import Outcome
from tests.mutants.patches import Patch, patches
from tests.mutants.rules import RULES, Rule
from tests.mutants.trees import Tree
from tests.rows import named_of_rows

Mutant = Patch | Rule


def chosen(names: list[str]) -> list[Mutant]:
    """Return the mutants with these names or rows. Raise SystemExit if there is no such name or row."""
    every: list[Mutant] = [*patches(), *map(Rule, RULES)]
    for name in names:
        if not any(name in (mutant.name, mutant.row) for mutant in every):
            raise SystemExit(f"no mutant has the name or the row {name}")
    return [mutant for mutant in every if not names or {mutant.name, mutant.row} & set(names)]


class Trial:
    """One run of all requested mutants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = Tree(folder / "whole")
        self.passed: dict[tuple[str, ...], bool] = {}  # tests -> they pass without a mutant

    def killed(self, mutant: Mutant) -> bool:
        """Return whether the mutant's tests fail with it. Print the result, with their output if it is not "killed"."""
        log = self.folder / f"{mutant.name}.log"
        log.touch()  # if the same tests failed before without a mutant, they do not run again and write no log
        said = self._try(mutant, log)
        print(f"{mutant.row or 'rule'} {mutant.name}: {said}", flush=True)
        if said != "killed":
            print(*log.read_text(errors="replace").splitlines()[-60:], sep="\n", flush=True)
        return said == "killed"

    def _try(self, mutant: Mutant, log: Path) -> str:
        if not self._passes(mutant.tests, log):
            return "its tests do not pass without it"
        copy = self.folder / mutant.name
        try:
            tree = Tree(copy, of=self.whole)
            mutant.apply(copy)
            if mutant.compiled and not tree.build(log):
                return "does not compile"
            outcome = tree.judge(*mutant.tests, once=True, log=log)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        if outcome in mutant.kills:
            return "killed"
        return "SURVIVED" if outcome is Outcome.PASSED else f"the tests {outcome.name.lower()}, which proves nothing"

    def _passes(self, tests: tuple[str, ...], log: Path) -> bool:
        if tests not in self.passed:
            self.passed[tests] = self.whole.judge(*tests, once=False, log=log) is Outcome.PASSED
        return self.passed[tests]


def main() -> int:
    """Return 0 if every mutant was killed, else 1."""
    mutants = chosen(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="fgpu-mutants-") as folder:
        trial = Trial(Path(folder))
        alive = [mutant for mutant in mutants if not trial.killed(mutant)]
    print(f"{len(mutants) - len(alive)} killed, {len(alive)} not: {' '.join(mutant.name for mutant in alive)}")
    held = {mutant.row for mutant in mutants if mutant.row} - {mutant.row for mutant in alive}
    print(f"rows with all mutants killed: {len(held)} of {len(named_of_rows())}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
