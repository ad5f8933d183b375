"""Plans of the SM80 backward kernels, counted again: shared memory, which warp has what, addresses, launches."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from fa2gen import InfeasibleSpec
from fa2gen.features import examples_of
from fa2gen.launch import launch_of
from fa2gen.layout import accumulator_position, swizzle
from fa2gen.options import Shape
from fa2gen.plan import feasible_tilings, make_plan
from fa2gen.plan.sm80_bwd import Sm80BwdPlan
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem, Tiling

LIMITS = {"8.0": 166_912, "8.6": 101_376, "9.0": 232_448}
"""Bytes of shared memory that a block may have, by compute capability."""


def scaled(plan, softmax_scale):
    """The options of a typical call of a plan, with another scale."""
    return examples_of(plan.problem)[0]._replace(softmax_scale=softmax_scale)


def plans():
    for d, v in ((192, 128), (64, 128), (72, 40), (256, 8), (8, 256)):
        problem = Problem(direction="bwd", head_dim=d, head_dim_v=v)
        yield make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm80")))
    for head_dim in range(8, 257, 8):
        problem = Problem(direction="bwd", head_dim=head_dim, mask="causal" if head_dim % 16 else "full")
        others = feasible_tilings(problem, "sm80") if head_dim % 40 == 0 else ()
        others = itertools.islice(others, 0, None, 1 if head_dim == 80 else 7)
        of_devices = (default_tiling(problem, "sm80", limit) for limit in LIMITS.values())
        for tiling in dict.fromkeys((*of_devices, *others)):
            yield make_plan(KernelSpec(problem=problem, tiling=tiling))


PLANS: dict[str, Any] = {plan.name: plan for plan in plans()}
every_plan = pytest.mark.parametrize("name", PLANS)


def column_of(width, column_warp, num_warps, register):
    """The first of the 8 columns that a warp's accumulator `register` of 16 rows lies in; None past the last step."""
    i, within = divmod(register, 8)
    step = column_warp + num_warps * i
    return 16 * step + within // 4 * 8 if step < width.num_k_steps else None


@every_plan
def test_shared_memory(name):
    plan = PLANS[name]
    parts = [
        (plan.memory.offsets["k"], plan.k_tile.bytes),
        (plan.memory.offsets["v"], plan.v_tile.bytes),
        *([(plan.memory.offsets["p"], plan.p_tile.bytes)] if plan.has_peers else []),
        (plan.memory.offsets["ds"], plan.p_tile.bytes),
    ]
    statistics = ("lse", "dpsum")
    for stage in range(plan.num_stages):
        first = plan.memory.offsets["stages"] + stage * plan.stage_bytes
        parts += [
            (first, plan.q_tile.bytes),
            (first + plan.memory.in_stage["dout"], plan.o_tile.bytes),
        ]
        if not plan.keeps_statistics_once:
            parts += [(first + plan.memory.in_stage[name], 4 * plan.tile_m) for name in statistics]
    if plan.keeps_statistics_once:
        parts += [(plan.memory.offsets[name], 4 * plan.tile_m) for name in statistics]
    end = 0
    for begin, size in parts:
        assert begin == end and begin % 128 == 0, "bits 4 to 6 of a base would change a swizzle"
        end = begin + size
    assert end == plan.shared_memory_bytes <= LIMITS["9.0"]
    assert (plan.p_tile.rows, plan.p_tile.head_dim) == (plan.tile_n, plan.tile_m)
    assert all(entry.shared_memory_bytes <= plan.shared_memory_bytes for entry in plan.entry_points)


@every_plan
def test_scores_belong_to_one_warp(name):
    plan = PLANS[name]
    found = Counter()
    for warp, tile in itertools.product(range(plan.num_mma_warps), range(plan.num_row_tiles)):
        key = warp // plan.num_peers * plan.keys_per_warp + 16 * tile
        query = warp % plan.num_peers * plan.queries_per_warp
        found.update((k, q) for k in range(key, key + 16) for q in range(query, query + plan.queries_per_warp))
    assert found == Counter(itertools.product(range(plan.tile_n), range(plan.tile_m)))
    assert plan.num_acc_s * 32 == 16 * plan.queries_per_warp


