"""The folder of policy files, read as a whole.

The module runs in the policy thread and the main thread of the agent, and in commands. The result is always one
complete state of the folder, never a mixture of two states. If a file has an error, the result has no policies, and the
caller keeps the policies of the previous reading.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.check import Check
from fgpu_ebpf.policy import trusted_file
from fgpu_ebpf.policy.rules import Policy, PolicySet
from fgpu_ebpf.policy.trusted_file import Stamp
from fgpu_ebpf.policy.yaml_document import MOST_ERRORS, ConfigError, InvalidFileError

FOLDER = Path("/etc/fgpu/policy.d")
MOST_FILES = 256
MOST_POLICIES = 1_000
SETTLE_SECONDS = 0.04  # a file with a more recent change may be incomplete
EMPTY_TIMES = 10  # multiple of the wait for an empty file, because most programs truncate a file before writing
TRIES = 20
SUFFIXES = (".yaml", ".yml")
CHANGING = "changes all the time: wait until its files are written"
NEXT_STEP = "`fgpu setup docker --memory 8GiB` writes a policy; `fgpu run` and `fgpu set` need no policy"
_GONE = "does not exist: the last policies stay in force; create the folder again (an empty folder: no policies)"


class State(NamedTuple):
    """A state of the folder: the stamps of the files, and the inode, mode and owner of the folder and its parents."""

    path_stats: tuple[tuple[int, int, int], ...]
    files: tuple[tuple[str, Stamp | None], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading of the folder: a set of policies, or None and the errors.

    Attributes:
        policies: the set, or None if there are errors.
        errors: the errors, at most MOST_ERRORS.
        state: the state of the folder at the time of the reading, or None if there was no folder.
    """

    policies: PolicySet | None
    errors: tuple[ConfigError, ...]
    state: State | None


def check(folder: Path) -> Check:
    """Return the check for `fgpu doctor` of whether the folder has errors for an agent that starts now."""
    reading = PolicyFolder(folder).read()
    if reading.policies is None:
        return Check("policies", False, "; ".join(map(str, reading.errors[:3])), f"fgpu policy check {folder}")
    more = "" if reading.policies.policies else f": {NEXT_STEP}"
    return Check("policies", True, f"{len(reading.policies.policies)} in {folder}{more}")


class PolicyFolder:
    """The files `*.yaml` and `*.yml` of a folder, in lexical order. Hidden files (often of editors) are ignored.

    `root_only`: refuse files and folders that users other than root can write. `settle_seconds`: the minimum age of the
    last change of a file at the time of the reading.
    """

    def __init__(self, path: Path, root_only: bool = True, settle_seconds: float = SETTLE_SECONDS) -> None:
        self.path = path
        self._root_only = root_only
        self._settle_seconds = settle_seconds

    def read(self, may_be_missing: bool = True) -> Reading:
        """Return all policies, or the errors.

        The method waits until no file has a recent change, and tries up to TRIES times.

        If the folder is missing, there are no policies. Without `may_be_missing`, a missing folder is an error.
        """
        for _ in range(TRIES):
            before = self.state()
            if before is None:
                return Reading(PolicySet(), (), None) if may_be_missing else self.gone()
            if unsettled := self._unsettled_seconds(before):
                time.sleep(min(unsettled, self._settle_seconds))
                continue
            reading = self._read(before)
            if reading.state == self.state():
                return reading
        return self._failed(CHANGING)

    def state(self) -> State | None:
        """Return the present state of the folder, or None if the folder does not exist."""
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
        """Return the seconds to wait until the last change of each file is old enough. The result is 0 for no wait.

        A time of change in the future is ignored, because such a time means that the clock was set back.
        """
        left = [self._settle_seconds * (1 if stamp.size else EMPTY_TIMES) - age
                for _, stamp in state.files
                if stamp and (age := (time.time_ns() - stamp.ctime_ns) / 1e9) >= 0]  # fmt: skip
        return max([0.0, *left])

    def gone(self) -> Reading:
        """Return the reading of a folder that existed before and does not exist now."""
        return self._failed(_GONE)

    def _failed(self, text: str, state: State | None = None) -> Reading:
        return Reading(None, (ConfigError(str(self.path), 0, "", text),), state)

    def _read(self, state: State) -> Reading:
        if len(state.files) > MOST_FILES:
            return self._failed(f"holds more than {MOST_FILES} files: put several policies into one file", state)
        try:
            os.listdir(self.path)
            trusted_file.check_folder(str(self.path), self._root_only)
        except InvalidFileError as invalid:
            return Reading(None, (invalid.error,), state)
        except OSError as error:
            return self._failed(f"cannot be read: {error.strerror}", state)
        if not state.path_stats:  # state() could not read the folder, so its files are not known
            return self._failed("cannot be read", state)
        policies: list[Policy] = []
        errors: list[ConfigError] = []
        files: list[tuple[str, bytes]] = []
        stamps = dict(state.files)
        for name in stamps:
            stamps[name] = self._read_file(name, policies, errors, files) or stamps[name]
            if len(errors) >= MOST_ERRORS or len(policies) > MOST_POLICIES:
                break
        errors += whole(policies)
        re.purge()  # without the purge, the cache of `re` keeps hundreds of patterns of earlier policies
        read = State(state.path_stats, tuple(stamps.items()))
        return Reading(None if errors else PolicySet(tuple(policies), tuple(files)), tuple(errors[:MOST_ERRORS]), read)

    def _read_file(
        self, name: str, policies: list[Policy], errors: list[ConfigError], files: list[tuple[str, bytes]]
    ) -> Stamp | None:
        """Read a file and add its policies or errors to the lists. Return the stamp, or None for an unreadable file."""
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
    # The schema is imported only now, because it imports pydantic, which takes 11 MiB. A host without policy files
    # does not need pydantic.
    from fgpu_ebpf.policy import schema

    return schema.read(name, data)


def whole(policies: list[Policy]) -> list[ConfigError]:
    """Return the errors of the whole set: a name that two policies have, or too many policies."""
    first: dict[str, Policy] = {}
    wrong = []
    for policy in policies:
        before = first.setdefault(policy.name, policy)
        if before is not policy:
            text = f"the name {policy.name} is taken by {before.source}: choose another name"
            wrong.append(_error_at(policy, "metadata.name", text))
    if len(policies) > MOST_POLICIES:
        wrong.append(_error_at(policies[MOST_POLICIES], "", f"more than {MOST_POLICIES:,} policies: combine policies"))
    return wrong


def _error_at(policy: Policy, field: str, text: str) -> ConfigError:
    file, _, line = policy.source.rpartition(":")
    return ConfigError(file, int(line), field, text)
