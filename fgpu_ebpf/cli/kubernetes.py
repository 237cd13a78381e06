"""`fgpu device-plugin` and `fgpu dra-driver`: offer this host's shares to Kubernetes, as resources or as devices.

The device plugin and the DRA driver run in the processes of these commands. Every option except --log-format can also
be set by an environment variable. Only the agent reads the host's settings. The exit codes are 0 (ended by a signal), 1
(a failure) and 2 (wrong usage).
"""

from __future__ import annotations

from pathlib import Path

import click

from fgpu_ebpf.cli.help_texts import examples
from fgpu_ebpf.cli.request import fail, run_dir

FOLDER = Path("/var/lib/kubelet/device-plugins")
_WAYS = ["cdi-cri", "cdi-annotations", "mounts"]
_GPUS = ["auto", "cdi", "envvar", "none"]
KUBELET, CDI = Path("/var/lib/kubelet"), Path("/var/run/cdi")
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@examples("fgpu device-plugin", "fgpu device-plugin --device-list-strategy mounts")
@click.command("device-plugin")
@click.option("--kubelet-dir", type=click.Path(path_type=Path), default=FOLDER, show_default=True, envvar="KUBELET_DIR",
                            help="Folder of kubelet.sock.")  # fmt: skip
@click.option("--device-list-strategy", type=click.Choice(_WAYS), default="cdi-cri", show_default=True,
              envvar="DEVICE_LIST_STRATEGY", help="How a container gets its share.")  # fmt: skip
@click.option("--gpu-strategy", type=click.Choice(_GPUS), default="auto", show_default=True, envvar="GPU_STRATEGY",
                            help="How a container gets the GPU itself.")  # fmt: skip
@click.option("--cdi-dir", "folders", type=click.Path(path_type=Path), multiple=True, envvar="CDI_DIRS",
                            help="Folder of NVIDIA's CDI specification (default: /etc/cdi, /var/run/cdi).")  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(["text", "json", "journal"]), help="Default: journal under systemd, else text."
)
def device_plugin(
    kubelet_dir: Path, device_list_strategy: str, gpu_strategy: str, folders: tuple[Path, ...], log_format: str | None
) -> None:
    """Offer this host's profiles to kubelet, as resources such as fgpu.dev/8gib-50pct."""
    from fgpu_ebpf.kubernetes import device_plugin
    from fgpu_ebpf.kubernetes.allocation import CDI_FOLDERS, Gpus, Strategy, Way
    from fgpu_ebpf.linux import logs

    logs.configure(logs.Format(log_format) if log_format else None)
    way = Way(Strategy(device_list_strategy), Gpus(gpu_strategy), folders or CDI_FOLDERS)
    try:
        device_plugin.serve(device_plugin.Options(run_dir(), kubelet_dir, way))
    except device_plugin.PluginError as error:
        fail(str(error), 1)


@examples("fgpu dra-driver --node-name node-1", "fgpu dra-driver --node-name node-1 --gpu-strategy none")
@click.command("dra-driver")
@click.option("--node-name", required=True, envvar="NODE_NAME", help="Name of this node in Kubernetes.")
@click.option("--kubelet-dir", type=click.Path(path_type=Path), default=KUBELET, show_default=True,
              envvar="KUBELET_DIR", help="Folder of kubelet's data.")  # fmt: skip
@click.option("--gpu-strategy", type=click.Choice(_GPUS), default="auto", show_default=True, envvar="GPU_STRATEGY",
                            help="How a container gets the GPU itself.")  # fmt: skip
@click.option("--device", "devices", multiple=True, envvar="DEVICES",
              help="Index, UUID or model of a GPU to publish; may be repeated (default: every GPU).")  # fmt: skip
@click.option("--cdi-dir", "folders", type=click.Path(path_type=Path), multiple=True, envvar="CDI_DIRS",
                            help="Folder of NVIDIA's CDI specification (default: /etc/cdi, /var/run/cdi).")  # fmt: skip
@click.option("--claims-dir", type=click.Path(path_type=Path), default=CDI, show_default=True, envvar="CLAIMS_DIR",
                            help="Folder for the CDI specifications of claims.")  # fmt: skip
@click.option("--service-account", type=click.Path(path_type=Path), default=ACCOUNT, show_default=True,
              envvar="SERVICE_ACCOUNT", help="Folder with token and ca.crt for the API server.")  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(["text", "json", "journal"]), help="Default: journal under systemd, else text."
)
def dra_driver(
    node_name: str, kubelet_dir: Path, gpu_strategy: str, devices: tuple[str, ...], folders: tuple[Path, ...],
    claims_dir: Path, service_account: Path, log_format: str | None,
) -> None:  # fmt: skip
    """Serve kubelet as the DRA driver gpu.fgpu.dev: any size of memory and compute, from ResourceClaims."""
    from fgpu_ebpf.kubernetes import dra_driver
    from fgpu_ebpf.kubernetes.allocation import CDI_FOLDERS, Gpus, Way
    from fgpu_ebpf.kubernetes.claim_files import ClaimFiles
    from fgpu_ebpf.linux import logs
    from fgpu_ebpf.policy.device_choice import device_choice

    logs.configure(logs.Format(log_format) if log_format else None)
    try:
        choices = tuple(map(device_choice, devices))
    except ValueError as error:
        fail(f"--device: {error}", 2)
    way, files = Way(gpus=Gpus(gpu_strategy), folders=folders or CDI_FOLDERS), ClaimFiles(claims_dir)
    try:
        dra_driver.serve(dra_driver.Options(node_name, run_dir(), kubelet_dir, service_account, files, way, choices))
    except dra_driver.DriverError as error:
        fail(str(error), 1)
