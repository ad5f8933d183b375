"""What the plans of both Hopper passes share: warpgroups, their registers, and matrix descriptors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fa2gen.layout import Panels
from fa2gen.plan.barriers import Barriers
from fa2gen.plan.base import KernelPlan, TensorMapPlan
from fa2gen.ptx import Wgmma

__all__ = ["REGISTER_SPLIT", "ROWS_PER_WARPGROUP", "WARPGROUP_THREADS", "WARP_ROWS", "Sm90Plan"]

WARPGROUP_THREADS = 128
ROWS_PER_WARPGROUP = 64  # wgmma's M
WARP_ROWS = 16  # a warp's share of those

# (producer, consumer) registers after setmaxnreg, by number of consumer warpgroups. A block starts with
# 65,536 / threads registers a thread, rounded down to 8; the split must not exceed that pool (all rows ran on an H200).
REGISTER_SPLIT = {1: (56, 256), 2: (24, 240), 3: (32, 160), 4: (32, 112)}


@dataclass(frozen=True)
class Sm90Plan(KernelPlan):
    """One producer warpgroup and num_mma_warpgroups that multiply with wgmma."""

    @property
    def num_mma_warpgroups(self) -> int:
        return self.num_mma_warps // 4

    @property
    def num_threads(self) -> int:
        return WARPGROUP_THREADS * (1 + self.num_mma_warpgroups)

    @property
    def register_split(self) -> tuple[int, int]:
        """Registers of a thread of the producer, and of one that multiplies."""
        return REGISTER_SPLIT[self.num_mma_warpgroups]

    @property
    def producer_registers(self) -> int:
        return self.register_split[0]

    @property
    def consumer_registers(self) -> int:
        return self.register_split[1]

    @property
    def registers_available(self) -> int:
        return self.consumer_registers

    @property
    def barriers(self) -> Barriers:
        """Of the main kernel."""
        raise NotImplementedError

    @property
    def wgmmas(self) -> tuple[Wgmma, ...]:
        """The instructions, each once."""
        raise NotImplementedError

    @property
    def accumulator_counts(self) -> tuple[int, ...]:
        """The sizes of accumulator arrays, each once."""
        return tuple(sorted({wgmma.num_accumulators for wgmma in self.wgmmas}))

    @staticmethod
    def streamed_maps(name: str, tile: Panels) -> tuple[TensorMapPlan, ...]:
        """The maps of a tensor that the loop loads: no box is wider than what the products read.

        TMA fetches a box's columns beyond the head dim from L2 like any other, before it puts zeros in their place: at
        head dim 72 full boxes of 64 columns brought 311 bytes for each row of 144, narrow ones 213 (ncu, H200).
        """
        whole = TensorMapPlan(name, tile.columns, tile.rows, tile.span)
        last = replace(whole, box_cols=tile.last_columns)
        if tile.count == 1:
            return (last,)
        return (whole,) if last == whole else (whole, replace(last, last_panel=True))

    @property
    def map_parameters(self) -> Iterator[str]:
        """Lines of the main kernel's parameters that are tensor maps, two a line."""
        declarations = [f"const __grid_constant__ CUtensorMap {found.argument}," for found in self.tensor_maps]
        for first in range(0, len(declarations), 2):
            yield " ".join(declarations[first : first + 2])

    @property
    def last_maps(self) -> tuple[str, ...]:
        """Parameters of the main kernel that are maps of last panels."""
        return tuple(found.argument for found in self.tensor_maps if found.last_panel)

    def tile_maps(self, name: str) -> str:
        """A tensor's `TileMaps`, of the main kernel's parameters: `{map_k, map_k_last}`."""
        found = [one.argument for one in self.tensor_maps if one.name == name]
        return f"{{{found[0]}, {found[-1]}}}"

    @property
    def desc_hi(self) -> int:
        """Upper half of the descriptors of tiles as TMA writes them."""
        return self.descriptor_hi(self.tiling.swizzle_bytes)

    @staticmethod
    def descriptor_hi(span: int) -> int:
        """Upper half of a descriptor of panels with `span` bytes a row: the swizzle in bits 62-63 (PTX ISA, "Matrix
        descriptor format"), and the step of 8 rows, 8 * span bytes in K-major and in MN-major tiles alike."""
        return ({128: 1, 64: 2, 32: 3}[span] << 30) | (8 * span >> 4)
