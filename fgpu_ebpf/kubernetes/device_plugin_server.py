"""The gRPC server of one profile: a socket in kubelet's folder, and the answers to kubelet's calls.

This module runs in the asyncio loop of the device plugin; `device_plugin` sends requests to the agent. Requests of
kubelet are not trusted. An invalid request gets a gRPC status with the reason. A client that reads its stream slowly
delays no other stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Protocol

from fgpu_ebpf.kubernetes import kubelet_messages
from fgpu_ebpf.kubernetes.allocation import AllocationError, Given, Way
from fgpu_ebpf.kubernetes.slots import Book, Slot, SlotError

log = logging.getLogger("fgpu.kubelet")
PREFIX = "fgpu.dev"
DEAF_SECONDS = 10.0  # an endpoint without a stream of kubelet for this time is registered again
_OPTIONS = (("grpc.max_receive_message_length", 1 << 20), ("grpc.so_reuseport", 0))


class Plugin(Protocol):
    """The part of the device plugin that an endpoint uses."""

    folder: Path
    way: Way
    book: Book
    messages: dict[str, Any]

    def message(self, name: str, **fields: Any) -> bytes:
        """Return a message in kubelet's encoding."""

    async def look(self) -> None:
        """Request the present slots from the agent."""

    async def wait_for_room(self, slots: list[Slot]) -> str:
        """Wait for room for these slots. Return the reason for a lack of room, or an empty text if there is room."""

    def promise(self, slots: Iterable[Slot]) -> None:
        """Record that containers are about to start in these slots."""

    def why_unhealthy(self) -> str:
        """Return the reasons why slots are unhealthy, as the end of a log line."""


def place(folder: Path, share: str) -> Path:
    """Return the path of the profile's socket."""
    return folder / f"{PREFIX}-{share}.sock"


