"""The device plugin: reports this host's slots to kubelet, and answers kubelet's requests to allocate slots.

The plugin runs in a process of its own (`fgpu device-plugin`), in one asyncio loop. The plugin has a socket for each
profile in kubelet's folder, and registers the profile with kubelet. The agent reports the slots to the plugin, and
limits a container when the container starts. Without an agent every slot is unhealthy. Without kubelet the plugin waits
for kubelet. At SIGTERM the plugin removes its sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fgpu_ebpf import control_client, protobuf
from fgpu_ebpf.check import Check
from fgpu_ebpf.kubernetes import kubelet_messages
from fgpu_ebpf.kubernetes.allocation import Strategy, Way
from fgpu_ebpf.kubernetes.device_plugin_server import PREFIX, Endpoint, place, stamp
from fgpu_ebpf.kubernetes.kubelet_messages import PACKAGE
from fgpu_ebpf.kubernetes.slots import MOST_SLOTS, Book, Host, Slot, host_of
from fgpu_ebpf.kubernetes.until_signal import run_until_signal
from fgpu_ebpf.linux.inotify import FolderWatch

log = logging.getLogger("fgpu.kubelet")
FOLDER = Path("/var/lib/kubelet/device-plugins")
KUBELET = "kubelet.sock"
LOOK_SECONDS = 2.0
AGENT_SECONDS = 2.0  # timeout of a request to the agent
SILENT_SECONDS = 5.0  # after this time without an answer of the agent, slots are unhealthy. Upgrades take less time.
PATIENCE_SECONDS = 2.0  # how long to wait for room; the agent detects the exit of a container a little after kubelet
REGISTER_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 5.0  # after a registration that failed
_CHANNEL_OPTIONS = (
    ("grpc.default_authority", "localhost"),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # without it, a failed connection's backoff delays a new connection
)


class PluginError(Exception):
    """The plugin cannot serve. The text has the reason and the fix."""


@dataclass(frozen=True, slots=True)
class Options:
    """The run folder of the agent, kubelet's folder, and the way in which containers get shares and devices."""

    run_dir: Path = Path("/run/fgpu")
    folder: Path = FOLDER
    way: Way = field(default_factory=Way)


def serve(options: Options) -> None:
    """Serve until SIGTERM or SIGINT. Raise PluginError if a package is missing, or for too many slots."""
    try:
        import grpc.aio  # noqa: F401

        messages = kubelet_messages.classes()
    except ImportError as error:
        raise PluginError(protobuf.lacks(error)) from error
    os.umask(0o077)  # only kubelet, which runs as root, connects to the sockets
    asyncio.run(_Plugin(options, messages).run())


def check(run_dir: Path, folder: Path = FOLDER) -> Check | None:
    """Check that a device plugin offers kubelet the profiles of agent.yaml.

    Return None if there are no profiles, no kubelet, or no agent that answers.
    """
    try:
        host = host_of(control_client.call(run_dir, {"verb": "offers"}))
    except (ConnectionError, control_client.RequestError, KeyError, TypeError):
        return None
    if not (folder / KUBELET).exists() or not (host.shares or host.fault):
        return None
    if host.fault:
        return Check("device plugin", False, host.fault, "edit `profiles:` in agent.yaml, then restart the agent")
    silent = [share for share in host.shares if not _accepts(place(folder, share))]
    if silent:
        fix = "start fgpu device-plugin next to every kubelet; if the plugin does not start, see its log"
        return Check("device plugin", False, f"no device plugin offers {', '.join(silent)}", fix)
    return Check(
        "device plugin", True, ", ".join(f"{PREFIX}/{share}: {len(host.slots(share))}" for share in host.shares)
    )


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True


