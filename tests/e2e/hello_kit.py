"""The gatekeeper's socket and a valid hello."""

from __future__ import annotations

import struct

SOCKET = "/run/fgpu/shim/shim.sock"
MAGIC, SIZE = 0x75706766, 64
LAYOUT = 3
GOOD = struct.pack("<IHH", MAGIC, LAYOUT, SIZE).ljust(SIZE, b"\0")
