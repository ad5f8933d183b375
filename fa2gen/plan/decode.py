"""The decoding kernel of all architectures: mma.sync, cp.async; warps share query rows and split the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fa2gen.features import Param, Scratch
from fa2gen.layout import NUMBER_BYTES, ceil_div
from fa2gen.plan.base import BrokenRule, EntryPoint
from fa2gen.plan.memory import Region, SharedMemory, Stages
from fa2gen.plan.sm80 import MMA_ROWS, WARP_THREADS, Sm80Plan

__all__ = ["DecodePlan"]

APPEND_THREADS = 256
LAYOUT_ENTRIES = 1024  # of sequences, in shared memory; a multiple of a warp's 32
# Registers that a thread needs beside S, P, O and Q, and the most with which none spills: ptxas has the last word
# (tests/compile).
REGISTERS_BESIDE_TILES = 80
REGISTERS = 255


@dataclass(frozen=True)
class DecodePlan(Sm80Plan):
    """Every number of templates/decode/decode.cu.j2."""

    template: str = "decode/decode.cu.j2"

    @cached_property
    def rooms(self) -> Mapping[str, str]:
        return {"keys": "dense", **super().rooms}

    # Threads and registers

    @property
    def num_row_tiles(self) -> int:
        """16-row tiles of every warp: each fragment of K or V that it loads serves so many products."""
        return self.tile_m // MMA_ROWS

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
        """32-bit registers of all of Q, two elements each, in one thread."""
        return self.num_row_tiles * 4 * self.qk.num_k_steps

    @property
    def num_tile_registers(self) -> int:
        """Of S, P and O in one thread."""
        return self.num_row_tiles * (self.num_acc_s + self.num_p + self.num_acc_o)

    @property
    def q_in_registers(self) -> bool:
        """Whether Q is read from shared memory once for all keys of a part."""
        return self.num_tile_registers + self.num_q + REGISTERS_BESIDE_TILES <= REGISTERS

    @property
    def register_estimate(self) -> int:
        return self.num_tile_registers + REGISTERS_BESIDE_TILES + (self.num_q if self.q_in_registers else 0)

    @property
    def min_ctas_per_sm(self) -> int:
        """One, with as much of an SM's memory as there is: what counts is how many bytes are on their way."""
        return 1

    # Matrix instructions

    @property
    def num_k_steps_pv(self) -> int:
        return self.tile_n // 16

    # Shared memory

    @property
    def layout_entries(self) -> int:
        return LAYOUT_ENTRIES

    @cached_property
    def memory(self) -> SharedMemory:
        """A stage is one tile of keys of one warp; at the end of a part 16 rows of its O take a stage's place."""
        tile, stages = self.k_tile.bytes, self.num_mma_warps * self.num_stages
        return SharedMemory(
            (
                Region("q", self.q_tile.bytes, label="Q"),
                Stages(stages, (Region("k", tile, label="K"), Region("v", tile, label="V"))),
                Region("row_sums", self.num_mma_warps * self.tile_m * 8),
                Region("shares", 4 * self.num_mma_warps),
                Region("layout", 4 * LAYOUT_ENTRIES + 4),
                Region("arrived", 4),
            )
        )

    @property
    def stage_bytes(self) -> int:
        return 2 * self.k_tile.bytes

    @property
    def share_bytes(self) -> int:
        """Of 16 rows of a warp's O in fp32."""
        return MMA_ROWS * NUMBER_BYTES * self.head_dim

    @property
    def no_share(self) -> int:
        """In the place of the address of a warp's share, that it has none."""
        return 0xFFFFFFFF

    @property
    def row_quads(self) -> int:
        """Groups of four columns of a row: what a thread stores at once."""
        return self.head_dim // 4

    # Copies

    @property
    def copy_rows(self) -> int:
        """Panel rows that one warp copies at once."""
        return WARP_THREADS // self.chunks_per_panel_row

    @property
    def tile_row_chunks(self) -> int:
        """Groups of eight columns, 16 bytes, of a row of a tile: the last panel's are all there."""
        return self.q_tile.count * self.chunks_per_panel_row

    @property
    def query_chunks(self) -> int:
        """Of those of Q's tile, the most that one thread copies."""
        return ceil_div(self.tile_m * self.tile_row_chunks, self.num_threads)

    @property
    def append_threads(self) -> int:
        return APPEND_THREADS

    @property
    def row_chunks(self) -> int:
        """Groups of eight columns of a row, 16 bytes: what a thread appends."""
        return self.head_dim // 8

    # Launch

    @property
    def schedule(self) -> str:
        return "parts"

    @cached_property
    def scratch(self) -> tuple[Scratch, ...]:
        own = (Scratch("parts", "float*"), Scratch("part_sums", "float*"), Scratch("counters", "int*", cleared=True))
        return (*super().scratch, *own)

    @cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        append = EntryPoint(f"{self.name}_append", APPEND_THREADS, 0, (), "new rows")
        return (append, EntryPoint(self.name, self.num_threads, self.shared_memory_bytes, (), "parts"))

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o", "k_new", "v_new", "q_given")

    @cached_property
    def params(self) -> tuple[Param, ...]:
        return (*super().params, Param("inverse_group", "float"))

    @property
    def sizes(self) -> tuple[str, ...]:
        lengths = ("seqlen_q", "seqlen_k", "seqlen_new", "num_sequences", "cache_entries")
        heads = ("num_heads", "num_heads_kv", "num_heads_per_kv", "num_m_blocks")
        rotary = ("rotary_dim", "rotary_rows", "rotary_interleaved", "rotary_steps")
        return (*lengths, *heads, "unit_shift", "least_units", "fixed_parts", *rotary)

    def broken_rules(self) -> Sequence[BrokenRule]:
        broken = []
        if self.num_stages < 2:
            detail = f"{self.num_stages} given; a warp multiplies one while it loads another: 2"
            broken.append(BrokenRule("stages", detail))
        if self.tile_n > WARP_THREADS:
            detail = f"tile_n {self.tile_n}, but each lane of a warp finds the place of one of them: at most 32"
            broken.append(BrokenRule("keys of a warp", detail))
        if self.tiling.lazy_rescale:
            broken.append(BrokenRule("lazy_rescale", f"{self.tiling.lazy_rescale} given; only sm90 kernels have it: 0"))
        if self.share_bytes > self.stage_bytes:
            detail = f"{self.share_bytes:,} B of 16 rows of O in fp32, in the place of a stage's {self.stage_bytes:,} B"
            broken.append(BrokenRule("merge", detail))
        broken += self.shared_memory_rule() + self.groups_rule()
        if self.register_estimate > self.registers_available:
            broken.append(
                BrokenRule(
                    "registers",
                    f"{self.register_estimate} a thread needed ({self.num_row_tiles} x (S {self.num_acc_s} + P "
                    f"{self.num_p} + O {self.num_acc_o}) + {REGISTERS_BESIDE_TILES}), {self.registers_available} "
                    f"available to {self.num_mma_warps} warps",
                )
            )
        return broken
