"""How gradients' groups of heads are split: the choice by a call's sizes, and what refuses it."""

from __future__ import annotations

import itertools

import pytest

from fa2gen.errors import InfeasibleSpec, InvalidInput
from fa2gen.groups import MOST_ROWS_IN_TURN, abreast_of, parts_of, tail_of, turns_of, walk_of, with_groups
from fa2gen.launch import launch_of
from fa2gen.options import Options, Shape
from fa2gen.plan import default_tiling, make_plan
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Problem

SMS = 132


def plan_for(head_dim: int, arch: str = "sm90", mask: str = "causal", **fields):
    return make_plan(best_spec(Problem(direction="bwd", head_dim=head_dim, mask=mask, **fields), arch))


# What was the fastest of 1, 2, 4, 8 on an H100, or within 1% of it.
@pytest.mark.parametrize(
    ("mask", "sizes", "head_dim", "fastest"),
    [
        ("causal", (8, 2048, 32, 1), 64, (8,)),
        ("causal", (2, 8192, 32, 1), 64, (8,)),
        ("causal", (4, 4096, 16, 2), 256, (4,)),
        ("causal", (8, 2048, 32, 4), 128, (2, 4)),
        ("causal", (8, 2048, 32, 8), 128, (1,)),
        ("causal", (2, 8192, 32, 8), 128, (1,)),
        ("causal", (2, 8192, 64, 8), 128, (2,)),
        ("causal", (2, 8192, 64, 8), 64, (2,)),
        ("causal", (1, 4096, 32, 4), 128, (4,)),
        ("causal", (2, 8192, 16, 16), 128, (1,)),
        ("full", (8, 2048, 32, 1), 64, (1, 2)),
        ("full", (4, 4096, 16, 2), 256, (4,)),
        ("full", (8, 2048, 32, 4), 128, (1,)),
        ("full", (2, 8192, 64, 8), 128, (1,)),
        ("full", (1, 1024, 32, 4), 128, (4,)),
    ],
)
def test_the_choice_is_the_fastest_measured(mask, sizes, head_dim, fastest):
    batch, seqlen, heads, heads_kv = sizes
    plan = plan_for(head_dim, mask=mask)
    shape = Shape(batch, seqlen, seqlen, heads, heads_kv)
    assert parts_of(plan, shape, Options(causal=mask == "causal"), SMS) in fastest


def test_a_group_has_parts_that_divide_it():
    plan = plan_for(64)
    for group in (2, 3, 5, 6, 7, 48, 71):
        parts = parts_of(plan, Shape(1, 8192, 8192, group, 1), Options(causal=True), SMS)
        assert group % parts == 0
        assert parts > 1 or group == 71, "one head of K and V does not fill a device; 71 has no divisor up to 32"
        launch_of(with_groups(plan, parts), Shape(1, 8192, 8192, group, 1), Options(causal=True), SMS)


def test_parts_that_do_not_divide_a_group_are_refused():
    with pytest.raises(InvalidInput, match="2 parts, which do not divide groups of 3 heads"):
        launch_of(with_groups(plan_for(64), 2), Shape(1, 64, 64, 3, 1), Options(causal=True), SMS)


def test_what_has_no_parts():
    shape, options = Shape(1, 512, 512, 8, 1), Options(causal=True)
    assert parts_of(plan_for(64, score="2 * s"), shape, options, SMS) == 1
    assert parts_of(plan_for(192, dropout=True), shape, options, SMS) == 1, "split by products"
    assert parts_of(make_plan(best_spec(Problem(head_dim=64), "sm90")), shape, options, SMS) == 1
    for problem, why in (
        (Problem(head_dim=64), "only gradients are sums over a group: 1"),
        (Problem(direction="decode", head_dim=64), "only gradients are sums over a group: 1"),
        (Problem(direction="bwd", head_dim=128, score="2 * s"), "with an expression: 1"),
        (Problem(direction="bwd", head_dim=192, dropout=True), "with 64 keys: 1"),
    ):
        tiling = default_tiling(problem, "sm90").model_copy(update={"group_parts": 2})
        with pytest.raises(InfeasibleSpec, match=why):
            make_plan(KernelSpec(problem=problem, tiling=tiling))


