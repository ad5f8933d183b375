"""The cost model's part for queries over a cache. Reading K and V is what takes the time:

    block     one warp's tile of keys: its bytes at an SM's share of the memory, 17 a cycle, times
              1 + LATENCY_BYTES / f, where f are the bytes that a block has on their way; narrow panels take more copies
    tile      the way through memory of a part of an item, and the rows of all warps put together

No number is fitted: it has to tell a deep ring from a shallow one.
"""

from __future__ import annotations

from typing import cast

from fa2gen.layout import ceil_div
from fa2gen.plan import KernelPlan
from fa2gen.plan.decode import DecodePlan
from fa2gen.tune.cost_fwd import PANELS
from fa2gen.tune.visits import Visits

__all__ = ["block_cycles", "extra_cycles", "tile_cycles", "visits"]

MEMORY_BYTES_PER_CYCLE = 17
LATENCY_BYTES = 26 << 10  # 17 bytes a cycle for the 1500 cycles that they take to come
CYCLES_PER_PART = 3000


def visits(plan: KernelPlan, seqlen: int) -> Visits:
    """Tiles of keys of one head of K and V."""
    blocks = ceil_div(seqlen, plan.tile_n)
    return Visits(1, blocks, blocks)


def block_cycles(plan: KernelPlan) -> float:
    """Predicted SM cycles of one tile of keys."""
    decode = cast(DecodePlan, plan)
    in_flight = plan.num_mma_warps * (plan.num_stages - 1) * decode.stage_bytes
    read = 2 * decode.cache_bytes * plan.tile_n * plan.head_dim
    return read / MEMORY_BYTES_PER_CYCLE * (1 + LATENCY_BYTES / in_flight) * PANELS[plan.tiling.swizzle_bytes]


def tile_cycles(plan: KernelPlan) -> float:
    """Of a part, beside its keys."""
    return CYCLES_PER_PART * plan.tile_m / 16


def extra_cycles(plan: KernelPlan, seqlen: int) -> float:
    """Of one head, beside the kernel."""
    return 0
