"""The cost model's backward part. Per block of queries that a block of keys visits, in cycles of one SM (sm90):

    mma       N/2 for each wgmma m64nNk16 of the five products; of six where two warpgroups split the products, since
              both then make S
    smem      what the products read (A of S, dP and dQ, 2 KiB each, and every B), dS, and P where
              it passes written and read back, dQ on its way out, and what TMA writes, 128 bytes a cycle
    ex2       tile_m * tile_n / 16, twice that where the products are split: each warpgroup makes its own P
    issue     2.5 instructions an element of P and 2.5 one of dS, 4 warps issue a cycle
    l2        Q and dO in and the fp32 sums of dQ out, 27 bytes a cycle together

    block     max(max(mma, smem) + 0.76 * max(1, 2/w) * (ex2 + issue), l2) with w warpgroups, and 800 more with a single
              stage, which nothing loads while it is read

Shared memory is what limits it, and the arithmetic hides under a quarter of that. 0.76 was fitted to prototypes split
by keys on an H200 at 8k (64 x 128 and 80 x 128 at head dim 128, 128 x 128 at 64: busy tensor cores within 6%,
tests/unit/test_tune.py); one warpgroup, and products split, are the same formula, not measured.

A block of keys costs 2500 cycles beside, and its K, V, dK and dV at the rate of L2. The kernels before and after move
14 bytes an element of dQ, 18 a cycle, as FlashAttention-3's do there.

sm80 is the same with mma.sync in a square grid of warps, P and dS through shared memory, and no fitted number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

from fa2gen.layout import ELEMENT_BYTES, align_up
from fa2gen.plan import KernelPlan
from fa2gen.plan.sm90_bwd import Sm90BwdPlan
from fa2gen.tune.rates import (
    EX2_PER_CYCLE,
    L2_BYTES_PER_CYCLE,
    LANES_PER_CYCLE,
    SMEM_BYTES_PER_CYCLE,
    mma_sync_cycles,
)
from fa2gen.tune.visits import Visits, limits
from fa2gen.tune.visits import visits as visits_of

__all__ = ["block_cycles", "extra_cycles", "tile_cycles", "visits"]

INSTRUCTIONS_PER_P, INSTRUCTIONS_PER_DS = 2.5, 2.5
EXPOSED = 0.76
L2_BYTES_BOTH_WAYS = 27  # loads and reductions of fp32 at the same time
CYCLES_OF_A_LOAD = 800
CYCLES_PER_TILE = 2500
SUM_BYTES = 4  # of one element of dQ, in fp32

# Of an element: O and dO are read; a sum is cleared, and later read, and dQ is written.
EXTRA_BYTES_OF_O = 2 * ELEMENT_BYTES
EXTRA_BYTES_OF_DQ = SUM_BYTES + SUM_BYTES + ELEMENT_BYTES
EXTRA_BYTES_PER_CYCLE = 18


def visits(plan: KernelPlan, seqlen: int) -> Visits:
    """Blocks of queries that the blocks of keys of one head visit."""
    left, right = limits(plan.problem)
    return visits_of(seqlen, plan.tile_n, plan.tile_m, before=right, after=left)


def block_cycles(plan: KernelPlan) -> float:
    """Predicted SM cycles of one block of queries."""
    if plan.arch == "sm90":
        return _block_cycles_sm90(cast(Sm90BwdPlan, plan))
    return _block_cycles_sm80(plan)


def tile_cycles(plan: KernelPlan) -> float:
    """Of a block of keys, beside its blocks of queries."""
    return CYCLES_PER_TILE + 2 * ELEMENT_BYTES * plan.tile_n * (plan.head_dim + plan.head_dim_v) / L2_BYTES_PER_CYCLE


def extra_cycles(plan: KernelPlan, seqlen: int) -> float:
    """Of one head, in the kernels before and after the main one."""
    rows = align_up(seqlen, plan.tile_m)
    row = EXTRA_BYTES_OF_O * plan.head_dim_v + EXTRA_BYTES_OF_DQ * plan.head_dim
    return rows * row / EXTRA_BYTES_PER_CYCLE


def _block_cycles_sm90(plan: Sm90BwdPlan) -> float:
    mma = read = 0.0
    for count, n, a_bytes in _wgmmas(plan):
        mma += count * n / 2
        read += count * (a_bytes + 16 * ELEMENT_BYTES * n)
    scores = plan.tile_m * plan.tile_n
    dq_trips = 2 if plan.stages_dq else 1  # staged, it is written and then read by the bulk reduction
    sums = SUM_BYTES * plan.dq_block_floats
    copied = plan.q_tile.bytes + plan.o_tile.bytes
    score_trips = 3 if plan.passes_p else 1
    smem = (read + score_trips * ELEMENT_BYTES * scores + dq_trips * sums + copied) / SMEM_BYTES_PER_CYCLE
    l2 = (ELEMENT_BYTES * plan.tile_m * (plan.head_dim + plan.head_dim_v) + sums) / L2_BYTES_BOTH_WAYS
    times = 2 if plan.splits_products else 1
    issue = (times * INSTRUCTIONS_PER_P + INSTRUCTIONS_PER_DS) * scores / LANES_PER_CYCLE
    exposed = EXPOSED * max(1.0, 2 / plan.num_mma_warpgroups) * (times * scores / EX2_PER_CYCLE + issue)
    return max(max(mma, smem) + exposed, l2) + _wait(plan)


def _wgmmas(plan: Sm90BwdPlan) -> Iterator[tuple[int, int, int]]:
    """(how many, N, bytes of A in shared memory) of each kind of wgmma in one block."""
    shared = 64 * 16 * ELEMENT_BYTES
    if plan.passes_p:
        yield plan.qk.num_k_steps + plan.vo.num_k_steps, plan.wgmma_s.n, shared
        for width in (plan.qk, plan.vo):
            yield width.num_panels * plan.num_k_steps_m, plan.wgmma_panel.n, shared
        for one in (one for group in plan.dq_slices for one in group):
            yield plan.num_k_steps_n, one.wgmma.n, shared
        return
    groups = plan.num_mma_warpgroups
    s, dp, dkv, dq = (2, 1, 1, 1) if plan.splits_products else (groups, groups, groups, groups)
    yield s * plan.qk.num_k_steps + dp * plan.vo.num_k_steps, plan.wgmma_s.n, shared
    yield dkv * plan.num_k_steps_m, plan.wgmma_dkv(plan.qk).n, 0
    yield dkv * plan.num_k_steps_m, plan.wgmma_dkv(plan.vo).n, 0
    yield dq * plan.num_k_steps_n, plan.wgmma_dq.n, shared
    if plan.has_dq_rest:
        yield dq * plan.num_k_steps_n, plan.wgmma_dq_rest.n, shared


def _block_cycles_sm80(plan: KernelPlan) -> float:
    tile_m, tile_n, d, dv = plan.tile_m, plan.tile_n, align_up(plan.head_dim, 16), align_up(plan.head_dim_v, 16)
    mma = 3 * mma_sync_cycles(tile_m, tile_n, d) + 2 * mma_sync_cycles(tile_m, tile_n, dv)
    scores = tile_m * tile_n
    issue = (INSTRUCTIONS_PER_P + INSTRUCTIONS_PER_DS) * scores / LANES_PER_CYCLE
    # S and dP read rows of Q or dO and of K or V; dV, dK and dQ read scores and one of those.
    operands = (2 * tile_m + 2 * tile_n) * d + (2 * tile_m + tile_n) * dv + 3 * scores
    elements = math.sqrt(plan.num_mma_warps) * operands + 2 * scores + tile_m * (d + dv)
    smem = ELEMENT_BYTES * elements / SMEM_BYTES_PER_CYCLE
    exposed = EXPOSED / plan.min_ctas_per_sm * (scores / EX2_PER_CYCLE + issue)
    return max(mma, smem) + exposed + _wait(plan)


def _wait(plan: KernelPlan) -> float:
    return CYCLES_OF_A_LOAD if plan.num_stages == 1 else 0
