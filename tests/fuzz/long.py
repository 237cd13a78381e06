"""`./dev test fuzz NAME [-- RUNS]`: run one fuzzer for long, guided by coverage; 10 million runs by default.

Fuzzers in Python use atheris. Fuzzers in C use libFuzzer if clang is installed, and otherwise drive.c. Inputs that
reach new code are stored under build/fuzz/NAME, and the next run starts with them. An error is printed with its input,
and ends the run. Memory is measured at intervals: a growing number of Python objects is an error too.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import shutil
import sys
import time
from pathlib import Path

from tests.fuzz.corpora import CORPUS, MOST_BYTES
from tests.fuzz.fuzz_c import HARNESSES

RUNS = 10_000_000
LOOK_RUNS = 100_000
MOST_BLOCKS = (1 << 20) // 64  # in Python's allocator: 1 MiB, at the average size of a block
KEPT = Path(__file__).parents[2] / "build/fuzz"


class Watched:
    """A fuzzer that must not grow."""

    def __init__(self, name: str) -> None:
        import atheris

        with atheris.instrument_imports(include=["fgpu_ebpf", "yaml"]):
            self._fuzzer = importlib.import_module(f"tests.fuzz.fuzz_{name}").Fuzzer()
        self._runs = self._blocks = 0

    def __call__(self, data: bytes) -> None:
        self._fuzzer(data)
        self._runs += 1
        if self._runs % LOOK_RUNS == 0:
            gc.collect()
            blocks = sys.getallocatedblocks()
            self._blocks = self._blocks or blocks
            print(f"{self._runs} runs, {blocks - self._blocks:+} blocks", file=sys.stderr, flush=True)
            assert blocks - self._blocks < MOST_BLOCKS


def words(path: Path, name: str) -> Path:
    """Write a dictionary in libFuzzer's format."""
    found = importlib.import_module(f"tests.fuzz.fuzz_{name}").WORDS
    path.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word[:64]) + '"\n' for word in found))
    return path


def main() -> None:
    name, runs = sys.argv[1], next((int(word) for word in sys.argv[2:] if word.isdigit()), RUNS)
    kept = KEPT / name
    kept.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={runs}", f"-max_len={MOST_BYTES}", "-timeout=60", f"-artifact_prefix={kept}-"]
    folders = [str(kept), str(CORPUS / name)]
    if name in HARNESSES:
        by_clang(name, [*options, *folders]) if shutil.which("clang") else by_gcc(name, runs)
    elif (CORPUS / name).is_dir():
        by_atheris(name, [*options, f"-dict={words(KEPT / f'{name}.words', name)}", *folders])
    else:
        sys.exit(f"no fuzzer {name}: {', '.join(sorted(path.name for path in CORPUS.iterdir()))}")


def by_clang(name: str, options: list[str]) -> None:
    program = HARNESSES[name].build(KEPT / "bin", guided=True)
    os.execv(program, [str(program), *options])


def by_gcc(name: str, runs: int) -> None:
    program = HARNESSES[name].build(KEPT / "bin")
    os.execv(program, [str(program), str(CORPUS / name), str(runs), str(time.time_ns())])


def by_atheris(name: str, options: list[str]) -> None:
    import atheris

    logging.disable(logging.CRITICAL)
    atheris.Setup([sys.argv[0], *options], Watched(name))
    atheris.Fuzz()


if __name__ == "__main__":
    (KEPT / "bin").mkdir(parents=True, exist_ok=True)
    main()
