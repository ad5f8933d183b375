"""Small problems through several kernels of each family, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py --head-dim 64
    compute-sanitizer --tool initcheck python tests/gpu/sanitize.py

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own, and a read past its end one
that the sanitizer sees. Exit status 1 when a result is wrong; the sanitizer reports the rest.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from fa2gen.ops import forward_into
from fa2gen.reference import check

SHAPES = ((1, 1, 1, 1, 1), (2, 113, 203, 4, 2), (1, 203, 113, 2, 1), (1, 257, 64, 2, 2), (1, 300, 300, 2, 1))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm80", "sm90"], help="kernel families")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[8, 40, 64, 96, 128, 192, 256])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=sorted(DTYPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here")
        return 3
    wrong = 0
    for arch, head_dim, dtype, causal in itertools.product(
        options.arch, options.head_dim, options.dtype, (False, True)
    ):
        for batch, seqlen_q, seqlen_k, heads, heads_kv in SHAPES:
            q, k, v = (
                torch.randn(batch, seqlen, n, head_dim, device="cuda").to(DTYPES[dtype])
                for seqlen, n in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
            )
            out, lse = torch.empty_like(q), torch.empty(batch, heads, seqlen_q, device="cuda")
            forward_into(out, lse, q, k, v, causal=causal, arch=arch)
            torch.cuda.synchronize()
            verdict = check(out, lse, q, k, v, causal=causal)
            wrong += not verdict.ok
            print(
                f"{arch} {dtype} d{head_dim} {'causal' if causal else 'full'} {tuple(q.shape)} x {seqlen_k}: {verdict}"
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
