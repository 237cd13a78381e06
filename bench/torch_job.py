"""A training that takes memory as it likes until it is killed: says "ready PID", then answers every line of stdin with
"ok STEPS REFUSED", of all its steps those that torch ended with its own out-of-memory. It knows nothing of fgpu.
"""

from __future__ import annotations

import os
import random
import select
import sys

import torch

MIB = 1 << 20
BATCHES = (32, 128, 512)


def main() -> None:
    """Trains, and takes up to 3 GiB more for a moment, now and then."""
    print(f"ready {os.getpid()}", flush=True)
    steps = refused = 0
    model = optimizer = None
    while True:
        try:
            if model is None or optimizer is None:
                model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)]).cuda()
                optimizer = torch.optim.Adam(model.parameters())
            for _ in range(20):
                optimizer.zero_grad()
                model(torch.randn(random.choice(BATCHES), 1024, device="cuda")).square().mean().backward()
                optimizer.step()
            if random.random() < 0.05:
                torch.empty(random.randrange(16, 3072) * MIB, dtype=torch.uint8, device="cuda").fill_(1)
            if random.random() < 0.05:
                torch.cuda.empty_cache()
            torch.cuda.synchronize()
            steps += 1
        except torch.OutOfMemoryError:
            refused += 1
            torch.cuda.empty_cache()
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            print(f"ok {steps} {refused}", flush=True)


if __name__ == "__main__":
    main()
