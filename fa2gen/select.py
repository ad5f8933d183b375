"""Which kernel computes a problem: the selector. Pure, total over the supported problems, and able to say why."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fa2gen.arch import ARCHES, ArchName
from fa2gen.catalog import written_tilings
from fa2gen.errors import InfeasibleSpec, UnsupportedProblem
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.plan.sm80_fwd import default_tiling_sm80
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = ["Device", "Selection", "default_tiling", "kernel_arch", "select"]


@dataclass(frozen=True)
class Device:
    """What selection needs to know of a GPU."""

    name: str
    compute_capability: tuple[int, int]
    shared_memory_per_block: int
    """Bytes one block can opt in to."""
    num_sms: int


@dataclass(frozen=True)
class Selection:
    """The chosen kernel, the NVRTC target to build it for, and the reason in words."""

    plan: KernelPlan
    target: str
    reason: str


def kernel_arch(device: Device, arch: ArchName | None = None) -> tuple[ArchName, str]:
    """The kernel family for a device and the NVRTC target that its cubins need; `arch` asks for a family.

    sm80 kernels serve 8.0, 8.6, 8.7 and 8.9 from one sm_80 cubin and, on request, 9.0 from an sm_90 one. Raises
    UnsupportedProblem for other GPUs, and for a family that the GPU can not run.
    """
    major, minor = device.compute_capability
    if (major, minor) == (9, 0):
        return ("sm80", "sm_90") if arch == "sm80" else ("sm90", ARCHES["sm90"].target)
    if major == 8 and arch in (None, "sm80"):
        return "sm80", ARCHES["sm80"].target
    if major == 8:
        raise UnsupportedProblem(
            f"{device.name} has compute capability {major}.{minor}; sm90 kernels use wgmma, which 9.0 alone has. Nearest: arch sm80"
        )
    raise UnsupportedProblem(
        f"{device.name} has compute capability {major}.{minor}; fa2gen has kernels for 8.0, 8.6, 8.7, 8.9 (sm80) and 9.0 (sm90)"
    )


@functools.lru_cache(maxsize=1024)
def select(problem: Problem, device: Device, arch: ArchName | None = None) -> Selection:
    """The kernel for a problem on a device: the tiling that specs/ gives it, else the best feasible default.

    Raises UnsupportedProblem where no kernel family serves the device.
    """
    family, target = kernel_arch(device, arch)
    written = written_tilings().get((problem, family))
    if written is not None:
        plan = make_plan(KernelSpec(problem=problem, tiling=written))
        if plan.shared_memory_bytes <= device.shared_memory_per_block:
            return Selection(plan, target, f"specs/ names this tiling for {family}")
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, family, device.shared_memory_per_block)))
    return Selection(plan, target, f"default tiling for head dim {problem.head_dim} on {family}")


def default_tiling(problem: Problem, arch: ArchName, shared_memory_limit: int | None = None) -> Tiling:
    """A good tiling for any supported problem, with no spec written by hand. Raises InfeasibleSpec if none fits the limit."""
    if arch == "sm80":
        return default_tiling_sm80(problem, shared_memory_limit or ARCHES["sm80"].shared_memory_per_block)
    return _default_tiling_sm90(problem)


def _default_tiling_sm90(problem: Problem) -> Tiling:
    """Three warpgroups where their 160 registers hold 128 keys (192 rows a tile: a third fewer loads a FLOP), else two with as
    many keys as fit, since a block of keys costs its barriers and its rescale of O whatever its size. Panels are as wide as that
    allows: a narrow one wastes less of a ragged head dim, but takes more copies."""
    shapes = [(192, 128, 12, 3)] if problem.head_dim <= 64 else []
    shapes += [(128, tile_n, 8, 2) for tile_n in (128, 112, 96, 80, 64)]
    for tile_m, tile_n, warps, stages in shapes:
        for span in (128, 64, 32):
            tiling = Tiling(
                arch="sm90", tile_m=tile_m, tile_n=tile_n, num_stages=stages, num_mma_warps=warps, swizzle_bytes=span
            )
            try:
                make_plan(KernelSpec(problem=problem, tiling=tiling))
            except InfeasibleSpec:
                continue
            return tiling
    raise InfeasibleSpec(f"no default tiling fits head dim {problem.head_dim} on sm90")
