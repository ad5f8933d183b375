"""Errors of the forward pass beside the peers', as a Markdown table:

    PYTHONPATH=. python tests/bench/accuracy.py [--fa3-library FILE] [--seqlen 2048]

The reference is fp32 attention of the same 16-bit inputs, not rounded to 16 bits. Inputs are standard normal; with
outliers, one element in a thousand is ten times as large, so that single keys take most of a row and its maximum rises
late by more than 2^8. A peer that refuses a problem has no entry. Needs a GPU of compute capability 9.0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fa2gen.bench.peers import Contestant, Missing, find
from fa2gen.bench.points import Point
from fa2gen.reference import attention_reference
from fa2gen.spec import DType

CONTESTANTS = ("fa2gen-sm90", "fa2gen-sm80", "cudnn", "fa2", "fa3", "fa4", "math")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OUTLIERS = 1e-3
TOKENS = 4096
PROBLEMS: tuple[tuple[DType, int, bool, bool], ...] = (  # dtype, head dim, causal, outliers
    ("bf16", 40, False, False),
    ("bf16", 64, False, False),
    ("bf16", 64, False, True),
    ("bf16", 128, False, False),
    ("bf16", 128, False, True),
    ("bf16", 128, True, False),
    ("bf16", 128, True, True),
    ("bf16", 256, False, False),
    ("fp16", 128, False, False),
    ("fp16", 128, False, True),
)


def inputs(point: Point, outliers: bool) -> list[torch.Tensor]:
    """q, k, v (batch, seqlen, heads, head_dim) of a point, the same in every run."""
    torch.manual_seed(0)
    shape = (point.batch, point.seqlen, point.heads, point.head_dim)
    tensors = [torch.randn(shape, device="cuda") for _ in range(3)]
    if outliers:
        tensors = [x * (1 + 9 * (torch.rand_like(x) < OUTLIERS)) for x in tensors]
    return [x.to(DTYPES[point.dtype]) for x in tensors]


def error(one: Contestant, point: Point, qkv: list[torch.Tensor], reference: torch.Tensor) -> str:
    """ "max / mean" of the absolute differences; "-" where the contestant does not take the point."""
    try:
        with one.context():
            out = one.prepare(point, *qkv, None)()[0]
    except (Missing, RuntimeError, AssertionError, NotImplementedError):
        return "-"
    difference = (out.float() - reference).abs()
    return f"{difference.max().item():.1e} / {difference.mean().item():.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3-library", type=Path)
    parser.add_argument("--seqlen", type=int, default=2048)
    options = parser.parse_args()
    contestants, missing = find(CONTESTANTS, options.fa3_library)
    print(f"{torch.cuda.get_device_name()}, {options.seqlen} tokens, max / mean |O - O of fp32|")
    for name, why in missing.items():
        print(f"{name} is missing: {why}")
    print("| inputs | " + " | ".join(one.name for one in contestants) + " |")
    print("|---" * (1 + len(contestants)) + "|")
    for dtype, head_dim, causal, outliers in PROBLEMS:
        heads = 512 // head_dim
        batch = max(1, TOKENS // options.seqlen)
        point = Point(
            preset="accuracy", direction="fwd", dtype=dtype, head_dim=head_dim, causal=causal,
            batch=batch, seqlen=options.seqlen, heads=heads, heads_kv=heads,
        )  # fmt: skip
        qkv = inputs(point, outliers)
        reference = attention_reference(*(x.float() for x in qkv), causal=causal)[0]
        cells = [error(one, point, qkv, reference) for one in contestants]
        label = f"{dtype} d {head_dim} {'causal' if causal else 'full'}{', outliers' if outliers else ''}"
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
