"""The decoding kernel of all architectures: mma.sync, cp.async; warps share query rows and split the keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from fa2gen.features import Param, Scratch
from fa2gen.layout import CHUNK_BYTES, ELEMENT_BYTES, NUMBER_BYTES, ceil_div
from fa2gen.plan.base import WARP_THREADS, BrokenRule, EntryPoint
from fa2gen.plan.memory import Region, SharedMemory, Stages
from fa2gen.plan.sm80 import MMA_ROWS, Sm80RowsPlan
from fa2gen.spec import SAME

__all__ = ["DecodePlan"]

APPEND_THREADS = 256
WIDE_CHUNKS = 4  # of 8 columns, that a thread widens
LAYOUT_ENTRIES = 1024  # of sequences, in shared memory; a multiple of a warp's 32
# Registers that a thread needs beside S, P, O and Q, and the most with which none spills: ptxas has the last word
# (tests/compile).
REGISTERS_BESIDE_TILES = 80
REGISTERS = 255
# Bytes of a call's keys and values up to which they leave L2 first. H100, of the time of those that do not, L2 full of
# what was written: 33 and 67 MB 0.94, 0.91, 134 MB 0.95, 164 MB 0.97, 268 MB 1.01, 537 MB 1.03.
STREAMED_BYTES = 160 << 20
SM80_PAGES_OF_8_BITS = 240  # the most head dims for which a thread's registers suffice there


@dataclass(frozen=True)
class DecodePlan(Sm80RowsPlan):
    """Every number of templates/decode/decode.cu.j2."""

    template: str = "decode/decode.cu.j2"

    @cached_property
    def rooms(self) -> Mapping[str, str]:
        return {"keys": "dense", **super().rooms}

    # What caches hold

    @property
    def has_8_bits(self) -> bool:
        """Of each number of K and V."""
        return self.problem.cache_dtype != SAME

    @property
    def mma_dtype(self) -> str:
        """fp16 holds every number of 8 bits, and P, which is at most 1."""
        return "fp16" if self.has_8_bits else self.problem.dtype

    @property
    def softmax_scale(self) -> str:
        """A scale of K is part of that of scores, unless an expression takes products that have it."""
        if self.has_8_bits and not self.has_score:
            return "p.softmax_scale * k_scale(p, item.bidb, item.head_kv)"
        return super().softmax_scale

    @property
    def cache_bytes(self) -> int:
        """Of a number of K or V."""
        return 1 if self.has_8_bits else ELEMENT_BYTES

    @property
    def kv_span(self) -> int:
        """Bytes of a panel row of K and V, which has as many columns as Q's."""
        return self.tiling.swizzle_bytes * self.cache_bytes // ELEMENT_BYTES

    @property
    def kv_panel_bytes(self) -> int:
        return self.tile_n * self.kv_span

    @property
    def kv_bytes(self) -> int:
        """Of a tile of K or V."""
        return self.k_tile.count * self.kv_panel_bytes

    @property
    def kv_panel_chunks(self) -> int:
        return self.kv_span // CHUNK_BYTES

    @property
    def kv_chunk_columns(self) -> int:
        """Of a copy of 16 bytes."""
        return CHUNK_BYTES // self.cache_bytes

    @property
    def kv_swizzle(self) -> tuple[int, int]:
        """(shift, mask) of its panels: see `swizzle_shift`."""
        return {128: (0, 7), 64: (1, 3), 32: (2, 1), 16: (0, 0)}[self.kv_span]

    # Threads and registers

    @property
    def num_row_tiles(self) -> int:
        """Every warp has all rows."""
        return self.tile_m // MMA_ROWS

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
        tile, stages = self.kv_bytes, self.num_mma_warps * self.num_stages
        entries = (Region("entries", 4 * WARP_THREADS, label="places of keys"),) if self.paged else ()
        return SharedMemory(
            (
                Region("q", self.q_tile.bytes, label="Q"),
                Stages(stages, (Region("k", tile, label="K"), Region("v", tile, label="V"), *entries)),
                Region("row_sums", self.num_mma_warps * self.tile_m * 8),
                Region("shares", 4 * self.num_mma_warps),
                Region("layout", 4 * (LAYOUT_ENTRIES + 3)),
                Region("arrived", 4),
            )
        )

    @property
    def stage_bytes(self) -> int:
        return 2 * self.kv_bytes + (4 * WARP_THREADS if self.paged else 0)

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
        """Panel rows of K or V that one warp copies at once."""
        return WARP_THREADS // self.kv_panel_chunks

    @property
    def streamed_tiles(self) -> int:
        """Tiles of K and V, of all heads, up to which these leave L2 first; 0: they never do, as with rows for several
        blocks (16 tokens 1 x 8k 36.3 us where a policy is chosen, 35.1); by 8 bits and on SM80 it is not timed."""
        leave = self.arch == "sm90" and self.num_row_tiles == 1 and not self.has_8_bits
        return STREAMED_BYTES // (2 * self.kv_bytes) if leave else 0

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

    @property
    def wide_chunks(self) -> int:
        """So many of those that a thread widens."""
        return WIDE_CHUNKS

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
        widen = EntryPoint(f"{self.name}_widen", APPEND_THREADS, 0, (), "wide rows")
        main = EntryPoint(self.name, self.num_threads, self.shared_memory_bytes, (), "parts")
        return (append, *([widen] if self.has_8_bits else []), main)

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o", "k_new", "v_new", "q_given")

    @cached_property
    def params(self) -> tuple[Param, ...]:
        return (*super().params, Param("inverse_group", "float"))

    @property
    def sizes(self) -> tuple[str, ...]:
        lengths = ("seqlen_q", "seqlen_k", "seqlen_new", "num_sequences", "cache_entries")
        heads = ("num_heads", "num_heads_kv", "num_heads_per_kv")
        rotary = ("rotary_dim", "rotary_rows", "rotary_interleaved", "rotary_steps")
        work = ("unit_shift", "least_units", "item_units", "item_runs", "fixed_parts", "entry_sequences", "num_entries")
        runs = ("num_runs", "run_reciprocal", "rows_at_once", "row_rounds", "round_reciprocal")
        return (*lengths, *heads, *work, *runs, *rotary)

    def rules(self) -> Iterator[BrokenRule]:
        if self.num_stages < 2:
            detail = f"{self.num_stages} given; a warp multiplies one while it loads another: 2"
            yield BrokenRule("stages", detail)
        if self.tile_n > WARP_THREADS:
            detail = f"tile_n {self.tile_n}, but each lane of a warp finds the place of one of them: at most 32"
            yield BrokenRule("keys of a warp", detail)
        if self.has_8_bits:
            yield from self._eight_bit_rules()
        if self.share_bytes > 2 * self.kv_bytes:
            place = 2 * self.kv_bytes
            detail = f"{self.share_bytes:,} B of 16 rows of O in fp32, in the place of a stage's {place:,} B"
            yield BrokenRule("merge", detail)
        yield from self.common_rules(
            f"{self.num_row_tiles} x (S {self.num_acc_s} + P {self.num_p} + O {self.num_acc_o}) + "
            f"{REGISTERS_BESIDE_TILES}"
        )

    def _eight_bit_rules(self) -> Iterator[BrokenRule]:
        """Those that a cache of 8-bit numbers breaks."""
        if self.problem.cache_dtype == "e4m3" and self.arch == "sm80":
            detail = "e4m3: sm80 has no instruction that converts it; nearest: int8, or arch sm90"
            yield BrokenRule("cache_dtype", detail)
        if self.arch == "sm80" and self.problem.paged and self.head_dim > SM80_PAGES_OF_8_BITS:
            detail = (
                f"head dim {self.head_dim} in pages of 8-bit numbers: ptxas spills 8; nearest: head dim 240, no pages"
            )
            yield BrokenRule("registers", detail)
        if self.head_dim % CHUNK_BYTES:
            detail = f"rows of {self.head_dim} B are no whole copies of {CHUNK_BYTES}; nearest: a head dim that is"
            yield BrokenRule("cache_dtype", detail)
        if self.kv_span < 2 * CHUNK_BYTES:
            detail = f"{self.tiling.swizzle_bytes}: panels of 8-bit numbers are half as wide, at least 32 B: 64"
            yield BrokenRule("swizzle_bytes", detail)
