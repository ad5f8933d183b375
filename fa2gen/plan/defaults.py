"""Default tilings: good ones for any supported problem, with no spec written by hand and nothing measured."""

from __future__ import annotations

from fa2gen.arch import ARCHES, ArchName
from fa2gen.errors import InfeasibleSpec
from fa2gen.plan.feasible import fits
from fa2gen.plan.sm80_bwd import default_tiling_sm80_bwd
from fa2gen.plan.sm80_fwd import default_tiling_sm80
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = ["default_tiling"]


def default_tiling(problem: Problem, arch: ArchName, shared_memory_limit: int | None = None) -> Tiling:
    """A good tiling for any supported problem, with no spec written by hand. Raises InfeasibleSpec if none fits."""
    if arch == "sm80":
        of_direction = default_tiling_sm80_bwd if problem.direction == "bwd" else default_tiling_sm80
        return of_direction(problem, shared_memory_limit or ARCHES["sm80"].shared_memory_per_block)
    return _default_tiling_sm90_bwd(problem) if problem.direction == "bwd" else _default_tiling_sm90(problem)


def _default_tiling_sm90(problem: Problem) -> Tiling:
    """Three warpgroups where their 160 registers hold 64 keys or more, else two: what `fa2gen tune` found on an H200.

    A third warpgroup hides more of the softmax and reads K and V once for 192 rows (d = 128 at 8k: 1.08x two
    warpgroups). With three, as many keys a block as the registers hold; with two, few enough that O has a place beside
    Q's. Panels are as wide as that allows: a narrow one wastes less of a ragged head dim, but takes more copies.
    """
    stages = 4 if problem.head_dim <= 64 else 2
    shapes = [(192, tile_n, 12, stages) for tile_n in (128, 112, 96, 80, 64)]
    shapes += [(128, tile_n, 8, 2) for tile_n in (80, 64)]
    for tile_m, tile_n, warps, stages in shapes:
        for span in (128, 64, 32):
            tiling = Tiling(
                arch="sm90",
                tile_m=tile_m,
                tile_n=tile_n,
                num_stages=stages,
                num_mma_warps=warps,
                swizzle_bytes=span,
                lazy_rescale=1,
            )
            if fits(KernelSpec(problem=problem, tiling=tiling)):
                return tiling
    raise InfeasibleSpec(f"no default tiling fits head dim {problem.head_dim} on sm90")


def _default_tiling_sm90_bwd(problem: Problem) -> Tiling:
    """Two warpgroups of 64 keys each where dK and dV of 64 keys fit one's registers, with as many queries as fit: the
    operand reads of S, dP and dQ, which limit it, cost the less an element the more there are. Beyond head dim 160 one
    warpgroup holds dV, the other dK. Causal kernels have 64 queries a block above head dim 64, as the diagonal wastes
    half of its blocks (d = 128: 1.04x 80 queries at 2k, but 0.97x at 8k, H200)."""
    shapes = [(128, 128), (80, 128), (64, 128), (48, 128), (64, 64)]
    if problem.mask == "causal":
        shapes.remove((80, 128))
    for tile_m, tile_n in shapes:
        tiling = Tiling(arch="sm90", tile_m=tile_m, tile_n=tile_n, num_stages=2, num_mma_warps=8)
        if fits(KernelSpec(problem=problem, tiling=tiling)):
            return tiling
    raise InfeasibleSpec(f"no default tiling fits head dim {problem.head_dim} on sm90")
