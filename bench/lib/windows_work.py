"""A program with torch that counts its steps in windows of time: `windows_work.py KIND...`.

It makes the steps of these kinds, prints "ready" or "- WHY", and then answers stdin.

A line `WHAT SECONDS START_NS` starts steps of that kind at START_NS of CLOCK_MONOTONIC. The answer has two lists: the
number of steps that ended in each window of WINDOW_SECONDS, and the milliseconds that these steps took without waiting.
A step of five medians or more has waited, and counts as one median. With a fourth word, `ends`, the answer is a list of
the times at which the steps ended (CLOCK_MONOTONIC, nanoseconds). The program does not use fgpu.
"""

from __future__ import annotations

import collections
import functools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

WINDOW_SECONDS = 2
LONG_PAUSES = 0.1  # this part of the pauses of `think` is long
WAITED = 5  # a step of at least this many medians has waited
TURN_SECONDS = 0.02  # `small-paused` and `llm-paused` work and sleep for this time, in turn
Step = Callable[[], None]


def training(torch: Any, end: Callable[[Any, int], None]) -> Step:
    """Return a step of a training: 8 x Linear(2048), batch 512. Each step calls `end` with its loss and its number."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(8)]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    inputs, number = torch.randn(512, 2048, device="cuda"), 0

    def step() -> None:
        nonlocal number
        number += 1
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        end(loss, number)

    return step


def inference(torch: Any) -> Step:
    """Return a step that runs an inference of a small model and waits for the result."""
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256), torch.nn.ReLU()] * 3).cuda().eval()
    inputs = torch.randn(16, 256, device="cuda")

    def step() -> None:
        with torch.inference_mode():
            model(inputs)
        torch.cuda.synchronize()

    return step


def decoding(torch: Any) -> Step:
    """Return a step like that of a language model: one graph for each token, batch 1, and a read of the token."""
    model = torch.nn.Sequential(*[torch.nn.Linear(4096, 4096) for _ in range(48)]).cuda().half().eval()
    inputs, stream = torch.randn(1, 4096, device="cuda").half(), torch.cuda.Stream()
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            model(inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(inputs)

    of_graph = graph, model, inputs  # the graph holds no reference to the memory that it reads

    def step() -> None:
        of_graph[0].replay()
        output[0, 0].item()

    return step


def kernels(torch: Any, cycles: int, in_flight: int) -> Step:
    """Return a step that launches a kernel of this length, and waits until fewer than `in_flight` have not ended."""
    queue = collections.deque[Any]()

    def step() -> None:
        torch.cuda._sleep(cycles)
        queue.append(torch.cuda.Event())
        queue[-1].record()
        if len(queue) == in_flight:
            queue.popleft().synchronize()

    return step


def cycles_in_ms(torch: Any) -> int:
    """Return the number of cycles of a kernel that lasts one millisecond."""
    cycles, best = 10_000_000, 0.0
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        best = max(best, cycles / begin.elapsed_time(end))
    return round(best)


def notebook(work: Step) -> Step:
    """Return a step that does its work, and then sleeps for 12 ms."""

    def step() -> None:
        work()
        time.sleep(0.012)

    return step


def thinking(torch: Any) -> Step:
    """Return a step of a training that synchronises, and then pauses: mostly for less than 0.5 ms."""
    chance = random.Random(2)

    def pause() -> None:
        torch.cuda.synchronize()
        is_long = chance.random() < LONG_PAUSES
        time.sleep(chance.uniform(0.001, 0.005) if is_long else chance.uniform(0.00001, 0.0005))

    return training(torch, lambda *_: pause())


def paused(work: Step) -> Step:
    """Return a step that does its work, after a sleep if it has worked for TURN_SECONDS since the last sleep."""
    awake_until = 0.0

    def step() -> None:
        nonlocal awake_until
        if time.monotonic() > awake_until:
            time.sleep(TURN_SECONDS)
            awake_until = time.monotonic() + TURN_SECONDS
        work()

    return step


def kinds(torch: Any) -> dict[str, Callable[[], Step]]:
    """Return, for each kind of step, a function that makes a step of this kind."""
    ms = cycles_in_ms(torch)
    small, llm = functools.cache(lambda: inference(torch)), functools.cache(lambda: decoding(torch))
    return {
        "each": lambda: training(torch, lambda *_: torch.cuda.synchronize()),
        "tenth": lambda: training(torch, lambda _, number: torch.cuda.synchronize() if number % 10 == 0 else None),
        "item": lambda: training(torch, lambda loss, _: loss.item()),
        "think": lambda: thinking(torch),
        "small": small,
        "small-paused": lambda: paused(small()),
        "llm": llm,
        "llm-paused": lambda: paused(llm()),
        "notebook": lambda: notebook(kernels(torch, 4 * ms, 1)),
        "k1x1": lambda: kernels(torch, 1 * ms, 1),
        "k1x4": lambda: kernels(torch, 1 * ms, 4),
        "k20x1": lambda: kernels(torch, 20 * ms, 1),
        "k20x4": lambda: kernels(torch, 20 * ms, 4),
    }


def ends_of(step: Step, seconds: float, start_ns: int) -> tuple[int, list[int]]:
    """Make steps from `start_ns` on. Return when the first one began, and when each one ended."""
    time.sleep(max(0.0, (start_ns - time.monotonic_ns()) / 1e9))
    begun, until_ns, ends = time.monotonic_ns(), start_ns + round(seconds * 1e9), list[int]()
    while True:
        step()
        ended = time.monotonic_ns()
        if ended >= until_ns:
            return begun, ends
        ends.append(ended)


def counted(step: Step, seconds: float, start_ns: int) -> tuple[list[int], list[int]]:
    """Return the number of steps in each window, and the milliseconds that they took without waiting."""
    windows: list[list[int]] = [[] for _ in range(int(seconds / WINDOW_SECONDS))]
    begun, ends = ends_of(step, len(windows) * WINDOW_SECONDS, start_ns)
    for ended in ends:
        windows[int((ended - start_ns) / 1e9 / WINDOW_SECONDS)].append(ended - begun)
        begun = ended
    median = statistics.median([took for window in windows for took in window] or [0])
    working = [sum(took if took < WAITED * median else median for took in window) for window in windows]
    return [len(window) for window in windows], [round(ns / 1e6) for ns in working]


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
    makers = kinds(torch)
    steps = {name: makers[name]() for name in sys.argv[1:]}
    for step in steps.values():
        for _ in range(30):
            step()
    torch.cuda.synchronize()
    print("ready", flush=True)
    for line in sys.stdin:
        what, seconds, start_ns, *ends = line.split()
        if ends:
            found: Any = ends_of(steps[what], float(seconds), int(start_ns))[1]
        else:
            found = counted(steps[what], float(seconds), int(start_ns))
        torch.cuda.synchronize()
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
