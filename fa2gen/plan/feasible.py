"""Which specs fit: `make_plan` refuses those that do not, with every broken rule and the nearest tiling that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fa2gen.arch import ARCHES, ArchName
from fa2gen.errors import InfeasibleSpec
from fa2gen.plan.base import BrokenRule, KernelPlan
from fa2gen.plan.decode import DecodePlan
from fa2gen.plan.sm80_bwd import Sm80BwdPlan
from fa2gen.plan.sm80_fwd import Sm80FwdPlan
from fa2gen.plan.sm90_bwd import Sm90BwdPlan
from fa2gen.plan.sm90_fwd import Sm90FwdPlan
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = ["feasible_tilings", "fits", "make_plan", "plan_of"]

_PLANS: dict[tuple[str, str], type[KernelPlan]] = {
    ("sm80", "fwd"): Sm80FwdPlan,
    ("sm90", "fwd"): Sm90FwdPlan,
    ("sm80", "bwd"): Sm80BwdPlan,
    ("sm90", "bwd"): Sm90BwdPlan,
    ("sm80", "decode"): DecodePlan,
    ("sm90", "decode"): DecodePlan,
}


@dataclass(frozen=True)
class _Grid:
    """The values that `feasible_tilings` combines: what a tuner could want to try, not all that the spec allows."""

    tile_m: tuple[int, ...]
    tile_n: tuple[int, ...]
    stages: tuple[int, ...]
    warps: tuple[int, ...]


_KEYS = (32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_DECODE = _Grid((16, 32), (16, 32), (2, 3, 4, 5, 6), (2, 4, 8))
_GRIDS: dict[tuple[str, str], _Grid] = {
    ("sm80", "fwd"): _Grid((64, 128, 192), (32, 48, 64, 80, 96, 112, 128, 160, 192), (1, 2, 3, 4), (4, 8)),
    ("sm90", "fwd"): _Grid((64, 128, 192, 256), _KEYS, (2, 3, 4), (4, 8, 12, 16)),
    # With one stage, 96 queries fit above head dim 64.
    ("sm80", "bwd"): _Grid((32, 64, 128), (32, 48, 64, 80, 96, 112, 128, 160, 192), (1, 2, 3, 4), (4, 8)),
    ("sm90", "bwd"): _Grid((48, 64, 80, 96, 112, 128), _KEYS, (1, 2, 3, 4), (4, 8, 12, 16)),
    ("sm80", "decode"): _DECODE,
    ("sm90", "decode"): _DECODE,
}
_SWIZZLES: tuple[Literal[128, 64, 32], ...] = (128, 64, 32)


def plan_of(spec: KernelSpec, shared_memory_limit: int | None = None) -> KernelPlan:
    """The plan, feasible or not."""
    return _PLANS[spec.tiling.arch, spec.problem.direction](spec, shared_memory_limit=shared_memory_limit)


def make_plan(spec: KernelSpec, shared_memory_limit: int | None = None) -> KernelPlan:
    """The plan of a spec. Raises InfeasibleSpec with all broken rules, their numbers and the nearest that fits.

    shared_memory_limit  bytes that one block may have where the kernel is to run; None: where that is not known, as
                         many as on any device of the family.
    """
    plan = plan_of(spec, shared_memory_limit)
    broken = plan.broken_rules()
    if broken:
        raise InfeasibleSpec(_explain(plan, broken))
    return plan


def fits(spec: KernelSpec, shared_memory_limit: int | None = None) -> bool:
    """Whether make_plan accepts the spec, without the search for the nearest that it does when it refuses (0.1 s)."""
    return next(plan_of(spec, shared_memory_limit).rules(), None) is None


def feasible_tilings(problem: Problem, arch: ArchName, shared_memory_limit: int | None = None) -> Iterator[Tiling]:
    """Every feasible tiling of a small grid, for `fa2gen plan`, error messages and tuning."""
    grid = _GRIDS[arch, problem.direction]
    for warps in grid.warps:
        for tile_m in grid.tile_m:
            for tile_n in grid.tile_n:
                for stages in grid.stages:
                    for span in _SWIZZLES:
                        tiling = Tiling(
                            arch=arch,
                            tile_m=tile_m,
                            tile_n=tile_n,
                            num_stages=stages,
                            num_mma_warps=warps,
                            swizzle_bytes=span,
                        )
                        if fits(KernelSpec(problem=problem, tiling=tiling), shared_memory_limit):
                            yield tiling


def _nearest(plan: KernelPlan) -> Tiling | None:
    """The feasible tiling that changes the fewest fields, and those the least."""
    asked = plan.tiling

    def distance(tiling: Tiling) -> tuple[int, float]:
        changes = [
            abs(getattr(tiling, field) - getattr(asked, field)) / getattr(asked, field)
            for field in ("tile_m", "tile_n", "num_stages", "num_mma_warps", "swizzle_bytes")
        ]
        return sum(change > 0 for change in changes), sum(changes)

    limit = plan.shared_memory_limit or ARCHES[asked.arch].shared_memory_per_block
    return min(feasible_tilings(plan.problem, asked.arch, limit), key=distance, default=None)


def _explain(plan: KernelPlan, broken: tuple[BrokenRule, ...]) -> str:
    asked = plan.tiling
    rows = [(rule.rule, rule.detail) for rule in broken]
    nearest = _nearest(plan)
    command = f"List every fit: fa2gen plan {plan.problem.options} --arch {plan.arch}"
    if nearest is None:
        rows.append(("nearest", f"none of the usual tilings fits. {command}"))
    else:
        changed = [
            f"{field} {getattr(nearest, field)}"
            for field in type(nearest).model_fields
            if getattr(nearest, field) != getattr(asked, field)
        ]
        fit = plan_of(KernelSpec(problem=plan.problem, tiling=nearest))
        rows.append(("nearest", f"{', '.join(changed)} ({fit.shared_memory_bytes:,} B). {command}"))
    return "\n".join([f"{plan.name} does not fit {plan.arch}", *(f"  {rule:<14} {detail}" for rule, detail in rows)])
