"""The forward kernel of Ampere: mma.sync, ldmatrix, cp.async; a warp owns query rows, all share blocks of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fa2gen.arch import ARCHES
from fa2gen.errors import InfeasibleSpec
from fa2gen.layout import align_up
from fa2gen.plan.base import BrokenRule, KernelPlan, Param, bytes_text
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = ["Sm80FwdPlan", "default_swizzle", "default_tiling_sm80"]

MMA_ROWS = 16  # of one mma.sync m16n8k16
CHUNK_BYTES = 16  # of one cp.async, one ldmatrix row, one vector store
WARP_THREADS = 32
SWIZZLE_ROWS = 8  # after so many rows every swizzle repeats

# Of one A100 SM (CUDA C++ Programming Guide, technical specifications), and what the driver keeps of it for each block.
SHARED_MEMORY_PER_SM = 164 << 10
SHARED_MEMORY_RESERVED = 1 << 10
THREADS_PER_SM = 2048

# Registers that a thread needs beside S, O and Q: fragments of K and V in flight, addresses, row statistics. The least
# with which some kernel compiles without a spill; a ring keeps more addresses. ptxas has the last word (tests/compile).
REGISTERS_BESIDE_TILES = {"single": 47, "ring": 63}
# Of S, O and Q in registers together, with 16 for the statistics of each 16 rows: above it, Q is read from shared
# memory for every block of keys (d = 80 with 32 rows a warp, and d = 256 with 16, would spill).
REGISTERS_WITH_Q = 208


@dataclass(frozen=True)
class Sm80FwdPlan(KernelPlan):
    """Every number of templates/sm80/fwd.cu.j2."""

    template: str = "sm80/fwd.cu.j2"

    # Threads and registers

    @property
    def num_threads(self) -> int:
        return WARP_THREADS * self.num_mma_warps

    @property
    def rows_per_warp(self) -> int:
        return self.tile_m // self.num_mma_warps

    @property
    def num_row_tiles(self) -> int:
        """16-row tiles of one warp: each fragment of K or V that it loads serves so many products."""
        return self.rows_per_warp // MMA_ROWS

    @property
    def num_acc_s(self) -> int:
        """fp32 registers of 16 rows of S in one thread."""
        return self.tile_n // 2

    @property
    def num_acc_o(self) -> int:
        """fp32 registers of 16 rows of O in one thread."""
        return self.head_dim // 2

    @property
    def num_p(self) -> int:
        """32-bit registers of 16 rows of P, two elements each, in one thread."""
        return self.num_acc_s // 2

    @property
    def num_q(self) -> int:
        """32-bit registers of all of a warp's Q, two elements each, in one thread."""
        return self.num_row_tiles * 4 * self.num_k_steps_head_dim

    @property
    def num_accumulators(self) -> int:
        """fp32 registers of all of a warp's S and O in one thread."""
        return self.num_row_tiles * (self.num_acc_s + self.num_acc_o)

    @property
    def q_in_registers(self) -> bool:
        """Whether Q is read from shared memory once, which saves up to a third of all ldmatrix at 16 rows a warp."""
        return self.num_accumulators + self.num_q + MMA_ROWS * self.num_row_tiles <= REGISTERS_WITH_Q

    @property
    def registers_beside_tiles(self) -> int:
        return REGISTERS_BESIDE_TILES["single" if self.num_stages == 1 else "ring"]

    @property
    def register_estimate(self) -> int:
        q = self.num_q if self.q_in_registers else 0
        return self.num_accumulators + q + self.registers_beside_tiles

    @property
    def registers_available(self) -> int:
        """Of one thread: the instruction set's limit, or this block's share of the SM."""
        arch = ARCHES["sm80"]
        return min(arch.max_registers_per_thread, arch.registers_per_sm // self.num_threads // 8 * 8)

    # Matrix instructions

    @property
    def num_k_steps_pv(self) -> int:
        return self.tile_n // 16

    # Shared memory, in the order of the map: Q (later O), then stages of K and V

    @property
    def smem_q(self) -> int:
        return 0

    @property
    def smem_k(self) -> int:
        return self.q_tile.bytes

    @property
    def smem_v(self) -> int:
        return self.smem_k + self.kv_tile.bytes

    @property
    def stage_bytes(self) -> int:
        return 2 * self.kv_tile.bytes

    @property
    def shared_memory_bytes(self) -> int:
        return self.q_tile.bytes + self.num_stages * self.stage_bytes

    # Copies

    @property
    def chunks_per_panel_row(self) -> int:
        return self.tiling.swizzle_bytes // CHUNK_BYTES

    @property
    def copy_rows(self) -> int:
        """Panel rows that all threads copy at once."""
        return self.num_threads // self.chunks_per_panel_row

    @property
    def store_rows(self) -> int:
        """Panel rows that one warp stores at once."""
        return WARP_THREADS // self.chunks_per_panel_row

    @property
    def num_pending_groups(self) -> int:
        """Groups of cp.async that may still run when a block's stage must be there: those of the blocks after it."""
        return max(self.num_stages - 2, 0)

    # Launch

    @property
    def min_ctas_per_sm(self) -> int:
        """Blocks that an A100's SM holds by shared memory and register estimate; ptxas then stays within them."""
        by_registers = ARCHES["sm80"].registers_per_sm // (self.num_threads * align_up(self.register_estimate, 8))
        by_shared_memory = SHARED_MEMORY_PER_SM // (self.shared_memory_bytes + SHARED_MEMORY_RESERVED)
        return max(1, min(by_registers, by_shared_memory, THREADS_PER_SM // self.num_threads))

    @property
    def params(self) -> tuple[Param, ...]:
        strides = tuple(
            Param(f"{tensor}_{dimension}_stride", "int64_t")
            for tensor in "qkvo"
            for dimension in ("batch", "row", "head")
        )
        ints = ("seqlen_q", "seqlen_k", "num_heads", "num_heads_per_kv", *(("num_m_blocks",) if self.causal else ()))
        return (
            *(Param(tensor, "void const*") for tensor in "qkv"),
            Param("o", "void*"),
            Param("lse", "float*"),
            *strides,
            *(Param(name, "int") for name in ints),
            Param("softmax_scale", "float"),
            Param("softmax_scale_log2", "float"),
        )

    def broken_rules(self) -> Sequence[BrokenRule]:
        broken = []
        if self.tile_m % (MMA_ROWS * self.num_mma_warps):
            broken.append(
                BrokenRule(
                    "query rows",
                    f"tile_m {self.tile_m}, but {self.num_mma_warps} warps take a multiple of 16 rows each: "
                    f"{MMA_ROWS * self.num_mma_warps} or a multiple",
                )
            )
            return broken  # nothing else can be said without the rows of a warp
        if self.copy_rows % SWIZZLE_ROWS or self.num_threads % self.chunks_per_panel_row:
            broken.append(
                BrokenRule(
                    "mma warps",
                    f"{self.num_mma_warps} given; their {self.num_threads} threads must copy a multiple of 8 rows of "
                    f"{self.tiling.swizzle_bytes} B at once: an even number, or swizzle_bytes 64",
                )
            )
        if self.tiling.lazy_rescale:
            broken.append(BrokenRule("lazy_rescale", f"{self.tiling.lazy_rescale} given; only sm90 kernels have it: 0"))
        available = ARCHES["sm80"].shared_memory_per_block
        if self.shared_memory_bytes > available:
            tile = self.kv_tile.bytes
            broken.append(
                BrokenRule(
                    "shared memory",
                    f"{bytes_text(self.shared_memory_bytes)} needed (Q {self.q_tile.bytes:,} + {self.num_stages} "
                    f"stages x (K {tile:,} + V {tile:,})), {bytes_text(available)} available",
                )
            )
        if self.register_estimate > self.registers_available:
            broken.append(
                BrokenRule(
                    "registers",
                    f"{self.register_estimate} a thread needed ({self.num_row_tiles} x (S {self.num_acc_s} + O "
                    f"{self.num_acc_o}) + {self.register_estimate - self.num_accumulators}), "
                    f"{self.registers_available} available to {self.num_mma_warps} warps",
                )
            )
        return broken


# Default tilings: (largest head dim, rows of (tile_m, tile_n, num_stages, num_mma_warps) in order of preference); later
# ones are for devices with less shared memory. Two blocks of 4 warps share an SM wherever registers allow it: 32 rows a
# warp up to head dim 176, since each fragment of K and V that a warp loads should serve two products (the time is then
# set by the products, not by ldmatrix). All compile without a spill, for sm_80 and sm_90, with every mask and dtype.
_SMALL = (64, 32, 1, 4)
_DEFAULTS: tuple[tuple[int, tuple[tuple[int, int, int, int], ...]], ...] = (
    (96, ((128, 64, 2, 4), (128, 64, 1, 4))),
    (112, ((128, 64, 1, 4),)),
    (120, ((128, 48, 2, 4), (128, 48, 1, 4))),  # 64 keys spill 4 registers with a causal mask on sm_90
    (128, ((128, 64, 1, 4),)),
    (160, ((128, 32, 1, 4),)),
    (168, ((128, 64, 1, 8), (64, 64, 1, 4))),  # 32 rows a warp spill 2 registers here, and not at 176
    (176, ((128, 32, 1, 4),)),
    (256, ((128, 64, 1, 8), (64, 64, 1, 4))),
)
# Where an SM has room for two blocks of 64 rows (H100, H200), FlashAttention-2 prefers them at the largest head dims.
_TWO_BLOCKS_FROM_HEAD_DIM = 232
_TWO_BLOCKS_FROM_BYTES = 200 << 10


def default_swizzle(head_dim: int) -> Literal[128, 64, 32]:
    """The widest panels that waste no more than 64-byte ones do; 32 bytes where those would be half empty."""
    if head_dim <= 16:
        return 32
    return 128 if align_up(head_dim, 64) == align_up(head_dim, 32) else 64


def default_tiling_sm80(problem: Problem, shared_memory_limit: int) -> Tiling:
    """The best feasible tiling known for any supported problem.

    shared_memory_limit  bytes that one block may have on the device: 166,912 on 8.0, 101,376 on 8.6 and 8.9, 232,448
                         on 9.0.

    Raises InfeasibleSpec where not even the smallest tiling fits the limit.
    """
    head_dim = problem.head_dim
    shapes = next(shapes for largest, shapes in _DEFAULTS if head_dim <= largest)
    if head_dim >= _TWO_BLOCKS_FROM_HEAD_DIM and shared_memory_limit >= _TWO_BLOCKS_FROM_BYTES:
        shapes = shapes[::-1]
    needed = 0
    for tile_m, tile_n, stages, warps in (*shapes, _SMALL):
        tiling = Tiling(
            arch="sm80",
            tile_m=tile_m,
            tile_n=tile_n,
            num_stages=stages,
            num_mma_warps=warps,
            swizzle_bytes=default_swizzle(head_dim),
        )
        plan = Sm80FwdPlan(KernelSpec(problem=problem, tiling=tiling))
        needed = plan.shared_memory_bytes
        if needed <= shared_memory_limit and not plan.broken_rules():
            return tiling
    raise InfeasibleSpec(
        f"no tiling for head dim {head_dim} fits sm80 with {bytes_text(shared_memory_limit)} of shared memory\n"
        f"  nearest        {bytes_text(needed)} (tile_m {_SMALL[0]}, tile_n {_SMALL[1]}, num_stages {_SMALL[2]})"
    )
