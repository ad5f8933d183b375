"""What the plans of both Ampere passes share: warps, copies with cp.async, what an A100's SM holds, default tilings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fa2gen.arch import ARCHES
from fa2gen.errors import InfeasibleSpec
from fa2gen.layout import align_up
from fa2gen.plan.base import KernelPlan, bytes_text
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = ["MMA_ROWS", "SWIZZLE_ROWS", "WARP_THREADS", "Sm80Plan", "first_that_fits"]

MMA_ROWS = 16  # of one mma.sync m16n8k16
CHUNK_BYTES = 16  # of one cp.async, one ldmatrix row, one vector store
WARP_THREADS = 32
SWIZZLE_ROWS = 8  # after so many rows every swizzle repeats

# Of one A100 SM (CUDA C++ Programming Guide, technical specifications), and what the driver keeps of it for each block.
SHARED_MEMORY_PER_SM = 164 << 10
SHARED_MEMORY_RESERVED = 1 << 10
THREADS_PER_SM = 2048


@dataclass(frozen=True)
class Sm80Plan(KernelPlan):
    """num_mma_warps that copy with cp.async, all of them, and multiply with mma.sync."""

    @property
    def num_threads(self) -> int:
        return WARP_THREADS * self.num_mma_warps

    @property
    def register_estimate(self) -> int:
        """The most registers of a thread that are alive at one time."""
        raise NotImplementedError

    @property
    def registers_available(self) -> int:
        """Of one thread: the instruction set's limit, or this block's share of the SM."""
        arch = ARCHES["sm80"]
        return min(arch.max_registers_per_thread, arch.registers_per_sm // self.num_threads // 8 * 8)

    @property
    def min_ctas_per_sm(self) -> int:
        """Blocks that an A100's SM holds by shared memory and register estimate; ptxas then stays within them."""
        by_registers = ARCHES["sm80"].registers_per_sm // (self.num_threads * align_up(self.register_estimate, 8))
        by_shared_memory = SHARED_MEMORY_PER_SM // (self.shared_memory_bytes + SHARED_MEMORY_RESERVED)
        return max(1, min(by_registers, by_shared_memory, THREADS_PER_SM // self.num_threads))

    @property
    def chunks_per_panel_row(self) -> int:
        return self.tiling.swizzle_bytes // CHUNK_BYTES

    @property
    def copy_rows(self) -> int:
        """Panel rows that all threads copy at once."""
        return self.num_threads // self.chunks_per_panel_row


def first_that_fits(
    plan: type[Sm80Plan], problem: Problem, shapes: Iterable[tuple[int, int, int, int]], shared_memory_limit: int
) -> Tiling:
    """The first of some (tile_m, tile_n, num_stages, num_mma_warps) whose plan is feasible within a limit.

    shared_memory_limit  bytes that one block may have on the device: 166,912 on 8.0, 101,376 on 8.6 and 8.9, 232,448
                         on 9.0.

    Raises InfeasibleSpec where not even the last, the smallest, fits the limit.
    """
    for tile_m, tile_n, stages, warps in shapes:
        tiling = Tiling(
            arch="sm80",
            tile_m=tile_m,
            tile_n=tile_n,
            num_stages=stages,
            num_mma_warps=warps,
            swizzle_bytes=_default_swizzle(problem.head_dim),
        )
        found = plan(KernelSpec(problem=problem, tiling=tiling))
        if found.shared_memory_bytes <= shared_memory_limit and not found.broken_rules():
            return tiling
    of_gradients = "the gradients of " if problem.direction == "bwd" else ""
    raise InfeasibleSpec(
        f"no tiling for {of_gradients}head dim {problem.head_dim} fits sm80 with {bytes_text(shared_memory_limit)} of "
        f"shared memory\n  nearest        {bytes_text(found.shared_memory_bytes)} (tile_m {tile_m}, tile_n {tile_n}, "
        f"num_stages {stages})"
    )


def _default_swizzle(head_dim: int) -> Literal[128, 64, 32]:
    """The widest panels that waste no more than 64-byte ones do; 32 bytes where those would be half empty."""
    if head_dim <= 16:
        return 32
    return 128 if align_up(head_dim, 64) == align_up(head_dim, 32) else 64
