"""Builds kernels into a folder, as on a machine without a GPU, and uses them where nothing may be compiled.

    python examples/ahead_of_time.py

The second half needs neither Jinja nor NVRTC. Without a GPU it only finds the kernels. Says "right".
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch

from fa2gen import KernelSpec, Problem, StoreError, flash_attn_func, make_plan
from fa2gen.arch import ArchName
from fa2gen.select import best_spec
from fa2gen.store import Store

ARCH: ArchName = "sm80" if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 8 else "sm90"
PROBLEM = Problem(head_dim=64, mask="causal", dtype="bf16")


def build(folder: str) -> None:
    """On the machine that builds: what `fa2gen build` writes is all that goes with the program."""
    kernel = ["--arch", ARCH, "--head-dim", "64", "--mask", "causal", "--dtype", "bf16", "--direction", "fwd"]
    subprocess.run([sys.executable, "-m", "fa2gen", "build", *kernel, "--out", folder], check=True)


def deploy(folder: str) -> bool:
    """On the machine that runs: kernels come from the folder, and one that is not there is an error."""
    os.environ.update(FA2GEN_AOT_DIR=folder, FA2GEN_DISABLE_JIT="1", FA2GEN_CACHE_DIR=os.path.join(folder, "empty"))
    if torch.cuda.is_available():
        q, k, v = (torch.randn(1, 1000, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        out = flash_attn_func(q, k, v, causal=True)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
        return bool(torch.allclose(out, expected, atol=2e-2))
    found = Store().get_or_compile(make_plan(best_spec(PROBLEM, ARCH)))
    print(f"found {found.name}: {found.report.registers} registers, {len(found.cubin):,} bytes")
    try:
        Store().get_or_compile(make_plan(KernelSpec.from_name(f"fa2_fwd_{ARCH}_bf16_d72_m128_n64_s2_w8")))
    except StoreError as why:
        print(why)
        return True
    return False


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = os.path.join(folder, "kernels")
        build(kernels)
        print("right" if deploy(kernels) else "WRONG")


if __name__ == "__main__":
    main()
