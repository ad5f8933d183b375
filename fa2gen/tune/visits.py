"""How many blocks the tiles of a kernel visit, at any length without a loop over them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Visits", "floor_sum"]


class Visits(NamedTuple):
    """Of one head: its tiles, the blocks that all of them visit together, and the most that one visits."""

    tiles: int
    total: int
    most: int


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
