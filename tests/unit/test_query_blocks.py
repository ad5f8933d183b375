"""Which blocks of queries a block of keys walks, in what order, where turns begin: from the rendered text itself."""

from __future__ import annotations

import ctypes
import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from fa2gen.features import MASKS, examples_of, key_range
from fa2gen.launch import launch_of
from fa2gen.options import Options, Shape
from fa2gen.plan import make_plan
from fa2gen.render import render
from fa2gen.spec import KernelSpec, Problem, Tiling
from tests.unit.test_launch_facts import compiled, needs_compiler, params_of

_DOORS = """
extern "C" {
int begin(void const* params, int key) {
    Params const& p = *static_cast<Params const*>(params);
    return query_begin(p, seqlen_of(p, 0), key);
}
int end(void const* params, int key) {
    Params const& p = *static_cast<Params const*>(params);
    return QUERY_END;
}
int turn(void const* params, int m_block) {
    Params const& p = *static_cast<Params const*>(params);
    return key_begin(p, seqlen_of(p, 0), m_block * kTileM) / kTileN;
}
// Of one block of keys: its n block, head and batch entry; then m block, head, index over all heads, whether masked.
int walk(void const* params, int index, int* out) {
    Params const& p = *static_cast<Params const*>(params);
    KeyBlock const block = key_block_at(p, index);
    BlockRange const blocks = query_blocks(p, seqlen_of(p, block.bidb), block.n_block * kTileN);
    out[0] = block.n_block;
    out[1] = block.head_kv;
    out[2] = block.bidb;
    int steps = 0;
    QueryWalk walk = start_walk(p, seqlen_of(p, block.bidb), block, blocks);
    for (; walk.remaining > 0; walk.next(p, blocks)) {
        int* const step = out + 3 + 4 * steps++;
        step[0] = walk.m_block;
        step[1] = walk.bidh;
        step[2] = walk.query_block;
        step[3] = walk.needs_mask(blocks);
    }
    return steps;
}
}
"""
TILINGS = (
    Tiling(arch="sm90", tile_m=80, tile_n=128, num_mma_warps=8),  # walks down
    Tiling(arch="sm80", tile_m=64, tile_n=64, num_mma_warps=8),
    Tiling(arch="sm80", tile_m=64, tile_n=64, num_mma_warps=8, heads_abreast=1),
)
KERNELS = [(tiling, mask) for tiling in TILINGS for mask in MASKS]


def plan_of(tiling: Tiling, mask: str) -> Any:
    problem = Problem(direction="bwd", head_dim=128, mask=mask, deterministic=True)
    return make_plan(KernelSpec(problem=problem, tiling=tiling))


@functools.cache
def library(tiling: Tiling, mask: str) -> ctypes.CDLL:
    plan = plan_of(tiling, mask)
    rendered = render(plan)
    wanted = ("common/params.", "rooms/", "common/query_walk.")
    text = [
        line
        for line, origin in zip(rendered.source.splitlines(), rendered.origins, strict=True)
        if origin.startswith(wanted) or line.startswith("constexpr int kTile")
    ]
    end = "query_end(p, seqlen_of(p, 0), key)" if plan.left_edge else "key < p.seqlen_k ? p.seqlen_q : 0"
    return compiled("\n".join(text) + _DOORS.replace("QUERY_END", end))


def calls(plan: Any, count: int) -> Iterator[tuple[Shape, Options]]:
    """Sizes about the edges of blocks, and options of a mask."""
    rng, n = random.Random(5), plan.tile_n
    edges = (-1, -1, 0, 1, 17, n - 1, n, n + 1, 3 * n, 1000)
    for _ in range(count):
        lengths = [rng.choice([rng.randint(1, 500), step, 2 * step, step + 1, 1]) for step in (plan.tile_m, n)]
        options = rng.choice(examples_of(plan.problem))
        if MASKS[plan.mask].general:
            left, right, chunk = rng.choice(edges), rng.choice(edges), rng.choice((0, 0, 1, 48, n, 200, 1000))
            causal = rng.random() < 0.4
            options = Options(
                causal=causal, window_left=left, window_right=right, chunk=chunk, deterministic=plan.deterministic
            )
        heads_kv, group = rng.randint(1, 2), rng.randint(1, 3)
        yield Shape(rng.randint(1, 2), *lengths, heads_kv * group, heads_kv), options


