"""The kernel that prepares a ragged batch, alone: its table of sequences and list of their blocks, of any lengths."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import pytest

from fa2gen.cpu.build import build_library
from fa2gen.cpu.kernel import SHARED_BASE, _params_argument, _scratch, view_of
from fa2gen.cpu.run import Job, KernelFault, run
from fa2gen.features.varlen import ENTRY_NUMBERS
from fa2gen.launch import launch_of
from fa2gen.layout import NUMBER_BYTES
from fa2gen.options import Options, Shape
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.render import Rendered, render
from fa2gen.select import best_spec
from fa2gen.spec import Problem

FORWARD, BACKWARD = (
    make_plan(best_spec(Problem(direction=direction, head_dim=64, mask="causal", varlen=True), "sm90"))
    for direction in ("fwd", "bwd")
)
PLANS = pytest.mark.parametrize("plan", [FORWARD, BACKWARD], ids=["queries", "keys"])  # by what is listed
KINDS = BACKWARD.prepare_lengths


@functools.cache
def rendered(plan: KernelPlan, kinds: int) -> Rendered:
    """With so many kinds of lengths."""
    whole = render(plan, target="cpu")
    told = f"constexpr int kNumLengths = {KINDS};"
    assert whole.source.count(told) == 1
    return Rendered(whole.source.replace(told, f"constexpr int kNumLengths = {kinds};"), whole.origins)


def prepared(plan, total, bounds_q, bounds_k, used_q=None, used_k=None, kinds=KINDS, seed=0, source=None, heads=1):
    """(table, the list's numbers of each block), of int32 arrays of lengths; total rows of queries and of keys."""
    given = {"cu_seqlens_q": bounds_q, "cu_seqlens_k": bounds_k, "seqused_q": used_q, "seqused_k": used_k}
    given = {name: np.asarray(x, np.int32) for name, x in given.items() if x is not None}
    batch = next(len(x) - name.startswith("cu") for name, x in given.items())
    launch = launch_of(plan, Shape(batch, *map(int, total), heads, heads), Options(causal=True, varlen=True), num_sms=4)
    memories, buffers = [view_of(name, x).memory(name) for name, x in given.items()], []
    for scratch in plan.scratch:
        if scratch.name in plan.prepared_scratch:
            memory, buffer = _scratch(scratch.name, NUMBER_BYTES * launch.scratch[scratch.name], scratch.cleared)
            memories.append(memory)
            buffers.append(buffer)
    entry = plan.entry_points[0]
    strides = dict.fromkeys((param.name for param in plan.params if param.name.endswith("_stride")), 0)
    job = Job(
        grid=launch.grids[0],
        num_threads=entry.num_threads,
        shared_base=SHARED_BASE,
        shared_bytes=entry.shared_memory_bytes,
        has_async_proxy=True,
        arguments=(_params_argument(plan, {**launch.values, **strides}, memories),),
        seed=seed,
        kernel=entry.symbol,
    )
    run(build_library(plan, rendered=source or rendered(plan, kinds)), job, memories)
    found = {m.name: np.frombuffer(ctypes.string_at(m.address, m.bytes), np.int32) for m in memories}
    table = found["sequences"].reshape(-1, ENTRY_NUMBERS)
    assert len(table) == 3 * batch + 2
    numbers = ENTRY_NUMBERS if plan.lists_keys else 1
    return table, found["n_list" if plan.lists_keys else "m_list"].reshape(-1, numbers)[: found["num_blocks"][0]]


def check(plan, table, found, kinds=KINDS):
    """Each entry is listed as often as it has blocks, from its place on; the longest ones first, each in turn where
    lengths are not taken together. Of queries no two blocks have one place."""
    column, tile = (1, plan.tile_n) if plan.lists_keys else (0, plan.tile_m)
    entries = found[:, -1]
    if plan.lists_keys:
        assert (found[:, 1:4] == table[entries, 1:4]).all(), "a block of keys has its entry's rows"
        queries = {entry: (numbers[4], -(-numbers[0] // plan.tile_m)) for *numbers, entry in found if numbers[0]}
        places = [place + i for place, count in queries.values() for i in range(count)]
        assert len(set(places)) == len(places)
        place_of = {entry: numbers[5] for *numbers, entry in found}
    else:
        table = table[: 2 * (len(table) // 3) + 1]
        place_of = table[:, 4]
    blocks_of = -(-table[:, column] // tile)
    assert len(entries) == blocks_of.sum()
    for entry in np.flatnonzero(blocks_of):
        place = place_of[entry]
        assert (entries[place : place + blocks_of[entry]] == entry).all()
    rows = table[:, column:4:2].sum(1).max()
    shift = max(0, int(rows // tile).bit_length() - (kinds - 1).bit_length())
    listed = (blocks_of[entries] - 1) >> shift
    assert (np.diff(listed) <= 0).all(), "longest first"


def bounds(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@PLANS
@pytest.mark.parametrize(("kinds", "seed"), [(KINDS, 7), (2, 0), (5, 7)])
def test_lists(plan, kinds, seed):
    lengths = np.random.default_rng(seed).integers(0, 1500, (2, 70)) * (np.arange(70) % 5 > 0)
    q, k = map(bounds, lengths)
    used = lengths - lengths % 300
    total = (q[-1] + 100, k[-1] + 1000)
    found = prepared(plan, total, q, k, used[0], used[1], kinds=kinds, seed=seed)
    check(plan, *found, kinds)
    table = found[0]
    assert (table[:70, :4] == np.stack([used[0], used[1], q[:-1], k[:-1]], 1)).all()
    rows = table[:, :2].sum(0) if plan.lists_keys else table[:141, 0].sum()
    assert (rows == (total if plan.lists_keys else total[0])).all(), "with the gaps, every row is in the table once"


def test_more_sequences_than_threads():
    lengths = np.random.default_rng(0).integers(0, 3, 2500) * 40
    lengths[2000] = 9000
    q = bounds(lengths)
    check(BACKWARD, *prepared(BACKWARD, (q[-1], q[-1]), q, q))


def test_a_sequence_of_more_blocks_than_there_are_kinds():
    q = bounds([100, 5_000_000, 900])
    assert BACKWARD.tile_n * KINDS < 5_000_000
    check(BACKWARD, *prepared(BACKWARD, (q[-1], q[-1]), q, q))


@PLANS
@pytest.mark.parametrize(
    "wrong",
    [[0] + 200 * [2000], [0, 2000] * 100, range(2000, -1, -10), [-5, 2**31 - 1] * 50, [2**31 - 1, -(2**31)] * 50],
    ids=["all end behind", "overlapping", "falling", "beyond", "beyond, falling"],
)
def test_wrong_bounds_stay_within_memory(plan, wrong):
    """The machine would say where an address leaves the list; each place in it is written once at most. Sequences whose
    places for sums overlap have no queries."""
    table, found = prepared(plan, (2000, 2000), list(wrong), list(wrong), [2**31 - 1] * (len(wrong) - 1))
    check(plan, table, found)
    rows = table[found[:, -1]]
    assert (rows[:, :4] >= 0).all() and (rows[:, :2] + rows[:, 2:4] <= 2000).all()


def test_heads_whose_tiles_are_taken_together():
    """As many as L2 holds the rows of; of a short sequence all."""
    lengths = [100, 3000, 40_000, 0]
    plan_rows = BACKWARD.rows_in_l2
    _, found = prepared(BACKWARD, (43_100, 43_100), bounds(lengths), bounds(lengths), heads=12)
    together = {int(numbers[-1]): int(numbers[6]) for numbers in found}
    assert together == {0: 12, 1: min(12, plan_rows // 3000), 2: max(1, plan_rows // 40_000)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kinds.places + 4 * ((num_blocks - 1) >> kinds.shift), num_blocks) : 0", "kinds.places, 1) : 0"),
        ("int place = up_to_here - blocks;", "int place = up_to_here;"),
        ("shfl_from(numbers[i + j], owner)", "numbers[i + j]"),
        ("<= index ? step : 0", "< index ? step : 0"),
        (
            "int const first = kinds.count - 1 - lane_id() * width;",
            "int const first = kinds.count - 2 - lane_id() * width;",
        ),
        ("+ up_to_here > capacity)", "+ up_to_here > 2 * capacity)"),
        ("store_shared_int(falls, 1)", "store_shared_int(falls, 0)"),
    ],
)
def test_a_fault_is_seen(old, new):
    whole = rendered(BACKWARD, 5)
    assert whole.source.count(old) == 1
    seeded = Rendered(whole.source.replace(old, new), whole.origins)
    q = bounds([300, 10, 700, 700, 1, 150])
    with pytest.raises((AssertionError, KernelFault)):
        check(BACKWARD, *prepared(BACKWARD, (q[-1], q[-1]), q, q, source=seeded), 5)
        check(BACKWARD, *prepared(BACKWARD, (2000, 2000), None, 20 * [0, 2000], source=seeded), 5)
        overlap = [0, 2000, 0, 2000]
        check(BACKWARD, *prepared(BACKWARD, (2000, 300), overlap, [0, 100, 200, 300], source=seeded), 5)
