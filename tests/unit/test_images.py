"""Tests of deploy/images: bake builds each image for which NVIDIA has a base, and the documentation names no other."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import hcl2

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "deploy/images"
UBUNTU, CUDA = ("20", "22", "24"), ("11.1", "11.7", "12.3", "13.0")
NEVER = {"u20-cu13.0", "u22-cu11.1", "u24-cu11.1", "u24-cu11.7", "u24-cu12.3"}  # NVIDIA publishes no base image
TAG = re.compile(r"(?<!\w)u\d+-cu[\d.]+(?=-\d+gb)")


def bases() -> dict[str, str]:
    """Return NVIDIA's tag of each image, such as `u22-cu12.3`."""
    (target,) = hcl2.loads((IMAGES / "docker-bake.hcl").read_text())["target"]
    rows = [{k: json.loads(v) for k, v in row.items()} for row in target['"image"']["matrix"]["base"]]
    return {f"u{row['ubuntu']}-cu{row['cuda']}": row["tag"] for row in rows}


def test_every_combination_of_ubuntu_and_cuda_is_built_or_has_no_base_image():
    assert set(bases()) | NEVER == {f"u{ubuntu}-cu{cuda}" for ubuntu, cuda in itertools.product(UBUNTU, CUDA)}
    assert not set(bases()) & NEVER
    for name, tag in bases().items():
        ubuntu, cuda = name[1:].split("-cu")
        assert re.fullmatch(rf"{re.escape(cuda)}\.\d-runtime-ubuntu{ubuntu}\.04", tag), (name, tag)


def test_the_default_base_of_the_dockerfile_is_a_base_of_bake():
    (base,) = re.findall(r"^ARG BASE=nvidia/cuda:(\S+)$", (IMAGES / "Dockerfile").read_text(), re.M)
    assert base in bases().values()


def test_examples_and_documentation_name_only_images_that_are_built():
    examples = sorted((IMAGES / "examples").iterdir())
    assert len(examples) == 3
    for file in (*examples, ROOT / "docs/clearml.md", ROOT / "docs/containers.md"):
        named = set(TAG.findall(file.read_text()))
        assert named
        assert named <= set(bases()), file


def test_the_clearml_page_names_an_equivalent_and_its_base_for_four_images():
    """ClearML's README names these four images."""
    text = (ROOT / "docs/clearml.md").read_text()
    for name in ("u22-cu12.3", "u20-cu12.3", "u22-cu11.7", "u20-cu11.1"):
        assert f"`{name}-12gb`, `-8gb`, `-4gb`, `-2gb`" in text
        assert f"nvidia/cuda:{bases()[name]}" in text
