"""Train and allocate at random until stdin ends, as an example of a torch program.

The program prints "ready PID", then answers every line of stdin with "ok STEPS REFUSED FAILED". These are numbers of
rounds of 20 training steps: the rounds that completed, those that got no memory (an error of torch, the driver or
cuBLAS), and those that ended with any other error. Tracebacks of other errors are on stderr. The program continues
after an error. It does not use fgpu.
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
# Other errors that mean out-of-memory: of the driver (a context, a kernel's code) and of cuBLAS (its workspace).
NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Run a round of 20 steps. Sometimes also allocate up to 3 GiB for a short time, or free torch's cached memory."""
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
        except RuntimeError as error:  # also torch.OutOfMemoryError, which is a subclass
            optimizer = None  # the optimizer may have incomplete state, which it does not check again
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
