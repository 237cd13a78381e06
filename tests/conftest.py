"""How much the tests do: FGPU_TEST_SCALE is quick, ci (the default) or full."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import hypothesis
import pytest
import pytest_timeout
from rows import named_of_rows
from trials import Again, Patience, Trials
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

SCALES = ("quick", "ci", "full")
# Suites of whole processes that race each other and the clock of a shared machine: what fails there once in thousands
# is tried a second time and printed in full, never passed over.
LIVE = ("bpf", "dashboards", "e2e", "engines", "gatekeeper", "kubelet", "packages", "page", "shim", "standalone")
# Suites that need nothing of what a host has one of. The whole run has a process for these and one for all others.
ASIDE = ("fuzz", "shim", "sim", "unit")
TRIALS = pytest.StashKey[Trials]()
TIMER = pytest.StashKey[pytest_timeout.Settings]()
CLONE_NEWNS = 0x20000
WORLD = Path(__file__).with_name("world.sh")


def pytest_addoption(parser: pytest.Parser) -> None:
    """A trial that fails leaves something: nobody sees what, on a machine where all pass."""
    parser.addoption("--again", action="store_true", help="a test that may be tried again fails once, at its end")
    parser.addoption("--rows", metavar="LETTER", help="only tests that docs/security.md names in rows of that letter")


def pytest_configure(config: pytest.Config) -> None:
    """Names the marks, and refuses a scale that is none."""
    config.addinivalue_line("markers", "slow: left out of `./dev test quick`")
    config.addinivalue_line("markers", "timed: measures time; where it fails it is tried again, twice: noise passes")
    config.addinivalue_line("markers", "places(*names): where an end-to-end test runs; everywhere without")
    config.addinivalue_line("markers", "every_place: there in the quick run too, which takes the last place else")
    which = os.environ.get("FGPU_TEST_SCALE", "ci")
    if which not in SCALES:
        raise pytest.UsageError(f"FGPU_TEST_SCALE is none of {', '.join(SCALES)}")
    hypothesis.settings.register_profile(
        "fgpu", derandomize=which != "full"
    )  # what is new is looked for in the full run
    hypothesis.settings.load_profile("fgpu")
    if hasattr(config, "workerinput"):
        _leave_the_others()


class Lanes(LoadScopeScheduling):
    """One process for the suites of ASIDE, and one for all others, each in the order of the suites."""

    def _split_scope(self, nodeid: str) -> str:
        return "aside" if nodeid.split("/")[1] in ASIDE else "host"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Lanes:
    """Whatever `--dist` says."""
    return Lanes(config, log)


def _leave_the_others() -> None:
    """What this process and its children have in /run and of pinned maps is their own."""
    assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
    subprocess.run(["sh", WORLD, "true"], check=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick leaves out what is marked slow, and says how many; what is at the mercy of the clock may be tried again."""
    patience = Patience()
    for item in items:
        if not item.get_closest_marker("flaky"):
            _try_again(item, patience)
    left_out: set[pytest.Item] = set()
    if letter := config.getoption("rows"):
        named = {test for row, tests in named_of_rows().items() if row.startswith(letter) for test in tests}
        left_out |= {item for item in items if item.nodeid.partition("[")[0] not in named}
    if os.environ.get("FGPU_TEST_SCALE") == "quick":
        left_out |= {item for item in items if item.get_closest_marker("slow")}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _try_again(item: pytest.Item, patience: Patience) -> None:
    """Twice, once or never where the processors were the machine's own; later, of any suite, where they were not."""
    own = 2 if item.get_closest_marker("timed") else int(item.path.parent.name in LIVE)
    item.stash[TRIALS] = Trials(own, patience)
    item.add_marker(item.stash[TRIALS].marker())


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> None:
    """pytest-timeout starts one timer for a test, which ends with the first trial that fails."""
    item.stash[TIMER] = settings


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is taken from the processors from here on is taken from this trial, and its time to end in begins."""
    if trials := item.stash.get(TRIALS, None):
        timer = item.stash.get(TIMER, None)
        if timer:
            item.ihook.pytest_timeout_cancel_timer(item=item)
        trials.begin()
        if timer:
            item.ihook.pytest_timeout_set_timer(item=item, settings=timer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """With `--again`, no first trial is the last."""
    yield
    trials = item.stash.get(TRIALS, None)
    if trials and trials.begun == 1 and item.config.getoption("again"):
        raise Again


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With the traceback of what failed stands how much of the processors was taken away."""
    report = yield
    trials = item.stash.get(TRIALS, None)
    if report.failed and trials and hasattr(report.longrepr, "addsection"):
        report.longrepr.addsection("processors", f"{trials.stolen_share():.0%} of them was given to other machines")
    return report


@pytest.fixture(scope="session")
def scale() -> Callable[[int, int, int], int]:
    """scale(quick, ci, full): the count for this run."""
    which = SCALES.index(os.environ.get("FGPU_TEST_SCALE", "ci"))

    def choose(*counts: int) -> int:
        return counts[which]

    return choose


@pytest.fixture(scope="session", autouse=True)
def _entered_by_anybody(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Folders of tests are root's alone, but for those that a test opens; what is above them is everybody's."""
    base, end = tmp_path_factory.getbasetemp(), Path(tempfile.gettempdir())
    for folder in (base, *base.parents):
        if end not in folder.parents:  # or nobody's business: where --basetemp lies elsewhere
            break
        folder.chmod(0o755)
