"""The claims `lookups`, `hidden`, `sandbox`, `contexts` and `entries`: limits of unusual programs and containers.

The programs are those of the end-to-end tests; here they use the real driver.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import time
from pathlib import Path

from bench.gpu.claims import GRANULE, PYTHON, need, say
from bench.gpu.runtimes import OUT_OF_MEMORY, RUNTIME, installed
from bench.lib import nvml
from tests.e2e.bypass_kit import Bypass
from tests.support.commands import fgpu
from tests.support.host import BUILD, DRIVER_ROOT, GIB, KIB, MIB, REFUSED, ROOT
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Tenant

LIMIT = 2 * GIB
ALLOCATIONS = 262_144  # the most that one workload can have, by default
PLUGINS = {  # name: (how the plugin is opened, the flags with which it is compiled)
    "plain": ("plain", []),
    "deep-bound": ("deep", []),
    "deep-bound, opens the driver": ("deep", ["-DOPENS"]),
    "deep-bound, next definition": ("deep", ["-DNEXT"]),
    "next definition": ("plain", ["-DNEXT"]),
}
CONTEXTS = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: contexts}}
spec: {{selector: {{cgroup: ["{path}"]}}, memory: {{limit: {limit}B, contexts: 1}}}}
"""
DENY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: deny}}
spec: {{selector: {{cgroup: ["{path}"]}}, memory: {{limit: {limit}B}}, onBypass: deny}}
"""
NO_DEVICE = "CUDA_ERROR_100"
STOCK = {  # name: (the module, a program that uses the device)
    "torch": ("torch", "x = torch.rand(512, 512, device='cuda'); (x @ x).sum().item()"),
    "jax": ("jax", "import jax.numpy; x = jax.numpy.ones((512, 512)); (x @ x).block_until_ready()"),
    "cupy": ("cupy", "x = cupy.ones((512, 512)); float((x @ x).sum())"),
    "numba": ("numba.cuda", "numba.cuda.to_device([1.0, 2.0]).copy_to_host()"),
}
DEEP = RUNTIME.replace("ctypes.CDLL(sys.argv[1])", "ctypes.CDLL(sys.argv[1], os.RTLD_NOW | os.RTLD_DEEPBIND)")


def _compiled(out: Path, flags: list[str]) -> Path:
    source, headers = ROOT / "tests/programs/opener.c", BUILD / "headers"
    subprocess.run(["gcc", "-std=gnu11", "-w", f"-I{headers}", "-o", out, source, *flags], check=True, timeout=60)
    return out


def _driver() -> str:
    """Return the path of libcuda that the dynamic loader finds."""
    said = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    return next(line.split()[-1] for line in said.splitlines() if line.split()[:1] == ["libcuda.so.1"])


def lookups(service: Service, place: Place) -> None:
    """Check the limit of programs that look up the driver in ways that do not use the shim's exports."""
    for name, (mode, flags) in PLUGINS.items():
        one = place.tenant(LIMIT)
        opener = _compiled(one.folder / "opener", ["-ldl"])
        plugin = _compiled(
            one.folder / "plugin.so", ["-shared", "-fPIC", "-DPLUGIN", *flags, "-Wl,--no-as-needed", _driver()]
        )
        client = one.client(f"{mode} {plugin}", program=opener)
        need(client.do(f"alloc {100 * MIB}").startswith("ok"), f"{name}: memory within the limit")
        free, total = client.ok("info")
        need(total == LIMIT, f"{name}: shows {LIMIT} bytes")
        need(client.do(f"alloc {free + GRANULE}") == f"CUDA_ERROR_{OUT_OF_MEMORY}", f"{name}: no memory beyond it")
        need(client.do(f"alloc {free}").startswith("ok"), f"{name}: all of the rest")
        need(one.memory()["peak_bytes"] <= LIMIT, f"{name}: peak within the limit")
        place.end(one)
    one = place.tenant(LIMIT)
    (one.folder / "deep.py").write_text(DEEP)
    if not (runtimes := installed()):
        say("lookups_runtime", "absent")
    for path in runtimes:
        said = [int(word) for word in one.run(f"{shutil.which('python3')} deep.py {path}", 60).split()]
        need(said[1:] == [LIMIT, 0, OUT_OF_MEMORY], f"{Path(path).name}, deep-bound: {said}")


