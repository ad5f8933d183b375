"""The kernel that prepares a ragged batch, alone: its table of sequences and lists of their blocks, of any lengths."""

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
from fa2gen.plan import make_plan
from fa2gen.render import Rendered, render
from fa2gen.select import best_spec
from fa2gen.spec import Problem

PLAN = make_plan(best_spec(Problem(direction="bwd", head_dim=64, mask="causal", varlen=True), "sm90"))


@functools.cache
def rendered(kinds: int) -> Rendered:
    """With so many kinds of lengths."""
    whole = render(PLAN, target="cpu")
    told = f"constexpr int kNumLengths = {PLAN.prepare_lengths};"
    assert whole.source.count(told) == 1
    return Rendered(whole.source.replace(told, f"constexpr int kNumLengths = {kinds};"), whole.origins)


def prepared(
    total, bounds_q, bounds_k, used_q=None, used_k=None, kinds=PLAN.prepare_lengths, seed=0, source=None, heads=1
):
    """(table, list of blocks of queries, of keys), of int32 arrays of lengths; total rows of queries and of keys."""
    given = {"cu_seqlens_q": bounds_q, "cu_seqlens_k": bounds_k, "seqused_q": used_q, "seqused_k": used_k}
    given = {name: np.asarray(x, np.int32) for name, x in given.items() if x is not None}
    batch = next(len(x) - name.startswith("cu") for name, x in given.items())
    launch = launch_of(PLAN, Shape(batch, *map(int, total), heads, heads), Options(causal=True, varlen=True), num_sms=4)
    memories, buffers = [view_of(name, x).memory(name) for name, x in given.items()], []
    for scratch in PLAN.scratch:
        if scratch.name in ("sequences", "num_blocks", "m_list", "n_list"):
            memory, buffer = _scratch(scratch.name, NUMBER_BYTES * launch.scratch[scratch.name], scratch.cleared)
            memories.append(memory)
            buffers.append(buffer)
    entry = PLAN.entry_points[0]
    strides = dict.fromkeys((param.name for param in PLAN.params if param.name.endswith("_stride")), 0)
    job = Job(
        grid=launch.grids[0],
        num_threads=entry.num_threads,
        shared_base=SHARED_BASE,
        shared_bytes=entry.shared_memory_bytes,
        has_async_proxy=True,
        arguments=(_params_argument(PLAN, {**launch.values, **strides}, memories),),
        seed=seed,
        kernel=entry.symbol,
    )
    run(build_library(PLAN, rendered=source or rendered(kinds)), job, memories)
    found = {m.name: np.frombuffer(ctypes.string_at(m.address, m.bytes), np.int32) for m in memories}
    m_blocks, n_blocks = found["num_blocks"]
    table = found["sequences"].reshape(-1, ENTRY_NUMBERS)
    assert len(table) == 3 * batch + 2
    return table, found["m_list"][:m_blocks], found["n_list"][:n_blocks]


def check(table, m_list, n_list, kinds=PLAN.prepare_lengths):
    """Each entry is listed as often as it has blocks, from its place on; the longest ones first, each in turn where
    lengths are not taken together."""
    for column, tile, found in ((0, PLAN.tile_m, m_list), (1, PLAN.tile_n, n_list)):
        blocks_of = -(-table[:, column] // tile)
        assert len(found) == blocks_of.sum()
        for entry in np.flatnonzero(blocks_of):
            place = table[entry, 4 + column]
            assert (found[place : place + blocks_of[entry]] == entry).all()
        rows = table[:, column:4:2].sum(1).max()
        shift = max(0, int(rows // tile).bit_length() - (kinds - 1).bit_length())
        listed = (blocks_of[found] - 1) >> shift
        assert (np.diff(listed) <= 0).all(), "longest first"


def bounds(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize("kinds", [PLAN.prepare_lengths, 2, 5])
@pytest.mark.parametrize("seed", [0, 7])
def test_lists(kinds, seed):
    lengths = np.random.default_rng(seed).integers(0, 1500, (2, 70)) * (np.arange(70) % 5 > 0)
    q, k = map(bounds, lengths)
    used = lengths - lengths % 300
    total = (q[-1] + 100, k[-1] + 1000)
    found = prepared(total, q, k, used[0], used[1], kinds=kinds, seed=seed)
    check(*found, kinds)
    table = found[0]
    assert (table[:70, :4] == np.stack([used[0], used[1], q[:-1], k[:-1]], 1)).all()
    rows = table[:, :2].sum(0)
    assert tuple(rows) == total, "with the gaps, every row is in the table once"


def test_more_sequences_than_threads():
    lengths = np.random.default_rng(0).integers(0, 3, 2500) * 40
    lengths[2000] = 9000
    q = bounds(lengths)
    check(*prepared((q[-1], q[-1]), q, q))


def test_a_sequence_of_more_blocks_than_there_are_kinds():
    q = bounds([100, 5_000_000, 900])
    assert PLAN.tile_m * PLAN.prepare_lengths < 5_000_000
    check(*prepared((q[-1], q[-1]), q, q))


@pytest.mark.parametrize(
    "wrong",
    [[0] + 200 * [2000], [0, 2000] * 100, range(2000, -1, -10), [-5, 2**31 - 1] * 50, [2**31 - 1, -(2**31)] * 50],
    ids=["all end behind", "overlapping", "falling", "beyond", "beyond, falling"],
)
def test_wrong_bounds_stay_within_memory(wrong):
    """The machine would say where an address leaves the lists; each place in them is written once at most."""
    table, m_list, n_list = prepared((2000, 2000), list(wrong), list(wrong), [2**31 - 1] * (len(wrong) - 1))
    check(table, m_list, n_list)
    assert (table[:, :4] >= 0).all() and (table[:, 0] + table[:, 2] <= 2000).all()


def test_heads_whose_tiles_are_taken_together():
    """As many as L2 holds the rows of; of a short sequence all."""
    lengths = [100, 3000, 40_000, 0]
    plan_rows = PLAN.rows_in_l2
    table, *_ = prepared((43_100, 43_100), bounds(lengths), bounds(lengths), heads=12)
    assert table[:4, 6].tolist() == [12, min(12, plan_rows // 3000), max(1, plan_rows // 40_000), 12]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "kinds.places + 4 * ((num_blocks - 1) >> kinds.shift), num_blocks);\n    }\n    int",
            "kinds.places, 1);\n    }\n    int",
        ),
        ("int place = up_to_here - blocks;", "int place = up_to_here;"),
        ("entry - lane + owner", "entry"),
        ("<= index ? step : 0", "< index ? step : 0"),
        (
            "int const first = kinds.count - 1 - lane_id() * width;",
            "int const first = kinds.count - 2 - lane_id() * width;",
        ),
        ("+ up_to_here > capacity)", "+ up_to_here > 2 * capacity)"),
    ],
)
def test_a_fault_is_seen(old, new):
    whole = rendered(5)
    assert whole.source.count(old) == 1
    seeded = Rendered(whole.source.replace(old, new), whole.origins)
    q = bounds([300, 10, 700, 700, 1, 150])
    with pytest.raises((AssertionError, KernelFault)):
        check(*prepared((q[-1], q[-1]), q, q, source=seeded), 5)
        check(*prepared((2000, 2000), 20 * [0, 2000], None, source=seeded), 5)
