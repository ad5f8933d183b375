"""Ragged batches over pages on the CPU: the bits of packed keys, whatever a page's size, and faults that must show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fa2gen import cases
from fa2gen.cases_cached import gathered
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.errors import InvalidInput
from fa2gen.launch import TILES_OF_FEW, row_by_row
from fa2gen.options import MAX_KEY_PARTS, Options, Shape
from fa2gen.plan import make_plan
from fa2gen.select import best_spec
from fa2gen.spec import KernelSpec, Mask, Problem
from tests.cpu.faults import Fault, symptom

# Queries and keys of the longest sequence; the sum of seqlen_q * 4099 + seqlen_k decides how many rows a page has.
SHAPES = {
    16: Shape(1, 40, 135, 2, 1),
    1: Shape(1, 41, 137, 2, 1),
    64: Shape(2, 40, 137, 4, 2),
    3: Shape(2, 70, 203, 2, 2),
}


def kernel(arch: str, mask: Mask = "causal", head_dim: int = 64, **fields: Any) -> KernelSpec:
    return best_spec(Problem(head_dim=head_dim, mask=mask, varlen=True, paged=True, **fields), arch)


def by_rows(*args: Any, **fields: Any) -> KernelSpec:
    """Of sm90, whose pages are copied row by row."""
    found = row_by_row(make_plan(kernel("sm90", *args, **fields)))
    assert found is not None
    return found.spec


def run(name: str, shape: Shape, options: Options | None = None, rendered=None, **how):
    """(verdict, case); what is beside the rows that see something is looked at too."""
    spec = KernelSpec.from_name(name)
    case = cases.make(spec, shape, options)
    run_options = RunOptions(**how)
    run_kernel(
        make_plan(spec), case.tensors, case.options, shape=case.shape, run_options=run_options, rendered=rendered
    )
    assert cases.written_outside(case) is None
    return cases.verdict(case), case


def packed(spec: KernelSpec, **more: int) -> KernelSpec:
    """With heads of a group as rows."""
    return KernelSpec(problem=spec.problem, tiling=spec.tiling.model_copy(update={"pack_heads": 1} | more))


def in_parts(spec: KernelSpec) -> KernelSpec:
    """With each tile's keys in parts."""
    return packed(spec, pack_heads=spec.tiling.pack_heads, split_keys=1)


@pytest.mark.parametrize("spec", [kernel("sm80"), kernel("sm90"), by_rows()], ids=lambda spec: spec.name)
def test_pages_give_the_bits_of_packed_keys(spec):
    """Of every size of pages: those of the kernel without pages, with the same tiling."""
    tiling = spec.tiling.model_copy(update={"page_rows": 0})
    of_rows = KernelSpec(problem=spec.problem.model_copy(update={"paged": False}), tiling=tiling)
    for size in (16, 3):
        shape = SHAPES[size]
        verdict, case = run(spec.name, shape)
        assert verdict.ok and case.shape.page_size == size, (verdict, case.shape)
        keys = [end for *_, end in case.rows]
        found = [gathered(case.tensors, b, n) for b, n in enumerate(keys)]
        tensors = {name: case.tensors[name].clone() for name in ("q", "o", "lse", "cu_seqlens_q", "seqused_q")}
        tensors |= {name: torch.cat([x[name] for x in found], dim=1) for name in ("k", "v")}
        tensors["cu_seqlens_k"] = torch.tensor([0, *itertools.accumulate(keys)], dtype=torch.int32)
        for name in ("o", "lse"):
            tensors[name].fill_(torch.nan)
        run_kernel(make_plan(of_rows), tensors, case.options)
        assert torch.equal(tensors["o"], case.tensors["o"]) and torch.equal(tensors["lse"], case.tensors["lse"])


