"""Partial results on the CPU: O is what the plain kernel rounds, to the bit, and is written where O is."""

from __future__ import annotations

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.options import Shape
from fa2gen.plan import make_plan
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.faults import Fault, symptom

SHAPE = Shape(2, 140, 203, 4, 2)
RAGGED = {"mask": "window", "varlen": True, "dtype": "fp16"}
PROBLEMS = [
    ("sm80", Problem(head_dim=64, partial=True, **RAGGED)),
    ("sm90", Problem(head_dim=64, mask="causal", partial=True)),
    ("sm90", Problem(head_dim=72, head_dim_v=40, partial=True, **RAGGED)),
]


@pytest.mark.parametrize(("arch", "problem"), PROBLEMS, ids=lambda x: getattr(x, "text", x))
def test_rounded_it_is_the_plain_kernels_output(arch, problem):
    spec = best_spec(problem, arch)
    plain = KernelSpec(problem=problem.model_copy(update={"partial": False}), tiling=spec.tiling)
    case = cases.make(spec, SHAPE)
    of_plain = cases.make(plain, SHAPE, case.options._replace(partial=False))
    for one in (case, of_plain):
        cases.run(one, "cpu")
        assert cases.written_outside(one) is None
    out = case.tensors["o"]
    assert out.dtype == torch.float32 and not torch.equal(out, out.to(of_plain.tensors["o"].dtype).float())
    assert torch.equal(out.to(of_plain.tensors["o"].dtype), of_plain.tensors["o"])
    assert torch.equal(case.tensors["lse"], of_plain.tensors["lse"])
    verdict = cases.verdict(case)
    assert verdict.ok, verdict


def run(name, shape, rendered=None, **how):
    case = cases.make(KernelSpec.from_name(name), shape)
    run_kernel(make_plan(case.spec), case.tensors, case.options, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return cases.verdict(case), case.tensors


KERNEL = best_spec(Problem(head_dim=64, varlen=True, partial=True), "sm80").name
FAULTS = [
    Fault("rows-behind-the-last", KERNEL, "if (first + 8 * half < s.q) {", "if (half < 2) {"),
    Fault("both-rows-alike", KERNEL, "acc_o[i + 2 * half], acc_o[i + 2 * half + 1]", "acc_o[i], acc_o[i + 1]"),
    Fault("half-of-the-columns", KERNEL, "i < kHeadDim / 2; i += 4", "i < kHeadDim / 4; i += 4"),
    Fault("of-another-head", KERNEL, "bidh * p.o_head_stride", "0 * p.o_head_stride"),
    Fault("of-the-first-sequence", KERNEL, "first_query(s, bidb, p.o_batch_stride, p.o_row_stride) + bidh", "bidh"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_seen(fault):
    assert symptom(run, fault, [Shape(2, 140, 90, 4, 2)], 0)
