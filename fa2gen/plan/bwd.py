"""What the plans of backward kernels share, whatever the architecture: preprocess, main, postprocess in one source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fa2gen.features import Scratch
from fa2gen.plan.base import BrokenRule, KernelPlan, Width

__all__ = ["BackwardPlan"]

PREPROCESS_THREADS = 128
# With heads abreast the fewer heads of K and V are walked together, the more blocks of keys of one are at the same
# block of queries: documents packed to 8k, 16k, 32k, 64:8 heads of 128, 1.08, 1.03, 1.02 times 32 MiB; 64 MiB 0.81,
# 0.78, 0.81 (H100).
SECTION_BYTES_ABREAST = 8 << 20
# In windows blocks of keys read few of a head's queries; of fewer heads at a time, the short ones at a head's end fall
# between long ones: window 1023 of 16k, 16 heads of 128, 1.025 times 32 MiB, of 8k, 8:4 heads of 256, 1.005; 4 times as
# much of a group of four: 1.014 at 32:8 heads of 128 (H100).
SECTION_BYTES_OF_WINDOWS = 16 << 20
SECTIONS_OF_GROUPS_IN_WINDOWS = 4


@dataclass(frozen=True)
class BackwardPlan(KernelPlan):
    """Three kernels: row statistics and dQ = 0; dK, dV and sums of dQ; dQ rounded and in rows."""

    @property
    def dq_block_floats(self) -> int:
        """fp32 numbers in the sums of dQ for one block of queries of one head."""
        raise NotImplementedError

    @property
    def schedule(self) -> str:
        if self.varlen:
            return "key_blocks_listed"
        return "key_blocks_in_sections" if self.walks_sections else "key_blocks_by_head"

    @property
    def walks_sections(self) -> bool:
        """Blocks of keys start section by section of heads: causal ones the longest first, deterministic ones so that
        few that run at a time belong to one head and wait for each other."""
        return self.uneven or self.deterministic or self.splits_groups

    @property
    def walks_queries_down(self) -> bool:
        """Whether blocks of keys walk their blocks of queries from the last to the first. With heads abreast all then
        begin at the same one, whatever a causal mask hides, and go on side by side."""
        return bool(self.tiling.heads_abreast)

    @property
    def can_take_turns(self) -> bool:
        """Whether a block of threads can take one block of keys after the other."""
        return False

    @property
    def is_persistent(self) -> bool:
        """Whether a block of threads of the main kernel takes one block of keys after the other."""
        return False

    @property
    def finds_block_early(self) -> bool:
        """Whether the main kernel asks for its block of keys before the kernel of row statistics has ended."""
        return False

    @property
    def section_bytes(self) -> int:
        if self.tiling.heads_abreast:
            return SECTION_BYTES_ABREAST
        return SECTION_BYTES_OF_WINDOWS if self._walks_windows else super().section_bytes

    @property
    def block_seqlen(self) -> str:
        """C++: the lengths of the sequence that a block of queries or keys is of."""
        return "block.seqlen" if self.varlen else "seqlen_of(p, block.bidb)"

    @property
    def sections_of_groups(self) -> int:
        return SECTIONS_OF_GROUPS_IN_WINDOWS if self._walks_windows else super().sections_of_groups

    @property
    def _walks_windows(self) -> bool:
        return self.left_edge and not self.deterministic

    @property
    def shares_draws(self) -> bool:
        """Whether four warps, whose 64 keys get random bits together, draw a quarter of them each, for all."""
        return False

    # Parts: groups in parts, or the last blocks of keys; as many blocks of threads then leave their sums in memory

    @property
    def splits_groups(self) -> bool:
        return self.tiling.group_parts > 1

    @property
    def splits_tail(self) -> bool:
        """Whether blocks of keys beyond the last full wave have several blocks of threads, for parts of the queries."""
        return self.tiling.tail_parts > 1

    @property
    def num_parts(self) -> int:
        return max(self.tiling.group_parts, self.tiling.tail_parts)

    @property
    def has_parts(self) -> bool:
        return self.num_parts > 1

    @property
    def walked_blocks(self) -> str:
        """C++: the blocks of queries that a block of threads walks."""
        visited = "query_blocks(p, s, block.n_block * kTileN)"
        return f"blocks_of_part({visited}, block.part)" if self.splits_tail else visited

    @property
    def key_heads(self) -> str:
        """C++: the heads of K and V that blocks of keys count, those of each part for themselves."""
        return "(kParts * p.num_heads_kv)" if self.splits_groups else "p.num_heads_kv"

    @property
    def head_kv(self) -> str:
        """C++: where a block's head of K and V is in the tensors."""
        return "block.head_kv / kParts" if self.splits_groups else "block.head_kv"

    @property
    def heads_of_key_block(self) -> str:
        """C++: how many query heads a block of keys walks."""
        return "(p.num_heads_per_kv / kParts)" if self.splits_groups else "p.num_heads_per_kv"

    @property
    def sum_threads(self) -> int:
        """Threads that hold dK of a block of keys, and as many dV."""
        raise NotImplementedError

    def num_sums(self, width: Width) -> int:
        """fp32 numbers of dK, or of dV, that each of them holds."""
        raise NotImplementedError

    @property
    def dk_floats(self) -> int:
        return self.sum_threads * self.num_sums(self.qk)

    @property
    def part_floats(self) -> int:
        return self.dk_floats + self.sum_threads * self.num_sums(self.vo)

    @property
    def groups_name(self) -> str:
        return f"{self.name}_groups"

    @property
    def can_split_groups(self) -> bool:
        """Not where scores are of expressions, which count heads of K and V too."""
        return not self.has_score and not self.has_allow

    @property
    def can_split_tail(self) -> bool:
        """Whether the last blocks of keys may have parts."""
        return False

    @property
    def can_go_abreast(self) -> bool:
        """Whether heads abreast may be worth it, and were tried."""
        return False

    def abreast_rule(self) -> Iterator[BrokenRule]:
        if self.tiling.heads_abreast and self.has_allow:
            detail = "1 given, with a mask of an expression, which a walk asks of a head's blocks in a row: 0"
            yield BrokenRule("heads abreast", detail)

    def groups_rule(self) -> Iterator[BrokenRule]:
        if self.splits_groups and not self.can_split_groups:
            yield BrokenRule("groups", f"{self.tiling.group_parts} parts given; {self.unsplit_groups}: 1")
        if self.splits_tail and not self.can_split_tail:
            yield BrokenRule(
                "tail",
                f"{self.tiling.tail_parts} parts given; needs sm90, a dense batch without expression, groups in one "
                "part, blocks of keys not in turn, and not 64 keys split by products: 1",
            )

    @property
    def unsplit_groups(self) -> str:
        """What it is that groups have one part for."""
        return "with an expression"

    @property
    def chunks_per_row(self) -> int:
        """16-byte chunks of a row of O."""
        return self.head_dim_v // 8

    @property
    def lanes_per_row(self) -> int:
        """Lanes that share a row: the power of two that has one for each chunk."""
        return 1 << (self.chunks_per_row - 1).bit_length()

    @property
    def preprocess_threads(self) -> int:
        return PREPROCESS_THREADS

    @property
    def preprocess_warps(self) -> int:
        """Each leaves a number of its own for the sink's gradient; four are read at once."""
        return PREPROCESS_THREADS // 32

    @property
    def preprocess_name(self) -> str:
        return f"{self.name}_preprocess"

    @property
    def postprocess_name(self) -> str:
        return f"{self.name}_postprocess"

    @cached_property
    def scratch(self) -> tuple[Scratch, ...]:
        """None of it needs to be initialised."""
        names = ("lse_log2", "dpsum", "dq_acc", *(("dkv_parts",) if self.has_parts else ()))
        firsts = (Scratch("dq_sums", "int*"),) if self.stores_first else ()
        return (*(Scratch(name, "float*") for name in names), *firsts, *super().scratch)

    @property
    def stores_first(self) -> str:
        """Formula of whether whoever comes first to a block of queries stores its share of dQ, to which others add, or
        else all add to zeros; "": they always do."""
        return ""

    @property
    def stores_in_turn(self) -> bool:
        """Whether the block of keys with the first turn stores its share of dQ, to which others add."""
        return False

    @property
    def num_dq_shares(self) -> int:
        """Of dQ of a block of queries, that different threads add."""
        return 1

    @property
    def sizes(self) -> tuple[str, ...]:
        both = ("num_heads_kv", "num_heads_per_kv", "num_m_blocks", "num_n_blocks")
        firsts = ("stores_first",) if self.stores_first else ()
        tail = ("num_whole_blocks",) if self.splits_tail else ()
        if self.varlen:
            return ("seqlen_q", "seqlen_k", *both, *firsts)
        sections = ("num_batch_heads_kv", "heads_per_section") if self.walks_sections else ()
        return ("seqlen_q", "seqlen_k", "num_heads", *both, *sections, *firsts, *tail)
