"""An image without a package, for runs other than full ones. It has links to files of this checkout.

A full run has the image that `./dev package image` builds.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

from tests.support.host import BUILD, ROOT


def thin(name: str, work: Path) -> Path:
    """Make an image without a package.

    It has commands that call this checkout, which Node mounts, and this machine's /usr.
    """
    root, out = work / "thin", work / "thin-archive"
    words = {word: f"{ROOT}/.venv/bin/{word}" for word in ("fgpu", "fgpu-gatekeeper", "fgpu-parker")}
    words["fgpu-oci"] = f"{BUILD}/oci/fgpu-oci"
    (root / "opt/fgpu").mkdir(parents=True)
    (root / "usr").mkdir()
    (root / "run").mkdir()
    (root / "var").mkdir()
    (root / "var/run").symlink_to("/run")
    for word, program in words.items():
        (root / "opt/fgpu" / word).symlink_to(program)
    for link in ("bin", "sbin", "lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    out.mkdir()
    with tarfile.open(out / "layer.tar", "w") as layer:
        layer.add(root, ".")
    digest = hashlib.sha256((out / "layer.tar").read_bytes()).hexdigest()
    environment = ["PATH=/opt/fgpu:/usr/sbin:/usr/bin:/sbin:/bin"]
    config = {"architecture": "amd64", "os": "linux", "config": {"Env": environment, "Entrypoint": ["fgpu"]}}
    config["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    (out / "config.json").write_text(json.dumps(config))
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with tarfile.open(work / "thin.tar", "w") as archive:
        for file in ("manifest.json", "config.json", "layer.tar"):
            archive.add(out / file, file)
    return work / "thin.tar"
