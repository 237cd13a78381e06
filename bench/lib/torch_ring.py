"""Run all-reduces over devices 0 and 1, with a process on each device.

The program prints "ready" or "- WHY". A line `reduce SECONDS START_NS` of stdin starts all-reduces of 64 MiB at
START_NS of CLOCK_MONOTONIC, for SECONDS. The answer is {"steps": N}, the number of completed all-reduces with a
fraction. The program starts the process for device 1, which exits with it. It does not use fgpu.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

ELEMENTS = 16 << 20  # each has 4 bytes
os.environ["NCCL_NVLS_ENABLE"] = "0"  # multicast over NVLink is not available on every host with two devices
ROUND = 10  # all-reduces between two checks of the clock


def free_port() -> int:
    """Return a TCP port without a listener."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def reduce_for(torch: Any, values: Any, more: Any, end_ns: int) -> float:
    """Run rounds until the first process broadcasts the end. Return the all-reduces that were done before `end_ns`."""
    done, at_ns = 0.0, time.monotonic_ns()
    while True:
        for _ in range(ROUND):
            torch.distributed.all_reduce(values)
        more.fill_(1.0 if time.monotonic_ns() < end_ns else 0.0)
        torch.distributed.broadcast(more, 0)
        goes_on = float(more) > 0
        now_ns = time.monotonic_ns()
        done += ROUND * min(1.0, max(0.0, (end_ns - at_ns) / max(1, now_ns - at_ns)))
        at_ns = now_ns
        if not goes_on:
            return done


def serve(torch: Any, rank: int, other: subprocess.Popen[bytes] | None) -> None:
    """Serve lines until stdin ends. The first process sends its lines to the other process, too."""
    values = torch.zeros(ELEMENTS, device="cuda")
    more = torch.zeros(1, device="cuda")
    for _ in range(5):
        torch.distributed.all_reduce(values)
    torch.cuda.synchronize()
    if not rank:
        print("ready", flush=True)
    for line in sys.stdin.buffer:
        if other and other.stdin:
            other.stdin.write(line)
            other.stdin.flush()
        _, seconds, start_ns = line.split()
        time.sleep(max(0.0, (int(start_ns) - time.monotonic_ns()) / 1e9))
        done = reduce_for(torch, values, more, int(start_ns) + int(float(seconds) * 1e9))
        if not rank:
            print(json.dumps({"steps": done}), flush=True)


def main() -> int:
    """Run rank 0 and start rank 1, which is called as `torch_ring.py 1 PORT`."""
    try:
        import torch
        import torch.distributed
    except ImportError as error:
        print(f"- {error}", flush=True)
        return 0
    if torch.cuda.device_count() < 2:
        print(f"- {torch.cuda.device_count()} device", flush=True)
        return 0
    rank, port = (int(sys.argv[1]), int(sys.argv[2])) if len(sys.argv) == 3 else (0, free_port())
    other = None
    if not rank:
        other = subprocess.Popen([sys.executable, __file__, "1", str(port)], stdin=subprocess.PIPE)
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        serve(torch, rank, other)
    finally:
        if other and other.stdin:
            other.stdin.close()
            other.wait(20)
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
