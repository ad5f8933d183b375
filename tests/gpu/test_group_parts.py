"""Gradients with groups of heads in parts, as calls choose them, on the GPU."""

from __future__ import annotations

import pytest

from fa2gen import cases
from fa2gen.features import examples_of
from fa2gen.gpus import current_device
from fa2gen.groups import parts_of, with_groups
from fa2gen.options import Shape
from fa2gen.plan import make_plan
from fa2gen.select import best_spec
from fa2gen.spec import Problem

PROBLEMS = [
    Problem(direction="bwd", head_dim=64, mask="causal"),
    Problem(direction="bwd", head_dim=128, dtype="fp16"),
    Problem(direction="bwd", head_dim=128, mask="causal", varlen=True, sink=True),
    Problem(direction="bwd", head_dim=72, mask="window", deterministic=True),
    Problem(direction="bwd", head_dim=192, head_dim_v=128, mask="causal"),
    Problem(direction="bwd", head_dim=256, mask="causal", deterministic=True),
]


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: "_".join(problem.words))
def test_gradients(problem, arch):
    plan = make_plan(best_spec(problem, arch))
    for shape in (Shape(1, 1300, 1000, 8, 1), Shape(2, 333, 700, 12, 2)):
        for parts in {2, 4, parts_of(plan, shape, examples_of(problem)[0], current_device().num_sms)} - {1}:
            if shape.num_heads // shape.num_heads_kv % parts:
                continue
            case = cases.make(with_groups(plan, parts).spec, shape, device="cuda", with_dlse=True)
            cases.run(case, "gpu")
            verdict = cases.verdict(case)
            assert verdict.ok, f"{parts} parts, {shape}: {verdict}"
            first = [case.tensors[name].clone() for name in ("dk", "dv")]
            cases.run(case, "gpu")
            assert all(x.equal(case.tensors[name]) for x, name in zip(first, ("dk", "dv"), strict=True))
