"""Partial results on the CPU: what the plain kernel rounds, to the bit, and written where that writes."""

from __future__ import annotations

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.groups import with_groups
from fa2gen.options import Shape
from fa2gen.plan import make_plan
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem
from tests.cpu.faults import Fault, symptom

SHAPE = Shape(2, 140, 203, 4, 2)
RAGGED = {"mask": "window", "varlen": True, "dtype": "fp16"}


def spec_of(arch, parts=1, tiling=(), **problem):
    """The default of a problem, changed, with groups of heads in so many parts."""
    found = best_spec(Problem(**problem, partial=True), arch)
    found = KernelSpec(problem=found.problem, tiling=found.tiling.model_copy(update=dict(tiling)))
    return with_groups(make_plan(found), parts).spec if parts > 1 else found


PRODUCTS, PASSING = ({"tile_m": 64, "tile_n": keys, "lag": 0} for keys in (64, 80))  # how warpgroups split the work
ORDERED = {"direction": "bwd", "deterministic": True}  # sums of dQ are the same bits
KERNELS = [
    spec_of("sm80", head_dim=64, **RAGGED),
    spec_of("sm80", head_dim=256, mask="causal", varlen=True),  # warps in pairs
    spec_of("sm90", head_dim=64, mask="causal"),
    spec_of("sm90", head_dim=72, head_dim_v=40, **RAGGED),
    spec_of("sm80", parts=2, head_dim=72, head_dim_v=104, mask="causal", **ORDERED),
    spec_of("sm90", head_dim=72, head_dim_v=40, **RAGGED, **ORDERED),  # dQ^T, of 72 columns
]
FORMS = [  # of SM90: how blocks of keys end
    spec_of("sm90", parts=2, head_dim=64, direction="bwd"),
    spec_of("sm90", tiling=PRODUCTS, head_dim=72, direction="bwd"),
    spec_of("sm90", tiling=PASSING, head_dim=72, head_dim_v=136, mask="causal", varlen=True, direction="bwd"),
    spec_of("sm90", parts=2, tiling=PASSING, head_dim=72, direction="bwd"),
]


@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_rounded_they_are_the_plain_kernels(spec):
    problem = spec.problem
    plain = KernelSpec(problem=problem.model_copy(update={"partial": False}), tiling=spec.tiling)
    case = cases.make(spec, SHAPE)
    of_plain = cases.make(plain, SHAPE, case.options._replace(partial=False))
    for one in (case, of_plain):
        cases.run(one, "cpu")
        assert cases.written_outside(one) is None
    for name, rounded in of_plain.results.items():
        x = case.results[name]
        assert x.dtype == torch.float32 and torch.equal(x.to(rounded.dtype), rounded)
        assert name == "lse" or not torch.equal(x, rounded.float())
    verdict = cases.verdict(case)
    assert verdict.ok, verdict


@pytest.mark.parametrize("spec", FORMS, ids=lambda spec: spec.name)
def test_gradients_are_right_and_not_rounded(spec):
    case = cases.make(spec, SHAPE)
    cases.run(case, "cpu")
    assert cases.written_outside(case) is None
    verdict = cases.verdict(case)
    assert verdict.ok, verdict
    assert not any(torch.equal(x, x.bfloat16().float()) for x in case.results.values())


def run(name, shape, rendered=None, **how):
    case = cases.make(KernelSpec.from_name(name), shape)
    run_kernel(make_plan(case.spec), case.tensors, case.options, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return cases.verdict(case), case.tensors


KERNEL = spec_of("sm80", head_dim=64, varlen=True).name
TRANSPOSED = spec_of("sm90", tiling=PASSING, head_dim=72, direction="bwd").name
FAULTS = [
    Fault("rows-behind-the-last", KERNEL, "if (row < rows.count) {", "if (half < 2) {"),
    Fault("both-rows-alike", KERNEL, "acc[i + 2 * half] *", "acc[i] *"),
    Fault("half-of-the-columns", KERNEL, "i < columns / 2; i += 4", "i < columns / 4; i += 4"),
    Fault("of-another-head", KERNEL, "head * p.o_head_stride", "0 * p.o_head_stride"),
    Fault("columns-behind-the-last", TRANSPOSED, "&& column < columns", "&& column < 16"),
    Fault("keys-behind-the-last", TRANSPOSED, "if (row < rows.count && column", "if (column"),
    Fault("half-of-a-warps-columns", TRANSPOSED, "row * rows.stride + column, acc[i]", "row * rows.stride, acc[i]"),
    Fault("of-the-first-sequence", KERNEL, "first_query(s, bidb, p.o_batch_stride, p.o_row_stride) + head", "head"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_seen(fault):
    assert symptom(run, fault, [Shape(2, 140, 90, 4, 2)], 0)
