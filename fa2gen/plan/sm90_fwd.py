"""The forward kernel of Hopper: TMA, an mbarrier ring, wgmma with P in registers, one producer warpgroup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fa2gen.arch import ARCHES
from fa2gen.features import Scratch
from fa2gen.layout import Panels, align_up
from fa2gen.plan.base import BrokenRule, EntryPoint, TensorMapPlan, bytes_text
from fa2gen.plan.sm90 import BARRIER_BYTES, ROWS_PER_WARPGROUP, WARP_ROWS, Sm90Plan
from fa2gen.ptx import Wgmma

__all__ = ["Sm90FwdPlan"]

TILE_SLOT_BYTES = 16  # block of queries, head, batch entry: one vector load

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
        """Of two rows, where their keys begin, too: head dim 168 with 64 keys and 160 registers spills 3."""
        return REGISTERS_BESIDE_TILES + (2 if self.left_edge else 0)

    # Matrix instructions

    @cached_property
    def wgmma_qk(self) -> Wgmma:
        return Wgmma(self.dtype, self.tile_n, "shared", b_transposed=False)

    @cached_property
    def wgmma_pv(self) -> Wgmma:
        return Wgmma(self.dtype, self.head_dim, "registers", b_transposed=True)

    @cached_property
    def wgmmas(self) -> tuple[Wgmma, ...]:
        """The instructions, each once."""
        return (self.wgmma_qk, self.wgmma_pv)

    @property
    def num_k_steps_pv(self) -> int:
        return self.tile_n // 16

    # Shared memory, in the order of the map: Q stages, K stages, V stages, O (unless it takes Q's place), barriers,
    # tile slots

    @property
    def o_tile(self) -> Panels:
        return self.q_tile

    @property
    def smem_q(self) -> int:
        return 0

    @property
    def smem_k(self) -> int:
        return self.num_q_stages * self.q_stage_bytes

    @property
    def q_stage_bytes(self) -> int:
        return align_up(self.q_tile.bytes, 1024)

    @property
    def stage_bytes(self) -> int:
        """From one stage of K or V to the next: whole tiles, on the 1024-byte grid of the widest swizzle."""
        return align_up(self.kv_tile.bytes, 1024)

    @property
    def smem_v(self) -> int:
        return self.smem_k + self.num_stages * self.stage_bytes

    @property
    def _smem_after_v(self) -> int:
        return self.smem_v + self.num_stages * self.stage_bytes

    def _fits(self, num_q_stages: int, num_o_tiles: int) -> bool:
        tiles = (num_q_stages + num_o_tiles) * self.q_stage_bytes + 2 * self.num_stages * self.stage_bytes
        return tiles + self._barriers_bytes(num_q_stages) <= ARCHES["sm90"].shared_memory_per_block

    @cached_property
    def num_q_stages(self) -> int:
        """Two where there is room beside a place for O: the next tile's Q is then there before this tile ends."""
        return 2 if self._fits(2, 1) else 1

    @cached_property
    def o_aliases_q(self) -> bool:
        """Whether O is staged where Q was: only where there is no room for both, since the next Q then waits for O."""
        return not self._fits(1, 1)

    def _barriers_bytes(self, num_q_stages: int) -> int:
        """Full and empty barriers of every stage of Q, K and V, and the slot of each stage of Q for its tile."""
        return BARRIER_BYTES * 2 * (num_q_stages + 2 * self.num_stages) + TILE_SLOT_BYTES * num_q_stages

    @property
    def smem_o(self) -> int:
        return self.smem_q if self.o_aliases_q else self._smem_after_v

    @property
    def smem_barriers(self) -> int:
        return self._smem_after_v + (0 if self.o_aliases_q else self.q_stage_bytes)

    @property
    def smem_tile_slots(self) -> int:
        return self.smem_barriers + BARRIER_BYTES * 2 * (self.num_q_stages + 2 * self.num_stages)

    @property
    def shared_memory_bytes(self) -> int:
        return self.smem_barriers + self._barriers_bytes(self.num_q_stages)

    # Matrix descriptors: what the lower half holds beside the address

    @property
    def desc_lo_v(self) -> int:
        """V, MN-major: the leading byte offset is the step to the next panel of columns."""
        return (self.kv_tile.panel_bytes >> 4) << 16

    # Launch

    @property
    def schedule(self) -> str:
        return "longest_first" if self.uneven else "by_head"

    @cached_property
    def tensor_maps(self) -> tuple[TensorMapPlan, ...]:
        span, columns = self.tiling.swizzle_bytes, self.kv_tile.columns
        return (
            TensorMapPlan("q", columns, self.tile_m, span),
            *self.streamed_maps("k", self.kv_tile),
            *self.streamed_maps("v", self.kv_tile),
            TensorMapPlan("o", columns, WARP_ROWS, span),
        )

    @cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        return (EntryPoint(self.name, self.num_threads, self.shared_memory_bytes, self.tensor_maps, "persistent"),)

    @cached_property
    def scratch(self) -> tuple[Scratch, ...]:
        return (Scratch("tile_counter", "int*", cleared=True),)

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        return ()

    @property
    def sizes(self) -> tuple[str, ...]:
        sections = ("num_batch_heads", "heads_per_section") if self.uneven else ()
        return ("seqlen_q", "seqlen_k", "num_heads", "num_heads_per_kv", "num_m_blocks", "num_tiles", *sections)

    def broken_rules(self) -> Sequence[BrokenRule]:
        broken = []
        arch = ARCHES["sm90"]
        if self.num_mma_warps not in (4, 8, 12, 16):
            broken.append(
                BrokenRule("mma warps", f"{self.num_mma_warps} given; one to four warpgroups: 4, 8, 12 or 16")
            )
            return broken  # nothing else can be said without a warpgroup count
        rows = ROWS_PER_WARPGROUP * self.num_mma_warpgroups
        if self.tile_m != rows:
            broken.append(
                BrokenRule(
                    "query rows",
                    f"tile_m {self.tile_m}, but {self.num_mma_warps} warps take 64 rows a warpgroup: {rows}",
                )
            )
        if self.shared_memory_bytes > arch.shared_memory_per_block:
            tile = self.stage_bytes
            broken.append(
                BrokenRule(
                    "shared memory",
                    f"{bytes_text(self.shared_memory_bytes)} needed (Q {self.q_tile.bytes:,} + "
                    f"{self.num_stages} stages x (K {tile:,} + V {tile:,}) + barriers), "
                    f"{bytes_text(arch.shared_memory_per_block)} available",
                )
            )
        if self.register_estimate > self.consumer_registers:
            broken.append(
                BrokenRule(
                    "registers",
                    f"{self.register_estimate} a thread needed (S {self.num_acc_s} + O {self.num_acc_o} + "
                    f"P {self.num_p} + {self.registers_beside_tiles}), "
                    f"{self.consumer_registers} available to {self.num_mma_warps} warps",
                )
            )
        return broken
