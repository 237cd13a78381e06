#!/usr/bin/env python3
"""Find cycles between C source files: `a.c` uses a symbol of `b.c`, which uses one of `a.c`, perhaps by way of others.

It runs on its own, and in tests/shim/test_cycles.py and tests/sim/test_cycles.py. It reads object files with nm(1), so
that uses in macros and inline functions count too. It imports nothing of fgpu.

    tools/c_cycles.py build/sim/obj/libcuda build/shim/obj
    tools/c_cycles.py --layers base,standalone,link,core,account,code,gate,hooks build/shim/obj

Each argument is a folder whose object files are linked together. The program prints each cycle with the symbols that
form it. `--layers` names the sub-folders in their order: a file may then use symbols of its own sub-folder and of
sub-folders further left, and the program prints each other use. The exit status is 0 if nothing was printed, 1 if a
cycle or use was printed, and 2 if a folder has no object file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

Uses = dict[str, dict[str, set[str]]]  # file -> file that it uses -> symbols


def symbols(objects: Iterable[Path]) -> Iterator[tuple[Path, str, bool]]:
    """Yield (object file, external symbol, whether the file defines the symbol). Weak definitions count as uses."""
    command = ["nm", "--extern-only", "--print-file-name", "--no-sort", *map(str, objects)]
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        path, _, entry = line.rpartition(":")
        kind, name = entry.split()[-2:]
        yield Path(path), name, kind not in "Uwv"


def uses_of(folder: Path) -> Uses:
    """Return the uses between the object files of a folder, by their paths below the folder.

    Raises:
        FileNotFoundError: the folder has no object file.
    """
    objects = sorted(folder.rglob("*.o"))
    if not objects:
        raise FileNotFoundError(f"{folder}: no object files (./dev build makes them)")
    found = list(symbols(objects))
    home = {name: path for path, name, is_defined in found if is_defined}
    uses: Uses = defaultdict(lambda: defaultdict(set))
    for path, name, is_defined in found:
        target = home.get(name)
        if not is_defined and target and target != path:
            uses[_name(path, folder)][_name(target, folder)].add(name)
    return uses


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def cycles(uses: Uses) -> list[list[str]]:
    """Return the strongly connected components of more than one file, by Tarjan's algorithm (SIAM J. Comput. 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in uses.get(node, {}):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for node in list(uses):
        if node not in index:
            visit(node)
    return found


def report(uses: Uses, component: Iterable[str]) -> Iterator[str]:
    """Yield a line with the files of a cycle, and then one for each use inside it."""
    members = sorted(component)
    yield f"cycle of {len(members)} files: {' '.join(members)}"
    for file in members:
        for target in members:
            if names := uses.get(file, {}).get(target):
                yield f"  {file} -> {target}: {' '.join(sorted(names))}"


def upward_uses(uses: Uses, layers: list[str]) -> Iterator[str]:
    """Yield a line for each file outside all layers, and for each use of a layer further right.

    `layers` has the names of sub-folders. A file is in the layer of its folder.
    """
    rank = {layer: number for number, layer in enumerate(layers)}
    files = {*uses, *(target for targets in uses.values() for target in targets)}
    layer_of = {file: file.rpartition("/")[0] for file in files}
    for file in sorted(files):
        if layer_of[file] not in rank:
            yield f"{file}: in none of the layers {','.join(layers)}"
    for file, targets in sorted(uses.items()):
        for target, names in sorted(targets.items()):
            if rank.get(layer_of[file], 0) < rank.get(layer_of[target], -1):
                yield f"{file} uses {target}, of a higher layer: {' '.join(sorted(names))}"


def main(arguments: list[str]) -> int:
    """Check each folder and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=lambda text: text.split(","), help="sub-folders, the lowest first")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    options = parser.parse_args(arguments)
    status = 0
    for folder in options.folders:
        try:
            uses = uses_of(Path(folder))
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 2
        found = [line for component in cycles(uses) for line in report(uses, component)]
        if options.layers:
            found += upward_uses(uses, options.layers)
        if found:
            status = 1
            print(f"{folder}:", *found, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
