"""A program with torch that runs commands. It prints "ready" or "- WHY", then answers each line of stdin with JSON.

A line is `WHAT SECONDS START_NS`: the work begins at START_NS of CLOCK_MONOTONIC and lasts SECONDS. `train` is a
training, `unfilled` is a smaller training that does not fill the device, and `small` is inference of a model that takes
0.1 ms. Their answers are {"steps", "p50_us"}. `capture` captures 1,000 CUDA graphs in the default mode while another
thread launches. Its answer is {"captures", "failed", "why"}, or {"error"} if the graphs computed a wrong sum. A line
during a training stops the training; the line `stop` has no other effect. The program does not use fgpu.
"""

from __future__ import annotations

import contextlib
import gc
import json
import select
import statistics
import sys
import threading
import time
from typing import Any

CAPTURES = 1000
IN_FLIGHT = 3  # a training launches up to this many steps before the device has done them


def training(torch: Any, width: int, layers: int, batch: int) -> Any:
    """Return a function that does one step of a training."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)]).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    inputs = torch.randn(batch, width, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step


def inference(torch: Any) -> Any:
    """Return a function that does one inference and waits for it."""
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256), torch.nn.ReLU()] * 3).cuda().eval()
    inputs = torch.randn(16, 256, device="cuda")

    def step() -> None:
        with torch.inference_mode():
            model(inputs)
        torch.cuda.synchronize()

    return step


def told_to_stop() -> bool:
    """Return whether stdin has another line."""
    return bool(select.select([sys.stdin.buffer], [], [], 0)[0])


def run_ahead(torch: Any, step: Any, end_ns: int) -> dict[str, float]:
    """Run steps without waiting for each, until `end_ns`. Count the steps that the device has done by then."""
    events: list[Any] = []
    done, last_ns = 0, time.monotonic_ns()
    took: list[int] = []
    while time.monotonic_ns() < end_ns and not told_to_stop():
        step()
        events.append(torch.cuda.Event())
        events[-1].record()
        if len(events) > IN_FLIGHT:
            events.pop(0).synchronize()
            now_ns = time.monotonic_ns()
            if now_ns <= end_ns:
                done += 1
                took.append(now_ns - last_ns)
                last_ns = now_ns
    for event in events:
        event.synchronize()
        now_ns = time.monotonic_ns()
        part = (end_ns - last_ns) / max(1, now_ns - last_ns)
        done += min(1.0, max(0.0, part))
        last_ns = min(now_ns, end_ns)
    return {"steps": done, "p50_us": statistics.median(took or [0]) / 1000}


def run_waiting(step: Any, end_ns: int) -> dict[str, float]:
    """Run steps one by one until `end_ns`."""
    took: list[int] = []
    at_ns = time.monotonic_ns()
    while at_ns < end_ns:
        step()
        now_ns = time.monotonic_ns()
        took.append(now_ns - at_ns)
        at_ns = now_ns
    return {"steps": len(took), "p50_us": statistics.median(took or [0]) / 1000}


def capture(torch: Any, end_ns: int) -> dict[str, Any]:
    """Capture graphs in the default mode and launch each once, while another thread launches."""
    ended, failed, why, count = threading.Event(), 0, "", 0
    side, noise, values = torch.cuda.Stream(), torch.zeros(1 << 16, device="cuda"), torch.zeros(1 << 16, device="cuda")
    torch.cuda.synchronize()

    def launch() -> None:
        with torch.cuda.stream(side):
            while not ended.wait(0.0005):
                for _ in range(10):
                    noise.mul_(1.0)

    thread = threading.Thread(target=launch)
    gc.freeze()  # a capture runs the garbage collector first, which then has only new objects to check
    thread.start()
    while count < CAPTURES and time.monotonic_ns() < end_ns:
        count += 1
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(5):
                    values.add_(1.0)
            graph.replay()
        except RuntimeError as error:
            failed += 1
            why = why or str(error).splitlines()[0]
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
    ended.set()
    thread.join()
    torch.cuda.synchronize()
    expected = 5.0 * (count - failed)
    if not failed and abs(float(values[0]) - expected) > 0.5:
        return {"error": f"{float(values[0])} instead of {expected} after {count} graphs"}
    return {"captures": count, "failed": failed, "why": why}


def main() -> int:
    """Serve lines until stdin ends."""
    try:
        import torch
    except ImportError as error:
        print(f"- {error}", flush=True)
        return 0
    if not torch.cuda.is_available():
        print("- no device for torch", flush=True)
        return 0
    steps = {
        "train": training(torch, 2048, 8, 1024),
        "unfilled": training(torch, 256, 4, 64),
        "small": inference(torch),
    }
    for step in steps.values():
        for _ in range(20):
            step()
    torch.cuda.synchronize()
    print("ready", flush=True)
    while words := sys.stdin.buffer.raw.readline().split():  # unbuffered, so that select() detects further lines
        what = words[0].decode()
        if what == "stop":
            continue
        seconds, start_ns = float(words[1]), int(words[2])
        end_ns = start_ns + int(seconds * 1e9)
        time.sleep(max(0.0, (start_ns - time.monotonic_ns()) / 1e9))
        if what == "capture":
            said = capture(torch, end_ns)
        elif what == "small":
            said = run_waiting(steps[what], end_ns)
        else:
            said = run_ahead(torch, steps[what], end_ns)
        print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
