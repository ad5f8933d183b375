"""What is on this machine, and which kernels fa2gen will use here: the facts behind `fa2gen doctor`.

Nothing here raises because something is missing or wrong: that is what the report says. Nothing is made, either: a
cache that is not there is still not there afterwards. torch and cuda are imported inside the functions that ask them.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import fa2gen
from fa2gen import _paths, env
from fa2gen.errors import Fa2GenError

if TYPE_CHECKING:
    from fa2gen.select import Selection

__all__ = ["lines", "report"]

_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_LEAST_DRIVER = 13000  # as cuDriverGetVersion counts: cubins of a major version need a driver of it
_WITHOUT_GPU = "Kernels can be built here, and run on the CPU: fa2gen verify --on cpu"


def report() -> dict[str, Any]:
    """Everything, as JSON has it. `problems` is what keeps fa2gen from building kernels, or from running them here."""
    compiler, driver, torch = _compiler(), _driver(), _torch()
    cache, ahead_of_time = _cache(), _ahead_of_time()
    chosen = list(_kernels(driver["gpus"]))
    kernels = [row for row, _ in chosen]
    parts = {"compiler": compiler, "driver": driver, "torch": torch, "cache": cache, "AOT folder": ahead_of_time}
    problems = [f"{name}: {part['error']}" for name, part in parts.items() if part and part["error"]]
    problems += dict.fromkeys(kernel["reason"] for kernel in kernels if kernel["name"] is None)
    problems += _not_there([selection for _, selection in chosen if selection])
    problems += env.problems()
    return {
        "fa2gen": {
            "version": fa2gen.__version__,
            "location": str(Path(fa2gen.__file__).parent),
            "installed": "checkout" if _paths.in_checkout() else "wheel",
            "python": platform.python_version(),
        },
        "system": _system(),
        "packages": _packages(),
        "compiler": compiler,
        "driver": driver,
        "torch": torch,
        "cache": cache,
        "ahead_of_time": ahead_of_time,
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
    yield "system", ", ".join(text for text in found["system"].values() if text)
    yield "packages", ", ".join(f"{name} {number or 'missing'}" for name, number in found["packages"].items())
    yield "compiler", f"NVRTC {compiler['nvrtc'] or 'missing'}"
    kernel_driver = f", kernel driver {driver['kernel_driver']}" if driver["kernel_driver"] else ""
    yield "driver", (f"CUDA {driver['version']}" if driver["version"] else "none") + kernel_driver
    for gpu in driver["gpus"]:
        yield (
            f"GPU {gpu['index']}",
            f"{gpu['name']}, compute capability {'.'.join(map(str, gpu['compute_capability']))}, "
            f"{gpu['multiprocessors']} SMs, {gpu['memory_bytes'] / 2**30:.1f} GiB",
        )
    yield "torch", ": ".join(filter(None, (torch["version"], torch["error"])))
    cache = found["cache"]
    yield "cache", f"{cache['dir']}: {cache['kernels']} kernels, {cache['bytes']:,} B"
    if ahead_of_time := found["ahead_of_time"]:
        yield "AOT folder", f"{ahead_of_time['dir']}: {ahead_of_time['kernels']} kernels"
    for name, value in found["environment"].items():
        if value is not None:
            yield name, value
    for index, kernel in enumerate(found["kernels"]):
        problem = f"{kernel['device']}: {kernel['problem']}"
        yield "" if index else "kernels", f"{problem:<47}  {kernel['name'] or 'none'}  ({kernel['reason']})"
    for index, problem in enumerate(found["problems"] or ["none"]):
        yield "" if index else "problems", problem


def _system() -> dict[str, str | None]:
    """Of the machine, what a report of a fault must say."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        distribution = None
    return {
        "os": distribution,
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()) or None,
    }


def _packages() -> dict[str, str | None]:
    """Every package that fa2gen needs, by its own metadata, with the version that is here."""
    try:
        needed = [text for text in requires("fa2gen") or () if "extra ==" not in text]
    except PackageNotFoundError:  # a source tree that was not installed
        needed = []
    names = [match[0] for text in needed if (match := re.match(r"[\w.-]+", text))]
    return {name: _package(name) for name in [*names, "torch"]}


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _compiler() -> dict[str, Any]:
    """NVRTC, asked itself: the package may be there and its library not load."""
    found: dict[str, Any] = {"nvrtc": None, "error": None}
    try:
        status, major, minor = import_module("cuda.bindings.nvrtc").nvrtcVersion()
        found["nvrtc"] = f"{major}.{minor}"
        found["error"] = None if int(status) == 0 else f"NVRTC answers {status.name}"
    except (ImportError, OSError, RuntimeError) as error:
        found["error"] = f"NVRTC does not load: {error}"
    return found


