"""Partial results on a GPU: what plain kernels round, to the bit; merged, as exact as one call."""

from __future__ import annotations

import pytest
import torch

from fa2gen import cases
from fa2gen.gpus import current_device
from fa2gen.ops.operator import run, run_ragged
from fa2gen.options import Options, Shape
from fa2gen.reference import attention_reference
from fa2gen.select import select
from fa2gen.spec import KernelSpec, Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = (Shape(2, 113, 203, 6, 1), Shape(1, 1, 1024, 4, 2), Shape(2, 1023, 700, 4, 4))
KERNELS = [
    (arch, Problem(head_dim=head_dim, head_dim_v=head_dim_v, mask=mask, varlen=varlen, dtype=dtype, partial=True))
    for arch in ("sm90", "sm80")
    for head_dim, head_dim_v, mask, varlen, dtype in (
        (64, None, "window", True, "bf16"),
        (72, 40, "full", False, "fp16"),
        (128, None, "causal", False, "bf16"),
        (256, None, "causal", True, "bf16"),
    )
]


@pytest.mark.parametrize(("arch", "problem"), KERNELS, ids=lambda x: getattr(x, "text", x))
def test_rounded_it_is_the_plain_kernels_output(arch, problem):
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"sm90 kernels do not run on {torch.cuda.get_device_name()}")
    spec = select(problem, current_device(), arch, 1024).plan.spec
    plain = KernelSpec(problem=problem.model_copy(update={"partial": False}), tiling=spec.tiling)
    for shape in SHAPES:
        case = cases.make(spec, shape, device="cuda")
        of_plain = cases.make(plain, shape, case.options._replace(partial=False), device="cuda")
        for one in (case, of_plain):
            cases.run(one, "gpu")
            assert cases.written_outside(one) is None
        assert torch.equal(case.tensors["o"].to(of_plain.tensors["o"].dtype), of_plain.tensors["o"])
        assert torch.equal(case.tensors["lse"], of_plain.tensors["lse"])
        verdict = cases.verdict(case)
        assert verdict.ok, f"{spec.name}, {shape}: {verdict}"


@pytest.mark.parametrize("head_dim", [128, 60])  # a multiple of 8, and one that is copied
def test_calls_of_any_length(head_dim):
    """Dense and ragged, by what is prepared once and by what follows from it: fp32, and the plain bits when rounded."""
    for rows in (64, 65, 200, 200, 333):
        q, k, v = (torch.randn(2, rows, n, head_dim, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
        options = Options(head_dim**-0.5, causal=True)
        bounds = torch.tensor([0, rows // 3, 2 * rows], dtype=torch.int32, device="cuda")
        for results in (
            [run(q, k, v, options._replace(partial=partial)) for partial in (True, False)],
            [
                run_ragged(
                    *(x.flatten(0, 1) for x in (q, k, v)),
                    (bounds, bounds, None, None),
                    options._replace(varlen=True, partial=partial),
                    2 * rows,
                )
                for partial in (True, False)
            ],
        ):
            (out, lse), (rounded, again) = results
            assert out.dtype == torch.float32 and torch.equal(out.to(torch.bfloat16), rounded)
            assert torch.equal(lse, again)


def test_merged_parts_are_as_exact_as_one_call():
    q, k, v = (torch.randn(1, 512, n, 128, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
    exact, _ = attention_reference(q.double(), k.double(), v.double())
    whole, _ = run(q, k, v, Options(128**-0.5))
    errors = {}
    for partial in (True, False):
        parts = [
            run(q, k[:, a : a + 128], v[:, a : a + 128], Options(128**-0.5, partial=partial))
            for a in range(0, 512, 128)
        ]
        shares = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3).unsqueeze(-1)
        merged = sum(share * out.float() for share, (out, _) in zip(shares, parts, strict=True)).to(q.dtype)
        errors[partial] = (merged.double() - exact).abs().mean()
    one = (whole.double() - exact).abs().mean()
    assert errors[True] <= 1.05 * one and errors[False] > 1.1 * one
