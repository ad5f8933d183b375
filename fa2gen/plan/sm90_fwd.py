"""The forward kernel of Hopper: TMA, an mbarrier ring, wgmma with P in registers, one producer warpgroup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from fa2gen.arch import ARCHES
from fa2gen.features import Param, Scratch
from fa2gen.layout import align_up
from fa2gen.plan.barriers import Barriers, ring
from fa2gen.plan.base import BrokenRule, EntryPoint, TensorMapPlan, Width
from fa2gen.plan.memory import Region, SharedMemory
from fa2gen.plan.sm90 import ROWS_PER_WARPGROUP, WARP_ROWS, Sm90Plan
from fa2gen.ptx import Wgmma

__all__ = ["Sm90FwdPlan"]

VISIT_SLOT_BYTES = 4
TILE_SLOT_BYTES = 16  # block of queries, head, batch entry: one vector load; a ragged batch's sequence: another

# Registers that a thread needs beside S, O and P: addresses, row statistics, loop state. With 160 registers 28 separate
# the tilings that compile clean (head dim 144 with 80 keys, 72 with 128) from those that spill (128 with 96, 80 with
# 128); with 112, head dim 72 with 64 keys from 64 with 80.
REGISTERS_BESIDE_TILES = 28


@dataclass(frozen=True)
class Sm90FwdPlan(Sm90Plan):
    """Every number of templates/sm90/fwd.cu.j2."""

    template: str = "sm90/fwd.cu.j2"

    # Threads and registers

    @property
    def num_acc_s(self) -> int:
        """fp32 registers of S in one thread."""
        return self.wgmma_qk.num_accumulators

    @property
    def num_acc_o(self) -> int:
        """fp32 registers of O in one thread."""
        return self.wgmma_pv.num_accumulators

    @property
    def num_p(self) -> int:
        """32-bit registers of P, two elements each, in one thread."""
        return self.num_acc_s // 2

    @property
    def register_estimate(self) -> int:
        return self.num_acc_s + self.num_acc_o + self.num_p + self.registers_beside_tiles

    @property
    def registers_beside_tiles(self) -> int:
        """Of two rows, where their keys begin, too: head dim 168 with 64 keys and 160 registers spills 3. And of an
        expression its values: with a cap 96 with 112 keys spills 11, and 144 with 80. And random bits: with them
        168 spills with 64 keys, and in ragged batches and windows 144."""
        of_dropout = self.dropout * (13 if self.head_dim > 136 and (self.left_edge or self.varlen) else 1)
        of_score = 4 if self.has_score else 0
        # Where two warpgroups have few to spare: slopes at 256, 80 keys, spill 3, a bias with 64 keys 27.
        of_tensors = self.num_acc_s + 8 if self.has_score and self.score.looks_up else 22 if self.loads else 0
        of_tensors *= self.num_mma_warpgroups == 2
        # Of masks of tensors those of a block's keys: 128 with 128 keys spills 56, 64 with 160 112, 256 with 64 40.
        of_tensors = max(of_tensors, self.num_acc_s + 5) if self.tile_tables else of_tensors
        return REGISTERS_BESIDE_TILES + (2 if self.left_edge else 0) + of_score + of_tensors + of_dropout

    # Matrix instructions

    @cached_property
    def wgmma_qk(self) -> Wgmma:
        return Wgmma(self.dtype, self.tile_n, "shared", b_transposed=False)

    @cached_property
    def wgmma_pv(self) -> Wgmma:
        return Wgmma(self.dtype, self.head_dim_v, "registers", b_transposed=True)

    @cached_property
    def wgmmas(self) -> tuple[Wgmma, ...]:
        """The instructions, each once."""
        return (self.wgmma_qk, self.wgmma_pv)

    @property
    def num_k_steps_pv(self) -> int:
        return self.tile_n // 16

    @property
    def seen_parts(self) -> int:
        """Parts of a tile whose rows may need no mask where others do."""
        return self.num_mma_warpgroups

    # Shared memory

    @property
    def q_stage_bytes(self) -> int:
        return align_up(self.q_tile.bytes, 1024)

    def stage_bytes(self, width: Width) -> int:
        """From one stage of K, or of V, to the next: whole tiles, on the 1024-byte grid of the widest swizzle."""
        return align_up(width.tile(self.tile_n).bytes, 1024)

    @property
    def tile_slot_bytes(self) -> int:
        return TILE_SLOT_BYTES * (2 if self.varlen else 1)

    @cached_property
    def barriers(self) -> Barriers:
        return self._barriers(self.num_q_stages)

    def _barriers(self, num_q_stages: int) -> Barriers:
        rings = (("q", num_q_stages), ("k", self.num_stages), ("v", self.num_stages))
        return Barriers(sum((ring(name, stages, empty="kNumMmaWarps") for name, stages in rings), ()))

    def _memory(self, num_q_stages: int, o_aliases_q: bool) -> SharedMemory:
        o_bytes = align_up(self.o_tile.bytes, 1024)
        # For the block that each stage of K is, where a tile does not visit all.
        visits = (Region("visit_slots", VISIT_SLOT_BYTES, self.num_stages, label="visits"),) if self.has_allow else ()
        return SharedMemory(
            (
                Region("q", max(self.q_stage_bytes, o_bytes * o_aliases_q), num_q_stages, label="Q"),
                Region("k", self.stage_bytes(self.qk), self.num_stages, label="K"),
                Region("v", self.stage_bytes(self.vo), self.num_stages, label="V"),
                Region("o", o_bytes, label="O", in_place_of="q" if o_aliases_q else None),
                self._barriers(num_q_stages).region,
                Region(
                    "tile_slots", self.tile_slot_bytes * num_q_stages, label="slots"
                ),  # for the tile of each stage of Q
                *visits,
            )
        )

    def _fits(self, num_q_stages: int, o_aliases_q: bool) -> bool:
        return self._memory(num_q_stages, o_aliases_q).bytes <= ARCHES["sm90"].shared_memory_per_block

    @cached_property
    def num_q_stages(self) -> int:
        """Two where there is room beside a place for O: the next tile's Q is then there before this tile ends."""
        return 2 if self._fits(2, o_aliases_q=False) else 1

    @cached_property
    def o_aliases_q(self) -> bool:
        """Whether O is staged where Q was: only where there is no room for both, since the next Q then waits for O."""
        return not self._fits(1, o_aliases_q=False)

    @cached_property
    def memory(self) -> SharedMemory:
        return self._memory(self.num_q_stages, self.o_aliases_q)

    # Matrix descriptors: what the lower half holds beside the address

    @property
    def desc_lo_v(self) -> int:
        """V, MN-major: the leading byte offset is the step to the next panel of columns."""
        return (self.v_tile.panel_bytes >> 4) << 16

    # Launch

    @property
    def schedule(self) -> str:
        return "listed" if self.varlen else "longest_first" if self.uneven else "by_head"

    @cached_property
    def tensor_maps(self) -> tuple[TensorMapPlan, ...]:
        span, columns = self.tiling.swizzle_bytes, self.k_tile.columns
        return (
            TensorMapPlan("q", columns, self.tile_m, span),
            *(replace(found, of_pages=self.paged) for found in self.streamed_maps("k", self.k_tile)),
            *(replace(found, of_pages=self.paged) for found in self.streamed_maps("v", self.v_tile)),
            TensorMapPlan("o", columns, WARP_ROWS, span),
        )

    @cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        shared, early = self.shared_memory_bytes, self.is_prepared
        main = EntryPoint(self.name, self.num_threads, shared, self.tensor_maps, "persistent", early)
        return (*self.prepare_entries, main)

    @cached_property
    def scratch(self) -> tuple[Scratch, ...]:
        # A kernel that runs before clears it: memory of any content will do there.
        return (Scratch("tile_counter", "int*", cleared=not self.is_prepared), *super().scratch)

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """With pages, from one to the next of K and of V, in rows."""
        of_pages = ("k_page_stride", "v_page_stride") if self.paged else ()
        return (*super().params, *(Param(name, "int") for name in of_pages))

    @property
    def sizes(self) -> tuple[str, ...]:
        tiles = () if self.varlen else ("num_tiles", *(("num_batch_heads",) if self.uneven else ()))
        sections = ("heads_per_section",) if self.uneven and not self.varlen else ()
        boxes = ("box_rows", "tile_pages", "tile_rows") if self.paged else ()
        return ("seqlen_q", "seqlen_k", "num_heads", "num_heads_per_kv", "num_m_blocks", *tiles, *sections, *boxes)

    def rules(self) -> Iterator[BrokenRule]:
        if self.num_mma_warps not in (4, 8, 12, 16):
            yield BrokenRule("mma warps", f"{self.num_mma_warps} given; one to four warpgroups: 4, 8, 12 or 16")
            return  # nothing else can be said without a warpgroup count
        rows = ROWS_PER_WARPGROUP * self.num_mma_warpgroups
        if self.tile_m != rows:
            yield BrokenRule(
                "query rows",
                f"tile_m {self.tile_m}, but {self.num_mma_warps} warps take 64 rows a warpgroup: {rows}",
            )
        yield from self.common_rules(
            f"S {self.num_acc_s} + O {self.num_acc_o} + P {self.num_p} + {self.registers_beside_tiles}"
        )
        yield from self.dropout_rule()

    def lazy_rescale_rule(self) -> Iterator[BrokenRule]:
        return iter(())
