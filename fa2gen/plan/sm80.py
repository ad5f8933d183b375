"""What the plans of both Ampere passes share: warps, copies with cp.async, what an A100's SM holds."""

from __future__ import annotations

from dataclasses import dataclass

from fa2gen.arch import ARCHES
from fa2gen.layout import CHUNK_BYTES, align_up
from fa2gen.plan.base import WARP_THREADS, KernelPlan

__all__ = ["MMA_ROWS", "SWIZZLE_ROWS", "Sm80Plan", "Sm80RowsPlan"]

MMA_ROWS = 16  # of one mma.sync m16n8k16
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


@dataclass(frozen=True)
class Sm80RowsPlan(Sm80Plan):
    """Each warp holds S, P and O of num_row_tiles times 16 rows, for the keys of a tile; or warps share them."""

    @property
    def num_column_warps(self) -> int:
        """Warps of the same rows: each makes S and P of its share of the keys, and its columns of O."""
        return 1

    @property
    def shares_rows(self) -> bool:
        return self.num_column_warps > 1

    @property
    def num_row_tiles(self) -> int:
        """16-row tiles of one warp: each fragment of K or V that it loads serves so many products."""
        raise NotImplementedError

    @property
    def num_acc_s(self) -> int:
        """fp32 registers of 16 rows of S in one thread."""
        return self.tile_n // self.num_column_warps // 2

    @property
    def num_acc_o(self) -> int:
        """fp32 registers of 16 rows of O in one thread."""
        return self.head_dim_v // self.num_column_warps // 2

    @property
    def num_p(self) -> int:
        """32-bit registers of 16 rows of P, two elements each, in one thread."""
        return self.num_acc_s // 2

    @property
    def num_q(self) -> int:
        """32-bit registers of all of a warp's Q, two elements each, in one thread."""
        return self.num_row_tiles * 4 * self.qk.num_k_steps
