"""From a spec to every derived number: `make_plan` is the only door, and the only place with feasibility rules.

Templates do no arithmetic: shared-memory offsets, barriers, register budgets, instruction shapes and launch facts are
all fields of the plan. One module for each (arch, direction), as there is one spine for each in templates/.
"""

from __future__ import annotations

from fa2gen.plan.base import KernelPlan, TensorMapPlan
from fa2gen.plan.defaults import default_tiling, is_apart, tiling_for_rows
from fa2gen.plan.feasible import feasible_tilings, fits, make_plan

__all__ = [
    "KernelPlan",
    "TensorMapPlan",
    "default_tiling",
    "feasible_tilings",
    "fits",
    "is_apart",
    "make_plan",
    "tiling_for_rows",
]
