"""Launches, and what a render says of its own: one set of formulas, held to definitions written down here."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest

from fa2gen.features import examples_of
from fa2gen.features.dropout import keep_steps
from fa2gen.groups import with_groups
from fa2gen.launch import launch_of
from fa2gen.options import AnyShape, CacheShape, Options, Shape
from fa2gen.plan import KernelPlan, make_plan, recipe
from fa2gen.plan.base import SECTION_BYTES, SECTION_HEADS, SECTION_HEADS_OF_GRADIENTS, SECTION_HEADS_OF_LEVEL
from fa2gen.plan.sm90_bwd import (
    FIRST_KEY_BLOCKS,
    FIRST_ROWS,
    FIRST_ROWS_OF_CAUSAL,
    FIRST_ROWS_OF_LEVEL,
    FIRST_ROWS_OF_NARROW,
    FIRST_ROWS_OF_RAGGED,
)
from fa2gen.render import render
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem

PROBLEMS = [
    Problem(head_dim=64),
    Problem(head_dim=80, mask="causal"),
    Problem(head_dim=256, mask="causal", dtype="fp16"),
    Problem(direction="bwd", head_dim=64),
    Problem(direction="bwd", head_dim=128),
    Problem(direction="bwd", head_dim=128, mask="causal"),
    Problem(direction="bwd", head_dim=256, deterministic=True),
    Problem(head_dim=64, mask="window"),
    Problem(direction="bwd", head_dim=128, mask="window", deterministic=True),
    Problem(head_dim=192, head_dim_v=128, mask="causal"),
    Problem(direction="bwd", head_dim=192, head_dim_v=128, mask="causal"),
    Problem(direction="bwd", head_dim=64, sink=True),
    Problem(head_dim=64, dropout=True),
    Problem(direction="bwd", head_dim=64, varlen=True, mask="causal"),
    Problem(head_dim=64, varlen=True),
    Problem(head_dim=128, mask="window", varlen=True, paged=True),
    Problem(direction="decode", head_dim=128, mask="window", paged=True),
    Problem(direction="decode", head_dim=64, cache_dtype="int8", dtype="fp16"),
    Problem(direction="decode", head_dim=72, mask="causal"),
    Problem(direction="bwd", head_dim=64, allow="kind[i, b] == kind[j, b] and kind[i, b] > 0"),
    Problem(head_dim=128, mask="causal", allow="kind[i, b] == kind[j, b]"),
]
PLANS = [
    make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
    for problem in PROBLEMS
    for arch in ("sm80", "sm90")
]
GRADIENTS = [plan for plan in PLANS if plan.problem.direction == "bwd"]
PLANS += [with_groups(plan, 2) for plan in GRADIENTS if plan.can_split_groups]
PLANS += [with_groups(plan, 1, in_turn=True) for plan in GRADIENTS if plan.can_take_turns]
PLANS += [with_groups(plan, tail=3) for plan in GRADIENTS if plan.can_split_tail]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=[plan.name for plan in PLANS])
NUM_SMS = 132


def sized(plan: KernelPlan, options: Options) -> Options:
    """With a tensor of 700 positions of 3 batch entries, where the expression names one."""
    if not plan.tile_tables:
        return options
    return options._replace(expression=options.expression._replace(shapes=((700, 3),)))


def has_cache(plan: KernelPlan) -> bool:
    return plan.problem.direction == "decode" or plan.paged


def caches() -> list[CacheShape]:
    """Calls over caches, with and without new keys, rotary embeddings and fixed parts."""
    draw = random.Random(8)
    found = []
    for shape in shapes():
        page = draw.choice((1, 16, 48))
        new, splits, rotary = draw.choice((0, 1, 5)), draw.choice((-1, -1, 0, 3, 9)), draw.choice((0, 16, 64))
        pages = -(-shape.seqlen_k // page)
        seqlen_q = min(shape.seqlen_q, 64)
        sizes = shape._replace(seqlen_q=seqlen_q, seqlen_k=pages * page)
        place = (new, 3 * pages, page, shape.batch, pages + 1)
        found.append(
            CacheShape(*sizes, *place, splits, rotary, pages * page, True, True, seqlen_wide=pages * page // 2)
        )
    return found


def shapes() -> list[Shape]:
    draw = random.Random(7)
    found = [Shape(1, 1, 1, 1, 1), Shape(2, 300, 200, 4, 2), Shape(64, 131072, 131072, 64, 8)]
    for _ in range(200):
        heads_kv = draw.choice((1, 2, 3, 8))
        lengths = (int(2 ** draw.uniform(0, 18)) for _ in range(2))
        found.append(Shape(draw.randint(1, 20), *lengths, heads_kv * draw.randint(1, 8), heads_kv))
    return found


def blocks(plan: KernelPlan, shape: AnyShape) -> tuple[int, int]:
    """Of queries and of keys, a head's; of a ragged batch, where every sequence and every gap may end in a part of one,
    the most that there can be."""
    rows = ((shape.seqlen_q, plan.tile_m), (shape.seqlen_k, plan.tile_n))
    m, n = (length // tile + 2 * shape.batch + 1 if plan.varlen else -(-length // tile) for length, tile in rows)
    return m, n


def stores_first(plan: KernelPlan, shape: AnyShape) -> int:
    """Whether whoever comes first to a block of queries stores its dQ."""
    if plan.left_edge:
        return 1
    if plan.is_level and shape.num_heads == shape.num_heads_kv:
        of_keys = blocks(plan, shape)[1] * shape.batch * shape.num_heads_kv
        many = of_keys >= FIRST_KEY_BLOCKS and shape.seqlen_q <= FIRST_ROWS_OF_LEVEL
        return int(shape.seqlen_q <= FIRST_ROWS or many)
    if plan.mask == "full" or plan.varlen:
        most = FIRST_ROWS if plan.mask == "full" else FIRST_ROWS_OF_RAGGED
        return int(shape.seqlen_q <= most * (shape.batch if plan.varlen else 1))
    most = FIRST_ROWS_OF_NARROW if plan.head_dim <= 64 else FIRST_ROWS_OF_CAUSAL
    return int(shape.seqlen_q * (shape.num_heads // shape.num_heads_kv) <= most)


def expected(plan: KernelPlan, shape: AnyShape) -> tuple[Any, dict[str, int], dict[str, int], int]:
    """Grids, values and scratch of a call, and the most that its kernels count."""
    m, n = blocks(plan, shape)
    batch = 1 if plan.varlen else shape.batch
    group, parts, tail = shape.num_heads // shape.num_heads_kv, plan.tiling.group_parts, plan.tiling.tail_parts
    of_queries, of_keys = m * batch * shape.num_heads, n * batch * shape.num_heads_kv
    page = getattr(shape, "page_size", 0)
    bounds = sum(3 * (699 // table.tile + 1) for table in plan.tile_tables)
    if plan.problem.direction == "bwd":
        read = group * shape.seqlen_q * plan.section_row_bytes
        room = plan.section_bytes * min(group, plan.sections_of_groups)
        heads = batch * shape.num_heads_kv
        if not plan.problem.deterministic:
            heads = min(heads, SECTION_HEADS_OF_GRADIENTS)
        in_order = min(SECTION_HEADS_OF_GRADIENTS, plan.times_in_order * room // read)
        section = min(max(room // read, in_order, 1), heads) * parts
        if plan.is_level:
            section = min(max(SECTION_HEADS_OF_LEVEL // group, 1), batch * shape.num_heads_kv)
        whole = (of_keys - 1) // NUM_SMS * NUM_SMS if tail > 1 else of_keys
        of_threads = whole * parts + (of_keys - whole) * tail
        most = max(m * plan.tile_m * group, n * plan.tile_n + shape.seqlen_q, of_threads, 2 * bounds)
    else:
        room = max(min(SECTION_BYTES // (shape.seqlen_k * plan.section_row_bytes), SECTION_HEADS // group), 1)
        room = max(room, plan.least_section_heads // group)
        section = min(room * group, batch * shape.num_heads)
        whole = of_threads = 0
        most = max(shape.seqlen_q, shape.seqlen_k)
    values = {
        **shape._asdict(),
        "num_heads_per_kv": group,
        "num_m_blocks": m,
        "num_n_blocks": n,
        "num_tiles": of_queries,
        "num_batch_heads": batch * shape.num_heads,
        "num_batch_heads_kv": batch * shape.num_heads_kv * parts,
        "num_key_blocks": of_keys * parts,
        "num_whole_blocks": whole,
        "num_tail_blocks": of_keys - whole,
        "num_sequences": shape.batch,
        "box_rows": math.gcd(page, plan.tile_n),
        "tile_pages": plan.tile_n // max(page, 1),
        "tile_rows": plan.tile_n % max(page, 1),
        "heads_per_section": section,
        "stores_first": stores_first(plan, shape),
    }
    tables = int(not plan.own_sequences or shape.batch > plan.own_sequences)  # blocks make those of few sequences
    grids = {
        "persistent": (min(of_queries, NUM_SMS), 1, 1),
        "persistent key blocks": (min(of_keys * parts, NUM_SMS), 1, 1),
        "tiles": (m, shape.num_heads, batch),
        "query blocks": (of_queries, 1, 1),
        "key blocks": (of_threads, 1, 1),
        "tail": (of_keys - whole, 1, 1),
        "groups": (of_keys, 1, 1),
        "one": (tables, 1, 1),
        "tile bounds": (-(-bounds // plan.bound_warps), 1, 1),
    }
    rows = of_queries * plan.tile_m
    counters = 1 + bool(plan.own_sequences)
    scratch = {"tile_counter": counters, "lse_log2": rows, "dpsum": rows, "tile_bounds": 2 * bounds}
    scratch |= {
        "sequences": 8 * (3 * shape.batch + 2) * tables,
        "num_blocks": tables,
        "m_list": m * tables,
        "n_list": 8 * n,
    }
    if plan.problem.direction == "bwd":
        scratch["dq_acc"] = of_queries * plan.dq_block_floats
        scratch["dq_sums"] = scratch["dq_turns"] = of_queries * plan.num_dq_shares
        scratch["dkv_parts"] = (of_keys * parts if tail == 1 else (of_keys - whole) * tail) * plan.part_floats
        scratch["sink_sums"] = of_queries * plan.preprocess_warps
    return [grids[entry.grid] for entry in plan.entry_points], values, scratch, max(most, of_queries + NUM_SMS)


OF_SIZES = {"num_sequences", "num_wide_blocks"}  # what features add to Params without a formula of their own


def expected_of_cache(plan: KernelPlan, shape: CacheShape) -> tuple[Any, dict[str, Any], dict[str, int], int]:
    """The same over a cache. Each block leaves two parts at most, or with fixed parts each has a place of its own."""
    group = shape.num_heads // shape.num_heads_kv
    m = -(-shape.seqlen_q * group // plan.tile_m)
    fixed, unit = shape.split_shift >= 0, 64 << max(shape.split_shift, 0)
    # A window's first and last unit may both be cut.
    units = (-(-shape.seqlen_k // unit) + 1) * shape.batch * shape.num_heads_kv * m
    turned = shape.seqlen_q * shape.num_heads if shape.rotary_dim else 0
    new = plan.head_dim // 8 * shape.batch * (2 * shape.seqlen_new * shape.num_heads_kv + turned)
    least = 1 if fixed else 2
    grid = min(-(-units // least), NUM_SMS)
    slots = units if fixed else 2 * grid
    at_once = m if m <= min(8, grid) else 1
    runs, items = grid // at_once, shape.batch * shape.num_heads_kv * (m // at_once)
    ends = 3 * (not fixed and items > runs)
    heads = shape.num_heads_kv * (m // at_once)
    each = runs // heads if shape.batch <= 1024 and not fixed else 0
    each *= each * heads >= 0.95 * runs  # as many blocks for each head, which are nearly all
    values = {
        **shape._asdict(),
        "num_sequences": shape.batch,
        "cache_entries": shape.entries,
        "num_heads_per_kv": group,
        "num_m_blocks": m,
        "unit_shift": (unit // plan.tile_n).bit_length() - 1,
        "inverse_group": 1 / group,
        "least_units": least,
        "item_units": ends,
        "item_runs": each,
        "fixed_parts": fixed,
        "rotary_interleaved": shape.interleaved,
        "entry_sequences": max(-(-shape.batch // 1024), 1),
        "num_entries": -(-shape.batch // max(-(-shape.batch // 1024), 1)),
        "rows_at_once": at_once,
        "row_rounds": m // at_once,
        "round_reciprocal": (2**31 - 1) // (m // at_once),
        "num_runs": grid // at_once,
        "run_reciprocal": (2**31 - 1) // (grid // at_once),
    }
    scratch = {"parts": slots * plan.tile_m * plan.head_dim, "part_sums": 2 * slots * plan.tile_m}
    scratch["counters"] = units if fixed else grid
    wide = plan.head_dim // 8 * shape.seqlen_wide * shape.num_heads_kv
    values["num_wide_blocks"] = -(-wide // 1024)
    of_wide = (shape.batch * values["num_wide_blocks"], 2, 1)
    grids = [(-(-new // plan.entry_points[0].num_threads), 1, 1), *([of_wide] if plan.has_8_bits else []), (grid, 1, 1)]
    units = units * (1 + ends + min(each, 1)) + 64 * NUM_SMS
    most = max(units, 2 * (shape.seqlen_k + unit), new, m * plan.tile_m << 9)
    return grids, values, scratch, max(most, wide + 1024) if plan.has_8_bits else most


@each_plan
def test_launches_by_their_definition(plan: KernelPlan):
    options = sized(plan, examples_of(plan.problem)[0])._replace(softmax_scale=0.1)
    of_features = {param.name for feature in plan.features for param in feature.params} - OF_SIZES
    fitting = 0
    by_definition = expected_of_cache if plan.problem.direction == "decode" else expected
    for shape in caches() if has_cache(plan) else shapes():
        shape = shape._replace(num_heads=shape.num_heads * plan.tiling.group_parts)
        grids, values, scratch, most = by_definition(plan, shape)
        if most >= 2**31:
            with pytest.raises(OverflowError, match=r"exceed 2\^31"):
                launch_of(plan, shape, options, NUM_SMS)
            continue
        launch = launch_of(plan, shape, options, NUM_SMS)
        values |= {"softmax_scale": 0.1, "softmax_scale_log2": pytest.approx(0.1 * math.log2(math.e), rel=1e-15)}
        assert launch.grids == tuple(grids)
        assert {n: x for n, x in launch.values.items() if n not in of_features} == {
            param.name: values[param.name]
            for param in plan.params
            if not (param.is_address or param.name.endswith("_stride") or param.name in of_features)
        }
        assert launch.scratch == {one.name: scratch[one.name] for one in plan.scratch}
        fitting += 1
    assert fitting > 100


@each_plan
def test_what_features_add_to_params(plan: KernelPlan):
    """Of every example, over lengths on both sides of every limit."""
    added = {param.name for feature in plan.features for param in feature.params}
    assert recipe.of_features(plan).keys() == added - OF_SIZES
    for example in examples_of(plan.problem):
        for sizes in (Shape(1, q, k, 4, 1) for q in (1, 40, 5000) for k in (1, 47, 48, 129, 5000)):
            scales = {"k_scale_batch": 4, "k_scale_head": 1, "v_scale_batch": 0, "v_scale_head": 2, "seqlen_wide": 5}
            shape = CacheShape(*sizes, 0, 9, 3, 7, 5000, **scales) if has_cache(plan) else sizes
            values = launch_of(plan, shape, sized(plan, example), NUM_SMS).values
            longest = max(shape.seqlen_q, shape.seqlen_k)
            right = 0 if example.causal else example.window_right
            known = {
                "window_left": min(x if (x := example.window_left) >= 0 else longest, shape.seqlen_k),
                "window_right": min(right if right >= 0 else longest, shape.seqlen_q),
                "chunk": min(example.chunk or longest, longest),
                "chunk_before": 0 if example.chunk else longest,
                **{f"keep_digit_{i}": -(keep_steps(example.dropout_p) // 2**i % 2) for i in range(12)},
                **scales,
                "keep_scale": 1 / (1 - example.dropout_p),
                "page_size": 3,
                "page_reciprocal": (2**31 - 1) // 3,
                "table_rows": 7,
                "table_step": 5000,
                "num_pages": 9,
                "input_0_last_0": 699,
                "input_0_last_1": 2,
            }
            assert {name: values[name] for name in recipe.of_features(plan)} == {
                name: known[name] for name in recipe.of_features(plan)
            }, (shape, example)


@each_plan
def test_a_render_says_how_it_is_launched(plan: KernelPlan):
    source = render(plan).source
    said = source[source.index("\n// Launch ---") :]
    for entry in plan.entry_points:
        assert (
            f"//   {entry.symbol}\n//     grid ({', '.join(recipe.grid(plan, entry))}), {entry.num_threads} threads"
            in said
        )
        assert f"{entry.shared_memory_bytes} bytes of dynamic" in said
        if entry.tensor_maps:
            assert f"maps of {', '.join(m.argument[4:] for m in entry.tensor_maps)}\n" in said
        for found in entry.tensor_maps:
            rows = "box_rows" if found.of_pages else found.box_rows
            boxes = rf"\b{found.argument[4:]}\b.*: box {found.box_cols} x {rows} x .*{found.swizzle_bytes} bytes"
            assert re.search(boxes, said)
    assert ("left so" in said) == any(scratch.cleared for scratch in plan.scratch)
    assert all(f"  {name} = {formula}\n" in said for name, formula in recipe.sizes(plan).items())


def test_the_order_of_a_kernels_arguments_is_the_recipes():
    for plan in PLANS:
        source = render(plan).source
        for entry in plan.entry_points:
            start = re.search(rf"\s{entry.symbol}\(", source).start()
            signature = source[start:].partition(")")[0]
            assert re.findall(r"CUtensorMap (\w+)", signature) == [found.argument for found in entry.tensor_maps]
