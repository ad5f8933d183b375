"""The forward kernel of Hopper: TMA, an mbarrier ring, wgmma with P in registers, one producer warpgroup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from fa2gen.arch import ARCHES
from fa2gen.features import Param, Scratch
from fa2gen.features.expression import is_capped
from fa2gen.layout import align_up, ceil_div
from fa2gen.plan.barriers import Barriers, ring
from fa2gen.plan.base import WARP_THREADS, BrokenRule, EntryPoint, TensorMapPlan, Width
from fa2gen.plan.memory import Region, SharedMemory
from fa2gen.plan.sm90 import ROWS_PER_WARPGROUP, WARP_ROWS, Sm90Plan
from fa2gen.ptx import Wgmma

__all__ = ["Sm90FwdPlan"]

TILE_SLOT_BYTES = 16  # block of queries, head, batch entry: one vector load; a ragged batch's sequence: another
FETCHED_BYTES = 4  # a tile's number, from the warp that fetched it to others that load

# (producer, consumer) registers as in REGISTER_SPLIT, where threads of the producer copy rows beside two warpgroups:
# the first that is enough for a consumer. With 24 head dim 192 spills 16 bytes, 256 4.
COPYING_SPLITS = ((56, 224), (40, 232))
# Of a batch whose table blocks make: with gaps 97 entries, which every default tiling has room for.
OWN_SEQUENCES = 48
OWN_ROW_BYTES, OWN_KEY_BYTES, OWN_ORDER_BYTES = 16, 4, 8  # of an entry
OWN_KEYS_AT_ONCE = 4  # by a vector load
VISIT_SLOT_BYTES = 16  # a block of keys, what is seen of it, and the same of the next: one vector load
MESSAGE_BYTES = 16
NUM_MESSAGES = 8
MERGE_WARPS = 8

# Registers that a thread needs beside S, O and P: addresses, row statistics, loop state. With 160 registers 28 separate
# the tilings that compile clean (head dim 144 with 80 keys, 72 with 128) from those that spill (128 with 96, 80 with
# 128); with 112, head dim 72 with 64 keys from 64 with 80.
REGISTERS_BESIDE_TILES = 28

# Of exponentials under no maximum: their sums, and those of 2^20 keys' products with V up to 2^30, are finite in fp32.
MAX_EXPONENT = 76


class SmallTanh(NamedTuple):
    """x * (1 + third * x^2) is tanh(x) to 2^-11.5 of its value, in C++; MUFU's errs by 2^-11.

    most  the greatest |x| for which that holds.
    """

    third: str = "-0.32034549f"
    most: str = "0.35f"


SMALL_TANH = SmallTanh()


@dataclass(frozen=True)
class Sm90FwdPlan(Sm90Plan):
    """Every number of templates/sm90/fwd.cu.j2."""

    template: str = "sm90/fwd.cu.j2"

    @property
    def shifts_rows(self) -> bool:
        return bool(self.tiling.lazy_rescale) and not self.has_allow

    @property
    def is_capped(self) -> bool:
        return is_capped(self.problem)

    @property
    def most_score(self) -> str:
        """How far from 0 its scores may be, in C++."""
        return self.score.bound

    @property
    def tanh_slope(self) -> tuple[str, ...]:
        """Lines of a function that gives c where its scores are tanh(c * product)."""
        return self.score.slope

    @property
    def max_exponent(self) -> int:
        """How far from 0 exponents of 2 may be where no maximum is looked for."""
        return MAX_EXPONENT

    @property
    def small_tanh(self) -> SmallTanh:
        """Of arguments near 0."""
        return SMALL_TANH

    @property
    def stores_sums(self) -> bool:
        """Whether O is stored in fp32, from registers."""
        return self.partial or self.has_key_parts

    @property
    def merge_name(self) -> str:
        """Of the kernel that puts parts together."""
        return f"{self.name}_merge"

    @property
    def merge_warps(self) -> int:
        """Of one of its blocks, each of which has a row."""
        return MERGE_WARPS

    # Threads and registers

    @property
    def copies_rows(self) -> bool:
        """Whether rows of pages are copied one by one, with cp.async; else pages are boxes of TMA."""
        return self.paged and bool(self.tiling.page_rows)

    @property
    def publishes_copies(self) -> bool:
        """Whether a warp that copies rows waits for them itself, a block behind what it issues; else copies arrive.

        Of two stages one would wait for the other: head dim 256 took 1.2 times as long (H100).
        """
        return self.copies_rows and self.num_stages > 2

    @property
    def register_split(self) -> tuple[int, int]:
        if self.has_allow and self.num_mma_warpgroups == 2:  # who looks up visits has too few: 8 to 140 bytes spill
            return (40, 232)
        if not self.copies_rows or self.num_mma_warpgroups != 2:
            return super().register_split
        return next((split for split in COPYING_SPLITS if self.register_estimate <= split[1]), COPYING_SPLITS[-1])

    @property
    def load_parts(self) -> int:
        """Warps that share a block of K, or of V, over pages: rows, or panels if there is more than one."""
        return 2 if self.copies_rows or min(width.num_panels for width in self.widths) > 1 else 1

    @property
    def num_load_warps(self) -> int:
        """Of the producer warpgroup: those of K and, over pages, of V."""
        return 2 * self.load_parts if self.paged else 1

    @property
    def lane_rows(self) -> int:
        """Rows of a part of a block that a lane looks up."""
        return ceil_div(self.tile_n // self.load_parts, WARP_THREADS)

    @property
    def producer(self) -> str:
        """The template of the warps that load."""
        return "producer_pages" if self.paged else "producer_visits" if self.has_allow else "producer"

    @property
    def has_scout(self) -> bool:
        """Whether a warp looks up what tiles visit for the one that loads."""
        return self.has_allow and not self.paged

    @property
    def asks_ahead(self) -> bool:
        return self.has_scout and self.knows_alike and self.answer_words * self.num_mma_warpgroups <= WARP_THREADS

    @property
    def asked_words(self) -> int:
        """Of 32 rows, or 32 keys of a block, each: what the scout finds for a warpgroup."""
        return max(ROWS_PER_WARPGROUP, self.tile_n) // WARP_THREADS + bool(self.tile_n % WARP_THREADS)

    @property
    def answer_words(self) -> int:
        """As they are stored: three behind a 0, which says that they were read."""
        return 4 * ceil_div(self.asked_words, 3)

    @property
    def _answer_bytes(self) -> int:
        return 4 * self.answer_words * self.num_mma_warpgroups if self.asks_ahead else 0

    @property
    def full_arrivals(self) -> int:
        """At the barrier of a stage of K or V: of one lane, which TMA's bytes follow, or of who copies."""
        lanes = 1 if self.publishes_copies else WARP_THREADS
        return lanes * self.load_parts if self.copies_rows else 1

    @property
    def wait_full(self) -> str:
        """What waits for a stage that a product reads."""
        return "wait_full" if self.copies_rows and not self.publishes_copies else "mbarrier_wait"

    @property
    def kv_maps(self) -> str:
        """What the producer takes of tensor maps of K and V."""
        return "" if self.copies_rows else f"{self.tile_maps('k')}, {self.tile_maps('v')}, "

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
        152 spills with 64 keys, and in ragged batches and windows 144."""
        of_dropout = 9 if self.head_dim > 144 else 1
        of_dropout = self.dropout * (13 if self.head_dim > 136 and (self.left_edge or self.varlen) else of_dropout)
        of_score = (9 if self.is_capped and self.head_dim > 144 else 4) if self.has_score else 0  # a cap: 152 spills 14
        return (
            REGISTERS_BESIDE_TILES + (2 if self.left_edge else 0) + of_score + self._registers_of_tensors + of_dropout
        )

    @property
    def _registers_of_tensors(self) -> int:
        """Of an expression's tensors, and of what hides: each number said is what a tiling spills without."""
        looks_up = self.has_score and self.score.looks_up
        if self.num_mma_warpgroups > 2:
            # A cap with documents: 128 with 80 keys 26. A bias with a mask: 64 with 112 keys 19. A mask: 160 with 64 2.
            # Documents with random bits: 128 with 64 8.
            of_both = 13 if self.has_score and (self.tile_tables or (looks_up and self.has_allow)) else 0
            of_both = max(of_both, 20 if self.dropout and self.tile_tables else 0)
            return max(of_both, 5 if self.has_allow and self.head_dim > 152 else 0)
        if self.num_mma_warpgroups < 2:
            return 0
        # Slopes at 256, 80 keys, 3, a bias with 64 keys 27, with a mask in a window with 48 32.
        found = self.num_acc_s + 8 + 12 * (self.has_allow and self.left_edge) if looks_up else 22 if self.loads else 0
        if not self.tile_tables:
            return found
        # Of a block's keys: with a cap 256 with 64 keys 60, with 48 13; of a tree with 64 32, 128 with 128 6.
        return max(found, 37 + 8 * (len(self.tile_tables) > 2) + 12 * self.left_edge)

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
    def seen_rows(self) -> int:
        """Each warpgroup skips the blocks that it sees nothing of."""
        return ROWS_PER_WARPGROUP

    @property
    def asks_alike(self) -> bool:
        return not self.has_score or not self.left_edge  # a cap with documents in a window, ragged: 128 spills 8

    # Shared memory

    @property
    def q_stage_bytes(self) -> int:
        return align_up(self.q_tile.bytes, 1024)

    def stage_bytes(self, width: Width) -> int:
        """From one stage of K, or of V, to the next: whole tiles, on the 1024-byte grid of the widest swizzle."""
        return align_up(width.tile(self.tile_n).bytes, 1024)

    @property
    def visit_slot_bytes(self) -> int:
        return VISIT_SLOT_BYTES + self._answer_bytes

    @property
    def message_bytes(self) -> int:
        return MESSAGE_BYTES + self._answer_bytes

    @property
    def num_messages(self) -> int:
        """Of the scout to the producer, on their way."""
        return NUM_MESSAGES

    @property
    def tile_slot_bytes(self) -> int:
        return TILE_SLOT_BYTES * (2 if self.varlen else 1)

    @cached_property
    def barriers(self) -> Barriers:
        return self._barriers(self.num_q_stages)

    def _barriers(self, num_q_stages: int) -> Barriers:
        rings = (
            ("q", num_q_stages, 1),
            ("k", self.num_stages, self.full_arrivals),
            ("v", self.num_stages, self.full_arrivals),
        )
        declared = (ring(name, stages, full=f"{full}", empty="kNumMmaWarps") for name, stages, full in rings)
        return Barriers(sum(declared, ring("message", NUM_MESSAGES, empty="1") if self.has_scout else ()))

    def _memory(self, num_q_stages: int, o_aliases_q: bool, own_sequences: int = 0) -> SharedMemory:
        o_bytes = align_up(self.o_tile.bytes, 1024) * (not self.stores_sums)
        # For the block that each stage of K is, where a tile does not visit all.
        visits = (
            (Region("visit_slots", self.visit_slot_bytes, self.num_stages, label="visits"),) if self.has_allow else ()
        )
        messages = (Region("messages", self.message_bytes, NUM_MESSAGES, label="messages"),) if self.has_scout else ()
        own_table = (
            Region("own_rows", OWN_ROW_BYTES, 2 * own_sequences + 1, label="table"),
            Region("own_keys", OWN_KEY_BYTES, align_up(2 * own_sequences + 1, OWN_KEYS_AT_ONCE), label="keys"),
            Region("own_order", OWN_ORDER_BYTES, 2 * own_sequences + 2, label="order"),
        )
        fetched = (Region("fetched", FETCHED_BYTES, 2, label="fetched"),) if self.paged else ()  # in turn
        return SharedMemory(
            (
                Region("q", max(self.q_stage_bytes, o_bytes * o_aliases_q), num_q_stages, label="Q"),
                Region("k", self.stage_bytes(self.qk), self.num_stages, label="K"),
                Region("v", self.stage_bytes(self.vo), self.num_stages, label="V"),
                *([Region("o", o_bytes, label="O", in_place_of="q" if o_aliases_q else None)] if o_bytes else []),
                self._barriers(num_q_stages).region,
                Region(
                    "tile_slots", self.tile_slot_bytes * num_q_stages, label="slots"
                ),  # for the tile of each stage of Q
                *visits,
                *messages,
                *(own_table if own_sequences else ()),
                *fetched,
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

    @property
    def releases_q_early(self) -> bool:
        """Whether Q's stage is free when the tile's last S is there: of one stage, the next tile's Q waits for that.

        Of two it took 0.995 to 1.01 of the time. With keys in parts a window spills 40 bytes for 24 at head dim 160.
        """
        return not self.o_aliases_q and (self.has_allow or (self.num_q_stages == 1 and not self.has_key_parts))

    @cached_property
    def memory(self) -> SharedMemory:
        return self._memory(self.num_q_stages, self.o_aliases_q, self.own_sequences)

    @cached_property
    def own_sequences(self) -> int:
        """So many as what is left of shared memory holds. Not where a producer copies rows: 4 bytes spill."""
        if not self.varlen or self.copies_rows:
            return 0
        left = ARCHES["sm90"].shared_memory_per_block - self._memory(self.num_q_stages, self.o_aliases_q).bytes
        left -= OWN_ROW_BYTES + OWN_KEYS_AT_ONCE * OWN_KEY_BYTES + 2 * OWN_ORDER_BYTES
        return max(min(OWN_SEQUENCES, left // (2 * (OWN_ROW_BYTES + OWN_KEY_BYTES + OWN_ORDER_BYTES))), 0)

    @property
    def own_row_bytes(self) -> int:
        return OWN_ROW_BYTES

    @property
    def own_key_bytes(self) -> int:
        return OWN_KEY_BYTES

    @property
    def own_order_bytes(self) -> int:
        return OWN_ORDER_BYTES

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
        streamed = (*self.streamed_maps("k", self.k_tile), *self.streamed_maps("v", self.v_tile))
        return (
            TensorMapPlan("q", columns, self.tile_m, span, of_groups=self.packs_heads),
            *(replace(found, of_pages=self.paged) for found in streamed if not self.copies_rows),
            *([] if self.stores_sums else [TensorMapPlan("o", columns, WARP_ROWS, span, of_groups=self.packs_heads)]),
        )

    @cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        shared, early = self.shared_memory_bytes, self.is_prepared
        main = EntryPoint(self.name, self.num_threads, shared, self.tensor_maps, "persistent", early)
        merge = EntryPoint(self.merge_name, WARP_THREADS * MERGE_WARPS, 0, (), "result rows", starts_early=True)
        return (*self.prepare_entries, main, *([merge] if self.has_key_parts else []))

    @cached_property
    def scratch(self) -> tuple[Scratch, ...]:
        parts = (Scratch("o_parts", "float*"), Scratch("lse_parts", "float*")) if self.has_key_parts else ()
        # A kernel that runs before clears it, if one always does: memory of any content will do there.
        return (Scratch("tile_counter", "int*", cleared=self.varlen or not self.is_prepared), *super().scratch, *parts)

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        return (*(("k", "v") if self.copies_rows else ()), *(("o",) if self.stores_sums else ()))

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """With pages that TMA reads, from one to the next of K and of V, in rows."""
        of_pages = ("k_page_stride", "v_page_stride") if self.paged and not self.copies_rows else ()
        return (*super().params, *(Param(name, "int") for name in of_pages))

    @property
    def sizes(self) -> tuple[str, ...]:
        tiles = () if self.varlen else ("num_tiles", *(("num_batch_heads",) if self.uneven else ()))
        sections = ("heads_per_section",) if self.uneven and not self.varlen else ()
        boxes = ("box_rows", "tile_pages", "tile_rows") if self.paged and not self.copies_rows else ()
        group = ("group",) if self.packs_heads else ()
        heads = ("num_heads", "num_heads_per_kv", *group)
        parts = ("key_parts",) if self.has_key_parts else ()
        return ("seqlen_q", "seqlen_k", *heads, "num_m_blocks", *tiles, *sections, *boxes, *parts)

    def pages_rule(self) -> Iterator[BrokenRule]:
        if not self.paged:
            yield from super().pages_rule()
        elif self.copies_rows and self.problem.has_expression:
            yield BrokenRule("page_rows", "1 given; with an expression, threads that copy spill 4 to 28 bytes: 0")
        if self.paged and self.packs_heads and (self.sink or self.problem.has_expression):
            by_head = "sinks" if self.sink else "an expression"
            yield BrokenRule("pack_heads", f"1 given; {by_head} may be each head's own: 0")
        if self.paged and self.has_key_parts and (self.partial or self.has_allow):
            instead = "partial results are to be merged with others" if self.partial else "an expression hides blocks"
            yield BrokenRule("split_keys", f"1 given; {instead}: 0")

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
