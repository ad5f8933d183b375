"""A rendered kernel is a source to take along: nvcc compiles what NVRTC does, behind any header, beside any other."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fa2gen.arch import ARCHES
from fa2gen.plan import make_plan
from fa2gen.render import render, render_launcher
from fa2gen.spec import KernelSpec
from tests.unit.test_golden import NAMES, path_of

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not there")


def nvcc(*options: str | Path) -> str:
    """Its warnings. Raises with its messages where it refuses."""
    assert NVCC
    done = subprocess.run([NVCC, "-std=c++17", *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


ONE_OF_EACH = {tuple(name.split("_")[1:3]): name for name in NAMES}  # by pass and architecture


@pytest.mark.parametrize("name", ONE_OF_EACH.values())  # all are in one file below
def test_alone(tmp_path, name):
    target = ARCHES[KernelSpec.from_name(name).tiling.arch].target
    warnings = nvcc(f"-arch={target}", "-cubin", "-o", tmp_path / "kernel.cubin", path_of(name))
    assert name.encode() in (tmp_path / "kernel.cubin").read_bytes() and not warnings


@pytest.mark.parametrize("arch", list(ARCHES))
def test_all_of_an_architecture_in_one_file_behind_headers(tmp_path, arch):
    """Their names do not meet each other's, nor cuda.h's and the C++ library's, whose macros they survive too.

    As far as PTX, which test_kernels gives ptxas.
    """
    names = [name for name in NAMES if f"_{arch}_" in name]
    headers = ["cuda.h", "cstdint", "algorithm", "cuda_fp16.h", "cuda_bf16.h"]
    lines = [*(f"#include <{header}>" for header in headers), *(f'#include "{path_of(name)}"' for name in names)]
    lines += [f"void const* symbol_{i} = (void const*)fa2gen::{name}::{name};" for i, name in enumerate(names)]
    source = tmp_path / "all.cu"
    source.write_text("\n".join(lines) + "\n")
    virtual = ARCHES[arch].target.replace("sm_", "compute_")
    nvcc("-gencode", f"arch={virtual},code={virtual}", "-c", "-o", tmp_path / "all.o", source)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "_d128_" in name and not {"decode", "paged"} & {*name.split("_")}]
)
def test_with_its_launcher(tmp_path, name):
    """What `fa2gen render --with-host` prints; kernels as far as PTX, as above."""
    plan = make_plan(KernelSpec.from_name(name))
    source = tmp_path / "attention.cu"
    source.write_text(render(plan).source + render_launcher(plan).source)
    virtual = plan.target.replace("sm_", "compute_")
    warnings = nvcc(
        "-gencode", f"arch={virtual},code={virtual}", "-Xcompiler", "-Wall", "-c", "-o", tmp_path / "all.o", source
    )
    assert not warnings
