"""Kernels of distributions, fetched by apt into build/kernels and never installed, each with an initramfs."""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "build/kernels"
BUSYBOX = "busybox-static"
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")


@dataclass(frozen=True, slots=True)
class Source:
    """The place of a kernel. The dependencies of `package` lead to the kernel."""

    keys: Path
    archives: tuple[tuple[str, str], ...]  # address and suite
    package: str


def _debian(*suites: str, package: str = "linux-image-amd64") -> Source:
    kinds = {suite: "debian-security" if suite.endswith("-security") else "debian" for suite in suites}
    archives = tuple((f"http://deb.debian.org/{kind}", suite) for suite, kind in kinds.items())
    return Source(Path("/usr/share/keyrings/debian-archive-keyring.gpg"), archives, package)


def _ubuntu(suite: str, package: str) -> Source:
    archives = tuple(("http://archive.ubuntu.com/ubuntu", name) for name in (suite, f"{suite}-updates"))
    return Source(UBUNTU_KEYS, archives, package)


UBUNTU_KEYS = KERNELS / "keys/root/usr/share/keyrings/ubuntu-archive-keyring.gpg"
KEYRING = _debian("sid", package="ubuntu-keyring")  # so that Debian's signature covers Ubuntu's keys
SOURCES = {
    "5.15": _ubuntu("jammy", "linux-image-generic"),
    "6.1": _debian("bookworm", "bookworm-security"),
    "6.8": _ubuntu("noble", "linux-image-generic"),
    "6.11": _ubuntu("noble", "linux-image-6.11.0-29-generic"),
    "6.11.0-17": _ubuntu("noble", "linux-image-6.11.0-17-generic"),
    "6.12": _debian("trixie", "trixie-security"),
    "hwe": _ubuntu("noble", "linux-image-generic-hwe-24.04"),
    "newest": _debian("sid"),
}


@dataclass(frozen=True, slots=True)
class Image:
    """The files that a guest boots. `modules` is its /lib/modules."""

    release: str
    kernel: Path
    initramfs: Path
    modules: Path


def image(version: str) -> Image:
    """Return the newest kernel of that name at the time of the first call. build/kernels/VERSION stores it."""
    folder = KERNELS / version
    if not (folder / "initramfs").exists():
        _fetch(folder, SOURCES[version], BUSYBOX)
    modules = next(path for path in (folder / "root/lib/modules", folder / "root/usr/lib/modules") if path.is_dir())
    release = next(modules.iterdir()).name
    kernel = next((folder / "root").rglob("vmlinuz*"))
    found = Image(release, kernel, folder / "initramfs", modules)
    if not found.initramfs.exists():
        found.initramfs.write_bytes(_initramfs(folder, modules / release))
    return found


# -- packages ------------------------------------------------------------------------------------------------------


def _fetch(folder: Path, source: Source, *more: str) -> None:
    """Unpack the source's packages, and these, into folder/root."""
    if not source.keys.exists():
        _fetch(KERNELS / "keys", KEYRING)
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("apt/lists/partial", "apt/archives/partial", "packages", "root"):
        (folder / part).mkdir(parents=True)
    lines = [f"deb [signed-by={source.keys}] {address} {suite} main\n" for address, suite in source.archives]
    (folder / "apt/sources.list").write_text("".join(lines))
    _apt(folder, "get", "-qq", "update")
    _apt(folder, "get", "-qq", "download", *more, *sorted(_packages(folder, source)))
    for package in (folder / "packages").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
        package.unlink()
    shutil.rmtree(folder / "apt")


def _packages(folder: Path, source: Source) -> set[str]:
    """Return names of packages, without a kernel's modules for devices that guests do not have."""
    found: set[str] = set()
    asked = {source.package}
    while asked:
        said = _apt(folder, "cache", "depends", *sorted(asked))
        named = re.findall(r"^ *Depends: (linux-(?:image|binary|modules)-\d\S*)$", said, re.MULTILINE)
        found |= asked
        asked = set(named) - found
    return found


def _apt(folder: Path, tool: str, *arguments: str) -> str:
    """Run apt with its own lists. Those of the host do not change."""
    apt = folder / "apt"
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt,
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    words = [f"-o{key}={value}" for key, value in options.items()]
    command = [f"apt-{tool}", *words, *arguments]
    return subprocess.run(command, cwd=folder / "packages", check=True, stdout=subprocess.PIPE, text=True).stdout


# -- initramfs -----------------------------------------------------------------------------------------------------


def _initramfs(folder: Path, modules: Path) -> bytes:
    """Return a cpio archive with busybox, the modules that the root needs, and init."""
    busybox = next(path for path in (folder / "root/bin/busybox", folder / "root/usr/bin/busybox") if path.exists())
    base = modules.parent.parent.parent
    subprocess.run(["/usr/sbin/depmod", "-b", base, modules.name], check=True)
    loaded = [_plain(modules / name) for name in _in_order(modules)]
    names = [f"{n}.ko" for n in range(len(loaded))]
    entries = [_entry(name, 0o40755, b"") for name in ("bin", "proc", "sys", "dev", "lower", "upper", "root", "m")]
    entries.append(_entry("bin/busybox", 0o100755, busybox.read_bytes()))
    entries += [
        _entry(f"bin/{name}", 0o120777, b"busybox") for name in ("sh", "mount", "mkdir", "insmod", "switch_root")
    ]
    entries += [_entry(f"m/{name}", 0o100644, data) for name, data in zip(names, loaded, strict=True)]
    entries.append(_entry("m/order", 0o100644, "".join(f"{name}\n" for name in names).encode()))
    init = (HERE / "init.sh").read_bytes()
    return b"".join([*entries, _entry("init", 0o100755, init), _entry("TRAILER!!!", 0, b"")])


def _in_order(modules: Path) -> list[str]:
    """Return paths of modules that are not built into the kernel, each after its dependencies."""
    needs = dict(line.split(":") for line in (modules / "modules.dep").read_text().splitlines())
    paths = {Path(path).name.partition(".ko")[0]: path for path in needs}

    def walk(path: str) -> Iterator[str]:
        for needed in reversed(needs[path].split()):
            yield from walk(needed)
        yield path

    return list(dict.fromkeys(path for name in MODULES if name in paths for path in walk(paths[name])))


def _plain(module: Path) -> bytes:
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", module], check=True, stdout=subprocess.PIPE).stdout
    return module.read_bytes()


def _entry(name: str, mode: int, data: bytes) -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + "".join(f"{field:08X}" for field in fields).encode() + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