@pytest.mark.parametrize(
    "spec",
    [
        kernel("sm80", "window", 80),
        kernel("sm80", "causal", 128),
        kernel("sm90", "causal", 96, sink=True),
        kernel("sm90", "full", 192),
        by_rows("window", 24, head_dim_v=72),
        packed(by_rows("causal", 192)),
        packed(kernel("sm90", "window", 24, head_dim_v=72)),
        TILES_OF_FEW[64][1][0].spec(make_plan(kernel("sm90")), True),
    ],
    ids=lambda spec: spec.name,
)
def test_every_shape_of_kernel(spec):
    verdict, _ = run(spec.name, SHAPES[64])
    assert verdict.ok, verdict


@pytest.mark.parametrize(
    "spec",
    [
        in_parts(packed(kernel("sm90", "causal"))),
        in_parts(packed(by_rows("window", 24, head_dim_v=72))),
        in_parts(kernel("sm90", "window", 192, sink=True)),
    ],
    ids=lambda spec: spec.name,
)
def test_keys_in_parts(spec):
    """Any number of parts, more than there are blocks of keys, gives a right answer, whoever is first the same; and one
    part the bits of the kernel without."""
    whole = make_plan(packed(spec, pack_heads=spec.tiling.pack_heads, split_keys=0))
    case = cases.make(spec, SHAPES[64])
    for parts in (1, 2, MAX_KEY_PARTS):
        found = []
        for seed in range(1 + (parts == 2)):
            for name in ("o", "lse"):
                case.tensors[name].fill_(torch.nan)
            sized = case.shape._replace(key_parts=parts)
            run_kernel(make_plan(spec), case.tensors, case.options, shape=sized, run_options=RunOptions(seed=seed))
            verdict = cases.verdict(case)
            assert verdict.ok and cases.written_outside(case) is None, (parts, verdict)
            found.append([case.tensors[name].clone() for name in ("o", "lse")])
        if parts == 1:
            run_kernel(whole, case.tensors, case.options, shape=case.shape)
            found.append([case.tensors[name] for name in ("o", "lse")])
        assert all(torch.equal(x, y) for x, y in zip(found[0], found[-1], strict=True))


def test_pages_that_TMA_can_not_read_are_refused():
    """Boxes of one row of 64 bytes would lie on no multiple of 128 in shared memory."""
    spec = kernel("sm90", head_dim=32)
    spec = KernelSpec(problem=spec.problem, tiling=spec.tiling.model_copy(update={"swizzle_bytes": 64}))
    case = cases.make(spec, SHAPES[16])
    size = case.shape.page_size
    tensors = {**case.tensors, **{name: case.tensors[name].flatten(0, 1)[:, None] for name in ("k", "v")}}
    shape = case.shape._replace(page_size=1, entries=case.shape.entries * size)
    shape = shape._replace(seqlen_k=case.tensors["block_table"].shape[1])
    with pytest.raises(InvalidInput, match="pages of 1 rows, of head dim 32: a multiple of 2 rows"):
        run_kernel(spec, tensors, case.options, shape=shape)


# Seeded faults -------------------------------------------------------------------------------------------------------