def _driver() -> dict[str, Any]:
    """The NVIDIA driver and its GPUs, through the driver's own interface: no context is made."""
    found: dict[str, Any] = {"version": None, "kernel_driver": _kernel_driver(), "gpus": [], "error": None}
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
        if number < _LEAST_DRIVER:
            found["error"] = (
                f"CUDA {found['version']} cannot load what CUDA 13's compiler makes: update it to 580 or newer"
            )
        elif not found["gpus"]:
            found["error"] = f"there is no GPU. {_WITHOUT_GPU}"
    except (ImportError, OSError, RuntimeError) as error:
        why = str(error).rstrip(".")
        what = why if found["version"] else f"there is none ({why})"
        found["error"] = f"{what}. {_WITHOUT_GPU}"
    return found


def _kernel_driver() -> str | None:
    """The version of NVIDIA's kernel module, as it says itself."""
    try:
        match = re.search(r"Kernel Module\D*?(\d+[\d.]+)", _DRIVER_VERSION.read_text())
    except OSError:
        return None
    return match[1] if match else None


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
    """The kernel cache: where, how much, and whether it is used and can be written."""
    from fa2gen.store import Store

    store = _quietly(Store)
    if store is None:  # env.problems says why
        return {"dir": "", "kernels": 0, "bytes": 0, "error": None}
    error = store.complaint()
    if not error:
        existing = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            error = f"{existing} cannot be written: every process compiles anew"
    else:
        error = f"{store.root} is not used: {error}"
    return {"dir": str(store.root), "kernels": len(store.list()), "bytes": store.size(), "error": error or None}


def _ahead_of_time() -> dict[str, Any] | None:
    """The folder of FA2GEN_AOT_DIR, and whether what is in it will be used; None where the variable is not set."""
    from fa2gen.files import installed
    from fa2gen.store import read_ahead_of_time, read_entry

    root = env.aot_dir()
    if root is None:
        return None
    found = read_ahead_of_time(root)
    spoilt = [folder.name for folder in found.kernels.values() if read_entry(folder, installed()) is None]
    error = f"{root} is not used: {found.complaint}" if found.complaint else None
    if spoilt:
        error = f"{len(spoilt)} kernels in {root} are damaged or not trusted, {spoilt[0]} among them: build them again"
    return {"dir": str(root), "kernels": len(found.kernels) - len(spoilt), "error": error}


def _not_there(selections: list[Selection]) -> Iterator[str]:
    """What FA2GEN_DISABLE_JIT makes of the kernels that will be used and are not built."""
    from fa2gen.store import Store

    store = _quietly(Store)
    if store is None or not _quietly(env.disable_jit):
        return
    errors = []
    for selection in selections:
        try:
            store.get_or_compile(selection.plan, selection.target)
        except Fa2GenError as error:
            errors.append(error)
    if errors:
        yield f"FA2GEN_DISABLE_JIT is set, and {len(errors)} of {len(selections)} kernels are not built: {errors[0]}"


def _quietly(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None where the environment has a value that it refuses: `env.problems` names that."""
    try:
        return read()
    except Fa2GenError:
        return None


def _kernels(gpus: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Selection | None]]:
    """What is used on each GPU for what the catalogue has of the usual head dims in bf16, as a row and as selected;
    where there is no GPU, on one of each family."""
    from fa2gen.arch import ARCHES
    from fa2gen.catalog import catalogue
    from fa2gen.select import Device, select
    from fa2gen.spec import Direction

    problems = dict.fromkeys(spec.problem for spec in catalogue() if spec.problem.head_dim in (64, 128, 256))
    usual = [problem for problem in problems if problem.dtype == "bf16" and not problem.deterministic]
    directions = get_args(Direction)
    usual.sort(key=lambda problem: (directions.index(problem.direction), problem.head_dim))
    devices = [
        Device(gpu["name"], tuple(gpu["compute_capability"]), gpu["shared_memory_per_block"], gpu["multiprocessors"])
        for gpu in gpus
    ] or [Device(name, (int(name[2]), 0), arch.shared_memory_per_block, 1) for name, arch in ARCHES.items()]
    asked = next((name for name in ARCHES if name == _quietly(env.arch)), None)
    for device in dict.fromkeys(devices):  # eight equal GPUs are one
        for problem in usual:
            row = {"device": device.name, "problem": problem.text, **problem.model_dump()}
            try:
                selection = select(problem, device, asked)
            except Fa2GenError as error:  # a GPU without kernels, or with too little shared memory
                yield {**row, "name": None, "reason": str(error)}, None
            else:
                yield {**row, "name": selection.plan.name, "reason": selection.reason}, selection
