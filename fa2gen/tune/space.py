"""What can be tried: every feasible tiling, with every setting of the schedule switches.

Shapes, depths and swizzles come from `fa2gen.plan.feasible_tilings`. A schedule switch is any other field of `Tiling`
that is a Literal: a new one is tried without a word here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from fa2gen.arch import ArchName
from fa2gen.plan import feasible_tilings, fits
from fa2gen.plan.base import SWITCHES_OF_PAGES
from fa2gen.spec import KernelSpec, Problem, Tiling, declared

__all__ = ["settings", "switches", "tilings"]

_ENUMERATED = {"arch", "tile_m", "tile_n", "num_stages", "num_mma_warps", "swizzle_bytes"}


def switches() -> dict[str, tuple[Any, ...]]:
    """Field -> its values, of every schedule switch."""
    return {name: field.values for name, field in declared(Tiling).items() if field.values and name not in _ENUMERATED}


def settings(tiling: Tiling) -> tuple[Any, ...]:
    """The tiling's setting of every switch."""
    return tuple(getattr(tiling, name) for name in switches())


def tilings(problem: Problem, arch: ArchName, shared_memory_limit: int | None = None) -> Iterator[Tiling]:
    """Every candidate of a problem, each once. What a switch makes infeasible is left out.

    shared_memory_limit  as of `make_plan`.
    """
    names = switches()
    if not problem.paged:
        names |= dict.fromkeys(SWITCHES_OF_PAGES, (0,))
    for tiling in feasible_tilings(problem, arch, shared_memory_limit):
        for values in product(*names.values()):
            varied = tiling.model_copy(update=dict(zip(names, values, strict=True)))
            if fits(KernelSpec(problem=problem, tiling=varied), shared_memory_limit):
                yield varied
