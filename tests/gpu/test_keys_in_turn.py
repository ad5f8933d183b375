"""Gradients whose blocks of threads take blocks of keys in turn, on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fa2gen import cases
from fa2gen.gpus import current_device
from fa2gen.groups import turns_of, with_groups
from fa2gen.options import Options, Shape
from fa2gen.plan import make_plan
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem

FULL, CAUSAL = Options(), Options(causal=True)


@pytest.mark.parametrize("options", [FULL, CAUSAL, Options(window_left=40, window_right=7)], ids=["f", "c", "w"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(48, "bf16"), (64, "bf16"), (64, "fp16"), (96, "bf16"), (104, "fp16")])
def test_gradients(head_dim, dtype, options):
    """Many blocks of keys a multiprocessor, few, and some that no query sees; and a second launch."""
    problem = Problem(direction="bwd", head_dim=head_dim, dtype=dtype, mask=options.mask)
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")))
    spec = with_groups(plan, 1, in_turn=True).spec
    for shape in (Shape(3, 700, 1100, 64, 32), Shape(1, 1300, 1000, 4, 2), Shape(2, 130, 2500, 40, 40)):
        case = cases.make(spec, shape, options, device="cuda", with_dlse=True)
        cases.run(case, "gpu")
        verdict = cases.verdict(case)
        assert verdict.ok, f"{shape}: {verdict}"
        first = [case.tensors[name].clone() for name in ("dk", "dv")]
        cases.run(case, "gpu")
        assert all(x.equal(case.tensors[name]) for x, name in zip(first, ("dk", "dv"), strict=True)), shape


@pytest.mark.parametrize("head_dim", [64, 96])
def test_as_calls_choose_it(head_dim):
    """And the gradients of both kernels are the same bits, but for dQ, whose sums come in another order."""
    problem = Problem(direction="bwd", head_dim=head_dim, mask="causal")
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")))
    shape = Shape(8, 1024, 1024, 16, 16)
    assert turns_of(plan, shape, current_device().num_sms)
    case = cases.make(plan.spec, shape, CAUSAL, device="cuda")
    cases.run(case, "gpu")
    plain = [case.tensors[name].clone() for name in ("dk", "dv")]
    cases.run(replace(case, spec=with_groups(plan, 1, in_turn=True).spec), "gpu")
    assert all(x.equal(case.tensors[name]) for x, name in zip(plain, ("dk", "dv"), strict=True))
    assert cases.verdict(case).ok
