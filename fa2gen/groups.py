"""How gradients go through a group of query heads: how many blocks share it, and in which order one takes its heads.

A block of keys walks the blocks of queries of all heads of its group, which needs no sums in memory. With few heads of
K and V there are then too few blocks for a device, or the longest ones end alone. So blocks may share a group
(`Tiling.group_parts`), at the price of partial sums of dK and dV that go through memory.

A block takes one head after the other, or all at a block of queries before it goes on to the next (`heads_abreast`).
Where neighbours have all kinds of lengths, they are then at the same blocks of queries at the same time.

A block of threads takes one block of keys, or where there are many, one after the other (`keys_in_turn`). And several
take each of those in the last wave, for parts of the queries (`tail_parts`), where they are too few to fill it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fa2gen.launch import heads_per_section
from fa2gen.layout import ceil_div
from fa2gen.options import Options, Shape
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.plan.bwd import BackwardPlan
from fa2gen.spec import KernelSpec

__all__ = ["WHOLE", "Walk", "abreast_of", "parts_of", "tail_of", "turns_of", "walk_of", "with_groups"]

MOST_PARTS = 32  # a Tiling's
TAIL_PARTS = (1, 2, 3, 4, 8)  # each is a kernel of its own; 5 to 7 gain up to 2% more
LEAST_GAIN = 0.02  # of all waves' time
# Where there are blocks enough, more parts move more heads' Q, dO and dQ through L2 at a time (32:1 heads of 64, 8k: 8
# parts 1.02 of FlashAttention-3, 16 0.98).
PARTS_IN_L2 = 8
FEW_WAVES = 2.0

# What a block costs beside its steps, in rows of queries walked: its start and end; and in parts, its sums written and
# read again, of which 800 rows are as long whatever the head dim (H100, 64 rows a step).
ROWS_OF_BLOCK = 96
ROWS_OF_PART = 800
ROWS_OF_TAIL_PART = 750

# Packed documents of a mean length of 512 to 1057 keys, 64:8 heads of 128: totals of 4k to 32k 1.31, 1.35, 1.21, 1.12
# times one head after the other. Dense batches, whose blocks set out and end together, 0.89 to 1.01 (H100).
MOST_KEYS_ABREAST = 2048

# By head dim, the most rows of queries a block of keys walks where turns are worth it; times without, causal and full.
# 32: 1k 1.19, 4k 1.04, 1.02, 16k 0.98, 1.00; 48: 1k 1.17, 4k 1.08, 1.03, 16k 1.02, 1.00; 64: 512 to 4k 1.04 to 1.11, 8k
# 1.02, 1.02, 16k 0.99, 1.00; 72: 512 1.11, 1.10, 4k 1.03, 1.05, 16k 1.02, 1.01; 80: 512 1.08, 1.09, 4k 1.03, 1.04, 16k
# 1.00, 1.03; 88: 4k 1.03, 1.01, 16k 0.97, 1.01; 96: 512 1.07, 1.07, 4k 1.03, 1.04, 16k 1.04; 104: 4k 1.02, 0.99, 16k
# 1.01. Of 64:8 heads of 64, 8k 1.00 (H100, 17 blocks of keys a multiprocessor and more).
MOST_ROWS_IN_TURN = {32: 4096, 48: 16384, 64: 16384, 72: 16384, 80: 16384, 88: 4096, 96: 16384, 104: 16384}
LEAST_WAVES_OF_TURNS = 4


class Walk(NamedTuple):
    """What `with_groups` takes."""

    parts: int = 1
    abreast: bool = False
    in_turn: bool = False
    tail: int = 1


WHOLE = Walk()


def with_groups(
    plan: KernelPlan, parts: int = 1, abreast: bool = False, in_turn: bool = False, tail: int = 1
) -> KernelPlan:
    """The plan of the same kernel with groups, or the last blocks of keys, in so many parts, and heads of groups
    abreast, or blocks of keys in turn, if they are not so anyway."""
    abreast, in_turn = abreast or bool(plan.tiling.heads_abreast), in_turn or bool(plan.tiling.keys_in_turn)
    found = {"group_parts": parts, "heads_abreast": int(abreast), "keys_in_turn": int(in_turn), "tail_parts": tail}
    return make_plan(KernelSpec(problem=plan.problem, tiling=plan.tiling.model_copy(update=found)))


def walk_of(plan: KernelPlan, shape: Shape, options: Options, num_sms: int) -> Walk:
    """What `with_groups` takes for these sizes; WHOLE where the plan may stay as it is."""
    parts = parts_of(plan, shape, options, num_sms)
    abreast = abreast_of(plan, shape)
    if parts > 1:
        return Walk(parts, abreast)
    in_turn = turns_of(plan, shape, num_sms)
    return Walk(1, abreast, in_turn, 1 if in_turn else tail_of(plan, shape, options, num_sms))


def tail_of(plan: KernelPlan, shape: Shape, options: Options, num_sms: int) -> int:
    """How many parts of the last wave's blocks of keys take the least time in a model of what runs when; 1 where that
    saves little. Where blocks of keys walk fewer queries the later they come, the last ones fill what others leave,
    unless one wave has them all. Windows of more waves were not tried.
    """
    if not isinstance(plan, BackwardPlan) or not plan.can_split_tail or 0 in shape:
        return 1
    rows = _rows_walked(shape.seqlen_q, plan.tile_n, options) * (shape.num_heads // shape.num_heads_kv)
    blocks = _blocks_of_keys(plan, shape)
    if blocks > num_sms and plan.mask != "full":
        return 1
    last = (blocks - 1) % num_sms + 1

    def time(parts: int) -> float:  # of the last wave, in walks of the longest block of keys in one part
        each = (ROWS_OF_BLOCK if parts == 1 else ROWS_OF_TAIL_PART) / rows
        if options.causal and options.window_left < 0:
            return max(last * parts / num_sms, 1) * each + max(1 / parts, last / num_sms / 2)
        return ceil_div(last * parts, num_sms) * (1 / parts + each)

    best = min(TAIL_PARTS, key=time)
    return best if time(1) - time(best) >= LEAST_GAIN * ceil_div(blocks, num_sms) else 1


def turns_of(plan: KernelPlan, shape: Shape, num_sms: int) -> bool:
    """Whether a kernel's blocks of threads take blocks of keys in turn: where that was measured, and faster."""
    if not isinstance(plan, BackwardPlan) or not plan.can_take_turns or plan.mask == "window" or 0 in shape:
        return False
    rows = shape.seqlen_q * (shape.num_heads // shape.num_heads_kv)
    blocks = _blocks_of_keys(plan, shape)
    return rows <= MOST_ROWS_IN_TURN.get(plan.head_dim, 0) and blocks >= LEAST_WAVES_OF_TURNS * num_sms


def abreast_of(plan: KernelPlan, shape: Shape) -> bool:
    """Whether a kernel for a ragged batch takes the heads of a group abreast."""
    if not isinstance(plan, BackwardPlan) or not plan.can_go_abreast or 0 in shape:
        return False
    return shape.num_heads > shape.num_heads_kv and shape.seqlen_k <= MOST_KEYS_ABREAST * shape.batch


def parts_of(plan: KernelPlan, shape: Shape, options: Options, num_sms: int) -> int:
    """The divisor of a group's heads with the least time in a model of what runs when: waves of equal blocks, or under
    a causal mask half of the longest block's steps for each and a tail.

    Of a ragged batch, whose lengths lie on the device, sequences are taken to be equally long. Its choices for 32:1 to
    32:8 and 64:8 heads from 1k to 8k are the best measured, or within 3% of them (H100).
    """
    group = shape.num_heads // max(shape.num_heads_kv, 1)
    if group == 1 or not isinstance(plan, BackwardPlan) or not plan.can_split_groups or 0 in shape:
        return 1
    batch = shape.batch
    queries, keys = shape.seqlen_q, shape.seqlen_k
    if plan.varlen:
        queries, keys = ceil_div(queries, batch), ceil_div(keys, batch)
    rows = _rows_walked(queries, plan.tile_n, options) * group
    blocks = ceil_div(keys, plan.tile_n)
    waves = blocks * batch * shape.num_heads_kv / num_sms
    in_section = blocks * heads_per_section(plan, shape) / num_sms

    def time(parts: int) -> float:  # in walks of the longest block of a group in one part
        each = (ROWS_OF_BLOCK if parts == 1 else ROWS_OF_PART) / rows
        if not options.causal:
            return math.ceil(waves * parts) * (1 / parts + each)
        # The longest blocks of the last section of heads start when others end: what they then take alone is a walk
        # where a section has few blocks, and half of one where it has a block for each multiprocessor.
        tail = (1 - min(in_section * parts, 1) / 2) / parts
        return max(waves / 2 + tail, 1 / parts) + waves * parts * each

    divisors = (parts for parts in range(1, min(group, MOST_PARTS) + 1) if group % parts == 0)
    return min((parts for parts in divisors if parts <= PARTS_IN_L2 or waves * parts <= FEW_WAVES), key=time)


def _blocks_of_keys(plan: KernelPlan, shape: Shape) -> int:
    """Of a dense batch."""
    return ceil_div(shape.seqlen_k, plan.tile_n) * shape.batch * shape.num_heads_kv


def _rows_walked(queries: int, tile_n: int, options: Options) -> int:
    """Of one head, by the block of keys that walks the most."""
    left, right = options.window_left, options.window_right
    if options.chunk:
        queries = min(queries, options.chunk)
    if left >= 0 and (right >= 0 or options.causal):
        queries = min(queries, left + max(right, 0) + tile_n)
    return max(queries, 1)
