"""The socket on which the gatekeeper listens for shims: `<run>/shim/shim.sock`.

This module runs in the gatekeeper's main thread. The module follows no symbolic link, and uses no folder that another
user owns. After an OSError the folder and the socket file stay: shims without an answer refuse memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from fgpu_ebpf.linux.clear_path import make_way

BACKLOG = 512  # enough for many simultaneous starts; accepting or refusing 512 connections takes about 10 ms


class Listener:
    """The gatekeeper's socket, to which shims connect.

    open() binds the socket under another name and renames the file when the socket listens. Therefore the path is never
    missing while an earlier socket is replaced.
    """

    def __init__(self, run: Path) -> None:
        self._shim = run / "shim"
        self._seen: tuple[int, ...] = ()
        self._folder = -1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def open(self) -> None:
        """Create the folder and the socket, even if both exist already. Raise OSError on failure."""
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
        self._folder, self.socket = folder, listener
        self._seen = self._look()

    def _bind(self, listener: socket.socket, folder: int) -> None:
        aside = f"/proc/self/fd/{folder}/.shim.sock"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        listener.bind(aside)
        os.chmod(aside, 0o666)  # every process may connect; the kernel identifies the process
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
        """Return True if the folder and the socket file that the last open() created still exist."""
        return bool(self._seen) and self._look() == self._seen

    def close(self) -> None:
        """Stop listening. The folder and the socket file stay."""
        self.socket.close()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1
