"""What every plan holds, whatever the architecture and direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from fa2gen.arch import ARCHES
from fa2gen.features import Feature, Param, Scratch, features_of, rooms_of
from fa2gen.features.attention import OPERANDS, Operand
from fa2gen.features.dropout import DROP_DIGITS, DROP_ROTATIONS, INDEPENDENT_ELEMENTS, LAST_ROTATION
from fa2gen.features.expression import (
    AllowCode,
    InputGradientCode,
    ScoreCode,
    TileTable,
    allow_code,
    gradient_codes,
    input_sizes,
    loads_of,
    score_code,
    tile_tables,
)
from fa2gen.features.varlen import ENTRY_NUMBERS
from fa2gen.layout import ELEMENT_BYTES, NUMBER_BYTES, Panels, align_up
from fa2gen.plan.memory import SharedMemory
from fa2gen.spec import KernelSpec, Problem, Tiling, names_of

__all__ = ["WARP_THREADS", "BrokenRule", "EntryPoint", "KernelPlan", "TensorMapPlan", "Width", "bytes_text"]


WARP_THREADS = 32
PREPARE_THREADS = 1024
BOUND_WARPS = 8  # of a block that finds least and greatest numbers of tiles, each of one
DROPOUT_KEYS = 32  # half of a unit of random bits: see templates/common/dropout.cuh.j2
SWITCHES_OF_PAGES = ("page_rows", "pack_heads", "split_keys")  # fields of a tiling that are 0 where there are none

# Of entries, by how many blocks they have, in shared memory. With 128 rows a block, in batches of more than 131,072
# rows those that differ by a block are one kind.
PREPARE_LENGTHS = 1024


# What the heads in flight read should stay in L2: 32 MiB of an H200's 50 leave room for the rest (4k causal, d = 128:
# 587 TFLOP/s against 520 head by head, and 505 with all heads together).
SECTION_BYTES = 32 << 20

# Of short sequences so many heads fill those 32 MiB that a block of queries of each is a wave of tiles, and K and V are
# gone when the next one comes: 1.15 times with 32 heads at 512 keys, d = 128, 1.02 at 1024 (H100).
SECTION_HEADS = 32

# Of documents a tile reads the keys of its own alone: long texts have so many heads together all the same (d = 128:
# 1.04 times what 8 heads give at 8k, 1.17 times 4 at 16k; of one document 1.02, and 1.00 with 32; H200).
SECTION_HEADS_OF_DOCUMENTS = 16

# Gradients likewise, of heads of K and V: 1.06 times with 16 at 512 keys, d = 64 causal, 1.08 with d = 128, 1.04 and
# 1.01 at 1024 (H200). Not deterministic ones, whose blocks wait for those of the same head.
SECTION_HEADS_OF_GRADIENTS = 16

# Full masks, of heads of queries, however much they read: then few blocks that run at a time add to dQ of one head.
# d = 128, 16k: 1.014 times head by head, of 4 and 16 heads 1.00 and 1.013 (H200).
SECTION_HEADS_OF_LEVEL = 8

# Of grouped gradients a single head of K and V, with all that its group reads, may fill those 32 MiB: then sections are
# of one head, whose longest blocks come last. Twice as much: 1.08 times at 32:8 heads of 128, 8k, 1.10 at 32:4, 2k,
# 1.09 at 64:8 heads of 64, 8k; but 0.94 without groups at 16:16 and 2k (H100).
SECTIONS_OF_GROUPS = 2


@dataclass(frozen=True)
class BrokenRule:
    """One reason why a spec does not fit: `rule` names it, `detail` has the numbers."""

    rule: str
    detail: str


@dataclass(frozen=True)
class TensorMapPlan:
    """How TMA sees one (batch, seqlen, heads, head_dim) tensor: a box of box_rows x box_cols elements of one head.

    The rows of a box lie swizzle_bytes apart in shared memory, also where they are narrower.

    last_panel  whether it is for the last panel of columns alone, beside a map of the same tensor for the others.
    of_pages    whether the tensor lies in pages: a box has as many rows as divide both box_rows and a page.
    of_groups   whether box_rows are of all heads of a group, or of as many: a query's heads side by side. The map has
                heads before rows.
    """

    name: str
    box_cols: int
    box_rows: int
    swizzle_bytes: int
    last_panel: bool = False
    of_pages: bool = False
    of_groups: bool = False

    @property
    def has_box(self) -> bool:
        """Whether sizes of the box are a launch's."""
        return self.of_pages or self.of_groups

    def box_of(self, number: int) -> tuple[int, int]:
        """Its sizes behind the columns, of pages of so many rows or groups of so many heads."""
        heads = min(number, self.box_rows)
        return (heads, self.box_rows // heads) if self.of_groups else (self.rows_of(number), 1)

    def rows_of(self, page_size: int) -> int:
        """Of a box, where pages have so many."""
        return math.gcd(self.box_rows, page_size) if self.of_pages else self.box_rows

    @property
    def argument(self) -> str:
        """What the kernel calls it."""
        return f"map_{self.name}_last" if self.last_panel else f"map_{self.name}"


@dataclass(frozen=True)
class EntryPoint:
    """One `extern "C"` kernel of a source: its symbol, and what a launch of it takes before the shared Params.

    grid          its blocks of threads: "persistent", one an SM or fewer, for tiles or for blocks of keys; "tiles",
                  (m block, head, batch); one for each block of queries, or of keys and part of a group, of all heads;
                  "groups", one for each block of keys; "tail", for each that has parts; "one"; or "parts", one an SM
                  that has a part of the keys; "new rows", as many as have 8 columns of rows to append; "wide rows", for
                  K and for V as many as have some of a sequence's to widen; "result rows", a warp for each row of O.
                  A grid without blocks is not launched.
    starts_early  programmatic dependent launch: its blocks may start before the kernel before it has ended, and it
                  executes griddepcontrol.wait before it uses what that one writes.
    """

    symbol: str
    num_threads: int
    shared_memory_bytes: int
    tensor_maps: tuple[TensorMapPlan, ...]
    grid: Literal[
        "persistent",
        "persistent key blocks",
        "tiles",
        "query blocks",
        "key blocks",
        "groups",
        "tail",
        "one",
        "tile bounds",
        "parts",
        "new rows",
        "wide rows",
        "result rows",
    ]
    starts_early: bool = False


@dataclass(frozen=True)
class Width:
    """A head dim of a kernel's tensors, and how the source names what has that width.

    Q, K, dQ and dK have the problem's head dim, V, O, dO and dV may have one of their own. Names of theirs then end
    otherwise: `kHeadDimV`, `load_tile_v`.

    constant  what names of constants end in: "V" or nothing.
    function  what names of functions end in: "_v" or nothing.
    """

    head_dim: int
    span: int
    constant: str = ""
    function: str = ""

    def tile(self, rows: int) -> Panels:
        """So many rows of a tensor in shared memory."""
        return Panels(rows, self.head_dim, self.span)

    @property
    def row_bytes(self) -> int:
        """Of a row in global memory."""
        return self.head_dim * ELEMENT_BYTES

    @property
    def num_panels(self) -> int:
        return self.tile(1).count

    @property
    def num_k_steps(self) -> int:
        """Steps of 16 along the head dim; the last reads zeros where the head dim is an odd multiple of 8."""
        return align_up(self.head_dim, 16) // 16

    @property
    def row_chunks(self) -> int:
        """Chunks of 16 bytes of a row that steps read."""
        return 2 * self.num_k_steps

    @property
    def row_lanes(self) -> int:
        """Lanes of a warp that copy a row, a chunk each: a power of two, of at most 8 rows at once."""
        return max(1 << (self.row_chunks - 1).bit_length(), WARP_THREADS // 8)


@dataclass(frozen=True)
class KernelPlan:
    """A spec with every derived number that its template and its launch need. Built by `make_plan` only."""

    spec: KernelSpec

    # Each (arch, direction) says these of itself.
    template: str = ""

    # Bytes that a block may have where the kernel is to run, None: on any device of its family.
    shared_memory_limit: int | None = field(default=None, compare=False, repr=False)

    @property
    def problem(self) -> Problem:
        return self.spec.problem

    @property
    def tiling(self) -> Tiling:
        return self.spec.tiling

    @cached_property
    def name(self) -> str:
        return self.spec.name

    @property
    def arch(self) -> str:
        return self.tiling.arch

    @property
    def target(self) -> str:
        """NVRTC's `arch`: "sm_80" or "sm_90a"."""
        return ARCHES[self.tiling.arch].target

    @property
    def head_dim(self) -> int:
        """Of Q, K and their gradients."""
        return self.problem.head_dim

    @property
    def head_dim_v(self) -> int:
        """Of V, O and their gradients."""
        return self.problem.head_dims[1]

    @property
    def dtype(self) -> str:
        return self.problem.dtype

    @property
    def mma_dtype(self) -> str:
        """Of what is multiplied."""
        return self.problem.dtype

    @property
    def packed_dtypes(self) -> tuple[str, ...]:
        """What fp32 numbers are rounded to."""
        return tuple(dict.fromkeys((self.dtype, self.mma_dtype)))

    @property
    def mask(self) -> str:
        return self.problem.mask

    @property
    def causal(self) -> bool:
        return self.problem.mask == "causal"

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """What the problem's fields bring."""
        return features_of(self.problem)

    @cached_property
    def rooms(self) -> Mapping[str, str]:
        """Room -> the block that stands there: templates/rooms/<room>/<block>.cuh.j2."""
        return {**rooms_of(self.problem), "schedule": self.schedule}

    @property
    def uneven(self) -> bool:
        """Whether blocks of threads do different amounts of work."""
        return any(feature.uneven for feature in self.features)

    @property
    def right_edge(self) -> bool:
        """Whether keys behind those that a query sees may be hidden from it: more blocks than the last need a mask."""
        return any(feature.right_edge for feature in self.features)

    @property
    def left_edge(self) -> bool:
        """Whether keys before those that a query sees may be hidden from it."""
        return any(feature.left_edge for feature in self.features)

    @property
    def varlen(self) -> bool:
        return self.problem.varlen

    @property
    def paged(self) -> bool:
        """Whether K and V lie in pages."""
        return self.problem.paged

    @property
    def packs_heads(self) -> bool:
        """Whether rows of queries are of all heads that share K and V."""
        return bool(self.tiling.pack_heads)

    @property
    def has_key_parts(self) -> bool:
        """Whether a tile's keys are in parts, whose results wait in memory for a kernel that puts them together."""
        return bool(self.tiling.split_keys)

    @property
    def diagonal(self) -> str:
        """The key at which a row of queries stands, in C++."""
        return "row / p.group + (s.k - s.q / p.group)" if self.packs_heads else "row + (s.k - s.q)"

    @property
    def total_queries(self) -> str:
        """How many rows q has, in C++."""
        return "p.seqlen_q / p.group" if self.packs_heads else "p.seqlen_q"

    @property
    def sink(self) -> bool:
        return self.problem.sink

    @property
    def dropout(self) -> bool:
        return self.problem.dropout

    @property
    def draws_in_softmax(self) -> bool:
        """Whether SM90's forward softmax draws what is dropped. Beside what an expression needs there are too few
        registers."""
        has_room = self.arch == "sm90" and not self.has_score and not self.has_allow
        return self.dropout and has_room and self.problem.direction == "fwd"

    @property
    def draws_parameters(self) -> str:
        """What its functions take for that, in C++."""
        return ",\n    Draws const& draws, uint32_t (&kept)[kNumKeepWords]" if self.draws_in_softmax else ""

    @property
    def draws_arguments(self) -> str:
        return ", draws(), kept" if self.draws_in_softmax else ""

    @property
    def partial(self) -> bool:
        """Whether O, or dQ, dK and dV, are stored in fp32, from registers."""
        return self.problem.partial

    drop_digits = tuple(range(i, i + 4) for i in range(0, DROP_DIGITS, 4))  # the last first, behind them the words' own
    drop_rotations = DROP_ROTATIONS
    last_rotation = LAST_ROTATION
    independent_elements = INDEPENDENT_ELEMENTS

    @property
    def gradient_scale(self) -> str:
        """What dQ and dK are times, in C++: with dropout also what is kept."""
        return "(p.softmax_scale * p.keep_scale)" if self.dropout else "p.softmax_scale"

    @property
    def sums_sinks(self) -> bool:
        """Whether kernels sum gradients of sinks."""
        return any(scratch.name == "sink_sums" for scratch in self.scratch)

    @property
    def has_launcher(self) -> bool:
        """Whether there is a launcher in C++: not of dropout, nor of queries over caches or pages."""
        return not self.dropout and not self.paged and self.problem.direction != "decode"

    @property
    def has_score(self) -> bool:
        """Whether an expression makes something else of the scores."""
        return bool(self.problem.score)

    @cached_property
    def score(self) -> ScoreCode:
        """What it makes of them, in C++."""
        causal = self.problem.mask == "causal" and self.problem.direction != "decode"
        of = self.problem.program, self.problem.direction, self.learned
        return score_code(*of, causal=causal, by_rows=self.shifts_rows)

    @property
    def starts_at_terms(self) -> bool:
        """Whether a backward kernel's products of Q and K start at what scores have beside, for a block's first query,
        and row statistics have the rest: what scores rise by from there on."""
        return False

    @property
    def weighs(self) -> bool:
        """Whether a backward kernel keeps weights, P times what scores change by with products, beside P. Else they are
        P, and hidden scores -inf."""
        return self.problem.direction == "bwd" and self.has_score and not self.starts_at_terms

    @property
    def shifts_rows(self) -> bool:
        """Whether its softmax takes terms of a score that all keys of a row share."""
        return False

    @property
    def has_row_terms(self) -> bool:
        """Whether there are such."""
        return self.has_score and bool(self.score.of_row)

    @property
    def is_capped(self) -> bool:
        """Whether its softmax looks for no maximum where scores can not be far from 0."""
        return False

    @property
    def learned(self) -> tuple[str, ...]:
        """Tensors of the expression whose gradients are made."""
        return names_of(self.problem.learned)

    @property
    def learned_sizes(self) -> dict[str, str]:
        """How many numbers each of them has, in C++."""
        return input_sizes(self.problem.program, self.learned)

    @cached_property
    def input_gradients(self) -> tuple[InputGradientCode, ...]:
        """Those gradients in C++, one a place at which they are read."""
        return gradient_codes(self.problem.program, self.learned)

    @property
    def places_elements(self) -> bool:
        """Whether they ask for each element's own positions."""
        return any(one.factor or one.way in ("apart", "element") for one in self.input_gradients)

    @property
    def num_derivatives(self) -> int:
        """How many derivatives by tensors are kept with P, as they depend on the score."""
        return sum(one.stored >= 0 for one in self.input_gradients)

    @property
    def stores_derivatives(self) -> bool:
        return self.num_derivatives > 0

    @cached_property
    def loads(self) -> tuple[tuple[str, ...], ...]:
        """Functions that read the tensors of expressions, one each, in lines."""
        return loads_of(self.problem.program)

    @property
    def head_values(self) -> tuple[tuple[str, str, str], ...]:
        """(type, name, value) of what is made once for a head."""
        return self.score.head if self.has_score else ()

    @property
    def has_allow(self) -> bool:
        """Whether an expression says which keys are seen, beside the mask."""
        return bool(self.problem.allow)

    @property
    def skips_hidden(self) -> bool:
        """Whether a backward kernel passes blocks by that no query sees. Where the order is kept it does not: a block
        of keys adds to dQ behind the one before it, and waits for it."""
        return self.has_allow and not self.deterministic

    @property
    def walk_steps(self) -> str:
        """How many blocks of queries a backward kernel's walk goes on at once."""
        return "steps" if self.has_allow else "1"

    @cached_property
    def allow(self) -> AllowCode:
        """What it says, in C++."""
        return allow_code(self.problem.program, self.asks_alike)

    @property
    def asks_alike(self) -> bool:
        """Whether the kernel looks blocks up by the query where their keys are alike."""
        return False

    @property
    def knows_alike(self) -> bool:
        """Whether it finds such blocks."""
        return self.has_allow and self.allow.alike

    @property
    def asks_ahead(self) -> bool:
        """Whether a warp of its own asks what is seen of such blocks, for those who multiply."""
        return False

    @property
    def seen_bits(self) -> int:
        """Of what a forward kernel knows of a block of keys and `seen_rows` queries."""
        return 5 if self.allow.alike else 3

    @property
    def seen_rows(self) -> int:
        """Queries of a tile of which it is asked together what they see of a block of keys."""
        return self.tile_m

    @cached_property
    def tile_tables(self) -> tuple[TileTable, ...]:
        """Least and greatest numbers of tensors, by which tiles are passed by."""
        if not any(scratch.name == "tile_bounds" for feature in self.features for scratch in feature.scratch):
            return ()
        return tile_tables(self.problem.program, self.seen_rows, self.tile_n)

    @property
    def bound_threads(self) -> int:
        return 32 * BOUND_WARPS

    @property
    def bound_warps(self) -> int:
        """Of a block of the kernel that finds them, each of which has one tile."""
        return BOUND_WARPS

    @property
    def softmax_scale(self) -> str:
        """What forward kernels call the factor of scores."""
        return "factor * kLn2" if self.has_score else "p.softmax_scale"

    @property
    def softmax_scale_log2(self) -> str:
        return "factor" if self.has_score else "p.softmax_scale_log2"

    @property
    def softmax_of_unmasked(self) -> str:
        """What forward kernels call for blocks that need no mask, in which each row sees a key unless its scores may be
        -inf."""
        return "online_softmax" if not self.has_score or self.score.finite else "online_softmax_masked"

    @property
    def hidden(self) -> str:
        """What a backward kernel has in the place of what a mask hides: of a score, or of the weight that it became."""
        return "0.0f" if self.weighs else "-kInfinity"

    @property
    def has_griddepcontrol(self) -> bool:
        """Whether a kernel's blocks can start before the kernel before it has ended: an instruction of sm_90."""
        return self.arch == "sm90"

    @property
    def prepare_threads(self) -> int:
        return PREPARE_THREADS

    @property
    def prepare_lengths(self) -> int:
        return PREPARE_LENGTHS

    @property
    def section_row_bytes(self) -> int:
        """What tiles that are walked together read of a row of one head: of K and V, or backward of Q, dO and the sums
        of dQ."""
        read = (self.head_dim + self.head_dim_v) * ELEMENT_BYTES
        return read + (self.head_dim * NUMBER_BYTES if self.problem.direction == "bwd" else 0)

    @property
    def keeps_in_l2(self) -> bool:
        """Whether copies ask L2 to keep what they touch until all else has left."""
        return False

    @property
    def least_section_heads(self) -> int:
        """How many of Q's heads a forward kernel walks together, however long they are."""
        return SECTION_HEADS_OF_DOCUMENTS if self.knows_alike else 1

    @property
    def section_bytes(self) -> int:
        """Of what the heads that are walked together read, where there are no groups."""
        return SECTION_BYTES

    @property
    def is_level(self) -> bool:
        """Whether blocks of keys of several heads start together though all have equally much to do."""
        return False

    @property
    def rows_in_l2(self) -> int:
        """Of all heads that are walked together."""
        return self.section_bytes // self.section_row_bytes

    @property
    def times_in_order(self) -> int:
        """How many times as much a section may read where additions have an order: then few blocks that run at a time
        belong to one head, and wait for each other."""
        return 1

    @property
    def sections_of_groups(self) -> int:
        """How many times as much a single head with its group may read, at most."""
        return SECTIONS_OF_GROUPS

    @property
    def sequence_numbers(self) -> int:
        """Of a sequence in the table that the kernel before the others writes."""
        return ENTRY_NUMBERS

    @property
    def own_sequences(self) -> int:
        """Of at most so many sequences blocks make the table themselves, and that kernel is not launched."""
        return 0

    @property
    def lists_keys(self) -> bool:
        """Whether blocks of keys are listed, and not those of queries."""
        return any(scratch.name == "n_list" for scratch in self.scratch)

    @property
    def has_tile_counter(self) -> bool:
        """Whether blocks fetch the numbers of their tiles from a counter in memory."""
        return any(scratch.name == "tile_counter" for scratch in self.scratch)

    @property
    def is_prepared(self) -> bool:
        """Whether a kernel runs before the others."""
        return bool(self.tile_tables) or any(feature.prepare for feature in self.features)

    @property
    def prepared_scratch(self) -> frozenset[str]:
        """What those kernels write."""
        prepared = (scratch.name for feature in self.features if feature.prepare for scratch in feature.scratch)
        return frozenset(prepared) | {"tile_bounds"}

    @property
    def prepare_entries(self) -> tuple[EntryPoint, ...]:
        """The kernels that run before the others, where features have some."""
        bounds = EntryPoint(f"{self.name}_bounds", self.bound_threads, 0, (), "tile bounds")
        found = (bounds,) if self.tile_tables else ()
        if not any(feature.prepare for feature in self.features):
            return found
        shared_bytes = 16 + 4 * PREPARE_LENGTHS  # two numbers, and one a kind
        return (*found, EntryPoint(f"{self.name}_prepare", PREPARE_THREADS, shared_bytes, (), "one"))

    @property
    def deterministic(self) -> bool:
        return self.problem.deterministic

    @property
    def tile_m(self) -> int:
        return self.tiling.tile_m

    @property
    def tile_n(self) -> int:
        return self.tiling.tile_n

    @property
    def num_stages(self) -> int:
        return self.tiling.num_stages

    @property
    def num_mma_warps(self) -> int:
        return self.tiling.num_mma_warps

    @cached_property
    def qk(self) -> Width:
        """The width of Q, K and their gradients."""
        return Width(self.head_dim, self.tiling.swizzle_bytes)

    @cached_property
    def vo(self) -> Width:
        """The width of V, O and their gradients: `qk`, or one with names of its own."""
        if self.head_dim_v == self.head_dim:
            return self.qk
        return Width(self.head_dim_v, self.tiling.swizzle_bytes, constant="V", function="_v")

    @property
    def widths(self) -> tuple[Width, ...]:
        """The widths of the kernel's tensors, each once."""
        return tuple(dict.fromkeys((self.qk, self.vo)))

    @property
    def q_tile(self) -> Panels:
        return self.qk.tile(self.tile_m)

    @property
    def k_tile(self) -> Panels:
        return self.qk.tile(self.tile_n)

    @property
    def v_tile(self) -> Panels:
        return self.vo.tile(self.tile_n)

    @property
    def o_tile(self) -> Panels:
        """Of O, and of dO."""
        return self.vo.tile(self.tile_m)

    @property
    def k_steps_per_panel(self) -> int:
        return self.k_tile.columns // 16

    @property
    def swizzle_shift(self) -> int:
        """16-byte chunk c of row r lies at chunk c ^ ((r >> shift) & mask): see layout.swizzle."""
        return {128: 0, 64: 1, 32: 2}[self.tiling.swizzle_bytes]

    @property
    def swizzle_mask(self) -> int:
        return {128: 7, 64: 3, 32: 1}[self.tiling.swizzle_bytes]

    @property
    def head_multiple(self) -> str:
        """C++: what query heads are a multiple of, in the launcher."""
        parts = self.tiling.group_parts
        return f"({parts} * call.num_heads_kv)" if parts > 1 else "call.num_heads_kv"

    # What a subclass must give.

    @property
    def schedule(self) -> str:
        """The order in which blocks of threads take their work: a block of templates/rooms/schedule."""
        raise NotImplementedError

    @property
    def num_threads(self) -> int:
        raise NotImplementedError

    @property
    def min_ctas_per_sm(self) -> int:
        return 1

    @property
    def memory(self) -> SharedMemory:
        """The dynamic shared memory of one block."""
        raise NotImplementedError

    @cached_property
    def shared_memory_bytes(self) -> int:
        return self.memory.bytes

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The tensors that a launch takes, in the order of their addresses."""
        return (*OPERANDS[self.problem.direction], *(x for feature in self.features for x in feature.operands))

    @cached_property
    def scratch(self) -> tuple[Scratch, ...]:
        """The memory that a launch takes beside them."""
        return tuple(scratch for feature in self.features for scratch in feature.scratch)

    @property
    def strided_tensors(self) -> tuple[str, ...]:
        """The (batch, seqlen, heads, head_dim) tensors that kernels read or write without a tensor map."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[str, ...]:
        """The whole numbers of Params that every feature has use for: lengths, head counts, blocks."""
        raise NotImplementedError

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """Fields of the kernels' Params struct in order; addresses, then other 8-byte fields, so that C++ adds no
        padding."""
        strided = [operand for operand in self.operands if operand.name in self.strided_tensors]
        others = [operand for operand in self.operands if not operand.is_tensor]
        return (
            *(Param(operand.name, operand.ctype) for operand in (*strided, *others)),
            *(scratch.param for scratch in self.scratch),
            *(Param(f"{x.name}_{step}_stride", "int64_t") for x in strided for step in ("batch", "row", "head")),
            *(Param(name, "int") for name in self.sizes),
            *(param for feature in self.features for param in feature.params),
            Param("softmax_scale", "float"),
            *(() if self.has_score else (Param("softmax_scale_log2", "float"),)),
        )

    @cached_property
    def tensor_maps(self) -> tuple[TensorMapPlan, ...]:
        """The tensor maps that precede Params in the kernel's argument list."""
        return ()

    @cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        """The kernels of this source in the order of their launches; the one called `name` does the work."""
        raise NotImplementedError

    @cached_property
    def params_format(self) -> str:
        """`struct.Struct` format of Params, with the trailing padding that C++ adds."""
        codes = "".join(param.code for param in self.params)
        return f"<{codes}" + ("4x" if sum(code in "if" for code in codes) % 2 else "")

    def pack_params(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """The values of Params in struct order, from a dict with those names; it may have others."""
        return tuple(values[param.name] for param in self.params)

    @property
    def register_estimate(self) -> int:
        """Registers that a thread needs, where it multiplies."""
        raise NotImplementedError

    @property
    def registers_available(self) -> int:
        """Those that it has."""
        raise NotImplementedError

    # What does not fit

    def broken_rules(self) -> tuple[BrokenRule, ...]:
        """Every feasibility rule that this plan breaks; empty when the kernel can be built."""
        return tuple(self.rules())

    def rules(self) -> Iterator[BrokenRule]:
        """Those, one after the other, up to one without which the next have no numbers: so they are statements, and no
        rows of a table, each of which would have to repeat what must hold before it."""
        raise NotImplementedError

    @property
    def shared_memory_available(self) -> int:
        """Bytes that a block may have."""
        return min(self.most_shared_memory, self.shared_memory_limit or self.most_shared_memory)

    @property
    def most_shared_memory(self) -> int:
        """That, on the device of its family that has the most of those that are asked for."""
        return ARCHES[self.tiling.arch].shared_memory_per_block

    def common_rules(self, registers: str) -> Iterator[BrokenRule]:
        """Those that every kernel may break; `registers` is what the estimate consists of."""
        # Switches first: they refuse 35 of 36 of the 21,000 plans that a tuner's search asks, at a tenth of the cost.
        yield from self.lazy_rescale_rule()
        yield from self.groups_rule()
        yield from self.lag_rule()
        yield from self.pages_rule()
        yield from self.abreast_rule()
        yield from self.turns_rule()
        available = self.shared_memory_available
        if self.memory.bytes > available:
            detail = f"{bytes_text(self.memory.bytes)} needed ({self.memory.text}), {bytes_text(available)} available"
            if self.memory.bytes <= self.most_shared_memory:
                detail += f" ({bytes_text(self.most_shared_memory)} on other devices)"
            yield BrokenRule("shared memory", detail)
        if self.register_estimate > self.registers_available:
            yield BrokenRule(
                "registers",
                f"{self.register_estimate} a thread needed ({registers}), {self.registers_available} available to "
                f"{self.num_mma_warps} warps",
            )

    def lazy_rescale_rule(self) -> Iterator[BrokenRule]:
        """The rule that lazy rescaling breaks, here where there is no running maximum or a cheap one."""
        if self.tiling.lazy_rescale:
            yield BrokenRule("lazy rescale", "1 given; only kernels of the forward pass have it: 0")

    def groups_rule(self) -> Iterator[BrokenRule]:
        """The rule that groups of heads in parts break, here where nothing is summed over a group."""
        if self.tiling.group_parts > 1:
            detail = f"{self.tiling.group_parts} parts given; only gradients are sums over a group: 1"
            yield BrokenRule("groups", detail)
        if self.tiling.tail_parts > 1:
            yield BrokenRule("tail", f"{self.tiling.tail_parts} parts given; only sm90's gradients have them: 1")

    def lag_rule(self) -> Iterator[BrokenRule]:
        """The rule that a dQ of the step before breaks, here where there is none."""
        if self.tiling.lag:
            yield BrokenRule("lag", "1 given; only sm90's gradients that split keys have it: 0")

    def pages_rule(self) -> Iterator[BrokenRule]:
        """The rules that what is for pages breaks, here where there are none, or another way to them."""
        for name in SWITCHES_OF_PAGES:
            if getattr(self.tiling, name):
                yield BrokenRule(name, "1 given; only sm90's forward kernels over pages have it: 0")

    def turns_rule(self) -> Iterator[BrokenRule]:
        """Why blocks of threads can not take blocks of keys in turn."""
        if self.tiling.keys_in_turn:
            yield BrokenRule("keys in turn", "1 given; only sm90's gradients whose dQ lags have it: 0")

    def abreast_rule(self) -> Iterator[BrokenRule]:
        """The rule that heads abreast break, here where nothing is summed over a group."""
        if self.tiling.heads_abreast:
            yield BrokenRule("heads abreast", "1 given; only gradients are sums over a group: 0")

    def dropout_rule(self) -> Iterator[BrokenRule]:
        """The rule that a forward kernel's blocks of keys break, if units of dropout do not fill them."""
        if self.dropout and self.tile_n % DROPOUT_KEYS:
            detail = f"tile_n {self.tile_n}; random bits are drawn by {DROPOUT_KEYS} keys: a multiple of that"
            yield BrokenRule("dropout", detail)


def bytes_text(value: int) -> str:
    """`327,680 B`."""
    return f"{value:,} B"
