"""What is on this machine, and which kernels fa2gen will use here: the facts behind `fa2gen doctor`.

Nothing here raises because something is missing: that is what the report says. torch and cuda are imported inside the
functions that ask them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, get_args

import fa2gen
from fa2gen import _paths, env

__all__ = ["lines", "report"]


def report() -> dict[str, Any]:
    """Everything, as JSON has it. `problems` is what keeps fa2gen from building kernels, or from running them here."""
    compiler, driver, torch = _compiler(), _driver(), _torch()
    cache = _cache()
    gpus = driver["gpus"]
    kernels = list(_kernels(gpus))
    problems = [f"compiler: {compiler['error']}"] if compiler["error"] else []
    if gpus and torch["error"]:
        problems.append(f"torch: {torch['error']}")
    problems += dict.fromkeys(kernel["reason"] for kernel in kernels if kernel["name"] is None)
    problems += [f"cache: {cache['error']}"] if cache["error"] else []
    problems += [f"{name} is no variable of fa2gen's: misspelt?" for name in env.unknown()]
    return {
        "fa2gen": {
            "version": fa2gen.__version__,
            "location": str(Path(fa2gen.__file__).parent),
            "installed": "checkout" if _paths.in_checkout() else "wheel",
            "python": platform.python_version(),
        },
        "compiler": compiler,
        "driver": driver,
        "torch": torch,
        "cache": cache,
        "environment": {variable.name: variable.text() for variable in env.VARIABLES},
        "kernels": kernels,
        "problems": problems,
    }


def lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A report as (label, text) for a person."""
    package, compiler, driver, torch = (found[part] for part in ("fa2gen", "compiler", "driver", "torch"))
    yield (
        "fa2gen",
        f"{package['version']} ({package['installed']} in {package['location']}), Python {package['python']}",
    )
    yield (
        "compiler",
        f"NVRTC {compiler['nvrtc'] or 'missing'}, "
        + ", ".join(
            f"{name} {compiler[name] or 'missing'}" for name in ("nvidia-cuda-nvrtc", "cuda-core", "cuda-bindings")
        ),
    )
    yield "driver", f"CUDA {driver['version']}" if driver["version"] else f"none: {driver['error']}"
    for gpu in driver["gpus"]:
        yield (
            f"GPU {gpu['index']}",
            (
                f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} SMs, "
                f"{gpu['memory_bytes'] / 2**30:.1f} GiB: {gpu['kernels'] or 'no'} kernels"
            ),
        )
    yield "torch", ": ".join(filter(None, (torch["version"], torch["error"])))
    cache = found["cache"]
    yield "cache", f"{cache['dir']}: {cache['kernels']} kernels, {cache['bytes']:,} B"
    for name, value in found["environment"].items():
        if value is not None:
            yield name, value
    for index, kernel in enumerate(found["kernels"]):
        problem = f"{kernel['device']}: {kernel['problem']}"
        yield "" if index else "kernels", f"{problem:<47}  {kernel['name'] or 'none'}  ({kernel['reason']})"
    for index, problem in enumerate(found["problems"] or ["none"]):
        yield "" if index else "problems", problem


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _compiler() -> dict[str, Any]:
    """NVRTC, asked itself: the package may be there and its library not load."""
    found: dict[str, Any] = {
        "nvrtc": None,
        "nvidia-cuda-nvrtc": _package("nvidia-cuda-nvrtc"),
        "cuda-core": _package("cuda-core"),
        "cuda-bindings": _package("cuda-bindings"),
        "error": None,
    }
    try:
        status, major, minor = import_module("cuda.bindings.nvrtc").nvrtcVersion()
        found["nvrtc"] = f"{major}.{minor}"
        found["error"] = None if int(status) == 0 else f"NVRTC answers {status.name}"
    except (ImportError, OSError, RuntimeError) as error:
        found["error"] = f"NVRTC does not load: {error}"
    return found


