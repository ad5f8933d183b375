"""The forward kernel of Ampere: mma.sync, ldmatrix, cp.async; every warp owns query rows, all warps share blocks of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fa2gen.arch import ARCHES
from fa2gen.layout import align_up
from fa2gen.plan.base import BrokenRule, KernelPlan, Param, bytes_text
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = ["Sm80FwdPlan", "default_tiling_sm80"]

MMA_ROWS = 16  # of one mma.sync m16n8k16
CHUNK_BYTES = 16  # of one cp.async, one ldmatrix row, one vector store
WARP_THREADS = 32

# Registers that a thread needs beside S, O and fragments; see Sm80FwdPlan.register_estimate.
REGISTERS_BESIDE_TILES = 40


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
        return self.num_row_tiles * 4 * self.num_k_steps_qk

    @property
    def register_estimate(self) -> int:
        return self.num_row_tiles * (self.num_acc_s + self.num_acc_o) + REGISTERS_BESIDE_TILES

    @property
    def q_in_registers(self) -> bool:
        return False

    # Matrix instructions

    @property
    def num_k_steps_qk(self) -> int:
        """Steps of 16 along the head dim; the last reads zeros where the head dim is an odd multiple of 8."""
        return align_up(self.head_dim, 16) // 16

    @property
    def num_k_steps_pv(self) -> int:
        return self.tile_n // 16

    @property
    def k_steps_per_panel(self) -> int:
        return self.kv_tile.columns // 16

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

    @property
    def swizzle_shift(self) -> int:
        """16-byte chunk c of row r lies at chunk c ^ ((r >> shift) & mask): see layout.swizzle."""
        return {128: 0, 64: 1, 32: 2}[self.tiling.swizzle_bytes]

    @property
    def swizzle_mask(self) -> int:
        return {128: 7, 64: 3, 32: 1}[self.tiling.swizzle_bytes]

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
        return 1

    @property
    def params(self) -> tuple[Param, ...]:
        strides = tuple(
            Param(f"{tensor}_{dimension}_stride", "int64_t") for tensor in "qkvo" for dimension in ("batch", "row", "head")
        )
        ints = ("seqlen_q", "seqlen_k", "num_heads", "num_heads_per_kv", "num_m_blocks")
        causal_ints = ("num_batch_heads", "heads_per_section") if self.causal else ()
        return (
            *(Param(tensor, "void const*") for tensor in "qkv"),
            Param("o", "void*"),
            Param("lse", "float*"),
            *strides,
            *(Param(name, "int") for name in (*ints, *causal_ints)),
            Param("softmax_scale", "float"),
            Param("softmax_scale_log2", "float"),
        )

    def broken_rules(self) -> Sequence[BrokenRule]:
        return []
