"""The device plugin: tells kubelet of this host's slots, and what a container is given with one.

Owns: a socket for each profile in kubelet's folder, and their registration. Never: reads a file of the host's settings,
or limits anything itself: the agent says what there is, and limits the container when it starts. On failure: without
an agent every slot is unhealthy, without kubelet it waits for one; SIGTERM leaves no socket behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgpu_ebpf import control, kubeletmessages
from fgpu_ebpf.allocation import Way
from fgpu_ebpf.checks import Check
from fgpu_ebpf.endpoint import PREFIX, Endpoint, place, stamp
from fgpu_ebpf.folderbell import FolderBell
from fgpu_ebpf.kubeletmessages import PACKAGE
from fgpu_ebpf.slots import MOST_SLOTS, Book, Host, Slot, host_of

log = logging.getLogger("fgpu.kubelet")
FOLDER = Path("/var/lib/kubelet/device-plugins")
KUBELET = "kubelet.sock"
LOOK_SECONDS = 2.0
AGENT_SECONDS = 2.0  # for one answer
SILENT_SECONDS = 5.0  # so long may an agent be away: an upgrade takes one
PATIENCE_SECONDS = 2.0  # for room: the agent sees the end of a container a little after kubelet
REGISTER_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 5.0  # after a registration that failed
_CHANNEL_OPTIONS = (
    ("grpc.default_authority", "localhost"),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or a new connection would wait out the failures of the last
)


class PluginError(Exception):
    """Why there is nothing to serve, and what mends it."""


@dataclass(frozen=True, slots=True)
class Options:
    """Where things are, and how containers get what they are given."""

    run_dir: Path = Path("/run/fgpu")
    folder: Path = FOLDER
    way: Way = field(default_factory=Way)


def serve(options: Options) -> None:
    """Serves until SIGTERM or SIGINT. PluginError: there is nothing to serve."""
    try:
        import grpc.aio  # noqa: F401

        messages = kubeletmessages.classes()
    except ImportError as error:
        raise PluginError(f"{error.name} is not installed: python3-grpcio, python3-protobuf") from error
    os.umask(0o077)  # kubelet is root
    asyncio.run(_Plugin(options, messages).run())


def check(run_dir: Path, folder: Path = FOLDER) -> Check | None:
    """kubelet is offered what agent.yaml lists; None: nothing is listed, or there is no kubelet."""
    try:
        host = host_of(control.call(run_dir, {"verb": "offers"}))
    except (ConnectionError, control.RequestError, KeyError, TypeError):
        return None
    if not (folder / KUBELET).exists() or not (host.shares or host.fault):
        return None
    if host.fault:
        return Check("device plugin", False, host.fault, "agent.yaml has the profiles; then start the agent anew")
    silent = [share for share in host.shares if not _is_heard(place(folder, share))]
    if silent:
        mend = "fgpu device-plugin runs beside every kubelet: its log says why it does not"
        return Check("device plugin", False, f"nobody offers {', '.join(silent)}", mend)
    return Check(
        "device plugin", True, ", ".join(f"{PREFIX}/{share}: {len(host.slots(share))}" for share in host.shares)
    )


def _is_heard(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True


class _Plugin:
    """Every endpoint, and what the agent says."""

    def __init__(self, options: Options, messages: dict[str, Any]) -> None:
        self.options, self.messages, self.book = options, messages, Book()
        self.folder, self.way = options.folder, options.way
        self._endpoints: dict[str, Endpoint] = {}
        self._heard = -SILENT_SECONDS  # when the agent last answered
        self._said: str | None = None  # the fault, or what is offered

    def message(self, name: str, **fields: Any) -> bytes:
        """As kubelet reads it."""
        return bytes(self.messages[name](**fields).SerializeToString())

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.set)
        log.info("for kubelet at %s, by %s", self.folder, self.way.strategy)
        tasks = [asyncio.ensure_future(each) for each in (end.wait(), self._look_often(), self._stay_registered())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what ended it
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints.values()))
            log.info("ended")

    # -- the agent

    async def _look_often(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Asks the agent, and tells kubelet what has changed. PluginError: more slots than kubelet may be told of."""
        now = asyncio.get_running_loop().time()
        try:
            host = host_of(await control.ask(self.options.run_dir, {"verb": "offers"}, AGENT_SECONDS))
            self._heard = now
        except (ConnectionError, control.RequestError) as error:
            self._without_agent(str(error), now)
            return
        except (KeyError, TypeError, ValueError):
            self._without_agent("the agent is of a version that offers nothing", now)
            return
        if host.count() >= MOST_SLOTS:
            raise PluginError(f"{host.count()} slots are too many for kubelet ({MOST_SLOTS}): lower counts of profiles")
        self._take(host)

    def _without_agent(self, text: str, now: float) -> None:
        if now - self._heard >= SILENT_SECONDS:
            self._take(Host(text, self.book.host.devices, self.book.host.mounts))

    def _take(self, host: Host) -> None:
        self.book.look(host)
        offered = ", ".join(host.shares) or "nothing: list profiles in agent.yaml, and start it anew"
        said = host.fault or f"the agent offers {offered}"
        if said != self._said:
            self._said = said
            log.warning("%s", said) if host.fault or not host.shares else log.info("%s", said)
        self.tell()

    def fault(self) -> str:
        """Why slots are unhealthy, for a log line."""
        faults = {device.fault for device in self.book.host.devices.values() if device.fault}
        return "".join(f", {text}" for text in ([self.book.host.fault] if self.book.host.fault else sorted(faults)))

    def tell(self) -> None:
        """Everybody who listens hears what has changed."""
        for endpoint in self._endpoints.values():
            endpoint.tell()

    def promise(self, slots: Iterable[Slot]) -> None:
        """Containers are about to start there; other profiles may have less room now."""
        self.book.promise(slots)
        self.tell()

    async def wait_for_room(self, slots: list[Slot]) -> str:
        """Why they cannot be given even after a moment; empty: they can."""
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE_SECONDS
        while (lack := self.book.lack(slots)) and loop.time() < until:
            await asyncio.sleep(0.1)
            await self.look()
        return lack

    # -- kubelet

    async def _stay_registered(self) -> None:
        """Whenever kubelet is another one, whatever it has taken away is put there again."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            with contextlib.ExitStack() as stack:
                rung = self._hang_bell(stack)
                is_good = await self._register_all()
                pause = FIRST_PAUSE_SECONDS if is_good else min(pause * 2, LONGEST_PAUSE_SECONDS)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), LOOK_SECONDS if is_good else pause)

    def _hang_bell(self, stack: contextlib.ExitStack) -> asyncio.Event:
        """Set when something happens in kubelet's folder; where that is not to be had, it is looked at all the same."""
        rung, loop = asyncio.Event(), asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            bell = stack.enter_context(FolderBell([self.folder]))
            loop.add_reader(bell.fileno(), rung.set)
            stack.callback(loop.remove_reader, bell.fileno())
        return rung

    async def _register_all(self) -> bool:
        """Opens, registers and closes what has to be; False: try again soon."""
        wanted = self.book.host.shares
        for share in [share for share in self._endpoints if share not in wanted]:
            await self._endpoints.pop(share).close()
            log.info("%s/%s: offered no longer", PREFIX, share)
        for share in wanted:
            self._endpoints.setdefault(share, Endpoint(self, share)).tell()
        results = await asyncio.gather(*(self._register(endpoint) for endpoint in self._endpoints.values()))
        return all(results)

    async def _register(self, endpoint: Endpoint) -> bool:
        import grpc

        kubelet = self.folder / KUBELET
        now = stamp(kubelet)
        if endpoint.is_open and endpoint.registered == now and not endpoint.is_deaf:
            return True
        if now is None:
            return False
        try:
            if not endpoint.is_open:
                await endpoint.open()
            await self._call(kubelet, endpoint)
        except grpc.RpcError as error:
            log.warning("%s: kubelet refuses: %s: %s", endpoint.resource, error.code().name.lower(), error.details())
            return False
        except (OSError, RuntimeError) as error:
            log.warning("%s: %s: %s", endpoint.resource, endpoint.path, error)
            return False
        endpoint.registered_with(now)
        log.info("%s: registered with kubelet", endpoint.resource)
        return True

    async def _call(self, kubelet: Path, endpoint: Endpoint) -> None:
        import grpc.aio

        options = self.messages["DevicePluginOptions"](get_preferred_allocation_available=True)
        about = {"version": PACKAGE, "endpoint": endpoint.path.name, "resource_name": endpoint.resource}
        async with grpc.aio.insecure_channel(f"unix:{kubelet}", options=_CHANNEL_OPTIONS) as channel:
            call = channel.unary_unary(f"/{PACKAGE}.Registration/Register")  # bytes in, bytes out
            await call(self.message("RegisterRequest", options=options, **about), timeout=REGISTER_SECONDS)
