"""Programs with kernels that use local memory on the simulated driver, and the requests of the shim for this memory."""

from __future__ import annotations

import json
from typing import Any

from tests.shim.gate_kit import KIT
from tests.shim.shim_kit import Agent, Simulator

MIB = 1 << 20
POOL, GIVEN_BACK = 1, 101
THREADS = 40 * 1024  # of the simulated device

FUNCTIONS = r"""
HEAD = ".version 7.0\n.target sm_70\n.address_size 64\n"
def local(size, name="lmem"):
    return HEAD + ".visible .entry %s(.param .u64 p)\n{\n .local .align 16 .b8 buf[%d];\n ret;\n}\n" % (name, size)
def data(size, name="glob"):
    return HEAD + ".visible .global .align 16 .b8 big[%d];\n.visible .entry %s()\n{\n ret;\n}\n" % (size, name)
def load(code):
    m = C.c_void_p(); need("cuModuleLoadData", C.byref(m), code.encode()); return m
def function(module, name="lmem"):
    f = C.c_void_p(); need("cuModuleGetFunction", C.byref(f), module, name.encode()); return f
def library(code):
    l = C.c_void_p(); need("cuLibraryLoadData", C.byref(l), code.encode(), None, None, 0, None, None, 0); return l
def entry(library, name="lmem"):
    k = C.c_void_p(); need("cuLibraryGetKernel", C.byref(k), library, name.encode()); return k
def of(size): return function(load(local(size)))
def stack(size): return L.cuCtxSetLimit(0, C.c_size_t(size))
def another(device=0):
    c = C.c_void_p(); need("cuCtxCreate_v2", C.byref(c), 0, device); return c
"""
CODE = KIT + FUNCTIONS


def area(bytes_per_thread: int) -> int:
    """Return by how many bytes the area of local memory exceeds the area of a new context."""

    def whole(size: int) -> int:
        return round(size * THREADS / (2 * MIB)) * 2 * MIB

    return max(0, whole((bytes_per_thread + 15) // 16 * 16) - whole(1024))


def said(simulator: Simulator, script: str) -> list[Any]:
    return [json.loads(line) for line in simulator.python(CODE + script).splitlines()]


def asked(agent: Agent) -> list[int]:
    """Return the requested bytes in order, with released bytes as negative numbers."""
    calls = [call for call in agent.calls() if call["kind"] in (POOL, GIVEN_BACK)]
    return [call["bytes"] if call["kind"] == POOL else -call["bytes"] for call in calls]
