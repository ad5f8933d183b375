"""How many blocks the tiles of a kernel visit, at any length without a loop over them."""

from __future__ import annotations

from typing import NamedTuple

from fa2gen.features import examples_of
from fa2gen.layout import ceil_div
from fa2gen.spec import Problem

__all__ = ["Visits", "floor_sum", "limits", "visits"]


class Visits(NamedTuple):
    """Of one head: its tiles, the blocks that all of them visit together, and the most that one visits.

    Where positions are limited on both sides `most` may be one too many.
    """

    tiles: int
    total: int
    most: int


def limits(problem: Problem) -> tuple[int | None, int | None]:
    """(left, right): how far from its own place a query sees keys in a typical call; None: without limit."""
    typical = examples_of(problem)[0]
    left, right = typical.window_left, 0 if typical.causal else typical.window_right
    return None if left < 0 else left, None if right < 0 else right


def visits(seqlen: int, tile: int, block: int, before: int | None, after: int | None) -> Visits:
    """Visits of tiles of `seqlen` positions to blocks of as many others.

    A position meets the others from `before` ahead of its own place to `after` behind it; None: without limit.
    """
    tiles, blocks = ceil_div(seqlen, tile), ceil_div(seqlen, block)
    ends, begins, most = tiles * blocks, 0, blocks
    if after is not None:  # tile m meets positions before min(seqlen, (m + 1) tile + after)
        inside = min(tiles, max(0, (seqlen - after - 1) // tile))
        ends = floor_sum(inside, tile, tile + after + block - 1, block) + (tiles - inside) * blocks
    if before is not None:  # and from max(0, m tile - before)
        first = min(tiles, ceil_div(before, tile))
        begins = floor_sum(tiles - first, tile, first * tile - before, block)
    if before is not None and after is not None:
        most = min(blocks, ceil_div(tile + before + after, block) + 1)
    return Visits(tiles, ends - begins, most)


def floor_sum(count: int, step: int, start: int, divisor: int) -> int:
    """The sum of (step * i + start) // divisor over i = 0, ..., count - 1; none of them negative.

    The whole parts come out by Gauss's formula; what is left counts lattice points under a line, which the same line
    with its axes exchanged counts too, as in Euclid's algorithm.
    """
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (step // divisor) + count * (start // divisor)
        step, start = step % divisor, start % divisor
        highest = step * count + start
        count, start = highest // divisor, highest % divisor
        step, divisor = divisor, step
    return total
