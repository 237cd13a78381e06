"""Settings of every run of the tests: their amount of work, their time limits, trials, and the worlds of the workers.

FGPU_TEST_SCALE is the amount of work: quick, ci (the default) or full.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import hypothesis
import psutil
import pytest
import pytest_timeout
from xdist.remote import Producer

from tests import hang, world
from tests.rows import named_of_rows
from tests.schedule import Durations, Schedule
from tests.trials import LAST_SECONDS, Again, Trials

SCALES = ("quick", "ci", "full")
BEGAN = time.monotonic()
TRIALS = pytest.StashKey[Trials]()
TIMER = pytest.StashKey[pytest_timeout.Settings]()
MOST_SECONDS = 240  # time limit of a test, except in full runs and in a cluster; alone, no test takes half of it
AUTOGROUP = Path("/proc/self/autogroup")
TIMED_NICE = -20  # a worker with this nice level gets ninety times the processor time of another busy worker
WORLDS = "FGPU_TEST_WORLDS"  # in the environment: each process that runs tests enters its own world


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options.

    `--again` finds tests that fail in the state that their first trial has left. A run in which all trials pass does
    not find them.
    """
    parser.addoption("--again", action="store_true", help="let each test that may be repeated fail once, at its end")
    parser.addoption("--renew-durations", action="store_true", help="write the seconds of each file that is run")
    parser.addoption("--rows", metavar="LETTER", help="only tests that docs/security.md names in rows of that letter")


def pytest_configure(config: pytest.Config) -> None:
    """Register marks and plugins, refuse an unknown scale, and enter a world if this process runs tests in one."""
    config.addinivalue_line("markers", "slow: left out of `./dev test quick`")
    config.addinivalue_line("markers", "timed: measures time")
    config.addinivalue_line("markers", "places(*names): the places where an end-to-end test runs; without it: all")
    config.addinivalue_line("markers", "every_place: a quick run uses all places of the test, not only the last one")
    which = os.environ.get("FGPU_TEST_SCALE", "ci")
    if which not in SCALES:
        raise pytest.UsageError(f"FGPU_TEST_SCALE is none of {', '.join(SCALES)}")
    # A full run searches new examples. No example has a time limit of its own: other tests use the processors too.
    hypothesis.settings.register_profile("fgpu", derandomize=which != "full", deadline=None)
    hypothesis.settings.load_profile("fgpu")
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        config.pluginmanager.register(AtOnce(config))
        if which != "full" and config.getoption("numprocesses", None):
            hang.start()
        if config.getoption("renew_durations"):
            config.pluginmanager.register(Durations())
    if is_worker:
        os.setsid()  # the kernel divides the processors between sessions
    if os.environ.get(WORLDS) and (is_worker or not config.getoption("numprocesses", None)):
        world.enter(config.workerinput["workerid"] if is_worker else "alone")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let pytest-rerunfailures send without a delay: with Nagle's algorithm each test of a worker takes 40 ms more."""
    if hasattr(session.config, "workerinput"):
        session.config.failures_db.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # type: ignore[attr-defined]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Schedule:
    """Use this schedule for every value of `--dist`."""
    return Schedule(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out of a quick run, repeat tests that lost processor time, and limit the time of each test."""
    is_full = os.environ.get("FGPU_TEST_SCALE") == "full" or "FGPU_TEST_CLUSTER" in os.environ
    for item in items:
        limit = item.get_closest_marker("timeout")
        if limit and limit.args[0] > MOST_SECONDS and not is_full:
            item.add_marker(pytest.mark.timeout(MOST_SECONDS), append=False)
        if not item.get_closest_marker("flaky"):  # a test after which no further trial can pass has its own mark
            item.stash[TRIALS] = Trials(BEGAN + LAST_SECONDS)
            item.add_marker(item.stash[TRIALS].marker())
    left_out: set[pytest.Item] = set()
    if letter := config.getoption("rows"):
        named = {test for row, tests in named_of_rows().items() if row.startswith(letter) for test in tests}
        left_out |= {item for item in items if item.nodeid.partition("[")[0] not in named}
    if os.environ.get("FGPU_TEST_SCALE") == "quick":
        left_out |= {item for item in items if item.get_closest_marker("slow")}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> None:
    """Keep the settings of the timer, which each trial starts anew.

    pytest-timeout starts one timer for a test, and this timer would end with the first failed trial.
    """
    item.stash[TIMER] = settings


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin a trial: its time limit starts, and processor time that is lost after this counts for it."""
    if trials := item.stash.get(TRIALS, None):
        timer = item.stash.get(TIMER, None)
        if timer:
            item.ihook.pytest_timeout_cancel_timer(item=item)
        trials.begin()
        if timer:
            item.ihook.pytest_timeout_set_timer(item=item, settings=timer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Give a worker the processors before the other workers while its test measures time, as if it ran alone."""
    is_before = hasattr(item.config, "workerinput") and item.get_closest_marker("timed") is not None
    if is_before:
        _set_nice(TIMED_NICE)
    try:
        return (yield)
    finally:
        if is_before:
            _set_nice(0)


def _set_nice(nice: int) -> None:
    """Set the nice level of this worker's session. Some kernels have no nice levels of sessions."""
    with contextlib.suppress(OSError):
        AUTOGROUP.write_text(f"{nice}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail the first trial with `--again`."""
    yield
    trials = item.stash.get(TRIALS, None)
    if trials and trials.begun == 1 and item.config.getoption("again"):
        raise Again


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the lost processor time to the report of a failed trial. After a timeout, add the stacks of processes."""
    report = yield
    trials = item.stash.get(TRIALS, None)
    if report.failed and trials and hasattr(report.longrepr, "addsection"):
        report.longrepr.addsection("processors", trials.taken())
    if report.failed and call.excinfo and call.excinfo.errisinstance(subprocess.TimeoutExpired):
        stacks = [hang.stack(child.pid) for child in psutil.Process().children(recursive=True)[-hang.MOST :]]
        report.longrepr.addsection("processes", "\n".join([*stacks, *hang.uninterruptible()]))
    return report


class AtOnce:
    """Print each failure when it happens, so that a run that is killed at a time limit has printed its failures."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the last lines of a failure, and the time."""
        if not report.failed and report.outcome != "rerun":
            return
        last = [line for line in report.longreprtext.splitlines() if line.startswith("E ")][:6]
        head = f"{time.strftime('%H:%M:%S')} {report.outcome.upper()} {report.when} {report.nodeid}"
        terminal = self._plugins.getplugin("terminalreporter")  # created after AtOnce
        terminal.write_line("\n".join(["", head, *(line[:200] for line in last)]))


@pytest.fixture(scope="session")
def scale() -> Callable[[int, int, int], int]:
    """Return scale(quick, ci, full): the count for this run."""
    which = SCALES.index(os.environ.get("FGPU_TEST_SCALE", "ci"))

    def choose(*counts: int) -> int:
        return counts[which]

    return choose


@pytest.fixture(scope="session", autouse=True)
def _folders_open_to_all_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let all users enter the folders above the tests' folders. A test opens its own folder itself if it has to."""
    base, end = tmp_path_factory.getbasetemp(), Path(tempfile.gettempdir())
    for folder in (base, *base.parents):
        if end not in folder.parents:  # the temporary folder itself, or a folder elsewhere because of --basetemp
            break
        folder.chmod(0o755)
