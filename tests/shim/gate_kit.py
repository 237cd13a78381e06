"""Programs that launch on the simulated driver, and their exchange with the fake gatekeeper."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.shim.shim_kit import ROOT, Agent, Simulator
from tests.support.wait import Deadline

SHUT, OPEN = 2, 3  # both GATED

KIT = """
def need(name, *args):
    r = getattr(L, name)(*args)
    if r: out("failed", name, r); os._exit(1)
def context(device=0):
    c = C.c_void_p(); need("cuDevicePrimaryCtxRetain", C.byref(c), device); need("cuCtxSetCurrent", c); return c
def stream(flags=1):
    s = C.c_void_p(); need("cuStreamCreate", C.byref(s), flags); return s
def kernel(us):
    m, f = C.c_void_p(), C.c_void_p(); need("cuModuleLoadData", C.byref(m), b"any")
    need("cuModuleGetFunction", C.byref(f), m, b"spin_%dus" % us); return f
def launch(f, s=None): return L.cuLaunchKernel(f, 1, 1, 1, 1, 1, 1, 0, s, None, None)
class Config(C.Structure):
    _fields_ = [("n", C.c_uint * 7), ("s", C.c_void_p), ("a", C.c_void_p), ("c", C.c_uint)]
def exec_of(f, n, s):
    g, e = C.c_void_p(), C.c_void_p(); need("cuStreamBeginCapture_v2", s, 0)
    for _ in range(n): need("cuLaunchKernel", f, 1, 1, 1, 1, 1, 1, 0, s, None, None)
    need("cuStreamEndCapture", s, C.byref(g))
    need("cuGraphInstantiateWithFlags", C.byref(e), g, C.c_ulonglong(0)); return e
def line(): return sys.stdin.readline()
need("cuInit", 0); c = context()
"""


def page(agent: Agent, device: int = 3) -> dict[str, int]:
    return dict(agent.do("status", device=device)["pages"][-1])


def until(agent: Agent, seconds: float = 10, **facts: int) -> dict[str, int]:
    """Return the page as soon as it has these values."""
    deadline = Deadline(seconds)
    while any((now := page(agent))[name] != value for name, value in facts.items()):
        assert not deadline.is_over(), (facts, now)
        time.sleep(0.002)
    return now


def shut(agent: Agent, turn: int, **more: int) -> None:
    agent.do("gate", word=turn << 2 | SHUT, **more)


def unlock(agent: Agent, turn: int, **more: int) -> None:
    agent.do("gate", word=turn << 2 | OPEN, **more)


def said(process: Any) -> list[Any]:
    return list(json.loads(process.stdout.readline() or "[]"))


def tell(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: Any) -> None:
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors


def driver_behind(simulator: Simulator, program: str) -> Path:
    """Return a folder with the simulated driver behind a library that answers some calls itself."""
    folder, agent = simulator.folder / program, simulator.agent
    if not folder.exists():
        folder.mkdir()
        behind = (simulator.folder / "lib/libcuda.so.1").read_bytes().replace(b"libcuda.so.1\0", b"libcudX.so.1\0")
        (folder / "libcudX.so.1").write_bytes(behind)
        flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1,--no-as-needed", folder / "libcudX.so.1", "-ldl"]
        agent.build.compile(program, str(folder / "libcuda.so.1"), f"-I{ROOT / 'shim'}", f"-I{ROOT / 'bpf'}", *flags)
    return folder