def _driver() -> dict[str, Any]:
    """The NVIDIA driver and its GPUs, through the driver's own interface: no context is made."""
    found: dict[str, Any] = {"version": None, "gpus": [], "error": None}
    try:
        cuda = import_module("cuda.bindings.driver")

        def ask(answer: tuple[Any, ...]) -> Any:
            status, *values = answer
            if int(status) != 0:
                raise RuntimeError(f"the driver answers {status.name}")
            return values[0] if values else None

        attribute = cuda.CUdevice_attribute
        ask(cuda.cuInit(0))
        number = ask(cuda.cuDriverGetVersion())
        found["version"] = f"{number // 1000}.{number % 1000 // 10}"
        for index in range(ask(cuda.cuDeviceGetCount())):
            device = ask(cuda.cuDeviceGet(index))

            def value(name: str, device: Any = device) -> int:
                return int(ask(cuda.cuDeviceGetAttribute(getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device)))

            found["gpus"].append(
                {
                    "index": index,
                    "name": ask(cuda.cuDeviceGetName(256, device)).split(b"\0")[0].decode(),
                    "compute_capability": [value("COMPUTE_CAPABILITY_MAJOR"), value("COMPUTE_CAPABILITY_MINOR")],
                    "multiprocessors": value("MULTIPROCESSOR_COUNT"),
                    "memory_bytes": int(ask(cuda.cuDeviceTotalMem(device))),
                    "shared_memory_per_block": value("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
                }
            )
    except (ImportError, OSError, RuntimeError) as error:
        found["error"] = str(error)
    return found


def _torch() -> dict[str, Any]:
    found: dict[str, Any] = {"version": None, "cuda": None, "error": None}
    try:
        torch = import_module("torch")
    except (ImportError, OSError) as error:
        found["error"] = f"not importable: {error}"
        return found
    found["version"], found["cuda"] = torch.__version__, torch.version.cuda
    if not torch.cuda.is_available():
        found["error"] = "sees no GPU" if torch.version.cuda else "is a build without CUDA"
    return found


def _cache() -> dict[str, Any]:
    """The kernel cache: where, how much, and whether it can be written."""
    from fa2gen.store import Store

    store = Store()
    kernels, size = len(store.list()), store.size()  # an unusable cache says why in the log
    existing = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
    error = (
        None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable: every process compiles anew"
    )
    return {"dir": str(store.root), "kernels": kernels, "bytes": size, "error": error}


def _kernels(gpus: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What will be used for the usual head dims on each GPU; where there is none, on one of each family. Passes that
    the family has no kernels for are left out."""
    from fa2gen.arch import ARCHES
    from fa2gen.errors import Fa2GenError
    from fa2gen.plan import directions
    from fa2gen.select import Device, kernel_arch, select
    from fa2gen.spec import Mask, Problem

    devices = [
        Device(gpu["name"], tuple(gpu["compute_capability"]), gpu["shared_memory_per_block"], gpu["multiprocessors"])
        for gpu in gpus
    ] or [Device(name, (int(name[2]), 0), arch.shared_memory_per_block, 1) for name, arch in ARCHES.items()]
    asked = next((name for name in ARCHES if name == env.arch()), None)
    for device in dict.fromkeys(devices):  # eight equal GPUs are one
        try:
            passes = directions(kernel_arch(device, asked)[0])
        except Fa2GenError:  # the forward pass then says why
            passes = ("fwd",)
        for direction, head_dim, mask in product(passes, (64, 128, 256), get_args(Mask)):
            problem = Problem(direction=direction, head_dim=head_dim, dtype="bf16", mask=mask)
            row = {"device": device.name, "problem": problem.text, **problem.model_dump()}
            try:
                selection = select(problem, device, asked)
            except Fa2GenError as error:  # a GPU without kernels, or with too little shared memory
                yield {**row, "name": None, "reason": str(error)}
            else:
                yield {**row, "name": selection.plan.name, "reason": selection.reason}
