"""Partial results on a GPU: what plain kernels round, to the bit; merged, or added up, as exact as one call."""

from __future__ import annotations

import pytest
import torch

from fa2gen import cases
from fa2gen.gpus import current_device
from fa2gen.groups import with_groups
from fa2gen.ops.autograd import by_operator
from fa2gen.ops.operator import run, run_ragged
from fa2gen.options import Options, Shape
from fa2gen.reference import attention_reference
from fa2gen.select import select
from fa2gen.spec import KernelSpec, Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = (Shape(2, 113, 203, 6, 1), Shape(1, 1, 1024, 4, 2), Shape(2, 1023, 700, 4, 4))
KERNELS = [
    (
        arch,
        Problem(
            direction=direction,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
            varlen=varlen,
            dtype=dtype,
            deterministic=direction == "bwd",
            partial=True,
        ),
    )
    for arch in ("sm90", "sm80")
    for direction in ("fwd", "bwd")
    for head_dim, head_dim_v, mask, varlen, dtype in (
        (64, None, "window", True, "bf16"),
        (72, 40, "full", False, "fp16"),
        (128, None, "causal", False, "bf16"),
        (256, None, "causal", True, "bf16"),
    )
]


@pytest.mark.parametrize(("arch", "problem"), KERNELS, ids=lambda x: getattr(x, "text", x))
def test_rounded_they_are_the_plain_kernels(arch, problem):
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
        for name, rounded in of_plain.results.items():
            assert torch.equal(case.results[name].to(rounded.dtype), rounded), name
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


@pytest.mark.parametrize("arch", ["sm90", "sm80"])
@pytest.mark.parametrize(("head_dim", "parts"), [(64, 1), (72, 2), (128, 1), (128, 4), (192, 2), (256, 1)])
def test_gradients_of_groups_in_parts(arch, head_dim, parts):
    """And of kernels that add to dQ in any order, dense and ragged."""
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"sm90 kernels do not run on {torch.cuda.get_device_name()}")
    for more in ({"mask": "causal"}, {"varlen": True}):
        problem = Problem(direction="bwd", head_dim=head_dim, partial=True, **more)
        plan = with_groups(select(problem, current_device(), arch, 1024).plan, parts)
        for shape in (Shape(2, 113, 203, 8, 2), Shape(1, 1023, 700, 4, 1)):
            case = cases.make(plan.spec, shape, device="cuda")
            cases.run(case, "gpu")
            assert cases.written_outside(case) is None
            verdict = cases.verdict(case)
            assert verdict.ok, f"{plan.name}, {shape}: {verdict}"


def gradients_of(q, k, v, dout, out, lse, lengths, options):
    tensors = (dout, q, k, v, out, lse, None, *lengths)
    return by_operator(*tensors, options)


@pytest.mark.parametrize("head_dim", [128, 60])
def test_gradients_of_calls_of_any_length(head_dim):
    """As forward: fp32, and the plain bits when rounded."""
    for rows in (64, 65, 200, 200, 333):
        q, k, v = (torch.randn(2, rows, n, head_dim, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
        dout = torch.randn_like(q)
        options = Options(head_dim**-0.5, causal=True, deterministic=True)
        bounds = torch.tensor([0, rows // 3, 2 * rows], dtype=torch.int32, device="cuda")
        out, lse = run(q, k, v, options)
        packed = [x.flatten(0, 1) for x in (q, k, v, dout)]
        ragged, lengths = options._replace(varlen=True), (bounds, bounds, None, None)
        results = run_ragged(*packed[:3], lengths, ragged, 2 * rows)
        for found in (
            [gradients_of(q, k, v, dout, out, lse, (), options._replace(partial=p)) for p in (True, False)],
            [gradients_of(*packed, *results, lengths, ragged._replace(partial=p)) for p in (True, False)],
        ):
            for x, rounded in zip(*found, strict=True):
                assert x.dtype == torch.float32 and rounded.dtype == torch.bfloat16
                assert torch.equal(x.to(torch.bfloat16), rounded)


def test_added_gradients_are_as_exact_as_one_calls():
    """Of keys in four parts: dQ is a sum."""
    q, k, v = (torch.randn(1, 512, n, 128, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
    dout = torch.randn_like(q)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact_out, _ = attention_reference(*leaves)
    exact = torch.autograd.grad(exact_out, leaves, dout.double())[0]
    out, lse = run(q, k, v, Options(128**-0.5))
    whole = gradients_of(q, k, v, dout, out, lse, (), Options(128**-0.5))[0]
    errors = {}
    for partial in (True, False):
        options = Options(128**-0.5, partial=partial)
        parts = [
            gradients_of(q, k[:, a : a + 128], v[:, a : a + 128], dout, out, lse, (), options)[0].float()
            for a in range(0, 512, 128)
        ]
        errors[partial] = (sum(parts).to(q.dtype).double() - exact).abs().mean()
    one = (whole.double() - exact).abs().mean()
    assert errors[True] <= 1.05 * one and errors[False] > 1.1 * one
