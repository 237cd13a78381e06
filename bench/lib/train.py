"""A small torch training (eight layers of 2048, Adam, batch 512) that measures its own speed.

For each line COUNT of stdin, the program runs 100 steps to warm up and COUNT measured steps, and prints a line of JSON,
{"steps_per_second": N}. If there is no torch, it prints {"absent": why} and exits.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> int:
    """Train the number of steps in each line of stdin, and print the speed. Return the exit code, always 0."""
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"absent": str(error)}))
        return 0
    torch.manual_seed(1)
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(8)]).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    batch = torch.randn(512, 2048, device="cuda")
    for line in sys.stdin:
        for step in range(-100, int(line)):
            if step == 0:
                torch.cuda.synchronize()
                begun = time.perf_counter()
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        torch.cuda.synchronize()
        print(json.dumps({"steps_per_second": int(line) / (time.perf_counter() - begun)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
