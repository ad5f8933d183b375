"""The cost model: SM cycles of a kernel from its plan, to rank tilings before one is compiled.

It has to order tilings, not to predict TFLOP/s. A kernel has tiles (of queries forward, of keys backward), each of
which visits blocks of the other kind: `cost_fwd`, `cost_bwd` and `cost_decode` say what these cost. Tiles are dealt to
the SMs one by one, so the last one is half idle. Schedule switches are all the same to the model: each setting of them
is tried with the best shapes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from fa2gen.layout import ELEMENT_BYTES, align_up
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.spec import Direction, KernelSpec, Problem, Tiling
from fa2gen.tune import cost_bwd, cost_decode, cost_fwd
from fa2gen.tune.rates import SMS
from fa2gen.tune.space import settings
from fa2gen.tune.visits import Visits

__all__ = ["VARIANTS_PER_SHAPE", "block_cycles", "cycles", "prune"]

TOKENS, HIDDEN = 16_384, 2048

VARIANTS_PER_SHAPE = 2
"""So many stages and swizzles, which the model hardly tells apart, are kept of one (tile_m, tile_n, warps)."""


HOPELESS = 1.25
"""Times the best candidate's cycles: the model errs by a tenth of that."""


class _Model(Protocol):
    """What is known of one direction."""

    def visits(self, plan: KernelPlan, seqlen: int) -> Visits: ...
    def block_cycles(self, plan: KernelPlan) -> float: ...
    def tile_cycles(self, plan: KernelPlan) -> float: ...
    def extra_cycles(self, plan: KernelPlan, seqlen: int) -> float: ...


_MODELS: dict[Direction, _Model] = {"fwd": cost_fwd, "bwd": cost_bwd, "decode": cost_decode}


def cycles(plan: KernelPlan, seqlen: int, num_sms: int | None = None) -> float:
    """Predicted SM cycles of one call with TOKENS tokens and hidden size HIDDEN."""
    model = _MODELS[plan.problem.direction]
    heads = max(1, TOKENS // seqlen) * max(1, HIDDEN // plan.head_dim)
    visits, block, tile = model.visits(plan, seqlen), model.block_cycles(plan), model.tile_cycles(plan)
    total = heads * (visits.total * block + visits.tiles * tile + model.extra_cycles(plan, seqlen))
    longest = visits.most * block + tile
    return total / (num_sms or SMS[plan.arch]) + longest / 2


def block_cycles(plan: KernelPlan) -> float:
    """Predicted SM cycles of one block of keys (forward) or of queries (backward)."""
    return _MODELS[plan.problem.direction].block_cycles(plan)


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
