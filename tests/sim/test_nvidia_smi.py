"""The output of the simulated nvidia-smi equals that of the real tool."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from xml.etree import ElementTree

from .conftest import Machine, say


def test_nvidia_smi_prints_the_table_of_the_real_tool(machine: Machine, holder: Popen[str]) -> None:
    """Each column is at the place where the real tool has it, compared with lines that the real tool printed."""
    lines = machine.run(machine.tools / "nvidia-smi").stdout.splitlines()
    assert "| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |" in lines
    assert "|   0  NVIDIA H200                    On  |   00000000:00:06.0 Off |                    0 |" in lines
    assert "| N/A   33C    P0             83W /  700W |     627MiB / 143771MiB |      0%      Default |" in lines
    assert "|                                         |                        |             Disabled |" in lines
    process = [line for line in lines if " C   " in line]
    assert re.fullmatch(rf"\|    0   N/A  N/A {holder.pid:>15}      C   .{{36}}    618MiB \|", process[0])
    assert {len(line) for line in lines[1:] if line} == {91}


def test_nvidia_smi_prints_an_idle_device(machine: Machine) -> None:
    text = machine.run(machine.tools / "nvidia-smi").stdout
    assert "|       0MiB / 143771MiB |" in text
    assert "|  No running processes found                                                             |" in text


def test_nvidia_smi_answers_queries(machine: Machine, holder: Popen[str]) -> None:
    smi = machine.tools / "nvidia-smi"
    uuid = machine.dump()["devices"][0]["uuid"]
    assert machine.run(smi, "-L").stdout == f"GPU 0: NVIDIA H200 (UUID: {uuid})\n"
    fields = "index,name,uuid,memory.total,memory.used,memory.free,driver_version,pci.bus_id,utilization.gpu"
    assert machine.run(smi, f"--query-gpu={fields}", "--format=csv").stdout.splitlines() == [
        "index, name, uuid, memory.total [MiB], memory.used [MiB], memory.free [MiB], driver_version, pci.bus_id, "
        "utilization.gpu [%]",
        f"0, NVIDIA H200, {uuid}, 143771 MiB, 627 MiB, 142530 MiB, 580.159.04, 00000000:00:06.0, 0 %",
    ]
    bare = machine.run(smi, "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits").stdout
    assert bare == "0, NVIDIA H200, 143771, 627\n"
    processes = machine.run(smi, "--query-compute-apps=pid,used_memory,process_name,gpu_uuid", "--format=csv").stdout
    assert processes.splitlines() == [
        "pid, used_gpu_memory [MiB], process_name, gpu_uuid",
        f"{holder.pid}, 618 MiB, {sys.executable}, {uuid}",
    ]
    wrong = machine.run(smi, "--query-gpu=bogus", "--format=csv", check=False)
    assert (wrong.returncode, wrong.stdout) == (2, 'Field "bogus" is not a valid field to query.\n\n')
    assert machine.run(smi, "--bogus", check=False).returncode == 255


def full(machine: Machine, *words: str) -> list[str]:
    return machine.run(machine.tools / "nvidia-smi", "-q", *words).stdout.splitlines()


def test_nvidia_smi_q_prints_the_list_of_the_real_tool(machine: Machine, holder: Popen[str]) -> None:
    """Label, colon and value are at the places where the real tool has them."""
    lines = full(machine)
    assert lines[:2] == ["", "==============NVSMI LOG=============="]
    start = lines.index("    FB Memory Usage")
    assert lines[start + 1 : start + 13] == [
        "        Total                             : 143771 MiB",
        "        Reserved                          : 616 MiB",
        "        Used                              : 627 MiB",
        "        Free                              : 142530 MiB",
        "    BAR1 Memory Usage",
        "        Total                             : 262144 MiB",
        "        Used                              : 1 MiB",
        "        Free                              : 262143 MiB",
        "    Conf Compute Protected Memory Usage",
        "        Total                             : 0 MiB",
        "        Used                              : 0 MiB",
        "        Free                              : 0 MiB",
    ]
    assert lines[lines.index("    Processes") :] == [
        "    Processes",
        "        GPU instance ID                   : N/A",
        "        Compute instance ID               : N/A",
        f"        Process ID                        : {holder.pid}",
        "            Type                          : C",
        f"            Name                          : {sys.executable}",
        "            Used GPU Memory               : 618 MiB",
        "",
    ]
    for line in (
        "Attached GPUs                             : 1",
        "GPU 00000000:00:06.0",
        "    Product Architecture                  : Hopper",
        "    Persistence Mode                      : Enabled",
        "    Display Active                        : Disabled",
        "    Fan Speed                             : N/A",
        "        Bus Id                            : 00000000:00:06.0",
    ):
        assert line in lines


def test_nvidia_smi_q_d_prints_parts_of_the_list(machine: Machine) -> None:
    lines = full(machine, "-d", "MEMORY,PIDS")
    assert [line for line in lines if re.match("    [A-Z]", line)] == [
        "    FB Memory Usage",
        "    BAR1 Memory Usage",
        "    Conf Compute Protected Memory Usage",
        "    Processes                             : None",
    ]
    assert machine.run(machine.tools / "nvidia-smi", "-q", "-d", "BOGUS", check=False).returncode == 255


def test_nvidia_smi_prints_valid_xml(machine: Machine) -> None:
    """The XML has the same numbers. Names that a process chose for itself cannot break it."""
    name = "a<b>&'\"c\x1b"
    script = "start(); alloc(100 << 20); say('up'); wait()"
    with machine.spawn(
        script, prefix=["env", f"PYTHONHOME={sys.base_prefix}", "bash", "-c", 'exec -a "$0" "$@"', name]
    ) as client:
        assert client.stdout is not None
        client.stdout.readline()
        text = machine.run(machine.tools / "nvidia-smi", "-x", "-q").stdout
        assert text.startswith('<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n')
        log = ElementTree.fromstring(text)
        assert log.findtext("attached_gpus") == "1"
        gpu = log.find("gpu")
        assert gpu is not None
        assert gpu.get("id") == "00000000:00:06.0"
        memory = {part.tag: part.text for part in gpu.findall("fb_memory_usage/*")}
        assert memory == {"total": "143771 MiB", "reserved": "616 MiB", "used": "627 MiB", "free": "142530 MiB"}
        process = {part.tag: part.text for part in gpu.findall("processes/process_info/*")}
        assert process == {
            "gpu_instance_id": "N/A",
            "compute_instance_id": "N/A",
            "pid": str(client.pid),
            "type": "C",
            "process_name": name.replace("\x1b", "?"),
            "used_memory": "618 MiB",
        }
        assert [gpu.findtext(path) for path in ("uuid", "mig_mode/current_mig", "ecc_mode/current_ecc")] == [
            machine.dump()["devices"][0]["uuid"],
            "Disabled",
            "Enabled",
        ]
        client.kill()


def test_nvidia_smi_pmon_prints_processes(machine: Machine) -> None:
    smi = machine.tools / "nvidia-smi"
    heading = [
        "# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command ",
        "# Idx           #    C/G      %      %      %      %      %      %    name ",
    ]
    name = Path(sys.executable).name
    idle = "    0          -     -      -      -      -      -      -      -    -              "
    assert machine.run(smi, "pmon", "-c", "1").stdout.splitlines() == [*heading, idle]
    with machine.spawn("start(); say('up'); wait(); launch(kernel('spin_9000000us')[1]); say('up'); wait()") as client:
        assert client.stdout is not None
        client.stdout.readline()
        assert machine.run(smi, "pmon", "-c", "1").stdout.splitlines() == [
            *heading,
            f"    0 {client.pid:>10}     C      -      -      -      -      -      -    {name:<15.15}",
        ]
        say(client)
        client.stdout.readline()
        time.sleep(1.2)  # the figures are those of the last second
        assert machine.run(smi, "pmon", "-c", "1").stdout.splitlines()[2].split()[3:5] == ["100", "0"]
        assert machine.run(smi, "pmon", "-c", "1", "-d", "1", "-s", "um").stdout.splitlines() == [
            "# gpu         pid   type     sm    mem    enc    dec    jpg    ofa     fb   ccpm    command ",
            "# Idx           #    C/G      %      %      %      %      %      %     MB     MB    name ",
            f"    0 {client.pid:>10}     C    100      0      -      -      -      -    518      0    {name:<15.15}",
        ]
        assert machine.run(smi, "pmon", "-c", "1", "-s", "m").stdout.splitlines()[:2] == [
            "# gpu         pid   type     fb   ccpm    command ",
            "# Idx           #    C/G     MB     MB    name ",
        ]
        assert machine.run(smi, "pmon", "-c", "1", "-s", "x", check=False).returncode == 255
        client.kill()


def test_nvidia_smi_selects_devices(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(FGPU_SIM_GPUS="3")
    smi = machine.tools / "nvidia-smi"
    uuid = machine.dump()["devices"][1]["uuid"]
    for words in (["-i", "1"], ["--id=1"], ["-i", str(uuid)], ["-i", "00000000:00:07.0"]):
        text = machine.run(smi, *words, "--query-gpu=index,count,uuid", "--format=csv,noheader").stdout
        assert text == f"1, 3, {uuid}\n"
    assert machine.run(smi, "-i", "2,0", "-L").stdout.count("GPU ") == 2
    missing = machine.run(smi, "-i", "7", check=False)
    assert (missing.returncode, missing.stdout) == (6, "No devices were found\n")


def test_nvidia_smi_supports_further_query_fields(machine: Machine) -> None:
    smi = machine.tools / "nvidia-smi"
    fields = {
        "pstate": "P0",
        "power.draw [W]": "83.00 W",
        "power.limit [W]": "700.00 W",
        "power.min_limit [W]": "200.00 W",
        "clocks.current.sm [MHz]": "1980 MHz",
        "clocks.max.memory [MHz]": "3201 MHz",
        "fan.speed [%]": "[N/A]",
        "temperature.memory": "[N/A]",
        "compute_cap": "9.0",
        "compute_mode": "Default",
        "persistence_mode": "Enabled",
        "mig.mode.current": "Disabled",
        "ecc.errors.uncorrected.volatile.total": "0",
        "serial": "1653924184814",
        "pcie.link.width.max": "16",
        "utilization.memory [%]": "0 %",
    }
    names = ",".join(field.split(" ")[0] for field in fields)
    head, row = machine.run(smi, f"--query-gpu={names}", "--format=csv").stdout.splitlines()
    assert dict(zip(head.split(", "), row.split(", "), strict=True)) == fields
    short = machine.run(smi, "--query-gpu=timestamp,clocks.gr", "--format=csv,noheader,nounits").stdout
    assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{3}, 1980\n", short)


def test_nvidia_smi_resolves_nvml_functions_by_dlsym(machine: Machine) -> None:
    """A preloaded library that replaces dlsym can therefore change every number that nvidia-smi prints."""
    needed = subprocess.run(["readelf", "-d", machine.tools / "nvidia-smi"], check=True, capture_output=True, text=True)
    symbols = subprocess.run(["nm", "-D", machine.tools / "nvidia-smi"], check=True, capture_output=True, text=True)
    assert "nvidia-ml" not in needed.stdout
    assert "nvml" not in symbols.stdout.replace("nvmlx", "")
    assert "U dlsym" in symbols.stdout