def stamp(path: Path) -> tuple[int, int] | None:
    """Return the inode number and the change time of a file, which identify the file, or None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def is_at(path: Path, own: tuple[int, int] | None) -> bool:
    """Return whether the path has the file with this stamp. A path without a file never has the file."""
    return own is not None and stamp(path) == own


class Endpoint:
    """The server of one profile, which may be closed and opened again."""

    def __init__(self, plugin: Plugin, share: str) -> None:
        self.share, self.resource = share, f"{PREFIX}/{share}"
        self.path = place(plugin.folder, share)
        self.registered: tuple[int, int] | None = None  # the stamp of the kubelet.sock of the registration
        self._streams = 0
        self._silent_since = 0.0  # since when no stream is open
        self._plugin = plugin
        self._server: Any = None
        self._stamp: tuple[int, int] | None = None
        self._changed = asyncio.Event()
        self._said: list[tuple[str, bool, int | None]] = []

    @property
    def is_open(self) -> bool:
        """True if the socket exists and belongs to this server. kubelet empties the folder when kubelet starts."""
        return self._server is not None and is_at(self.path, self._stamp)

    def registered_with(self, kubelet: tuple[int, int]) -> None:
        """Record that kubelet has accepted the registration. kubelet should then open a stream within DEAF_SECONDS."""
        self.registered = kubelet
        self._silent_since = asyncio.get_running_loop().time()

    @property
    def is_deaf(self) -> bool:
        """True if there has been no stream of kubelet for DEAF_SECONDS."""
        return not self._streams and asyncio.get_running_loop().time() - self._silent_since > DEAF_SECONDS

    async def open(self) -> None:
        """Close the server, and listen at a new socket. Raise OSError or RuntimeError on failure."""
        import grpc.aio

        await self.close()
        self.path.unlink(missing_ok=True)
        self._server = grpc.aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()
        self._stamp = stamp(self.path)

    async def close(self) -> None:
        """End every call, and remove the socket unless another server owns the socket."""
        self.registered = None
        if self._server is None:
            return
        server, self._server = self._server, None
        is_ours = is_at(self.path, self._stamp)
        await server.stop(0)
        if is_ours:
            self.path.unlink(missing_ok=True)

    def _handlers(self) -> Any:
        import grpc

        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {  # bytes in, bytes out, so that invalid messages are answered here
            "GetDevicePluginOptions": unary(self._options),
            "ListAndWatch": stream(self._list_and_watch),
            "GetPreferredAllocation": unary(self._prefer),
            "Allocate": unary(self._allocate),
            "PreStartContainer": unary(self._pre_start),
        }
        return grpc.method_handlers_generic_handler(f"{kubelet_messages.PACKAGE}.DevicePlugin", methods)

    # -- calls of kubelet

    async def _options(self, _: bytes, __: Any) -> bytes:
        return self._plugin.message("DevicePluginOptions", get_preferred_allocation_available=True)

    async def _pre_start(self, _: bytes, __: Any) -> bytes:
        return self._plugin.message("PreStartContainerResponse")

    async def _list_and_watch(self, _: bytes, context: Any) -> AsyncIterator[bytes]:
        """Yield the list of slots at once and after each change. A slow reader gets only the latest list."""
        self._streams += 1
        try:
            while True:
                changed = self._changed
                yield self._list()
                await changed.wait()
        finally:
            self._streams -= 1
            self._silent_since = asyncio.get_running_loop().time()

    def _list(self) -> bytes:
        made = [
            self._plugin.messages["Device"](
                ID=id_,
                health=kubelet_messages.HEALTHY if is_healthy else kubelet_messages.UNHEALTHY,
                topology=None if numa is None else {"nodes": [{"ID": numa}]},
            )
            for id_, is_healthy, numa in self._said
        ]
        return self._plugin.message("ListAndWatchResponse", devices=made)

    def notify(self) -> None:
        """Send a changed list on all streams."""
        book = self._plugin.book
        healthy = book.healthy(self.share)
        numa = {uuid: device.numa for uuid, device in book.host.devices.items()}
        said = [(slot.id, slot in healthy, numa[slot.uuid]) for slot in book.host.slots(self.share)]
        if said == self._said:
            return
        self._said = said
        many = (self.resource, sum(entry[1] for entry in said), len(said), self._plugin.why_unhealthy())
        log.info("%s: %d of %d slots are healthy%s", *many, extra={"what": self.resource})
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _prefer(self, request: bytes, context: Any) -> bytes:
        asked = await self._read("PreferredAllocationRequest", request, context)
        made = []
        for container in asked.container_requests:
            ids = container.available_deviceIDs, container.must_include_deviceIDs, container.allocation_size
            try:
                chosen = self._plugin.book.prefer(self.share, *ids)
            except SlotError as error:
                await self._refuse(context, "INVALID_ARGUMENT", str(error))
            made.append(self._plugin.messages["ContainerPreferredAllocationResponse"](deviceIDs=chosen))
        return self._plugin.message("PreferredAllocationResponse", container_responses=made)

    async def _allocate(self, request: bytes, context: Any) -> bytes:
        asked = await self._read("AllocateRequest", request, context)
        await self._plugin.look()
        try:
            of_each = [self._plugin.book.read(self.share, each.devices_ids) for each in asked.container_requests]
        except SlotError as error:
            await self._refuse(context, "INVALID_ARGUMENT", str(error))
        shortage = await self._plugin.wait_for_room([slot for slots in of_each for slot in slots])
        if shortage:
            await self._refuse(context, "FAILED_PRECONDITION", shortage)
        try:
            given = [self._plugin.way.give(self._plugin.book.host, slots) for slots in of_each if slots]
        except AllocationError as error:
            await self._refuse(context, "FAILED_PRECONDITION", str(error))
        self._plugin.promise(slot for slots in of_each for slot in slots)
        given_ids = " ".join(slot.id for slots in of_each for slot in slots)
        log.info("%s: allocated %s", self.resource, given_ids, extra={"what": self.resource})
        return self._plugin.message("AllocateResponse", container_responses=[self._response(each) for each in given])

    def _response(self, given: Given) -> Any:
        return self._plugin.messages["ContainerAllocateResponse"](
            envs=given.envs,
            annotations=given.annotations,
            mounts=[{"host_path": h, "container_path": c, "read_only": True} for h, c in given.mounts],
            cdi_devices=[{"name": name} for name in given.cdi],
        )

    async def _read(self, name: str, request: bytes, context: Any) -> Any:
        try:
            return self._plugin.messages[name].FromString(request)
        except Exception:  # protobuf's DecodeError is in a different module in every version
            await self._refuse(context, "INVALID_ARGUMENT", f"not a valid {name}")

    async def _refuse(self, context: Any, code: str, text: str) -> None:
        import grpc

        log.warning("%s: request of kubelet refused: %s", self.resource, text)
        await context.abort(getattr(grpc.StatusCode, code), text)  # raises
