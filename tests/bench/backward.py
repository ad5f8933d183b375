"""Speed of the backward pass beside FlashAttention-3 and cuDNN, interleaved: TFLOP/s (2.5 x the forward count).

    python tests/bench/backward.py [--fa3-library FILE] [--head-dim 64 128 256] [--seqlen 2048 8192] [--parts]

All calls of a round follow each other, each the median of its rounds. --parts times fa2gen's three kernels apart, too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from fa2gen.ops.backward import backward_cuda
from fa2gen.ops.dispatch import forward_cuda

ROUNDS, CALLS = 7, 4


def seconds(call: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS


def contestants(q: Any, k: Any, v: Any, dout: Any, causal: bool, fa3: bool) -> dict[str, Callable[[], Any]]:
    scale = q.shape[-1] ** -0.5
    out, lse = forward_cuda(q, k, v, scale, causal)
    found: dict[str, Callable[[], Any]] = {
        "fa2gen": lambda: backward_cuda(dout, q, k, v, out, lse, None, scale, causal, False),
        "deterministic": lambda: backward_cuda(dout, q, k, v, out, lse, None, scale, causal, True),
    }
    if fa3:
        operator = torch.ops.flash_attn_3.bwd
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        found["fa3"] = lambda: operator(dout, q, k, v, out, lse, *gradients, softmax_scale=scale, is_causal=causal)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        result = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, scale=scale)
    upstream = dout.transpose(1, 2)
    found["cudnn"] = lambda: torch.autograd.grad(result, leaves, upstream, retain_graph=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3-library")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    fa3 = False
    if arguments.fa3_library:
        torch.ops.load_library(arguments.fa3_library)
        fa3 = hasattr(torch.ops.flash_attn_3, "bwd")
    print(torch.cuda.get_device_name(), torch.__version__)
    for head_dim, causal, seqlen in itertools.product(arguments.head_dim, (False, True), arguments.seqlen):
        heads, batch = 2048 // head_dim, 16_384 // seqlen
        q, k, v, dout = (
            torch.randn(batch, seqlen, heads, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(4)
        )
        flops = 2.5 * 4 * batch * heads * seqlen * seqlen * head_dim * (0.5 if causal else 1.0)
        runs: dict[str, list[float]] = {}
        try:
            calls = contestants(q, k, v, dout, causal, fa3)
        except Exception as error:
            print(f"d{head_dim} seqlen {seqlen}: {error}", file=sys.stderr)
            continue
        for round_ in range(ROUNDS + 1):
            for name, call in list(calls.items()):
                try:
                    took = seconds(call)
                except Exception as error:
                    print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
                    del calls[name]
                    continue
                if round_:
                    runs.setdefault(name, []).append(took)
        tflops = {name: flops / statistics.median(times) / 1e12 for name, times in runs.items()}
        best = max((rate for name, rate in tflops.items() if name in ("fa3", "cudnn")), default=float("nan"))
        rates = "  ".join(f"{name} {rate:6.1f}" for name, rate in tflops.items())
        mask = "causal" if causal else "full"
        print(
            f"d{head_dim:<4}{mask:7} seqlen {seqlen:<6} {rates}  ratio {tflops.get('fa2gen', 0) / best:.3f}", flush=True
        )
        if arguments.parts:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                calls["fa2gen"]()
                torch.cuda.synchronize()
            for event in profile.key_averages():
                print(f"    {event.key:<64} {event.device_time_total:9.1f} us")


if __name__ == "__main__":
    main()
