"""The cost model: SM cycles of a forward kernel from its plan, to rank tilings before one is compiled.

It has to order tilings, not to predict TFLOP/s. Per block of keys, in cycles of one SM (sm90):

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
Tiles are dealt to the SMs one by one, so the last one is half idle. 310, `exposed` and 2500 were fitted to prototypes
on an H200: the block model is within 6% of nine measured tilings of head dims 64, 128 and 256 (tests/unit/test_tune.py
has them).

Schedule switches are all the same to the model: each setting of them is tried with the best shapes.

sm80 is the same with mma.sync (2 cycles an m16n8k16), K and V read from shared memory by each warp, and no fitted
number.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

from fa2gen.layout import ELEMENT_BYTES, align_up, ceil_div
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.plan.sm90_fwd import Sm90FwdPlan
from fa2gen.spec import KernelSpec, Problem, Tiling
from fa2gen.tune.space import settings

__all__ = ["VARIANTS_PER_SHAPE", "block_cycles", "cycles", "prune"]

TOKENS, HIDDEN = 16_384, 2048
SMS = {"sm80": 108, "sm90": 132}

EX2_PER_CYCLE = 16
INSTRUCTIONS_PER_SCORE = 5.7
SMEM_BYTES_PER_CYCLE = 128
L2_BYTES_PER_CYCLE = 36
CYCLES_PER_BLOCK = 310
CYCLES_PER_TILE = 2500
CYCLES_O_IN_PLACE_OF_Q = 1000

PANELS = {128: 1.0, 64: 1.03, 32: 1.2}
"""What narrower panels cost: more copies (head dims 72, 80, 96 and 144 at 4k, H200)."""

VARIANTS_PER_SHAPE = 2
"""So many stages and swizzles, which the model hardly tells apart, are kept of one (tile_m, tile_n, warps)."""


HOPELESS = 1.25
"""Times the best candidate's cycles: the model errs by a tenth of that."""


