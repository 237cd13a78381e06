"""Deep-bound plugins and wrappers look up driver functions past the shim's exports. The limit holds in all cases."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.host import BUILD, CONTEXT, MIB, SHIM, SIM

LIMIT = CONTEXT + 400 * MIB
OUT_OF_MEMORY = "CUDA_ERROR_2"
LINKED = ("-Wl,--no-as-needed", f"-L{SIM}/lib", "-l:libcuda.so.1")

WAYS = {  # how the plugin is opened, the plugin, the preloaded wrapper
    "plain": ("plain", ("-DPLUGIN", *LINKED), ()),
    "deep-bound": ("deep", ("-DPLUGIN", *LINKED), ()),
    "deep-bound, opens the driver": ("deep", ("-DPLUGIN", "-DOPENS"), ()),
    "deep-bound, what follows": ("deep", ("-DPLUGIN", "-DNEXT", *LINKED), ()),
    "what follows": ("plain", ("-DPLUGIN", "-DNEXT", *LINKED), ()),
    "preloaded wrapper": ("plain", ("-DPLUGIN", *LINKED), ("-DWRAPPER",)),
}


def library(out: Path, flags: tuple[str, ...]) -> Path:
    source = Path(__file__).parents[1] / "programs/opener.c"
    command = ["gcc", "-std=gnu11", "-shared", "-fPIC", "-w", f"-I{BUILD}/headers", "-o", out, source, *flags]
    subprocess.run(command, check=True, timeout=60)
    return out


@pytest.mark.places("host", "runc")
@pytest.mark.parametrize("way", WAYS)
def test_the_limit_is_exact_for_every_way_to_look_up_the_driver(tenant, way: str) -> None:
    mode, flags, wrapper = WAYS[way]
    one = tenant(LIMIT)
    one.assert_enforced()
    before = f"env LD_PRELOAD={library(one.folder / 'wrapper.so', wrapper)}:{SHIM}" if wrapper else ""
    plugin = library(one.folder / "plugin.so", flags)
    client = one.client(f"{mode} {plugin}", before, BUILD / "e2e/opener")
    assert client.do(f"alloc {100 * MIB}").startswith("ok")
    assert client.do(f"alloc {301 * MIB}") == OUT_OF_MEMORY
    assert one.memory()["refused"] == 1
    assert client.ok("info") == [300 * MIB, LIMIT]
    assert client.do(f"alloc {300 * MIB}").startswith("ok")
    assert one.assert_exact() == LIMIT
    assert client.do(f"alloc {2 * MIB}") == OUT_OF_MEMORY
    assert client.ok("calls") == [4 if wrapper else 0]
    memory = one.memory()
    assert memory["peak_bytes"] <= LIMIT
    assert memory["admitted_bytes"] == memory["witnessed_bytes"] == 400 * MIB