FAULTS = [
    Fault("a page's rows", kernel("sm80").name, "key - number * page_size", "key % 8"),
    Fault("a box's row in its page", kernel("sm90").name, "        if (row < 0) {", "        if (row < -64) {"),
    Fault("a box's page", kernel("sm90").name, "number -= p.tile_pages;", "number -= 1;"),
    Fault(
        "chunks behind the end", kernel("sm80").name, "bool const exists = row < num_keys && ", "bool const exists = "
    ),
    Fault(
        "the sequence's end",
        kernel("sm90").name,
        "return {kRaggedRows - num_keys, page_of",
        "return {kRaggedRows - kTileN, page_of",
    ),
    Fault("the next tile", kernel("sm90").name, "slot ^= 4;", "slot ^= 0;", schedules=20),
    Fault("who waits for the next tile", kernel("sm90").name, "named_barrier_sync(kProducer, 32 * kNumLoadWarps);", ""),
    Fault("bytes that are waited for", kernel("sm90").name, "row += 32 * p.box_rows;", "row += kTileN;"),
    Fault(
        "a stage that is not free",
        kernel("sm90").name,
        "int part) {\n    mbarrier_wait(empty, state.phase ^ 1);\n    if (part",
        "int part) {\n    if (part",
        schedules=3,
    ),
    Fault(
        "a tile's Q that its last block needs",
        kernel("sm90", head_dim=128).name,
        "release_q_after(n_block == blocks.begin);\n            };",
        "release_q_after(true);\n            };",
    ),
    Fault(
        "who loads Q",
        kernel("sm90", head_dim=128).name,
        "if (warp == 1) {\n            load_q",
        "if (is_v) {\n            load_q",
    ),
    Fault("a row's lane", by_rows().name, "places.at[begin / 32], row, ", "places.at[begin / 32], 0, "),
    Fault("a row's swizzle", by_rows().name, "(lane_chunk ^ row_swizzle(row) << 4)", "lane_chunk"),
    Fault("a part of a block", by_rows().name, "int const part = warp / 2;", "int const part = warp % 2;"),
    Fault("rows behind the end", by_rows().name, "at != kNoKey ? source_bytes : 0", "source_bytes"),
    Fault(
        "a fence behind copies",
        by_rows(head_dim=256).name,
        "parity);\n    fence_proxy_async();",
        "parity);",
        message="no fence.proxy.async of the reader",
    ),
    Fault(
        "copies that arrive", by_rows(head_dim=256).name, "cp_async_mbarrier_arrive(full);", "mbarrier_arrive(full);"
    ),
    Fault(
        "a fence of who copied",
        by_rows().name,
        "fence_proxy_async();  // copies",
        "// copies",
        message="no fence.proxy.async behind it",
    ),
    Fault(
        "copies that are waited for",
        by_rows().name,
        "cp_async_wait_1();\n                publish",
        "publish",
        schedules=30,
    ),
    Fault("the last copies of a tile", by_rows().name, "cp_async_wait_0();\n", ""),
    Fault("a block behind", by_rows().name, "filling = stage;", "filling = state.stage;"),
    Fault(
        "a stage whose copies may begin", by_rows().name, "mbarrier_wait(empty, state.phase ^ 1);\n#pragma", "#pragma"
    ),
    Fault("a query's row in the mask", packed(kernel("sm90")).name, "min(row / p.group + 1", "min(row + 1"),
    Fault("a head's LSE", packed(kernel("sm90")).name, "tile.bidh * p.group + r % p.group", "tile.bidh * p.group"),
    Fault(
        "a query's box", packed(kernel("sm90")).name, "kRaggedRows - (s.q - row) / group", "kRaggedRows - (s.q - row)"
    ),
    Fault("rows of a group", packed(kernel("sm90")).name, "q.end * p.group}", "q.end}"),
    Fault("blocks of a part", in_parts(kernel("sm90")).name, "(part < with_more ? 1 : 0)", "1"),
    Fault("behind a part", in_parts(kernel("sm90")).name, "min(max(block, of_tile.begin), of_tile.end)", "block"),
    Fault("which part a tile is", in_parts(kernel("sm90")).name, "slot[2], slot[3]}", "slot[2], 0}"),
    Fault("a part's place", in_parts(kernel("sm90")).name, "tile.part) * p.num_heads", "tile.part)"),
    Fault("a part's weight", in_parts(kernel("sm90")).name, "share * reciprocal_approx(sum)", "reciprocal_approx(sum)"),
    Fault("a part's sum", in_parts(kernel("sm90")).name, "sum += shfl_xor(sum, step)", "sum += 0.0f"),
    Fault("a sink of one part", in_parts(kernel("sm90", sink=True)).name, "tile.part > 0 ? -kInfinity : ", ""),
    Fault("a row's head in O", in_parts(packed(kernel("sm90"))).name, "queries = p.seqlen_q / p.group", "queries = 1"),
    Fault(
        "lengths that are given one by one",
        kernel("sm80").name,
        "if (used != nullptr) {\n        rows = min(bounds",
        "if (used == nullptr) {\n        rows = min(bounds",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_seeded_fault_shows(fault):
    shapes = (SHAPES[3], SHAPES[1], SHAPES[64])
    assert any(symptom(run, fault, shapes, seed) for seed in range(fault.schedules))
