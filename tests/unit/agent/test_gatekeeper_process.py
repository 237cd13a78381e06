"""Tests of the start of a missing gatekeeper: a service first gets time to restart its own gatekeeper."""

import fcntl
import socket
from types import SimpleNamespace

import pytest

from fgpu_ebpf.agent import gatekeeper_process


@pytest.fixture
def world(monkeypatch, tmp_path):
    class World:
        now, is_locked, started = 100.0, True, 0

        def after(self, seconds):
            self.now += seconds
            self.keeper.keep()
            return self.started

    it = World()
    it.keeper = gatekeeper_process.GatekeeperProcess(tmp_path, tmp_path)

    def start(*_, **__):
        it.started += 1
        return SimpleNamespace(poll=lambda: 0)  # it exits at once

    monkeypatch.setattr(gatekeeper_process.file_locks, "is_locked", lambda _: it.is_locked)
    monkeypatch.setattr(gatekeeper_process.time, "monotonic", lambda: it.now)
    monkeypatch.setattr(gatekeeper_process.subprocess, "Popen", start)
    it.keeper.start()
    return it


def test_a_service_s_time_limit_begins_when_its_gatekeeper_is_first_missed(world):
    """A limit that begins at the previous check would let agent and service start gatekeepers at the same time."""
    assert [world.after(1.0) for _ in range(3)] == [0, 0, 0]
    world.is_locked = False
    assert [world.after(1.0), world.after(0.1), world.after(0.5)] == [0, 0, 0]
    world.is_locked = True
    assert world.after(0.1) == 0
    world.is_locked = False
    assert [world.after(1.0), world.after(0.9), world.after(0.2)] == [0, 0, 1]


def test_a_gatekeeper_that_exits_during_the_agent_s_start_is_replaced(world, monkeypatch):
    monkeypatch.setattr(gatekeeper_process.time, "sleep", lambda seconds: setattr(world, "now", world.now + seconds))
    monkeypatch.setattr(world.keeper, "answers", lambda: world.started > 0)
    world.is_locked = False
    assert world.keeper.wait()
    assert world.started == 1
    assert world.now == pytest.approx(100.0 + gatekeeper_process.OTHERS_SECONDS, abs=0.02)
    monkeypatch.setattr(world.keeper, "answers", lambda: False)
    assert not world.keeper.wait(), "wait() succeeded without a gatekeeper"


def test_an_own_gatekeeper_that_has_no_lock_yet_is_not_started_again(world, monkeypatch):
    world.is_locked, runs = False, SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(gatekeeper_process.subprocess, "Popen", lambda *_, **__: runs)
    world.keeper.start()
    monkeypatch.setattr(gatekeeper_process.subprocess, "Popen", lambda *_, **__: pytest.fail("a second gatekeeper"))
    world.keeper.start()


def test_a_gatekeeper_is_up_if_its_lock_is_held_and_its_socket_exists(tmp_path):
    socket = tmp_path / "shim/shim.sock"
    socket.parent.mkdir()
    with open(tmp_path / "gatekeeper.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not gatekeeper_process.is_up(tmp_path)
        socket.touch()
        assert gatekeeper_process.is_up(tmp_path)
    assert not gatekeeper_process.is_up(tmp_path)


def test_a_gatekeeper_answers_once_it_listens(tmp_path):
    """A folder in place of the socket, or the socket of a killed gatekeeper, is not a running gatekeeper."""
    place = tmp_path / "shim/shim.sock"
    place.mkdir(parents=True)
    it = gatekeeper_process.GatekeeperProcess(tmp_path, tmp_path)
    with open(tmp_path / "gatekeeper.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not it.answers()
        place.rmdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(place))
            assert not it.answers()
            listener.listen(1)
            assert it.answers()
        assert place.exists()
        assert not it.answers()
