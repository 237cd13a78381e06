"""Record when processes first entered and left a function of libcuda: `/usr/bin/python3 -I inside.py NAME`.

The program prints "ready". It answers every line of stdin with a line of JSON, {pid: [entered_ns, left_ns]} by
CLOCK_MONOTONIC, with all processes since the last answer. It attaches its own BPF programs to the driver's function, so
the time in other libraries that are called before, such as the shim, counts as outside.
"""

from __future__ import annotations

import _ctypes
import ctypes
import json
import os
import sys
from pathlib import Path

# Compile the programs with the stub headers of bpf/include, because the host may have no headers of its kernel.
os.environ["BCC_KERNEL_SOURCE"] = str(Path(__file__).resolve().parents[2] / "bpf")
TEXT = """
struct span { u64 entered_ns, left_ns; };
BPF_HASH(spans, u32, struct span, 65536);

int enters(void *context)
{
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    struct span span = {bpf_ktime_get_ns(), 0};
    spans.insert(&pid, &span);
    return 0;
}

int leaves(void *context)
{
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    struct span *span = spans.lookup(&pid);
    if (span && !span->left_ns) span->left_ns = bpf_ktime_get_ns();
    return 0;
}
"""


def driver() -> str:
    """Return the file that the dynamic linker finds as libcuda.so.1 in this environment. Raises OSError."""
    library = ctypes.CDLL("libcuda.so.1")
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return next(line.split(maxsplit=5)[5] for line in lines if "/libcuda.so" in line)
    finally:
        _ctypes.dlclose(library._handle)


def main() -> None:
    """Attach the programs, and answer lines until stdin ends."""
    from bcc import BPF  # type: ignore[import-untyped,unused-ignore]
    from bcc.libbcc import lib  # type: ignore[import-untyped,unused-ignore]

    programs = BPF(text=TEXT, cflags=["-Wno-everything"])
    path, offset = BPF._check_path_symbol(driver().encode(), sys.argv[1].encode(), None, -1)
    for returns, name in enumerate(("enters", "leaves")):
        program = programs.load_func(name, BPF.KPROBE).fd
        # The last argument is ref_ctr_offset. BCC's attach_uprobe() omits it, so it has a random value, and the kernel
        # refuses probes of one function with different values.
        if lib.bpf_attach_uprobe(program, returns, f"inside_{name}".encode(), path, offset, -1, 0) < 0:
            raise OSError(f"no uprobe of {sys.argv[1]} in {path!r}")
    print("ready", flush=True)
    for _ in sys.stdin:
        spans = programs["spans"]
        print(json.dumps({pid.value: [span.entered_ns, span.left_ns] for pid, span in spans.items()}), flush=True)
        spans.clear()
    os._exit(0)  # the kernel then detaches the programs; BCC's own cleanup needs tracefs


if __name__ == "__main__":
    main()
