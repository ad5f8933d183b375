"""Launch facts of one call: grids, `Params` values and scratch memory, from a plan, sizes and options.

Pure integers, for GPU and CPU alike. What whoever launches a render without this package is told, formula by formula,
says fa2gen/plan/recipe.py; a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fa2gen.errors import InvalidInput
from fa2gen.features import MASKS
from fa2gen.features.varlen import ENTRY_NUMBERS, capacity, entries
from fa2gen.layout import ceil_div
from fa2gen.options import SPLIT_KEYS, AnyShape, CacheShape, Options
from fa2gen.plan import KernelPlan
from fa2gen.plan.base import SECTION_BYTES, SECTION_HEADS, SECTIONS_OF_GROUPS
from fa2gen.plan.bwd import BackwardPlan
from fa2gen.plan.recipe import LEAST_UNITS

__all__ = [
    "RAGGED_ROWS",
    "SECTION_BYTES",
    "Launch",
    "heads_per_section",
    "launch_of",
    "page_strides",
    "pages_refusal",
    "ragged_dimensions",
    "reads_pages_quickly",
]


RAGGED_ROWS = 1 << 30  # as in templates/ptx/tma.cuh.j2
TMA_ALIGNMENT = 128  # of a box in shared memory
# TMA takes some 50 cycles a box: with 4 rows in each a prefill takes 2.7 times as long as of packed keys, with 1 row 9
# times (128 columns, causal 8k, H100).
QUICK_BOX_ROWS = 8


@dataclass(frozen=True)
class Launch:
    """What to launch, and what memory it needs beside its operands.

    grids    blocks of each of the plan's entry points, which run one after the other.
    values   every field of Params that sizes and options decide (addresses and strides are not among them).
    scratch  4-byte numbers of each of the plan's scratch memories, in their order.
    """

    grids: tuple[tuple[int, int, int], ...]
    values: Mapping[str, Any]
    scratch: Mapping[str, int]


def launch_of(plan: KernelPlan, shape: AnyShape, options: Options, num_sms: int) -> Launch:
    """Grids, Params and scratch of a kernel.

    num_sms is the device's number of multiprocessors: persistent kernels take one block on each. Raises InvalidInput
    for options with another mask than the plan's, OverflowError where a count does not fit 32-bit integers.
    """
    if options.mask != plan.mask and not MASKS[plan.mask].general:
        raise InvalidInput(f"{plan.name} has a {plan.mask} mask, and {options} ask for a {options.mask} one")
    if plan.problem.direction == "decode":
        assert isinstance(shape, CacheShape)
        return _decoding_launch(plan, shape, options, num_sms)
    blocks = _Blocks.of(plan, shape)
    blocks.check(plan, shape, num_sms)
    group = shape.num_heads // shape.num_heads_kv
    if group % plan.tiling.group_parts:
        raise InvalidInput(
            f"{plan.name} has groups in {plan.tiling.group_parts} parts, which do not divide groups of {group} heads"
        )
    batch = _batch(plan, shape)
    scale = options.scale(plan.head_dim)
    values: dict[str, Any] = {
        "seqlen_q": shape.seqlen_q,
        "seqlen_k": shape.seqlen_k,
        "num_heads": shape.num_heads,
        "num_heads_kv": shape.num_heads_kv,
        "num_heads_per_kv": group,
        "num_m_blocks": blocks.num_m_blocks,
        "num_n_blocks": blocks.num_n_blocks,
        "num_tiles": blocks.of_queries,
        "num_batch_heads": batch * shape.num_heads,
        "num_batch_heads_kv": batch * shape.num_heads_kv * plan.tiling.group_parts,
        "heads_per_section": heads_per_section(plan, shape) * plan.tiling.group_parts,
        "softmax_scale": scale,
        "softmax_scale_log2": scale * math.log2(math.e),
    }
    if isinstance(shape, CacheShape):
        values["box_rows"] = math.gcd(shape.page_size, plan.tile_n)
    for feature in plan.features:
        values |= feature.values(options, shape)
    num_bounds = sum(table.number(values) for table in plan.tile_tables)
    if 2 * num_bounds >= 2**31:
        raise OverflowError(f"{2 * num_bounds:,} bounds of tiles exceed 2^31")
    grids = {
        "persistent": (min(blocks.of_queries, num_sms), 1, 1),
        "tiles": (blocks.num_m_blocks, shape.num_heads, batch),
        "query blocks": (blocks.of_queries, 1, 1),
        "key blocks": (blocks.of_keys * plan.tiling.group_parts, 1, 1),
        "groups": (blocks.of_keys, 1, 1),
        "one": (1, 1, 1),
        "tile bounds": (ceil_div(num_bounds, plan.bound_warps), 1, 1),
    }
    rows = blocks.of_queries * plan.tile_m
    counts = {"tile_counter": 1, "lse_log2": rows, "dpsum": rows, "dq_turns": blocks.of_queries}
    counts["tile_bounds"] = 2 * num_bounds
    if plan.varlen:
        m, n = blocks.num_m_blocks, blocks.num_n_blocks
        counts |= {"sequences": ENTRY_NUMBERS * entries(shape.batch), "num_blocks": 2, "m_list": m, "n_list": n}
    if isinstance(plan, BackwardPlan):
        counts["dq_acc"] = blocks.of_queries * plan.dq_block_floats
        counts["dkv_parts"] = blocks.of_keys * plan.tiling.group_parts * plan.part_floats
        counts["sink_sums"] = blocks.of_queries * plan.preprocess_warps
    return Launch(
        grids=tuple(grids[entry.grid] for entry in plan.entry_points),
        values=values,
        scratch={scratch.name: counts[scratch.name] for scratch in plan.scratch},
    )


def _decoding_launch(plan: KernelPlan, shape: CacheShape, options: Options, num_sms: int) -> Launch:
    """`launch_of` of queries over a cache. Nothing in it depends on what the lengths are, but for the most they can be.

    Each block leaves at most two parts of items, or with fixed parts each part has a place of its own.
    """
    group = shape.num_heads // shape.num_heads_kv
    num_m_blocks = ceil_div(shape.seqlen_q * group, plan.tile_m)
    is_fixed = shape.split_shift >= 0
    unit_keys = SPLIT_KEYS << max(shape.split_shift, 0)
    # A window's first and last unit may both be cut.
    units = (ceil_div(shape.seqlen_k, unit_keys) + 1) * shape.batch * shape.num_heads_kv * num_m_blocks
    rows = shape.seqlen_k + unit_keys
    turned = shape.seqlen_q * shape.num_heads if shape.rotary_dim else 0
    new = plan.head_dim // 8 * shape.batch * (2 * shape.seqlen_new * shape.num_heads_kv + turned)
    if (count := num_m_blocks * plan.tile_m) >= 2**22:
        raise OverflowError(f"{count:,} rows of a head of K and V exceed 2^22")
    for what, count in (
        ("units of keys", units + num_sms * SPLIT_KEYS),
        ("keys of a sequence", 2 * rows),
        ("pieces of new keys and of queries", new),
    ):
        if count >= 2**31:
            raise OverflowError(f"{count:,} {what} exceed 2^31")
    least = 1 if is_fixed else LEAST_UNITS
    blocks = min(ceil_div(units, least), num_sms)
    slots, counters = (units, units) if is_fixed else (2 * blocks, blocks)
    scale = options.scale(plan.head_dim)
    values: dict[str, Any] = {
        "seqlen_q": shape.seqlen_q,
        "seqlen_k": shape.seqlen_k,
        "seqlen_new": shape.seqlen_new,
        "num_sequences": shape.batch,
        "cache_entries": shape.entries,
        "num_heads": shape.num_heads,
        "num_heads_kv": shape.num_heads_kv,
        "num_heads_per_kv": group,
        "num_m_blocks": num_m_blocks,
        "unit_shift": (unit_keys // plan.tile_n).bit_length() - 1,
        "inverse_group": 1 / group,
        "least_units": least,
        "fixed_parts": int(is_fixed),
        "rotary_dim": shape.rotary_dim,
        "rotary_rows": shape.rotary_rows,
        "rotary_interleaved": int(shape.interleaved),
        "rotary_steps": int(shape.rotary_steps),
        "softmax_scale": scale,
        "softmax_scale_log2": scale * math.log2(math.e),
    }
    for feature in plan.features:
        values |= feature.values(options, shape)
    counts = {"parts": slots * plan.tile_m * plan.head_dim, "part_sums": 2 * slots * plan.tile_m, "counters": counters}
    append, _ = plan.entry_points
    return Launch(((ceil_div(new, append.num_threads), 1, 1), (blocks, 1, 1)), values, counts)


def ragged_dimensions(heads: int, row_bytes: int, head_bytes: int) -> tuple[tuple[int, ...], list[int]]:
    """Sizes and steps in bytes of a ragged batch's tensor map, beside its columns: (rows, heads, round, rows again).

    Rows end at RAGGED_ROWS, where a kernel puts the last row of a sequence, so that TMA clips what is behind it. The
    third leads from there round 2^64 bytes, and the fourth from the tensor's first row to the end of the sequence:
    RAGGED_ROWS * row + RAGGED_ROWS * (2^34 - row) = 2^64.
    """
    sizes = (RAGGED_ROWS, heads, 2 * RAGGED_ROWS, 2 * RAGGED_ROWS)
    return sizes, [row_bytes, head_bytes, 2**64 // RAGGED_ROWS - row_bytes, row_bytes]


def page_strides(shape: CacheShape, strides: Sequence[int]) -> tuple[int, int, int]:
    """Of a tensor (pages, page_size, heads, head_dim), from one page, one row, one head to the next: a dimension of one
    element has the stride that it would have if there were more."""
    page_step, row_step, head_step = strides
    row_step = page_step if shape.page_size == 1 else row_step
    return shape.page_size * row_step if shape.entries == 1 else page_step, row_step, head_step


def reads_pages_quickly(plan: KernelPlan, shape: CacheShape) -> bool:
    """Whether boxes of TMA, if the kernel has any, are so large that their number does not count."""
    found = [tensor_map for entry in plan.entry_points for tensor_map in entry.tensor_maps if tensor_map.of_pages]
    return all(tensor_map.rows_of(shape.page_size) >= QUICK_BOX_ROWS for tensor_map in found)


def pages_refusal(plan: KernelPlan, shape: AnyShape, strides: Mapping[str, Sequence[int]]) -> str | None:
    """Why a kernel can not read pages of these sizes and strides (as `page_strides` gives them) with TMA, or None."""
    for tensor_map in (found for entry in plan.entry_points for found in entry.tensor_maps if found.of_pages):
        assert isinstance(shape, CacheShape)
        name, (page_step, row_step, _) = tensor_map.name, strides[tensor_map.name]
        rows = tensor_map.rows_of(shape.page_size)
        least = TMA_ALIGNMENT // tensor_map.swizzle_bytes
        if rows % least:
            return f"pages of {shape.page_size} rows, of head dim {plan.head_dim}: a multiple of {least} rows is needed"
        if page_step % row_step:
            return f"pages of {name} are {page_step} elements apart, rows {row_step}: a multiple of that is needed"
        if (count := shape.entries * (page_step // row_step) + shape.seqlen_k) >= 2**31:
            return f"{count:,} rows of all pages of {name} exceed 2^31"
    return None


@dataclass(frozen=True)
class _Blocks:
    """How many blocks a call's sizes make: a head's, and all heads'."""

    num_m_blocks: int
    num_n_blocks: int
    of_queries: int
    of_keys: int

    @classmethod
    def of(cls, plan: KernelPlan, shape: AnyShape) -> _Blocks:
        if plan.varlen:  # as many as there may be: the kernels know how many there are
            m = capacity(shape.seqlen_q, shape.batch, plan.tile_m)
            n = capacity(shape.seqlen_k, shape.batch, plan.tile_n)
        else:
            m, n = ceil_div(shape.seqlen_q, plan.tile_m), ceil_div(shape.seqlen_k, plan.tile_n)
        batch = _batch(plan, shape)
        return cls(m, n, m * batch * shape.num_heads, n * batch * shape.num_heads_kv)

    def check(self, plan: KernelPlan, shape: AnyShape, num_sms: int) -> None:
        """Raise OverflowError where the kernels' 32-bit integers do not hold a count."""
        counts = {"tiles": self.of_queries + num_sms}  # a persistent kernel adds the grid to what it fetches
        if plan.problem.direction == "bwd":
            counts |= {
                "blocks of keys": self.of_keys * plan.tiling.group_parts,
                "query rows of a group of heads": (
                    self.num_m_blocks * plan.tile_m * (shape.num_heads // shape.num_heads_kv)
                ),
                "keys": self.num_n_blocks * plan.tile_n + shape.seqlen_q,
            }
        for what, count in counts.items():
            if count >= 2**31:
                raise OverflowError(f"{count:,} {what} exceed 2^31")


def _batch(plan: KernelPlan, shape: AnyShape) -> int:
    """Of the tensors as kernels see them: a ragged batch's sequences lie behind each other in one."""
    return 1 if plan.varlen else shape.batch


def heads_per_section(plan: KernelPlan, shape: AnyShape) -> int:
    """How many neighbouring (batch, head) pairs are walked together, so that what they read stays in L2.

    Forward, whole groups of query heads that share K and V; backward, heads of K and V, with the Q, dO and sums of dQ
    of their groups, in one part. Never more than there are: kernels multiply it with a number of blocks in 32 bits.
    """
    group = shape.num_heads // shape.num_heads_kv
    batch = _batch(plan, shape)
    if plan.problem.direction == "bwd":
        read = group * shape.seqlen_q * plan.section_row_bytes
        room = SECTION_BYTES * min(group, SECTIONS_OF_GROUPS)
        return min(max(1, room // max(read, 1)), batch * shape.num_heads_kv)
    read = shape.seqlen_k * plan.section_row_bytes
    room = max(1, SECTION_BYTES // max(read, 1)) * group
    return min(room, max(SECTION_HEADS // group, 1) * group, batch * shape.num_heads)