def test_heads_go_abreast_where_lengths_differ():
    """In ragged batches of documents; not where a group has one head, nor where it is not built."""
    documents = Shape(12, 8192, 8192, 64, 8)
    ragged = plan_for(128, varlen=True)
    assert abreast_of(ragged, documents)
    assert not abreast_of(ragged, documents._replace(num_heads_kv=64))
    assert not abreast_of(ragged, documents._replace(batch=1)), "one long sequence is as a dense batch"
    assert not abreast_of(plan_for(128), documents) and not abreast_of(plan_for(128, "sm80", varlen=True), documents)
    assert not abreast_of(plan_for(128, varlen=True, allow="i == j"), documents)
    abreast = with_groups(ragged, 1, abreast=True)
    assert abreast.name == f"{ragged.name}_h1" and abreast.section_bytes < ragged.section_bytes
    ampere = plan_for(128, "sm80", varlen=True)
    assert ampere.tiling.heads_abreast and ampere.tile_n == 128 and with_groups(ampere, 2).tiling.heads_abreast
    for problem, why in (
        (Problem(head_dim=64), "only gradients are sums over a group: 0"),
        (Problem(direction="bwd", head_dim=64, allow="i == j"), "a mask of an expression"),
    ):
        tiling = default_tiling(problem, "sm90").model_copy(update={"heads_abreast": 1})
        with pytest.raises(InfeasibleSpec, match=why):
            make_plan(KernelSpec(problem=problem, tiling=tiling))


def test_blocks_of_keys_come_in_turn_where_it_was_measured():
    """At the head dims that have room for them, where a multiprocessor has several blocks of keys."""

    def plan_for(head_dim: int, arch: str = "sm90", mask: str = "causal", **fields):
        problem = Problem(direction="bwd", head_dim=head_dim, mask=mask, **fields)
        return make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))

    for (head_dim, most), mask in itertools.product(MOST_ROWS_IN_TURN.items(), ("full", "causal")):
        plan = plan_for(head_dim, mask=mask)
        for batch, seqlen in ((32, 512), (8, 2048), (4, 4096), (1, 16384)):
            shape = Shape(batch, seqlen, seqlen, 32, 32)
            found = walk_of(plan, shape, Options(causal=mask == "causal"), SMS)
            assert found.in_turn == turns_of(plan, shape, SMS) == (seqlen <= most)
            assert found.parts == 1 and not found.abreast
        assert not turns_of(plan, Shape(1, 2048, 2048, 32, 32), SMS), "fewer than four blocks a multiprocessor"
        assert not turns_of(plan, Shape(8, 4096, 4096, 64, 8), SMS), "eight heads a walk"
    short = Shape(8, 2048, 2048, 32, 32)
    for other in (
        *(plan_for(head_dim) for head_dim in (40, 112, 128, 192)),
        plan_for(64, "sm80"),
        plan_for(64, varlen=True),
        plan_for(64, dropout=True),
        plan_for(64, score="2 * s"),
        plan_for(64, mask="window"),
        plan_for(64, deterministic=True),
        make_plan(best_spec(Problem(head_dim=64), "sm90")),
    ):
        assert not turns_of(other, short, SMS), other.name
    for score in ("cap * tanh(s / cap)", "s - slope[h] * abs(i + seqlen_k - seqlen_q - j)"):
        assert turns_of(plan_for(96, score=score), short, SMS)
    chosen = with_groups(plan_for(64), 1, in_turn=True)
    assert chosen.name == f"{plan_for(64).name}_t1"
    assert launch_of(chosen, short, Options(causal=True), SMS).grids[1] == (SMS, 1, 1)
    for problem, why in (
        (Problem(head_dim=64), "only sm90's gradients whose dQ lags have it: 0"),
        (Problem(direction="bwd", head_dim=128), "needs lag, a dense batch without dropout"),
        (Problem(direction="bwd", head_dim=64, dropout=True), "needs lag, a dense batch without dropout"),
        (Problem(direction="bwd", head_dim=96, allow="j % 3 < i"), "without dropout, mask of an expression"),
        (Problem(direction="bwd", head_dim=96, score="s * gain[h]", learned="gain"), "or tensors that learn"),
    ):
        tiling = default_tiling(problem, "sm90").model_copy(update={"keys_in_turn": 1})
        with pytest.raises(InfeasibleSpec, match=why):
            make_plan(KernelSpec(problem=problem, tiling=tiling))


