"""Inputs for fuzzers: a corpus, random changes of its inputs, and random bytes. Imports nothing from fgpu_ebpf."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MOST_BYTES = 1 << 12
# this part of the runs comes before memory is measured, so that caches are full and the allocator has its final size
WARM_PART = 5
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
    """Return the committed inputs of one fuzzer, in a fixed order."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


class Mutator:
    """A source of inputs, with another input at each call. `words` are the words of the tested format."""

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
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
