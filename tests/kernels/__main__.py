"""`./dev test kernels [VERSION…]`: the tests of the kernel's side, and the most telling end-to-end tests, in a machine
that QEMU emulates, with a kernel of a distribution's.

The guest's root is this machine's, below a layer in its memory; the kernel is all that differs. Without KVM, which
CI's machines lack: some fifteen times slower than this machine, so nothing here is part of `./dev test`.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date

import guest
import images

SUITES = (
    guest.VERIFIER,
    "tests/bpf",
    *(f"tests/e2e/test_{name}.py" for name in ("limit", "race", "end", "restart", "policies", "life")),
)


def main() -> int:
    """One kernel after the other; 1 where a test failed. Prints a table as docs/matrix.md has it."""
    parser = argparse.ArgumentParser(prog="./dev test kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(images.SOURCES), metavar="VERSION")
    parser.add_argument("--suite", action="append", help=f"instead of {', '.join(SUITES)}")
    parser.add_argument("--minutes", type=int, default=90, help="for each suite (default: 90)")
    options = parser.parse_args()
    if unknown := set(options.versions) - images.SOURCES.keys():
        parser.error(f"no kernel {', '.join(unknown)}: {', '.join(images.SOURCES)}")
    rows, good = ["| kernel | suite | passed | failed | skipped |", "|---|---|---|---|---|"], True
    for version in options.versions:
        image = images.image(version)
        for suite in options.suite or SUITES:
            done = guest.run(image, suite, options.minutes * 60)
            good = good and done.good
            rows.append(f"| {image.release} | `{suite}` | {done.passed} | {done.failed} | {done.skipped} |")
            print(rows[-1], *done.reasons, sep="\n", flush=True)
    print(f"\n{date.today():%d %B %Y}, {' '.join(['./dev test kernels', *options.versions])}\n", *rows, sep="\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
