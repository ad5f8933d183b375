"""The C++ launcher of a kernel, compiled and callable: what its tests without a GPU and those on one share."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fa2gen.plan import KernelPlan, recipe
from fa2gen.render import render_launcher

DOOR = """
extern "C" int test_launch(void* const* functions, int num_sms, fa2gen::host::{name}::Call const* call, void* stream) {{
    fa2gen::host::{name}::Kernels kernels = {{ {{}}, num_sms}};
    for (int i = 0; i < {count}; ++i) {{
        kernels.functions[i] = static_cast<CUfunction>(functions[i]);
    }}
    return fa2gen::host::{name}::launch(kernels, *call, static_cast<CUstream>(stream));
}}
"""


class Tensor(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


def cuda_include() -> Path | None:
    """A folder with cuda.h: nvcc's, a wheel's or triton's."""
    return next((folder for folder in _includes() if (folder / "cuda.h").is_file()), None)


def _includes() -> Iterator[Path]:
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1] / "include"
    yield Path("/usr/local/cuda/include")
    for packages in map(Path, sys.path):
        yield packages / "nvidia" / "cu13" / "include"
        yield packages / "triton" / "backends" / "nvidia" / "include"


def call_type(plan: KernelPlan) -> Any:
    """The launcher's struct Call, as a ctypes.Structure."""
    fields = [
        *((name, ctypes.c_int64) for name in ("batch", "seqlen_q", "seqlen_k", "num_heads", "num_heads_kv")),
        ("softmax_scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in recipe.options(plan)),
        *((name, Tensor) for name in recipe.strided(plan)),
        *((operand.name, ctypes.c_uint64) for operand in plan.operands if not operand.is_tensor),
        *((scratch.name, ctypes.c_uint64) for scratch in plan.scratch),
    ]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


def build(plan: KernelPlan, folder: Path) -> Any:
    """The launcher's door as a ctypes function: (functions, num_sms, call, stream) -> CUresult."""
    include, compiler = cuda_include(), shutil.which("g++") or shutil.which("clang++")
    assert include and compiler
    source = folder / "launcher.cc"
    source.write_text(render_launcher(plan).source + DOOR.format(name=plan.name, count=len(plan.entry_points)))
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-isystem{include}"]
    subprocess.run([compiler, *options, source, "-o", folder / "launcher.so"], check=True, timeout=120)
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "launcher.so")).test_launch
