"""Gradients with groups of heads, or the last blocks of keys, in parts, as calls choose them, on the GPU."""

from __future__ import annotations

import pytest

from fa2gen import cases
from fa2gen.features import examples_of
from fa2gen.gpus import current_device
from fa2gen.groups import parts_of, tail_of, with_groups
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


TAILS = [
    Problem(direction="bwd", head_dim=64, mask="causal"),
    Problem(direction="bwd", head_dim=72, mask="window", deterministic=True),
    Problem(direction="bwd", head_dim=128, dropout=True),
    Problem(direction="bwd", head_dim=128, dtype="fp16", mask="causal", deterministic=True, sink=True),
    Problem(direction="bwd", head_dim=192, head_dim_v=128, partial=True),
    Problem(direction="bwd", head_dim=256),
]


@pytest.mark.parametrize("problem", TAILS, ids=lambda problem: "_".join(problem.words))
def test_the_last_blocks_of_keys(problem):
    """Of one wave, of two and more, of one block too many, and of fewer queries than parts."""
    plan, num_sms = make_plan(best_spec(problem, "sm90")), current_device().num_sms
    of_two = -(-(num_sms + 1) // -(-900 // plan.tile_n))  # heads of 900 keys
    for shape in (Shape(1, 4000, 4096, 2, 1), Shape(1, 300, 900, of_two, of_two), Shape(2, 100, 500, 3, 3)):
        for parts in {2, 3, 8, tail_of(plan, shape, examples_of(problem)[0], num_sms)} - {1}:
            case = cases.make(with_groups(plan, tail=parts).spec, shape, device="cuda", with_dlse=True)
            cases.run(case, "gpu")
            verdict = cases.verdict(case)
            assert verdict.ok, f"{parts} parts, {shape}: {verdict}"
            first = [case.tensors[name].clone() for name in ("dk", "dv")]
            cases.run(case, "gpu")
            assert all(x.equal(case.tensors[name]) for x, name in zip(first, ("dk", "dv"), strict=True))
