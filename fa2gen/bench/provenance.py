"""On what: the GPU, its clocks and the versions that a figure depends on. Settings are read, never changed."""

from __future__ import annotations

import subprocess
from importlib import import_module
from typing import Any

from fa2gen._version import __version__
from fa2gen.compile import compiler_version
from fa2gen.gpus import current_device

__all__ = ["clocks", "gpu_facts", "versions"]

_QUERY = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}


def gpu_facts() -> dict[str, Any]:
    """Name and SM count of torch's current device, and its driver."""
    device = current_device()
    return {
        "gpu": device.name,
        "compute_capability": "{}.{}".format(*device.compute_capability),
        "num_sms": device.num_sms,
        "driver": clocks().get("driver"),
    }


def clocks() -> dict[str, Any]:
    """What nvidia-smi says of torch's current device at this moment; empty where it says nothing."""
    torch = import_module("torch")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    if uuid := getattr(properties, "uuid", None):
        command.append(f"--id=GPU-{uuid}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse(done.stdout)


def parse(line: str) -> dict[str, Any]:
    """One line of nvidia-smi's CSV, as numbers where they are numbers."""
    found: dict[str, Any] = {}
    for name, text in zip(_QUERY.values(), (cell.strip() for cell in line.splitlines()[0].split(",")), strict=True):
        try:
            found[name] = float(text) if name != "driver" else text
        except ValueError:  # "[N/A]"
            found[name] = None
    return found


def versions() -> dict[str, Any]:
    """Of everything that decides a figure beside the GPU."""
    torch = import_module("torch")
    return {
        "fa2gen": __version__,
        "nvrtc": compiler_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _dotted(torch.backends.cudnn.version()),
    }


def _dotted(cudnn: int | None) -> str | None:
    """91900 -> "9.19.0"."""
    return None if cudnn is None else f"{cudnn // 10_000}.{cudnn // 100 % 100}.{cudnn % 100}"