@needs_compiler
@pytest.mark.parametrize(("tiling", "mask"), KERNELS)
def test_which_queries_see_a_key_against_the_definition(tiling, mask):
    plan, facts = plan_of(tiling, mask), library(tiling, mask)
    for shape, options in calls(plan, 300):
        packed = params_of(plan, shape, options)
        ranges = [range(*key_range(options, shape.seqlen_q, shape.seqlen_k, row)) for row in range(shape.seqlen_q)]
        for key in (*range(0, shape.seqlen_k, 7), shape.seqlen_k - 1, shape.seqlen_k):
            seen = [row for row, keys in enumerate(ranges) if key in keys]
            found = range(facts.begin(packed, key), min(facts.end(packed, key), shape.seqlen_q))
            assert [*found] == seen, f"{shape}, {options}, key {key}"


@needs_compiler
@pytest.mark.parametrize(("tiling", "mask"), KERNELS)
def test_walks_against_the_definition(tiling, mask):
    """Each block of keys is walked once, over all blocks of queries that see it and no other, head by head or all heads
    abreast, masked where needed; and the blocks of keys that walk over a block of queries are consecutive from its
    first turn on."""
    plan, facts = plan_of(tiling, mask), library(tiling, mask)
    out = (ctypes.c_int * 4096)()
    for shape, options in calls(plan, 150):
        packed = params_of(plan, shape, options)
        group = shape.num_heads // shape.num_heads_kv
        num_m_blocks = -(-shape.seqlen_q // plan.tile_m)
        ranges = [range(*key_range(options, shape.seqlen_q, shape.seqlen_k, row)) for row in range(shape.seqlen_q)]
        walked, visitors = set(), [[] for _ in range(num_m_blocks)]
        for index in range(launch_of(plan, shape, options, 1).grids[1][0]):
            count = facts.walk(packed, index, out)
            n_block, head_kv, batch = out[:3]
            walked.add((n_block, head_kv, batch))
            keys = range(n_block * plan.tile_n, min((n_block + 1) * plan.tile_n, shape.seqlen_k))
            expected = []
            for m_block in range(num_m_blocks):
                rows = ranges[m_block * plan.tile_m : (m_block + 1) * plan.tile_m]
                counts = [len(range(max(seen.start, keys.start), min(seen.stop, keys.stop))) for seen in rows]
                if any(counts):
                    whole = len(keys) == plan.tile_n and set(counts) == {len(keys)}
                    expected.append((m_block, not whole))
            if plan.walks_queries_down:
                expected.reverse()
            found = [tuple(out[3 + 4 * i : 7 + 4 * i]) for i in range(count)]
            where = f"{shape}, {options}, block of keys {n_block}"
            heads = range(head_kv * group, (head_kv + 1) * group)
            steps = [(block, head) for head in heads for block in expected]
            if tiling.heads_abreast:
                steps = [(block, head) for block in expected for head in heads]
            assert found == [
                (m_block, head, (batch * shape.num_heads + head) * num_m_blocks + m_block, masked)
                for (m_block, masked), head in steps
            ], where
            if (head_kv, batch) == (0, 0):
                for m_block, _ in expected:
                    visitors[m_block].append(n_block)
        assert len(walked) == index + 1
        for m_block, n_blocks in enumerate(visitors):
            if n_blocks:
                first = facts.turn(packed, m_block)
                assert sorted(n_blocks) == [*range(first, first + len(n_blocks))], f"{shape}, {options}, {m_block}"
