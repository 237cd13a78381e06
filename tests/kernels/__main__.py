"""`./dev test kernels [VERSION…]`: selected tests in an emulated machine (QEMU) with a distribution's kernel.

The tests are those that cover most of the kernel's side, and a few that cover each step of the product. The guest's
root is this machine's, below a layer in its memory, so only the kernel differs. Without KVM, which CI's machines lack,
the guest is some twenty times slower than this machine. Nothing here is therefore part of `./dev test`, and tests are
selected by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from datetime import date

from tests.kernels import guest, images


def _only(names: Iterable[str], *files: str) -> tuple[str, ...]:
    return (*files, "-k", " or ".join(names))


_HELLO = (
    "test_a_managed_process_gets_all_its_pages",
    "test_rows_contain_the_pids_of_the_reader_s_namespace",
    "test_the_exit_of_a_process_releases_its_descriptors_and_pages",
    "test_the_connecting_process_is_answered",
    "test_a_socket_whose_process_has_exited_gets_no_answer",
    "test_the_heartbeat_of_pages_passed_on_stops_when_their_own_process_ends",
)
_PRODUCT = (
    "(test_a_limit_is_enforced_to_the_byte and (2MiB-and or vmm or managed))",
    "test_a_context_is_charged_and_released",
    "test_a_full_tenant_does_not_affect_its_neighbour",
    "test_memory_of_killed_processes_is_free_within_a_second",
    "test_exec_releases_the_memory_of_the_previous_program",
    "test_a_process_stays_charged_after_its_first_thread_has_exited",
    "test_limits_hold_without_agent_and_gatekeeper",
    "test_a_process_started_without_a_gatekeeper_gets_no_memory",
    "test_restarts_do_not_affect_running_programs",
)
_REFUSED = "tests/kernels/refused.py"
_LINKS = ("test_the_agent_releases_a_layer_after_its_last_process_exits", "test_the_agent_restores_removed_links")
# Name -> pytest's arguments. All tests of the ledger, and of the other suites those that cover most.
SUITES = {
    guest.VERIFIER: ("tests/kernels/verify_programs.py",),
    "ledger": ("tests/bpf/test_ledger.py",),
    "gatekeeper": _only(_HELLO, "tests/gatekeeper/test_hello.py", "tests/gatekeeper/test_attacks.py"),
    "product": _only(_PRODUCT, *(f"tests/e2e/test_{name}.py" for name in ("limit", "end", "restart"))),
    "links": _only(_LINKS, "tests/e2e/test_private_copies.py", "tests/e2e/test_unpinned.py"),
}
# Kernel on which the agent does not start -> its reason in refused.py
UNFIT = {"5.15": "old", "6.11.0-17": "return_probes"}


def main() -> int:
    """Test one kernel after the other. Print a table for docs/matrix.md. Return 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="./dev test kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(images.SOURCES), metavar="VERSION")
    parser.add_argument("--suite", action="append", help=f"one of {', '.join(SUITES)}, or a test as pytest names it")
    parser.add_argument("--minutes", type=int, default=120, help="for each kernel (default: 120)")
    options = parser.parse_args()
    if unknown := set(options.versions) - images.SOURCES.keys():
        parser.error(f"no kernel {', '.join(unknown)}: {', '.join(images.SOURCES)}")
    suites = dict(_suite(name) for name in options.suite) if options.suite else SUITES
    rows, good = ["| kernel | suite | passed | failed | skipped |", "|---|---|---|---|---|"], True
    for version in options.versions:
        image = images.image(version)
        chosen = suites if options.suite or version not in UNFIT else {"refused": _only([UNFIT[version]], _REFUSED)}
        for name, done in guest.run(image, chosen, options.minutes * 60).items():
            good = good and done.good
            rows.append(f"| {image.release} | {name} | {done.passed} | {done.failed} | {done.skipped} |")
            print(rows[-1], *done.reasons, sep="\n", flush=True)
    print(f"\n{date.today():%d %B %Y}, {' '.join(['./dev test kernels', *options.versions])}\n", *rows, sep="\n")
    return 0 if good else 1


def _suite(name: str) -> tuple[str, tuple[str, ...]]:
    return (name, SUITES[name]) if name in SUITES else (name.replace("/", "-"), (name,))


if __name__ == "__main__":
    sys.exit(main())
