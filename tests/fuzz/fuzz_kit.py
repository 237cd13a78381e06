"""Inputs for a fuzzer: the inputs of its corpus, then random inputs and random changes of the corpus.

A fuzzer is a callable that gets bytes and raises an exception for an error. `run` is the same for all fuzzers: the
inputs of a seed never change, so that an error can be reproduced.
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

from fgpu_ebpf.linux import malloc
from tests.fuzz.corpora import MIB, WARM_PART, Mutator, corpus, resident_bytes


def kept_bytes() -> int:
    """Return the resident bytes of this process after it has freed unneeded memory, as agent and gatekeeper do."""
    gc.collect()
    malloc.give_back()
    return resident_bytes()


def run(one: Callable[[bytes], object], name: str, runs: int, words: Sequence[bytes] = (), seed: int = 0) -> int:
    """Run the corpus, then this many further inputs. Return the growth of this process in bytes after its start-up."""
    inputs = corpus(name)
    warm = 0
    for number, data in enumerate(_inputs(inputs, runs, Mutator(seed, inputs, words))):
        if number == len(inputs) + runs // WARM_PART:
            warm = kept_bytes()
        try:
            one(data)
        except BaseException:
            print(f"input {number} of fuzzer {name}: {data!r}")
            raise
    return kept_bytes() - warm


def _inputs(inputs: Sequence[bytes], runs: int, more: Callable[[], bytes]) -> Iterator[bytes]:
    yield from inputs
    for _ in range(runs):
        yield more()


def main() -> int:
    """Run one fuzzer in Python: `python -m tests.fuzz.fuzz_kit NAME RUNS [SEED]`."""
    logging.disable(logging.CRITICAL)
    malloc.keep_small()  # as agent and gatekeeper do
    name, runs, *seed = sys.argv[1:]
    module = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    fuzzer = module.Fuzzer()
    grown = run(fuzzer, name, int(runs), module.WORDS, *map(int, seed))
    fuzzer.close()
    print(f"{len(corpus(name))} inputs, {runs} runs, {grown} bytes more")
    return int(grown > MIB)


if __name__ == "__main__":
    sys.exit(main())
