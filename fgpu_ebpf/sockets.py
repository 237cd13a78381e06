"""Places where sockets, files and links of ours are to be.

Owns: nothing. Used by agent and gatekeeper when they make one. On failure: OSError.
"""

from __future__ import annotations

import contextlib
import os
import time


def make_way(path: str) -> None:
    """Take a folder away from where a socket, file or link is to be; move it aside if something is in it.

    Docker makes one for a bind mount with a source that is not there yet: of a container that starts before the agent.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.rmdir(path)
    except OSError:
        os.rename(path, f"{path}.moved-{time.monotonic_ns()}")
