"""A block's mbarriers, declared once in order: their addresses, initialisation and place in shared memory follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from fa2gen.plan.memory import Region

__all__ = ["Barrier", "Barriers", "ring"]

BARRIER_BYTES = 8


class Barrier(NamedTuple):
    """One mbarrier, or one for each stage of a ring.

    name      "q_full": the function of struct Barriers in C++ that gives its address.
    arrivals  how many complete a phase, in C++.
    stages    how many stages have one; none where there is only one, which then has no number.
    """

    name: str
    arrivals: str
    stages: int | None = None

    @property
    def bytes(self) -> int:
        return BARRIER_BYTES * (self.stages or 1)


def ring(name: str, stages: int, *, full: str = "1", empty: str) -> tuple[Barrier, Barrier]:
    """The barriers of a ring of stages. A stage is full after so many arrivals, of which TMA's is one, and empty again
    after so many of those who read it."""
    return Barrier(f"{name}_full", full, stages), Barrier(f"{name}_empty", empty, stages)


@dataclass(frozen=True)
class Barriers:
    """Barriers in the order in which they lie."""

    all: tuple[Barrier, ...]

    @property
    def region(self) -> Region:
        """Where they are."""
        return Region("barriers", sum(barrier.bytes for barrier in self.all))

    @property
    def functions(self) -> Iterator[tuple[str, str]]:
        """(what is declared, what it returns) of each address in C++: `q_full(int stage)`, `base + 16 + 8 * stage`."""
        at = 0
        for barrier in self.all:
            first = f"base + {at}" if at else "base"
            if barrier.stages is None:
                yield f"{barrier.name}()", first
            else:
                yield f"{barrier.name}(int stage)", f"{first} + {BARRIER_BYTES} * stage"
            at += barrier.bytes

    @property
    def groups(self) -> Iterator[tuple[int | None, tuple[Barrier, ...]]]:
        """Those that one loop over so many stages initialises, or none."""
        for stages, group in groupby(self.all, key=lambda barrier: barrier.stages):
            yield stages, tuple(group)