def hidden(service: Service, place: Place) -> None:
    """Check that a program gets no memory if its /run is hidden, and that `fgpu doctor` names the mount."""
    one = place.tenant(LIMIT)
    (one.folder / "sandbox").write_text('mount -t tmpfs none /run\nexec "$@"\n')
    client = one.client(before=f"unshare -m sh -e {one.folder}/sandbox")
    need(client.do("context") == REFUSED, "no memory where /run is hidden")
    need(client.do(f"alloc {GRANULE}") == REFUSED, "still none at the second request")
    need(nvml.bytes_of({client.pid}) == 0, "the process holds no memory")
    need("is hidden from this program" in client.complaints(), "the program's stderr has the reason")
    service.kill_agent()
    service.start_agent()
    checks = json.loads(fgpu("doctor", "--json", "--driver-root", DRIVER_ROOT, check=False).stdout)
    found = next(check["found"] for check in checks if check["name"] == "mounts")
    need("a mount hides /run/fgpu/shim" in found, f"fgpu doctor: {found}")


def sandbox(service: Service, place: Place) -> None:
    """Fill the limit of a program in a sandbox that refuses sockets: the program registers by a probe."""
    one = place.tenant(LIMIT)
    client = one.client(before=f"{BUILD}/e2e/sandboxed {errno.EAFNOSUPPORT}")
    client.ok("context")
    free, total = client.ok("info")
    need(total == LIMIT, f"shows {LIMIT} bytes")
    need(client.do(f"alloc {free}").startswith("ok"), "all of the rest")
    need(client.do(f"alloc {GRANULE}") == REFUSED, "no memory beyond it")
    need(one.memory()["used_bytes"] == LIMIT, "the ledger has the whole limit")
    need(client.complaints() == "", "nothing on the program's stderr")


def _under(service: Service, place: Place, policy: str) -> Tenant:
    """Return a new tenant under a policy, instead of the limit that it was started with."""
    one = place.tenant(LIMIT)
    one.assert_enforced()
    fgpu("unset", one.path)
    (service.policies / "policy.yaml").write_text(policy.format(path=one.path, limit=LIMIT))
    fgpu("reload")
    one.assert_enforced()
    return one


def contexts(service: Service, place: Place) -> None:
    """Fill the limit of a tenant with `memory.contexts: 1`, which sees all of it as free memory."""
    one = _under(service, place, CONTEXTS)
    client = one.client()
    client.ok("context")
    free, total = client.ok("info")
    need(free == total == LIMIT, f"shows {LIMIT} bytes, all free: {free}, {total}")
    need(client.do(f"alloc {LIMIT}").startswith("ok"), "gets all of them")
    need(nvml.bytes_of({client.pid}) > LIMIT, "the context is in addition")
    say("beyond", one.memory()["limit_bytes"] - one.memory()["used_bytes"], "bytes left")


def deny(service: Service, place: Place) -> None:
    """Run stock programs under `onBypass: deny`. Without the shim, libcuda and NVML get no device."""
    one = _under(service, place, DENY)
    table = one.run("nvidia-smi")
    need(f"/ {LIMIT // MIB:6d}MiB" in table, f"nvidia-smi shows {LIMIT // MIB} MiB")
    for name, (module, program) in STOCK.items():
        if subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, timeout=120, check=False).returncode:
            say(name, "absent")
            continue
        (one.folder / f"{name}_.py").write_text(f"import {module}\n{program}\nprint('ran')\n")
        said = one.run(f"env XLA_PYTHON_CLIENT_PREALLOCATE=false {PYTHON} {name}_.py", 120)
        need(said.split()[-1:] == ["ran"], f"{name} runs: {said[-300:]}")
    client = Bypass(one, "bypass", f"{BUILD}/e2e/bypass symbols")
    need(client.do(f"alloc {GRANULE}").startswith(NO_DEVICE), "around the shim, cuInit finds no device")
    need("denied" in fgpu("events", "--json").stdout, "`fgpu events` has the refused opens")


def entries(service: Service, place: Place) -> None:
    """Fill a tenant with as many small allocations as one workload can have, and free them."""
    one = place.tenant(60 * GIB)
    client = one.client()
    client.ok("context")
    begun = time.monotonic()
    made = client.ok(f"fill {64 * KIB} 0", 300)[0]
    say("small_allocations", made)
    say("each", f"{(time.monotonic() - begun) / made * 1e6:.2f}", "us")
    need(ALLOCATIONS - 1024 < made <= ALLOCATIONS, f"{made} of {ALLOCATIONS} allocations are granted")
    need(one.memory()["used_bytes"] < 60 * GIB, "the limit has room left")
    need("too many allocations" in client.complaints(), "the program's stderr has the reason")
    need(client.do(f"drop {made}", 300).startswith("ok"), "all are freed")
    need(client.do(f"alloc {GRANULE}").startswith("ok"), "one more is granted after that")