class _Plugin:
    """The endpoints of all profiles, and the last answer of the agent."""

    def __init__(self, options: Options, messages: dict[str, Any]) -> None:
        self.options, self.messages = options, messages
        self.book = Book(is_counted=options.way.strategy is not Strategy.MOUNTS)
        self.folder, self.way = options.folder, options.way
        self._endpoints: dict[str, Endpoint] = {}
        self._answered_at = -SILENT_SECONDS  # when the agent last answered
        self._said: str | None = None  # the last logged error or offer

    def message(self, name: str, **fields: Any) -> bytes:
        """Return a message in kubelet's encoding."""
        return bytes(self.messages[name](**fields).SerializeToString())

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT."""
        log.info("serving kubelet at %s, device list strategy %s", self.folder, self.way.strategy)
        try:
            await run_until_signal(self._look_often(), self._stay_registered())
        finally:
            await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints.values()))
            log.info("the device plugin has ended")

    # -- the agent

    async def _look_often(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Request the slots from the agent, and notify kubelet of changes. Raise PluginError for too many slots."""
        now = asyncio.get_running_loop().time()
        try:
            host = host_of(await control_client.ask(self.options.run_dir, {"verb": "offers"}, AGENT_SECONDS))
            self._answered_at = now
        except (ConnectionError, control_client.RequestError) as error:
            self._without_agent(str(error), now)
            return
        except (KeyError, TypeError, ValueError):
            self._without_agent("this version of the agent offers no shares", now)
            return
        if host.count() >= MOST_SLOTS:
            text = f"{host.count()} slots are too many for kubelet (fewer than {MOST_SLOTS} are allowed)"
            raise PluginError(f"{text}: reduce the counts of profiles in agent.yaml")
        self._take(host)

    def _without_agent(self, text: str, now: float) -> None:
        if now - self._answered_at >= SILENT_SECONDS:
            self._take(replace(self.book.host, fault=text))

    def _take(self, host: Host) -> None:
        self.book.look(host)
        offered = ", ".join(host.shares) or "nothing: list profiles in agent.yaml, and restart the agent"
        said = host.fault or f"the agent offers {offered}"
        if said != self._said:
            self._said = said
            log.warning("%s", said) if host.fault or not host.shares else log.info("%s", said)
        self.notify()

    def why_unhealthy(self) -> str:
        """Return the reasons why slots are unhealthy, as the end of a log line."""
        reasons = {device.fault for device in self.book.host.devices.values() if device.fault}
        if self.book.host.fault:
            return f"; {self.book.host.fault}"
        return "".join(f"; {text}" for text in sorted(reasons))

    def notify(self) -> None:
        """Send changes to kubelet, on every endpoint."""
        for endpoint in self._endpoints.values():
            endpoint.notify()

    def promise(self, slots: Iterable[Slot]) -> None:
        """Record that containers are about to start in these slots, and notify kubelet that fewer slots may be free."""
        self.book.promise(slots)
        self.notify()

    async def wait_for_room(self, slots: list[Slot]) -> str:
        """Wait for room for these slots, up to PATIENCE_SECONDS. Return why no room exists, or an empty text."""
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE_SECONDS
        while (shortage := self.book.shortage(slots)) and loop.time() < until:
            await asyncio.sleep(0.1)
            await self.look()
        return shortage

    # -- kubelet

    async def _stay_registered(self) -> None:
        """Register again whenever kubelet has restarted, and restore sockets that kubelet has removed."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            with contextlib.ExitStack() as stack:
                changed = self._watch_folder(stack)
                is_good = await self._register_all()
                pause = FIRST_PAUSE_SECONDS if is_good else min(pause * 2, LONGEST_PAUSE_SECONDS)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), LOOK_SECONDS if is_good else pause)

    def _watch_folder(self, stack: contextlib.ExitStack) -> asyncio.Event:
        """Return an event that is set by changes of kubelet's folder. Without inotify the folder is only polled."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            watch = stack.enter_context(FolderWatch([self.folder]))
            loop.add_reader(watch.fileno(), changed.set)
            stack.callback(loop.remove_reader, watch.fileno())
        return changed

    async def _register_all(self) -> bool:
        """Open, register and close endpoints as needed. Return False if a registration has to be tried again soon."""
        wanted = self.book.host.shares
        for share in [share for share in self._endpoints if share not in wanted]:
            await self._endpoints.pop(share).close()
            log.info("%s/%s: no longer offered", PREFIX, share)
        for share in wanted:
            self._endpoints.setdefault(share, Endpoint(self, share)).notify()
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
            why = error.code().name.lower(), error.details()
            log.warning("%s: registration with kubelet failed: %s: %s", endpoint.resource, *why)
            return False
        except (OSError, RuntimeError) as error:
            log.warning("%s: cannot serve %s: %s", endpoint.resource, endpoint.path, error)
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
