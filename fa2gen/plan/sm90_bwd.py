"""The backward kernels of Hopper: preprocess, main and postprocess in one source.

The main kernel has one block of threads for each block of keys, which walks the blocks of queries. Its mma warpgroups
split the work in one of three ways, which the tiling decides:

  by keys      64 keys each, tile_n = 64 a warpgroup: a warpgroup holds dK and dV of its keys. Head dims up to 160.
  by products  tile_n = 64 for two warpgroups: the first holds dV and makes dQ, the second holds dK. Any head dim: only
               one of the two 64 x head_dim accumulators has to fit a warpgroup's registers. Both compute S: six
               products instead of five.
  passing P    tile_n from 80 to 112 for two warpgroups: the first makes S, P and dV, the second dP, dS and dK, each
               some of dQ's columns. P and dS pass through shared memory as rows of queries, dK and dV are held
               transposed. Head dims above 64. The more keys, the fewer sums of dQ go to L2, their limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from fa2gen.arch import ARCHES
from fa2gen.features import Scratch
from fa2gen.layout import Panels, align_up, ceil_div
from fa2gen.plan.barriers import Barrier, Barriers, ring
from fa2gen.plan.base import BrokenRule, EntryPoint, TensorMapPlan, Width
from fa2gen.plan.bwd import BackwardPlan
from fa2gen.plan.memory import Region, SharedMemory, Stages
from fa2gen.plan.sm90 import ROWS_PER_WARPGROUP, WARP_ROWS, WARPGROUP_THREADS, Sm90Plan
from fa2gen.ptx import Wgmma

__all__ = ["Sm90BwdPlan"]

FLOAT_BYTES = 4
BLOCK_SLOT_BYTES = VISIT_SLOT_BYTES = 16
NUM_VISIT_SLOTS = 4  # as far as the producer may be ahead of who adds dQ
NUM_KEY_STAGES = 2
SWIZZLE_ATOM_BYTES = 1024
WARP_BYTES = 128  # of a word of each lane

# Registers that a thread needs beside the tiles: addresses, loop state. With these every default compiles without a
# spill; ptxas has the last word (tests/compile).
REGISTERS_BESIDE_TILES = 12
# Of an expression's values (a cap at d = 64, 128 x 128: 92 bytes spill), and of a key's second edge beside them (56).
REGISTERS_OF_SCORE = 8
REGISTERS_OF_TERMS = 4  # at which products start, up to head dim 64 (at 104, with V in registers: 16 bytes spill)
REGISTERS_OF_LOOKING_UP = 16  # a tensor's numbers, for each element (a bias at d = 128, 64 x 128: 124 bytes spill)
REGISTERS_OF_SCORE_AND_LEFT_EDGE = 16
# At d = 64 a bias with 112 queries spills 60, one that learns, in a window, 11 with 96; a cap with documents 6.
REGISTERS_OF_MANY_QUERIES_AND_LOOKING_UP, REGISTERS_OF_MANY_QUERIES_AND_HIDING = 13, 36
# Slopes that learn at 64 with 112 queries spill 6, T5's at 128 with 48, of which buckets are looked up first, 4.
REGISTERS_OF_MANY_QUERIES_AND_SUMS, REGISTERS_OF_PLACES_LOOKED_UP = 17, 17
REGISTERS_OF_ALLOW = 2  # of the walk's place, for what an expression hides (d = 160 causal, 48 x 128: 8 bytes spill)
# Split by keys, more for each 16 registers of dK and dV beyond 128: ptxas begins each at a multiple of 8. Head dims 192
# and 136 with 48 queries, or 128 and 168 with 64, would need 240, and it puts their products one after the other
# (C7512); 136 and 184 with 48 would spill 3 under a window.
ALIGNMENT_OF_SUMS = 8
EASY_SUMS, REGISTERS_OF_SUMS = 128, 4
REGISTERS_BESIDE_V = 12  # that V in registers leaves free (8 at d = 96, 80 queries: 64 bytes spill)
# Beside 80 queries (120, d = 120 or 112/128: 64 bytes spill, and products wait, C7512; 112 with dropout: they wait).
SUMS_THAT_LAG = 112
REGISTERS_OF_DQ_REST = 4  # where dQ's sums are, and from there to those of the other columns

NUM_WRITERS_IN_TURN = 3  # threads, of the warps that the producer warpgroup has beside the producer
NUM_DS_STAGES = 2  # then one barrier a block of queries is enough
DQ_COLUMNS_AT_ONCE = 128  # split by products: 64 accumulator registers beside the 64 x head_dim of dV

# Passing P, panels of 64 columns of dQ that one wgmma makes: two read dS once, and have 64 registers, which is too many
# beside four panels of dK or dV (808 bytes of spills at 256).
DQ_PANELS_AT_ONCE = 2
DQ_PANELS_BESIDE_FOUR = 1
SCORE_SPAN = 64  # bytes a row of P and dS then: whole panels of 32 keys, so that 96 keys need no padding

# Programmatic dependent launch of the main and the postprocess kernel. False launches them in the usual way: the source
# is the same, and its griddepcontrol instructions then do nothing.
STARTS_EARLY = True

# Blocks of 128 threads that 132 multiprocessors hold at most: these run beside the kernel that lists blocks of keys.
# That the main kernel finds its list complete as it starts, and asks once for all roles, is 1.009 and 1.011 times as
# fast (ragged, 32 of 512 keys, d = 128, causal and full; one of the two alone 1.001 and 1.004, 1.004 and 1.006; H100).
FIRST_WAVE_BLOCKS = 2112

# Up to this head dim what a kernel loads, and the sums of dQ, are the last to leave L2 (d = 64, 16k: causal 1.018, keys
# in turn 1.035, full 1.009; 8k 1.00, full 1.012, 4k 0.996; d = 128, 8k 1.003, full 1.00; H100).
HEAD_DIM_IN_L2 = 64

# With keys in turn, and L2 kept for them, few blocks that run at a time add to one head, up to 16 of them: d = 64
# causal, of FlashAttention-3, 16k 4, 8, 16 heads 0.99, 1.017, 1.019, 8k 8, 16 1.011, 1.013, 4k 8, 16 1.058, but 64
# heads 8k 0.55, 4k 0.79 (H100).
SECTION_BYTES_IN_TURN = 128 << 20

# Deterministic, d = 128, 8k: causal 4, 8, 16 heads 1.21, 1.16, 1.12 times the time of sums in any order, full 1.075,
# 1.07, 1.065, but 32 1.86; d = 256 causal 2, 4, 16 heads 1.38, 1.24, 1.30, full 2 and 16 1.18, 1.52 (H100, one thread a
# share).
SECTIONS_IN_ORDER, SECTIONS_OF_WIDE = 4, 2

# Up to so many rows, of causal masks all that a block of keys may walk, or of a ragged batch in the mean of a sequence,
# the first share of dQ of a block of queries is stored: no zeros are written and read again. Beyond, asking who was
# first costs more (causal, d = 128: 512, 2k, 8k 1.09, 1.05, 1.01 times, 16k 0.99; 32:8 heads, 2k 1.05, 4k 0.96; d = 64:
# 8k 1.01 to 1.03, 16k 1.00, 32:8 heads, 4k 1.02, 64:8, 8k 0.99; full 512 1.04, 2k 0.95, where blocks of keys come to a
# block of queries all at once; ragged 512, full 1.11; windows of 128 and 1024 keys 1.22, 1.05; H100).
FIRST_ROWS = 512
FIRST_ROWS_OF_CAUSAL, FIRST_ROWS_OF_NARROW = 8192, 16384  # up to head dim 64
FIRST_ROWS_OF_RAGGED = 4096  # causal

# Full masks from head dim 112 on: blocks of keys of 8 heads start together, and the first share is stored up to so many
# rows, unless few blocks follow those of the first wave, which come all at once, or heads share keys: d = 128, 2048
# blocks of keys, 512 to 8k 1.04, 1.04, 1.02, 1.013, 1.008 (H100: 2k to 8k 1.03, 1.013, 1.004); d = 112, 8k 1.012, but
# 96 0.993; 256 blocks of 8k and 1k 0.89, 0.98; 32:8 heads, 8k 0.993. 16k 1.014, but on an H100 0.80 to 0.95 from run
# to run, 0.64 at d = 120, 32k 0.6. Sections alone at d = 256 0.98 (32:8 heads) to 1.03 (16k), mostly 1.00 (H200).
LEAST_HEAD_DIM_OF_LEVEL = 112
FIRST_KEY_BLOCKS, FIRST_ROWS_OF_LEVEL = 2048, 8192


class DqSlice(NamedTuple):
    """Columns of dQ that one product makes: from which panel of K on, by which instruction, and how many registers of
    them are no padding."""

    panel: int
    wgmma: Wgmma
    num_added: int


@dataclass(frozen=True)
class Sm90BwdPlan(Sm90Plan, BackwardPlan):
    """Every number of templates/sm90/bwd.cu.j2."""

    template: str = "sm90/bwd.cu.j2"

    # How the work is split

    @property
    def splits_products(self) -> bool:
        """The first mma warpgroup holds dV and makes dQ, the second holds dK; else each holds both for its 64 keys."""
        return self.num_mma_warpgroups == 2 and self.tile_n == ROWS_PER_WARPGROUP

    @property
    def passes_p(self) -> bool:
        """The first mma warpgroup makes P and dV, the second dS and dK."""
        return self.num_mma_warpgroups == 2 and ROWS_PER_WARPGROUP < self.tile_n < 2 * ROWS_PER_WARPGROUP

    @property
    def splits_keys(self) -> bool:
        return not self.splits_products and not self.passes_p

    @property
    def swaps_dq(self) -> bool:
        """dQ^T = K^T dS^T rather than dQ = dS K: the warpgroups then split the head dim, and tile_m is free.

        Each takes one panel of 64 columns; what is left beyond the second they split by queries.
        """
        return self.splits_keys and (self.head_dim > 64 or self.shares_dq)

    @property
    def shares_dq(self) -> bool:
        """The same of the one panel that there is: each warpgroup takes its part of the queries."""
        return self.splits_keys and self.head_dim <= 64 and self.tile_m != self.tile_n

    @property
    def lags_dq(self) -> bool:
        """Each step makes dQ of the step before: then the warpgroups, which need each other's dS for it, need not meet,
        and one has its exponentials under the other's products."""
        return bool(self.tiling.lag)

    @property
    def is_persistent(self) -> bool:
        """Whether a block of threads takes one block of keys after the other: the next K, V, Q and dO are then loaded
        under the last products of the one before, whose last dQ is made in the first step of the next."""
        return bool(self.tiling.keys_in_turn)

    @cached_property
    def can_take_turns(self) -> bool:
        """Whether there is room for a second K, and for a second V unless that is held in registers, and for a warp's
        rows of dK in the place of its share of dQ. In dense batches, whose number of blocks the host knows; sums in
        order were not tried. Nor with a mask of an expression, tensors that learn, dropout or gradients in fp32."""
        if not self.lags_dq or self.shares_dq or self.varlen or self.dropout or self.deterministic:
            return False
        if self.tiling.heads_abreast or self.has_parts or self.partial or len(self.widths) > 1:
            return False
        if self.has_allow or self.learned or self.swaps_dq != self.holds_v:
            return False
        if self.dq_place_bytes % SWIZZLE_ATOM_BYTES or self.dq_place_bytes < self.warp_rows_bytes:
            return False
        memory = self._memory(self.stages_dq, is_persistent=True)
        return memory.bytes <= ARCHES["sm90"].shared_memory_per_block

    @property
    def can_split_tail(self) -> bool:
        """Where the host knows which blocks of keys are the last; expressions' kernels were not tried."""
        if self.varlen or self.has_score or self.has_allow or self.splits_products:
            return False
        return not self.splits_groups and not self.is_persistent

    def turns_rule(self) -> Iterator[BrokenRule]:
        if self.is_persistent and not self.can_take_turns:
            yield BrokenRule(
                "keys in turn",
                "1 given; needs lag, a dense batch without dropout, mask of an expression or tensors that learn, sums "
                "in no order, rounded gradients, groups in one part, and room for two K, for two V unless that is in "
                "registers, and for "
                f"{self.warp_rows_bytes:,} bytes of a warp's rows of dK in its {self.dq_place_bytes:,} of dQ, a "
                f"multiple of {SWIZZLE_ATOM_BYTES:,}: 0",
            )

    @property
    def dq_place_bytes(self) -> int:
        """Of a warp's share of dQ in shared memory, by way of which its rows of dK and dV leave."""
        return self.dq_slice_floats * FLOAT_BYTES

    @property
    def warp_rows_bytes(self) -> int:
        """Of a warp's rows of dK, or dV, in shared memory."""
        return self.qk.num_panels * WARP_ROWS * self.tiling.swizzle_bytes

    @property
    def has_place_for_both(self) -> bool:
        """Whether dK need not wait there until dV has left."""
        return self.dq_place_bytes >= 2 * self.warp_rows_bytes

    @property
    def has_before(self) -> str:
        """C++: whether dQ of the step before is still to be made."""
        return "step > first_step" if self.is_persistent else "step > 0"

    @property
    def num_key_stages(self) -> int:
        """Of K in a persistent kernel, with V where that is not held."""
        return NUM_KEY_STAGES

    @property
    def block_slot_bytes(self) -> int:
        """Of the slot in which the producer says which block of keys comes."""
        return BLOCK_SLOT_BYTES

    def lag_rule(self) -> Iterator[BrokenRule]:
        if not self.lags_dq:
            return
        why = "one mma warpgroup" if self.num_mma_warpgroups == 1 else None
        sums = sum(map(self.num_acc_dkv, (self.qk, self.vo)))
        if not self.splits_keys:
            why = f"{self.tile_n} keys, which two warpgroups do not split"
        elif not self.num_mma_warps // 2 < self.num_dq_slices <= self.num_mma_warps:
            why = f"{self.num_dq_slices} slices of dQ for {self.num_mma_warps} warps"
        elif self.swaps_dq and self.tile_m > ROWS_PER_WARPGROUP and sums > SUMS_THAT_LAG - 8 * self.dropout:
            why = f"{self.tile_m} queries and {sums} registers of dK and dV, which leave too few"
        elif self.swaps_dq and self.dropout and self.left_edge:  # 16 bytes spill
            why = "dropout in a window above head dim 64, which leaves too few registers"
        elif self.has_score and self.head_dim <= HEAD_DIM_IN_L2 and not self.starts_at_terms:
            why = "scores of an expression up to head dim 64 other than a product, a bias of the distance beside it"
        elif self.has_allow and self.deterministic:
            why = "a mask of an expression, and sums in an order"
        if why:
            yield BrokenRule("lag", f"1 given, with {why}: 0")

    @property
    def holds_v(self) -> bool:
        """Whether each warp holds its 16 keys of V in registers for all queries: dP^T = V dO^T then reads only dO from
        shared memory, whose bandwidth limits these head dims."""
        registers = self.register_estimate + self.num_v + REGISTERS_BESIDE_V
        return self.lags_dq and self.swaps_dq and not self.dropout and registers <= self.consumer_registers

    @property
    def keeps_in_l2(self) -> bool:
        return self.lags_dq and self.head_dim <= HEAD_DIM_IN_L2 and not self.varlen and not self.left_edge

    @property
    def starts_at_terms(self) -> bool:
        has_terms = self.has_score and self.score.is_sum and bool(self.score.rise)
        return has_terms and self.lags_dq and not self.dropout

    @property
    def weighs_behind_dp(self) -> bool:
        """Whether P of scores waits for dP, so that the other warpgroup, which starts behind that, starts early. Where
        products start at terms P comes under dP (times behind, 2k and 8k, causal ALiBi, H100: 64 1.01, 1.03, 72 1.01,
        1.01, 80 1.02, 1.03, 96 1.02, 1.03; 112 1.00, 0.99, 128 1.01, 1.00, in another run 1.01, 0.94)."""
        is_as_plain = self.starts_at_terms and self.head_dim < LEAST_HEAD_DIM_OF_LEVEL
        return self.lags_dq and self.has_score and not is_as_plain

    @property
    def starts_dv_early(self) -> bool:
        """Whether dV is issued before dS goes to shared memory, rather than behind dQ. H100, times behind: 64 causal
        1.00 to 1.04, full 1.01 to 1.04 (512 to 16k), 32 1.02, 48 1.01; 72 0.99, 80 to 112 0.93 to 0.99, 128 0.95 to
        0.99; with dropout at 64 0.98 to 0.99, and beside masks of expressions it spills 8 bytes."""
        return self.lags_dq and max(self.head_dim, self.head_dim_v) <= 64 and not (self.dropout or self.has_allow)

    @property
    def keeps_pace(self) -> bool:
        """Whether the first warpgroup waits for the second one's dP of the step before, as that does for its: the
        second then stays half a step behind."""
        return self.is_persistent and self.holds_v

    @property
    def num_v(self) -> int:
        """32-bit registers of 16 keys of V in one thread."""
        return 4 * self.vo.num_k_steps

    @property
    def splits_dq_rest(self) -> bool:
        return self.swaps_dq and self.head_dim > ROWS_PER_WARPGROUP * self.num_mma_warpgroups

    @property
    def walks_queries_down(self) -> bool:
        """Where additions have an order: under a causal mask all blocks of keys then begin at the same block of
        queries, and none waits for the one before to come to its diagonal (templates/sm90/bwd/README.md)."""
        return self.deterministic or super().walks_queries_down

    @property
    def is_level(self) -> bool:
        may_be = not self.varlen and not super().walks_sections
        return may_be and self.lags_dq and self.head_dim >= LEAST_HEAD_DIM_OF_LEVEL

    @property
    def walks_sections(self) -> bool:
        """Of an expression's masks too: most show the first keys to most queries, as a causal one does (images,
        d = 128: 1.02 at 2k, 1.036 at 8k, H100; up to head dim 64 not measured)."""
        return self.is_level or (self.has_allow and self.head_dim > HEAD_DIM_IN_L2) or super().walks_sections

    @property
    def section_bytes(self) -> int:
        return SECTION_BYTES_IN_TURN if self.is_persistent and self.keeps_in_l2 else super().section_bytes

    @property
    def times_in_order(self) -> int:
        if not self.deterministic or self.left_edge or self.varlen:
            return super().times_in_order
        return SECTIONS_IN_ORDER if self.stages_dq else SECTIONS_OF_WIDE if self.uneven else 1

    @property
    def split(self) -> str:
        """Part of a template's name."""
        return "passing" if self.passes_p else "products" if self.splits_products else "keys"

    # Threads and registers

    @property
    def finds_block_early(self) -> bool:
        """Of a ragged batch: whether a block of threads asks for its block of keys as it starts, for all of its roles,
        and not when the kernel of row statistics has ended: that lets it start when the list is complete."""
        return self.varlen and self.splits_keys and not self.problem.has_expression

    @property
    def block_parameter(self) -> str:
        """C++: by which roles are told their block of keys, if they are."""
        return ", KeyBlock const& block" if self.finds_block_early else ""

    @property
    def block_argument(self) -> str:
        """C++: what is given for it."""
        return ", block" if self.finds_block_early else ""

    @property
    def first_wave_blocks(self) -> int:
        """Of the kernel of row statistics, at most, which run as it starts."""
        return FIRST_WAVE_BLOCKS

    @property
    def num_mma_threads(self) -> int:
        return WARPGROUP_THREADS * self.num_mma_warpgroups

    @property
    def num_row_tiles(self) -> int:
        """16-key tiles of S^T in one warp: wgmma gives each of a warpgroup's four one."""
        return ROWS_PER_WARPGROUP // (4 * WARP_ROWS)

    @property
    def num_acc_s(self) -> int:
        """fp32 registers of S^T in one thread, and of dP^T; passing P, of S and dP."""
        return self.wgmma_s.num_accumulators

    @property
    def num_p(self) -> int:
        """32-bit registers of P^T, two elements each, in one thread, and of dS^T."""
        return self.num_acc_s // 2

    def num_acc_dkv(self, width: Width) -> int:
        """fp32 registers of 16 rows of dK, or of dV, in one thread."""
        return self.wgmma_dkv(width).num_accumulators

    @property
    def num_acc_dq(self) -> int:
        """fp32 registers of dQ in one thread: of one 64-row tile, in one slice of columns."""
        return self.wgmma_dq.num_accumulators

    @property
    def num_acc_dq_rest(self) -> int:
        """Those of the columns that wgmma_dq leaves, if it leaves any, without padding."""
        return self.wgmma_dq_rest.num_accumulators if self.swaps_dq else (self.head_dim - self.wgmma_dq.n) // 2

    @property
    def dq_accumulator_counts(self) -> tuple[int, ...]:
        """The sizes of dQ's accumulator arrays, each once."""
        return tuple(sorted({wgmma.num_accumulators for wgmma in self.dq_wgmmas}))

    @property
    def register_estimate(self) -> int:
        """The most that is alive at one time, in the warpgroup that has the most."""
        s, p, dq = self.num_acc_s, self.num_p, self.num_acc_dq
        dk, dv = self.num_acc_dkv(self.qk), self.num_acc_dkv(self.vo)
        if self.splits_products:
            return max(dk + 2 * s, dv + max(s, dq)) + p + self.registers_beside_tiles
        if self.passes_p:
            panels = max(width.num_panels for width in self.widths)
            of_sums = panels * self.wgmma_panel.num_accumulators
            return of_sums + max(s + p, *self.dq_accumulator_counts) + self.registers_beside_tiles
        rest = self.num_acc_dq_rest + REGISTERS_OF_DQ_REST if self.splits_dq_rest else 0
        aligned = align_up(dk, ALIGNMENT_OF_SUMS) + align_up(dv, ALIGNMENT_OF_SUMS)
        of_sums = REGISTERS_OF_SUMS * ceil_div(max(aligned - EASY_SUMS, 0), 16)
        with_p = p * (1 + self.num_derivatives)
        return dk + dv + with_p + max(2 * s, dq + rest) + of_sums + self.registers_beside_tiles

    @property
    def registers_beside_tiles(self) -> int:
        of_score = REGISTERS_OF_SCORE_AND_LEFT_EDGE if self.left_edge else REGISTERS_OF_SCORE
        if self.starts_at_terms and not self.left_edge and self.head_dim <= 64:
            of_score = REGISTERS_OF_TERMS
        of_allow = REGISTERS_OF_ALLOW if self.has_allow else 0
        looks_up = self.has_score and self.score.looks_up and not self.splits_products
        of_tensors = REGISTERS_OF_LOOKING_UP if looks_up else 0
        if looks_up and self.learned and len(self.loads) > 2:  # two functions a tensor
            of_tensors += REGISTERS_OF_PLACES_LOOKED_UP
        if self.splits_keys and self.head_dim <= 64:
            of_sums = REGISTERS_OF_MANY_QUERIES_AND_SUMS * bool(self.learned)
            of_tensors += REGISTERS_OF_MANY_QUERIES_AND_LOOKING_UP if looks_up else of_sums
            of_tensors += REGISTERS_OF_MANY_QUERIES_AND_HIDING * (self.has_score and self.has_allow)
        of_dropout = 8 if self.has_allow else 16 if self.has_score and self.left_edge else 0  # 152 spills 6, 48 16
        if self.splits_dq_rest:  # 144 spills 40 with 64 queries, 160 16 with 48
            of_dropout = max(of_dropout, 9 if self.tile_m >= ROWS_PER_WARPGROUP else 1)
        of_dropout *= self.dropout
        return REGISTERS_BESIDE_TILES + (of_score if self.has_score else 0) + of_allow + of_tensors + of_dropout

    @property
    def can_go_abreast(self) -> bool:
        return self.varlen and not self.has_score and not self.has_allow

    @property
    def can_split_groups(self) -> bool:
        return super().can_split_groups and not self.splits_products

    @property
    def unsplit_groups(self) -> str:
        return f"with {self.tile_n} keys" if self.splits_products else super().unsplit_groups

    @property
    def sum_threads(self) -> int:
        return self.num_mma_threads if self.splits_keys else WARPGROUP_THREADS

    def num_sums(self, width: Width) -> int:
        if self.passes_p:
            return width.num_panels * self.wgmma_panel.num_accumulators
        return self.num_acc_dkv(width)

    # Matrix instructions

    @cached_property
    def wgmma_s(self) -> Wgmma:
        """S^T = K Q^T and dP^T = V dO^T: 64 keys x tile_m queries. Passing P, S and dP: 64 queries x tile_n keys."""
        return Wgmma(self.dtype, self.tile_n if self.passes_p else self.tile_m, "shared", b_transposed=False)

    @property
    def wgmma_dp(self) -> Wgmma:
        """dP^T = V dO^T where V is in registers."""
        return Wgmma(self.dtype, self.tile_m, "registers", b_transposed=False)

    def wgmma_dkv(self, width: Width) -> Wgmma:
        """dV += P^T dO, or dK += dS^T Q: 64 keys x its head dim."""
        return Wgmma(self.dtype, width.head_dim, "registers", b_transposed=True)

    @property
    def wgmma_panel(self) -> Wgmma:
        """Passing P, dV^T += dO^T P and dK^T += Q^T dS: 64 columns of the head dim x tile_n keys."""
        return Wgmma(self.dtype, self.tile_n, "shared", b_transposed=True, a_transposed=True)

    @cached_property
    def wgmma_dq(self) -> Wgmma:
        """dQ = dS K: 64 queries x head_dim; or dQ^T = K^T dS^T: 64 columns of the head dim x tile_m queries, or a
        warpgroup's part of them."""
        if self.swaps_dq:
            queries = self.tile_m // (self.num_mma_warpgroups if self.shares_dq else 1)
            return Wgmma(self.dtype, queries, "shared", b_transposed=False, a_transposed=True)
        if self.passes_p:
            return self.dq_slices[1][0].wgmma
        return Wgmma(self.dtype, min(self.head_dim, self.dq_columns_at_once), "shared", b_transposed=True)

    @cached_property
    def wgmma_dq_rest(self) -> Wgmma:
        """The columns of dQ that wgmma_dq leaves, where `has_dq_rest`.

        dQ^T: one panel, of which each warpgroup takes half the queries.

        The same instruction where K has panels enough, though its last columns may be padding: into the same registers,
        since two sets of them beside dV would not fit.
        """
        if self.swaps_dq:
            return Wgmma(self.dtype, self.tile_m // 2, "shared", b_transposed=False, a_transposed=True)
        if self.k_tile.count * self.k_tile.columns == 2 * self.wgmma_dq.n:
            return self.wgmma_dq
        return Wgmma(self.dtype, self.head_dim - self.wgmma_dq.n, "shared", b_transposed=True)

    @property
    def reuses_acc_dq(self) -> bool:
        return self.wgmma_dq_rest == self.wgmma_dq

    @property
    def dq_columns_at_once(self) -> int:
        return DQ_COLUMNS_AT_ONCE if self.splits_products else self.head_dim

    @property
    def has_dq_rest(self) -> bool:
        if self.passes_p:
            return False
        return self.splits_dq_rest if self.swaps_dq else self.head_dim > self.dq_columns_at_once

    @property
    def dq_columns(self) -> tuple[int, int]:
        """Passing P, the columns of dQ that each warpgroup makes: the first, which has the exponentials, the smaller
        half of the panels."""
        first = self.k_tile.count // 2 * self.k_tile.columns
        return first, self.head_dim - first

    @cached_property
    def dq_slices(self) -> tuple[tuple[DqSlice, ...], tuple[DqSlice, ...]]:
        """Passing P, each warpgroup's products for them, one after the other into the same registers: with two sets of
        registers ptxas puts the second before the first one's additions, and spills."""
        first, columns = self.dq_columns[0], self.k_tile.columns
        width = columns * (DQ_PANELS_BESIDE_FOUR if self.holds_four_panels else DQ_PANELS_AT_ONCE)

        def slices(begin: int, end: int) -> tuple[DqSlice, ...]:
            wgmma = Wgmma(self.dtype, min(width, end - begin), "shared", b_transposed=True)
            return tuple(
                DqSlice(column // columns, wgmma, min(width, end - column) // 2) for column in range(begin, end, width)
            )

        return slices(0, first), slices(first, self.head_dim)

    @property
    def holds_four_panels(self) -> bool:
        """Whether dK or dV, or both, have four panels: passing P, there is room for one stage of dO then."""
        return 4 in (width.num_panels for width in self.widths)

    @cached_property
    def dq_wgmmas(self) -> tuple[Wgmma, ...]:
        """The instructions of dQ, each once."""
        if self.passes_p:
            return tuple(dict.fromkeys(one.wgmma for group in self.dq_slices for one in group))
        return (self.wgmma_dq, self.wgmma_dq_rest) if self.has_dq_rest else (self.wgmma_dq,)

    @property
    def dq_rest_panel(self) -> int:
        """The panel of K where those columns begin."""
        return self.num_mma_warpgroups if self.swaps_dq else self.wgmma_dq.n // self.k_tile.columns

    @cached_property
    def wgmmas(self) -> tuple[Wgmma, ...]:
        """The instructions, each once."""
        dkv = (self.wgmma_panel,) if self.passes_p else (self.wgmma_dkv(width) for width in self.widths)
        of_dp = (self.wgmma_dp,) if self.holds_v else ()
        return tuple(dict.fromkeys((self.wgmma_s, *of_dp, *dkv, *self.dq_wgmmas)))

    @property
    def num_k_steps_m(self) -> int:
        return self.tile_m // 16

    @property
    def num_k_steps_n(self) -> int:
        return self.tile_n // 16

    # Shared memory

    @property
    def ds_tile(self) -> Panels:
        """dS [query][key], and P where it passes."""
        return Panels(self.tile_m, self.tile_n, SCORE_SPAN if self.passes_p else self.tiling.swizzle_bytes)

    @property
    def num_ds_stages(self) -> int:
        return NUM_DS_STAGES

    @property
    def num_dout_stages(self) -> int:
        """As many as of Q, where there is room for them."""
        return 1 if self.passes_p and self.holds_four_panels else self.num_stages

    def loaded_bytes(self, width: Width) -> int:
        """Bytes of a tile of Q or dO that TMA brings."""
        tile = width.tile(self.tile_m)
        return tile.bytes if self.passes_p else tile.read_bytes

    @cached_property
    def stages_dq(self) -> bool:
        """Whether dQ goes to global memory through shared memory: beyond head dim 128 where it has room there (head
        dims 192 and 128: 1.04 full and 1.01 causal at 8k; 160: 1.00; H100)."""
        if not self.splits_keys:
            return False
        return not self.splits_dq_rest or self._memory(stages_dq=True).bytes <= ARCHES["sm90"].shared_memory_per_block

    @property
    def statistics_bytes(self) -> int:
        """LSE, or dPsum, of one block of queries."""
        return self.tile_m * FLOAT_BYTES

    @property
    def shares_draws(self) -> bool:
        return self.dropout

    @property
    def keeps_draws_of_keys(self) -> bool:
        """Whether what the keys alone give to random bits stays in registers as long as the head does (H100, 64, 8k:
        causal 1.02 times, full 0.995; at 128 24 bytes spill)."""
        has_room = max(self.head_dim, self.head_dim_v) <= 64 and self.lags_dq
        return self.shares_draws and has_room and self.right_edge and not self.left_edge

    @property
    def kept_warpgroup_bytes(self) -> int:
        """What a warpgroup draws for a block of queries: a bit an element."""
        return 4 * WARP_BYTES * ceil_div(self.num_acc_s, 32)

    @property
    def kept_bytes(self) -> int:
        return self.kept_warpgroup_bytes * self.num_mma_warpgroups

    @cached_property
    def barriers(self) -> Barriers:
        return self._barriers(self.stages_dq, self.is_persistent)

    def _barriers(self, stages_dq: bool, is_persistent: bool) -> Barriers:
        """K and V are loaded once. Q, with LSE, and dO, with dPsum, come in rings.

        Split by products, dS goes from one mma warpgroup to the other in a ring. Where P passes too, P and dS have one
        barrier each, from the warpgroup that makes them to both, and need no empty one: P of a step comes after all
        warps have waited for dS of the step before, and dS after they have for P of the step.
        """
        warps, half = "kNumMmaWarps", "kNumMmaWarps / 2"
        of_kv: tuple[Barrier, ...] = Barrier("k_full", "1"), Barrier("v_full", "1")
        if is_persistent:  # two threads of write_dq read the slot that comes with K
            of_v = (Barrier("v_full", "1"), Barrier("v_empty", warps)) if self.holds_v else (Barrier("v_full", "1", 2),)
            of_kv = *ring("k", NUM_KEY_STAGES, empty="kNumMmaWarps + 2"), *of_v
        of_scores: tuple[Barrier, ...] = ()
        if self.splits_products:
            of_scores = ring("ds", NUM_DS_STAGES, full=half, empty=half)
        elif self.passes_p:
            of_scores = Barrier("p_full", half), Barrier("ds_full", half)
        return Barriers(
            (
                *of_kv,
                *ring("q", self.num_stages, empty=warps),
                *ring("dout", self.num_dout_stages, empty=warps),
                *of_scores,
                *self._dq_barriers(stages_dq),
                *(
                    ring("visit", NUM_VISIT_SLOTS, empty=str(self.num_dq_shares))
                    if self._tells_writers(stages_dq)
                    else ()
                ),
            )
        )

    def _dq_barriers(self, stages_dq: bool) -> tuple[Barrier, ...]:
        """Between the warps that make dQ and the thread of write_dq, if there is one: full and empty of its place in
        shared memory, or its turn and its additions.

        Where dQ lags a step behind, each mma warpgroup has a pair of its own, dS a ring, and two barriers in turn keep
        the second warpgroup half a step behind the first: with one, the first could be two of its phases ahead of a
        slow warp.
        """
        warps, half = "kNumMmaWarps", "kNumMmaWarps / 2"
        if self.lags_dq:
            of_ds = ring("ds", NUM_DS_STAGES, full=warps, empty=warps)
            of_first = f"stage < {NUM_WRITERS_IN_TURN}" if self.rotates_writers else "stage == 0"
            of_dq = half if self.num_dq_slices == self.num_mma_warps else f"{of_first} ? 4 : kNumDqSlices - 4"
            of_second = (Barrier("second_has_dp", half, 2),) if self.keeps_pace else ()
            pairs = ring("dq", 2, full=of_dq, empty="1")
            if self.rotates_writers:
                pairs = Barrier("dq_full", of_dq, 2 * NUM_WRITERS_IN_TURN), Barrier("dq_empty", "1", 2)
            return *pairs, *of_ds, Barrier("first_has_dp", half, 2), *of_second
        if stages_dq:
            return Barrier("dq_full", str(self.num_dq_warps)), Barrier("dq_empty", "1")
        if self.deterministic:
            return Barrier("dq_turn", "1"), Barrier("dq_added", str(self.num_dq_warps))
        return ()

    @cached_property
    def memory(self) -> SharedMemory:
        return self._memory(self.stages_dq, self.is_persistent)

    def _memory(self, stages_dq: bool, is_persistent: bool = False) -> SharedMemory:
        """dK and dV take the places of K and V; in a persistent kernel, a warp's rows that of its share of dQ."""
        slots: tuple[Region, ...] = ()
        k, v = Region("k", self.k_tile.bytes, label="K"), Region("v", self.v_tile.bytes, label="V")
        kv: tuple[Region | Stages, ...] = (k, v)
        dq_bytes = self.dq_block_floats * FLOAT_BYTES
        if is_persistent:
            slots = (Region("block_slots", BLOCK_SLOT_BYTES, NUM_KEY_STAGES, label="slots"),)
            dq_bytes = self.num_mma_warps * self.dq_place_bytes
            # The first step's product of no dQ reads behind K.
            kv = (replace(k, stages=NUM_KEY_STAGES), v) if self.holds_v else (Stages(NUM_KEY_STAGES, (k, v)),)
        return SharedMemory(
            (
                *kv,
                Region("q", self.q_tile.bytes, self.num_stages, label="Q"),
                Region("dout", self.o_tile.bytes, self.num_dout_stages, label="dO"),
                *((Region("p", self.ds_tile.bytes, self.num_ds_stages, label="P"),) if self.passes_p else ()),
                Region("ds", self.ds_tile.bytes, self.num_ds_stages, label="dS"),
                *((Region("dq", dq_bytes, label="dQ"),) if stages_dq else ()),
                Region("lse", self.statistics_bytes, self.num_stages, label="LSE"),
                Region("dpsum", self.statistics_bytes, self.num_dout_stages, label="dPsum"),
                *(
                    (Region("kept", self.kept_bytes, 2 if self.lags_dq or self.splits_products else 1),)
                    if self.shares_draws
                    else ()
                ),
                *slots,
                *(
                    (Region("visit_slots", VISIT_SLOT_BYTES, NUM_VISIT_SLOTS, label="visits"),)
                    if self._tells_writers(stages_dq)
                    else ()
                ),
                self._barriers(stages_dq, is_persistent).region,
            )
        )

    # Matrix descriptors: lower halves

    @property
    def desc_lo_q(self) -> int:
        """Q and dO, MN-major: the leading byte offset is the step to the next panel of columns."""
        return (self.q_tile.panel_bytes >> 4) << 16

    @property
    def desc_lo_k(self) -> int:
        """K, MN-major, likewise."""
        return (self.k_tile.panel_bytes >> 4) << 16

    @property
    def desc_lo_scores(self) -> int:
        """P and dS, MN-major, likewise."""
        return (self.ds_tile.panel_bytes >> 4) << 16

    @property
    def desc_hi_scores(self) -> int:
        """Upper half of the descriptors of P and dS, whose rows are narrower."""
        return self.descriptor_hi(SCORE_SPAN)

    # The dQ accumulator in global memory: for each block of queries `num_dq_slices` runs, each of one warp's registers
    # in the order [register / 4][lane][register % 4], so that every access to it is linear.

    @property
    def num_dq_slices(self) -> int:
        """Warps that hold 16 rows of dQ, or 16 columns of it where they hold dQ^T."""
        return ceil_div(self.head_dim, WARP_ROWS) if self.swaps_dq else self.tile_m // WARP_ROWS

    @property
    def dq_slice_floats(self) -> int:
        return WARP_ROWS * (self.tile_m if self.swaps_dq else self.head_dim)

    @property
    def dq_block_floats(self) -> int:
        return self.num_dq_slices * self.dq_slice_floats

    @property
    def dq_panel_floats(self) -> int:
        """Of a slice, those of one panel's columns."""
        return WARP_ROWS * self.k_tile.columns

    @property
    def stores_first(self) -> str:
        """Not where the order is kept: there whose turn is the first stores."""
        if not self.stages_dq or self.deterministic:
            return ""
        if self.left_edge:
            return "1"
        if self.is_level:
            many = f"min(num_key_blocks / {FIRST_KEY_BLOCKS}, {FIRST_ROWS_OF_LEVEL} / some_rows)"
            return f"min({FIRST_ROWS} / some_rows + min({many}, 1 / num_heads_per_kv), 1)"  # 0 with groups
        rows, walked = FIRST_ROWS, "seqlen_q"
        if self.mask == "causal" and self.varlen:
            rows = FIRST_ROWS_OF_RAGGED
        elif self.mask == "causal":
            rows = FIRST_ROWS_OF_NARROW if self.head_dim <= 64 else FIRST_ROWS_OF_CAUSAL
            walked = "seqlen_q * num_heads_per_kv"
        return f"min({rows}{' * batch' if self.varlen else ''} / max({walked}, 1), 1)"

    @property
    def stores_in_turn(self) -> bool:
        return self.deterministic and self.stages_dq

    @property
    def num_dq_shares(self) -> int:
        return 2 if self.lags_dq else 1

    @property
    def rotates_writers(self) -> bool:
        """Whether threads in rotation add the warpgroups' shares of dQ: to wait for a turn, add, and wait until all is
        added takes one longer than a step."""
        return self.lags_dq and self.deterministic

    @property
    def share_full(self) -> str:
        """C++: the barrier that says that a warpgroup's share of dQ of the step before is there."""
        return "full" if self.rotates_writers else "barriers.dq_full(warpgroup)"

    @property
    def writer_full(self) -> str:
        """C++: the same where it is added."""
        if self.rotates_writers:
            return f"{NUM_WRITERS_IN_TURN} * warpgroup + step % {NUM_WRITERS_IN_TURN}"
        return "warpgroup" if self.lags_dq else ""

    @property
    def num_writers_in_turn(self) -> int:
        return NUM_WRITERS_IN_TURN

    @property
    def writing_warps(self) -> str:
        """C++: whether a warp of the producer warpgroup adds dQ to global memory."""
        if self.rotates_writers:
            return "warp > 0"
        return "(warp == 1 || warp == 2)" if self.lags_dq else "warp == 1"

    @property
    def num_dq_warps(self) -> int:
        """Warps that add to a block of queries."""
        if self.shares_dq:
            return self.num_dq_slices * self.num_mma_warpgroups
        return self.num_mma_warps if self.splits_dq_rest or self.passes_p else self.num_dq_slices

    @property
    def writes_dq(self) -> bool:
        """Whether a thread of the producer warpgroup stands between these warps and global memory."""
        return self.stages_dq or self.deterministic

    @property
    def tells_writers(self) -> bool:
        """Whether the producer tells these threads which blocks of queries come, where it has to look that up."""
        return self._tells_writers(self.stages_dq)

    def _tells_writers(self, stages_dq: bool) -> bool:
        return self.has_allow and (stages_dq or self.deterministic)

    @property
    def num_visit_slots(self) -> int:
        """Of what it tells."""
        return NUM_VISIT_SLOTS

    @property
    def visit_slot_bytes(self) -> int:
        return VISIT_SLOT_BYTES

    # Launch

    @property
    def postprocess_threads(self) -> int:
        return 32 * self.num_dq_slices

    @cached_property
    def tensor_maps(self) -> tuple[TensorMapPlan, ...]:
        span, columns = self.tiling.swizzle_bytes, self.k_tile.columns

        def streamed(name: str, tile: Panels) -> tuple[TensorMapPlan, ...]:
            if self.passes_p:  # all columns of all panels are read, as rows of dK^T and dV^T
                return (TensorMapPlan(name, columns, self.tile_m, span),)
            return self.streamed_maps(name, tile)

        return (
            *streamed("q", self.q_tile),
            TensorMapPlan("k", columns, self.tile_n, span),
            TensorMapPlan("v", columns, self.tile_n, span),
            *streamed("dout", self.o_tile),
            *(self.stored_maps if self.stores_by_maps else ()),
        )

    @property
    def stores_by_maps(self) -> bool:
        """Whether the main kernel stores dK and dV, through tensor maps: not sums of a part, nor numbers in fp32."""
        return not self.splits_groups and not self.partial

    @property
    def stored_maps(self) -> tuple[TensorMapPlan, ...]:
        if self.partial:
            return ()
        rows = self.tile_n if self.passes_p else WARP_ROWS  # at once
        return tuple(TensorMapPlan(name, self.k_tile.columns, rows, self.tiling.swizzle_bytes) for name in ("dk", "dv"))

    def result_map(self, name: str) -> str:
        """C++: the parameter for it of a function of the main kernel, if it has any."""
        return f"CUtensorMap const& map_{name}, " if self.stores_by_maps else ""

    def result_argument(self, name: str) -> str:
        """C++: what is given for it."""
        return f"map_{name}, " if self.stores_by_maps else ""

    @property
    def result_maps(self) -> str:
        return self.result_map("dk") + self.result_map("dv")

    @property
    def postprocess_tensor_maps(self) -> tuple[TensorMapPlan, ...]:
        if self.partial:
            return ()
        return (TensorMapPlan("dq", self.q_tile.columns, self.tile_m, self.tiling.swizzle_bytes),)

    @cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        return (
            *self.prepare_entries,
            EntryPoint(
                self.preprocess_name, self.preprocess_threads, 0, (), "query blocks", STARTS_EARLY and self.varlen
            ),
            EntryPoint(
                self.name,
                self.num_threads,
                self.shared_memory_bytes,
                self.tensor_maps,
                "persistent key blocks" if self.is_persistent else "key blocks",
                STARTS_EARLY,
            ),
            EntryPoint(
                self.postprocess_name,
                self.postprocess_threads,
                0 if self.partial else self.q_tile.bytes,
                self.postprocess_tensor_maps,
                "query blocks",
                STARTS_EARLY,
            ),
            *self._groups_entries,
        )

    @property
    def _groups_entries(self) -> tuple[EntryPoint, ...]:
        if not self.has_parts:
            return ()
        shared_bytes = 0 if self.partial else self.k_tile.bytes + self.v_tile.bytes
        of_parts = EntryPoint(
            self.groups_name,
            self.num_mma_threads,
            shared_bytes,
            self.stored_maps,
            "tail" if self.splits_tail else "groups",
            STARTS_EARLY,
        )
        return (of_parts,)

    @cached_property
    def scratch(self) -> tuple[Scratch, ...]:
        counter = (Scratch("tile_counter", "int*"),) if self.is_persistent else ()
        return (*super().scratch, *counter)

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*super().sizes, *(("num_key_blocks",) if self.is_persistent else ()))

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        return ("o", "dout", *(("dq", "dk", "dv") if self.partial else ()))

    def rules(self) -> Iterator[BrokenRule]:
        if self.num_mma_warps not in (4, 8):
            yield BrokenRule("mma warps", f"{self.num_mma_warps} given; one or two warpgroups: 4 or 8")
            return  # nothing else can be said without a warpgroup count
        if self.tiling.swizzle_bytes != 128:
            yield BrokenRule("swizzle", f"{self.tiling.swizzle_bytes} given; backward kernels have 128-byte panels")
            return
        keys = ROWS_PER_WARPGROUP * self.num_mma_warpgroups
        if self.tile_n not in (keys, ROWS_PER_WARPGROUP) and not (self.passes_p and self.tile_n % 16 == 0):
            yield BrokenRule(
                "keys",
                f"tile_n {self.tile_n}, but {self.num_mma_warps} warps take {keys} keys, or "
                f"{ROWS_PER_WARPGROUP} to {keys - 16}, a multiple of 16, if one makes dV and another dK",
            )
            return
        if not self.splits_keys and self.tile_m != ROWS_PER_WARPGROUP:
            yield BrokenRule("query rows", f"tile_m {self.tile_m}; one warpgroup makes dQ: {ROWS_PER_WARPGROUP}")
        elif self.passes_p and self.k_tile.count == 1:
            yield BrokenRule(
                "head dim",
                f"{self.head_dim}, but warpgroups that share dQ by panels of {self.k_tile.columns} columns need "
                f"more than {self.k_tile.columns}: tile_n {keys}, or {ROWS_PER_WARPGROUP}",
            )
            return
        elif self.passes_p and (self.has_score or self.has_allow or self.dropout):
            yield BrokenRule(
                "scores",
                f"tile_n {self.tile_n}, but neither what an expression makes nor what is dropped passes from one "
                f"warpgroup to the other: {keys}, or {ROWS_PER_WARPGROUP}",
            )
            return
        columns = keys + (ROWS_PER_WARPGROUP if self.num_mma_warpgroups == 2 else 0)
        if self.swaps_dq and self.head_dim > columns:
            yield BrokenRule(
                "head dim",
                f"{self.head_dim}, but {self.num_mma_warps} warps that split keys make up to {columns} columns",
            )
        yield from self.common_rules(
            f"S {self.num_acc_s}, dP {self.num_acc_s}, P {self.num_p}, dK {self.num_acc_dkv(self.qk)}, dV "
            f"{self.num_acc_dkv(self.vo)}, dQ {self.num_acc_dq}"
        )
        if self.deterministic and self.splits_products and self.num_stages == 1:
            yield BrokenRule(
                "stages",
                f"1 given; a deterministic kernel above head dim 160 needs 2: with one, its producer warpgroup "
                f"spills out of its {self.producer_registers} registers",
            )