# What was the fastest of 1, 2, 3, 4, 6, 8 parts of the last wave on an H100, or within 3% of it.
@pytest.mark.parametrize(
    ("head_dim", "mask", "sizes", "fastest"),
    [
        (64, "causal", (1, 4096, 2), (3,)),
        (64, "causal", (1, 4096, 4), (2,)),
        (64, "causal", (2, 8192, 1), (2,)),
        (64, "full", (1, 4096, 2), (2,)),
        (64, "full", (1, 1024, 8), (1, 2)),
        (64, "full", (1, 4096, 4), (1,)),
        (128, "causal", (1, 4096, 2), (3,)),
        (128, "causal", (1, 4096, 4), (2,)),
        (128, "causal", (1, 512, 16), (1,)),
        (128, "full", (2, 8192, 1), (1,)),
        (128, "full", (2, 8192, 16), (1, 3)),
        (128, "full", (8, 2048, 16), (1,)),
        (192, "full", (2, 8192, 10), (3, 5, 8)),
        (256, "causal", (1, 4096, 2), (2, 3)),
        (256, "causal", (1, 2048, 8), (1,)),
        (256, "full", (2, 8192, 1), (3,)),
        (256, "full", (2, 8192, 8), (2, 3, 5, 8)),
        (256, "full", (1, 16384, 8), (2, 8)),
        (256, "full", (8, 2048, 8), (1, 3)),
    ],
)
def test_the_tail_is_the_fastest_measured(head_dim, mask, sizes, fastest):
    batch, seqlen, heads = sizes
    shape = Shape(batch, seqlen, seqlen, heads, heads)
    assert tail_of(plan_for(head_dim, mask=mask), shape, Options(causal=mask == "causal"), SMS) in fastest


def test_the_tail_is_what_a_wave_lacks():
    """No block of threads without a block of keys, whatever the number of those."""
    plan, options = with_groups(plan_for(128, mask="full"), tail=3), Options()
    for heads, whole in ((1, 0), (32, 0), (33, 0), (34, 132), (66, 132), (67, 264)):
        launch = launch_of(plan, Shape(1, 512, 512, heads, heads), options, SMS)
        assert launch.values["num_whole_blocks"] == whole
        assert launch.grids[1] == (whole + 3 * (4 * heads - whole), 1, 1)
    for problem, why in (
        (Problem(head_dim=64), "only sm90's gradients have them: 1"),
        (Problem(direction="bwd", head_dim=64, varlen=True), "needs sm90, a dense batch"),
        (Problem(direction="bwd", head_dim=64, score="2 * s"), "needs sm90, a dense batch without expression"),
        (Problem(direction="bwd", head_dim=192, dropout=True), "not 64 keys split by products"),
    ):
        tiling = default_tiling(problem, "sm90").model_copy(update={"tail_parts": 2})
        with pytest.raises(InfeasibleSpec, match=why):
            make_plan(KernelSpec(problem=problem, tiling=tiling))


def test_fewer_blocks_want_no_fewer_parts():
    for head_dim, arch in ((64, "sm90"), (128, "sm80"), (256, "sm90")):
        plan = plan_for(head_dim, arch)
        parts = [parts_of(plan, Shape(b, 4096, 4096, 64, 2), Options(causal=True), SMS) for b in (1, 2, 4, 8, 16, 64)]
        assert parts == sorted(parts, reverse=True)
        assert parts[-1] <= 2
