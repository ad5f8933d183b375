"""Small problems through several kernels of each family, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py --head-dim 64
    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --direction bwd
    compute-sanitizer --tool initcheck python tests/gpu/sanitize.py

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own, and a read past its end one
that the sanitizer sees. Exit status 1 when a result is wrong; the sanitizer reports the rest.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch

from fa2gen.errors import UnsupportedProblem
from fa2gen.ops import forward_into
from fa2gen.ops.backward import backward_cuda
from fa2gen.reference import GradientVerdict, Verdict, check, check_gradients
from fa2gen.select import default_tiling
from fa2gen.spec import Problem

SHAPES = ((1, 1, 1, 1, 1), (2, 113, 203, 4, 2), (1, 203, 113, 2, 1), (1, 257, 64, 2, 2), (1, 300, 300, 2, 1))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def forward(problem: Problem, arch: str, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """(out, lse)"""
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], device="cuda")
    forward_into(out, lse, q, k, v, causal=problem.mask == "causal", arch=arch)
    return out, lse


def run(problem: Problem, arch: str, q: Any, k: Any, v: Any) -> Verdict | GradientVerdict:
    """One pass; the backward one with a gradient of LSE too. Raises UnsupportedProblem."""
    causal = problem.mask == "causal"
    out, lse = forward(problem, arch, q, k, v)
    if problem.direction == "fwd":
        torch.cuda.synchronize()
        return check(out, lse, q, k, v, causal=causal)
    tiling = default_tiling(problem, arch)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    scale = problem.head_dim**-0.5
    gradients = backward_cuda(dout, q, k, v, out, lse, dlse, scale, causal, False, tiling)
    torch.cuda.synchronize()
    return check_gradients(gradients, dout, q, k, v, dlse=dlse, causal=causal)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", default="fwd", choices=("fwd", "bwd"))
    parser.add_argument("--arch", nargs="+", default=["sm80", "sm90"], help="kernel families")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[8, 40, 64, 96, 128, 192, 256])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=sorted(DTYPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here")
        return 3
    wrong = 0
    for arch, head_dim, dtype, mask in itertools.product(
        options.arch, options.head_dim, options.dtype, ("full", "causal")
    ):
        problem = Problem(direction=options.direction, head_dim=head_dim, dtype=dtype, mask=mask)
        for batch, seqlen_q, seqlen_k, heads, heads_kv in SHAPES:
            q, k, v = (
                torch.randn(batch, seqlen, n, head_dim, device="cuda").to(DTYPES[dtype])
                for seqlen, n in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
            )
            what = f"{options.direction} {arch} {dtype} d{head_dim} {mask}"
            try:
                verdict = run(problem, arch, q, k, v)
            except UnsupportedProblem as error:
                print(f"{what}: not run: {error}")
                break
            wrong += not verdict.ok
            print(f"{what} {tuple(q.shape)} x {seqlen_k}: {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
