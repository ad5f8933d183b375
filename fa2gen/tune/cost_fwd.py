"""The cost model's forward part. Per block of keys, in cycles of one SM (sm90):

    mma       N/2 for each wgmma m64nNk16 of S = Q K^T and of O += P V
    ex2       tile_m * tile_n / 16: one exponential an element, 16 a cycle
    issue     5.7 instructions an element of S and one a register of O for its rescale, 4 warps issue a cycle
    smem      what wgmma reads and TMA writes, 128 bytes a cycle; padded panels are written whole
    l2        K and V, 36 bytes a cycle

    block     max(310 + mma + exposed * (ex2 + issue), smem, l2); 310 are barriers and waits, whatever the block's size
    exposed   the part of the softmax that no other warpgroup's matrix products hide: with r = (ex2 + issue) / mma and
              w warpgroups, 0.18 r max(1, 2/w) + 0.2 max(0, r - 1) max(0, 3 - w)

A tile costs its blocks, 2500 cycles for its first fetch, its epilogue and its hand-over, and 1000 more where O takes
Q's place and the next Q has to wait for it. A ring of s stages costs 1 + 0.02 / (s - 1), narrow panels cost PANELS.
310, `exposed` and 2500 were fitted to prototypes on an H200: the block model is within 6% of nine measured tilings of
head dims 64, 128 and 256 (tests/unit/test_tune.py has them).

sm80 is the same with mma.sync, K and V read from shared memory by each warp, and no fitted number.
"""

from __future__ import annotations

from typing import cast

from fa2gen.layout import align_up
from fa2gen.plan import KernelPlan
from fa2gen.plan.sm80_fwd import Sm80FwdPlan
from fa2gen.plan.sm90_fwd import Sm90FwdPlan
from fa2gen.tune.rates import (
    EX2_PER_CYCLE,
    L2_BYTES_PER_CYCLE,
    SMEM_BYTES_PER_CYCLE,
    mma_sync_cycles,
)
from fa2gen.tune.visits import Visits, limits
from fa2gen.tune.visits import visits as visits_of

__all__ = ["block_cycles", "extra_cycles", "tile_cycles", "visits"]

INSTRUCTIONS_PER_SCORE = 5.7
CYCLES_PER_BLOCK = 310
CYCLES_PER_TILE = 2500
CYCLES_O_IN_PLACE_OF_Q = 1000

PANELS = {128: 1.0, 64: 1.03, 32: 1.2}
"""What narrower panels cost: more copies (head dims 72, 80, 96 and 144 at 4k, H200)."""


def visits(plan: KernelPlan, seqlen: int) -> Visits:
    """Blocks of keys that the tiles of queries of one head visit."""
    left, right = limits(plan.problem)
    return visits_of(seqlen, plan.tile_m, plan.tile_n, before=left, after=right)


def block_cycles(plan: KernelPlan) -> float:
    """Predicted SM cycles of one block of keys."""
    if plan.arch == "sm90":
        return _block_cycles_sm90(cast(Sm90FwdPlan, plan))
    return _block_cycles_sm80(plan)


def tile_cycles(plan: KernelPlan) -> float:
    """Of a tile, beside its blocks."""
    return CYCLES_PER_TILE + (CYCLES_O_IN_PLACE_OF_Q if getattr(plan, "o_aliases_q", False) else 0)


def extra_cycles(plan: KernelPlan, seqlen: int) -> float:
    """Of one head, beside the kernel."""
    return 0


def _block_cycles_sm90(plan: Sm90FwdPlan) -> float:
    groups, tile_n, span = plan.num_mma_warpgroups, plan.tile_n, plan.tiling.swizzle_bytes
    steps_qk, steps_pv, columns_o = plan.qk.num_k_steps, plan.num_k_steps_pv, plan.head_dim_v
    mma = groups * (steps_qk * tile_n / 2 + steps_pv * columns_o / 2)
    ex2 = plan.tile_m * tile_n / EX2_PER_CYCLE
    issue = plan.num_mma_warps / 4 * (INSTRUCTIONS_PER_SCORE * tile_n / 2 + columns_o / 2)
    # An operand in shared memory costs its bytes: A is 64 x 16, B is N x 16; P comes from registers.
    read = groups * (steps_qk * (2048 + 32 * tile_n) + steps_pv * 32 * columns_o)
    smem = (read + plan.k_tile.bytes + plan.v_tile.bytes) / SMEM_BYTES_PER_CYCLE
    l2 = 2 * tile_n * (plan.head_dim + plan.head_dim_v) / L2_BYTES_PER_CYCLE
    ratio = (ex2 + issue) / mma
    exposed = 0.18 * ratio * max(1.0, 2 / groups) + 0.2 * max(0.0, ratio - 1) * max(0, 3 - groups)
    return max(CYCLES_PER_BLOCK + mma + exposed * (ex2 + issue), smem, l2) * _ring(plan.num_stages) * PANELS[span]


def _block_cycles_sm80(plan: KernelPlan) -> float:
    tile_m, tile_n, d, dv = plan.tile_m, plan.tile_n, align_up(plan.head_dim, 16), align_up(plan.head_dim_v, 16)
    mma = mma_sync_cycles(tile_m, tile_n, d) + mma_sync_cycles(tile_m, tile_n, dv)
    softmax = tile_m * tile_n / EX2_PER_CYCLE
    softmax += plan.num_mma_warps / 4 * (tile_m / plan.num_mma_warps / 16) * (INSTRUCTIONS_PER_SCORE * tile_n + dv) / 2
    readers = plan.num_mma_warps // cast(Sm80FwdPlan, plan).num_column_warps
    smem = (readers + 1) * 2 * tile_n * (d + dv) / SMEM_BYTES_PER_CYCLE
    return (CYCLES_PER_BLOCK + max(mma + 0.6 / plan.min_ctas_per_sm * softmax, smem)) * _ring(plan.num_stages)


def _ring(stages: int) -> float:
    return 1 + 0.02 / (stages - 1) if stages > 1 else 1.1
