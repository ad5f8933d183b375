"""The backward kernels of Ampere: preprocess, main and postprocess in one source, with mma.sync and cp.async.

The main kernel has one block of threads for each block of keys, which walks the blocks of queries. Warps split S^T by
keys and by queries; the warps of the same keys, "peers", then split the columns of dK and dV. dQ is split by queries
and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fa2gen.arch import ARCHES
from fa2gen.layout import Panels, ceil_div
from fa2gen.plan.base import WARP_THREADS, BrokenRule, EntryPoint, Width
from fa2gen.plan.bwd import BackwardPlan
from fa2gen.plan.memory import Region, SharedMemory, Stages
from fa2gen.plan.sm80 import MMA_ROWS, SWIZZLE_ROWS, Sm80Plan

__all__ = ["Sm80BwdPlan"]

FLOAT_BYTES = 4
QUERIES = (32, 64, 128)  # powers of two, so that addresses of a warp's steps have no carry into those of another

# Registers that a thread needs beside the accumulators: fragments in flight, addresses, P as 16-bit numbers. The least
# with which every default compiles without a spill; ptxas has the last word (tests/compile).
REGISTERS_BESIDE_TILES = 56
REGISTERS_OF_LEARNING = 48  # where each element adds to the gradient of a tensor
REGISTERS_OF_LENGTHS = 8  # of a ragged batch: they are no constants of the launch (d = 128: 64 x 128 spill 8 bytes);
# and of an expression's values (with a cap: 8 bytes)


@dataclass(frozen=True)
class Sm80BwdPlan(Sm80Plan, BackwardPlan):
    """Every number of templates/sm80/bwd.cu.j2."""

    template: str = "sm80/bwd.cu.j2"

    # How warps share the work

    @property
    def num_row_tiles(self) -> int:
        """16-key tiles of S^T in one warp: two, so that each fragment of Q, dO and K serves two products, or one where
        a warp would then have fewer than 16 queries."""
        for tiles in (2, 1):
            key_warps = self.tile_n // (tiles * MMA_ROWS)
            if self.tile_n % (tiles * MMA_ROWS) == 0 and self.num_mma_warps % key_warps == 0:
                peers = self.num_mma_warps // key_warps
                if self.tile_m % (peers * MMA_ROWS) == 0:
                    return tiles
        return 0

    @property
    def keys_per_warp(self) -> int:
        return self.num_row_tiles * MMA_ROWS

    @property
    def num_peers(self) -> int:
        """Warps of the same keys: they split the queries of S^T, and the columns of dK and dV."""
        return self.num_mma_warps * self.keys_per_warp // self.tile_n

    @property
    def has_peers(self) -> bool:
        """Whether warps read each other's P and dS for dV and dK; else P stays in registers."""
        return self.num_peers > 1

    @property
    def queries_per_warp(self) -> int:
        return self.tile_m // self.num_peers

    @cached_property
    def _dq_split(self) -> tuple[int, int]:
        """(16-row tiles of dQ in one warp, warps that share its columns): the fewest products for the busiest warp,
        then the fewest fragments to load."""
        splits = []
        for tiles in (2, 1):
            row_warps = self.tile_m // (tiles * MMA_ROWS)
            if row_warps and self.num_mma_warps % row_warps == 0:
                column_warps = self.num_mma_warps // row_warps
                steps = ceil_div(self.qk.num_k_steps, column_warps)
                splits.append((tiles * steps, tiles + steps, tiles, column_warps))
        return min(splits)[2:] if splits else (0, 0)

    @property
    def num_dq_row_tiles(self) -> int:
        """16-query tiles of dQ in one warp."""
        return self._dq_split[0]

    @property
    def num_dq_column_warps(self) -> int:
        """Warps of the same rows of dQ."""
        return self._dq_split[1]

    # Matrix instructions

    @property
    def num_k_steps_warp_queries(self) -> int:
        return self.queries_per_warp // MMA_ROWS

    @property
    def num_k_steps_n(self) -> int:
        return self.tile_n // MMA_ROWS

    def num_column_steps_dkv(self, width: Width) -> int:
        """16-column steps of dK, or of dV, in one warp; some warps may have one fewer."""
        return ceil_div(width.num_k_steps, self.num_peers)

    @property
    def num_column_steps_dq(self) -> int:
        """16-column steps of dQ in one warp; some warps may have one fewer."""
        return ceil_div(self.qk.num_k_steps, self.num_dq_column_warps)

    # Registers, of 16 rows in one thread

    @property
    def num_acc_s(self) -> int:
        """fp32 registers of S^T, and of dP^T."""
        return self.queries_per_warp // 2

    @property
    def num_p(self) -> int:
        """32-bit registers of P^T, two elements each, and of dS^T."""
        return self.num_acc_s // 2

    def num_acc_dkv(self, width: Width) -> int:
        """fp32 registers of dK, or of dV."""
        return 8 * self.num_column_steps_dkv(width)

    @property
    def num_acc_dq(self) -> int:
        """fp32 registers of dQ."""
        return 8 * self.num_column_steps_dq

    @property
    def register_estimate(self) -> int:
        """The most that is alive at one time: dK and dV, and either P and dP or dQ."""
        scores = self.num_row_tiles * (2 * self.num_acc_s + self.num_derivatives * self.num_p)
        sums = self.num_row_tiles * (self.num_acc_dkv(self.qk) + self.num_acc_dkv(self.vo))
        return sums + max(scores, self.num_dq_row_tiles * self.num_acc_dq) + self.registers_beside_tiles

    @property
    def registers_beside_tiles(self) -> int:
        """With random bits head dim 104 with 64 x 128 spills 2, and 128; beside an expression 40 with
        128 x 128."""
        head_dim = max(self.head_dim, self.head_dim_v)
        wide = head_dim > 112 or (self.has_score and self.score.looks_up)
        if self.dropout:
            of_expression = 32 if self.has_score or self.has_allow else 96  # from which head dim on
            lengths = 4 if of_expression < head_dim <= 64 else head_dim > of_expression
            return REGISTERS_BESIDE_TILES + REGISTERS_OF_LENGTHS * lengths
        more = wide and (self.has_score or (self.varlen and not self.tiling.heads_abreast))
        more = more or (head_dim <= 64 and bool(self.tile_tables))  # documents with 128 x 128 spill 8 bytes
        more = more or (self._has_wide_ring and self.mask == "full" and not self._ends_plainly)  # 256 spills 16 to 36
        more = more or (self.partial and not self.has_peers)  # in parts, at 64, where these end 272 bytes spill
        if self.learned and self.score.looks_up and 64 < head_dim <= 80:  # a bias at 72, 64 x 128, spills 16, ragged 36
            return REGISTERS_BESIDE_TILES + REGISTERS_OF_LEARNING
        return REGISTERS_BESIDE_TILES + (REGISTERS_OF_LENGTHS if more else 0)

    @property
    def multiplies_dp_early(self) -> bool:
        """Whether dP comes before P, whose exponentials are then made under it: where that gains, and P and dP beside
        each other spill nothing. Full masks at head dim 128 1.011, at 64 without peers 1.014; at 256 1.00, but two
        stages spill 16 bytes without (H100)."""
        widths = {self.head_dim, self.head_dim_v}
        special = self.has_score or self.has_allow or self.dropout or self.varlen or self.splits_groups
        if special or self.mask != "full" or not self._ends_plainly:
            return False
        return widths == {128} or (widths == {256} and self._has_wide_ring) or (widths == {64} and not self.has_peers)

    @property
    def _has_wide_ring(self) -> bool:
        """Whether Q and dO have two stages above head dim 192, which take more shared memory than 8.0 has."""
        return self.num_stages == 2 and self.head_dim > 192

    @property
    def _ends_plainly(self) -> bool:
        return not (self.deterministic or self.partial or self.sink)

    # What a thread would rather compute again than keep, where registers for it are missing

    @property
    def finds_k_columns_late(self) -> bool:
        """Whether a thread computes where its columns of K are before each dQ. Kept, that spills 8 to 20 bytes with
        heads abreast, and for sm_90 16 under full masks at head dims 113 to 128 and in ragged batches at 97 to 112, 8
        in deterministic windows there and in ragged ones up to 64."""
        if self.tiling.heads_abreast or self._has_wide_ring:
            return True
        if self.varlen and self.left_edge and self.head_dim <= 64:
            return True
        if 96 < self.head_dim <= 112:
            return self.varlen or (self.left_edge and self.deterministic)
        return self.mask == "full" and 112 < self.head_dim <= 128 and not self.finds_ds_late

    @property
    def finds_rows_late(self) -> bool:
        """Whether a thread adds up where its rows of Q are before each dK: in ragged windows at head dims 65 to 80 that
        would spill 8 bytes for sm_90, and its columns of K, found late, 8 for sm_80."""
        return self.varlen and self.left_edge and 64 < self.head_dim <= 80

    @property
    def finds_ds_late(self) -> bool:
        """Whether a thread computes where its rows of dS are before each dQ: with statistics kept once 32 bytes would
        else spill at head dim 128 for sm_90, 40 for sm_80; with columns of K found late instead 0 and 52."""
        return self.keeps_statistics_once and self.has_peers

    @property
    def sum_threads(self) -> int:
        return self.num_threads

    def num_sums(self, width: Width) -> int:
        return self.num_row_tiles * self.num_acc_dkv(width)

    # Shared memory

    @property
    def p_tile(self) -> Panels:
        """P^T [key][query], and dS^T."""
        return Panels(self.tile_n, self.tile_m, self.tiling.swizzle_bytes)

    @cached_property
    def memory(self) -> SharedMemory:
        """dK and dV take the places of K and V; a stage is one block of queries."""
        size = FLOAT_BYTES * self.tile_m
        statistics = (Region("lse", size, label="LSE"), Region("dpsum", size, label="dPsum"))
        once = statistics if self.keeps_statistics_once else ()
        stage = (
            Region("q", self.q_tile.bytes, label="Q"),
            Region("dout", self.o_tile.bytes, label="dO"),
            *(() if once else statistics),
        )
        return SharedMemory(
            (
                Region("k", self.k_tile.bytes, label="K"),
                Region("v", self.v_tile.bytes, label="V"),
                *((Region("p", self.p_tile.bytes, label="P"),) if self.has_peers else ()),
                Region("ds", self.p_tile.bytes, label="dS"),
                Stages(self.num_stages, stage),
                *once,
            )
        )

    @property
    def keeps_statistics_once(self) -> bool:
        """Whether LSE and dPsum have one stage beside two of Q and dO, so that no register says where they are: without
        peers 1.02 to 1.03 at head dim 64, where else 24 to 44 bytes spill for sm_80; with dP before P at 128 1.037
        (H100). At 256, and under causal masks at 128, it is 0.94 to 0.99."""
        if self.num_stages == 1 or self.has_allow:  # whose next block may be none
            return False
        return not self.has_peers or (self.multiplies_dp_early and self.head_dim == 128)

    @property
    def lse_at(self) -> str:
        """C++ of the address of a block's LSE."""
        return "smem + kSmemLse" if self.keeps_statistics_once else "stage + kStageLse"

    @property
    def dpsum_at(self) -> str:
        """C++ of the address of a block's dPsum."""
        return "smem + kSmemDpsum" if self.keeps_statistics_once else "stage + kStageDpsum"

    @property
    def most_shared_memory(self) -> int:
        """On 9.0, which runs these kernels on request: more than 8.0 has, for which defaults have other tilings."""
        return ARCHES["sm90"].shared_memory_per_block

    @property
    def stage_bytes(self) -> int:
        statistics = 0 if self.keeps_statistics_once else 2 * FLOAT_BYTES * self.tile_m
        return self.q_tile.bytes + self.o_tile.bytes + statistics

    # The dQ accumulator in global memory: for each block of queries one run for each warp, of its registers in the
    # order [register][lane], so that every addition of a warp is one line.

    @property
    def dq_slice_floats(self) -> int:
        return WARP_THREADS * self.num_dq_row_tiles * self.num_acc_dq

    @property
    def dq_block_floats(self) -> int:
        return self.num_mma_warps * self.dq_slice_floats

    # Launch

    @cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        return (
            *self.prepare_entries,
            EntryPoint(self.preprocess_name, self.preprocess_threads, 0, (), "query blocks"),
            EntryPoint(self.name, self.num_threads, self.shared_memory_bytes, (), "key blocks"),
            EntryPoint(
                self.postprocess_name, self.num_threads, 0 if self.partial else self.q_tile.bytes, (), "query blocks"
            ),
            *self._groups_entries,
        )

    @property
    def _groups_entries(self) -> tuple[EntryPoint, ...]:
        if not self.splits_groups:
            return ()
        shared_bytes = 0 if self.partial else self.k_tile.bytes + self.v_tile.bytes
        return (EntryPoint(self.groups_name, self.num_threads, shared_bytes, (), "groups"),)

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o", "dout", "dq", "dk", "dv")

    def rules(self) -> Iterator[BrokenRule]:
        alone = tuple(self._rules_of_work())
        yield from alone
        if alone:
            return  # nothing else can be said of how the warps share the work
        if not self.num_row_tiles or not self.num_dq_row_tiles:
            yield BrokenRule(
                "keys",
                f"tile_n {self.tile_n} with tile_m {self.tile_m}: {self.num_mma_warps} warps must take 16 or 32 "
                "keys and a multiple of 16 queries each, and 16 or 32 rows of dQ",
            )
            return
        dk, dv = self.num_acc_dkv(self.qk), self.num_acc_dkv(self.vo)
        yield from self.common_rules(
            f"{self.num_row_tiles} x (dK {dk} + dV {dv}) + the more of {self.num_row_tiles} x (P {self.num_acc_s} + dP "
            f"{self.num_acc_s}) and dQ {self.num_dq_row_tiles * self.num_acc_dq} + {self.registers_beside_tiles}"
        )

    def _rules_of_work(self) -> Iterator[BrokenRule]:
        """Those without which the warps' share of the work has no numbers."""
        if self.num_mma_warps not in (4, 8):
            yield BrokenRule("mma warps", f"{self.num_mma_warps} given; 4 or 8")
        if self.tile_m not in QUERIES:
            yield BrokenRule("query rows", f"tile_m {self.tile_m} given; one of {', '.join(map(str, QUERIES))}")
        if self.num_stages > 2:
            yield BrokenRule("stages", f"{self.num_stages} given; 1, or 2")
        if self.copy_rows % SWIZZLE_ROWS:
            yield BrokenRule(
                "swizzle",
                f"{self.num_threads} threads must copy a multiple of 8 rows of {self.tiling.swizzle_bytes} B",
            )
