"""Where shims find the gatekeeper: the socket in its folder.

Owns: `<run>/shim/shim.sock`. Never: reads what comes in, follows a link, takes a folder of another user. When
it fails: OSError; folder and socket file stay behind, so that shims that get no answer refuse.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from fgpu_ebpf.sockets import make_way

BACKLOG = 512  # a storm's worth; each is taken in, or turned away, in some 20 us, so a flood of them is 10 ms


class Door:
    """`<run>/shim/shim.sock`: bound aside in a folder held open, then renamed, so that there is always a listener."""

    def __init__(self, run: Path) -> None:
        self._shim = run / "shim"
        self._seen: tuple[int, ...] = ()
        self._folder = -1
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def open(self) -> None:
        """Make folder and socket, or make them again. Raises OSError."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._shim, 0o755)
        folder = os.open(self._shim, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            if os.fstat(folder).st_uid != os.geteuid():
                raise PermissionError(f"{self._shim} belongs to another user")
            os.fchmod(folder, 0o755)
            self._bind(listener, folder)
        except OSError:
            listener.close()
            os.close(folder)
            raise
        self.close()
        self._folder, self.listener = folder, listener
        self._seen = self._look()

    def _bind(self, listener: socket.socket, folder: int) -> None:
        aside = f"/proc/self/fd/{folder}/.shim.sock"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        listener.bind(aside)
        os.chmod(aside, 0o666)  # everybody may ask; who asks is what the kernel says
        listener.listen(BACKLOG)
        make_way(f"/proc/self/fd/{folder}/shim.sock")
        os.rename(".shim.sock", "shim.sock", src_dir_fd=folder, dst_dir_fd=folder)

    def _look(self) -> tuple[int, ...]:
        try:
            shim, sock = os.lstat(self._shim), os.stat("shim.sock", dir_fd=self._folder, follow_symlinks=False)
        except OSError:
            return ()
        return shim.st_dev, shim.st_ino, sock.st_dev, sock.st_ino

    def intact(self) -> bool:
        """Are folder and socket those we made?"""
        return bool(self._seen) and self._look() == self._seen

    def close(self) -> None:
        """Stop listening; folder and socket file stay."""
        self.listener.close()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1