def cycles(plan: KernelPlan, seqlen: int, num_sms: int | None = None) -> float:
    """Predicted SM cycles of one forward call with TOKENS tokens and hidden size HIDDEN."""
    heads = max(1, TOKENS // seqlen) * max(1, HIDDEN // plan.head_dim)
    blocks = _blocks(plan, seqlen)
    tile = CYCLES_PER_TILE + (CYCLES_O_IN_PLACE_OF_Q if getattr(plan, "o_aliases_q", False) else 0)
    total = heads * (sum(blocks) * block_cycles(plan) + len(blocks) * tile)
    longest = max(blocks) * block_cycles(plan) + tile
    return total / (num_sms or SMS[plan.arch]) + longest / 2


def block_cycles(plan: KernelPlan) -> float:
    """Predicted SM cycles of one block of keys."""
    if plan.arch == "sm90":
        return _block_cycles_sm90(cast(Sm90FwdPlan, plan))
    return _block_cycles_sm80(plan)


def prune(problem: Problem, tilings: Iterable[Tiling], seqlens: Sequence[int], keep: int) -> list[Tiling]:
    """The `keep` tilings that the model likes best over the seqlens (geometric mean), numbers of warps taking turns.

    In turns, because how much of the softmax a further warpgroup hides is what the model knows least. At most
    VARIANTS_PER_SHAPE of one shape and setting of the switches, so that a dozen depths and swizzles of the best shape
    do not push out the second; none that the model gives HOPELESS times the best one's cycles; and none whose panels
    are narrower than those of another without being smaller for it.
    """
    ranked = []
    for tiling in tilings:
        plan = make_plan(KernelSpec(problem=problem, tiling=tiling))
        cost = sum(math.log(cycles(plan, seqlen)) for seqlen in seqlens)
        # Equal to the model: wider panels first (d = 72: 380 TFLOP/s, and 304 with 32-byte panels without padding).
        ranked.append((round(cost, 6), -tiling.swizzle_bytes, plan.name, tiling))
    limit = min(cost for cost, *_ in ranked) + len(seqlens) * math.log(HOPELESS) if ranked else 0.0
    taken: Counter[tuple[object, ...]] = Counter()
    turns: dict[int, list[Tiling]] = {}
    for cost, *_, tiling in sorted(ranked, key=lambda item: item[:3]):
        if cost > limit or _narrow_for_nothing(problem, tiling):
            continue
        shape = (tiling.tile_m, tiling.tile_n, tiling.num_mma_warps, settings(tiling))
        taken[shape] += 1
        if taken[shape] <= VARIANTS_PER_SHAPE:
            turns.setdefault(tiling.num_mma_warps, []).append(tiling)
    in_turns = itertools.chain.from_iterable(itertools.zip_longest(*turns.values()))
    return [tiling for tiling in in_turns if tiling is not None][:keep]


def _narrow_for_nothing(problem: Problem, tiling: Tiling) -> bool:
    """Whether wider panels would hold a row in as many bytes: the narrow ones then only take more copies."""
    row = problem.head_dim * ELEMENT_BYTES
    mine = align_up(row, tiling.swizzle_bytes)
    return any(span > tiling.swizzle_bytes and align_up(row, span) <= mine for span in (64, 128))


def _blocks(plan: KernelPlan, seqlen: int) -> list[int]:
    """Blocks of keys that each tile of one head visits."""
    tiles = ceil_div(seqlen, plan.tile_m)
    last = [min(seqlen, (m + 1) * plan.tile_m) if plan.causal else seqlen for m in range(tiles)]
    return [ceil_div(keys, plan.tile_n) for keys in last]


def _block_cycles_sm90(plan: Sm90FwdPlan) -> float:
    groups, tile_n, span = plan.num_mma_warpgroups, plan.tile_n, plan.tiling.swizzle_bytes
    steps_qk, steps_pv, columns_o = plan.num_k_steps_head_dim, plan.num_k_steps_pv, align_up(plan.head_dim, 8)
    mma = groups * (steps_qk * tile_n / 2 + steps_pv * columns_o / 2)
    ex2 = plan.tile_m * tile_n / EX2_PER_CYCLE
    issue = plan.num_mma_warps / 4 * (INSTRUCTIONS_PER_SCORE * tile_n / 2 + columns_o / 2)
    # An operand in shared memory costs its bytes: A is 64 x 16, B is N x 16; P comes from registers.
    read = groups * (steps_qk * (2048 + 32 * tile_n) + steps_pv * 32 * columns_o)
    smem = (read + 2 * plan.kv_tile.bytes) / SMEM_BYTES_PER_CYCLE
    l2 = 4 * tile_n * plan.head_dim / L2_BYTES_PER_CYCLE
    ratio = (ex2 + issue) / mma
    exposed = 0.18 * ratio * max(1.0, 2 / groups) + 0.2 * max(0.0, ratio - 1) * max(0, 3 - groups)
    return max(CYCLES_PER_BLOCK + mma + exposed * (ex2 + issue), smem, l2) * _ring(plan.num_stages) * PANELS[span]


def _block_cycles_sm80(plan: KernelPlan) -> float:
    tile_m, tile_n, head_dim = plan.tile_m, plan.tile_n, align_up(plan.head_dim, 16)
    mma = 2 * 2 * (tile_m / 16) * (tile_n / 8) * (head_dim / 16)
    softmax = tile_m * tile_n / EX2_PER_CYCLE
    softmax += (
        plan.num_mma_warps / 4 * (tile_m / plan.num_mma_warps / 16) * (INSTRUCTIONS_PER_SCORE * tile_n + head_dim) / 2
    )
    smem = (plan.num_mma_warps + 1) * 4 * tile_n * head_dim / SMEM_BYTES_PER_CYCLE
    return (CYCLES_PER_BLOCK + max(mma + 0.6 / plan.min_ctas_per_sm * softmax, smem)) * _ring(plan.num_stages)


def _ring(stages: int) -> float:
    return 1 + 0.02 / (stages - 1) if stages > 1 else 1.1
