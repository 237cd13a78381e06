"""Archives that have the same bytes for the same contents: sorted members, owned by root, with the commit's time.

The time is SOURCE_DATE_EPOCH, in seconds. The bytes do not depend on the umask, the file system or the folder.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

OLDEST_ZIP = 315532800  # the beginning of 1980, the earliest time that a zip file can contain
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def epoch() -> int:
    """Return the time of every member, in seconds since the epoch. Raises KeyError without SOURCE_DATE_EPOCH."""
    return int(os.environ["SOURCE_DATE_EPOCH"])


def moment() -> str:
    """Return the time of epoch() as text, in the format of OCI's JSON."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch()))


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def below(folder: Path, top: str, left_out: Sequence[str] = ()) -> dict[str, Path]:
    """Return the files below a folder, by their names in an archive.

    Args:
        folder: the folder.
        top: the first folder of the names in the archive.
        left_out: names of files and folders to leave out.
    """
    ignored = {"__pycache__", *left_out}
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        f"{top}/{path.relative_to(folder)}": path for path in paths if not ignored & set(path.relative_to(folder).parts)
    }


@contextmanager
def compressed(out: Path, level: int = 9) -> Iterator[IO[bytes]]:
    """Open a gzip file for writing, with the time of epoch() and without a name in it."""
    with open(out, "wb") as raw, gzip.GzipFile("", "wb", level, raw, mtime=epoch()) as packed:
        yield packed


def _add(tar: tarfile.TarFile, name: str, source: Path | bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.mtime, info.mode = epoch(), mode
    info.size = len(source) if isinstance(source, bytes) else source.stat().st_size
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as data:
        tar.addfile(info, data)


def tar_gz(out: Path, files: Mapping[str, Path]) -> None:
    """Write a .tar.gz. `files`: the files by their names in the archive."""
    with compressed(out) as packed, tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, path in sorted(files.items()):
            _add(tar, name, path, 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)


def normal_wheel(made: Path, out: Path) -> None:
    """Write a copy of a wheel whose members have fixed times, modes and order."""
    when = time.gmtime(max(epoch(), OLDEST_ZIP))[:6]
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(out, "w") as new:
        # .dist-info is last, as the format of wheels recommends
        for info in sorted(old.infolist(), key=lambda info: (".dist-info/" in info.filename, info.filename)):
            fixed = zipfile.ZipInfo(info.filename, when)
            mode = 0o755 if info.external_attr >> 16 & stat.S_IXUSR else 0o644
            fixed.external_attr = (stat.S_IFREG | mode) << 16
            new.writestr(fixed, old.read(info), zipfile.ZIP_DEFLATED, 9)


# -- OCI


@dataclass(frozen=True, slots=True)
class Blob:
    """A part of an OCI layout: its media type and its contents."""

    kind: str
    source: Path | bytes

    @property
    def digest(self) -> str:
        """The SHA-256 digest of the contents, in hexadecimal."""
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else sha256(self.source)

    def descriptor(self) -> dict[str, Any]:
        """Return the OCI descriptor of the blob, for manifests and indexes."""
        size = len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size
        return {"mediaType": self.kind, "digest": f"sha256:{self.digest}", "size": size}


def as_json(value: Any) -> bytes:
    """Return a value as JSON with sorted keys and without spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def oci_layout(out: Path, config: Blob, layers: Sequence[Blob], name: str, docker: bool = False) -> None:
    """Write an OCI image layout with one manifest, as a tar file.

    Args:
        out: the tar file.
        config: the configuration of the image.
        layers: the layers, the lowest first.
        name: the name of the image in an engine, with a tag.
        docker: whether to write manifest.json too, so that `docker load` of every version can read the file.
    """
    manifest = Blob(
        MANIFEST,
        as_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": config.descriptor(),
                "layers": [layer.descriptor() for layer in layers],
            }
        ),
    )
    names = {"org.opencontainers.image.ref.name": name.rpartition(":")[2], "io.containerd.image.name": name}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest.descriptor() | {"annotations": names}]}
    places = {f"blobs/sha256/{blob.digest}": blob for blob in (manifest, config, *layers)}
    files: dict[str, Path | bytes] = {place: blob.source for place, blob in places.items()}
    files |= {"index.json": as_json(index), "oci-layout": as_json({"imageLayoutVersion": "1.0.0"})}
    if docker:
        _, configured, *layered = places
        known = name.removeprefix("docker.io/library/")
        files["manifest.json"] = as_json([{"Config": configured, "RepoTags": [known], "Layers": layered}])
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as tar:
        for place, source in sorted(files.items()):
            _add(tar, place, source)
