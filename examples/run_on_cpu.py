"""Run a generated kernel with no GPU and no torch: on the model of the machine in fa2gen/cpu, beside attention in fp64.

    python examples/run_on_cpu.py
    python examples/run_on_cpu.py fa2_fwd_sm80_fp16_d64_causal_m128_n64_s2_w4

Needs a C++ compiler. Exit status: 0 right, 1 wrong, 3 no compiler.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from fa2gen import Fa2GenError, KernelSpec
from fa2gen.cli.console import progress
from fa2gen.cpu import find_compiler
from fa2gen.features import examples_of, key_range
from fa2gen.options import Options
from fa2gen.testing import run_on_cpu

NAME = "fa2_fwd_sm90_fp16_d128_causal_m128_n128_s2_w8"
QUERIES, KEYS, HEADS = 200, 300, 2


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, options: Options, dtype: type) -> tuple[np.ndarray, ...]:
    """(out, lse) as it is defined, each step rounded to `dtype`; q (Sq, H, D), k, v (Sk, H, D)."""
    first, end = key_range(options, len(q), len(k), np.arange(len(q))[:, None])
    keys = np.arange(len(k))
    scaled: np.ndarray = (q * options.scale(q.shape[-1])).astype(dtype)
    scores = np.einsum("qhd,khd->hqk", scaled.astype(np.float64), k.astype(np.float64)).astype(dtype).astype(np.float64)
    scores[:, (keys < first) | (keys >= end)] = -np.inf
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    sums = weights.sum(-1, keepdims=True)
    probabilities = (weights / sums).astype(dtype)
    out = np.einsum("hqk,khd->qhd", probabilities.astype(np.float64), v.astype(np.float64)).astype(dtype)
    return out, (top + np.log(sums))[..., 0]


def main() -> int:
    """Prints the greatest error beside its bound, which is flash-attention's own rule."""
    spec = KernelSpec.from_name(sys.argv[1] if len(sys.argv) > 1 else NAME)
    if spec.problem.dtype != "fp16" or spec.problem.direction != "fwd":
        raise SystemExit("numpy knows fp16 but no bf16, and this example has no gradients: fa2gen verify --on cpu does")
    try:
        print(f"running {spec.name} on the CPU, built with {find_compiler()}")
    except Fa2GenError as why:
        print(why)
        return 3
    options = examples_of(spec.problem)[0]
    random = np.random.default_rng(0)
    q, k, v = (
        random.standard_normal((1, rows, HEADS, spec.problem.head_dim)).astype(np.float16)
        for rows in (QUERIES, KEYS, KEYS)
    )
    started = time.perf_counter()
    with progress("running", 1):  # a line every few seconds: compiling takes long on a slow machine
        out, lse, report = run_on_cpu(spec, q, k, v, options)
    seconds = time.perf_counter() - started

    wide_q, wide_k, wide_v = (x[0].astype(np.float64) for x in (q, k, v))
    true, true_lse = attention(wide_q, wide_k, wide_v, options, np.float64)
    plain, _ = attention(q[0], k[0], v[0], options, np.float16)
    error, bound = np.abs(out[0] - true).max(), 2 * np.abs(plain - true).max()
    lse_error = np.abs(lse[0] - true_lse).max()
    right = bool(error <= bound and lse_error <= 1e-4)
    print(f"  {QUERIES} queries x {KEYS} keys, {HEADS} heads: {seconds:.1f} s, {report.seconds:.2f} s in the kernel")
    print(f"  greatest error  {error:.2e}, allowed {bound:.2e}: twice that of plain attention in fp16")
    print(f"  of LSE          {lse_error:.2e}, allowed 1.00e-04")
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
