"""The folder of policy files, read as a whole.

The agent's policy thread, its main thread and `fgpu policy` use this module. A reading is never a part of the folder or
a mixture of two states of it. A reading with errors has no policies; the caller keeps the last ones.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from fgpu_ebpf.check import Check
from fgpu_ebpf.policy import trusted_file
from fgpu_ebpf.policy.rules import Policy, PolicySet
from fgpu_ebpf.policy.trusted_file import Stamp
from fgpu_ebpf.policy.yaml_document import MOST_ERRORS, ConfigError, InvalidFileError

FOLDER = Path("/etc/fgpu/policy.d")
MOST_FILES = 256
MOST_POLICIES = 1_000
SETTLE_SECONDS = 0.04  # a file that changed more recently may be written in part only
EMPTY_TIMES = 10  # this much longer for an empty file: most writers truncate first, and empty means no policies
TRIES = 20
SUFFIXES = (".yaml", ".yml")
CHANGING = "changes all the time: wait until its files are written"
_GONE = "does not exist: the last policies stay in force; create it again, empty for no policies"


@dataclass(frozen=True, slots=True)
class State:
    """A state of the folder: its permissions and those of the folders around it, and the stamps of its files."""

    path_stats: tuple[tuple[int, int, int], ...]
    files: tuple[tuple[str, Stamp | None], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading of the folder: a set, or None and errors. `state` is that of what was read; None: no folder.

    `at_ns`: a time at which the folder was in this state.
    """

    policies: PolicySet | None
    errors: tuple[ConfigError, ...]
    state: State | None
    at_ns: int = field(default=0, compare=False)


def check(folder: Path) -> Check:
    """Return the finding of `fgpu doctor`: what an agent that starts now would find."""
    reading = PolicyFolder(folder).read()
    if reading.policies is None:
        return Check("policies", False, "; ".join(map(str, reading.errors[:3])), f"fgpu policy check {folder}")
    return Check("policies", True, f"{len(reading.policies.policies)} in {folder}")


class PolicyFolder:
    """`*.yaml` and `*.yml` of a folder in lexical order, without hidden files (and so without those of editors).

    `root_only`: refuse files and folders that users other than root can write. `settle_seconds`: how long ago the last
    change of a file must be.
    """

    def __init__(self, path: Path, root_only: bool = True, settle_seconds: float = SETTLE_SECONDS) -> None:
        self.path = path
        self._root_only = root_only
        self._settle_seconds = settle_seconds

    def read(self, may_be_missing: bool = True) -> Reading:
        """Return all policies, or all errors. A missing folder means no policies, if it `may_be_missing`."""
        for _ in range(TRIES):
            at_ns, before = time.monotonic_ns(), self.state()
            if before is None:
                return replace(Reading(PolicySet(), (), None) if may_be_missing else self.gone(), at_ns=at_ns)
            if unsettled := self._unsettled_seconds(before):
                time.sleep(min(unsettled, self._settle_seconds))
                continue
            reading = self._read(before)
            if reading.state == self.state():
                return replace(reading, at_ns=at_ns)
        return replace(self._failed(CHANGING), at_ns=at_ns)

    def state(self) -> State | None:
        """Return the state of the folder now, or None if it does not exist."""
        try:
            stats = trusted_file.path_stats(str(self.path))
            names = sorted(n for n in os.listdir(self.path) if n.endswith(SUFFIXES) and not n.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return State((), ())
        return State(stats, tuple((name, self._stamp(name)) for name in names[: MOST_FILES + 1]))

    def _stamp(self, name: str) -> Stamp | None:
        try:
            return Stamp.of(os.stat(f"{self.path}/{name}"))
        except OSError:
            return None

    def _unsettled_seconds(self, state: State) -> float:
        """Return how long to wait until no file has changed just now; 0: no longer.

        A change in the future is ignored: the clock was set.
        """
        left = [self._settle_seconds * (1 if stamp.size else EMPTY_TIMES) - age
                for _, stamp in state.files
                if stamp and (age := (time.time_ns() - stamp.ctime_ns) / 1e9) >= 0]  # fmt: skip
        return max([0.0, *left])

    def gone(self) -> Reading:
        """Return the reading of a folder that existed before and does not now."""
        return self._failed(_GONE)

    def _failed(self, text: str, state: State | None = None) -> Reading:
        return Reading(None, (ConfigError(str(self.path), 0, "", text),), state)

    def _read(self, state: State) -> Reading:
        if len(state.files) > MOST_FILES:
            return self._failed(f"holds more than {MOST_FILES} files: put several policies into one", state)
        try:
            os.listdir(self.path)
            trusted_file.check_folder(str(self.path), self._root_only)
        except InvalidFileError as invalid:
            return Reading(None, (invalid.error,), state)
        except OSError as error:
            return self._failed(f"cannot be read: {error.strerror}", state)
        policies: list[Policy] = []
        errors: list[ConfigError] = []
        files: list[tuple[str, bytes]] = []
        stamps = dict(state.files)
        for name in stamps:
            stamps[name] = self._read_file(name, policies, errors, files) or stamps[name]
            if len(errors) >= MOST_ERRORS or len(policies) > MOST_POLICIES:
                break
        errors += whole(policies)
        re.purge()  # its cache keeps hundreds of patterns of earlier policies
        read = State(state.path_stats, tuple(stamps.items()))
        return Reading(None if errors else PolicySet(tuple(policies), tuple(files)), tuple(errors[:MOST_ERRORS]), read)

    def _read_file(
        self, name: str, policies: list[Policy], errors: list[ConfigError], files: list[tuple[str, bytes]]
    ) -> Stamp | None:
        """Add a file's policies or errors to the lists; return its stamp when it was read, or None if it was not."""
        path = f"{self.path}/{name}"
        try:
            data, stamp = trusted_file.load(path, path, self._root_only)
        except InvalidFileError as invalid:
            errors.append(invalid.error)
            return None
        except OSError as error:
            errors.append(ConfigError(path, 0, "", f"cannot be read: {error.strerror}"))
            return None
        files.append((path, data))
        found, wrong = parse(path, data)
        policies += found
        errors += wrong
        return stamp


def parse(name: str, data: bytes) -> tuple[list[Policy], list[ConfigError]]:
    """Return the policies or the errors of one file."""
    # Imported here: it imports pydantic, 11 MiB that a host without policy files does not need.
    from fgpu_ebpf.policy import parse

    return parse.read(name, data)


def whole(policies: list[Policy]) -> list[ConfigError]:
    """Return the errors between files that are right by themselves: names used twice, too many policies."""
    first: dict[str, Policy] = {}
    wrong = []
    for policy in policies:
        before = first.setdefault(policy.name, policy)
        if before is not policy:
            text = f"the name {policy.name} is taken by {before.source}: choose another"
            wrong.append(_error_at(policy, "metadata.name", text))
    if len(policies) > MOST_POLICIES:
        wrong.append(_error_at(policies[MOST_POLICIES], "", f"more than {MOST_POLICIES:,} policies: join some"))
    return wrong


def _error_at(policy: Policy, field: str, text: str) -> ConfigError:
    file, _, line = policy.source.rpartition(":")
    return ConfigError(file, int(line), field, text)
