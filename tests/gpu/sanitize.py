"""Small problems through several kernels of each family, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py --head-dim 64
    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --direction bwd
    compute-sanitizer --tool initcheck python tests/gpu/sanitize.py --varlen
    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --direction decode --field paged=true
    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --field "score=cap * tanh(s / cap)" dropout=true

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own, and a read past its end one
that the sanitizer sees. Exit status 1 when a result is wrong; the sanitizer reports the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any, get_args

import torch

from fa2gen import cases
from fa2gen.features import examples_of
from fa2gen.options import Shape
from fa2gen.select import default_tiling
from fa2gen.spec import Direction, DType, KernelSpec, Mask, Problem

SHAPES = tuple(
    Shape(*sizes)
    for sizes in ((1, 1, 1, 1, 1), (2, 113, 203, 4, 2), (1, 203, 113, 2, 1), (1, 257, 64, 2, 2), (1, 300, 300, 2, 1))
)
FEW_QUERIES = tuple(Shape(*sizes) for sizes in ((1, 1, 1, 1, 1), (2, 1, 300, 4, 1), (3, 5, 530, 6, 2)))


def field_of(text: str) -> tuple[str, Any]:
    """`("paged", True)` of `paged=true`: what is no JSON is a text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", default="fwd", choices=get_args(Direction))
    parser.add_argument("--arch", nargs="+", default=["sm80", "sm90"], help="kernel families")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[8, 40, 64, 96, 128, 192, 256])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=get_args(DType))
    parser.add_argument("--mask", nargs="+", default=get_args(Mask), choices=get_args(Mask))
    parser.add_argument("--deterministic", action="store_true", help="gradients of the same bits in every run")
    parser.add_argument("--varlen", action="store_true", help="ragged batches")
    parser.add_argument("--field", nargs="+", type=field_of, default=[], help="of the problem: NAME=VALUE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here")
        return 3
    wrong = 0
    for arch, head_dim, dtype, mask in itertools.product(options.arch, options.head_dim, options.dtype, options.mask):
        problem = Problem(
            direction=options.direction,
            head_dim=head_dim,
            dtype=dtype,
            mask=mask,
            deterministic=options.deterministic,
            varlen=options.varlen,
            **dict(options.field),
        )
        spec = KernelSpec(problem=problem, tiling=default_tiling(problem, arch))
        shapes = FEW_QUERIES if problem.direction == "decode" else SHAPES
        for shape, call in itertools.product(shapes, examples_of(problem)):
            case = cases.make(spec, shape, call, device="cuda", with_dlse=True)
            cases.run(case, "gpu")
            verdict = cases.verdict(case)
            wrong += not verdict.ok
            print(f"{spec.name} {tuple(shape)}: {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
