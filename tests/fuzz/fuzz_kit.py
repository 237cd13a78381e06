"""Inputs for a fuzzer: those of its corpus as they are, then random ones, and those of the corpus changed at random.

A fuzzer is a callable that is given bytes and raises where something is wrong. `run` is the same for all of them: every
input of the same seed is the same, so what is found once is found again.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fgpu_ebpf import heap

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MOST_BYTES = 1 << 12
WARM_PART = 5  # such a part of the runs comes before memory is measured: caches fill, the allocator finds its size
MIB = 1 << 20
ODD = (
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"..",
    b"/",
    b"9" * 40,
    b"-1",
    b"1e999",
    b'"',
    b"\\",
)


def corpus(name: str) -> list[bytes]:
    """The committed inputs of one fuzzer, in an order of their own."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


class Mutator:
    """Another input at each call. `words`: what the reader of it knows, so that more of them come through."""

    def __init__(self, seed: int, inputs: Sequence[bytes], words: Sequence[bytes] = ()) -> None:
        self._dice = random.Random(seed)
        self._inputs, self._words = list(inputs), [*words, *ODD]
        self._ways = (self._flip, self._cut, self._double, self._insert, self._replace, self._splice)

    def __call__(self) -> bytes:
        if not self._inputs or self._dice.random() < 0.2:
            return self._dice.randbytes(self._dice.choice((0, 1, 8, 64, 65, 300, MOST_BYTES)))
        data = bytearray(self._dice.choice(self._inputs))
        for _ in range(self._dice.choice((1, 1, 2, 3, 8))):
            self._dice.choice(self._ways)(data)
        return bytes(data[:MOST_BYTES])

    def _span(self, data: bytearray) -> slice:
        begin = self._dice.randrange(len(data) + 1)
        return slice(begin, min(len(data), begin + self._dice.choice((1, 2, 4, 8, 30, 200))))

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._dice.randrange(len(data))] ^= 1 << self._dice.randrange(8)

    def _cut(self, data: bytearray) -> None:
        del data[self._span(data)]

    def _double(self, data: bytearray) -> None:
        span = self._span(data)
        data[span.start : span.start] = data[span] * self._dice.choice((1, 2, 50))

    def _insert(self, data: bytearray) -> None:
        at = self._dice.randrange(len(data) + 1)
        data[at:at] = self._dice.choice(self._words)

    def _replace(self, data: bytearray) -> None:
        data[self._span(data)] = self._dice.choice(self._words)

    def _splice(self, data: bytearray) -> None:
        other = self._dice.choice(self._inputs)
        data[self._span(data)] = other[self._span(bytearray(other))]


def resident_bytes(pid: int | str = "self") -> int:
    """Of a process's memory."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept_bytes() -> int:
    """Of this process's memory, once what it need not have has been given back, as agent and gatekeeper do."""
    gc.collect()
    heap.give_back()
    return resident_bytes()


def run(one: Callable[[bytes], object], name: str, runs: int, words: Sequence[bytes] = (), seed: int = 0) -> int:
    """The corpus, then so many more; answers by how many bytes this process has grown after it had become warm."""
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
    """fuzz_kit.py NAME RUNS [SEED]: one fuzzer in Python."""
    logging.disable(logging.CRITICAL)
    heap.keep_small()  # as agent and gatekeeper do
    name, runs, *seed = sys.argv[1:]
    module = importlib.import_module(f"fuzz_{name}")
    fuzzer = module.Fuzzer()
    grown = run(fuzzer, name, int(runs), module.WORDS, *map(int, seed))
    fuzzer.close()
    print(f"{len(corpus(name))} inputs, {runs} runs, {grown} bytes more")
    return int(grown > MIB)


if __name__ == "__main__":
    sys.exit(main())
