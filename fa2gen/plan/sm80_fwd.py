"""The forward kernel of Ampere: mma.sync, ldmatrix, cp.async; a warp owns query rows, all share blocks of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fa2gen.layout import CHUNK_BYTES
from fa2gen.plan.base import WARP_THREADS, BrokenRule, EntryPoint
from fa2gen.plan.memory import Region, SharedMemory, Stages
from fa2gen.plan.sm80 import MMA_ROWS, SWIZZLE_ROWS, Sm80RowsPlan

__all__ = ["Sm80FwdPlan"]

# Registers that a thread needs beside S, O and Q: fragments of K and V in flight, addresses, row statistics. The least
# with which some kernel compiles without a spill; a ring keeps more addresses. ptxas has the last word (tests/compile).
REGISTERS_BESIDE_TILES = {"single": 47, "ring": 63}
REGISTERS_OF_DROPOUT = 17
# Of S, O and Q in registers together, with 16 for the statistics of each 16 rows: above it, Q is read from shared
# memory for every block of keys (d = 80 with 32 rows a warp, and d = 256 with 16, would spill).
REGISTERS_WITH_Q = 208
WARP_BYTES = WARP_THREADS * CHUNK_BYTES  # 16 of each lane


@dataclass(frozen=True)
class Sm80FwdPlan(Sm80RowsPlan):
    """Every number of templates/sm80/fwd.cu.j2."""

    template: str = "sm80/fwd.cu.j2"

    # Threads and registers

    @property
    def num_column_warps(self) -> int:
        """Two, of 32 rows, where one could hold no more than 16 rows of O: each fragment of K and V then serves two
        products, where a warp alone would have one of it, and read shared memory for longer than it multiplies."""
        narrow = self.head_dim_v <= 160 or self.head_dim_v % (2 * MMA_ROWS)
        uneven = self.num_mma_warps % 2 or self.tile_n % (2 * MMA_ROWS) or self.tile_m != MMA_ROWS * self.num_mma_warps
        whole_rows = self.has_score or self.has_allow or self.dropout or not self.tiling.lazy_rescale
        return 1 if narrow or uneven or whole_rows or self.num_stages > 1 else 2

    @property
    def rows_per_warp(self) -> int:
        return self.tile_m * self.num_column_warps // self.num_mma_warps

    @property
    def num_row_tiles(self) -> int:
        return self.rows_per_warp // MMA_ROWS

    @property
    def keys_per_warp(self) -> int:
        """Of a block of keys, those of a warp's S and P."""
        return self.tile_n // self.num_column_warps

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
        """With random bits 32 rows a warp spill at head dim 128, and at 24 where three blocks are to share an SM. With
        pages they spill at 160, and at 72 with a window."""
        of_dropout = REGISTERS_OF_DROPOUT if self.dropout and self.num_row_tiles > 1 else 0
        of_dropout *= 3 if self.has_score and self.head_dim > 64 else 1  # 96 with a cap spills 26
        spills_of_pages = self.paged and (self.head_dim > 128 or self.head_dim == 72)
        of_pages = 17 if spills_of_pages and self.num_row_tiles > 1 else 0
        of_tensors = 32 if self.loads else 0  # at head dim 64 with 8 warps two blocks spill 24
        return REGISTERS_BESIDE_TILES["single" if self.num_stages == 1 else "ring"] + of_tensors + of_dropout + of_pages

    @property
    def register_estimate(self) -> int:
        q = self.num_q if self.q_in_registers else 0
        return self.num_accumulators + q + self.registers_beside_tiles

    # Matrix instructions

    @property
    def num_k_steps_pv(self) -> int:
        """Of O, for the keys of one warp's P."""
        return self.keys_per_warp // 16

    # Shared memory

    @cached_property
    def memory(self) -> SharedMemory:
        """O takes Q's place, if it is staged; a stage is one block of keys."""
        k, v = Region("k", self.k_tile.bytes, label="K"), Region("v", self.v_tile.bytes, label="V")
        o = [] if self.partial else [Region("o", self.o_tile.bytes, label="O", in_place_of="q")]
        q = Region("q", max(self.q_tile.bytes, *(region.bytes for region in o), 0), label="Q")
        shared = []
        if self.shares_rows:
            p = self.num_mma_warps * self.warp_p_bytes
            shared = [Region("p", p, label="P"), Region("row_statistics", self.num_mma_warps * WARP_BYTES)]
        return SharedMemory((q, *o, Stages(self.num_stages, (k, v)), *shared))

    @property
    def warp_p_bytes(self) -> int:
        """Of P for the other warp of its rows: registers of all lanes, 16 bytes each, one after the other."""
        return self.num_row_tiles * self.num_p // 4 * WARP_BYTES

    @property
    def stage_bytes(self) -> int:
        return self.k_tile.bytes + self.v_tile.bytes

    # Copies

    @property
    def store_rows(self) -> int:
        """Panel rows that one warp stores at once."""
        return WARP_THREADS // self.chunks_per_panel_row

    @property
    def stored_rows(self) -> int:
        """Rows of O that one warp stores."""
        return self.rows_per_warp // self.num_column_warps

    @property
    def num_pending_groups(self) -> int:
        """Groups of cp.async that may still run when a block's stage must be there: those of the blocks after it."""
        return max(self.num_stages - 2, 0)

    @property
    def key_source(self) -> str:
        """What says where a thread reads K and V."""
        return "Pages" if self.paged else "Source"

    # Launch

    @property
    def schedule(self) -> str:
        return "listed" if self.varlen else "longest_first" if self.uneven else "by_head"

    @cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        main = EntryPoint(self.name, self.num_threads, self.shared_memory_bytes, (), "tiles")
        return (*self.prepare_entries, main)

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o")

    @property
    def sizes(self) -> tuple[str, ...]:
        heads = () if self.varlen else ("num_heads",)
        return ("seqlen_q", "seqlen_k", *heads, "num_heads_per_kv", *(("num_m_blocks",) if self.uneven else ()))

    def lazy_rescale_rule(self) -> Iterator[BrokenRule]:
        return iter(())

    def rules(self) -> Iterator[BrokenRule]:
        if self.tile_m % (MMA_ROWS * self.num_mma_warps):
            yield BrokenRule(
                "query rows",
                f"tile_m {self.tile_m}, but {self.num_mma_warps} warps take a multiple of 16 rows each: "
                f"{MMA_ROWS * self.num_mma_warps} or a multiple",
            )
            return  # nothing else can be said without the rows of a warp
        if self.copy_rows % SWIZZLE_ROWS or self.num_threads % self.chunks_per_panel_row:
            yield BrokenRule(
                "mma warps",
                f"{self.num_mma_warps} given; their {self.num_threads} threads must copy a multiple of 8 rows of "
                f"{self.tiling.swizzle_bytes} B at once: an even number, or swizzle_bytes 64",
            )
        beside = self.register_estimate - self.num_accumulators
        yield from self.common_rules(f"{self.num_row_tiles} x (S {self.num_acc_s} + O {self.num_acc_o}) + {beside}")
        yield from self.dropout_rule()
