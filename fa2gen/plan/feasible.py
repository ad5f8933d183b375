"""Which specs fit: `make_plan` refuses those that do not, with every broken rule and the nearest tiling that fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fa2gen.arch import ArchName
from fa2gen.errors import InfeasibleSpec
from fa2gen.plan.base import BrokenRule, KernelPlan
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
}

_BACKWARD_TILE_M = {"sm80": (32, 64, 128), "sm90": (48, 64, 80, 96, 112, 128)}
_BACKWARD_STAGES = (1, 2, 3, 4)  # with one, 96 queries fit above head dim 64

# The values that `feasible_tilings` combines: what a tuner could want to try, not all that the spec allows.
_TILE_M = {"sm80": (64, 128, 192), "sm90": (64, 128, 192, 256)}
_TILE_N = {
    "sm80": (32, 48, 64, 80, 96, 112, 128, 160, 192),
    "sm90": (32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
}
_STAGES = {"sm80": (1, 2, 3, 4), "sm90": (2, 3, 4)}
_WARPS = {"sm80": (4, 8), "sm90": (4, 8, 12, 16)}
_SWIZZLES: tuple[Literal[128, 64, 32], ...] = (128, 64, 32)


def plan_of(spec: KernelSpec) -> KernelPlan:
    """The plan, feasible or not."""
    return _PLANS[spec.tiling.arch, spec.problem.direction](spec)


def make_plan(spec: KernelSpec) -> KernelPlan:
    """The plan of a spec. Raises InfeasibleSpec with all broken rules, their numbers and the nearest that fits."""
    plan = plan_of(spec)
    broken = plan.broken_rules()
    if broken:
        raise InfeasibleSpec(_explain(plan, list(broken)))
    return plan


def fits(spec: KernelSpec) -> bool:
    """Whether make_plan accepts the spec, without the search for the nearest that it does when it refuses (0.1 s)."""
    return not plan_of(spec).broken_rules()


def feasible_tilings(problem: Problem, arch: ArchName) -> Iterator[Tiling]:
    """Every feasible tiling of a small grid, for `fa2gen plan`, error messages and tuning."""
    for warps in _WARPS[arch]:
        for tile_m in (_BACKWARD_TILE_M if problem.direction == "bwd" else _TILE_M)[arch]:
            for tile_n in _TILE_N[arch]:
                for stages in _BACKWARD_STAGES if problem.direction == "bwd" else _STAGES[arch]:
                    for span in _SWIZZLES:
                        tiling = Tiling(
                            arch=arch,
                            tile_m=tile_m,
                            tile_n=tile_n,
                            num_stages=stages,
                            num_mma_warps=warps,
                            swizzle_bytes=span,
                        )
                        if fits(KernelSpec(problem=problem, tiling=tiling)):
                            yield tiling


def _nearest(spec: KernelSpec) -> Tiling | None:
    """The feasible tiling that changes the fewest fields, and those the least."""
    asked = spec.tiling

    def distance(tiling: Tiling) -> tuple[int, float]:
        changes = [
            abs(getattr(tiling, field) - getattr(asked, field)) / getattr(asked, field)
            for field in ("tile_m", "tile_n", "num_stages", "num_mma_warps", "swizzle_bytes")
        ]
        return sum(change > 0 for change in changes), sum(changes)

    return min(feasible_tilings(spec.problem, asked.arch), key=distance, default=None)


def _explain(plan: KernelPlan, broken: list[BrokenRule]) -> str:
    asked = plan.tiling
    rows = [(rule.rule, rule.detail) for rule in broken]
    nearest = _nearest(plan.spec)
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