@every_plan
def test_sums_have_every_element_once(name):
    """dK and dV by keys and peers, dQ by rows and column warps: 8 columns at a time."""
    plan = PLANS[name]
    for width, rows, row_tiles, num_warps, registers in (
        (plan.qk, plan.tile_n, plan.num_row_tiles, plan.num_peers, plan.num_acc_dkv(plan.qk)),
        (plan.vo, plan.tile_n, plan.num_row_tiles, plan.num_peers, plan.num_acc_dkv(plan.vo)),
        (plan.qk, plan.tile_m, plan.num_dq_row_tiles, plan.num_dq_column_warps, plan.num_acc_dq),
    ):
        found = Counter()
        for warp, tile in itertools.product(range(plan.num_mma_warps), range(row_tiles)):
            row = (warp // num_warps * row_tiles + tile) * 16
            columns = (column_of(width, warp % num_warps, num_warps, r) for r in range(0, registers, 4))
            found.update((row, column) for column in columns if column is not None)
        steps = range(0, 16 * width.num_k_steps, 8)
        assert found == Counter(itertools.product(range(0, rows, 16), steps))
    assert plan.dq_block_floats == plan.num_mma_warps * 32 * plan.num_dq_row_tiles * plan.num_acc_dq


@every_plan
def test_steps_of_a_warp_have_no_carry(name):
    """Where a lane reads or writes its warp's step `i`: what the templates compute from the address of its first step
    with an xor and a constant is the address in the swizzled panels."""
    plan = PLANS[name]
    span, chunks = plan.tiling.swizzle_bytes, plan.chunks_per_panel_row

    def chunk_step(address, chunk, panel_bytes):
        return (address ^ (chunk % chunks << 4)) + chunk // chunks * panel_bytes

    def direct(row, chunk, panel_bytes):
        panel, within = divmod(chunk, chunks)
        return panel * panel_bytes + swizzle(row * span + 16 * within, span)

    def check(tile, firsts, later):
        for row, first, i in itertools.product(range(16), firsts, later):
            if first + i < tile.count * chunks:
                start = direct(row, first, tile.panel_bytes)
                assert chunk_step(start, i, tile.panel_bytes) == direct(row, first + i, tile.panel_bytes)

    for tile, num_warps, steps in (
        (plan.q_tile, plan.num_peers, plan.num_column_steps_dkv(plan.qk)),
        (plan.o_tile, plan.num_peers, plan.num_column_steps_dkv(plan.vo)),
        (plan.k_tile, plan.num_dq_column_warps, plan.num_column_steps_dq),
    ):
        later = [2 * num_warps * i + half for i in range(steps) for half in (0, 1)]
        check(tile, [2 * warp for warp in range(num_warps)], later)
    for tile, width in ((plan.k_tile, plan.qk), (plan.v_tile, plan.vo)):
        check(tile, (0, 1), range(0, 2 * width.num_k_steps, 2))
    warp_chunks = plan.queries_per_warp // 8
    check(plan.p_tile, [peer * warp_chunks for peer in range(plan.num_peers)], range(warp_chunks))
    dq_chunks = 2 * plan.num_dq_row_tiles
    check(plan.p_tile, range(0, plan.tile_m // 8, dq_chunks), range(0, dq_chunks, 2))


def test_mma_has_wgmmas_accumulator_layout():
    """What the counts above rest on: registers 4i and 4i + 1 are row lane / 4, the next two 8 rows on, of 8 columns."""
    assert {accumulator_position(0, lane, 5)[0] - lane // 4 for lane in range(32)} == {0}
    assert {accumulator_position(0, lane, 6)[0] - lane // 4 for lane in range(32)} == {8}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_every_head_dim_has_a_default(limit):
    for head_dim, mask in itertools.product(range(8, 257, 8), ("full", "causal")):
        problem = Problem(direction="bwd", head_dim=head_dim, mask=mask)
        plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm80", limit)))
        assert plan.shared_memory_bytes <= limit and plan.template == "sm80/bwd.cu.j2" and not plan.tensor_maps
    with pytest.raises(InfeasibleSpec, match=r"(?s)gradients of head dim 256.*nearest"):
        default_tiling(Problem(direction="bwd", head_dim=256), "sm80", 48 << 10)


@pytest.mark.parametrize("deterministic", [False, True])
def test_launch_facts(deterministic):
    problem = Problem(direction="bwd", head_dim=128, mask="causal", deterministic=deterministic)
    plan: Any = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm80")))
    launch = launch_of(plan, Shape(2, 300, 1000, 12, 4), scaled(plan, 0.125), 132)
    assert (plan.tile_m, plan.tile_n) == (64, 128)
    assert launch.grids == tuple((count, 1, 1) for count in (5 * 24, 8 * 8, 5 * 24))
    assert launch.scratch["lse_log2"] == 5 * 64 * 24 and launch.scratch["dq_acc"] == 5 * 64 * 128 * 24
    assert launch.scratch.get("dq_turns", 0) == (5 * 24 if deterministic else 0)
    tensors = ("q", "k", "v", "o", "dout", "dq", "dk", "dv")
    assert {param.name for param in plan.params} - set(launch.values) == {
        *(*tensors, "lse", "dlse", "lse_log2", "dpsum", "dq_acc"),
        *(["dq_turns"] if deterministic else []),
        *(f"{name}_{step}_stride" for name in tensors for step in ("batch", "row", "head")),
    }


def test_what_does_not_fit_says_why():
    for head_dim, changes, words in (
        (128, {"tile_m": 128}, "shared memory|registers"),
        (64, {"tile_m": 128, "tile_n": 256}, "registers"),
        (128, {"tile_n": 96}, "keys"),
        (128, {"tile_m": 80}, "query rows"),
        (128, {"num_mma_warps": 6}, "mma warps"),
        (128, {"num_stages": 3}, "stages"),
        (128, {"lazy_rescale": 1}, "lazy rescale"),
        (256, {"tile_m": 128, "tile_n": 64}, "shared memory"),
        (128, {"num_mma_warps": 4}, "registers"),
    ):
        tiling = Tiling(**{"arch": "sm80", "tile_m": 64, "tile_n": 128, "num_stages": 2, "num_mma_warps": 8} | changes)
        spec = KernelSpec(problem=Problem(direction="bwd", head_dim=head_dim), tiling=tiling)
        assert any(rule.rule in words for rule in Sm80BwdPlan(spec).broken_rules())
        with pytest.raises(InfeasibleSpec, match=f"(?s)({words}).*nearest"):
            make_plan(spec)
