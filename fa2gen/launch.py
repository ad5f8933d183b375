"""Launch facts of one call: grid and `Params` values, from a plan and run-time sizes.

Pure integers, for GPU and CPU alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fa2gen.layout import ELEMENT_BYTES, ceil_div
from fa2gen.plan import KernelPlan
from fa2gen.plan.bwd import BackwardPlan

__all__ = ["BackwardLaunch", "ForwardShape", "Launch", "backward_launch", "forward_launch"]

# K and V of the heads in flight should stay in L2: 32 MiB of an H200's 50 leave room for Q and O (4k causal, d = 128:
# 587 TFLOP/s against 520 head by head, and 505 with all heads together).
SECTION_BYTES = 32 << 20


@dataclass(frozen=True)
class ForwardShape:
    """Sizes of one forward call.

    q and out (batch, seqlen_q, num_heads, head_dim); k and v (batch, seqlen_k, num_heads_kv, head_dim).
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int


@dataclass(frozen=True)
class Launch:
    """What to launch.

    `values` holds every field of Params that is known from sizes alone (pointers and strides are not).
    """

    grid: tuple[int, int, int]
    num_threads: int
    shared_memory_bytes: int
    values: dict[str, Any]


def forward_launch(plan: KernelPlan, shape: ForwardShape, softmax_scale: float, num_sms: int) -> Launch:
    """Grid and Params of a forward kernel.

    num_sms is the device's number of multiprocessors; sm90 kernels are persistent and take one block on each.
    Raises OverflowError when a count does not fit the kernel's 32-bit integers.
    """
    num_m_blocks = ceil_div(shape.seqlen_q, plan.tile_m)
    num_batch_heads = shape.batch * shape.num_heads
    num_tiles = num_m_blocks * num_batch_heads
    values: dict[str, Any] = {
        "seqlen_q": shape.seqlen_q,
        "seqlen_k": shape.seqlen_k,
        "num_heads": shape.num_heads,
        "num_heads_per_kv": shape.num_heads // shape.num_heads_kv,
        "num_m_blocks": num_m_blocks,
        "num_tiles": num_tiles,
        "num_batch_heads": num_batch_heads,
        "heads_per_section": _heads_per_section(plan, shape),
        "softmax_scale": softmax_scale,
        "softmax_scale_log2": softmax_scale * math.log2(math.e),
    }
    # A persistent kernel fetches once a tile from a 32-bit counter and adds the grid size to what it gets.
    if num_tiles + num_sms >= 2**31:
        raise OverflowError(f"{num_tiles:,} tiles ({num_m_blocks:,} m blocks x {num_batch_heads:,} heads) exceed 2^31")
    grid = (min(num_tiles, num_sms), 1, 1) if plan.arch == "sm90" else (num_m_blocks, shape.num_heads, shape.batch)
    return Launch(grid, plan.num_threads, plan.shared_memory_bytes, values)


def _heads_per_section(plan: KernelPlan, shape: ForwardShape) -> int:
    """How many neighbouring (batch, head) pairs the causal order walks together: whole groups that share K and V."""
    group = shape.num_heads // shape.num_heads_kv
    kv_bytes = 2 * shape.seqlen_k * plan.head_dim * ELEMENT_BYTES
    # Never more than there are: the kernel multiplies it with num_m_blocks in 32 bits.
    return min(max(1, SECTION_BYTES // max(kv_bytes, 1)) * group, shape.batch * shape.num_heads)


@dataclass(frozen=True)
class BackwardLaunch:
    """What to launch for one backward call, and what memory it needs beside the gradients.

    grids             blocks of each of the plan's entry points, which run one after the other.
    values            as Launch.values; the three kernels share their Params.
    statistics_floats fp32 numbers of lse_log2, and of dpsum: the query rows of every head, up to whole blocks.
    dq_acc_floats     fp32 numbers of the sums of dQ.
    num_dq_turns      int32 numbers of dq_turns, one for each block of queries; 0 where the plan is not deterministic.
    None of that memory needs to be initialised.
    """

    grids: tuple[int, ...]
    values: dict[str, Any]
    statistics_floats: int
    dq_acc_floats: int
    num_dq_turns: int


def backward_launch(plan: BackwardPlan, shape: ForwardShape, softmax_scale: float) -> BackwardLaunch:
    """Grids and Params of a backward kernel. Raises OverflowError when a count does not fit a 32-bit integer."""
    num_m_blocks = ceil_div(shape.seqlen_q, plan.tile_m)
    num_n_blocks = ceil_div(shape.seqlen_k, plan.tile_n)
    query_blocks = num_m_blocks * shape.batch * shape.num_heads
    key_blocks = num_n_blocks * shape.batch * shape.num_heads_kv
    group = shape.num_heads // shape.num_heads_kv
    for what, count in (
        ("blocks of queries", query_blocks),
        ("blocks of keys", key_blocks),
        ("query rows of a group of heads", num_m_blocks * plan.tile_m * group),
        ("keys", num_n_blocks * plan.tile_n + shape.seqlen_q),
    ):
        if count >= 2**31:
            raise OverflowError(f"{count:,} {what} exceed 2^31")
    # Of the heads in flight Q, dO and the sums of dQ should stay in L2.
    bytes_per_head = group * shape.seqlen_q * plan.head_dim * (2 * ELEMENT_BYTES + 4)
    values: dict[str, Any] = {
        "seqlen_q": shape.seqlen_q,
        "seqlen_k": shape.seqlen_k,
        "num_heads": shape.num_heads,
        "num_heads_kv": shape.num_heads_kv,
        "num_heads_per_kv": group,
        "num_m_blocks": num_m_blocks,
        "num_n_blocks": num_n_blocks,
        "num_batch_heads_kv": shape.batch * shape.num_heads_kv,
        "heads_per_section": min(max(1, SECTION_BYTES // bytes_per_head), shape.batch * shape.num_heads_kv),
        "softmax_scale": softmax_scale,
        "softmax_scale_log2": softmax_scale * math.log2(math.e),
    }
    return BackwardLaunch(
        grids=(query_blocks, key_blocks, query_blocks),
        values=values,
        statistics_floats=query_blocks * plan.tile_m,
        dq_acc_floats=query_blocks * plan.dq_block_floats,
        num_dq_turns=query_blocks if plan.deterministic else 0,
    )
