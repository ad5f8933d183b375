"""The kernel that prepares a ragged batch, alone: its table of sequences and its lists of blocks, of any lengths."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections import defaultdict

import numpy as np
import pytest

from fa2gen.cpu.build import build_library
from fa2gen.cpu.kernel import SHARED_BASE, _params_argument, _scratch, view_of
from fa2gen.cpu.run import Job, KernelFault, run
from fa2gen.features.varlen import ENTRY_NUMBERS, entries
from fa2gen.launch import NUMBER_BYTES, launch_of
from fa2gen.options import Options, Shape
from fa2gen.plan import make_plan
from fa2gen.render import Rendered, render
from fa2gen.select import best_spec
from fa2gen.spec import Problem

PLAN = make_plan(best_spec(Problem(direction="bwd", head_dim=64, mask="causal", varlen=True), "sm90"))


@functools.cache
def rendered(most_levels: int) -> Rendered:
    """With so many levels."""
    whole = render(PLAN, target="cpu")
    told = f"constexpr int kMaxLevels = {PLAN.prepare_levels};"
    assert whole.source.count(told) == 1
    return Rendered(whole.source.replace(told, f"constexpr int kMaxLevels = {most_levels};"), whole.origins)


def prepared(total, bounds_q, bounds_k, used_q=None, used_k=None, most_levels=PLAN.prepare_levels, seed=0, source=None):
    """(table, list of blocks of queries, of keys), of int32 arrays of lengths; total rows of queries and of keys."""
    given = {"cu_seqlens_q": bounds_q, "cu_seqlens_k": bounds_k, "seqused_q": used_q, "seqused_k": used_k}
    given = {name: np.asarray(x, np.int32) for name, x in given.items() if x is not None}
    batch = next(len(x) - name.startswith("cu") for name, x in given.items())
    launch = launch_of(PLAN, Shape(batch, *map(int, total), 1, 1), Options(causal=True, varlen=True), num_sms=4)
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
    run(build_library(PLAN, rendered=source or rendered(most_levels)), job, memories)
    found = {m.name: np.frombuffer(ctypes.string_at(m.address, m.bytes), np.int32) for m in memories}
    m_blocks, n_blocks = found["num_blocks"]
    table = found["sequences"].reshape(-1, ENTRY_NUMBERS)
    assert len(table) == entries(batch)
    return table, found["m_list"].reshape(-1, 2)[:m_blocks], found["n_list"].reshape(-1, 2)[:n_blocks]


def check(table, m_list, n_list, most_levels=PLAN.prepare_levels):
    """Each block of each entry is listed once, the first keys of an entry first, and the entries longest first where
    no level has several blocks."""
    rows = table[:, :4:2].sum(1).max(), table[:, 1:4:2].sum(1).max()
    for column, tile, found in ((0, PLAN.tile_m, m_list), (1, PLAN.tile_n, n_list)):
        blocks_of = -(-table[:, column] // tile)
        wanted = {(entry, block) for entry in np.flatnonzero(blocks_of) for block in range(blocks_of[entry])}
        assert len(found) == len(wanted) and {*map(tuple, found.tolist())} == wanted
        if rows[column] // tile < most_levels:
            keys = [(-block if column == 0 else block, -blocks_of[entry]) for entry, block in found]
            assert keys == sorted(keys), "level by level, and in a level the longest first"
        seen = defaultdict(int)
        for entry, block in n_list.tolist():
            assert block == seen[entry], "gradients wait for the keys before"
            seen[entry] += 1
    first = table[: len(table) // 3 * 2 + 1, 4]  # places for blocks of queries: no two entries share one
    spans = sorted((at, at - (-rows // PLAN.tile_m)) for at, rows in zip(first, table[:, 0], strict=False) if rows)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def bounds(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize("most_levels", [PLAN.prepare_levels, 2, 5])
@pytest.mark.parametrize("seed", [0, 7])
def test_lists(most_levels, seed):
    lengths = np.random.default_rng(seed).integers(0, 1500, (2, 70)) * (np.arange(70) % 5 > 0)
    q, k = map(bounds, lengths)
    used = lengths - lengths % 300
    total = (q[-1] + 100, k[-1] + 1000)
    found = prepared(total, q, k, used[0], used[1], most_levels=most_levels, seed=seed)
    check(*found, most_levels)
    table = found[0]
    assert (table[:70, :4] == np.stack([used[0], used[1], q[:-1], k[:-1]], 1)).all()
    rows = table[:, :2].sum(0)
    assert tuple(rows) == total, "with the gaps, every row is in the table once"


def test_more_sequences_than_threads():
    lengths = np.random.default_rng(0).integers(0, 3, 2500) * 40
    lengths[2000] = 9000
    q = bounds(lengths)
    check(*prepared((q[-1], q[-1]), q, q))


def test_a_sequence_of_more_blocks_than_levels():
    q = bounds([100, 5_000_000, 900])
    assert PLAN.tile_m * PLAN.prepare_levels < 5_000_000
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


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fetch_add_shared(levels.entries + 4 * last, -1) - 1", "fetch_add_shared(levels.entries + 4 * last, 0) - 1"),
        ("from_the_last ? behind :", "!from_the_last ? behind :"),
        ("entry - lane + owner", "entry"),
        ("<= index ? step : 0", "< index ? step : 0"),
        ("(entries << levels.shift) + load", "entries + load"),
        ("if (first + num_blocks > capacity)", "if (first > capacity)"),
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
