"""Train and allocate freely until killed, as an example of a torch program.

Prints "ready PID", then answers every line of stdin with "ok STEPS REFUSED FAILED": all steps, those that found no
memory, in torch or below it, and those that torch ended with any other error, whose tracebacks are on stderr. It
continues after both, and knows nothing of fgpu.
"""

from __future__ import annotations

import os
import random
import select
import sys
import traceback

import torch

MIB = 1 << 20
BATCHES = (32, 128, 512)
# Errors that mean the same as OutOfMemoryError: of the driver (a context, a kernel's code), and of cuBLAS (its
# workspace).
NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Run twenty steps. They take up to 3 GiB more for a moment, and sometimes release what torch keeps."""
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(random.choice(BATCHES), 1024, device="cuda")).square().mean().backward()
        optimizer.step()
    if random.random() < 0.05:
        torch.empty(random.randrange(16, 3072) * MIB, dtype=torch.uint8, device="cuda").fill_(1)
    if random.random() < 0.05:
        torch.cuda.empty_cache()
    torch.cuda.synchronize()


def main() -> None:
    """Train until stdin ends."""
    print(f"ready {os.getpid()}", flush=True)
    steps = refused = failed = 0
    model = optimizer = None
    while True:
        try:
            if model is None:
                model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)]).cuda()
            if optimizer is None:
                optimizer = torch.optim.Adam(model.parameters())
            train(model, optimizer)
            steps += 1
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            optimizer = None  # it may have half of a parameter's state, and does not check that again
            if not any(words in str(error) for words in NO_MEMORY):
                failed += 1
                traceback.print_exc()
            else:
                refused += 1
            torch.cuda.empty_cache()
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            print(f"ok {steps} {refused} {failed}", flush=True)


if __name__ == "__main__":
    main()
