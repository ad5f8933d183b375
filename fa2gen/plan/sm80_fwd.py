"""The forward kernel of Ampere (being written)."""

from __future__ import annotations

from dataclasses import dataclass

from fa2gen.plan.base import KernelPlan

__all__ = ["Sm80FwdPlan"]


@dataclass(frozen=True)
class Sm80FwdPlan(KernelPlan):
    """Every number of templates/sm80/fwd.cu.j2."""

    template: str = "sm80/fwd.cu.j2"


def default_tiling_sm80(problem, limit):
    raise NotImplementedError
